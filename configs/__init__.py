"""The values of runs: `base` explains every key, `variants` are training methods, the rest are policies."""
