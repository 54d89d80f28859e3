"""Launches inside `emulating`: every kind of argument and grid, what is refused and why, and faults in plain words."""

import inspect
import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.compiler import gpus
from bench.compiler.cross_compile import CrossCompileDriver
from bench.correctness.guarded_memory import MEMORY_LAYOUTS, MemoryLayout, guard_tensor
from bench.emulator import KernelFault, emulating
from bench.emulator.report import own_line

N = 1000


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    if y_ptr is not None:
        x += tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x, mask=offs < n)


@triton.jit
def unmasked_copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x)


@triton.jit
def strided_copy_kernel(x_ptr, out_ptr, m, n, stride_xm, stride_xn, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride_xm + offs * stride_xn, mask=offs < n)
    tl.store(out_ptr + tl.program_id(0) * n + offs, x, mask=offs < n)


@triton.jit
def pair_kernel(pair, scale, shift, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, (tl.load(pair[0] + offs) + tl.load(pair[1] + offs)) * scale + shift)


@triton.jit
def shared_kernel(out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    a = (offs[:, None] + offs[None, :]).to(tl.float16)
    tl.store(out_ptr + offs[:, None] * SIZE + offs[None, :], tl.dot(a, a))


@triton.jit
def descriptor_kernel(desc, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs[:, None] * BLOCK + offs[None, :], desc.load([0, 0]))


@triton.jit
def counter_kernel(out_ptr):
    count = tl.inline_asm_elementwise("mov.u64 $0, %pm0_64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(out_ptr, count)


@triton.jit
def last_block_first_kernel(flag_ptr, out_ptr):
    """The first block waits for the last."""
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(out_ptr, 5)
        tl.atomic_xchg(flag_ptr, 1)
    if tl.program_id(0) == 0:
        while tl.atomic_add(flag_ptr, 0) == 0:
            pass
        tl.store(out_ptr + 1, tl.load(out_ptr) + 1)


@triton.jit
def sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + offs % 2, tl.load(x_ptr + tl.program_id(0) * BLOCK + offs))


@triton.jit
def row_sums_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, 0))


@triton.jit
def first_element_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def first_block_first_kernel(flag_ptr, out_ptr, STORE_SCOPE: tl.constexpr, LOAD_SCOPE: tl.constexpr, SEM: tl.constexpr):
    """All others wait for the first block."""
    if tl.program_id(0) == 0:
        tl.store(out_ptr, 5)
        tl.debug_barrier()
        tl.atomic_xchg(flag_ptr, 1, sem=SEM, scope=STORE_SCOPE)
    else:
        while tl.atomic_add(flag_ptr, 0, sem=SEM, scope=LOAD_SCOPE) == 0:
            pass
        tl.debug_barrier()
        tl.store(out_ptr + tl.program_id(0), tl.load(out_ptr))


def line_of(kernel: Any, code: str) -> str:
    """ "file:line" of the line of a kernel that begins with `code`."""
    lines, first = inspect.getsourcelines(kernel.fn)
    [line] = [first + i for i, text in enumerate(lines) if text.strip().startswith(code)]
    return f"{__file__.rpartition('/')[2]}:{line}"


@pytest.mark.parametrize("grid", [(4,), (4, 1), lambda meta: (triton.cdiv(N, meta["BLOCK"]),)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32])
def test_vectors_are_added(grid: Any, dtype: torch.dtype) -> None:
    x, y = torch.randn(2, N).mul(100).to(dtype)
    out = torch.zeros_like(x)
    with emulating("sm_80") as report:
        add_kernel[grid](x, y, out, N, BLOCK=256)
    assert torch.equal(out, x + y)
    assert [(launch.kernel, launch.grid, launch.faults) for launch in report.launches] == [
        ("add_kernel", (4, 1, 1), [])
    ]
    assert str(report).startswith("add_kernel: 4 x 1 x 1 blocks on sm_80, ")


