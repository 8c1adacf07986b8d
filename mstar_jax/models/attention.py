"""Attention within whole rows, and of new tokens over a shared prefix and their own suffixes.

Within rows, the scores [B, H, T, T] are never materialised:

    TPU         splash attention, a Pallas kernel that skips blocks which the mask leaves empty
    NVIDIA GPU  cuDNN's flash attention, in bfloat16 and float16
    otherwise   `blockwise`, plain XLA; it skips empty blocks in the backward pass

New tokens attend with einsums, or on NVIDIA GPUs with the kernels of models/decode_kernel.py.

The alphabet is that of models/layers.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks

from mstar_jax import sharding
from mstar_jax.models import decode_kernel
from mstar_jax.structs import Cached, Int8

# block sizes of `blockwise` in tokens: (forward, backward)
BLOCK = (512, 512)
CPU_BLOCK = (256, 64)
NEVER = -1e30  # a masked score: its weight is 0
BLOCKS = (512, 256, 128)  # splash's block sizes in tokens: the largest that divides the row, for speed


def device_kind() -> str:
    """The kind of device that a traced function will run on: the current mesh's, which may be abstract."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind


def kernel(kind: str, q: jax.Array) -> Callable[..., jax.Array] | None:
    """The attention function for a kind of device and q [B, T, H, N].

    None means that scores are materialised: the rows are short, or the program is traced to count FLOPs.
    """
    length, _, width = q.shape[1:]
    if kind.startswith("TPU") and q.dtype in (jnp.bfloat16, jnp.float32) and length % BLOCKS[-1] == 0:
        return splash
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if kind.startswith("NVIDIA") and half and length % 2 == 0 and width % 8 == 0 and width <= 128:
        return cudnn
    return blockwise if length > 2 * _block(kind)[1] and kind != sharding.COUNTED else None


