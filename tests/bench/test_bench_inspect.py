"""`bench.inspect`: its figures against what `cuobjdump` says, its loops on assembly written by hand, its diffs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from mutants import exchange, renamed

from bench import inspect
from bench.compiler.cross_compile import CompileRequest
from bench.compiler.disassembly import (
    FLOAT,
    GLOBAL,
    OTHER,
    SHARED,
    TENSOR,
    main_loops,
    natural_loops,
    parse_amdgcn,
    parse_sass,
)
from bench.compiler.gpus import TARGETS, occupancy
from bench.compiler.inspect_plot import plot_main_loops
from bench.compiler.kernel_stats import KernelStats, LoopStats, to_row
from bench.inspect import parse_arguments, run
from bench.measure import rows
from bench.measure.format import format_config
from vila_triton.registry import OPS, discover

ROOT = Path(__file__).resolve().parents[2]
KERNELS = shutil.ignore_patterns("__pycache__")
NESTED = """
.text._kernel:
        //## File "/k/mine.py", line 10
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        //## File "/k/mine.py", line 11
        /*0010*/                   FADD R1, R1, R2 ;
.L_x_1:
        //## File "/k/mine.py", line 12
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P0 LDGSTS.E.BYPASS.64 [R5], desc[UR4][R2.64] ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*0060*/              @!P1 BRA `(.L_x_3) ;
.L_x_2:
        //## File "/k/mine.py", line 13
        /*0070*/                   HGMMA.64x32x16.F32 R8, gdesc[UR8], RZ, !UPT ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
        /*0090*/                   HMMA.16816.F32 R4, R8, R2, R4 ;
        /*00a0*/               @P3 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*00d0*/              @!P1 BRA `(.L_x_3) ;
        /*00e0*/                   BRA `(.L_x_2) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
"""
GCN = """
	.file	1 "/k" "mine.py"
	.loc	1 7 3                           ; mine.py:7:3
	s_mov_b32 s0, 0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	global_load_dwordx4 v[0:3], v4, s[0:1]
	buffer_load_ushort v9, v1, s[0:3], 0 offen
	ds_read_b128 v[0:3], v1
	v_mfma_f32_16x16x16_f16 a[0:3], v[0:1], v[2:3], a[0:3]
	v_pk_mul_f16 v0, v1, v2
	s_cbranch_scc1 .LBB0_1
	s_endpgm
	.section	.rodata
"""


def python(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, told as here that kernels are interpreted, which the tools must not mind."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)


def test_main_loop_is_the_innermost_with_tensor_cores_and_contains_its_slow_path() -> None:
    code = parse_sass(NESTED)
    assert [code[loop.indices[0]].label for loop in natural_loops(code)] == [
        ".L_x_0",
        ".L_x_1",
        ".L_x_3",
    ]  # a way back is none
    (loop,) = main_loops(code)
    assert [code[i].opcode for i in loop.indices] == [
        *("LDG.E.128", "LDGSTS.E.BYPASS.64", "LDS", "HMMA.16816.F32", "BRA", "HGMMA.64x32x16.F32", "BRA"),
        *("SYNCS.PHASECHK.TRANS64.TRYWAIT", "BRA", "BRA"),  # waits out of line, and comes back
    ]
    body = [code[i] for i in loop.indices]
    assert [x.bytes_per_thread for x in body if x.is_load] == [16, 8]
    assert [x.base_opcode for x in body if x.kind == GLOBAL] == ["LDG.128", "LDGSTS.64"]
    assert [x.kind for x in body[2:4]] == [OTHER, TENSOR]  # a load under a predicate that is never true moves nothing
    assert [x.line for x in body[:6]] == [12, 12, 12, 12, 12, 13]


def test_main_loop_without_tensor_cores_is_by_arithmetic_and_without_loops_the_kernel() -> None:
    code = parse_sass(re.sub("HG?MMA", "NOP", NESTED).replace("LDG.E.128", "FFMA"))
    assert code[main_loops(code)[0].indices[0]].opcode == "FFMA"
    straight = parse_sass("/*0000*/  FADD R1, R1, R2 ;\n/*0010*/  EXIT ;\n")
    assert [(len(x.indices), x.is_whole_kernel) for x in main_loops(straight)] == [(2, True)]


def test_amdgcn_loops_kinds_and_widths() -> None:
    code = parse_amdgcn(GCN)
    (loop,) = main_loops(code)
    body = [code[i] for i in loop.indices]
    assert [x.kind for x in body] == [GLOBAL, GLOBAL, SHARED, TENSOR, FLOAT, OTHER]
    assert [x.bytes_per_thread for x in body if x.is_load] == [16, 2] and {(x.file, x.line) for x in body} == {
        ("/k/mine.py", 7)
    }


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks", "limit"),
    [  # by hand, from the programming guide's table
        ("sm_90", 128, 0, 4, 4, "registers"),  # 128 · 32 = 4096 a warp, 16384 a partition: 4 warps in each of 4
        ("sm_90", 72, 16384, 4, 7, "registers"),  # 2304 a warp: 7 in each partition, 28 in all
        ("sm_80", 32, 41 * 1024, 4, 3, "shared memory"),  # 164 / (41 + 1)
        ("sm_89", 16, 0, 4, 12, "warps"),  # 48 / 4
        ("sm_89", 16, 0, 1, 24, "blocks"),
        ("gfx942", 128, 0, 4, 4, "registers"),  # 512 / 128 waves in each of 4
    ],
)
def test_occupancy_is_that_of_the_limiting_resource(
    target: str, registers: int, shared: int, warps: int, blocks: int, limit: str
) -> None:
    held = occupancy(TARGETS[target], registers, shared, warps)
    assert (held.blocks, held.warps, held.limit) == (blocks, blocks * warps, limit)
    assert held.share == blocks * warps / TARGETS[target].warps_per_sm


def test_kernel_stats_equal_the_counts_of_cuobjdump(tmp_path: Path) -> None:
    code = f"""
        import json
        from dataclasses import asdict
        from pathlib import Path
        from bench.compiler.kernel_stats import analyze_kernel
        from bench.compiler.cross_compile import CompileRequest, compile_request, load_implementations
        from triton import knobs
        load_implementations(None, False)
        sizes = dict(m=32, n=64, G=2, group=128, dtype="float16", order="sub", bias=False)
        cubin = Path({str(tmp_path / "cubin")!r})
        look = lambda k: (cubin.write_bytes(k.asm["cubin"]), asdict(analyze_kernel(k).stats))[1]
        print(json.dumps(compile_request(look, CompileRequest("int4_matmul", "packed", 0, "sm_90", sizes)).kernels))
        print(knobs.nvidia.cuobjdump.path)
    """
    file = tmp_path / "dissect.py"
    file.write_text("import os; del os.environ['TRITON_INTERPRET']\n" + "\n".join(x[8:] for x in code.splitlines()))
    done = python(str(file))
    assert done.returncode == 0, done.stderr
    line, tool = done.stdout.splitlines()
    (found,) = json.loads(line)
    text = {
        flag: subprocess.run([tool, flag, str(tmp_path / "cubin")], capture_output=True, text=True, check=True).stdout
        for flag in ("-sass", "-res-usage")
    }
    assert f"REG:{found['registers']} " in text["-res-usage"] and "STACK:0 " in text["-res-usage"]
    assert found["spills"] == 0 and found["threads"] == 128

    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?([A-Z]\S+)([^;]*);", text["-sass"])
    at = {int(address, 16): (opcode, rest) for address, opcode, rest in lines}
    (back,) = [
        (int(rest.strip(), 16), address)
        for address, (opcode, rest) in at.items()
        if opcode == "BRA" and int(rest.strip(), 16) < address
    ]
    loop = [opcode for address, (opcode, _) in at.items() if back[0] <= address <= back[1]]
    main = found["loops"][0]
    assert len(loop) == main["instructions"] > 100
    assert main["tensor"] == {"HGMMA.64x16x16.F32": sum(x.startswith("HGMMA.64x16x16.F32") for x in loop)}
    assert main["loads"]["LDGSTS.128"] == sum(x.startswith("LDGSTS") and x.endswith("128") for x in loop)
    assert main["mix"]["convert and bits"] == sum(bool(re.match("I2F|F2F|U?(PRMT|LOP3|SHF|SGXT)", x)) for x in loop)
    assert (main["turns"], main["weights"]) == (1, 64 * 64)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with kernels/ committed as they are here."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=KERNELS)
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "kernels"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    return tmp_path


def test_kernel_file_missing_in_the_commit_is_one_sentence(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    discover()
    monkeypatch.setattr(rows, "ROOT", repository)
    impls = {name: OPS["swiglu"].impls[name] for name in ("triton", "aten")}
    new = replace(impls["triton"], name="mine", file=repository / "kernels" / "swiglu_mine.py")
    monkeypatch.setattr(OPS["swiglu"], "impls", {**impls, "mine": new})
    folder = inspect.extract_kernels("HEAD", repository / "head")
    calls = [CompileRequest("swiglu", name, 0, "sm_90", {}) for name in ("triton", "mine")]
    assert inspect.requests_in_commit(calls, folder, "HEAD") == calls[:1]
    said = "HEAD has no file of mine (swiglu_mine.py), so there is nothing to compare with"
    assert capsys.readouterr().out == f"{said}\n"
    with pytest.raises(ValueError, match=re.escape(said)):
        inspect.requests_in_commit(calls[1:], folder, "HEAD")


@pytest.mark.parametrize(
    ("sizes", "scores"),
    [
        ({"ratio": 1}, 64),  # of decode: one row of sixteen is a query
        ({"ratio": 16}, 16 * 64),
        ({"s": 10, "ratio": 2}, 10 * 64),  # two tiles, of which the second holds four
        ({"s": 512, "ratio": 4}, 16 * 64),
    ],
)
def test_scores_do_not_count_padded_rows(sizes: dict, scores: float) -> None:
    loop = LoopStats("", False, 320, {}, {}, {}, {}, {}, {}, None, turns=2, weights=None, scores=2 * 16 * 64)
    found = KernelStats("k", {"BLOCK_N": 64}, 128, 1, 0, 0, 1, 1, 1.0, "", 1, [loop])
    assert to_row(found, "score", inspect.query_rows_per_key(sizes))["per_unit"] == pytest.approx(
        320 * 128 / (2 * scores)
    )


def test_format_config_orders_blocks_m_n_k() -> None:
    config = {"num_stages": 3, "BLOCK_K": 128, "BLOCK_M": 16, "SPLIT_K": 4, "BLOCK_N": 64, "num_warps": 4}
    assert format_config(config) == format_config(dict(sorted(config.items()))) == "16x64x128 w4 s3 SPLIT_K=4"
    assert format_config({"BLOCK_G": 8, "num_warps": 2}) == "8 w2"


@pytest.mark.slow
def test_planted_spill_shows_against_the_last_commit(repository: Path) -> None:
    file = repository / "kernels" / "int4_matmul_packed.py"
    config = '{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}'
    planted = config.replace('warps": 4', 'warps": 1').replace('"BLOCK_N": 64', '"BLOCK_N": 128')
    file.write_text(exchange(config, planted)(file.read_text()))
    tool = repository / "tool.py"  # the repository of the test in place of this one
    imports = "import sys\nfrom pathlib import Path\nfrom bench import inspect\nfrom bench.measure import rows\n"
    body = "if __name__ == '__main__':\n    rows.ROOT = Path.cwd()\n    sys.exit(inspect.main())\n"
    tool.write_text(imports + body)
    words = "int4_matmul --impl packed --config 1 --arch sm_90 --against HEAD --json found.jsonl"
    done = python(str(tool), *words.split(), "--replace-kernels", "kernels", cwd=repository)
    assert done.returncode == 0, done.stderr
    diff = done.stdout.partition("compared with HEAD:")[2]
    assert re.search(r"config num_warps +4 -> 1\n", diff)
    assert re.search(r"\n +spills +0 -> [1-9]\d+\n", diff) and re.search(r"loop spill +0 -> [1-9]\d*\n", diff)
    assert "num_stages" not in diff
    old, new = rows.read(repository / "found.jsonl", kind="inspect")
    assert (old["source"], new["source"]) == ("HEAD", "") and old["spills"] == 0 < new["spills"]
    assert [p.suffix for p in plot_main_loops([old, new], repository / "picture")] == [".png", ".svg"]
    svg = (repository / "picture.svg").read_text()
    assert f"spills {new['spills']}" in svg and "HEAD: packed 1" in svg


@pytest.mark.slow
def test_copied_kernel_file_appears_and_equals_the_original(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=KERNELS)
    text = (tmp_path / "kernels" / "swiglu.py").read_text()
    mine = exchange("tl.exp(-gate)", "tl.exp(-gate) + tl.exp(-up)")(renamed(text, "triton", "mine"))
    (tmp_path / "kernels" / "swiglu_mine.py").write_text(mine)
    words = "-m bench.inspect swiglu --config 0 --arch gfx942 --against triton"
    done = python(*words.split(), "--replace-kernels", str(tmp_path / "kernels"))
    assert done.returncode == 0, done.stderr
    assert "swiglu mine 0 gfx942, compared with triton:" in done.stdout
    own, copy = (done.stdout.partition(f"swiglu {name} 0 gfx942, compared")[2] for name in ("triton", "mine"))
    assert own.splitlines()[1].strip() == "no difference" and "loop special function" in copy.partition("\n\n")[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("nonsense", "no op 'nonsense'; there are: .*int4_matmul"),
        ("swiglu --case nonsense", "swiglu has no case 'nonsense'; there are: model, toy"),
        ("swiglu --impl nonsense", "swiglu has no implementation 'nonsense'; there are: .*triton"),
        ("swiglu --against nonsense", "no implementation 'nonsense', nor is it a commit; there are: .*triton"),
        ("swiglu --size q=3", "--size q=3: expected NAME=VALUE, a name among s, f, dtype"),
        ("swiglu --size s=many", "--size s=many: expected NAME=VALUE"),
        ("swiglu --config 7", "swiglu triton has no config 7; it has 2, from 0"),
        ("layer_norm", "layer_norm has no Triton kernel; its implementations: reference"),
    ],
)
def test_inspect_bad_arguments_are_one_line(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(parse_arguments(words.split()))