def test_arguments_may_be_none_tuples_floats_and_views() -> None:
    x, out = torch.randn(2 * N)[1::2], torch.zeros(N)
    values = x.clone()
    with emulating("sm_90"):
        add_kernel[(4,)](values, None, out, N, BLOCK=256)
        assert torch.equal(out, values)
        pair_kernel[(1,)]((values, out), 0.5, 3, out, BLOCK=512)
        strided_copy_kernel[(1,)](x, values, 1, N, 1, x.stride(0), BLOCK=1024)
    assert torch.equal(out[:512], x[:512] + 3) and torch.equal(values, x)


def test_views_of_one_numpy_array_share_their_memory() -> None:
    """Each has a storage of its own, which may begin where another does, or lie within it."""
    memory = np.arange(N, dtype=np.float32)
    head, inner, whole = (torch.from_numpy(part) for part in (memory[:10], memory[20:30], memory))
    twice = whole * 2
    with emulating("sm_80"):
        add_kernel[(1,)](head, inner, torch.zeros(10), 10, BLOCK=16)
        pair_kernel[(1,)]((head, inner), 1.0, 0, torch.zeros(8), BLOCK=8)
        add_kernel[(4,)](whole, whole, whole, N, BLOCK=256)
        assert torch.equal(whole, twice)
        pair_kernel[(1,)]((whole, head), 0.5, 0, inner, BLOCK=8)
        pair_kernel[(1,)]((inner, head), 0.5, 0, whole, BLOCK=8)


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_90"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_may_add_up_by_atomics(dtype: torch.dtype, target: str) -> None:
    """Sums of bfloat16 before sm_90 are loops, which begin with a load that is not atomic."""
    x, out = torch.randint(-2, 3, (4, 64)).to(dtype), torch.zeros(2, dtype=dtype)
    with emulating(target):
        sum_kernel[(4,)](x, out, BLOCK=64)
    assert torch.equal(out, x.view(-1, 2).sum(0))


@pytest.mark.parametrize(
    ("scopes", "sem", "right"),
    [
        (("gpu", "sys"), "acq_rel", True),
        (("gpu", "gpu"), "relaxed", False),
        (("cta", "gpu"), "acq_rel", False),
        (("gpu", "cta"), "acq_rel", False),
    ],
)
def test_atomics_with_the_scope_of_a_block_order_nothing_for_others(
    scopes: tuple[str, str], sem: str, right: bool
) -> None:
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with emulating("sm_90", raise_faults=False) as report:
        first_block_first_kernel[(4,)](flag, out, *scopes, sem)
    assert {fault.kind for fault in report.faults} == (set() if right else {"blocks race"})


def test_a_fault_in_a_function_of_triton_is_of_the_line_that_calls_it() -> None:
    def without_barriers(ptx: str) -> str:
        return re.sub(r"bar\.sync[^;]*;", "", ptx)

    with emulating("sm_80", raise_faults=False, edit=without_barriers) as report:
        row_sums_kernel[(4,)](torch.randn(4, 512), torch.zeros(4), BLOCK=512)
    assert {(fault.kind, fault.source.rpartition("/")[2]) for fault in report.faults} == {
        ("race", line_of(row_sums_kernel, "tl.store"))
    }


def test_triton_of_another_environment_is_triton() -> None:
    """Triton's cache keeps the files' places of the environment that compiled first, which may be gone."""
    assert own_line("/gone/lib/triton/language/standard.py:43", "/gone/triton/kernels/swiglu.py:54") == (
        "/gone/triton/kernels/swiglu.py:54"
    )


def test_a_race_of_blocks_names_its_threads() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with emulating("sm_80"), pytest.raises(KernelFault, match="block 0 writes what block 3 writes") as error:
        first_element_kernel[(4,)](out)
    assert "(block (0, 0, 0), thread 0)\n" in str(error.value)


def test_a_report_is_short() -> None:
    x = torch.zeros(N)
    with emulating("sm_80") as report:
        add_kernel[(4,)](x, x, x, N, BLOCK=256)
    assert len(repr(report)) < 500


def test_a_grid_without_blocks_runs_nothing() -> None:
    x = torch.zeros(N)
    with emulating("sm_80"):
        add_kernel[(0,)](x, x, x, N, BLOCK=256)


