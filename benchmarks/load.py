"""Peak host memory and time of loading a full-size Phi-3.5-vision checkpoint (8.3 GB of random bfloat16).

    python benchmarks/load.py [--layers=32] [--folder=/scratch]

Prints the size of the checkpoint, the peak resident memory, their ratio, and the time in seconds. Loading
runs in its own process on the CPU, so the loaded weights are part of the memory. The checkpoint is written to
a temporary folder, inside of `--folder` if given.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from mstar_jax import models
from mstar_jax.models import hf, layers, names, phi35


def config(num_layers: int) -> phi35.Phi35Config:
    """The dimensions of the released model."""
    decoder = layers.DecoderConfig(
        vocab_size=32064, hidden_size=3072, intermediate_size=8192, num_layers=num_layers, num_heads=32,
        num_kv_heads=32, head_dim=96, short_factor=(1.0,) * 48, long_factor=(1.0,) * 48,
        max_position=131072, original_max_position=4096,
    )  # fmt: skip
    return phi35.Phi35Config(decoder, phi35.CLIP)


def write(folder: pathlib.Path, num_layers: int) -> None:
    """Random weights under the official names, in files of at most 5 GB."""
    cfg = config(num_layers)
    abstract = jax.eval_shape(lambda: phi35.Phi35Vision(cfg, nnx.Rngs(0)))
    table = names.tensors(phi35.table(cfg), abstract)
    source = models.FromScratch(phi35.FAMILY, cfg, folder)
    for name, values in source.family.config_files(cfg, "bfloat16").items():
        (folder / name).write_text(json.dumps(values))
    block = np.random.default_rng(0).normal(0, 0.02, 1 << 20).astype(ml_dtypes.bfloat16)
    sizes = {name: int(np.prod(entry.shape)) * 2 for name, entry in table.items()}
    for file, group in hf.split(sizes).items():
        save_file({name: np.resize(block, table[name].shape) for name in group}, folder / file)


def highest() -> int:
    """Peak resident memory of this process in bytes (Linux; getrusage also counts that of the parent)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def load(folder: str) -> None:
    """Loads in this process and prints the measurements."""
    before, start = highest(), time.perf_counter()
    model = models.Pretrained(folder).load(jnp.bfloat16)
    jax.block_until_ready(model)
    seconds = time.perf_counter() - start
    peak = highest()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    print(
        f"checkpoint {size / 1e9:.2f} GB, peak resident memory {peak / 1e9:.2f} GB "
        f"(ratio {peak / size:.3f}; {before / 1e9:.2f} GB before loading), {seconds:.1f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--folder", default="")
    parser.add_argument("--load", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load:
        load(args.load)
    else:
        with tempfile.TemporaryDirectory(dir=args.folder or None) as made:
            write(pathlib.Path(made), args.layers)
            subprocess.run([sys.executable, __file__, f"--load={made}"], check=True)
