"""Full-size decoding, scoring and training on one accelerator, as shares of what its chip could do.

    python benchmarks/gpu.py [--parts=rollouts,prm,train] [--repeats=5] [--out=FILE.json]
    python benchmarks/gpu.py --smoke                           # a tiny policy, on any machine
    python benchmarks/gpu.py --policy=smolvlm --dtype=float32 --prompt=640 --repeats=3       # on a CPU

Phi-3.5-vision or SmolVLM2-256M in its full size, with random weights made on the device; every prompt has an
image of four crops and its view. One device is used; shares are of its figures in `flops.CHIPS`, and empty
without them.

  decode   share of the memory's bandwidth: the bytes that a step has to read (weights, the prompts' keys and
           values, the branches' own, half full on average; each once) by its time, which is the difference of
           1 and R tokens; goal 60 %
  prefill  MFU; with the pixels' way to the device, without the step of the first token
  prm      MFU of the scores of K responses in a row, in bfloat16
  train    MFU of a step on rows of two responses, computed in bfloat16, with parameters and Adam moments in
           float32 (50 GB, and 17 GB of gradients); goal 45 %. With `--lora` of adapters alone, without MFU

MFU counts the model's own products: neither what remat computes twice nor the softmax.
"""

import argparse
import os

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # read when jax starts

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from machine import machine, show, spread, timed, versions
from PIL import Image
from spent import highest

from mstar_jax import models, sharding
from mstar_jax.crops.arrays import Crops, gathered, placed
from mstar_jax.data import loader
from mstar_jax.inference import draw
from mstar_jax.inference.rollouts import rollouts as answers
from mstar_jax.inference.sampler import Sampler
from mstar_jax.models import phi35, vlm
from mstar_jax.models.layers import ADAPTERS, DecoderConfig
from mstar_jax.models.smolvlm import SmolVLMConfig
from mstar_jax.models.vision import VitConfig
from mstar_jax.plan import official
from mstar_jax.profiling import flops
from mstar_jax.rewards import prm
from mstar_jax.structs import Prefix, Prompt, Query, Row
from mstar_jax.training import optimizer
from mstar_jax.training.step import REMAT, init_state, make_train_step, token_loss

SMALL = DecoderConfig(512, 64, 96, 2, 4, 4, 16, max_position=131072, original_max_position=4096)
SIGLIP = dataclasses.replace(
    official.SMOLVLM2_256M.vision,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    image_size=64,
)
TINY: dict[str, vlm.PolicyConfig] = {
    "phi3_v": phi35.Phi35Config(SMALL, VitConfig(32, 64, 2, 2, image_size=56, patch_size=14)),
    "smolvlm": SmolVLMConfig(SMALL, SIGLIP, num_crops=4),
}


