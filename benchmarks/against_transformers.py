"""Rollouts, train steps and scores of shared-prefix rows, compared with repeating the prompt, on one machine.

    python benchmarks/against_transformers.py [--parts=rollouts,sft,prm] [--repeats=3] [--out=FILE.json]

A random policy of Phi-3.5-vision's architecture with a decoder of 34 M parameters (width 512, 8 layers, 8
heads, MLP 1408, vocabulary 8192: embedding and head are a quarter) and a CLIP tower of 2.7 M answers prompts
of 640 tokens, 601 of which belong to an image. transformers' own Phi3ForCausalLM and CLIPVisionModel get the
same weights. Their tower runs once per image, as ours does; the steps from there to the input of the decoder
are computed for them and not timed. Everything is float32 and may use all cores.

  rollouts  16 samples of 96 tokens per query, T = 1, without stop tokens: `rollouts.rollouts` against
            `generate(num_return_sequences=16)`, in tokens per second
  sft       five AdamW steps on two responses per query: one row of `step.make_train_step` against two padded
            sequences, loss on response tokens, frozen tower, in queries per second
  prm       step scores of 16 responses: one row of `prm.scores` against one row each, in queries per second

First both sides must agree: in greedy tokens, in the loss of every step, in scores. Rates are computed from
median times; ratios are to the best batch size of the other side. Responses have 96 tokens, as in the
rollouts; --lengths=drawn draws the lengths of those to train on and to score from a log-normal distribution
with median 150, clipped to 96..300. Reading image files is not measured.
"""

import argparse
import dataclasses
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from machine import Values, machine, show, spread, timed, versions
from PIL import Image
from safetensors.torch import load_file

from mstar_jax import models, sharding
from mstar_jax.data import loader
from mstar_jax.inference import draw, sampler
from mstar_jax.inference.rollouts import rollouts as answers
from mstar_jax.models import phi35, vision, vlm
from mstar_jax.models.layers import DecoderConfig
from mstar_jax.models.vision import VitConfig
from mstar_jax.rewards import prm
from mstar_jax.structs import Batch, Prompt, Query, Response, Row, TrainState
from mstar_jax.training.optimizer import carry_on, make_optimizer
from mstar_jax.training.step import make_train_step

