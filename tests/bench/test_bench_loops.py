"""The work of one iteration of a loop, read from TTGIR: weights, scores, and iterations of the source per loop."""

import pytest

from bench.compiler.disassembly import parse_sass
from bench.compiler.loops import LoopIteration, source_loops, unroll_factor

TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [4, 1], threadsPerWarp = [2, 16], warpsPerCTA = [1, 4], order = [0, 1]}>
#loc1 = loc("/k/mine.py":12:20)
    %acc = scf.for %k = %a to %b step %c iter_args(%x = %y) -> (f32)  : i32 {
      %w = tt.load %p : tensor<8x64x!tt.ptr<i32>, #blocked> loc(#loc2)
      %s = tt.load %q : tensor<64x!tt.ptr<f16>, #ttg.slice<{dim = 0, parent = #blocked}>> loc(#loc1)
      %e = math.exp2 %w2 : tensor<16x64xf32, #mma> loc(#loc1)
      DOT
    } loc(#loc1)
#loc2 = loc("w"(#loc3))
#loc3 = loc("/k/mine.py":13:20)
"""
DOT = "%d = tt.dot %a, %b, %c : tensor<16x64xf16, #a> * tensor<64x64xf16, #b> -> tensor<16x64xf32, #mma> loc(#loc1)"
HALF = DOT.replace("<16x64xf16", "<32x32xf16").replace("<64x64xf16", "<32x64xf16")
WGMMA = (
    "%d = ttng.warp_group_dot %a, %b, %c {isAsync = true} : tensor<64x32xf16, #dot> * !ttg.memdesc<32x16xf16, #s, #m>"
)
WAIT = (
    "%d = ttng.warp_group_dot_wait %a, %b {pendings = 1 : i32} : tensor<64x16xf32, #mma>, !ttg.memdesc<32x16xf16, #s>"
)
PRODUCT = "%p = arith.mulf %w, %x : tensor<2x8x64xf16, #blocked> loc(#loc1)"  # of two rows of x
WORDS, CODES = 8 * 64, 8 * 64 * 8


def loop(*products: str) -> LoopIteration:
    return next(source_loops(TTGIR.replace("DOT", "\n      ".join(products))))


def test_loop_iteration_counts_loads_and_exponentials() -> None:
    turn = loop(DOT)
    assert [(x.source_line[1], x.shape, x.elements_per_thread) for x in turn.loads] == [
        (13, (8, 64), 4),
        (12, (64,), 1),
    ]
    assert turn.weights == CODES and turn.exponentials == 16 * 64


@pytest.mark.parametrize(
    ("products", "weights"),
    [
        ([DOT], CODES),
        ([HALF, HALF], CODES),  # cut up along k
        ([WGMMA, WAIT, WGMMA, WAIT], CODES),
        ([HALF], 0),  # half of what is loaded: no figure, not a wrong one
        ([DOT, PRODUCT], CODES),  # a scale, and not the weights
        ([], 0),
        ([PRODUCT] * 3, WORDS),  # a word for every code, times zero, scale and x
        ([PRODUCT] * 4, CODES),  # no tensor cores: each of 8 nibbles times x
    ],
    ids=["dot", "cut up", "wgmma", "half", "scaled", "none", "few", "many"],
)
def test_loop_iteration_weights_are_the_codes_it_multiplies(products: list[str], weights: int) -> None:
    assert loop(*products).weights == weights


def test_loop_iteration_with_a_pointer_per_code_and_two_weights() -> None:
    whole = TTGIR.replace("DOT", DOT)
    assert next(source_loops(whole.replace("<8x64x!", "<64x64x!"))).weights == 64 * 64
    load = next(row for row in whole.splitlines() if "%w =" in row)
    two = whole.replace(load, f"{load}\n{load}")
    assert next(source_loops(two)).weights == next(source_loops(two.replace(DOT, f"{DOT}\n{DOT}"))).weights == 2 * CODES
    assert next(source_loops(two.replace(DOT, "\n".join([HALF] * 4)))).weights == 2 * CODES


def test_unroll_factor_is_counted_from_loads() -> None:
    ttgir = TTGIR.replace("DOT", DOT)
    load = '//## File "/k/mine.py", line 13\n/*0000*/  LDG.E.128 R4, desc[UR4][R2.64] ;\n'
    once, thrice = unroll_factor(ttgir, parse_sass(load)), unroll_factor(ttgir, parse_sass(3 * load))
    assert once and thrice and (once[0], thrice[0]) == (1, 3)
    assert (
        unroll_factor(ttgir, parse_sass(load + load.replace("128", "64"))) is None
    )  # 1.5 turns: no figure, not a wrong one
