"""Kernels in files of one's own, in folders of them, and in installed distributions."""

import inspect
import json
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from test_discovery import KERNEL, OP

from bench import check
from bench.tuner.workers import Process
from vila_triton import kernels, ops
from vila_triton.commands.ops import print_ops
from vila_triton.registry import OPS, discover, imports, problems, sources, tuned_tables, use
from vila_triton.registry.kernel_config import read_kernels_toml

Put = Callable[..., Path]
X, WEIGHT = torch.ones(2, 8), torch.ones(8)


def kernel(name: str = "mine", result: str = "x") -> str:
    """The text of a file with an implementation of rms_norm."""
    return f"""
        from vila_triton.ops import rms_norm


        @rms_norm.impl("{name}")
        def rms_norm_{name}(x, weight, eps):
            return {result}
    """


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Put]:
    """put("a/mine.py", text): a file below a temporary folder, which is the current one. What it registers and what was
    found out about it is forgotten after the test.
    """
    discover()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_paths", {})
    monkeypatch.setattr(imports, "_problems", {})
    monkeypatch.setattr(imports, "_imported", set(imports._imported))
    there, modules = {name: dict(op.impls) for name, op in OPS.items()}, set(sys.modules)

    def write(name: str, text: str = "") -> Path:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(dedent(text).lstrip())
        return tmp_path / name

    yield write
    for name in set(sys.modules) - modules:
        if name.startswith("kernels_at_") or name.split(".")[0].startswith("others_"):
            del sys.modules[name]
    sources.installed_kernels.cache_clear()
    for name in OPS.keys() - there:
        del OPS[name]
    for name, impls in there.items():
        OPS[name].impls.clear()
        OPS[name].impls.update(impls)


def ran(name: str) -> torch.Tensor:
    with use(rms_norm=name):
        return ops.rms_norm(X, WEIGHT, 1e-5)


def test_a_file_and_a_folder_are_discovered(put: Put) -> None:
    put("one.py", kernel("one"))
    put("many/two.py", kernel("two", "x + _shift()") + "\n        from ._shared import shift as _shift\n")
    put("many/_shared.py", "def shift():\n    return 1\n")
    modules = discover("one.py", Path("many"))
    assert [m.rpartition(".")[2] for m in modules[-3:]] == ["one", "_shared", "two"]
    assert ran("one") is X and torch.equal(ran("two"), X + 1)
    assert sources.kernel_paths() == [str(Path("one.py").resolve()), str(Path("many").resolve())]
    assert discover() == modules  # they stay discovered


def test_files_of_one_name_are_two_modules_that_pickle_and_show_their_source(put: Put) -> None:
    for folder in "ab":
        put(f"{folder}/mine.py", kernel(folder))
    discover("a/mine.py", "b")
    first, second = (OPS["rms_norm"].impls[name].fn for name in "ab")
    assert first.__module__ != second.__module__
    for fn, name in ((first, "a"), (second, "b")):
        assert pickle.loads(pickle.dumps(fn)) is fn and f'impl("{name}")' in inspect.getsource(fn)
    pickled = pickle.dumps(first)
    for name in [name for name in sys.modules if name.startswith("kernels_at_")]:
        del sys.modules[name]
    discover("a/mine.py")  # as in another process
    assert pickle.loads(pickled) is OPS["rms_norm"].impls["a"].fn is not first


