"""What a whole run takes, stage by stage, from a config and what is assumed of the data.

A stage is a number of calls of the compiled programs. How many follows from the config; of sampling also from
when rows end, so the entering of rows into slots is played through with lengths drawn at random, as
`inference.rollouts` does it. The time of a call is that of the longest rows, less what shorter rows save: the
tower's part stays, the decoder's shrinks with the length, its attention's with the square. All images are
taken to have the most crops.
"""

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from mstar_jax import configure, sharding
from mstar_jax.data import loader
from mstar_jax.inference import generate
from mstar_jax.plan.calls import Assumed, lengths_of, packed, sampled, scored_batches, stems
from mstar_jax.plan.cost import Cost, peak_times
from mstar_jax.plan.programs import Program, Programs, trained
from mstar_jax.profiling.flops import Chip

RESPONSE, TOKEN = 220, 11  # bytes in a store, of a response and of each of its tokens


class Speed(NamedTuple):
    """Seconds of a program's call, and of decoding of a step and what a call of any number of steps adds."""

    each: float
    once: float


class Use(NamedTuple):
    """What a stage takes in all, on all devices.

    Attributes:
      stage: its name.
      times: how often it runs.
      read: tokens of the rows that are prefilled, scored or trained on, with padding.
      written: tokens that are sampled.
      flops: of the model.
      seconds: of all its calls.
      responses: that it writes into a store.
    """

    stage: str
    times: int
    read: float
    written: float
    flops: float
    seconds: float
    responses: float = 0.0


def bound(program: Program, cost: Cost, chip: Chip, count: int) -> Speed:
    """The least seconds of a program at the peak rates of `count` chips; of one that is not shown, those of
    the model's own FLOPs and of the bytes that have to be moved."""
    if cost.work is None:
        compute = sum(program.own().values()) / count / chip.flops
        return Speed(max(compute, sum(program.least().values()) / chip.bandwidth), 0.0)
    once = max(peak_times(cost.once, chip).values()) if cost.once else 0.0
    return Speed(max(peak_times(cost.work, chip).values()), once)


# ---- 1. stages ----------------------------------------------------------------------------------------


