"""Positions of a row's tokens, for families with M-RoPE (see `structs.Batch`)."""

import numpy as np


def of_row(prefix: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """A row's positions: each branch goes on from the greatest of the prefix.

    Args:
      prefix: int32[3, P], those of the prompt.
      branch: int32[T], see `Batch`.

    Returns:
      int32[3, T], 0 for padding.
    """
    out = np.zeros((3, len(branch)), np.int32)
    out[:, : prefix.shape[1]] = prefix
    for number in range(1, branch.max() + 1):
        own = np.flatnonzero(branch == number)
        out[:, own] = prefix.max() + 1 + np.arange(len(own))
    return out
