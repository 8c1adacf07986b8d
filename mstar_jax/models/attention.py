"""Fused attention within whole rows, where the machine has it: no scores [B, H, T, T] in memory.

    TPU           splash attention, a Pallas kernel; blocks that the mask leaves empty are skipped
    NVIDIA's GPU  cuDNN's flash attention, in bfloat16 and float16
    else          none: `layers.row_attention` writes its scores down

The alphabet is that of models/layers.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks

from mstar_jax import sharding

BLOCKS = (512, 256, 128)  # tokens; a kernel's step is a square of the mask, and a small one is all overhead


def device_kind() -> str:
    """What a traced function will run on: the devices of the mesh in force, which need not be there."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def kernel(kind: str, q: jax.Array) -> Callable[..., jax.Array] | None:
    """The fused attention that a kind of device has for q [B, T, H, N], None where there is none."""
    length, _, width = q.shape[1:]
    if kind.startswith("TPU") and q.dtype in (jnp.bfloat16, jnp.float32) and length % BLOCKS[-1] == 0:
        return splash
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if kind.startswith("NVIDIA") and half and length % 2 == 0 and width % 8 == 0 and width <= 128:
        return cudnn
    return None


def fused(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array | None:
    """Attends, every device its own rows and heads; None where machine, shapes or mesh do not allow it.

    Args:
      q: [B, T, H, N].
      k, v: [B, T, G, N].
      mask: bool[B, T, T]; every token sees at least one.

    Returns:
      [B, T, H, N].
    """
    attend, mesh = kernel(device_kind(), q), jax.sharding.get_abstract_mesh()
    if attend is None:
        return None
    if mesh.empty:
        return attend(q, k, v, mask)
    if len(q) % sharding.batch_shards(mesh) or k.shape[2] % mesh.shape["tensor"]:
        return None
    # the compiler does not see into a kernel: left to it, all rows would be gathered on every device
    heads = sharding.spec(("batch", None, "heads", None), sharding.SAMPLE, k.shape, mesh)
    rows = sharding.spec(("batch", None, None), sharding.SAMPLE, mask.shape, mesh)
    local = jax.shard_map(attend, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q, k, v, mask)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, interpret: bool = False) -> jax.Array:
    """Splash attention, row by row; T is a multiple of 128. `interpret` runs the kernel without a TPU."""
    block = next(size for size in BLOCKS if q.shape[1] % size == 0)
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def row(q, k, v, mask):
        mask = mask[None]  # one for all heads; make_splash_mha would want it before the program is traced
        forward, _ = masks.process_dynamic_mask(mask, (block, block))
        backward, _ = masks.process_dynamic_mask_dkv(mask, (block, block))
        attend = kernels.SplashAttentionKernel(
            forward,
            forward,
            backward,
            block_sizes=sizes,
            is_mqa=False,
            save_residuals=False,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
            residual_checkpoint_name=None,
            mask_function=None,
            interpret=interpret,
        )
        return attend(q, k, v)

    q = q * (q.shape[-1] ** -0.5)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.vmap(row)(q, k, v, mask).transpose(0, 2, 1, 3)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """cuDNN's flash attention; it reads the mask as a bias [B, 1, T, T] in q's dtype."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