class Estimate:
    """Uses of a config's programs, one for each stage."""

    def __init__(
        self,
        programs: Programs,
        assumed: Assumed,
        made: Mapping[str, Sequence[Program]],
        speeds: Mapping[str, Sequence[Speed]],
    ):
        """Counts the programs' FLOPs.

        Args:
          programs: of the config.
          assumed: see `Assumed`.
          made: the programs by kind; of the scores one or more, the shortest rows first.
          speeds: the same for each of them.
        """
        self.config = programs.config
        self.decoder = programs.dimensions.decoder
        self.assumed = assumed
        self.made = made
        self.speeds = speeds
        self.flops = {kind: [program.own() for program in each] for kind, each in made.items()}
        self.rng = np.random.default_rng(0)

    def _scale(self, kind: str, at: int, length: int) -> float:
        """A call's cost with rows of this length, relative to the program's."""
        flops, program = self.flops[kind][at], self.made[kind][at]
        fixed = flops.get("vision", 0.0) + flops.get("projector", 0.0)
        whole = sum(flops.values())
        d = self.decoder  # the scores of its attention, and their product with the values
        scores = 4.0 * d.num_heads * d.head_dim * d.num_layers * program.rows * program.length**2
        scores *= 3 if kind.startswith("train") else 1
        scores = min(scores, whole - fixed)
        part = length / program.length
        return (fixed + (whole - fixed - scores) * part + scores * part**2) / whole

    def _prompt(self) -> int:
        return loader.bucket(self.assumed.prompt, self.config.data.buckets)

    def sample(
        self,
        stage: str,
        kind: str,
        queries: int,
        samples: int,
        times: int = 1,
        part: float = 1.0,
        length: int = 0,
    ) -> Use:
        """A pass of sampling.

        Args:
          stage: its name.
          kind: of the programs.
          queries: rows.
          samples: of a row.
          times: how often it runs.
          part: mean share of a response that a sample still adds: less than 1 for completions.
          length: of a row before its samples; 0 for the prompt's.
        """
        c = self.config.sampling
        prefill, decode = self.made[kind]
        shard = decode.rows * c.shard
        shards = sharding.batch_shards(prefill.args[3].limits.sharding.mesh)  # what fits may have another
        places = generate.places(c.places, samples)
        calls = np.zeros(4)
        written = 0
        for size, often in ((min(shard, queries), queries // shard), (queries % shard, 1)):
            if not size or not often:
                continue
            lengths = lengths_of(self.rng, (size, samples), self.assumed, c.max_new_tokens)
            if part < 1:
                lengths = np.maximum(
                    np.rint(lengths * self.rng.uniform(0, 2 * part, lengths.shape)), 1
                ).astype(int)
            found = sampled(lengths, decode.rows, places, prefill.rows, shards, c.max_new_tokens)
            written += often * int(lengths.sum())
            calls += often * np.array(
                [found.prefills, found.segments, found.steps, found.steps * found.share]
            )
        prefills, segments, steps, shares = calls
        # a step reads the weights, the prompts, and of the responses' cache the chunks that rows have reached
        least, share = decode.least(), places / generate.places(c.places, self._samples(kind))
        caches = least["prompts"] * steps + least["responses"] * shares * share
        scale = (least["weights"] * steps + caches) / sum(least.values())
        length = length or self._prompt()
        entering = self._scale(kind, 0, length)
        first, step = self.speeds[kind]
        seconds = prefills * entering * first.each + segments * step.once + scale * step.each
        flops = prefills * entering * sum(self.flops[kind][0].values())
        flops += steps * share * sum(self.flops[kind][1].values())
        read = prefills * prefill.rows * length
        return Use(stage, times, *(times * x for x in (read, written, flops, seconds, queries * samples)))

    def _samples(self, kind: str) -> int:
        return self.made[kind][1].args[1].limits.shape[1]

    def score(self, stage: str, queries: int, samples: int, right: float, times: int = 1) -> Use:
        """A pass of scoring; `right` is the share of the responses that are scored."""
        batches = scored_batches(
            self.rng,
            queries,
            samples,
            right=right,
            assumed=self.assumed,
            room=self.config.sampling.max_new_tokens,
            buckets=self.config.data.buckets,
            chunk=self.config.prm.chunk,
            batch=self.made["score"][0].rows,
        )
        read = flops = seconds = 0.0
        for length, count in batches.items():
            at = bisect.bisect_left(self.made["score"], length, key=lambda program: program.length)
            calls = count * self._scale("score", at, length)
            read += count * length * self.made["score"][at].rows
            flops += calls * sum(self.flops["score"][at].values())
            seconds += calls * self.speeds["score"][at].each
        return Use(stage, times, *(times * x for x in (read, 0, flops, seconds, queries * samples)))

    def train(
        self, stage: str, kind: str, settings: ml_collections.ConfigDict, samples: int, times: int = 1
    ) -> Use:
        """A stage's training, on `samples` responses a query."""
        [program], data = self.made[kind], self.config.data
        most, prompt = max(data.buckets), self.assumed.prompt
        rows: list[int] = []
        while len(rows) < 50 * settings.batch:
            longest = most
            if kind == "train prm" and self.rng.random() < settings.labelled / max(settings.queries, 1):
                longest = min(settings.longest, most)
            some = lengths_of(self.rng, (max(samples, 1),), self.assumed, self.config.sampling.max_new_tokens)
            longest = max(longest, prompt + int(some.max()))
            rows += [min(row, most) for row in packed(some, prompt, longest)]
        lengths = [loader.bucket(row, data.buckets) for row in rows]
        length = float(np.mean(lengths)) if data.grouped else max(lengths)  # of a stage, or of each batch
        calls = settings.steps * settings.batch / program.rows * self._scale(kind, 0, round(length))
        flops = calls * sum(self.flops[kind][0].values())
        read = settings.steps * settings.batch * length
        seconds = calls * self.speeds[kind][0].each
        return Use(stage, times, *(times * x for x in (read, 0, flops, seconds)))


def estimate(
    programs: Programs,
    assumed: Assumed,
    made: Mapping[str, Sequence[Program]],
    speeds: Mapping[str, Sequence[Speed]],
) -> list[Use]:
    """Every stage of `evolve.evolve`, in order, but for the base stage from scratch and the benchmarks."""
    e = Estimate(programs, assumed, made, speeds)
    c = programs.config
    samples, scores = 1 + c.eval.samples, "score" in made
    out: list[Use] = []

    def distinct(samples: int, warm_up: bool = False) -> float:
        return assumed.distinct_of(samples, c.evolve.k, warm_up)

    def measure(stage: str, queries: int, times: int = 1, scored: bool = True) -> None:
        out.append(e.sample(f"{stage}: samples", "evaluation", queries, samples, times))
        if scores and scored:
            share = distinct(samples, stage.startswith("warm-up"))
            out.append(e.score(f"{stage}: scores", queries, samples, share, times))

    embedded = c.data.figures.train and not c.data.labelled  # it has all of its test questions
    test = c.data.figures.test if embedded else c.data.test
    validation = min(c.data.validation, c.data.figures.validation) if embedded else c.data.validation

    def tests(stage: str) -> int:
        return validation + (test if stage in c.eval.test_at else 0)

    measure("base, measure", tests("base"), scored=False)
    if not c.warmup.data:
        queries = min(c.warmup.queries, assumed.queries)
        out.append(e.sample("warm-up, rationales", "rollouts", queries, c.warmup.k))
    out.append(e.train("warm-up, train", "train", c.warmup, c.warmup.keep or c.warmup.k))
    held_out = min(c.prm.held_out, assumed.queries // 4)
    if "labels" in made:
        queries = min(c.prm.queries, assumed.queries - held_out)
        labelled = min(c.prm.labelled, queries) + held_out
        out.append(e.sample("reward model, responses", "rollouts", queries + held_out, c.prm.k))
        rows, tokens = stems(c.prm.samples // c.prm.completions, c.prm.k, assumed)
        length = loader.bucket(min(round(assumed.prompt + tokens), made["labels"][0].length), c.data.buckets)
        rows = round(labelled * rows)
        out.append(e.sample("reward model, labels", "labels", rows, c.prm.samples, part=0.5, length=length))
    if "train prm" in made:
        out.append(e.train("reward model, train", "train prm", c.prm, c.prm.k))
        times = 1 + bool(embedded)  # there its steps' truth is known, and the untrained one scores as well
        out.append(e.score("reward model, report", held_out, c.prm.k, distinct(c.prm.k, True), times))
    measure("warm-up, measure", tests("warmup"))
    count = c.evolve.iterations
    if "exploration" in made:
        times = 1 + count // c.explore.every
        branches = e._samples("exploration")
        queries = min(c.explore.queries, validation)
        out.append(e.sample("temperatures, samples", "exploration", queries, branches, times))
        out.append(e.score("temperatures, scores", queries, branches, distinct(branches), times))
    if c.evolve.data == "rollouts" and count:
        mixin = c.evolve.unlabelled.mixin
        more = 0 if mixin is None else sum(t >= mixin * count for t in range(count))
        imitates = c.evolve.objective == "sft"  # a policy gradient takes the wrong ones too
        asked = c.evolve.select in ("prm", "likelihood") if imitates else c.evolve.process_weight > 0
        share = assumed.right if imitates else distinct(c.evolve.k)
        others = c.data.figures.unlabelled if embedded else assumed.queries  # half of a data set is labelled
        for name, among, times in (("", assumed.queries, count), ("unlabelled, ", others, more)):
            queries = math.ceil(c.evolve.fraction * among)
            if times:
                out.append(e.sample(f"iterations, {name}generate", "rollouts", queries, c.evolve.k, times))
            if times and scores and name and not c.evolve.unlabelled.oracle:
                every = distinct(c.evolve.k)
                out.append(e.score(f"iterations, {name}votes", queries, c.evolve.k, every, times))
            if times and scores and asked:
                out.append(e.score(f"iterations, {name}select", queries, c.evolve.k, share, times))
    if count:
        out.append(e.train("iterations, improve", "train", c.evolve, trained(c), count))
        measured = {t for t in range(1, count + 1) if t % c.eval.every == 0 or t == count}
        if c.explore.every and scores:
            measured |= set(range(c.explore.every, count + 1, c.explore.every))
        measure("iterations, measure", validation, len(measured))
        if before := len(measured - {count}) * ("iteration" in c.eval.test_at):
            measure("iterations, test", test, before)
        measure("last, test", test)
    return out


# ---- 2. output ----------------------------------------------------------------------------------------


def checkpoint_bytes(programs: Programs) -> tuple[int, int]:
    """(bytes of a TrainState on disk, how many are there at most)."""
    one = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(programs.train_state()))
    c = programs.config
    own = configure.trains_reward_model(c)
    # the warm-up's, R_p's, two of a stage that trains, and the best iteration's once it is none of the last
    best = c.evolve.iterations > c.evolve.keep_checkpoints + 1
    return one, 1 + own + c.evolve.keep_checkpoints + best + 2


def describe(
    uses: Sequence[Use], programs: Programs, assumed: Assumed, reach: float, price: float, name: str
) -> str:
    """The table of the whole run, and what it comes to."""
    devices = programs.mesh.devices.flat
    total = sum(use.seconds for use in uses)
    lines = [
        f"the run, assuming {assumed.queries:,} labelled queries, prompts of {assumed.prompt} tokens, "
        f"responses of {assumed.response:g} +- {assumed.spread:g} tokens, {100 * assumed.right:g} % of them "
        f"right, {100 * assumed.distinct:g} % of {programs.config.evolve.k} no copies "
        f"({100 * assumed.distinct_warm_up:g} % of the warm-up policy's), "
        f"{assumed.prefixes:g} labelled steps in each:",
        "",
        "| stage | times | M tokens read | sampled | PFLOP of the model | hours | share |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for use in uses:
        cells = [use.stage, f"{use.times}", f"{use.read / 1e6:,.2f}", f"{use.written / 1e6:,.2f}"]
        cells += (
            f"{use.flops / 1e15:,.3g}",
            f"{use.seconds / 3600:,.3g}",
            f"{100 * use.seconds / total:.1f} %",
        )
        lines.append("| " + " | ".join(cells) + " |")
    most = max(uses, key=lambda use: use.seconds)
    chips = len(devices)
    what = f"M-STaR of {name} on {chips} x {devices[0].device_kind}"

    def spent(seconds: float) -> str:
        hours = seconds / 3600
        cost = f", {price * hours * chips:,.0f} at {price:g} each" if price else ""
        return f"{hours / 24:,.2f} days ({hours:,.2f} hours), {hours * chips:,.0f} chip-hours{cost}"

    part = f"`{most.stage}` takes most, {100 * most.seconds / total:.0f} %"
    if reach == 1:
        lines += ["", f"{what}: {spent(total)}; {part}"]
    else:
        lines += [
            "",
            f"{what}: at least {spent(total)}; {part}",
            f"at {100 * reach:g} % of these rates: {spent(total / reach)}",
        ]
    responses = sum(use.responses for use in uses)
    stores = responses * (RESPONSE + TOKEN * assumed.response)
    one, count = checkpoint_bytes(programs)
    lines.append(
        f"disk: {stores / 1e9:,.1f} GB of rollouts, scores and labels, at most {count} checkpoints of "
        f"{one / 1e9:,.1f} GB; {(stores + count * one) / 1e9:,.0f} GB"
    )
    lines.append(f"left out: {left_out(programs)}")
    return "\n".join(lines)


def left_out(programs: Programs) -> str:
    """What a run does besides, in words."""
    found = ["benchmarks"] * bool(programs.config.benchmarks.names)
    found += ["the base stage"] * bool(programs.config.base.steps)
    gradient = programs.config.evolve.objective != "sft"
    found += ["the size of prm.path, for which the policy's is taken"] * bool(programs.config.prm.path)
    found += ["log probabilities of the rollouts, read once or twice an iteration"] * gradient
    found += ["compilation, reading and saving of checkpoints, and judging of answers"]
    return ", ".join(found)


def hours(uses: Sequence[Use], reach: float) -> dict[str, float]:
    """Hours of the parts of a run whose records tell what they took, see `report.hours`.

    Args:
      uses: of the run.
      reach: the share of the programs' rates that it reaches.
    """
    found = {"base": 0.0, "warm-up and reward model": 0.0, "iterations": 0.0}
    for use in uses:
        after = use.seconds / use.times if use.stage.startswith("temperatures") else 0.0  # the warm-up
        named = use.stage.partition(",")[0]
        part = {"base": "base", "warm-up": "warm-up and reward model"}.get(named, "iterations")
        found["warm-up and reward model" if named == "reward model" else part] += use.seconds - after
        found["warm-up and reward model"] += after
    return {part: seconds / 3600 / reach for part, seconds in found.items()}