def fused(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array | None:
    """Attention with a fused kernel, on each device for its own rows and heads.

    Args:
      q: [B, T, H, N].
      k, v: [B, T, G, N].
      mask: bool[B, T, T], causal; every token sees at least one.

    Returns:
      [B, T, H, N], or None if device, shapes or mesh do not allow it.
    """
    attend = kernel(device_kind(), q)
    return None if attend is None else _every_device_its_own(attend, (2, 2, 2, 0), q, k, v, mask)


def unmasked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array | None:
    """As `fused`, but without a mask, for the patches of an image: q, k, v [B, T, H, N] -> [B, T, H, N]."""
    half, width = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    if not device_kind().startswith("NVIDIA") or not half or width % 8 or width > 128:
        return None
    return _every_device_its_own(_cudnn_unmasked, (2, 2, 2), q, k, v)


def _cudnn_unmasked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    rows, length = q.shape[:2]
    # its backward pass needs an even length, and its tiles are multiples of 8
    q, k, v = (jnp.pad(x, ((0, 0), (0, -length % 8), (0, 0), (0, 0))) for x in (q, k, v))
    lengths = jnp.full(rows, length, jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :length]


def _every_device_its_own(attend: Callable[..., jax.Array], axes: Sequence[int], *args: Any) -> Any:
    """Calls `attend` on each device with its own rows and heads; None if the mesh does not split them evenly.

    `axes` has the axis of the heads in each argument [B, ...], 0 if it has none; in the result it is 2.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(*args)
    cut = {0: sharding.batch_shards(mesh), 1: mesh.shape["tensor"], 2: mesh.shape["tensor"]}
    for axis, x in zip(axes, args, strict=True):
        if any(leaf.shape[at] % cut[at] for leaf in jax.tree.leaves(x) for at in {0, axis}):
            return None
    # kernels are opaque to the compiler, which would gather all rows on every device
    batch, heads = sharding.SAMPLE["batch"], sharding.SAMPLE["heads"]
    specs = [jax.P(batch), jax.P(batch, heads), jax.P(batch, None, heads)]
    in_specs = tuple(specs[axis] for axis in axes)
    return jax.shard_map(attend, in_specs=in_specs, out_specs=specs[2], check_vma=False)(*args)


def splash(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, interpret: bool = False) -> jax.Array:
    """Splash attention, one row at a time; T is a multiple of 128. `interpret` runs it without a TPU."""
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
        mask = mask[None]  # shared by all heads; make_splash_mha would need it as a constant
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
            residual_checkpoint_name="attention",
            mask_function=None,
            interpret=interpret,
        )
        return attend(q, k, v)

    q = q * (q.shape[-1] ** -0.5)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    return jax.vmap(row)(q, k, v, mask).transpose(0, 2, 1, 3)


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """cuDNN's flash attention, to which the mask is a bias [B, 1, T, T] in q's dtype. Since it is also told
    that the mask is causal, it skips the blocks above the diagonal."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], is_causal=True, implementation="cudnn")


def _block(kind: str) -> tuple[int, int]:
    return CPU_BLOCK if kind == "cpu" else BLOCK


def _blocks(mask: jax.Array, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The blocks [size, size] of bool[B, T, T] that are not empty in every row of the batch.

    Returns:
      int32[blocks] block row, int32[blocks] block column, non-empty blocks first; int32[] how many those are.
    """
    count = mask.shape[1] // size
    row, column = jnp.tril_indices(count)  # the mask is causal
    filled = mask.reshape(-1, count, size, count, size).any(axis=(0, 2, 4))[row, column]
    order = jnp.argsort(~filled, stable=True)
    return row[order], column[order], filled.sum()


def _at(x: jax.Array, block: jax.Array, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, block * size, size, axis)


def _put(x: jax.Array, new: jax.Array, block: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, new, block * new.shape[axis], axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend_blocks(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, size: int, back: int
) -> jax.Array:
    """Scaled q [B, G, H/G, T, N], k and v [B, G, T, N], causal mask bool[B, T, T] -> float32, in q's shape.
    `size` and `back` are block sizes in tokens, forward and backward."""
    return _forward(q, k, v, mask, size)[0]


def _forward(q, k, v, mask, size):
    length = q.shape[3]
    parts = []
    for start in range(0, length, size):
        end = min(start + size, length)  # the mask is causal: no keys after this block
        scores = jnp.einsum(
            "bgqtn,bgsn->bgqts", q[:, :, :, start:end], k[:, :, :end], preferred_element_type=jnp.float32
        )
        scores = jnp.where(mask[:, None, None, start:end, :end], scores, NEVER)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        mixed = jnp.einsum(
            "bgqts,bgsn->bgqtn", weights.astype(v.dtype), v[:, :, :end], preferred_element_type=jnp.float32
        )
        parts.append((mixed / total, top + jnp.log(total)))
    out, norm = (jnp.concatenate(each, axis=3) for each in zip(*parts))
    return out, norm[..., 0]


def _remember(q, k, v, mask, size, back):
    out, norm = checkpoint_name(_forward(q, k, v, mask, size), "attention")  # see step.REMAT
    return out, (q, k, v, mask, out, norm)


def _backward(_, size, kept, grad):
    like = kept[:3]
    length = grad.shape[3]

    def filled(x, *axes):  # padded to whole blocks
        return jnp.pad(x, [(0, -length % size if axis in axes else 0) for axis in range(x.ndim)])

    q, k, v, mask, out, norm = kept
    q, out, norm, grad = (filled(x, 3) for x in (q, out, norm, grad))
    k, v, mask = filled(k, 2), filled(v, 2), filled(mask, 1, 2)
    rows, columns, count = _blocks(mask, size)
    inner = (grad * out).sum(-1)
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    grad = grad.astype(v.dtype)
    transposed = jnp.swapaxes(mask, 1, 2)

    def visit(step, state):  # scores are [key, query]: two of the three products then need no transposed copy
        i = rows[step]
        j = columns[step]
        query, upper = _at(q, i, size, 3), _at(grad, i, size, 3)
        key, value = _at(k, j, size, 2), _at(v, j, size, 2)
        scores = einsum("bgsn,bgqtn->bgqst", key, query)
        seen = _at(_at(transposed, j, size, 1), i, size, 2)[:, None, None]
        weights = jnp.where(seen, jnp.exp(scores - _at(norm, i, size, 3)[..., None, :]), 0.0)
        dscores = einsum("bgsn,bgqtn->bgqst", value, upper) - _at(inner, i, size, 3)[..., None, :]
        dscores = (weights * dscores).astype(k.dtype)
        new = (
            (einsum("bgqst,bgsn->bgqtn", dscores, key), i, 3),
            (einsum("bgqst,bgqtn->bgsn", dscores, query), j, 2),
            (einsum("bgqst,bgqtn->bgsn", weights.astype(v.dtype), upper), j, 2),
        )
        return tuple(
            _put(total, _at(total, block, size, axis) + part, block, axis)
            for total, (part, block, axis) in zip(state, new)
        )

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    dq, dk, dv = jax.lax.fori_loop(0, count, visit, start)
    grads = dq[:, :, :, :length], dk[:, :, :length], dv[:, :, :length]
    return *(x.astype(each.dtype) for x, each in zip(grads, like)), None


_attend_blocks.defvjp(_remember, _backward)


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Attends block by block on any device. The backward pass recomputes the scores, and only where the mask
    is not empty (as in FlashAttention-2, arXiv 2307.08691)."""
    length = q.shape[1]
    size, back = (-(-length // -(-length // most)) for most in _block(device_kind()))
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    out = _attend_blocks(_heads_first(q, k.shape[1]), k, v, mask, size, back)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def _heads_first(q: jax.Array, groups: int) -> jax.Array:
    """Scaled queries [B, T, H, N] -> [B, G, H/G, T, N]."""
    q = q.reshape(*q.shape[:2], groups, -1, q.shape[-1]) * (q.shape[-1] ** -0.5)
    return q.transpose(0, 2, 3, 1, 4)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled float32 scores of q [B, T, H, N] on k [B, G, S, N] -> [B, G, H/G, T, S]."""
    return jnp.einsum("bgqtn,bgsn->bgqts", _heads_first(q, k.shape[1]), k, preferred_element_type=jnp.float32)


def _values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Sums v [B, G, S, N] with weights [B, G, H/G, T, S] -> [B, T, H, N]."""
    out = jnp.einsum("bgqts,bgsn->bgqtn", weights.astype(v.dtype), v)
    out = out.transpose(0, 3, 1, 2, 4)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def row_attention(mask: jax.Array, keep: bool) -> Callable[..., Any]:
    """Attention within whole rows (see `fused`).

    Args:
      mask: bool[B, T, T], from `layers.row_layout`.
      keep: also return the keys and values [B, G, T, N], for a cache (prefill).
    """

    def attend(q, k, v):
        out = fused(q, k, v, mask)
        k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
        if out is None:
            scores = jnp.where(mask[:, None, None], _scores(q, k), -jnp.inf)
            out = _values(jax.nn.softmax(scores, axis=-1), v)
        return out, (k, v) if keep else None

    return attend


def stored(x: jax.Array, dtype: str) -> Cached:
    """Keys or values [..., N] as a cache stores them: `int8` gives `Int8`, an empty dtype keeps theirs."""
    if dtype != "int8":
        return x.astype(dtype or x.dtype)
    x = jax.lax.optimization_barrier(x).astype(jnp.float32)  # read twice: not as partial sums on a GPU
    scale = jnp.maximum(jnp.abs(x).max(axis=-1), 1e-12) / 127
    return Int8(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def _read(cached: Cached, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """The stored values in a dtype, and their scale or None."""
    if isinstance(cached, Int8):
        return cached.values.astype(dtype), cached.scale
    return cached.astype(dtype), None


def branch_attention(
    prefix: tuple[Cached, Cached],
    visible: jax.Array,
    suffix: Sequence[tuple[Cached, Cached]],
    own_visible: Sequence[jax.Array],
    column: jax.Array,
    live: jax.Array,
) -> Callable[..., Any]:
    """Attention of one new token per branch, over the shared prefix and the branch's own suffix.

    Scores of the two parts are computed separately and normalised together, so the prefix is read once for
    its K branches. In `attend`, the T axis of q, k and v is the K branches; it also returns the first chunk
    with the new token.

    Args:
      prefix: keys [B, G, N, P] and values [B, G, P, N], see `KVCache`.
      visible: bool[B, K or 1, P], the columns of the prefix that a branch sees.
      suffix: the chunks that are read, keys and values [B, K, G, C, N]; the first one is written to.
      own_visible: for each chunk bool[B, K, C], the columns that a branch sees, including the new token's.
      column: int32[], the new token's column in the first chunk.
      live: bool[B, K], the branches that have not ended. What others attend to is not defined.
    """

    def attend(q, k, v):
        branches, groups, width = k.shape[1:]

        def put(chunk, new):  # [B, K, G, C, N] and [B, K, G, N]; scales have no N
            at = (0, 0, 0, column, 0)[: chunk.ndim]
            return jax.lax.dynamic_update_slice(chunk, jnp.expand_dims(new, 3), at)

        def with_new(chunk, new):
            dtype = "int8" if isinstance(chunk, Int8) else chunk.dtype.name
            return jax.tree.map(put, chunk, stored(new, dtype))

        first = with_new(suffix[0][0], k), with_new(suffix[0][1], v)
        read = (first, *suffix[1:])
        queries = _heads_first(q, groups)
        each = queries.transpose(0, 3, 1, 2, 4)
        if decode_kernel.takes(device_kind(), each, (prefix, suffix)):
            out = _every_device_its_own(
                decode_kernel.attend,
                (2, 2, 0, 1, 0, 0),
                each,
                read,
                tuple(own_visible),
                prefix,
                visible,
                live,
            )
            if out is not None:
                return out.astype(q.dtype).reshape(q.shape), first
        chunks = [(_read(k, q.dtype), _read(v, q.dtype)) for k, v in read]
        (keys, scale_k), (values, scale_v) = (_read(x, q.dtype) for x in prefix)

        def scaled(x, scale):  # [B, G, H/G, K, P] by [B, G, P]
            return x if scale is None else x * scale[:, :, None, None]

        def own_scaled(x, scale):  # [B, K, G, H/G, C] by [B, K, G, C]
            return x if scale is None else x * scale[:, :, :, None]

        shared = jnp.einsum("bgqtn,bgns->bgqts", queries, keys, preferred_element_type=jnp.float32)
        shared = jnp.where(visible[:, None, None], scaled(shared, scale_k), -jnp.inf)
        parts = []
        for ((own_k, scale), _), seen in zip(chunks, own_visible, strict=True):
            part = jnp.einsum("bkgqn,bkgcn->bkgqc", each, own_k, preferred_element_type=jnp.float32)
            part = jnp.where(seen[:, :, None, None], own_scaled(part, scale), -jnp.inf)
            parts.append(part)
        top = shared.max(-1, keepdims=True).transpose(0, 3, 1, 2, 4)
        top = functools.reduce(jnp.maximum, [top, *(part.max(-1, keepdims=True) for part in parts)])
        shared = jnp.exp(shared - top.transpose(0, 2, 3, 1, 4))
        parts = [jnp.exp(part - top) for part in parts]
        total = shared.sum(-1, keepdims=True).transpose(0, 3, 1, 2, 4)
        total = sum((part.sum(-1, keepdims=True) for part in parts), start=total)
        out = jnp.zeros(each.shape, jnp.float32)
        for (_, (own_v, scale)), part in zip(chunks, parts):
            part = own_scaled(part, scale).astype(own_v.dtype)
            out += jnp.einsum("bkgqc,bkgcn->bkgqn", part, own_v, preferred_element_type=jnp.float32)
        part = scaled(shared, scale_v).astype(values.dtype)
        part = jnp.einsum("bgqts,bgsn->bgqtn", part, values, preferred_element_type=jnp.float32)
        out = (out + part.transpose(0, 3, 1, 2, 4)) / total
        return out.astype(q.dtype).reshape(q.shape), first

    return attend