class Host:
    """A processor without a tokenizer: prompts of random tokens around a square image's features."""

    stop_ids = forbidden_ids = ()

    def __init__(self, config: vlm.PolicyConfig, prompt: int):
        self.config, self.prompt, self.limit = config, prompt, prompt
        self.vocab_size = config.decoder.vocab_size
        self.grid = (2, 2)
        self.crops = 1 + self.grid[0] * self.grid[1]
        self.rng = np.random.default_rng(0)

    def cut(self, images: Sequence[Image.Image]) -> Crops[np.ndarray]:
        """Random crops of an image that is not there."""
        side, places = self.config.vision.image_size, [(*self.grid, -1, -1), *placed(*self.grid)]
        parts = [self.rng.integers(0, 256, (self.crops, side, side, 3), np.uint8)]
        return gathered(parts, places, side)

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        if isinstance(self.config, SmolVLMConfig):
            span = np.arange(self.crops * self.config.features)
        else:
            span = phi35.feature_layout(*self.grid, self.config.vision.side // 2, 2)
        if len(span) > self.prompt - 2:
            raise SystemExit(f"--prompt={self.prompt}: the image takes {len(span)} tokens")
        index = np.full(self.prompt, -1, np.int32)
        index[1 : 1 + len(span)] = span
        tokens = np.where(index < 0, self.rng.integers(0, self.vocab_size, self.prompt), 0).astype(np.int32)
        return Prefix(tokens, index)

    def decode(self, tokens: Any) -> str:
        return ""

    def length_limit(self, prefix: int) -> int:
        return prefix + self.limit

    def batch(self, rows: int, lengths: Sequence[int] = ()) -> list[tuple[tuple[Row, ...], Any]]:
        """One batch of rows with responses of these lengths, a step's end at the last token of each."""
        prompts = [Prompt(Query(str(n), (), ""), "", self.prompt, self.crops) for n in range(rows)]
        responses = [tuple(self.rng.integers(0, self.vocab_size, n).tolist()) for n in lengths]
        labels = tuple(((n - 1, 0.0),) for n in lengths)
        made = [Row(prompt, tuple(responses), (), labels) for prompt in prompts]
        return list(loader.row_batches([(made[0].length, made)], self, rows))


@dataclasses.dataclass
class Bench:
    """The device, and the sizes of the command line."""

    config: vlm.PolicyConfig
    host: Host
    mesh: Any
    chip: flops.Chip | None
    args: argparse.Namespace

    def build(self) -> vlm.VisionLanguageModel:
        return models.FAMILIES[self.args.policy].model(self.config, nnx.Rngs(0))

    def weights(self) -> vlm.VisionLanguageModel:
        """In the dtype of the command line; others are there one by one at most."""
        return jax.jit(lambda: self.build().merged(jnp.dtype(self.args.dtype)))()

    def row(
        self, what: str, seconds: dict[str, float], rate: float, unit: str, **more: Any
    ) -> dict[str, Any]:
        clock = {name: seconds[name] for name in ("seconds", "least", "greatest", "processor")}
        peak = {"TFLOP/s": None, "MFU": None, "bandwidth": None} | more
        return {"what": what, "rate": rate, "unit": unit} | clock | peak

    def mfu(self, counted: dict[str, float], seconds: float) -> dict[str, Any]:
        """TFLOP/s and their share of the chip's, in all and by part."""
        done = sum(counted.values()) / seconds
        share = done / self.chip.flops if self.chip else None
        return {"TFLOP/s": done / 1e12, "MFU": share}

    def by_part(self, counted: dict[str, float], seconds: float) -> dict[str, str]:
        """Each part's TFLOP, and its share of what the chip could have done meanwhile."""
        peak = self.chip.flops if self.chip else None
        return {
            name: f"{work / 1e12:.4g} TFLOP" + (f" ({100 * work / seconds / peak:.1f} %)" if peak else "")
            for name, work in counted.items()
        }


# ---- 1. rollouts ----------------------------------------------------------------------------------------


def must_read(model: Any, rows: int, prompt: int, branches: int, tokens: int) -> dict[str, float]:
    """Bytes that a decoding step has to read, on average over `tokens`: each weight, key and value once."""
    c, item = model.decoder.config, model.decoder.embedding[...].dtype.itemsize
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.decoder))
    if not c.tie_word_embeddings:
        weights -= model.decoder.embedding[...].nbytes  # of which a few rows are taken
    token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * item
    own = rows * branches * (tokens + 1) / 2 * token
    return {"weights": weights, "prompts": rows * prompt * token, "branches": own}


def rollouts(bench: Bench) -> tuple[list[dict], dict]:
    a, host = bench.args, bench.host
    model, batch = bench.weights(), host.batch(a.rows)
    sampler = Sampler(host, draw.SamplingConfig(a.branches, a.tokens), a.rows)
    asked = [list(rows) for rows, _ in batch]
    how = {"key": jax.random.key(0), "temperatures": np.ones(a.branches, np.float32), "iteration": 0}

    def run(limit: int) -> None:
        host.limit = limit
        list(answers(sampler, model, asked, iter(batch), host, **how, mesh=bench.mesh))

    run(a.tokens)
    found = timed({"one": lambda: run(1), "all": lambda: run(a.tokens)}, a.repeats)
    one, whole = np.array(found["one"]), np.array(found["all"])
    each = (whole - one) / (a.tokens - 1)  # of a step, repeat by repeat
    step, first, total = (spread(times.tolist()) for times in (each, one - each, whole))
    read = must_read(model, a.rows, a.prompt, a.branches, a.tokens)
    share = sum(read.values()) / step["seconds"] / bench.chip.bandwidth if bench.chip else None
    counted = flops.count(lambda model, batch: model.hidden(batch), model, batch[0][1])
    samples = a.rows * a.branches
    rows = [
        bench.row(f"decode, {a.rows} x {a.branches}", step, samples / step["seconds"], "tokens/s",
                  bandwidth=share),
        bench.row(f"prefill, {a.rows} x {a.prompt}", first, a.rows * a.prompt / first["seconds"], "tokens/s",
                  **bench.mfu(counted, first["seconds"])),
        bench.row(f"rollouts, {a.tokens} tokens", total,
                  samples * a.tokens / total["seconds"], "tokens/s"),
    ]  # fmt: skip
    more = {f"a step reads {name}": f"{size / 1e9:.4g} GB" for name, size in read.items()}
    return rows, more | bench.by_part(counted, first["seconds"])


# ---- 2. scores ------------------------------------------------------------------------------------------


