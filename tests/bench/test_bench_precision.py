"""`bench.compiler.precision` finds in a kernel's text every operation in fewer bits than were asked for."""

import pytest

from bench.compiler.precision import find_imprecision

DOT = "%4 = tt.dot %1, %2, %3 : tensor<64x32xf32> * tensor<32x16xf32> -> tensor<64x16xf32> loc(#loc7)"
HALF = "%4 = tt.dot %1, %2, %3 : tensor<64x32xf16> * tensor<32x16xf16> -> tensor<64x16xf32> loc(#loc7)"
ASKED = DOT.replace("%3 :", "%3, inputPrecision = tf32 :")
MOVE = (
    '%5 = tt.elementwise_inline_asm "mov.b32 $0, $1;" {constraints = "=r,r", packed_element = 1 : i32, pure = false} %4'
    " : tensor<64x16xf32> -> tensor<64x16xf32> loc(#loc8)"
)
TWO = (
    '%5:2 = tt.elementwise_inline_asm "{\\0A}" {constraints = "=h,=h,r,h", packed_element = 1 : i32, pure = true} '
    "%1, %2 : tensor<8x4xi32>, tensor<8x4xbf16> -> tensor<8x4xbf16>, tensor<8x4xbf16> loc(#loc8)"
)
RIGHT = {
    "products by fma": (DOT, "fma.rn.f32 %f1, %f2, %f3, %f1;"),
    "half precision, mma": (HALF, "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r1, %r2}"),
    "half precision, wgmma": (HALF, "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r1}"),
    "half precision, tcgen05": (HALF, "tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ];"),
    "TF32 that was asked for": (ASKED, "tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ];"),
    "a move": (MOVE, ""),
    "several results": (TWO, ""),
}
WRONG = {
    "TF32, mma": (DOT, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2}", "multiplies in TF32"),
    "TF32, wgmma": (DOT, "wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 {%r1}", "multiplies in TF32"),
    "TF32, tcgen05": (DOT, "tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ];", "multiplies in TF32"),
    "sums in float16, mma": (HALF, "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1}", "sums products in f16"),
    "sums in float16, wgmma": (
        HALF,
        "wgmma.mma_async.sync.aligned.m64n128k16.f16.f16.f16 {%r1}",
        "sums products in f16",
    ),
    "sums in float16, tcgen05": (HALF.replace("x16xf32>", "x16xf16>"), "", "sums products in f16"),
    "half a register": (MOVE.replace("=r,r", "=h,h"), "", "holds numbers of 32, 32 bits in registers =h,h"),
    "one of several": (TWO.replace("r,h", "r,r"), "", "holds numbers of 16, 16, 32, 16 bits in registers =h,=h,r,r"),
    "more elements": (MOVE.replace("element = 1", "element = 2"), "", "holds numbers of 64, 64 bits in registers =r,r"),
}


@pytest.mark.parametrize(("ttir", "ptx"), RIGHT.values(), ids=RIGHT)
def test_precise_kernels_pass(ttir: str, ptx: str) -> None:
    assert find_imprecision({"ttir": ttir, "ptx": ptx}) == []


@pytest.mark.parametrize(("ttir", "ptx", "word"), WRONG.values(), ids=WRONG)
def test_planted_imprecision_is_found(ttir: str, ptx: str, word: str) -> None:
    (found,) = find_imprecision({"ttir": f"{RIGHT['a move'][0]}\n{ttir}\n{RIGHT['several results'][0]}", "ptx": ptx})
    assert word in found


def test_amd_products_in_tf32_are_found() -> None:
    assert find_imprecision({"ttir": DOT, "amdgcn": "\tv_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]"}) == []
    assert find_imprecision({"ttir": DOT, "amdgcn": "\tv_mfma_f32_16x16x8_xf32 v[0:3], v[4:5], v[6:7], v[0:3]"})
