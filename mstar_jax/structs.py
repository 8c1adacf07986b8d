"""The values that travel between the modules, and the protocols of a policy's two sides.

Text lives in `Query` and `Response`, arrays in `Batch`, `KVCache` and `TrainState`. The two meet in two
places only: the loader's collate and `rollouts.rollouts`.
"""

import array
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import numpy as np
from PIL import Image


@dataclasses.dataclass(frozen=True, order=True)
class Stage:
    """A stage of a run; stages are ordered as they run.

        align < base < warmup < reward_model < iteration(1) < iteration(2) < ...

    Attributes:
      place: its number in this order.
    """

    place: int

    align: ClassVar["Stage"]
    base: ClassVar["Stage"]
    warmup: ClassVar["Stage"]
    reward_model: ClassVar["Stage"]

    @classmethod
    def iteration(cls, t: int) -> "Stage":
        """Iteration t of self-evolving training, counted from 1."""
        if t < 1:
            raise ValueError(f"iterations are counted from 1, got {t}")
        return cls(len(KINDS) - 1 + t - 1)

    @classmethod
    def parse(cls, name: str) -> "Stage":
        """The stage with this `name`.

        Raises:
          ValueError: no stage has it.
        """
        if name in KINDS[:-1]:
            return cls(KINDS.index(name))
        kind, _, number = name.partition("_")
        if kind != KINDS[-1] or not number.isdigit() or int(number) < 1:
            raise ValueError(
                f"no stage is called {name!r}; stages are align, base, warmup, prm and iteration_01, ..."
            )
        return cls.iteration(int(number))

    @property
    def kind(self) -> str:
        """`align`, `base`, `warmup`, `prm` or `iteration`: what results.json calls it."""
        return KINDS[min(self.place, len(KINDS) - 1)]

    @property
    def number(self) -> int:
        """t of an iteration, 0 for the other stages."""
        return max(self.place - len(KINDS) + 2, 0)

    @property
    def name(self) -> str:
        """The name of its folders and files, e.g. `warmup` or `iteration_03`."""
        return f"{self.kind}_{self.number:02d}" if self.number else self.kind

    def __str__(self) -> str:
        return self.name


KINDS = ("align", "base", "warmup", "prm", "iteration")
Stage.align = Stage(0)
Stage.base = Stage(1)
Stage.warmup = Stage(2)
Stage.reward_model = Stage(3)


@dataclasses.dataclass(frozen=True)
class Query:
    """One image question.

    Attributes:
      id: unique within a data set.
      images: absolute paths of its images, in the order of their marks; empty for a text-only query.
      question: the question's text, without the hint line and without its choices.
      options: the texts of the choices (A), (B), ...; None for a free-form question.
      answer: gold answer, the option's letter where there are options; None means unlabelled.
      answer_type: `choice`, `integer`, `float`, `boolean`, `math` or `text`, as the gold answer is one.
      asked_type: the same, but as the question alone says; `text` where it says nothing.
      source: the data set's name, the first component of the image path.
      precision: decimals that a float answer is asked for; None where the data set does not say.
    """

    id: str
    images: tuple[str, ...]
    question: str
    options: tuple[str, ...] | None = None
    answer: str | None = None
    answer_type: str = "text"
    source: str = ""
    precision: int | None = None
    asked_type: str = "text"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A query with its rendered prompt and what that costs: prefix tokens and image crops."""

    query: Query
    text: str
    length: int
    crops: int


Array = Any  # numpy's on the host, JAX's on a device, a ShapeDtypeStruct in `plan`; a union would need casts


def int32(tokens: Iterable[int]) -> "array.array[int]":
    """Token ids as an int32 array: 4 bytes each, where a tuple takes 8, and 28 more for an id above 256. It
    compares and slices as a list does, and numpy reads it without a copy."""
    return array.array("i", tokens)


def float32(values: Array) -> "array.array[float]":
    """Numbers as a float32 array, 4 bytes each; see `int32`."""
    return array.array("f", np.asarray(values, np.float32).tobytes())


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt and the responses that share it: to train on, to score, or to continue.

    Attributes:
      prompt: the shared prefix.
      responses: token ids, ending in a stop id where one was reached; the branches 1, 2, ... Those of stored
        responses are int32 arrays, see `int32`.
      weights: each response's weight in the loss on its tokens, or a weight for each of them; below 0 they
        become less likely. Empty means 1 for all.
      labels: each response's (index of a step's last token, label of the step); empty where no step counts.
      starts: where sampling continues, (branch, how many of its first tokens are kept, sample key), one for
        each of the K samples; empty: K samples from the prompt, with keys 0..K-1.
      old, reference: each response's log probability of every token (nats), under the policy that a stage
        begins with and under the warm-up; empty where an objective needs none.
      temperature: of these, and of the policy that is trained on them; None for 1.
    """

    prompt: Prompt
    responses: tuple[Sequence[int], ...] = ()
    weights: tuple[float | Sequence[float], ...] = ()
    labels: tuple[tuple[tuple[int, float], ...], ...] = ()
    starts: tuple[tuple[int, int, int], ...] = ()
    old: tuple[Sequence[float], ...] = ()
    reference: tuple[Sequence[float], ...] = ()
    temperature: float | None = None

    @property
    def length(self) -> int:
        """Tokens of prefix and branches."""
        return self.prompt.length + sum(map(len, self.responses))


