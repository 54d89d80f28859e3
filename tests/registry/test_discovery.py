"""What a file takes to be found, for an op as for a kernel, and what one does that is broken."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from bench import check
from vila_triton import kernels, ops
from vila_triton.commands.ops import print_ops
from vila_triton.registry import OPS, discover, use

Put = Callable[[str, str], Path]

OP = '''
    """A number cut in two: its nearest whole, and what is left."""

    from typing import Any

    import torch
    from torch import Tensor

    from vila_triton.ops.dtypes import DTYPES, dtype_name, random_tensor
    from vila_triton.ops.shapes import check_axes
    from vila_triton.registry import IntRange, op


    @op
    def cut_in_two(x: Tensor) -> tuple[Tensor, Tensor]:
        """(round(x), x - round(x)) of x [n]."""
        return x.round(), x - x.round()


    @cut_in_two.requires
    def _(x) -> None:
        check_axes("cut_in_two", x=(x, "n"))


    @cut_in_two.example_inputs
    def _(n: IntRange(1, 40), dtype: DTYPES, *, rng, device):
        return (random_tensor(n, dtype=dtype, rng=rng, device=device),)


    @cut_in_two.sizes_from_args("n")
    def _(x):
        return dict(n=len(x), dtype=dtype_name(x.dtype))


    @cut_in_two.flops_and_bytes
    def _(n, dtype):
        return 2 * n, 3 * n * getattr(torch, dtype).itemsize


    cut_in_two.fake_impl(lambda x: (x.new_empty(x.shape), x.new_empty(x.shape)))
'''
KERNEL = '''
    """x cut in two, a block of elements a program."""

    import torch
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    from vila_triton.ops import cut_in_two


    @triton.jit
    def _cut_kernel(x_ptr, whole_ptr, rest_ptr, n, stride_x, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at * stride_x, mask=at < n, other=0).to(tl.float32)
        below = tl.floor(x)
        up = (x - below > 0.5) | ((x - below == 0.5) & (below % 2 != 0))
        whole = below + up.to(tl.float32)
        tl.store(whole_ptr + at, whole.to(whole_ptr.dtype.element_ty), mask=at < n)
        tl.store(rest_ptr + at, (x - whole).to(rest_ptr.dtype.element_ty), mask=at < n)


    @cut_in_two.impl("mine", configs=[{"BLOCK": 16}])
    def cut_mine(x, *, BLOCK):
        whole, rest = x.new_empty(x.shape), x.new_empty(x.shape)
        _cut_kernel[(triton.cdiv(len(x), BLOCK),)](x, whole, rest, len(x), x.stride(0), BLOCK=BLOCK)
        return whole, rest
'''


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """put("ops/x.py", text): a file in ops/ or kernels/, forgotten after the test with all that it registered."""
    discover()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for package in (ops, kernels):
        folder = tmp_path / package.__name__.rpartition(".")[2]
        folder.mkdir()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    there = {name: dict(op.impls) for name, op in OPS.items()}

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(dedent(text).lstrip())
        importlib.invalidate_caches()
        return tmp_path / name

    yield write
    for file in tmp_path.glob("*/*.py"):
        file.write_text("")  # so that nothing is wrong with it any more
    importlib.invalidate_caches()
    discover()
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    for name in OPS.keys() - there:
        del OPS[name]
        delattr(ops, name)
    for name, impls in there.items():
        OPS[name].impls.clear()
        OPS[name].impls.update(impls)


def test_a_new_op_takes_one_file_and_its_kernel_another(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    put("ops/cut_in_two.py", OP)
    put("kernels/cut_in_two.py", KERNEL)
    assert check.main(["cut_in_two", "--impl", "mine", "--examples", "4", "--seconds", "10"]) == 0
    print_ops(torch.device("cpu"), {})
    said = capsys.readouterr()
    assert "1 right, 0 wrong" in said.out and not said.err
    lines = [line.split()[:2] for line in said.out.splitlines() if line.startswith("cut_in_two")]
    assert lines[-2:] == [["cut_in_two", "reference"], ["cut_in_two", "mine"]]
    x = torch.randn(7)
    cut = ops.cut_in_two  # pyright: ignore[reportAttributeAccessIssue]
    for impl in ("reference", "mine"):  # inside torch.compile as outside of it
        torch.compiler.reset()
        with use(cut_in_two=impl):
            compiled = torch.compile(lambda x: cut(x)[1] + cut(x)[0], fullgraph=True, backend="eager")(x)
        torch.testing.assert_close(compiled, x)


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        ("list[Tensor]", "returns list[torch.Tensor], expected a Tensor or a tuple of Tensors"),
        ("tuple[Tensor, ...]", "returns tuple[torch.Tensor, ...], expected a Tensor or a tuple of Tensors"),
        ("tuple[Tensor, int]", "returns tuple[torch.Tensor, int], expected a Tensor or a tuple of Tensors"),
        ("Tensor | None", "returns "),
        ("Any", "returns typing.Any, expected a Tensor"),
    ],
)
def test_a_result_without_a_schema_is_reported_with_its_line(
    put: Put, capsys: pytest.CaptureFixture[str], returns: str, told: str
) -> None:
    put("ops/cut_in_two.py", OP.replace("tuple[Tensor, Tensor]", returns))
    discover()
    said = capsys.readouterr().err
    assert "ops/cut_in_two.py, line 39: TypeError: cut_in_two " + told in said and said.count("\n") == 1
    assert "cut_in_two" not in OPS


@pytest.mark.parametrize("part", ["requires", "example_inputs", "sizes_from_args", "flops_and_bytes", "fake_impl"])
def test_a_missing_part_of_an_op_is_reported(put: Put, capsys: pytest.CaptureFixture[str], part: str) -> None:
    text = dedent(OP)
    begin = text.index(f"@cut_in_two.{part}" if part != "fake_impl" else "cut_in_two.fake_impl")
    text = text[:begin] + text[begin:].partition("\n\n\n")[2]
    if part == "example_inputs":  # by which the two others know their names
        text = text[:begin] + "cut_in_two.fake_impl(lambda x: (x, x))\n"
    put("ops/cut_in_two.py", text)
    discover()
    said = capsys.readouterr().err
    assert said.startswith("vila-triton: cut_in_two.py: op 'cut_in_two' lacks ") and part in said
    if part in ("example_inputs", "flops_and_bytes"):
        op = OPS["cut_in_two"]
        told = f"cut_in_two.py: op 'cut_in_two' has no {part}, expected @cut_in_two.{part}"
        with pytest.raises(NotImplementedError, match=told):
            (op.make_example if part == "example_inputs" else op.cost)()
        if part == "example_inputs":
            assert check.main(["cut_in_two", "--impl", "reference"]) == 2
            assert capsys.readouterr().err.endswith(f"{told}\n")  # no traceback


HALF = """
    from vila_triton.ops import rms_norm


    @rms_norm.impl("mine")
    def mine(x, weight, eps):
        return x


    1 / 0