def scores(bench: Bench) -> tuple[list[dict], dict]:
    a = bench.args
    model = vlm.RewardModel(bench.weights())
    batch = bench.host.batch(a.score_rows, [a.response] * a.branches)

    def run() -> None:
        list(prm.scores(model, batch, bench.mesh))

    run()
    found = spread(timed({"score": run}, a.repeats)["score"])
    length = batch[0][1].tokens.shape[1]
    counted = flops.count(prm.token_scores, model, batch[0][1])
    rate = a.score_rows * length / found["seconds"]
    row = bench.row(f"prm, {a.score_rows} x {length}", found, rate, "tokens/s",
                    **bench.mfu(counted, found["seconds"]))  # fmt: skip
    return [row], bench.by_part(counted, found["seconds"])


# ---- 3. training ----------------------------------------------------------------------------------------


def training(bench: Bench) -> tuple[list[dict], dict]:
    a = bench.args
    tx = optimizer.make_optimizer(b2=0.95)
    frozen = (f"^(?!{ADAPTERS})",) if a.lora else ()
    state = init_state(bench.build, tx, bench.mesh, frozen=frozen)
    how: dict[str, Any] = {"accumulate": a.accumulate, "dtype": jnp.dtype(a.dtype), "remat": a.remat}
    step = make_train_step(tx, bench.mesh, frozen=frozen, **how)
    host = bench.host.batch(a.train_rows, [a.response] * 2)[0][1]
    batch, losses = sharding.put_batch(host, bench.mesh), list[float]()

    def run() -> None:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch, np.float32(1e-6)))
        losses.append(float(metrics["loss"]))

    run()
    found = spread(timed({"train": run}, a.repeats)["train"])
    if not np.isfinite(losses).all():
        raise SystemExit(f"train: losses {losses}")
    length = host.tokens.shape[1]
    rate = a.train_rows * length / found["seconds"]
    title = f"train, {a.train_rows} x {length}" + (f", adapters of rank {a.lora}" if a.lora else "")
    if a.lora:
        return [bench.row(title, found, rate, "tokens/s")], {}
    gradient = jax.grad(lambda model, batch: token_loss(model, batch)[0])
    counted = flops.count(gradient, state.params, host)
    row = bench.row(title, found, rate, "tokens/s", **bench.mfu(counted, found["seconds"]))
    return [row], bench.by_part(counted, found["seconds"])


# ---- 4. the command -------------------------------------------------------------------------------------

PARTS = {"rollouts": rollouts, "prm": scores, "train": training}
SMOKE = {"prompt": 48, "rows": 2, "branches": 2, "tokens": 8, "score_rows": 1, "train_rows": 2, "response": 8}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which of them")
    parser.add_argument("--policy", choices=("phi3_v", "smolvlm"), default="phi3_v")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--prompt", type=int, default=1024, help="tokens, 757 of them the image's (SmolVLM2: 320)"
    )
    parser.add_argument("--rows", type=int, default=16, help="queries decoded together")
    parser.add_argument(
        "--branches", type=int, default=16, help="K: responses of each, and of a row to score"
    )
    parser.add_argument("--tokens", type=int, default=256, help="R: new tokens of each")
    parser.add_argument("--response", type=int, default=256, help="tokens, to score and to train on")
    parser.add_argument("--score_rows", type=int, default=2)
    parser.add_argument("--train_rows", type=int, default=8)
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches of a train step")
    parser.add_argument("--lora", type=int, default=0, help="rank of adapters to train; 0 trains all")
    parser.add_argument("--remat", choices=tuple(REMAT), default="full")
    parser.add_argument(
        "--layers", type=int, default=0, help="of the decoder, fewer than it has: room for activations"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny policy, to see that it runs")
    parser.add_argument("--out", default="", help="a JSON file")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    if args.smoke:
        vars(args).update(SMOKE)
    config, device = TINY[args.policy] if args.smoke else official.OFFICIAL[args.policy], jax.devices()[0]
    layers = args.layers or config.decoder.num_layers
    decoder = dataclasses.replace(config.decoder, num_layers=layers, lora_rank=args.lora)
    config = dataclasses.replace(config, decoder=decoder)
    mesh, chip = sharding.make_mesh(devices=[device]), flops.chip_of(device.device_kind)
    bench = Bench(config, Host(config, args.prompt), mesh, chip, args)
    record: dict[str, Any] = {"machine": machine(), "versions": versions("jax", "jaxlib", "flax", "optax")}
    count = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(bench.build)))
    left_out = ("parts", "repeats", "smoke", "out")
    record["sizes"] = {"parameters": f"{count:,}"} | {
        name: value for name, value in vars(args).items() if name not in left_out
    }
    record["results"] = []
    with jax.set_mesh(mesh):
        for name in args.parts.split(","):
            rows, more = PARTS[name](bench)
            record["results"] += rows
            record[name] = more
    if used := device.memory_stats():
        record["memory"] = {"peak GB": round(used["peak_bytes_in_use"] / 1e9, 2)}
    else:  # on a CPU, Python and its libraries included
        record["memory"] = {"peak GB resident": round(highest() / 1e9, 2)}
    show(record, args.out)


if __name__ == "__main__":
    main()