@dataclasses.dataclass(frozen=True)
class Response:
    """One sampled response; a stage returns a new one with more filled in.

    Attributes:
      query_id: the `Query.id` that it answers.
      sample: index among the K samples of its query.
      text: decoded text, without special tokens and cut before a stop string.
      tokens: the sampled ids, an int32 array, with the stop id where one was reached; where a stop string cut
        the text, those of what is left of it, closed by the stop id.
      logprob: sum of the sampled tokens' log probabilities (nats) under the distribution sampled from.
      truncated: the length cap ended it, not a stop id or stop string.
      answer: the extracted final answer, None where nothing could be extracted.
      verdict: `correct`, `wrong`, `unparsed`, `gold-unparsed`, `failed` (a reward); None before checking.
      step_scores: the reward model's score of every step; None before scoring.
      iteration: self-evolving iteration that sampled it.
      temperature: sampling temperature, 0 for greedy.
      score: what a user's reward gave it, in 0..1; None without one.
      logprobs: float32 array, the log probability of each token, of which `logprob` is the sum; None where no
        objective needs them. In a store 4 bytes a token are 5.3 characters (base64).
    """

    query_id: str
    sample: int
    text: str
    tokens: Sequence[int]
    logprob: float
    truncated: bool
    answer: str | None = None
    verdict: str | None = None
    step_scores: tuple[float, ...] | None = None
    iteration: int = 0
    temperature: float = 1.0
    score: float | None = None
    logprobs: Sequence[float] | None = None


class Source(NamedTuple):
    """Rows to train on, one part of a stage's training data.

    Attributes:
      rows: prompts with the responses that are learned.
      weight: relative to the other parts: in `improve` how often each row is drawn, in `train` this part's
        share of the rows drawn.
      notes: what the stage's record in results.json says about it.
    """

    rows: Sequence[Row]
    weight: float = 1.0
    notes: Mapping[str, Any] = {}

    @property
    def responses(self) -> int:
        """How many responses it holds."""
        return sum(len(row.responses) for row in self.rows)


Pixels = Any  # a tuple of such arrays, of a family's own type
Remat = Callable[..., bool]  # a policy of `jax.checkpoint`: which values the forward pass saves


class Batch(NamedTuple):
    """Rows for the device; a row is one query: a shared prefix (image + prompt) and its branches.

        tokens   p p p p p p  a a a a   b b b      c c c c c
        branch   0 0 0 0 0 0  1 1 1 1   2 2 2  -1  3 3 3 3 3      (0 prefix, -1 padding)

    Attributes:
      tokens: int32[B, T]; 0 at the positions of image features.
      branch: int32[B, T]; 0 prefix, 1..K the branches, -1 padding.
      loss_mask: float32[B, T]; weight of *predicting* the token at that position; it may be below 0.
      image_index: int32[B, T]; the row of the query's feature table at that position, -1 for text.
      pixels: a tuple of arrays with [B, C] in front, `crops.arrays.Crops` or a family's own: pixels in 8
        bits, and where they are; zeros where a row has fewer than C.
      labels: float32[B, T]; the label of a step at its last token, -1 elsewhere. The reward model's alone.
      positions: int32[B, 3, T]; time, height and width of every token, for a family with M-RoPE (see
        `layers.DecoderConfig`). A branch goes on from the prefix's greatest position.
      old, reference: float32[B, T], see `Row`; 0 outside of responses. None where no row has them.
      temperature: float32[B], see `Row`.
    """

    tokens: Array
    branch: Array
    loss_mask: Array
    image_index: Array
    pixels: Pixels
    labels: Array = None
    positions: Array = None
    old: Array = None
    reference: Array = None
    temperature: Array = None


class Prefix(NamedTuple):
    """A prompt as arrays, without its pixels: the first part of a row.

    Attributes:
      tokens: int32[P], 0 at the positions of image features.
      image_index: int32[P], which feature is there, -1 for text.
      positions: int32[3, P], see `Batch`; None for a family without M-RoPE.
    """

    tokens: np.ndarray
    image_index: np.ndarray
    positions: np.ndarray | None = None