"""
BROKEN = {
    "syntax": ("import math\n\ndef launcher(:\n    pass\n", "line 3: SyntaxError: invalid syntax"),
    "import": ("import math\nimport no_such\n", "line 2: ModuleNotFoundError: No module named 'no_such"),
    "name": ("from vila_triton.ops import no_such_op\n", "line 1: ImportError: cannot import name 'no_such_op'"),
    "half": (HALF, "line 9: ZeroDivisionError: division by zero"),
    "script": ("import sys\n\nsys.exit(3)\n", "line 3: SystemExit: 3"),
}


@pytest.mark.parametrize("folder", ["kernels", "ops"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_reported_once_and_others_still_load(
    put: Put, capsys: pytest.CaptureFixture[str], how: str, folder: str
) -> None:
    text, wrong = BROKEN[how]
    file = put(f"{folder}/rms_norm_mine.py", text)
    discover()
    discover()
    said, here = capsys.readouterr().err, f"rms_norm_mine.py, {wrong}"
    assert said.count("\n") == 1 and said.startswith("vila-triton: left aside: ") and here in said
    x, weight = torch.ones(2, 8), torch.ones(8)
    with use(rms_norm="triton", linear="aten"):
        ops.rms_norm(x, weight, 1e-5)
    with pytest.raises(KeyError, match=f"no implementation 'mine'; there are: .*{here}"), use(rms_norm="mine"):
        pass
    assert check.main(["rms_norm", "--impl", "mine"]) == 2 and here in capsys.readouterr().err
    print_ops(torch.device("cpu"), {})
    assert here in capsys.readouterr().out
    file.write_text("from vila_triton.ops import rms_norm\n\nrms_norm.impl('mine')(lambda x, weight, eps: x)\n")
    importlib.invalidate_caches()
    with use(rms_norm="mine"):  # mended
        assert ops.rms_norm(x, weight, 1e-5) is x
    assert not capsys.readouterr().err


def test_a_broken_file_that_others_import_is_reported_once(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    put("kernels/_shared.py", "x = = 1\n")
    for name in "abc":
        put(f"kernels/{name}.py", "from ._shared import x\n")
    discover()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "_shared.py, line 1: SyntaxError" in said
