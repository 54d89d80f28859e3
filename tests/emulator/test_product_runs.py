"""Instructions mma.sync that follow each other are computed as few products, and give what they give one by one."""

import numpy as np
import pytest
from ptx_runner import run_ptx

from bench.emulator.report import Launch

NAME = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
A, B, D = "{%r10,%r11,%r12,%r13}", "{%r20,%r21}", "{%r30,%r31,%r32,%r33}"
OTHER_A, OTHER_B, OTHER_D = "{%r14,%r15,%r16,%r17}", "{%r22,%r23}", "{%r34,%r35,%r36,%r37}"
ZERO = "{%r5,%r5,%r5,%r5}"


def run(products: list[str], apart: bool) -> tuple[np.ndarray, Launch]:
    """Registers 30 to 37 after the products, of which each is an instruction by itself if they are set `apart`."""
    rng = np.random.default_rng(0)
    numbers = rng.integers(-4, 5, (16, 32, 2)).astype(np.float16).view(np.uint32)[..., 0].copy()
    out = np.zeros((8, 32), np.uint32)
    lines = ["mad.wide.u32 %q10, %r0, 4, %q0; mad.wide.u32 %q11, %r0, 4, %q1; mov.b32 %r5, 0;"]
    lines += [f"ld.global.b32 %r{register}, [%q10 + {128 * n}];" for n, register in enumerate((*range(10, 24),))]
    lines += [f"mov.b32 %r{register}, 0;" for register in range(30, 38)]
    lines += [f"{NAME} {product};" + ("mov.b32 %r6, 0;" if apart else "") for product in products]
    lines += [f"st.global.b32 [%q11 + {128 * n}], %r{30 + n};" for n in range(8)]
    launch = run_ptx("\n".join(lines), numbers, out)
    assert not launch.faults
    return out, launch


RUNS = {
    "one": ([f"{D}, {A}, {B}, {D}"], 1),
    "along k": ([f"{D}, {A}, {B}, {D}", f"{D}, {OTHER_A}, {OTHER_B}, {D}"], 1),
    "along n": ([f"{D}, {A}, {B}, {D}", f"{OTHER_D}, {A}, {OTHER_B}, {OTHER_D}"], 1),
    "along m": ([f"{D}, {A}, {B}, {D}", f"{OTHER_D}, {OTHER_A}, {B}, {OTHER_D}"], 1),
    "along k, from zero": ([f"{D}, {A}, {B}, {ZERO}", f"{D}, {OTHER_A}, {OTHER_B}, {D}"], 1),
    "twice from zero": ([f"{D}, {A}, {B}, {ZERO}", f"{D}, {OTHER_A}, {OTHER_B}, {ZERO}"], 2),
    "a sum that begins from another's": ([f"{D}, {A}, {B}, {D}", f"{OTHER_D}, {OTHER_A}, {OTHER_B}, {D}"], 2),
    "a result that is a fragment": ([f"{D}, {A}, {B}, {D}", f"{OTHER_D}, {D}, {OTHER_B}, {OTHER_D}"], 2),
    "a fragment that is overwritten": ([f"{D}, {A}, {B}, {D}", f"{A}, {OTHER_A}, {B}, {A}"], 1),
    "a fragment that is overwritten, then used": (
        [f"{D}, {A}, {B}, {D}", f"{A}, {OTHER_A}, {B}, {ZERO}", f"{OTHER_D}, {A}, {B}, {OTHER_D}"],
        2,
    ),
    "two tiles along k": (
        [f"{d}, {a}, {b}, {d}" for a, b in ((A, B), (OTHER_A, B)) for d in (D, OTHER_D)],
        1,
    ),
    "other tiles along k": ([f"{D}, {A}, {B}, {D}", f"{OTHER_D}, {A}, {OTHER_B}, {OTHER_D}", f"{D}, {A}, {B}, {D}"], 2),
}


@pytest.mark.parametrize(("products", "count"), RUNS.values(), ids=RUNS)
def test_run(products: list[str], count: int) -> None:
    together, launch = run(products, False)
    one_by_one, _ = run(products, True)
    assert (together == one_by_one).all()
    assert launch.program.blocks[0].source.count("S.mma(") == count
