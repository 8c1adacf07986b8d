"""The host's side of an iteration at the paper's size: judging, storing, reading and selecting.

python benchmarks/host_judging.py [--queries=45000] [--samples=16]
"""

import argparse
import contextlib
import dataclasses
import multiprocessing
import pathlib
import random
import re
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from answers import ordinary
from spent import Spent, highest

from configs import base, tiny
from mstar_jax import sharding, store
from mstar_jax.inference import score
from mstar_jax.inference.generate import Asked, ask
from mstar_jax.inference.sampler import for_sampling
from mstar_jax.models import vlm
from mstar_jax.rewards import prm, selection, steps
from mstar_jax.stages.base import base as train_base
from mstar_jax.stages.run import start
from mstar_jax.stages.select import draw, keep
from mstar_jax.structs import Query, Response, int32

SHARD = 256  # queries of a shard
QUERIES, SAMPLES = 45_000, 16  # a quarter of the paper's queries, and K
STEPS, CHUNKS = 1000, 20  # of training; of scores, of 4 queries each

# ---- 1. judging ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def added(row: Spent) -> Iterator[None]:
    """Adds what the block costs."""
    clock, processor = time.perf_counter(), time.process_time()
    yield
    row.seconds += time.perf_counter() - clock
    row.processor += time.process_time() - processor
    row.peak = highest() / 1e9