class Processor(Protocol):
    """The host side of a model family: text and images to arrays and back. `cut` makes the crops of a query's
    RGB images, in order; it is sent to processes that have no jax, so it is a value of the room `crops`."""

    stop_ids: tuple[int, ...]
    forbidden_ids: tuple[int, ...]
    vocab_size: int

    @property
    def cut(self) -> Callable[[Sequence[Image.Image]], Pixels]: ...

    def prefix_shapes(
        self, texts: Sequence[str], sizes: Sequence[Sequence[tuple[int, int]]]
    ) -> list[tuple[int, int]]:
        """(prompt tokens, crops) of each prompt, with images of these (width, height); decodes none."""

    def prefix(self, text: str, sizes: list[tuple[int, int]]) -> Prefix:
        """A prompt with images of these (width, height); every image span is whole."""

    def encode_response(self, text: str) -> list[int]:
        """Ids of a response, closed by the stop id."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""

    def length_limit(self, prefix_tokens: int) -> int:
        """Longest sequence (prompt + response) that a prompt of this length may grow to."""


class Model(Protocol):
    """The device side of a model family, a policy; the module is its own parameter pytree."""

    def __call__(self, batch: Batch, remat: Remat | None = None) -> jax.Array:
        """hidden [B, T, D] that predicts each token of the rows."""

    def token_logprobs(
        self,
        hidden: jax.Array,
        tokens: jax.Array,
        wanted: jax.Array,
        temperature: jax.Array | None = None,
        forbidden: Sequence[int] = (),
    ) -> tuple[jax.Array, jax.Array]:
        """Log probabilities (nats) of tokens [B, T], and whether each is the likeliest one."""

    def merged(self, dtype: jax.typing.DTypeLike | None = None) -> "Model":
        """The plain policy that is equal to this one: adapters are added into their weights."""


class ScoringModel(Protocol):
    """A process reward model; the module is its own parameter pytree."""

    def __call__(self, batch: Batch, remat: Remat | None = None) -> tuple[jax.Array, jax.Array]:
        """The score (a logit) after each token of the rows and the token's log probability, [B, T] each."""

    def merged(self, dtype: jax.typing.DTypeLike | None = None) -> "ScoringModel":
        """The same on the plain policy as its trunk."""


class Int8(NamedTuple):
    """Keys or values in 8 bits: values int8 of their shape, scale float32, one number a token and head."""

    values: jax.Array
    scale: jax.Array


Cached = jax.Array | Int8  # keys or values in a cache


def ring(room: int) -> tuple[int, int]:
    """(chunks, columns of a chunk) of a cache's suffixes with room for so many tokens."""
    size = max(32, -(-room // 4)) if room > 64 else room
    return -(-room // size), size


class KVCache(NamedTuple):
    """Keys and values of decoding: one row per query, shared by its samples, never copied. M of these are
    decoded at a time, each in a place of its own.

    Samples may start at different times, so their suffixes are one ring of columns, cut in chunks. A step
    writes column `clock mod C` of the first chunk; before a full one is written again, the last one is moved
    to the front (`rotated`). A step that needs no old columns reads the first chunks only.

        chunks     [ t4 t5 __ __ ] [ t0 t1 t2 t3 ] [ .. .. .. .. ]     clock 6, C = 4; a sample of age 6

    Every layer has arrays of its own: cut out of larger ones they would be copied in every step.

    Attributes:
      prefix_k, prefix_v: for each layer [B, G, N, P] and [B, G, P, N]; the query's prompt, and the responses
        that samples continue.
      visible: bool[B, M or 1, P]; the columns that a sample sees: the prompt, and its parent up to its start.
      start: int32[B, M]; position of a sample's first own token.
      long: bool[B]; see `layers.rope_tables`.
      suffix_k, suffix_v: for each chunk, for each layer [B, M, G, C, N]; the samples' own tokens.
      age: int32[B, M]; tokens that a sample holds.
      clock: int32[]; steps done.
    """

    prefix_k: Sequence[Cached]
    prefix_v: Sequence[Cached]
    visible: jax.Array
    start: jax.Array
    long: jax.Array
    suffix_k: Sequence[Sequence[Cached]]
    suffix_v: Sequence[Sequence[Cached]]
    age: jax.Array
    clock: jax.Array

    def rotated(self) -> "KVCache":
        """The same cache with the oldest chunk moved to the front, where it is overwritten."""
        k, v = self.suffix_k, self.suffix_v
        return self._replace(suffix_k=(k[-1], *k[:-1]), suffix_v=(v[-1], *v[:-1]))


class TrainState(NamedTuple):
    """Carried across iterations; continuous training never rebuilds it.

    Attributes:
      step: int32[]; optimizer steps done in this run of the schedule.
      params: a `Model` or a `ScoringModel` (an `nnx.Module` is its own parameter pytree).
      opt_state: optax state.
    """

    step: Array
    params: Any
    opt_state: Any
