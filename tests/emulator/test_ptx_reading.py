"""PTX text is read into blocks of instructions: names, scopes, labels, lines of source, what is refused."""

import pytest

from bench.emulator.program.ptx import END, Address, Immediate, Register, Symbol, UnknownPTX, Vector, parse
from bench.emulator.program.translate import translate

KERNEL = """
.version 8.7
.target sm_90a
.address_size 64
.shared .align 4 .b8 first[6];
.shared .align 8 .b8 second[8];
.extern .shared .align 16 .b8 global_smem[];
.global .align 1 .b8 text[3] = {{65, 66, 0}};
.visible .entry k(
    .param .u64 .ptr .global .align 1 k_param_0,
    .param .u32 k_param_1
)
.reqntid 128, 1, 1
{{
    .reg .pred %p<3>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
    .loc 1 12 7 // kernel.py:12:7
{body}
    ret;
}}
    .file 1 "/folder/kernel.py"
    .file 2 "/triton/standard.py"
"""


def kernel(body: str = ""):
    return parse(KERNEL.format(body=body))


def test_a_kernel_has_its_name_parameters_threads_and_shared_variables() -> None:
    k = kernel()
    assert (k.name, k.threads) == ("k", 128)
    assert k.params == [("k_param_0", "u64"), ("k_param_1", "u32")]
    assert k.shared_symbols == {"first": 0, "second": 8, "global_smem": 16}


def test_operands() -> None:
    k = kernel("@!%p1 ld.shared.v2.b32 {%r1, _}, [%r2 + -8]; add.f32 %r3, %r3, 0f3F800000; mov.b32 %r4, global_smem;")
    load, add, move = k.blocks[0].instructions[:3]
    assert load.guard == Register("p1_", 1, negated=True)
    assert (load.opcode, load.modifiers) == ("ld", ("shared", "v2", "b32"))
    to, source = load.operands
    assert isinstance(to, Vector) and to.items[0] == Register("r1_", 32)
    assert source == Address(Register("r2_", 32), -8)
    assert load.statement.startswith("ld.shared")
    assert isinstance(add.operands[2], Immediate) and add.operands[2].value == 0x3F800000
    assert move.operands[1] == Symbol("global_smem")


@pytest.mark.parametrize(
    ("text", "value"),
    [("5", 5), ("-1", -1), ("0x1F", 31), ("0b101", 5), ("017", 15), ("12U", 12), ("0d3FF0000000000000", 0x3FF << 52)],
)
def test_numbers(text: str, value: int) -> None:
    assert Immediate(text).value == value


def test_blocks_end_at_branches_and_begin_at_labels() -> None:
    k = kernel("setp.eq.b32 %p1, %r1, 0; @%p1 bra LATER; mov.b32 %r2, 1; LATER: @%p2 ret; bra LATER;")
    assert [[i.opcode for i in block.instructions] for block in k.blocks] == [
        ["setp", "bra"],
        ["mov"],
        ["ret"],
        ["bra"],
        ["ret"],
        [],
    ]
    assert [block.target for block in k.blocks] == [2, None, END, 2, END, END]
    assert [block.successors() for block in k.blocks[:4]] == [[1, 2], [2], [3], [2]]


def test_inline_assembly_has_its_own_registers_and_labels() -> None:
    body = "{ .reg .b32 t; mov.b32 t, 1; WAIT: @%p1 bra WAIT; mov.b32 %r1, t; }"
    k = kernel(f"{body}\n{body}\n{{ .reg .b32 t, q<2>; mov.b32 q1, t; }}")
    names = [name for name in k.registers if name[0] in "tq"]
    assert len(names) == len(set(names)) == 5
    loops = [block for block in k.blocks if block.condition]
    assert [block.target for block in loops] == [block.index for block in loops]


def test_lines_of_source_and_of_the_calls_around_them() -> None:
    text = ".loc 2 43 17 // standard.py:43:17 @[ kernel.py:73:26 @[ kernel.py:80:1 ] ]\nmov.b32 %r1, 1;"
    first, second = kernel(f"mov.b32 %r2, 2;\n{text}").blocks[0].instructions[:2]
    assert (first.source, first.callers) == ("/folder/kernel.py:12", ())
    assert second.source == "/triton/standard.py:43"
    assert second.callers == ("/folder/kernel.py:73", "/folder/kernel.py:80")


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("tcgen05.wait::st.sync.aligned;", "tcgen05.wait"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1;", "mbarrier.init"),
        ("call.uni (retval0), __assertfail, (param0);", "__assertfail"),
        ("bar.sync 1, 64;", "bar.sync 1, 64"),
        ("atom.add.u32 %r1, [%rd1], 1;", "atom.add"),
        ("ld.shared::cluster.b32 %r1, [%r2];", "cluster"),
        ("mov.u32 %r1, %pm0;", "%pm0"),
        ("add.sat.u32x2 %r1, %r1, %r2;", "add.sat"),
        ("cp.async.bulk.commit_group;", "cp.async.bulk"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%rd1,%rd2}, {%rd3}, {%rd4}, {%rd5,%rd6};", "m8n8k4"),
        (".surfref s;", ".surfref"),
    ],
)
def test_what_is_not_emulated_is_named_with_its_kernel_and_line(code: str, named: str) -> None:
    with pytest.raises(UnknownPTX) as error:
        translate(kernel(code))
    message = str(error.value)
    assert named in message and "not emulated" in message
    assert "(k, /folder/kernel.py:12)" in message
