"""`bench.emulate`: kinds of PTX instructions, sums of counters, the text and the table of rows made by hand."""

from pathlib import Path
from typing import Any

import pytest
import triton

from bench import emulate
from bench.compiler.cross_compile import CompileRequest
from bench.compiler.disassembly import (
    BARRIER,
    CONVERT,
    FLOAT,
    GLOBAL,
    INTEGER,
    OTHER,
    SHARED,
    SPECIAL,
    SPILL,
    TENSOR,
)
from bench.emulator.counters.emulated_sizes import emulate_config, emulated_sizes
from bench.emulator.counters.sums import (
    ExecutedInstruction,
    flops_per_warp,
    instruction_kind,
    instructions_by_line,
    memory_accesses,
    memory_opcode,
    memory_traffic,
    source_line,
)
from bench.emulator.counters.table import counters_table
from bench.emulator.counters.text import EmulatedCall, access_table, compare_calls, is_marked, total_lines
from vila_triton.registry import OPS, discover
from vila_triton.registry.interpreter import uses_triton_kernels

STAMP = {"triton": "3", "torch": "2", "commit": "abc", "date": "2026-01-01"}


@pytest.mark.parametrize(
    "opcode, kind",
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", TENSOR),
        ("wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16", TENSOR),
        ("wgmma.wait_group.sync.aligned", BARRIER),
        ("cp.async.commit_group", BARRIER),
        ("fence.proxy.async.shared::cta", BARRIER),
        ("bar.sync", BARRIER),
        ("cp.async.cg.shared.global", GLOBAL),
        ("ld.global.L1::evict_last.v4.b32", GLOBAL),
        ("atom.global.gpu.acq_rel.add.f32", GLOBAL),
        ("st.shared.v2.b32", SHARED),
        ("ld.shared::cta.b32", SHARED),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", SHARED),
        ("shfl.sync.bfly.b32", SHARED),
        ("ld.param.b64", OTHER),
        ("ld.local.b32", SPILL),
        ("cvt.rn.bf16x2.f32", CONVERT),
        ("lop3.b32", CONVERT),
        ("and.pred", INTEGER),
        ("mad.wide.u32", INTEGER),
        ("setp.lt.s64", INTEGER),
        ("setp.lt.f32", FLOAT),
        ("fma.rn.bf16x2", FLOAT),
        ("ex2.approx.ftz.f32", SPECIAL),
        ("div.full.f32", SPECIAL),
        ("div.s32", INTEGER),
        ("mov.b32", OTHER),
        ("bra.uni", OTHER),
    ],
)
def test_kind_of_every_group_of_instructions(opcode: str, kind: str) -> None:
    assert instruction_kind(opcode) == kind


@pytest.mark.parametrize(
    "opcode, flops",
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", 4096),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", 2048),
        ("wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16", 131072),  # a quarter of 2 · 64 · 256 · 16
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 0),
        ("fma.rn.f32", 0),
    ],
)
def test_flops_follow_from_the_shape(opcode: str, flops: int) -> None:
    assert flops_per_warp(opcode) == flops


def test_source_line_is_the_innermost_outside_of_triton() -> None:
    library = f"{Path(triton.__file__).parent}/language/standard.py:43"
    assert source_line("/kernels/mine.py:69") == "mine.py:69"
    assert source_line(library, "/kernels/_inner.py:12", "/kernels/mine.py:7") == "_inner.py:12"
    assert source_line(library) == "standard.py:43"
    assert source_line("standard.py:43", "mine.py:7") == "standard.py:43"


