"""The device mesh and the two tables that lay arrays out on it.

A parameter names its *logical* axes where it is declared (`nnx.Param(..., axes=("embed", "mlp"))`); a
table maps logical axes to mesh axes. TRAIN spreads parameters and optimizer state; SAMPLE lays weights
out for decoding. The mesh has Auto axes: the compiler propagates shardings from what is pinned here.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
COUNTED = "to count FLOPs"  # a kind of device that no machine has: its programs are traced, and skip nothing

Rules = dict[str, str | tuple[str, ...] | None]

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


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: list[Any] | None = None) -> Mesh:
    """Returns a mesh over ("data", "fsdp", "tensor").

    Args:
      data, fsdp, tensor: sizes; -1 for at most one of them takes all the devices that are left.
      devices: defaults to all devices of all processes.

    The devices of several slices, which a slow network joins, are laid out with the slices along `data`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the slices do not divide `data`.
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
            f"the sizes must multiply to {len(devices)}"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh.data = {sizes[0]} is impossible: the devices are {slices} slices, and only the sums of "
            f"gradients may cross from one to another, so it must be a multiple of {slices}"
        )
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    ordered = mesh_utils.create_hybrid_device_mesh(within, across, devices)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """In how many parts the batch dimension is cut."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_divides(name: str, size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuses a global batch that the mesh cannot share out evenly.

    Raises:
      ValueError: with the numbers, and the nearest sizes that work.
    """
    unit = batch_shards(mesh) * accumulate
    if size < 1 or size % unit:
        below = max(size // unit, 1) * unit
        raise ValueError(
            f"{name} = {size} is impossible: the mesh cuts a batch in {batch_shards(mesh)} parts "
            f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']})"
            + (f" and it is accumulated in {accumulate} microbatches" if accumulate > 1 else "")
            + f", so it must be a multiple of {unit}, e.g. {below} or {below + unit}"
        )


def spec(axes: tuple[str | None, ...], rules: Rules, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Returns the PartitionSpec of an array with these logical axes.

    A dimension that its mesh axes do not divide stays whole (a small test model on a big mesh).

    Raises:
      KeyError: a logical axis that the table does not know.
      ValueError: one mesh axis is asked for twice in an array, or the rank does not fit.
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


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns `tree` with a NamedSharding for every leaf.

    Works on a model, on an optimizer state (its moments are models too) and on a whole TrainState;
    leaves that declare no axes (step counters) are replicated. `tree` may be abstract.
    """

    def lay(x, axes):
        part = PartitionSpec() if axes is None else spec(axes, rules, x.shape, mesh)
        return NamedSharding(mesh, part)

    def one(leaf):
        axes = leaf.get_metadata().get("axes") if isinstance(leaf, nnx.Variable) else None
        # mapped, not replaced: a frozen parameter's moments are an empty node inside its Variable
        return jax.tree.map(lambda x: lay(x, axes), leaf)

    return jax.tree.map(one, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def constrain(x: jax.Array, axes: tuple[str | None, ...], rules: Rules = SAMPLE) -> jax.Array:
    """Pins an array inside a compiled function to the layout of its logical axes, on the mesh in force; for
    arrays that nothing else gives a layout, such as an empty cache. Without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, rules, x.shape, mesh))


def parameter_name(path: Any) -> str:
    """The dotted name of a parameter, e.g. `decoder.blocks.q`."""
    return ".".join(
        key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey) and key.name != "value"
    )


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a model by their dotted names."""
    return {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def cast(tree: Any, dtype: Any) -> Any:
    """Casts the floating point leaves of a tree."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def batch_sharding(mesh: Mesh, rules: Rules = TRAIN) -> NamedSharding:
    """The layout of every array whose first dimension is the batch."""
    return NamedSharding(mesh, PartitionSpec(rules["batch"]))


class Share(NamedTuple):
    """What of every global batch is a process's own: of the parts in which the mesh cuts a batch, those that
    its devices hold. They need not be neighbours, and where `tensor` spans processes several hold the same.

    Attributes:
      held: numbers of the parts, ascending.
      parts: how many there are.
    """

    held: tuple[int, ...] = (0,)
    parts: int = 1

    def rows(self, size: int) -> list[int]:
        """The numbers of the rows of a global batch, ascending.

        Raises:
          ValueError: the parts do not divide the batch.
        """
        if size % self.parts:
            raise ValueError(f"a global batch of {size} rows cannot be cut in {self.parts} parts")
        each = size // self.parts
        return [row for part in self.held for row in range(part * each, (part + 1) * each)]

    def whole(self, size: int) -> int:
        """Rows of the global batch of which so many are here."""
        return size * self.parts // len(self.held)


WHOLE = Share()  # of a process that is alone


def share_of(mesh: Mesh) -> Share:
    """This process's share of every batch."""
    here, parts = jax.process_index(), mesh.devices.reshape(batch_shards(mesh), -1)
    held = tuple(i for i, part in enumerate(parts) if any(d.process_index == here for d in part))
    return WHOLE if len(held) == len(parts) else Share(held, len(parts))


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Places host arrays (each process its share of the global batch) as global device arrays."""
    sharding, share = batch_sharding(mesh), share_of(mesh)

    def place(x):
        x = np.asarray(x)
        size = share.whole(len(x))
        first = {row: at for at, row in enumerate(share.rows(size))}

        def piece(index):
            start, stop, _ = index[0].indices(size)
            return x[first[start] : first[start] + stop - start]

        return jax.make_array_from_callback((size, *x.shape[1:]), sharding, piece)

    return jax.tree.map(place, tree)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Places host values whole on every device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)