def test_a_copy_of_one_of_our_files_runs_as_it_is(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = kernels.__path__
    text = (Path(folder) / "rms_norm.py").read_text()
    assert "from ._launch import" in text and 'impl("triton"' in text
    put("mine.py", text.replace('impl("triton"', 'impl("mine"'))
    words = ["--config", "0", "--examples", "2"]
    assert check.main(["rms_norm", "--impl", "mine", "--kernels", "mine.py", *words]) == 0
    assert "1 right, 0 wrong" in capsys.readouterr().out
    launch = sys.modules[OPS["rms_norm"].impls["mine"].fn.__module__.rpartition(".")[0] + "._launch"]
    assert launch is sys.modules["vila_triton.kernels._launch"]  # once in memory
    put("wrong.py", text.replace('impl("triton"', 'impl("wrong"').replace("x * rstd * weight", "x * rstd"))
    assert check.main(["rms_norm", "--impl", "wrong", "--kernels", "wrong.py", *words]) == 1


def test_helpers_beside_a_file_come_before_ours(put: Put) -> None:
    put("_launch.py", "shift = 7\n")
    put("mine.py", kernel("mine", "x + shift") + "\n        from ._launch import shift\n")
    discover("mine.py")
    assert torch.equal(ran("mine"), X + 7)


def test_a_new_op_in_a_file_of_ones_own(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    put("cut_in_two.py", OP)
    put("kernel.py", KERNEL)
    words = "cut_in_two --impl mine --examples 2 --kernels cut_in_two.py --kernels kernel.py"
    assert check.main(words.split()) == 0
    assert ops.cut_in_two is OPS["cut_in_two"]  # pyright: ignore[reportAttributeAccessIssue]
    print_ops(torch.device("cpu"), {})
    said = capsys.readouterr()
    files = [line.split()[-1] for line in said.out.splitlines() if line.startswith("cut_in_two  ")]
    assert files == ["cut_in_two.py", "kernel.py"] and not said.err


def test_a_part_that_such_an_op_lacks_is_reported(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    put("cut_in_two.py", dedent(OP).replace("@cut_in_two.requires\n", ""))
    discover("cut_in_two.py")
    assert capsys.readouterr().err == "vila-triton: cut_in_two.py: op 'cut_in_two' lacks requires\n"


def test_an_init_file_is_run_first(put: Put) -> None:
    put("many/__init__.py", "SHIFT = 3\n")
    put("many/mine.py", kernel("mine", "x + SHIFT") + "\n        from . import SHIFT\n")
    discover("many")
    assert torch.equal(ran("mine"), X + 3)
    put("bad/__init__.py", "1 / 0\n")
    put("bad/other.py", kernel("other"))
    with pytest.raises(RuntimeError, match=r"bad/__init__\.py, line 1: ZeroDivisionError"):
        discover("bad")


@pytest.mark.parametrize(
    "path, error, message",
    [
        ("none.py", FileNotFoundError, "kernels none.py: no such file or folder, expected a .py file"),
        ("empty", ValueError, "kernels empty: there is no .py file in this folder"),
        ("notes.txt", ValueError, "kernels notes.txt: expected a file NAME.py"),
        ("my.kernel.py", ValueError, "kernels my.kernel.py: expected a file NAME.py, without another dot"),
        ("syntax.py", RuntimeError, "syntax.py, line 1: SyntaxError: "),
        ("half.py", RuntimeError, "half.py, line 8: ZeroDivisionError: division by zero"),
        ("script.py", RuntimeError, "script.py, line 2: SystemExit: 3"),
        ("taken.py", RuntimeError, r"taken.py, line 4: ValueError: .*'triton' of .* is already taken by .*rms_norm.py"),
        ("op_taken.py", RuntimeError, r"line 4: ValueError: op 'rope' of .* is already taken by .*elementwise.py"),
    ],
)
def test_what_is_wrong_with_a_path_is_one_error(
    put: Put, path: str, error: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put("good.py", kernel("good"))
    put("empty/notes.txt")
    put("notes.txt")
    put("my.kernel.py", kernel("mine"))
    put("syntax.py", "x = = 1\n")
    put("half.py", kernel("half") + "\n        1 / 0\n")
    put("script.py", "import sys\nsys.exit(3)\n")
    put("taken.py", kernel("triton"))
    put("op_taken.py", "from vila_triton.registry import op\n\n\n@op\ndef rope(x):\n    return x\n")
    before = {name: set(op.impls) for name, op in OPS.items()}
    with pytest.raises(error, match=message):
        discover(path)
    with pytest.raises(error, match=message):
        discover("good.py", path)
    assert {name: set(op.impls) - {"good"} for name, op in OPS.items()} == before
    assert ("good" in OPS["rms_norm"].impls) == (error is RuntimeError)  # else nothing was imported
    assert str(Path(path).resolve()) not in sources.kernel_paths()
    assert check.main(["rms_norm", "--impl", "reference", "--kernels", path]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("bench.check: ")
    discover()  # nothing is left of it


def test_a_broken_file_of_a_folder_is_left_aside_until_mended(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    put("many/good.py", kernel("good"))
    put("many/bad.py", kernel("bad") + "\n        1 / 0\n")
    discover("many")
    wrong = "left aside: many/bad.py, line 8: ZeroDivisionError: division by zero"
    assert capsys.readouterr().err == f"vila-triton: {wrong}\n" and problems() == [wrong]
    assert ran("good") is X
    with pytest.raises(KeyError, match=f"no implementation 'bad'; there are: .*{wrong}"):
        ran("bad")
    put("many/bad.py", kernel("bad"))
    assert ran("bad") is X and not problems()


def test_a_kernel_that_is_already_taken_by_another_path_is_named(put: Put) -> None:
    put("a.py", kernel("mine"))
    put("b.py", kernel("mine", "x + 1"))
    with pytest.raises(RuntimeError, match=r"'mine' of .*/b\.py is already taken by .*/a\.py"):
        discover("a.py", "b.py")
    assert ran("mine") is X


def distribution(folder: Path, value: str, name: str = "others-kernels") -> None:
    """Metadata of a distribution with an entry point, as pip writes it."""
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[vila_triton.kernels]\nfast = {value}\n")
    sources.installed_kernels.cache_clear()


def test_an_installed_package_and_a_module_are_discovered(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    put("others_package/__init__.py", "SHIFT = 2\n")
    put("others_package/mine.py", kernel("packaged", "x + SHIFT") + "\n        from . import SHIFT\n")
    put("others_module.py", kernel("single"))
    distribution(Path.cwd(), "others_package")
    distribution(Path.cwd(), "others_module", "others-single")
    monkeypatch.syspath_prepend(Path.cwd())
    assert {"others_package.mine", "others_module"} <= set(discover())
    assert torch.equal(ran("packaged"), X + 2) and ran("single") is X
    source = sources.source_of(OPS["rms_norm"].impls["packaged"])
    assert source == {"distribution": "others-kernels 1.2", "file": "others_package/mine.py"}


@pytest.mark.parametrize(
    "value, wrong",
    [
        ("others_none", "ModuleNotFoundError: No module named 'others_none'"),
        ("others_bad", "others_bad.py, line 1: ZeroDivisionError: division by zero"),
        ("others_bad:main", "ValueError: expected a module or a package, without a name in it"),
    ],
)
def test_what_is_wrong_with_a_distribution_is_reported_with_its_name(
    put: Put, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, wrong: str
) -> None:
    put("others_bad.py", "1 / 0\n")
    distribution(Path.cwd(), value)
    monkeypatch.syspath_prepend(Path.cwd())
    discover()
    discover()
    said = capsys.readouterr().err
    assert said.startswith(f"vila-triton: left aside: others-kernels 1.2, fast = {value}: ") and said.count("\n") == 1
    assert said.endswith(f"{wrong}\n")
    assert "triton" in OPS["rms_norm"].impls


def test_sources_say_what_to_pass(put: Put) -> None:
    put("mine.py", kernel("mine"))
    put("many/other.py", kernel("other"))
    discover("mine.py", Path.cwd() / "many")
    impls = OPS["rms_norm"].impls
    assert sources.source_of(impls["mine"]) == {"distribution": "", "file": "mine.py"}
    assert sources.source_of(impls["other"]) == {"distribution": "", "file": str(Path.cwd() / "many" / "other.py")}
    ours = sources.source_of(impls["triton"])
    assert ours == {"distribution": "vila-triton", "file": "vila_triton/kernels/rms_norm.py"}
    said = sources.describe_missing(ours)
    assert said == "of vila_triton/kernels/rms_norm.py, which vila-triton does not have (any more)"
    said = sources.describe_missing({"distribution": "others-kernels 1.2", "file": "others_package/mine.py"})
    assert said.startswith("of others_package/mine.py in others-kernels 1.2, which is not installed")


def test_kernels_toml_and_use_may_name_one(put: Put, tmp_path: Path) -> None:
    file = put("kernels.toml", '[cuda]\nrms_norm = "mine"\n')
    with pytest.raises(
        ValueError, match=r"kernels\.toml, \[cuda\]: op 'rms_norm' has no implementation 'mine'.*--kernels"
    ):
        read_kernels_toml(file, "cuda", "decode")
    put("mine.py", kernel("mine"))
    discover("mine.py")
    assert read_kernels_toml(file, "cuda", "decode") == {"rms_norm": "mine"}


@pytest.mark.slow
def test_processes_of_the_tuner_know_the_same_kernels(put: Put) -> None:
    put("mine.py", kernel("mine"))
    discover("mine.py")
    job = {"stage": "gate", "op": "rms_norm", "impl": "mine", "config": {}, "sizes": {"rows": 1, "e": 8}}
    process = Process("gate", sources.kernel_paths())
    try:
        answer = process.ask({**job, "sizes": {**job["sizes"], "dtype": "float32"}})
    finally:
        said = process.kill()
    assert answer and "elements are off" in answer["reason"], said  # it is known, and wrong


CUDA = torch.device("cuda")


@pytest.fixture
def table(put: Put, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The table of a device that chooses `mine` of mine.py for rms_norm, and an op that does not exist."""
    monkeypatch.setattr(tuned_tables, "tables_dir", Path.cwd)
    monkeypatch.setattr(tuned_tables, "gpu_name", lambda device: "Toy GPU")
    monkeypatch.setattr(tuned_tables, "configured_choices", lambda *_: {})
    put("mine.py", kernel("mine"))
    discover("mine.py")
    impl = OPS["rms_norm"].impls["mine"]
    entry = {
        "op": "rms_norm",
        "impl": "mine",
        **tuned_tables.entry_fingerprint(impl),
        "source": sources.source_of(impl),
    }
    entry |= {"ranges": [], "otherwise": {"config": {}}}
    choice = {"first": 1, "last": 8, "choice": "mine"}
    content = {"device": "Toy GPU", "choices": {"rms_norm": choice}, "entries": [entry]}
    cached = (tuned_tables.load_table, tuned_tables.valid_entry, tuned_tables.table_choice)
    cached = (*cached, tuned_tables.warn_of_unknown_op)
    for function in cached:
        function.cache_clear()
    yield content
    for function in cached:
        function.cache_clear()


def write(content: dict[str, Any]) -> None:
    Path("toy-gpu.json").write_text(json.dumps(content))


def test_a_table_chooses_a_kernel_that_is_loaded(table: dict[str, Any]) -> None:
    write(table)
    assert "mine" in tuned_tables.default_choices_for(CUDA, "decode")["rms_norm"].names  # pyright: ignore


def test_a_table_that_chooses_a_kernel_that_is_not_loaded_says_which(table: dict[str, Any]) -> None:
    from bench import tune

    write(table)
    del OPS["rms_norm"].impls["mine"]
    sources._paths.clear()
    message = (
        "rms_norm: the tuned table toy-gpu.json chooses 'mine' of mine.py, which is not loaded: "
        "pass --kernels mine.py, or in Python call discover('mine.py'); "
        "or choose another explicitly, or delete the choice."
    )
    with pytest.raises(tuned_tables.KernelNotLoadedError) as error:
        tuned_tables.default_choices_for(CUDA, "decode")
    assert str(error.value) == message
    with use(rms_norm="triton"):
        assert tuned_tables.default_choices_for(CUDA, "decode") == {}
    assert [line.partition(", which")[0] for line in tune.stale_entries(Path.cwd())] == [
        "toy-gpu.json: rms_norm mine: it is of mine.py",
        "toy-gpu.json: rms_norm: the tuned table toy-gpu.json chooses 'mine' of mine.py",
    ]


def test_a_table_about_an_op_that_is_not_loaded_says_so_once(table: dict[str, Any]) -> None:
    entry = {**table["entries"][0], "op": "cut_in_two", "source": {"distribution": "", "file": "cut.py"}}
    choices = {**table["choices"], "cut_in_two": table["choices"]["rms_norm"]}
    write({**table, "choices": choices, "entries": [*table["entries"], entry]})
    with pytest.warns(UserWarning, match=r"toy-gpu\.json is about an op 'cut_in_two' of cut\.py, which is not loaded"):
        assert list(tuned_tables.default_choices_for(CUDA, "decode")) == ["rms_norm"]


def test_a_changed_helper_makes_the_entry_stale(put: Put, table: dict[str, Any]) -> None:
    write(table)
    put("_helper.py", "x = 1\n")
    with pytest.raises(tuned_tables.StaleTableError, match=r"rms_norm mine: .* is stale: kernel was"):
        tuned_tables.default_choices_for(CUDA, "decode")


def test_a_source_that_is_none_is_refused_with_its_place(table: dict[str, Any]) -> None:
    write({**table, "entries": [{**table["entries"][0], "source": "mine.py"}]})
    with pytest.raises(ValueError, match=r"toy-gpu\.json, entries 0, source"):
        tuned_tables.load_table("Toy GPU")


def test_a_file_that_registers_nothing_is_named(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    file = put("nothing.py", "X = 1\n")
    discover(file)
    assert f"{file} registers no op and no implementation" in capsys.readouterr().err