@pytest.mark.parametrize(("grid", "error"), [((-1,), ValueError), ((1, 1, 1, 1), ValueError), ((2.5,), TypeError)])
def test_grids_that_are_none_are_refused(grid: tuple, error: type[Exception]) -> None:
    x = torch.zeros(N)
    with emulating("sm_80"), pytest.raises(error):
        add_kernel[grid](x, x, x, N, BLOCK=256)


def test_a_kernel_compiled_ahead_is_launched() -> None:
    x, out = torch.randn(N), torch.zeros(N)
    with emulating("sm_80") as report:
        compiled = add_kernel.warmup(x, x, out, N, BLOCK=256, grid=(1,))
        assert not report.launches
        compiled[(4,)](x, x, out, N, 256)
        with pytest.raises(TypeError, match=r"add_kernel takes 5 arguments .*, not 4"):
            compiled[(4,)](x, x, out, N)
        with pytest.raises(NotImplementedError, match="registers are not known"):
            compiled._init_handles()
    assert torch.equal(out, x + x)


@pytest.fixture
def little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block may have 5 KiB, which `shared_kernel` needs below 64."""
    monkeypatch.setitem(gpus.TARGETS, "sm_80", replace(gpus.TARGETS["sm_80"], max_shared_per_block=5 * gpus.KiB))


@pytest.mark.usefixtures("little_shared_memory")
def test_an_autotuned_kernel_takes_the_first_config_that_fits() -> None:
    prepared: list[int] = []
    sizes = [
        triton.Config({"SIZE": size}, pre_hook=lambda args: prepared.append(args["SIZE"])) for size in (64, 32, 16)
    ]
    out = torch.zeros(32, 32)
    with emulating("sm_80"):
        triton.autotune(sizes, key=[])(shared_kernel)[(1,)](out)
    a = (torch.arange(32)[:, None] + torch.arange(32)).float()
    assert torch.equal(out, a @ a) and prepared == [64, 32]


@pytest.mark.usefixtures("little_shared_memory")
def test_too_much_shared_memory_and_too_large_grids_are_refused() -> None:
    out = torch.zeros(64, 64)
    with emulating("sm_80"):
        with pytest.raises(OutOfResources, match="shared memory"):
            shared_kernel[(1,)](out, SIZE=64)
        with pytest.raises(ValueError, match="add_kernel: a grid of "):
            add_kernel[(1, 2**16)](out, out, out, N, BLOCK=256)


def test_what_is_not_emulated_is_refused_by_name() -> None:
    x, out = torch.randn(16, 16), torch.zeros(16, 16)
    with emulating("sm_90"):
        with pytest.raises(NotImplementedError, match="descriptor_kernel: argument desc is a tensor descriptor"):
            descriptor_kernel[(1,)](TensorDescriptor.from_tensor(x, [16, 16]), out, BLOCK=16)
        with pytest.raises(NotImplementedError, match="clusters"):
            add_kernel[(4,)](x, x, out, 256, BLOCK=256, num_ctas=2)
        with pytest.raises(NotImplementedError) as error:
            counter_kernel[(1,)](torch.zeros(1, dtype=torch.int64))
    assert all(word in str(error.value) for word in ("pm0_64", "counter_kernel", line_of(counter_kernel, "count =")))
    with (
        pytest.raises(ValueError, match="'gfx942' is no target of the emulator; there are: sm_80, "),
        emulating("gfx942"),
    ):
        pass
    with emulating("sm_80"), pytest.raises(ValueError, match="argument out_ptr is on meta"):
        add_kernel[(4,)](x, x, out.to("meta"), 256, BLOCK=256)


@pytest.mark.parametrize("raise_faults", [True, False])
def test_a_fault_says_what_where_and_on_which_line(raise_faults: bool) -> None:
    x, out = torch.randn(N), torch.zeros(N)
    with emulating("sm_80", raise_faults=raise_faults) as report:
        if raise_faults:
            with pytest.raises(KernelFault, match="out of bounds"):
                unmasked_copy_kernel[(4,)](x, out, N, BLOCK=256)
        else:
            unmasked_copy_kernel[(4,)](x, out, N, BLOCK=256)
    assert torch.equal(out, x)
    [fault] = report.faults
    assert (fault.kind, fault.kernel) == ("out of bounds", "unmasked_copy_kernel")
    assert fault.source.endswith(line_of(unmasked_copy_kernel, "tl.store"))
    for words in ("store", "out_ptr", "block (3, 0, 0)", "thread", "tl.store(out_ptr + offs, x)", "st.global"):
        assert words in str(fault)


def copy_guarded(x: Tensor, out: Tensor) -> None:
    strided_copy_kernel[(x.shape[0],)](x, out, *x.shape, *x.stride(), BLOCK=32)


def off_by_one_row(x: Tensor, out: Tensor) -> None:
    strided_copy_kernel[(x.shape[0] + 1,)](x, out, *x.shape, *x.stride(), BLOCK=32)


def as_if_contiguous(x: Tensor, out: Tensor) -> None:
    strided_copy_kernel[(x.shape[0],)](x, out, *x.shape, x.shape[1], 1, BLOCK=32)


@pytest.mark.parametrize("layout", MEMORY_LAYOUTS)
@pytest.mark.parametrize(
    ("launch", "kinds"),
    [
        (copy_guarded, {"aligned": set(), "strided": set()}),
        (off_by_one_row, {"aligned": {"out of bounds"}, "strided": {"out of bounds", "between elements"}}),
        (as_if_contiguous, {"aligned": set(), "strided": {"between elements"}}),
    ],
)
def test_guarded_tensors_may_be_touched_at_their_elements_only(
    launch: Callable[[Tensor, Tensor], None], kinds: dict[MemoryLayout, set[str]], layout: MemoryLayout
) -> None:
    rng = torch.Generator().manual_seed(3)
    guard = guard_tensor(torch.randn(5, 24), rng, layout)
    guard.name = "table"
    with emulating("sm_80", raise_faults=False) as report:
        launch(guard.view, torch.zeros(6, 24))
    assert {fault.kind for fault in report.faults} <= kinds[layout]
    assert bool(report.faults) == bool(kinds[layout])
    assert all("table" in fault.message for fault in report.faults)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_block_may_wait_for_one_far_behind_it(seed: int) -> None:
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with emulating("sm_80", seed=seed):
        last_block_first_kernel[(130,)](flag, out)
    assert out.tolist() == [5, 6]


def test_nothing_stays_changed() -> None:
    x = torch.zeros(N)
    with emulating("sm_80"):
        add_kernel[(4,)](x, x, x, N, BLOCK=256)
    with pytest.raises(RuntimeError, match="0 active drivers"):
        triton.runtime.driver.active  # noqa: B018


def test_a_copy_of_a_file_has_its_own_lines(tmp_path: Path) -> None:
    sources = []
    for folder in ("a", "b"):
        file = tmp_path / folder / "copied.py"
        file.parent.mkdir()
        lines = inspect.getsource(unmasked_copy_kernel.fn)
        file.write_text(f"import triton\nimport triton.language as tl\n\n\n@triton.jit\n{lines.split(chr(10), 1)[1]}")
        spec = spec_from_file_location("copied", file)
        assert spec and spec.loader
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        with emulating("sm_80", raise_faults=False) as report:
            module.unmasked_copy_kernel[(4,)](torch.zeros(N), torch.zeros(N), N, BLOCK=256)
        sources += [Path(fault.source.rpartition(":")[0]) for fault in report.faults]
    assert sources == [tmp_path / "a" / "copied.py", tmp_path / "b" / "copied.py"]


def test_what_is_compiled_here_is_not_what_others_are_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # An older cache may hold one of them from another folder, whose name is in its PTX.
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(N)
    with emulating("sm_80"):
        emulated = add_kernel.warmup(x, x, x, N, BLOCK=256, grid=(1,))
    monkeypatch.setattr(triton.runtime.driver, "_active", CrossCompileDriver("sm_80"))
    whole = add_kernel.warmup(x, x, x, N, BLOCK=256, grid=(1,))
    assert not emulated.asm["cubin"] and whole.asm["cubin"].startswith(b"\x7fELF")
    assert emulated.hash != whole.hash and emulated.asm["ptx"] == whole.asm["ptx"]
