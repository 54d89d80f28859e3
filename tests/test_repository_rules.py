"""Rules of the repository: which modules import which, names and words, files, the wheel."""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tokenize
import zipfile
from collections import Counter
from collections.abc import Iterable
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest

from vila_triton.registry import OPS, discover

ROOT = Path(__file__).resolve().parent.parent
FILES = {  # dotted name -> file, as Python will know it
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in {"vila_triton": "vila_triton", "vila_triton.kernels": "kernels", "bench": "bench"}.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}

FOLDERS = ("vila_triton", "kernels", "configs", "bench", "tests")

FLOORS = (  # folders and modules of vila_triton, the lowest first: a file imports from lower ones and from its own
    "console device files hashing limits lock paths",
    "registry",
    "ops",
    "models",
    "cache checkpoints",
    "engine images",
    "chat",
    "arguments hf",
    "tiny",
    "quantization",
    "vllm_plugin",
    "commands",
    "__main__",
)
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
KERNELS_IMPORT = {"registry", "ops", "lock", "hashing", "paths"}
PACKAGES = {  # folder or module -> packages it imports besides the standard library; others, which README's commands do
    # not install and pyright does not find, go through import_module
    "device": "torch",
    "registry": "torch triton",
    "ops": "torch einops",
    "models": "torch einops",
    "cache": "torch",
    "checkpoints": "torch einops safetensors tokenizers transformers",
    "engine": "torch transformers",
    "images": "torch numpy PIL transformers",
    "chat": "torch PIL safetensors sentencepiece tokenizers transformers",
    "arguments": "torch",
    "hf": "torch einops transformers",
    "tiny": "torch einops numpy peft PIL safetensors tokenizers transformers",
    "quantization": "torch einops PIL safetensors transformers",
    "commands": "torch PIL transformers",
    "vllm_plugin": "torch PIL transformers vllm",
    "kernels": "torch triton einops numpy",
    "bench": "bench torch transformers triton hypothesis numpy matplotlib cycler PIL einops safetensors pytest vllm"
    " peft",
}
DISCOVERY = {  # imports the folders whose files it discovers, which import the registry
    ("vila_triton.registry.discovery", "vila_triton.ops"),
    ("vila_triton.registry.discovery", "vila_triton.kernels"),
    ("vila_triton.registry.sources", "vila_triton.kernels"),
}


def folder_of(name: str) -> str:
    """The folder or module of vila_triton, or the other package, that a dotted name lies in."""
    package, _, inner = name.partition(".")
    return inner.partition(".")[0] if package == "vila_triton" else package


@cache
def parsed(path: Path) -> ast.Module:
    """The syntax tree of a file, which several rules walk."""
    return ast.parse(path.read_text())


