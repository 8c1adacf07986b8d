"""How a token is sampled: settings, truncation of the distribution, the draw, stop strings.

Shapes: V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mstar_jax.structs import Processor

BLOCK = 128  # tokens of the vocabulary per block, see `draw`


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Static sampling settings. The temperature is an argument of each call, so a change does not recompile.

    Attributes:
      branches: K, responses per query.
      max_new_tokens: R, the most tokens of a response; one that reaches it is truncated.
      places: M, how many responses to a query are decoded at a time; 0 for all of them.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
      min_p: drop tokens less likely than min_p times the likeliest; 0 keeps all.
      stop_strings: a branch ends once its text contains one of these; the text ends before it.
      cache: dtype of keys and values: `bfloat16`, `int8` (with a scale per token and head), ...; empty for
        that of the weights.
    """

    branches: int
    max_new_tokens: int
    places: int = 0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_strings: tuple[str, ...] = ()
    cache: str = ""

    def __post_init__(self):
        if self.branches < 1 or self.max_new_tokens < 1:
            raise ValueError(f"branches and max_new_tokens must be at least 1, got {self}")
        if not 0 <= self.places <= self.branches:
            raise ValueError(f"places must be at most branches, or 0 for as many, got {self}")
        object.__setattr__(self, "places", self.places or self.branches)
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1 and self.top_k >= 0):
            raise ValueError(f"need 0 < top_p <= 1, 0 <= min_p <= 1 and top_k >= 0, got {self}")
        if any(not stop for stop in self.stop_strings):
            raise ValueError("an empty stop string would end every response immediately")


def filter_logits(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Sets logits [..., V] that top-k, top-p and min-p (in this order) exclude to -inf."""
    if config.top_k and config.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, config.top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.top_p < 1.0:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ranked, axis=-1)
        # a token is kept if the mass of likelier tokens is below top_p, so the likeliest is always kept
        keep = jnp.cumsum(probs, axis=-1) - probs < config.top_p
        least = jnp.min(jnp.where(keep, ranked, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if config.min_p > 0.0:
        least = logits.max(axis=-1, keepdims=True) + jnp.log(config.min_p)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def _first(found: jax.Array) -> jax.Array:
    """int32[...]: the first index where bool[..., V] is true, 0 if none; an argmax in one pass on a CPU."""
    size = found.shape[-1]
    at = jnp.min(jnp.where(found, jnp.arange(size, dtype=jnp.int32), size), axis=-1)
    return jnp.where(at < size, at, 0)  # for NaN logits, an id that exists


def draw(
    logits: jax.Array, uniform: jax.Array, temperature: jax.Array, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Samples a token per row by inverting the cumulative distribution.

    Args:
      logits: float32[..., V].
      uniform: float32[...], a random number in [0, 1).
      temperature: float32[...]; 0 is greedy.

    Returns:
      tokens int32[...], and their log probabilities under the distribution that is sampled from; if greedy,
      under the distribution at temperature 1.
    """
    greedy = temperature <= 0.0
    logits = filter_logits(logits / jnp.where(greedy, 1.0, temperature)[..., None], config)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    # first a block of the vocabulary, then a token in it: no cumulative sum runs over the whole vocabulary
    blocks = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -weights.shape[-1] % BLOCK)])
    blocks = blocks.reshape(*weights.shape[:-1], -1, BLOCK)
    block, rest = _invert(blocks.sum(axis=-1), uniform)
    within, _ = _invert(jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :], rest)
    tokens = jnp.where(greedy, _first(logits == top), block * BLOCK + within)
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    return tokens, (picked - top)[..., 0] - jnp.log(weights.sum(axis=-1))


def _invert(weights: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The entry where the cumulative sum of weights [..., N] exceeds the fraction `uniform` [...] of their
    total, and how far into that entry's own weight this is, in [0, 1]."""
    mass = jnp.cumsum(weights, axis=-1)
    # a parallel cumulative sum is monotone only up to rounding: without the mask, an entry of weight 0 (a
    # forbidden token) could be drawn
    mass = jnp.where(weights > 0.0, mass, 0.0)
    wanted = jnp.minimum(uniform, 1.0 - 2.0**-23) * mass.max(axis=-1)  # below the total in spite of rounding
    at = _first(mass > wanted[..., None])
    own, upto = (jnp.take_along_axis(x, at[..., None], axis=-1)[..., 0] for x in (weights, mass))
    left = (wanted - (upto - own)) / jnp.where(own > 0.0, own, 1.0)
    return at, jnp.clip(left, 0.0, 1.0)


def stop_table(text_of_token: list[str], stop: str) -> np.ndarray:
    """An automaton that finds `stop` in the text of a token sequence.

    Args:
      text_of_token: the text of each id.
      stop: the string to find.

    Returns:
      int32[len(stop) + 1, V]: the next state for a state and a token. A state is the number of characters of
      `stop` that the text ends with; the last state means that it was found, and is never left.
    """
    fallback = [0] * (len(stop) + 1)  # Knuth-Morris-Pratt
    for i in range(1, len(stop)):
        state = fallback[i]
        while state and stop[i] != stop[state]:
            state = fallback[state]
        fallback[i + 1] = state + (stop[i] == stop[state])
    table = np.zeros((len(stop) + 1, len(text_of_token)), np.int32)
    for start in range(len(stop) + 1):
        for token, text in enumerate(text_of_token):
            state = start
            for character in text:
                if state == len(stop):
                    break
                while state and character != stop[state]:
                    state = fallback[state]
                state += character == stop[state]
            table[start, token] = state
    return table


def token_texts(processor: Processor) -> list[str]:
    """The text of each id, as `decode` shows it after another token."""
    anchor = processor.encode_response("a")[:-1]
    before = processor.decode(anchor)
    return [processor.decode([*anchor, token])[len(before) :] for token in range(processor.vocab_size)]