def answered(number: int, samples: int) -> tuple[Query, list[Response]]:
    """A query and responses to it, as they come from the device."""
    rng = random.Random(number)
    made = list(ordinary(rng, samples))
    _, gold, how = made[0]
    name, image = f"train_{number:06d}", (f"/data/images/{number % 20_000}.png",)
    query = Query(name, image, "What is the total of all bars?", how["options"], gold, how["answer_type"])
    found = []
    for sample, (text, _, _) in enumerate(made):
        tokens = int32(rng.choices(range(200, 32_000), k=len(text) // 4))
        found.append(Response(name, sample, text, tokens, -rng.random() * 50, rng.random() < 0.02))
    return query, found


def judging(folder: pathlib.Path, queries: int, samples: int) -> list[Spent]:
    """An iteration's responses: judged and stored; read, scored and stored again; selected."""
    folder.mkdir(parents=True, exist_ok=True)
    config = base.get_config()
    stored = Spent(f"{queries * samples} responses judged and stored")
    indexed = Spent("the same: found again in the store")
    plain = Spent("the same: two correct ones of each query selected at random")
    scored = Spent("the same: read for scoring, the scores of the correct ones stored (without the device)")
    chosen = Spent("the same: two of each query selected by their scores")
    asked: list[Query] = []
    one = store.Store(folder / "rollouts", {})
    shards = -(-queries // SHARD)
    for shard in range(shards):
        made = [answered(at, samples) for at in range(shard * SHARD, min(queries, (shard + 1) * SHARD))]
        asked += [query for query, _ in made]
        with added(stored):
            lines = (
                store.line(store.rollout(query, [selection.judge(query, r) for r in group]))
                for query, group in made
            )
            one.write(shard, lines, str)
    with added(indexed):
        found = one.groups(shards)

    def kept(groups: score.Groups, select: str) -> int:
        settings = config.evolve.copy_and_resolve_references()
        settings.select, settings.keep = select, 2
        rows = []
        for query in asked:
            random_numbers = draw(0, "iteration_01", query)
            group = keep(
                query, groups[query.id], settings=settings, aggregate="min", draw=random_numbers, known=None
            )
            rows.append(tuple(r.tokens for r in group))
        return sum(map(len, rows))

    with added(plain):
        assert kept(found, "random") > 0

    two = store.Store(folder / "scores", {})
    rng = np.random.default_rng(0)

    def score_of(response: Response) -> Response:
        values = rng.random(len(steps.split(response.text))).tolist()
        return dataclasses.replace(response, step_scores=tuple(values))

    for shard in range(shards):
        part = asked[shard * SHARD : (shard + 1) * SHARD]
        with added(scored):
            groups = {query.id: found[query.id] for query in part}
            records = (
                store.rollout(query, [score_of(r) for r in selection.correct(groups[query.id])])
                for query in part
            )
            pairs = [Asked(query, query.question) for query in part]
            digest = score.digest_of(folder, pairs, groups)
            two.write(shard, map(store.line, records), lambda _, digest=digest: digest)
    with added(chosen):
        assert kept(two.groups(shards), "prm") > 0
    return [stored, indexed, plain, scored, chosen]


# ---- 2. memory ----------------------------------------------------------------------------------------

TINY = {  # what is changed in configs/tiny.py:smoke
    "data.max_prompt": 160,
    "data.buckets": (160, 256),
    "policy.decoder.num_layers": 1,
    "policy.decoder.unroll": 1,
    "policy.vision.num_layers": 1,
    "base.check_from": 1 << 30,
    "base.batch": 8,
    "prm.chunk": 4,
}


def resident(pid: int | str) -> float:
    """Resident memory of a process, GB; 0 of one that is gone."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmRSS:\s+(\d+) kB", pathlib.Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 / 1e9 if found else 0.0
    return 0.0


def memory(
    folder: pathlib.Path, steps: int, chunks: int, workers: int
) -> dict[str, list[tuple[float, float]]]:
    """Resident GB of (this process, its loader workers) after each train step and each chunk of scores."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS([__file__])  # Grain asks for them
    config = tiny.get_config("smoke")
    config.update_from_flattened_dict({**TINY, "base.steps": steps, "data.workers": workers})
    seen: list[tuple[float, float]] = []

    def stop() -> bool:  # asked after every step and every chunk
        children = [resident(child.pid) for child in multiprocessing.active_children()]
        seen.append((resident("self"), sum(children)))
        return False

    with jax.set_mesh(sharding.make_mesh(**config.mesh)):
        run = start(config, folder, {}, stop)
        policy = train_base(run)
        trained = list(seen)
        seen.clear()
        queries = run.labelled[: config.prm.chunk * chunks]
        text = "Bars red 4\nSum 4 + 2 = 6\nThe answer is 6"
        tokens = int32(run.processor.encode_response(text))
        groups = {
            query.id: [Response(query.id, i, text + "\nso" * i, tokens, 0.0, False) for i in range(4)]
            for query in queries
        }
        model = for_sampling(vlm.RewardModel(policy.params), run.mesh, jnp.float32)
        encode = prm.as_written(run.processor, run.texts)
        scorer = score.Scorer(lambda: model, {}, run.processor, encode)
        score.score(run, scorer, "memory", ask(queries, run.template), groups, settings={})
    return {"train steps": trained, "chunks of scores": list(seen)}


def shown(name: str, seen: list[tuple[float, float]]) -> str:
    """What was resident after a tenth and at the end, with the growth between, and at ten places."""
    (early, _), (last, _) = seen[len(seen) // 10], seen[-1]
    places = [seen[len(seen) * tenth // 10] for tenth in range(10)] + [seen[-1]]
    way = ", ".join(f"{own:.3f}+{others:.3f}" for own, others in places)
    grown = f"{early:.3f} GB after a tenth, {last:.3f} at the end ({last / early - 1:+.1%})"
    return f"{len(seen)} {name}: {grown}; with workers {way}"


# ---- 3. the command -----------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--chunks", type=int, default=CHUNKS, help="of 4 queries; the data has 128 in all")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--only", default="judging,memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        if "judging" in args.only:
            for row in judging(folder, args.queries, args.samples):
                costs = f"{row.seconds:.1f} s, {row.processor:.1f} of processors, peak {row.peak:.2f} GB"
                print(f"{row.what}: {costs}", flush=True)
        if "memory" in args.only:
            for name, seen in memory(folder / "run", args.steps, args.chunks, args.workers).items():
                print(shown(name, seen), flush=True)


if __name__ == "__main__":
    main()