def imports(name: str, path: Path) -> set[str]:
    """The dotted names of the modules that a file imports anywhere in it, inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    modules = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join((*above, *([node.module] if node.module else [])))
            modules |= {f"{module}.{a.name}" if f"{module}.{a.name}" in FILES else module for a in node.names}
    return modules


IMPORTS = {name: imports(name, path) for name, path in FILES.items()}


def lies_in(name: str, packages: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def may_import(importer: str, imported: str) -> bool:
    """True for two folders of `FLOORS` if the imported one is lower. vila_triton and vila_triton.auto show public names
    of folders at the top, and bench may import everything.
    """
    if importer == imported or importer in ("", "auto", "bench"):
        return True
    if importer == "kernels":
        return imported in KERNELS_IMPORT
    return FLOOR.get(imported, len(FLOORS)) < FLOOR[importer]


def test_every_folder_has_a_floor() -> None:
    assert {folder_of(name) for name in FILES} == {*FLOOR, "", "auto", "kernels", "bench"}


def test_imports_run_downwards() -> None:
    pairs = {(name, module) for name, modules in IMPORTS.items() for module in modules & FILES.keys()}
    assert not {(a, b) for a, b in pairs - DISCOVERY if not may_import(folder_of(a), folder_of(b))}


def test_packages_from_elsewhere_are_imported_only_where_they_are_listed() -> None:
    unlisted = set()
    for name, modules in IMPORTS.items():
        allowed = {"vila_triton", *PACKAGES.get(folder_of(name), "").split(), *sys.stdlib_module_names}
        unlisted |= {(name, module) for module in modules if module.split(".")[0] not in allowed}
    assert not unlisted


def test_imports_form_no_circle() -> None:
    graph = {
        name: {module for module in modules & FILES.keys() if module != name and (name, module) not in DISCOVERY}
        for name, modules in IMPORTS.items()
    }
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_files_of_tests_have_names_of_their_own() -> None:
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]  # pytest could not collect both


NOT_NAMES = {  # words that say nothing of what is named
    *("after", "at", "before", "found", "given", "held", "here", "how", "known", "made", "of", "one", "place"),
    *("rest", "said", "seen", "some", "there", "told", "what", "words"),
}
GLOSSARY = {  # word of identifiers and prose -> the word that is used instead
    "picture": "image",
    "photograph": "image",
    "film": "video",
    "connector": "projector",
    "talker": "chat model",
}
SPELLING = {  # part of identifiers -> its American spelling
    "colour": "color",
    "centre": "center",
    "neighbour": "neighbor",
    "quantis": "quantiz",
    "normalis": "normaliz",
}
EXEMPT = {  # words of the bundled model, and old spellings that are still read
    *("vila_triton/tiny/tokenizer.py", "vila_triton/tiny/questions.py", "vila_triton/tiny/scenes.py"),
    *("bench/measure/rows.py", "bench/roofline.py", "vila_triton/vllm_plugin/media.py"),  # a class of vLLM
}


def test_functions_classes_and_modules_have_telling_names() -> None:
    names = {(name, name.rpartition(".")[2]) for name in FILES}
    for module, path in FILES.items():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add((module, node.name))
    assert not {(module, name) for module, name in names if name.lower() in NOT_NAMES}


def words_of(path: Path) -> set[str]:
    """The words of a file, and the parts of its identifiers, in lower case; of a README without its code blocks."""
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+", text)}


def test_words_are_those_of_the_glossary() -> None:
    readmes = [ROOT / "README.md", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))]
    words = {path.relative_to(ROOT).as_posix(): words_of(path) for path in [*FILES.values(), *readmes]}
    words = {path: found for path, found in words.items() if path not in EXEMPT}
    assert not {(path, w) for path, found in words.items() for w in found if GLOSSARY.keys() & {w, w.removesuffix("s")}}


def test_identifiers_are_spelled_as_in_america() -> None:
    british = set()
    for path in FILES.values():
        with tokenize.open(path) as file:
            names = {token.string for token in tokenize.generate_tokens(file.readline) if token.type == tokenize.NAME}
        british |= {(path.name, name) for name in names if any(part in name.lower() for part in SPELLING)}
    assert not british


def test_docstrings_do_not_open_with_a_question_word() -> None:
    openings = set()
    for path in [*FILES.values(), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                docstring = ast.get_docstring(node) or ""
                if re.match(r"(What|How|Whether)\b", docstring):
                    openings.add((path.relative_to(ROOT).as_posix(), docstring.splitlines()[0]))
    assert not openings


def test_public_functions_of_modules_have_docstrings() -> None:
    undocumented = set()
    for module, path in FILES.items():
        for node in parsed(path).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or ast.get_docstring(node):
                continue
            decorators = {ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list}
            exempt = node.name == "main" or node.name.startswith("_") or decorators & {"overload", "triton.jit"}
            if not exempt:
                undocumented.add((module, node.name))
    assert not undocumented


def test_kernels_are_imported_through_vila_triton() -> None:
    files = [*FILES.values(), *(ROOT / "tests").rglob("*.py")]
    assert not [path.name for path in files if any(lies_in(x, ["kernels"]) for x in imports("", path))]


def test_no_file_is_longer_than_400_lines() -> None:
    files = [path for folder in ("vila_triton", "kernels", "tests", "bench") for path in (ROOT / folder).rglob("*.py")]
    assert not {path.name: n for path in files if (n := len(path.read_text().splitlines())) > 400}


def test_every_kernel_file_is_an_implementation() -> None:
    discover()
    attached = {impl.file for op in OPS.values() for impl in op.impls.values()}
    kernels = {path for path in (ROOT / "kernels").glob("*.py") if not path.name.startswith("_")}
    assert kernels and kernels <= attached
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's package of that name


def python(code: str, *path: Path, cwd: Path = ROOT) -> str:
    """The output of code in a fresh interpreter, run in `cwd` with these folders first on its path."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_but_kernels_works_without_triton(tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('there is no triton here')")
    code = """
        import sys, vila_triton, vila_triton.registry, vila_triton.cache.page_allocator
        assert "torch" not in sys.modules, "the registry needs the standard library only"
        from vila_triton import PagedCache
        import vila_triton.ops, vila_triton.checkpoints.int4_layouts
        assert "transformers" not in sys.modules, "ops on one's own tensors need torch only"
        import torch, vila_triton.models.llama
        from vila_triton import VilaLlamaForCausalLM, ops
        print(ops.rms_norm(torch.ones(1, 4), torch.ones(4), 0.0).sum().item())
    """
    assert python(code, tmp_path) == "4.0"