@pytest.mark.parametrize(
    "opcode, short",
    [
        ("ld.global.L1::evict_first.L2::cache_hint.v4.b32", "ld.global.v4.b32"),
        ("cp.async.cg.shared.global.L2::128B", "cp.async"),
        ("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "ldmatrix.x4.trans.shared.b16"),
        ("atom.global.gpu.acq_rel.add.u32", "atom.global.add.u32"),
    ],
)
def test_opcodes_are_shown_without_hints(opcode: str, short: str) -> None:
    assert memory_opcode(opcode) == short


def executed(opcode: str, source: str, issued: int = 1, **counts: int) -> ExecutedInstruction:
    """An instruction with these counts, and no others."""
    zero = dict.fromkeys(("requests", "sectors", "fewest_sectors", "accesses", "wavefronts", "flops"), 0)
    return ExecutedInstruction(opcode, instruction_kind(opcode), source, issued, **zero | counts)


LOAD = executed("ld.global.b16", "a.py:3", issued=8, requests=8, sectors=64, fewest_sectors=16)
STORE = executed("st.global.v4.b32", "a.py:9", issued=2, requests=2, sectors=32, fewest_sectors=32)
READ = executed("ld.shared.b32", "a.py:9", issued=4, accesses=4, wavefronts=6)


def test_traffic_of_a_launch_is_the_sum_of_its_instructions() -> None:
    total = memory_traffic([LOAD, STORE, READ])
    assert (total.requests, total.sectors, total.fewest_sectors) == (10, 96, 48)
    assert (total.read_bytes, total.written_bytes) == (64 * 32, 32 * 32)
    assert (total.sector_ratio, total.wavefront_ratio) == (2.0, 1.5)
    assert memory_traffic([]).sector_ratio == memory_traffic([]).wavefront_ratio == 1.0


def test_accesses_of_one_line_and_opcode_are_one() -> None:
    found = list(memory_accesses([LOAD, STORE, LOAD, executed("mov.b32", "a.py:3", issued=5)]))
    assert [(source, opcode, x.requests) for source, opcode, x in found] == [
        ("a.py:3", "ld.global.b16", 16),
        ("a.py:9", "st.global.v4.b32", 2),
    ]
    lines = instructions_by_line([STORE, LOAD, READ])
    assert list(lines.items()) == [("a.py:3", {GLOBAL: 8}), ("a.py:9", {SHARED: 4, GLOBAL: 2})]


def row(**changes: Any) -> dict[str, Any]:
    """A row of `bench.emulate` about a kernel of one load, one store and one read of shared memory."""
    memory = [
        {"source": source, "opcode": opcode} | {name: getattr(x, name) for name in ("requests", "sectors", "accesses")}
        | {"fewest_sectors": x.fewest_sectors, "wavefronts": x.wavefronts}
        for source, opcode, x in memory_accesses([LOAD, STORE, READ])
    ]  # fmt: skip
    head = {"op": "linear", "impl": "mine", "number": 0, "config": {"BLOCK": 64, "num_warps": 4}, "target": "sm_90"}
    head |= {"kernel": "_mine", "grid": [2, 1, 1], "shared": 64, "sizes": {"m": 1}, "source": "", "unit": "weight"}
    head |= {"units": 64, "instructions": 14, "kinds": {GLOBAL: 10, SHARED: 4}, "lines": {}, "op_flops": 2048}
    head |= {"requests": 10, "sectors": 96, "fewest_sectors": 48, "accesses": 4, "wavefronts": 6, "op_bytes": 1024}
    return head | {"read_bytes": 2048, "written_bytes": 1024, "tensor_flops": 4096, "memory": memory} | changes


def call(*rows: dict[str, Any], refusal: str = "", is_error: bool = False) -> EmulatedCall:
    return EmulatedCall(CompileRequest("linear", "mine", 0, "sm_90", {"m": 1}), "", list(rows), refusal, is_error)


def test_a_call_stands_beside_what_its_op_needs() -> None:
    (line,) = total_lines([call(row(), row(tensor_flops=0))])
    assert "moves 6.14 kB, 6.00 of the 1.02 kB that must move" in line
    assert "tensor cores do 2.00 of the op's 2.05e+03 FLOPs" in line


def test_more_than_1_15_of_the_fewest_sectors_and_1_1_wavefronts_are_marked() -> None:
    marks = [line[0] for line in access_table([call(row())])][2:]
    assert marks == ["!", " ", "!"]
    just_right = {"requests": 1, "sectors": 115, "fewest_sectors": 100, "accesses": 100, "wavefronts": 110}
    assert not is_marked(just_right)
    assert is_marked(just_right | {"sectors": 116}) and is_marked(just_right | {"wavefronts": 111})
    assert is_marked(just_right | {"fewest_sectors": 0}) and not is_marked(dict.fromkeys(just_right, 0))


def test_table_has_each_kernel_and_each_marked_access() -> None:
    clean = row(memory=[row()["memory"][1]])
    text = "\n".join(counters_table([call(row()), call(clean), call(refusal="no room", is_error=True)], STAMP))
    assert "2 kernels of 2 calls, 1 with a marked access." in text
    assert "| `_mine` | 7 a weight | **9.60 of 4.80** | **1.50** | 3.00 | 2.00 |" in text
    assert "| `_mine` | 7 a weight | 9.60 of 4.80 | 1.50 | 3.00 | 2.00 |" in text
    assert "| `ld.global.b16` | 8.00 of 2.00 | - |" in text and "| `ld.shared.b32` | - | 1.50 |" in text
    assert "st.global" not in text and "- 1 of linear mine: no room" in text


def test_comparison_names_what_changed() -> None:
    lines = list(compare_calls([call(row())], [call(row(instructions=28, kinds={GLOBAL: 24, SHARED: 4}))], "HEAD"))
    assert "linear mine 0 sm_90, compared with HEAD" in lines[0]
    assert [line.split()[-4:] for line in lines[1:]] == [
        ["->", "28", "x", "2.00"],
        ["->", "14.0", "x", "2.00"],
        ["->", "24", "x", "2.40"],
    ]
    assert list(compare_calls([call(row())], [call(row())], "HEAD"))[1:] == ["  _mine: no difference"]
    assert "  kernels launched: 1 -> 0" in list(compare_calls([call(row())], [call(refusal="no")], "HEAD"))


def test_every_triton_implementation_has_sizes_and_is_in_the_table() -> None:
    discover()
    assert emulate_config().keys() <= OPS.keys()
    requests = emulate.table_requests(list(OPS), ["sm_80", "sm_90"])
    named = {(x.op, x.impl, x.config, x.target) for x in requests}
    assert named == {
        (op.name, impl.name, number, target)
        for op in OPS.values()
        for impl in filter(uses_triton_kernels, op.impls.values())
        for number in range(len(impl.configs))
        for target in ("sm_80", "sm_90")
        if impl.suits(number, target)
    }
    assert all(x.sizes.keys() == OPS[x.op].domain.keys() for x in requests)
    assert {x["m"] for x in emulated_sizes(OPS["int4_matmul"], "prefill", {"BLOCK_M": 256})} == {256}


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "name an OP, or a --table to write"),
        (["linear", "--table", "t.md", "--case", "toy"], "--table takes OP, --target, --json"),
        (["linear", "--target", "sm_70"], "invalid choice: 'sm_70'"),
    ],
)
def test_command_line_that_asks_for_nothing_sensible(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        emulate.parse_arguments(words)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["layer_norm"], "layer_norm has no Triton kernel"),
        (["linear", "--impl", "mine"], "linear has no implementation 'mine'"),
        (["linear", "--impl", "aten"], "linear aten has no Triton kernel"),
        (["linear", "--config", "99"], "linear triton has no config 99"),
        (["linear", "--against", "nobody"], "linear has no such implementation, nor is it a commit"),
    ],
)
def test_refusal_names_what_there_is_not(words: list[str], said: str) -> None:
    discover()
    with pytest.raises(ValueError, match=said):
        emulate.run(emulate.parse_arguments(words))
