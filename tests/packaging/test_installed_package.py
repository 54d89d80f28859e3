"""The package as pip installs it: kernels of one's own in an empty folder, and in another distribution.

`pytest -m slow tests/packaging`: five minutes. The wheel lies in an environment of its own, which finds torch and its
other requirements where these tests find them.
"""

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("vila_triton", "kernels", "configs", "bench", "pyproject.toml", "README.md", "LICENSE")
PYPROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "others-kernels"
version = "1.2"

[project.entry-points."vila_triton.kernels"]
fast = "others_kernels"

[tool.setuptools]
packages = ["others_kernels"]
"""


def pip(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, words)], check=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, and with nothing of this repository."""
    folder = tmp_path_factory.mktemp("installed")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "wheels", folder / "source")
    (wheel,) = (folder / "wheels").glob("*.whl")
    assert wheel.stat().st_size < 15e6
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "requirements.pth").write_text("\n".join(site.getsitepackages()))
    pip("--python", folder / "venv" / "bin" / "python", "install", "-q", "--no-deps", wheel)
    return folder / "venv" / "bin"


@pytest.fixture
def run(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run("vila-triton ops", code=0) -> what a command prints, in an empty folder."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    env |= {"PATH": f"{installed}{os.pathsep}{env['PATH']}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    def command(words: str, code: int = 0) -> str:
        done = subprocess.run(words.split(), env=env, capture_output=True, text=True)
        assert done.returncode == code, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    return command


@pytest.fixture
def mine(run, installed: Path) -> str:
    """The text of the installed kernels/swiglu.py with the name `mine`, which lies in mine.py."""
    (file,) = installed.parent.glob("lib/python*/site-packages/vila_triton/kernels/swiglu.py")
    text = file.read_text()
    assert 'impl("triton"' in text
    text = text.replace('impl("triton"', 'impl("mine"')
    Path("mine.py").write_text(text)
    return text


IMAGE = Path("vila_triton/tiny/examples/a.png")
COMMANDS = {
    "python -m bench.check swiglu --impl mine --examples 5": "right        5 examples",
    "python -m bench.check swiglu --impl mine --config 0 --examples 3 --compiled sm_90": "compiled for sm_90, emulated",
    "python -m bench.inspect swiglu --impl mine --config 0": "mine 0 sm_90",
    "python -m bench.emulate swiglu --impl mine --config 0": "mine.py:",
    "python -m bench.compiled --targets sm_90 --only swiglu-mine-0": '"call": "swiglu-mine-0"',
    "python -m bench.recompiles swiglu": "swiglu mine",
    "python -m bench.ops swiglu --impl mine --case toy --budget 0.01": "mine",
    "python -m bench.shadow --op swiglu --impl mine --count 1 --tokens 1": "swiglu: mine beside aten",
    "python -m bench.tune swiglu --impl mine --case toy --timer cost-model --candidates 1": "table results/tune/",
    "python -m bench.correctness --op swiglu --only mine --processes 1": "swiglu-mine",
    "vila-triton ops --set kernels.swiglu=mine": "mine.py",
    "vila-triton ask --set kernels.swiglu=mine --image {image} How?": "swiglu=mine (interpreted)",
    "vila-triton ask --emulate sm_90 --set kernels.swiglu=mine --max-new-tokens 1 Why?": "(emulated, sm_90)",
}


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words.split(" --")[0])
def test_every_command_knows_a_kernel_in_an_empty_folder(words: str, run, mine: str, installed: Path) -> None:
    (image,) = installed.parent.glob(f"lib/python*/site-packages/{IMAGE}")
    assert COMMANDS[words] in run(words.format(image=image) + " --kernels mine.py")
    assert {path.name for path in Path.cwd().iterdir()} <= {"mine.py", "__pycache__", "results"}


def test_path_of_a_file_to_copy_is_printed(run, installed: Path) -> None:
    file = Path(run("vila-triton ops --file swiglu=triton").strip())
    assert file.name == "swiglu.py" and installed.parent in file.parents


def test_what_a_table_says_of_a_kernel_of_ones_own(run, mine: str) -> None:
    options = "--case toy --timer cost-model --candidates 1 --out tuned"
    run(f"python -m bench.tune swiglu --impl mine {options} --kernels mine.py")
    (table,) = Path("tuned").glob("*.json")
    assert '"source": {"distribution": "", "file": "mine.py"}' in table.read_text()
    said = run("python -m bench.tune --check --out tuned", code=1)
    assert "swiglu mine: it is of mine.py, which is not loaded: pass --kernels mine.py" in said
    assert "all entries hold" in run("python -m bench.tune --check --out tuned --kernels mine.py")


def test_planted_bug_is_found(run, mine: str) -> None:
    wrong = mine.replace("tl.exp(-gate)", "tl.exp(-gate) * 1.01")
    assert wrong != mine
    Path("mine.py").write_text(wrong)
    for target in ("", "--compiled sm_90"):
        words = f"python -m bench.check swiglu --impl mine --config 0 --examples 4 --kernels mine.py {target}"
        assert "wrong        beyond budget" in run(words, code=1)


def test_broken_file_is_one_error_in_every_command(run) -> None:
    Path("mine.py").write_text("import no_such\n")
    for command in ("vila-triton ops", "vila-triton ask Why?", "python -m bench.check swiglu", "python -m bench.tune"):
        said = run(f"{command} --kernels mine.py", code=1 if command.startswith("vila") else 2)
        assert said.endswith(": mine.py, line 1: ModuleNotFoundError: No module named 'no_such'\n"), said
        assert said.count("\n") == 1


def test_another_distribution_brings_a_kernel(run, mine: str, installed: Path, tmp_path: Path) -> None:
    package = tmp_path / "others" / "others_kernels"
    package.mkdir(parents=True)
    (package.parent / "pyproject.toml").write_text(PYPROJECT)
    (package / "__init__.py").touch()
    text, count = re.subn(r"from \._(\w+) import", r"from vila_triton.kernels._\1 import", mine)
    assert count
    (package / "swiglu.py").write_text(text.replace('impl("mine"', 'impl("theirs"'))
    options = ("-q", "--no-deps", "--no-build-isolation")
    pip("--python", installed / "python", "install", *options, package.parent)
    try:
        assert "others_kernels/swiglu.py" in run("vila-triton ops")
        assert "right        3 examples" in run("python -m bench.check swiglu --impl theirs --config 0 --examples 3")
        assert "theirs 0 sm_90" in run("python -m bench.inspect swiglu --impl theirs --config 0")
        assert "swiglu=theirs" in run("vila-triton ask --set kernels.swiglu=theirs --max-new-tokens 1 Why?")
        (package / "swiglu.py").write_text("1 / 0\n")
        pip("--python", installed / "python", "install", *options, "--force-reinstall", package.parent)
        said = run("vila-triton ops")
        assert "left aside: " in said and "others_kernels/swiglu.py, line 1: ZeroDivisionError" in said
    finally:
        pip("--python", installed / "python", "uninstall", "-q", "-y", "others-kernels")


def test_without_the_extra_a_command_says_what_to_install(run, installed: Path, tmp_path: Path) -> None:
    Path("hypothesis.py").write_text("raise ModuleNotFoundError('no', name='hypothesis')\n")
    said = run("python -m bench.check swiglu", code=2)
    assert said == "bench needs hypothesis: pip install 'vila-triton[bench]'\n"
