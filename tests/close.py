"""Equal up to rounding, on any machine.

Compilers and processors add in different orders. A sum of n terms is off by at most n roundings and usually
by about sqrt(n), each relative to the greatest magnitude in the sum. A tolerance therefore follows from the
dtype, the greatest value and the length of the sums, never from what one machine happened to give.
"""

import jax.numpy as jnp
import numpy as np

POLICY = 500  # length of the sums between a tiny policy's inputs and its logits or gradients
REFERENCE = 3000  # the same for two implementations, whose operations differ too


def tolerance(terms: int = 1, *, scale: float = 1.0, dtype="float32") -> float:
    """The absolute error that rounding explains.

    Args:
      terms: length of the sums, one after the other.
      scale: greatest magnitude of what is summed.
      dtype: in which results are rounded.
    """
    return 8 * float(jnp.finfo(dtype).eps) * scale * terms**0.5


def close(ours, theirs, terms: int = 1, *, scale: float | None = None, dtype="float32", err_msg: str = ""):
    """Asserts that arrays are equal up to rounding; `scale` defaults to the greatest value of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if scale is None:
        scale = float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0))
    atol = tolerance(terms, scale=scale, dtype=dtype)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=err_msg)


def likeliest(tokens, logits):
    """Asserts that each token has the greatest of its logits [T, V], up to rounding: greedy decoding."""
    logits = np.asarray(logits, np.float64)
    chosen = logits[np.arange(len(logits)), np.asarray(tokens)]
    within = tolerance(REFERENCE, scale=float(np.abs(logits).max()))
    np.testing.assert_allclose(chosen, logits.max(axis=-1), rtol=0, atol=within)
