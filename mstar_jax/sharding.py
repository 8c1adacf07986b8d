"""The device mesh, and the two tables that map logical axes to mesh axes.

A parameter names its *logical* axes where it is declared (`nnx.Param(..., axes=("embed", "mlp"))`). TRAIN
shards parameters and optimizer state; SAMPLE is the layout for decoding. The mesh has Auto axes: the compiler
propagates shardings from the arrays that are constrained here.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

AXES = ("data", "fsdp", "tensor")
COUNTED = "to count FLOPs"  # a made-up kind of device: programs are traced for it, and no block is skipped

Rules = dict[str, str | tuple[str, ...] | None]  # logical axis: mesh axis or axes
Tree = TypeVar("Tree")  # a pytree: a model, an optimizer state, a batch

TRAIN: Rules = {
    "batch": ("data", "fsdp"),
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "patch": None,
    "positions": None,
    "rank": None,
}
SAMPLE: Rules = TRAIN | {"embed": None}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh over ("data", "fsdp", "tensor").

    Several slices, which are connected by a slower network, are placed along `data`.

    Args:
      data, fsdp, tensor: sizes; -1 for at most one of them means all remaining devices.
      devices: defaults to all devices of all processes.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or `data` is not a multiple of the
        number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh sizes must be positive, with at most one -1; got {dict(zip(AXES, sizes))}")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(AXES, [data, fsdp, tensor]))} does not fit {len(devices)} devices: "
            f"the sizes must multiply to {len(devices)}; change mesh.data, mesh.fsdp or mesh.tensor, "
            "e.g. --config.mesh.tensor=1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data = {sizes[0]} is impossible: the devices are in {slices} slices, and only gradient "
            f"reductions may cross slices, so it must be a multiple of {slices}"
        )
    within = (sizes[0] // slices, *sizes[1:])
    ordered = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """The number of shards of the batch dimension."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(name: str, size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Checks that the mesh divides a global batch evenly.

    Args:
      name: the config key of the batch size, for the message.
      size: rows of the global batch.
      mesh: the device mesh.
      accumulate: the number of microbatches.

    Raises:
      ValueError: it does not; the message names the nearest sizes that work.
    """
    unit = batch_shards(mesh) * accumulate
    if size < 1 or size % unit:
        below = max(size // unit, 1) * unit
        raise ValueError(
            f"{name} = {size} is impossible: the mesh splits a batch into {batch_shards(mesh)} shards "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']})"
            + (f" and it is accumulated over {accumulate} microbatches" if accumulate > 1 else "")
            + f", so it must be a multiple of {unit}, e.g. {below} or {below + unit}"
        )


def spec(
    axes: tuple[str | None, ...], rules: Rules, shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    A dimension that is not divisible by its mesh axes is not sharded (a small model on a large mesh).

    Raises:
      KeyError: a logical axis is not in the table.
      ValueError: two dimensions map to the same mesh axis, or the number of axes is not the array's rank.
    """
    if len(axes) != len(shape):
        raise ValueError(f"logical axes {axes} do not fit an array of shape {shape}")
    parts: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis, size in zip(axes, shape):
        mesh_axes = () if axis is None else rules[axis]
        mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes or ())
        if used & set(mesh_axes):
            raise ValueError(f"logical axes {axes} map twice to {used & set(mesh_axes)}")
        used |= set(mesh_axes)
        ways = int(np.prod([mesh.shape[a] for a in mesh_axes])) if mesh_axes else 1
        if not mesh_axes or size % ways:
            parts.append(None)
        else:
            parts.append(mesh_axes if len(mesh_axes) > 1 else mesh_axes[0])
    return PartitionSpec(*parts)


def shardings(tree: Tree, rules: Rules, mesh: Mesh) -> Tree:
    """Returns `tree` with a NamedSharding in place of every leaf.

    The tree may be a model, an optimizer state (whose moments are models too) or a whole TrainState, and may
    be abstract. Leaves that declare no axes, such as step counters, are replicated.
    """

    def layout(x, axes):
        part = PartitionSpec() if axes is None else spec(axes, rules, x.shape, mesh)
        return NamedSharding(mesh, part)

    def one(leaf):
        axes = leaf.get_metadata().get("axes") if isinstance(leaf, nnx.Variable) else None
        # mapped rather than replaced: a frozen parameter's moments are an empty node inside its Variable
        return jax.tree.map(lambda x: layout(x, axes), leaf)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def constrain(x: jax.Array, axes: tuple[str | None, ...], rules: Rules = SAMPLE) -> jax.Array:
    """Constrains an array in a compiled function to the sharding of its logical axes on the current mesh.

    For arrays whose sharding nothing else determines, such as an empty cache. Does nothing without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, rules, x.shape, mesh))


def parameter_name(path: tuple[object, ...]) -> str:
    """The dotted name of the parameter at a key path of a model, e.g. `decoder.blocks.q`."""
    return ".".join(
        key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey) and key.name != "value"
    )


def named(tree: nnx.Module) -> dict[str, jax.Array]:
    """The leaves of a model (arrays, shapes or shardings) by dotted name."""
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def cast(tree: Tree, dtype: DTypeLike) -> Tree:
    """Casts the floating-point leaves of a tree."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def batch_sharding(mesh: Mesh, rules: Rules = TRAIN) -> NamedSharding:
    """The sharding of an array whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


class Share(NamedTuple):
    """A process's share of every global batch: the shards of the batch dimension that its devices hold.

    They need not be adjacent. If `tensor` spans processes, several processes hold the same shards.

    Attributes:
      held: numbers of the shards, ascending.
      parts: the number of shards in all.
    """

    held: tuple[int, ...] = (0,)
    parts: int = 1

    def rows(self, size: int) -> list[int]:
        """Indices of this process's rows in a global batch of `size` rows, ascending.

        Raises:
          ValueError: the batch is not divisible by the number of shards.
        """
        if size % self.parts:
            raise ValueError(
                f"a global batch of {size} rows cannot be split into {self.parts} shards: "
                f"its size must be a multiple of {self.parts}"
            )
        each = size // self.parts
        return [row for part in self.held for row in range(part * each, (part + 1) * each)]

    def whole(self, size: int) -> int:
        """Rows of the global batch if `size` of them are here."""
        return size * self.parts // len(self.held)


WHOLE = Share()  # of a single process


def share_of(mesh: Mesh) -> Share:
    """This process's share of every batch."""
    here = jax.process_index()
    parts = mesh.devices.reshape(batch_shards(mesh), -1)
    held = tuple(i for i, part in enumerate(parts) if any(d.process_index == here for d in part))
    return WHOLE if len(held) == len(parts) else Share(held, len(parts))


def put_batch(tree: Tree, mesh: Mesh) -> Tree:
    """Places host arrays, each process's share of a global batch, on the devices as global arrays."""
    sharding = batch_sharding(mesh)
    share = share_of(mesh)

    def place(x):
        x = np.asarray(x)
        size = share.whole(len(x))
        first = {row: at for at, row in enumerate(share.rows(size))}

        def piece(index):
            start, stop, _ = index[0].indices(size)
            return x[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, piece)

    return jax.tree.map(place, tree)
