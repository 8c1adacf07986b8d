"""The mesh, the table of logical axes, and the layout of everything that is laid out with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from configs import base
from mstar_jax import sharding
from mstar_jax.inference.sampler import for_sampling
from mstar_jax.sharding import named
from mstar_jax.stages import run
from mstar_jax.training import optimizer


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, tensor=2)


def test_mesh_sizes():
    assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert dict(sharding.make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert dict(one.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert one.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), r"'data': 3, 'fsdp': 1, 'tensor': 1.* does not fit 8 devices.*multiply to 8"),
        ((-1, 3, 1), r"'data': -1, 'fsdp': 3, 'tensor': 1.* does not fit 8 devices"),
        ((-1, 16, 1), r"does not fit 8 devices"),
        ((-1, -1, 1), r"at most one -1.*'data': -1, 'fsdp': -1"),
        ((0, 8, 1), r"must be positive.*'data': 0"),
        ((-2, 2, 2), r"must be positive.*'data': -2"),
    ],
)
def test_mesh_errors_say_the_numbers(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_check_divides(mesh):
    assert sharding.batch_shards(mesh) == 4
    sharding.check_divides("train.batch_size", 8, mesh, accumulate=2)
    with pytest.raises(ValueError) as error:
        sharding.check_divides("train.batch_size", 12, mesh, accumulate=2)
    assert str(error.value) == (
        "train.batch_size = 12 is impossible: the mesh splits a batch into 4 shards (data=2 x fsdp=2) and it "
        "is accumulated over 2 microbatches, so it must be a multiple of 8, e.g. 8 or 16"
    )
    for size in (0, -4, 3):
        with pytest.raises(ValueError, match=rf"sample.queries = {size} is .*multiple of 4, e.g. 4 or 8"):
            sharding.check_divides("sample.queries", size, mesh)


def test_spec(mesh):
    def spec(axes, shape, rules=sharding.TRAIN):
        return sharding.spec(axes, rules, shape, mesh)

    assert spec(("layers", "embed", "heads", "head_dim"), (2, 32, 4, 8)) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert spec(("embed", "mlp"), (32, 48), sharding.SAMPLE) == PartitionSpec(None, "tensor")
    assert spec(("batch", None), (8, 5)) == PartitionSpec(("data", "fsdp"), None)
    # a dimension that is not divisible stays whole, and the others do not
    assert spec(("embed", "heads"), (32, 3)) == PartitionSpec("fsdp", None)
    assert spec(("batch", "mlp"), (6, 4)) == PartitionSpec(None, "tensor")
    with pytest.raises(ValueError, match=r"\('embed', 'embed'\) map twice to \{'fsdp'\}"):
        spec(("embed", "embed"), (4, 4))
    with pytest.raises(ValueError, match=r"map twice to \{'fsdp'\}"):
        spec(("batch", "embed"), (8, 4))
    with pytest.raises(ValueError, match=r"\('embed',\) do not fit an array of shape \(4, 4\)"):
        spec(("embed",), (4, 4))
    with pytest.raises(KeyError, match="width"):
        spec(("width",), (4,))


def test_every_parameter_says_its_axes(mesh):
    for rules in (sharding.TRAIN, sharding.SAMPLE):
        variables = jax.tree.leaves(tiny.abstract(), is_leaf=lambda x: isinstance(x, nnx.Variable))
        for variable in variables:
            sharding.spec(variable.get_metadata()["axes"], rules, variable.shape, mesh)
    assert len(variables) == len(jax.tree.leaves(tiny.abstract())) > 30


def test_the_whole_state_is_laid_out(mesh):
    """Parameters, both moments and the counters; frozen parameters have no moments."""
    tx = optimizer.make_optimizer()

    def make():
        model = tiny.abstract()
        model = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model)
        return optimizer.new_state(model, tx, frozen=["tower"])

    abstract = jax.eval_shape(make)
    layout = sharding.shardings(abstract, sharding.TRAIN, mesh)
    assert jax.tree.structure(layout) == jax.tree.structure(abstract)
    specs = {jax.tree_util.keystr(path): x.spec for path, x in jax.tree_util.tree_leaves_with_path(layout)}
    gates = {path: spec for path, spec in specs.items() if "blocks.gate" in path and "tower" not in path}
    assert len(gates) == 3, f"a parameter and its two moments, got {list(gates)}"
    assert set(gates.values()) == {PartitionSpec(None, "fsdp", "tensor")}
    assert sum("tower.patch" in path for path in specs) == 1
    assert specs[".step"] == PartitionSpec()
    counts = [spec for path, spec in specs.items() if "count" in path]
    assert counts and set(counts) == {PartitionSpec()}


def test_layouts_are_what_the_devices_hold(mesh):
    policy = tiny.model()
    laid = jax.device_put(policy, sharding.shardings(policy, sharding.TRAIN, mesh))
    gate = laid.decoder.blocks.gate[...]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(2, 16, 24)}
    sampler = for_sampling(laid, mesh, jnp.bfloat16)
    gate = sampler.decoder.blocks.gate[...]
    assert gate.dtype == jnp.bfloat16 and gate.addressable_shards[0].data.shape == (2, 32, 24)
    want = np.asarray(policy.decoder.blocks.gate[...].astype(jnp.bfloat16))
    np.testing.assert_array_equal(np.asarray(gate), want)


def test_put_batch(mesh):
    batch = tiny.stack([tiny.row(np.random.default_rng(i), [(0, 5), (1, 3)], 12) for i in range(8)])
    placed = sharding.put_batch(batch, mesh)
    assert placed.labels is None and placed.positions is None  # a policy's batch has none, nor this family
    arrays = [(host, device) for host, device in zip(batch, placed, strict=True) if host is not None]
    assert len(arrays) >= 5
    for host, device in arrays:
        np.testing.assert_array_equal(np.asarray(device), host)
        assert device.sharding.spec == PartitionSpec(("data", "fsdp"))
        assert device.addressable_shards[0].data.shape[0] == 2
    # rows 2i and 2i + 1 lie together on the devices of part i
    parts = {
        int(shard.index[0].start or 0): np.asarray(shard.data) for shard in placed.tokens.addressable_shards
    }
    assert sorted(parts) == [0, 2, 4, 6]
    for start, part in parts.items():
        np.testing.assert_array_equal(part, batch.tokens[start : start + 2])


def test_constrain():
    """A layout for what has none, on the mesh in force; what is indivisible stays whole."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    axes = ("layers", "batch", None, "heads")
    pinned = jax.jit(lambda: sharding.constrain(jnp.zeros((3, 8, 5, 4)), axes))
    with jax.set_mesh(mesh):
        assert pinned().sharding.spec == PartitionSpec(None, ("data", "fsdp"), None, "tensor")
        odd = jax.jit(lambda: sharding.constrain(jnp.zeros((3, 8, 5, 3)), axes))()
        assert odd.sharding.spec[:2] == (None, ("data", "fsdp")) and len(odd.sharding.spec) == 2
    assert len(jax.jit(lambda: sharding.constrain(jnp.zeros((3, 8, 5, 4)), axes))().devices()) == 1


def test_the_overview_says_how_the_mesh_divides_every_parameter():
    config = base.get_config()
    config.mesh.tensor = 2
    policy = tiny.abstract()
    lines = run.overview(policy, config).splitlines()
    [row] = [line for line in lines if " decoder.blocks.q " in line]
    shape = named(policy)["decoder.blocks.q"].shape
    assert str(shape) in row and "(None, 'fsdp', 'tensor', None)" in row
    count = sum(leaf.size for leaf in jax.tree.leaves(policy))
    assert f"{count:,}" in lines[-1]