FROZEN = ("^tower", "_separator$", "^project_")
LEARNING_RATE, B1, B2, CLIP = 1e-4, 0.9, 0.95, 1.0
STEPS = 5  # consecutive train steps; the first one after the other side's turn is slower for both


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
      config: the dimensions of the policy.
      prompt: tokens of every prompt.
      branches, tokens: K and R of the rollouts; also the number of responses to score, and their length.
      ours, theirs: numbers of queries sampled together; each is measured.
      trained: queries of a train step.
      alone: rows of a device batch if every response has its own row; each is measured.
    """

    config: phi35.Phi35Config
    prompt: int = 640
    branches: int = 16
    tokens: int = 96
    ours: tuple[int, ...] = (16,)
    theirs: tuple[int, ...] = (1, 2)
    trained: int = 2
    alone: tuple[int, ...] = (1, 4)


def dimensions(vocab: int, width: int, mlp: int, layers: int, heads: int, tower: tuple[int, ...], image: int):
    decoder = DecoderConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=mlp, num_layers=layers, num_heads=heads,
        num_kv_heads=heads, head_dim=width // heads, short_factor=(1.0,) * (width // heads // 2),
        long_factor=(1.0,) * (width // heads // 2), max_position=131072, original_max_position=4096,
        unroll=layers,
    )  # fmt: skip
    return phi35.Phi35Config(decoder, VitConfig(*tower, image_size=image, patch_size=14))


FULL = Sizes(dimensions(8192, 512, 1408, 8, 8, (192, 768, 6, 3), 336))
SMOKE = Sizes(dimensions(512, 64, 96, 2, 4, (32, 64, 2, 2), 56), 64, 4, 12, (2,), (1,), 2, (4,))


# ---- 1. two models with the same weights, and the same prompts ------------------------------------------


def make_prompts(sizes: Sizes, folder: pathlib.Path) -> tuple[phi35.Phi35Processor, list[Prompt]]:
    """A processor without stop tokens, and prompts of one length with images of 3 crops and a view."""
    phi35.make_tokenizer(["Read the values off the image."], folder, sizes.config.decoder.vocab_size)
    processor = phi35.FAMILY.processor(sizes.config, phi35.FAMILY.load_tokenizer(folder))
    processor.stop_ids = processor.forbidden_ids = ()
    side, rng, pairs = sizes.config.vision.image_size, np.random.default_rng(0), []
    text = "Read the values off the image."
    text += "~" * (sizes.prompt - processor.prefix_shapes([text], [[(3 * side, side)]])[0][0])
    for number in range(max(*sizes.ours, *sizes.theirs, sizes.trained)):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (side, 3 * side, 3), np.uint8)).save(path)
        pairs.append((Query(str(number), (str(path),), text), text))
    prompts = [p for p in loader.plan_prompts(pairs, processor, sizes.prompt) if p is not None]
    assert {prompt.length for prompt in prompts} == {sizes.prompt}
    return processor, prompts


def same_in_torch(
    policy: phi35.Phi35Vision, folder: pathlib.Path
) -> tuple[transformers.Phi3ForCausalLM, transformers.CLIPVisionModel]:
    """transformers' decoder and tower with the weights of the policy, through an exported checkpoint."""
    c, v = policy.config.decoder, policy.config.vision
    models.FromScratch(phi35.FAMILY, policy.config, folder).save(policy, folder / "exported")
    stored = load_file(folder / "exported/model.safetensors")
    rope = {"rope_type": "longrope", "rope_theta": c.rope_theta, "short_factor": list(c.short_factor or ())}
    rope |= {"long_factor": list(c.long_factor or ())}
    rope |= {"original_max_position_embeddings": c.original_max_position}
    config = transformers.Phi3Config(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        max_position_embeddings=c.max_position, original_max_position_embeddings=c.original_max_position,
        rope_parameters=rope, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    theirs = transformers.Phi3ForCausalLM(config)
    language = {name: value for name, value in stored.items() if not name.startswith(phi35.IMAGE)}
    theirs.load_state_dict(language, strict=True)
    settings = transformers.CLIPVisionConfig(
        hidden_size=v.hidden_size, intermediate_size=v.intermediate_size, num_hidden_layers=v.num_layers,
        num_attention_heads=v.num_heads, image_size=v.image_size, patch_size=v.patch_size,
    )  # fmt: skip
    tower, at = transformers.CLIPVisionModel(settings), f"{phi35.IMAGE}img_processor."
    wanted, stored = (
        tower.state_dict(),
        {n.removeprefix(at): x for n, x in stored.items() if n.startswith(at)},
    )
    stored = {n if n in wanted else n.removeprefix("vision_model."): x for n, x in stored.items()}
    tower.load_state_dict(stored, strict=True)
    return theirs.eval(), tower.eval()


class Bench:
    """The policy in both libraries, and rows as arrays for both."""

    def __init__(self, sizes: Sizes, folder: pathlib.Path, mesh: jax.sharding.Mesh):
        self.sizes = sizes
        self.mesh = mesh
        self.processor, self.prompts = make_prompts(sizes, folder)
        self.policy = jax.jit(lambda: phi35.Phi35Vision(sizes.config, nnx.Rngs(0)))()
        self.theirs, self.tower = same_in_torch(self.policy, folder)
        self.embed = jax.jit(lambda model, batch: model.embed(batch.tokens, batch.image_index, batch.pixels))
        self.rng = np.random.default_rng(1)

    def batches(self, rows: Sequence[Row], size: int) -> list[tuple[tuple[Row, ...], Batch]]:
        """Device batches of `size` rows, padded to the next multiple of 32 tokens."""
        buckets = [32 * n for n in range(1, 1 + max(row.length for row in rows) // 32 + 1)]
        plans = loader.plan_batches(rows, size, buckets)
        return list(loader.row_batches(plans, self.processor, size))

    def embedded(self, batch: Batch) -> torch.Tensor:
        """Token embeddings with the image features inserted."""
        return torch.tensor(np.asarray(self.embed(self.policy, batch)))

    def crops(self, count: int) -> torch.Tensor:
        """The images of the first prompts, for transformers' tower, whose features are compared with ours."""
        (_, batch), *_ = self.batches([Row(p) for p in self.prompts[:count]], count)
        seen = np.asarray(jax.jit(lambda model, crops: model.normalised(crops))(self.policy, batch.pixels))
        pixels = seen.reshape(-1, *seen.shape[2:])
        crops = torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()
        patches = vision.patchify(jnp.asarray(pixels[:1]), self.sizes.config.vision.patch_size)
        ours = np.asarray(jax.jit(lambda tower, patches: tower(patches))(self.policy.tower, patches))
        apart = np.abs(ours - self.looked_at(crops[:1])[:, 1:].numpy()).max()
        if apart > 1e-3:
            raise SystemExit(f"the towers' features differ by {apart}")
        return crops

    def looked_at(self, crops: torch.Tensor) -> torch.Tensor:
        """The features of transformers' tower at the layer that Phi-3.5-vision uses."""
        with torch.inference_mode():
            layer = self.sizes.config.vision.select_layer
            return self.tower(crops, output_hidden_states=True).hidden_states[layer]

    def responses(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        vocab = self.sizes.config.decoder.vocab_size
        return [tuple(self.rng.integers(10, vocab, length).tolist()) for length in lengths]


def compared(
    part: str, unit: str, amounts: dict[str, float], spent: dict[str, list[tuple[float, float]]], others: int
) -> list[Values]:
    """Rows of the table. The first `others` runs are the other side; the rest is compared with the best of
    them."""
    rows = []
    for name, amount in amounts.items():
        found = spread(spent[name])
        row = {"part": part, "what": name, "rate": amount / found["seconds"], "unit": unit, "ratio": None}
        rows.append(row | found)
    best = max(row["rate"] for row in rows[:others])
    for row in rows[others:]:
        row["ratio"] = row["rate"] / best
    return rows


# ---- 2. rollouts ----------------------------------------------------------------------------------------


def rollouts(bench: Bench, repeats: int, lengths: Callable[[int], list[int]]) -> tuple[list[dict], dict]:
    s = bench.sizes
    settings = draw.SamplingConfig(s.branches, s.tokens)
    samplers = {size: sampler.Sampler(bench.processor, settings, size) for size in s.ours}
    rows = [Row(p) for p in bench.prompts]
    batches = {size: bench.batches(rows[:size], max(1, size // 8)) for size in s.ours}

    def ours(size: int, temperature: float) -> list[list[Response]]:
        temperatures = np.full(s.branches, temperature, np.float32)
        found = answers(
            samplers[size],
            bench.policy,
            [rows[:size]],
            iter(batches[size]),
            bench.processor,
            key=jax.random.key(0),
            temperatures=temperatures,
            iteration=0,
            mesh=bench.mesh,
        )
        answered = [group for groups in found for group in groups]
        assert {len(r.tokens) for group in answered for r in group} == {s.tokens}
        return answered

    inputs = bench.embedded(bench.batches(rows, len(rows))[0][1])
    crops = {size: bench.crops(size) for size in s.theirs}

    def theirs(size: int, **settings: object) -> torch.Tensor:
        config = transformers.GenerationConfig(max_new_tokens=s.tokens, eos_token_id=None, **settings)
        mask = torch.ones(inputs[:size].shape[:2], dtype=torch.long)
        bench.looked_at(crops[size])
        with torch.inference_mode():
            found = bench.theirs.generate(
                inputs_embeds=inputs[:size], attention_mask=mask, generation_config=config
            )
        assert found.shape[1] == s.tokens
        return found

    greedy = theirs(min(s.theirs), do_sample=False)[0].tolist()  # also warms up both sides
    for size in s.ours:
        if any(list(r.tokens) != greedy for r in ours(size, 0.0)[0]):
            raise SystemExit(f"rollouts: greedy tokens of {size} queries differ from transformers'")
    sample = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    sample |= {"num_return_sequences": s.branches}
    runs: dict[str, Callable[[], object]] = {}
    amounts: dict[str, float] = {}
    for size in s.theirs:
        runs[f"transformers, {size} queries"] = lambda size=size: theirs(size, **sample)
        amounts[f"transformers, {size} queries"] = size * s.branches * s.tokens
    for size in s.ours:
        runs[f"ours, {size} queries"] = lambda size=size: ours(size, 1.0)
        amounts[f"ours, {size} queries"] = size * s.branches * s.tokens
    table = compared("rollouts", "tokens/s", amounts, timed(runs, repeats), len(s.theirs))
    return table, {"equal greedy tokens": len(greedy), "of them different": len(set(greedy))}


# ---- 3. train steps -------------------------------------------------------------------------------------


def sft(bench: Bench, repeats: int, lengths: Callable[[int], list[int]]) -> tuple[list[dict], dict]:
    count, losses = bench.sizes.trained, {"ours": list[float](), "transformers": list[float]()}
    rows = [Row(prompt, tuple(bench.responses(lengths(2)))) for prompt in bench.prompts[:count]]
    longest = max(row.length for row in rows)
    ((_, host),) = loader.row_batches([(-(-longest // 32) * 32, rows)], bench.processor, count)
    batch = sharding.put_batch(host, bench.mesh)
    tx = make_optimizer(b1=B1, b2=B2, weight_decay=0.0, clip=CLIP)
    start = TrainState(jnp.zeros((), jnp.int32), bench.policy, ())
    state = carry_on(start, tx, bench.mesh, frozen=FROZEN, moments=False, schedule=False)
    step = make_train_step(tx, bench.mesh, frozen=FROZEN)

    def ours(steps: int = STEPS) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = jax.block_until_ready(step(state, batch, np.float32(LEARNING_RATE)))
            losses["ours"].append(float(metrics["loss"]))

    # one sequence per response: prompt, response, padding
    alone = [Row(row.prompt, (response,)) for row in rows for response in row.responses]
    length = max(row.length for row in alone)
    ((_, each),) = loader.row_batches([(length, alone)], bench.processor, len(alone))
    tokens, seen = torch.tensor(each.tokens, dtype=torch.long), torch.tensor(each.image_index >= 0)[..., None]
    mask = torch.tensor(each.branch >= 0, dtype=torch.long)
    labels = torch.where(torch.tensor(each.branch > 0), tokens, -100)
    features, crops = bench.embedded(each), bench.crops(count)
    optimizer = torch.optim.AdamW(bench.theirs.parameters(), LEARNING_RATE, (B1, B2), weight_decay=0.0)
    bench.theirs.train()

    def theirs(steps: int = STEPS) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            bench.looked_at(crops)
            x = torch.where(seen, features, bench.theirs.get_input_embeddings()(tokens))
            loss = bench.theirs(inputs_embeds=x, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(bench.theirs.parameters(), CLIP)
            optimizer.step()
            losses["transformers"].append(loss.item())

    names = (
        f"transformers, {len(alone)} sequences of {length}",
        f"ours, {count} rows of {host.tokens.shape[1]}",
    )
    theirs(1)
    ours(1)
    spent = timed(dict(zip(names, (theirs, ours))), repeats)
    apart = [abs(a - b) for a, b in zip(losses["ours"], losses["transformers"])]
    if apart[0] > 1e-4 or max(apart) > 1e-3:
        raise SystemExit(f"sft: losses differ: {losses}")
    found = compared("sft", "queries/s", dict.fromkeys(names, float(count * STEPS)), spent, 1)
    return found, {"first loss": round(losses["ours"][0], 4), "losses differ by": max(apart)}


# ---- 4. scores of the reward model ----------------------------------------------------------------------


def scores(bench: Bench, repeats: int, lengths: Callable[[int], list[int]]) -> tuple[list[dict], dict]:
    s, width = bench.sizes, bench.sizes.config.decoder.hidden_size
    model = vlm.RewardModel(bench.policy)
    model.weight[...] = jax.random.normal(jax.random.key(2), (width,))
    model.likelihood[...] = jnp.float32(0.5 / s.tokens / vlm.RewardModel.FLOOR)  # no score near 0 or 1
    responses = bench.responses(lengths(s.branches))
    marks = [[(at, 0.0) for at in {*range(23, len(r), 24), len(r) - 1}] for r in responses]
    labels = tuple(tuple(sorted(each)) for each in marks)
    whole = [Row(bench.prompts[0], tuple(responses), (), labels)]
    alone = [Row(bench.prompts[0], (r,), (), (label,)) for r, label in zip(responses, labels)]
    named = {f"alone, {size} rows together": bench.batches(alone, size) for size in s.alone}
    named["ours, one row"] = bench.batches(whole, 1)
    scored: dict[str, dict] = {}

    def score(name: str) -> None:
        found = prm.scores(model, named[name], bench.mesh)
        scored[name] = {
            response: values
            for (rows, _), groups in zip(named[name], found)
            for row, group in zip(rows, groups)
            for response, values in zip(row.responses, group)
        }

    for name in named:
        score(name)
    first, *others = (np.concatenate([found[r] for r in responses]) for found in scored.values())
    apart = max(float(np.abs(first - other).max()) for other in others)
    if apart > 1e-5:
        raise SystemExit(f"prm: scores differ by {apart}")
    spent = timed({name: lambda name=name: score(name) for name in named}, repeats)
    rows = compared("prm", "queries/s", dict.fromkeys(named, 1.0), spent, len(s.alone))
    spans = {"scores": len(first), "from": round(float(first.min()), 3), "to": round(float(first.max()), 3)}
    return rows, spans | {"differ by": apart, "tokens of the row": int(whole[0].length)}


# ---- 5. the command -------------------------------------------------------------------------------------

PARTS = {"rollouts": rollouts, "sft": sft, "prm": scores}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ours", help="queries that we sample together, e.g. 1,16")
    parser.add_argument("--theirs", help="queries that transformers samples together, e.g. 1,2")
    parser.add_argument("--lengths", choices=("fixed", "drawn"), default="fixed", help="of responses")
    parser.add_argument("--vocab", type=int, default=0, help="another vocabulary size, e.g. Phi's 32064")
    parser.add_argument("--smoke", action="store_true", help="a tiny policy, to check that the script runs")
    parser.add_argument("--out", default="", help="a JSON file")
    args = parser.parse_args()
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    wanted = args.parts.split(",")
    parts = [name for name in PARTS if name in wanted]  # in this order: sft changes their weights
    sizes, rng = SMOKE if args.smoke else FULL, np.random.default_rng(2)
    for side in ("ours", "theirs"):
        if values := getattr(args, side):
            sizes = dataclasses.replace(sizes, **{side: tuple(map(int, values.split(",")))})
    if args.vocab:
        decoder = dataclasses.replace(sizes.config.decoder, vocab_size=args.vocab)
        sizes = dataclasses.replace(sizes, config=dataclasses.replace(sizes.config, decoder=decoder))

    def lengths(count: int) -> list[int]:
        if args.lengths == "fixed":
            return [sizes.tokens] * count
        return np.clip(rng.lognormal(np.log(150), 0.4, count), 96, 300).astype(int).tolist()

    torch.set_num_threads(os.cpu_count() or 1)
    transformers.logging.set_verbosity_error()
    record: dict = {"machine": machine()}
    record["versions"] = versions("jax", "jaxlib", "flax", "optax", "torch", "transformers")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder, jax.set_mesh(mesh):
        bench = Bench(sizes, pathlib.Path(folder), mesh)
        size = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in
                (("decoder", bench.policy.decoder), ("policy", bench.policy))}  # fmt: skip
        record["sizes"] = {f"{name} parameters": f"{count:,}" for name, count in size.items()}
        record["sizes"] |= {"prompt": sizes.prompt, "K": sizes.branches, "new tokens": sizes.tokens}
        record["sizes"] |= {"vocabulary": sizes.config.decoder.vocab_size, "lengths": args.lengths}
        record["results"] = []
        for name in parts:
            rows, checks = PARTS[name](bench, args.repeats, lengths)
            record["results"] += rows
            record[f"{name} agree"] = checks
    show(record, args.out)


if __name__ == "__main__":
    main()
