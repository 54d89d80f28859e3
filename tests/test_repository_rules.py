"""The rules of the house: who imports whom, what lies where."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable
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

FLOORS = (  # rooms of vila_triton, the lowest first; a file imports from lower rooms and from its own
    "console files limits lock paths",
    "registry",
    "ops",
    "models",
    "cache checkpoints",
    "engine images",
    "chat",
    "arguments hf",
    "tiny",
    "quantization",
    "commands",
    "__main__",
)
PACKAGES = {  # room -> what it imports besides the standard library
    "registry": "torch triton",
    "ops": "torch einops",
    "models": "torch einops",
    "cache": "torch",
    "checkpoints": "torch einops safetensors tokenizers transformers",
    "engine": "torch transformers",
    "images": "torch numpy PIL transformers",
    "chat": "torch PIL safetensors sentencepiece tokenizers transformers",
    "arguments": "torch",
    "hf": "torch transformers",
    "tiny": "torch einops numpy PIL safetensors tokenizers transformers",
    "quantization": "torch einops PIL safetensors transformers",
    "commands": "torch PIL transformers",
    "kernels": "torch triton einops",
    "bench": "torch transformers triton hypothesis numpy matplotlib cycler PIL einops safetensors",
}
DISCOVERY = {  # what finds files by looking for them; every other circle is one
    ("vila_triton.registry.registry", "vila_triton.ops"),
    ("vila_triton.registry.registry", "vila_triton.kernels"),
}


def room(name: str) -> str:
    """The folder or file of vila_triton, or the package, that a module lies in."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "vila_triton" else first


def imports(name: str, path: Path) -> set[str]:
    """The dotted names of the modules that a file imports anywhere in it, inside functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join((*above, *([node.module] if node.module else [])))
            modules |= {f"{module}.{a.name}" if f"{module}.{a.name}" in FILES else module for a in node.names}
    return modules


IMPORTS = {name: imports(name, path) for name, path in FILES.items()}


def within(name: str, prefixes: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def test_imports_run_downwards() -> None:
    floor = {name: i for i, names in enumerate(FLOORS) for name in names.split()}
    assert {room(name) for name in FILES} <= {*floor, "", "auto", "kernels", "bench"}
    upwards = set()
    for name, modules in IMPORTS.items():
        for module in modules & FILES.keys():
            here, there = room(name), room(module)
            if here == there or here in ("", "auto") or (name, module) in DISCOVERY:
                continue  # vila_triton itself and vila_triton.auto show names of rooms at the top
            if here == "bench":
                continue
            allowed = (
                there in ("registry", "ops", "files", "lock")
                if here == "kernels"
                else floor.get(there, 99) < floor[here]
            )
            if not allowed:
                upwards.add(f"{name} imports {module}")
    assert not upwards


def test_packages_from_elsewhere_are_imported_where_they_are_needed() -> None:
    strangers = set()
    for name, modules in IMPORTS.items():
        allowed = {"vila_triton", *PACKAGES.get(room(name), "").split()} | (
            {"bench"} if room(name) == "bench" else set()
        )
        packages = {x.split(".")[0] for x in modules} - sys.stdlib_module_names
        strangers |= {f"{name} imports {x}" for x in packages - allowed}
    assert not strangers


def test_imports_form_no_circle() -> None:
    graph = {a: {b for b in found & FILES.keys() if b != a and (a, b) not in DISCOVERY} for a, found in IMPORTS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nobody_imports_the_folder_kernels_by_its_own_name() -> None:
    files = [*FILES.values(), *(ROOT / "tests").rglob("*.py")]
    assert not [path.name for path in files if any(within(x, ["kernels"]) for x in imports("", path))]


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
    """What a fresh interpreter prints, run in `cwd` with the given folders before all others."""
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
def test_hugging_faces_package_kernels_and_our_folder_do_not_meet(hub: bool, tmp_path: Path) -> None:
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


def test_a_new_file_is_all_an_implementation_takes(tmp_path: Path) -> None:
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


def test_a_wheel_holds_kernels_and_configs_inside_the_package_and_nothing_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    copy, wheel = tmp_path / "copy", tmp_path / "wheel"
    for folder in ("vila_triton", "kernels", "configs", "tests", "bench"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    python("from setuptools import build_meta; build_meta.build_wheel('.')", cwd=copy)
    with zipfile.ZipFile(next(copy.glob("*.whl"))) as file:
        file.extractall(wheel)
    assert {path.name for path in wheel.iterdir() if path.suffix != ".dist-info"} == {"vila_triton"}
    for folder in ("kernels", "configs"):
        held = {path.name for path in (ROOT / folder).iterdir() if path.suffix in (".py", ".toml")}
        assert held <= {path.name for path in (wheel / "vila_triton" / folder).iterdir()}
    code = """
        from vila_triton import kernels, registry
        from vila_triton.registry import kernel_config
        registry.discover()
        print(registry.OPS["rms_norm"].impls["triton"].file, kernel_config.configured_choices("cuda", "decode")["rms_norm"])
    """
    assert python(code, wheel, cwd=tmp_path) == f"{(wheel / 'vila_triton/kernels/rms_norm.py').resolve()} triton"
