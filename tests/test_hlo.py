"""Reading compiled programs: the counts of products, loops, convolutions and collectives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mstar_jax import sharding
from mstar_jax.plan import hlo, products


def work(fn, *shapes, **how):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.work(jax.jit(fn, **how).lower(*arguments).compile().as_text())


def test_a_product():
    assert work(jnp.matmul, (8, 32), (32, 16)).flops == 2 * 8 * 32 * 16
    batched = work(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 8, 32), (4, 32, 16))
    assert batched.flops == 4 * 2 * 8 * 32 * 16 and not batched.collectives


@pytest.mark.parametrize("length", [1, 7])
def test_a_loop_counts_as_often_as_it_runs(length):
    def blocks(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = work(blocks, (8, 32), (length, 32, 32))
    assert found.flops == length * 2 * 8 * 32 * 32
    # every block reads its own weights, not those of all blocks
    assert found.bytes < length * 4 * (3 * 32 * 32 + 20 * 8 * 32)

    def nested(x, w):
        return jax.lax.scan(lambda x, _: (blocks(x, w), None), x, None, length=3)[0]

    assert work(nested, (8, 32), (length, 32, 32)).flops == 3 * length * 2 * 8 * 32 * 32


def test_a_gradient_is_twice_the_product():
    def loss(w, x):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    found = work(jax.grad(loss, argnums=(0, 1)), (32, 16), (8, 32))
    assert found.flops == 3 * 2 * 8 * 32 * 16


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "base", "dilation"),
    [(8, 1, 1, 0, 1, 1), (8, 3, 1, 1, 1, 1), (9, 3, 2, 0, 1, 1), (6, 2, 1, 1, 2, 1), (9, 3, 1, 2, 1, 2)],
)
def test_convolutions_do_not_count_padding(size, kernel, stride, padding, base, dilation):
    """Against counting by hand, with padding and both dilations."""
    fn = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(stride,),
        padding=[(padding, padding)],
        lhs_dilation=(base,),
        rhs_dilation=(dilation,),
    )
    there = np.zeros((size - 1) * base + 1 + 2 * padding, bool)
    there[padding : len(there) - padding : base] = True
    reach = (kernel - 1) * dilation
    pairs = sum(
        there[at + k * dilation] for at in range(0, len(there) - reach, stride) for k in range(kernel)
    )
    out = (len(there) - reach - 1) // stride + 1
    assert products.pairs(size, kernel, out, stride, padding, base, dilation) == pairs
    text = jax.jit(fn).lower(jnp.zeros((2, 3, size)), jnp.zeros((5, 3, kernel))).compile().as_text()
    if "convolution(" in text:  # a backend may call a library instead
        assert hlo.work(text).flops == 2 * 2 * 3 * 5 * pairs


def test_collectives_of_a_sharded_step():
    mesh = sharding.make_mesh(fsdp=8)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))

    def loss(w, x):
        return jnp.sum((x @ w) ** 2)

    weights = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=split)
    data = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss), out_shardings=split).lower(weights, data)
    found = hlo.work(lowered.compile().as_text())
    gathered = [c for c in found.collectives if c.kind == "all-gather"]
    assert [(c.bytes, c.group, c.times) for c in gathered] == [(4 * 64 * 128, 8, 1)]
    assert found.moved()["all-gather"] == 4 * 64 * 128 * 7 // 8
    summed = {c.kind for c in found.collectives} & {"all-reduce", "reduce-scatter", "all-to-all"}
    assert summed and found.flops == 2 * 2 * 2 * 64 * 128  # a device has two of the rows


LINES = """
HloModule jit_f, entry_computation_layout={()->f32[8]{0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %p = (s32[], bf16[16,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[16,8]{1,0} get-tuple-element(%p), index=1
  %g = (bf16[16,8]{1,0}, bf16[64,8]{1,0}) all-gather-start(%x), replica_groups=[4,4]<=[16], dimensions={0}
  %d = bf16[64,8]{1,0} all-gather-done(%g)
  %r = f32[16,8]{1,0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum
  %s = bf16[4,8]{1,0} reduce-scatter(%x), replica_groups=[4,4]<=[16], dimensions={0}, to_apply=%sum
  ROOT %t = (s32[], bf16[16,8]{1,0}) tuple(%i, %x)
}

%cond (p: (s32[], bf16[16,8])) -> pred[] {
  %p = (s32[], bf16[16,8]{1,0}) parameter(0)
  ROOT %k = pred[] constant(true)
}

ENTRY %main () -> f32[8] {
  %z = (s32[], bf16[16,8]{1,0}) constant({...})
  %w = (s32[], bf16[16,8]{1,0}) while(%z), condition=%cond, body=%body, backend_config=KNOWN
  %c = f32[2,3,8,16]{3,2,1,0} constant({...})
  ROOT %out = f32[8]{0} constant({...})
}
"""


def test_asynchronous_and_tuple_forms():
    found = hlo.work(LINES.replace("KNOWN", '{"known_trip_count":{"n":"5"}}'))
    assert [(c.kind, c.bytes, c.group, c.times) for c in found.collectives] == [
        ("all-gather", 64 * 8 * 2, 4, 5),
        ("all-reduce", 16 * 8 * 4, 2, 5),
        ("reduce-scatter", 16 * 8 * 2, 4, 5),
    ]
    assert found.moved() == {"all-gather": 5 * 768, "all-reduce": 5 * 512, "reduce-scatter": 5 * 192}


COUNTED = """
%body.2 (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %x = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p), index=1
  %g = f32[8,8]{1,0:T(8,128)} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %h = f32[8,8]{1,0:T(8,128)} all-gather(%x), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  %d = f32[8,8]{1,0:T(8,128)} convolution(%x, %g), dim_labels=bf_io->bf
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %step = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i, %step)
  ROOT %t = (s32[]{:T(128)}, f32[8,8]{1,0}) tuple(%next, %d)
}

%cond.3 (p: (s32[], f32[8,8])) -> pred[] {
  %n = s32[]{:T(128)} constant(32)
  %p = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = (s32[]{:T(128)}, f32[8,8]{1,0}) parameter(0)
  %w = (s32[]{:T(128)}, f32[8,8]{1,0}) while(%a), condition=%cond.3, body=%body.2
}
"""


def test_loops_and_collectives_as_tpus_write_them():
    """The bound is a constant in the condition; an asynchronous collective appears at its start and end."""
    found = hlo.work(COUNTED)
    assert found.flops == 32 * 2 * 8**3
    assert [(c.bytes, c.group, c.times) for c in found.collectives] == [(256, 4, 32)]
    assert hlo.work(COUNTED.replace("constant(1)", "constant(3)")).flops == 11 * 2 * 8**3  # 0, 3, ... 30
    open_ended = COUNTED.replace("direction=LT", "direction=NE")
    assert hlo.work(open_ended).flops == 2 * 8**3


def test_no_hlo():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.work("nothing")


def test_kernels_of_splash_attention_count_what_is_below_the_diagonal():
    """In the form of libtpu: attributes over several lines, followed by the name."""
    kernel = """
  %NAME.1 = (bf16[4,1024,96]) custom-call(%b, %b, %b, %q, %k, %k), custom_call_target="tpu_custom_call", a={{

"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/splash_mha_NAME_no_residuals/pallas_call"}"""
    text = """HloModule jit_f

ENTRY %main () -> bf16[4,1024,96] {
  %b = s8[1,4,4]{2,1,0} parameter(0)
  %q = bf16[4,1024,96]{2,1,0} parameter(1)
  %k = bf16[2,1024,96]{2,1,0} parameter(2)
  %room = bf16[4] custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="splash_mha_fwd"}"""
    text += "".join(kernel.replace("NAME", name) for name in ("fwd", "dq", "dkv"))
    found = hlo.work(text + "\n}\n")
    assert found.flops == (2 + 3 + 4) * 2 * 4 * 1024 * 1024 * 96 * 10 / 16


# ---- what is read and written -------------------------------------------------------------------------

SLICED = """
HloModule jit_f

%inner (a: bf16[32,64,128], i: s32[]) -> bf16[64,128] {
  %a = bf16[32,64,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %s = bf16[1,64,128]{2,1,0} dynamic-slice(%a, %i, %z, %z), dynamic_slice_sizes={1,64,128}
  ROOT %b = bf16[64,128]{1,0} bitcast(%s)
}

%outer (w: bf16[32,64,128], j: s32[], x: bf16[8,64]) -> bf16[8,128] {
  %w = bf16[32,64,128]{2,1,0} parameter(0)
  %j = s32[] parameter(1)
  %x = bf16[8,64]{1,0} parameter(2)
  %layer = bf16[64,128]{1,0} fusion(%w, %j), kind=kLoop, calls=%inner
  ROOT %d = bf16[8,128]{1,0} dot(%x, %layer), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%put (c: bf16[16,512,64], new: bf16[16,1,64], at: s32[]) -> bf16[16,512,64] {
  %c = bf16[16,512,64]{2,1,0} parameter(0)
  %new = f32[16,1,64]{2,1,0} parameter(1)
  %half = bf16[16,1,64]{2,1,0} convert(%new)
  %at = s32[] parameter(2)
  %o = s32[] constant(0)
  ROOT %u = bf16[16,512,64]{2,1,0} dynamic-update-slice(%c, %half, %o, %at, %o)
}

%fresh (new: bf16[16,1,64], at: s32[]) -> bf16[16,512,64] {
  %new = bf16[16,1,64]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %o = bf16[] constant(0)
  %c = bf16[16,512,64]{2,1,0} broadcast(%o), dimensions={}
  ROOT %u = bf16[16,512,64]{2,1,0} dynamic-update-slice(%c, %new, %at, %at, %at)
}

ENTRY %main (w: bf16[32,64,128], x: bf16[8,64]) -> bf16[8,128] {
  %w = bf16[32,64,128]{2,1,0} parameter(0)
  %x = bf16[8,64]{1,0} parameter(1)
  %c = bf16[16,512,64]{2,1,0} parameter(2)
  %n = f32[16,1,64]{2,1,0} parameter(3)
  %h = bf16[16,1,64]{2,1,0} parameter(4)
  %k = s32[] parameter(5)
  %near = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(6)
  ROOT %f = SHAPE WHAT
}
"""
LAYER, ROWS, OUT = 2 * 64 * 128, 2 * 8 * 64, 2 * 8 * 128


@pytest.mark.parametrize(
    ("shape", "what", "moved"),
    [
        # of a stack of 32 layers one is read, though the slice is two fusions deep
        ("bf16[8,128]{1,0}", "fusion(%w, %k, %x), kind=kOutput, calls=%outer", LAYER + 4 + ROWS + OUT),
        ("bf16[8,128]{1,0}", "fusion(%w, %k, %near), kind=kOutput, calls=%outer", LAYER + 4 + OUT),
        ("bf16[1,64,128]", "dynamic-slice(%w, %k, %k, %k), dynamic_slice_sizes={1,64,128}", 2 * LAYER + 12),
        ("bf16[1,64,128]", "slice(%w), slice={[3:4], [0:64], [0:128]}", 2 * LAYER),
        # a token is written into a cache of 512: it is read in float32 and written in bfloat16
        ("bf16[16,512,64]", "fusion(%c, %n, %k), kind=kLoop, calls=%put", (4 + 2) * 16 * 64 + 4),
        ("bf16[16,512,64]", "dynamic-update-slice(%c, %h, %k, %k, %k)", (2 + 2) * 16 * 64 + 12),
        # a cache that did not exist is written as a whole
        ("bf16[16,512,64]", "fusion(%h, %k), kind=kLoop, calls=%fresh", 2 * 16 * 64 * (512 + 1) + 4),
        ("bf16[16,512,64]", "copy(%c)", 2 * 2 * 16 * 512 * 64),
        (
            "(bf16[8,64]{1,0:S(1)}, bf16[8,64]{1,0}, u32[]{:S(2)})",
            "copy-start(%x)",
            ROWS,
        ),  # to the near memory
        (  # of the cache a sixteenth goes to the near memory
            "((bf16[16,512,64]{2,1,0}), bf16[1,512,64]{2,1,0:S(1)}, s32[]{:S(2)})",
            "slice-start(%c), slice={[2:3], [0:512], [0:64]}",
            2 * 512 * 64,
        ),
        ("(bf16[8,64]{1,0}, bf16[64,64]{1,0})", "all-gather-start(%x), replica_groups=[1,8]<=[8]", 9 * ROWS),
    ],
)
def test_bytes_of_an_operation(shape, what, moved):
    text = SLICED.replace("SHAPE", shape).replace("WHAT", what)
    assert hlo.work(text).bytes == moved


def test_a_compiled_scan_reads_each_layer_once():
    """Of a stack of L layers, whether XLA slices it inside or outside of a fusion."""

    def blocks(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    layers, d = 32, 256
    found = work(blocks, (8, d), (layers, d, d))
    weights = 4 * layers * d * d
    assert weights <= found.bytes < 4 * weights  # read once; or copied out first, and then read


def test_a_loop_that_ends_when_it_likes_counts_a_step():
    def decode(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e9, lambda x: x @ w, x @ w)

    compiled = jax.jit(decode).lower(jnp.ones((8, 32)), jnp.ones((32, 32))).compile()
    step, once = hlo.step_of(compiled.as_text())
    assert step.flops == once.flops == 2 * 8 * 32 * 32
    assert hlo.work(compiled.as_text(), 5).flops == 6 * 2 * 8 * 32 * 32
    assert step.bytes > 4 * 32 * 32


# ---- libraries and kernels ----------------------------------------------------------------------------


def called(operands, result, target, config="{}", name="x"):
    """A program with one custom call."""
    given = "".join(f"  %p{i} = {shape} parameter({i})\n" for i, shape in enumerate(operands))
    names = ", ".join(f"%p{i}" for i in range(len(operands)))
    call = f'  ROOT %c = {result} custom-call({names}), custom_call_target="{target}"'
    meta = f', metadata={{op_name="{name}"}}, backend_config={config}'
    return hlo.work("HloModule m\n\nENTRY %main () -> f32[] {\n" + given + call + meta + "\n}\n")


def test_cublas():
    config = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
    shapes = ("bf16[64,32]{1,0}", "bf16[32,128]{1,0}")
    result = "(bf16[64,128]{1,0}, s8[4194304]{0})"
    found = called(shapes, result, "__cublas$lt$matmul", config)
    assert found.flops == 2 * 64 * 32 * 128
    assert found.bytes == 2 * (64 * 32 + 32 * 128 + 64 * 128)  # not the room it works in


@pytest.mark.parametrize(("mask", "seen"), [("CAUSAL", (512 + 1) / (2 * 512)), ("PADDING", 1.0)])
def test_cudnn_attention(mask, seen):
    square = '"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "512", "512"]}'
    config = f'{{"cudnn_fmha_backend_config": {{{square}, "mask_type": "{mask}"}}}}'
    q, out = "bf16[2,512,4,64]{3,2,1,0}", "bf16[2,4,512,64]{3,1,2,0}"
    forward = called((q, q, q), f"({out}, f32[2,4,512], u8[0]{{0}})", "__cudnn$fmhaSoftmax", config)
    scores = 2 * 2 * 4 * 512 * 512 * 64
    assert forward.flops == 2 * scores * seen
    assert forward.bytes == 4 * 2 * 2 * 512 * 4 * 64 + 4 * 2 * 4 * 512
    back = called((q, q, q, q), f"({out}, {out}, {out}, u8[64]{{0}})", "__cudnn$fmhaSoftmaxBackward", config)
    assert back.flops == 5 * scores * seen


def test_kernels_of_decoding():
    """A group's queries meet its own cache; those of all branches the prompt's."""
    b, k, g, h, n, c, p = 2, 16, 4, 3, 64, 128, 1024
    q, own = f"bf16[{b},{k},{g},{h},{n}]", f"bf16[{b},{k},{g},{c},{n}]"
    out = f"f32[{b},{k},{g},{h},{n}]"
    kernel = "__gpu$xla.gpu.triton"
    code = '{debug = false, ir = "ML(to_apply=%x, calls=%y{"}'
    name = "jit(_advance)/while/body/decode_own/pallas_call"
    found = called((q, own, own, own, own, f"s8[{b},{c}]", f"s8[{b},{c}]"), out, kernel, code, name)
    assert found.flops == 2 * 2 * b * k * g * h * n * 2 * c  # two chunks, two products
    name = "jit(_advance)/while/body/decode_shared/pallas_call"
    keys, values = f"bf16[{b},{g},{n},{p}]", f"bf16[{b},{g},{p},{n}]"
    found = called((q, keys, values, f"s8[{b},1,{p}]"), out, kernel, code, name)
    assert found.flops == 2 * 2 * b * k * g * h * n * p
    assert not found.unknown


def test_unknown_calls_are_named():
    found = called(("f32[8,8]",), "f32[8,8]", "somebody_elses_kernel")
    assert found.unknown == ("somebody_elses_kernel",) and found.flops == 0
    assert found.bytes == 2 * 4 * 64
