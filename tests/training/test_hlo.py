"""Costs read from HLO text: by hand on a written module, and against XLA's own count on compiled ones."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lungjax.training import hlo

WRITTEN = """HloModule written, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %c = f32[]{:T(128)} add(%a, %b)
}

%piece.1 (p: bf16[8,4]) -> bf16[8,64] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %gather.1 = bf16[8,64]{1,0} all-gather(%p), channel_id=1, dimensions={1}
}

%piece.2 (p: bf16[8,4]) -> bf16[8,64] {
  %p = bf16[8,4]{1,0} parameter(0)
  ROOT %gather.2 = bf16[8,64]{1,0} all-gather(%p), channel_id=1, dimensions={1}
}

%body (state: (u32[], f32[100])) -> (u32[], f32[100]) {
  %state = (u32[]{:T(128)}, f32[100]{0}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=0
  %x = f32[100]{0} get-tuple-element(%state), index=1
  %permute = (f32[100]{0}, f32[100]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=2
  %done = f32[100]{0} collective-permute-done(%permute)
  %one = u32[]{:T(128)S(1)} constant(1)
  %next = u32[]{:T(128)S(1)} add(%i, %one)
  ROOT %out = (u32[]{:T(128)}, f32[100]{0}) tuple(%next, %done)
}

%condition (state: (u32[], f32[100])) -> pred[] {
  %bound = u32[]{:T(128)S(1)} constant(7)
  %state = (u32[]{:T(128)S(1)}, f32[100]{0}) parameter(0)
  %i = u32[]{:T(128)S(1)} get-tuple-element(%state), index=0
  ROOT %less = pred[]{:T(512)S(1)} compare(%i, %bound), direction=LT
}

ENTRY %main (w: bf16[8,4], x: f32[100], y: f32[1000]) -> f32[100] {
  %w = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[100]{0:T(128)} parameter(1)
  %y = f32[1000]{0:T(128)} parameter(2)
  %near = (f32[1000]{0:T(128)S(1)}, f32[1000]{0:T(128)}, u32[]{:S(2)}) copy-start(%y)
  %there = f32[1000]{0:T(128)S(1)} copy-done(%near)
  %part = ((f32[1000]{0:T(128)}), f32[10]{0:T(128)S(1)}, u32[]{:S(2)}) slice-start(%y), slice={[0:10]}
  %cut = f32[10]{0:T(128)S(1)} slice-done(%part)
  %whole.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%piece.1
  %whole.2 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} fusion(%w), kind=kCustom, calls=%piece.2
  %both = (f32[10]{0:S(1)}, bf16[8,64]{1,0:T(8,128)(2,1)S(1)}) all-reduce(%cut, /*index=1*/%whole.1), to_apply=%sum
  %zero = u32[]{:T(128)} constant(0)
  %start = (u32[]{:T(128)}, f32[100]{0:T(128)}) tuple(%zero, %x)
  %loop = (u32[]{:T(128)}, f32[100]{0:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[100]{0:T(128)} get-tuple-element(%loop), index=1
}
"""


def test_a_written_module_by_hand():
    found = hlo.costs(WRITTEN)
    assert {kind: (moved.count, moved.kinds) for kind, moved in found.collectives.items()} == {
        "all-reduce": (1, {"f32": 10 * 4, "bf16": 8 * 64 * 2}),
        "all-gather": (1, {"bf16": 8 * 64 * 2}),  # two pieces of one
        "collective-permute": (7, {"f32": 7 * 100 * 4}),  # the loop's condition says 7
    }
    # The copy and the slice read what they take; the fusions read w; each turn of the loop reads and writes x, and a
    # counter. What S(1) marks stays on the chip.
    assert found.memory == 4000 + 40 + 2 * 64 + 7 * (400 + 400 + 4)
    assert found.operations == 0


def conv(x, k, strides=(1, 1), padding="SAME", **options):
    return lax.conv_general_dilated(x, k, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options)


def kernel_gradient(**options):
    return lambda x, k: jax.grad(lambda k: conv(x, k, (2, 2), **options).sum() ** 2)(k)


@pytest.mark.parametrize(
    ("function", "depth"),
    [
        (lambda x, k: conv(x, k, (2, 1), ((1, 3), (0, 2))), 6),
        (lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"), 6),
        (lambda x, k: conv(x, k, rhs_dilation=(2, 3)), 6),
        (lambda x, k: conv(x, k, feature_group_count=2), 3),
        (kernel_gradient(), 6),
        (kernel_gradient(feature_group_count=2), 3),
        (lambda x, k: jnp.einsum("bhwc,hwcd->bd", x[:, :3, :3], k), 6),
    ],
)
def test_operations_are_those_of_xla_without_padding_and_dilation(function, depth):
    shapes = jax.ShapeDtypeStruct((4, 13, 11, 6), jnp.float32), jax.ShapeDtypeStruct((3, 3, depth, 8), jnp.float32)
    compiled = jax.jit(function).lower(*shapes).compile()
    counted = hlo.costs(compiled.as_text()).operations
    assert counted > 1000
    assert counted == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)  # XLA counts sums and squares too


def test_a_loop_counts_as_often_as_it_runs():
    def five_products(x):
        return lax.scan(lambda c, _: (jnp.tanh(c @ x), None), x, length=5)[0]

    compiled = jax.jit(five_products).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    assert hlo.costs(compiled.as_text()).operations == 5 * 2 * 64**3