HUB = """
    import transformers.integrations.hub_kernels
    from transformers import SiglipVisionModel
    from transformers.utils import is_kernels_available
    from vila_triton.registry import OPS, discover
    print(is_kernels_available(), len(discover()) > 0, "triton" in OPS["rms_norm"].impls)
"""
STUB = """
class Anything:
    def __init__(self, *args, **kwargs): pass
def __getattr__(name):
    if name.startswith("__"): raise AttributeError(name)
    return (lambda *args, **kwargs: lambda cls: cls) if name.startswith("use_") else Anything
"""


@pytest.mark.parametrize("hub", [False, True], ids=["without hub kernels", "with hub kernels"])
def test_hugging_faces_package_kernels_does_not_clash_with_ours(hub: bool, tmp_path: Path) -> None:
    from transformers.utils.import_utils import KERNELS_MIN_VERSION as version

    if hub:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text(STUB)
        info = tmp_path / f"kernels-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
        (info / "top_level.txt").write_text("kernels\n")
    elif "kernels" in metadata.packages_distributions():
        pytest.skip("the package kernels is installed here")
    assert python(HUB, tmp_path) == f"{hub} True True"


def test_a_new_implementation_takes_one_file(tmp_path: Path) -> None:
    text = (ROOT / "kernels" / "rms_norm.py").read_text()
    assert 'impl("triton"' in text
    (tmp_path / "rms_norm_mine.py").write_text(text.replace('impl("triton"', 'impl("mine"'))
    code = f"""
        import torch
        from vila_triton import kernels, use
        from vila_triton.ops import rms_norm
        kernels.__path__.append({str(tmp_path)!r})
        x, weight = torch.randn(3, 40), torch.randn(40)
        with use(rms_norm="mine"):
            assert torch.allclose(rms_norm(x, weight, 1e-5), rms_norm.reference(x, weight, 1e-5), atol=1e-5)
        print(*rms_norm.impls)
    """
    assert "mine" in python(code).split()


def test_a_wheel_holds_kernels_and_configs_inside_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    copy, wheel = tmp_path / "copy", tmp_path / "wheel"
    for folder in ("vila_triton", "kernels", "configs", "tests", "bench"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    python("from setuptools import build_meta; build_meta.build_wheel('.')", cwd=copy)
    with zipfile.ZipFile(next(copy.glob("*.whl"))) as file:
        file.extractall(wheel)
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"vila_triton", "bench"}
    assert (wheel / "vila_triton" / "py.typed").exists()
    for name, path in FILES.items():
        place = wheel.joinpath(*name.split("."))
        assert (place / "__init__.py" if path.name == "__init__.py" else place.with_suffix(".py")).exists(), name
    for folder in ("kernels", "configs"):
        held = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".toml")}
        assert held <= {path.name for path in (wheel / "vila_triton" / folder).iterdir()}
    code = """
        from vila_triton import kernels, registry
        from vila_triton.registry.kernel_config import configured_choices
        registry.discover()
        print(registry.OPS["rms_norm"].impls["triton"].file, configured_choices("cuda", "decode")["rms_norm"])
    """
    assert python(code, wheel, cwd=tmp_path) == f"{(wheel / 'vila_triton/kernels/rms_norm.py').resolve()} triton"
