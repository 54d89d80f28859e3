"""The rules of the house: who imports whom, what lies where."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
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

MAY_IMPORT = {  # beside the standard library, `files`, `forms`; a line holds for all that begins so, the longest counts
    "vila_triton.files.reading": "",
    "vila_triton.files.json_schema": "",
    "vila_triton.registry": "operation ranges ops kernels",  # the last two inside functions
    "vila_triton.registry.tuned_tables": "torch choices ranges registry space",
    "vila_triton.cache.page_allocator": "prefix",
    "vila_triton.registry.kernel_config": "torch ranges registry",
    "vila_triton.kernels": "torch triton einops ops formats lock registry space kernels interpreter",
    "vila_triton.registry.interpreter": "triton registry",  # nobody else imports triton
    "vila_triton.ops": "torch einops ops registry formats",
    **{f"vila_triton.models.{x}": "models.fields models.vision_config" for x in ("fields", "vision_config", "config")},
    "vila_triton.models": "torch einops ops formats models",
    "vila_triton.hf.modeling_vila_llama": "torch transformers cache checkpoint choices engine generation_config registry "
    "models",
    "vila_triton.hf.generation": "torch transformers cache engine generation_config models stopping",
    "vila_triton.hf.configuration_vila_llama": "torch transformers cache checkpoint models",
    "vila_triton.cache.paged_cache": "torch ops models.config lock pages",
    "vila_triton.lock": "",
    "vila_triton.checkpoints.loading": "torch generation_config layouts llava models shards sources tensors write",
    "vila_triton.checkpoints.tensor_locations": "torch",
    "vila_triton.checkpoints.torch_files": "torch places",
    "vila_triton.checkpoints.tensor_files": "torch safetensors models places torchfile",
    "vila_triton.checkpoints.shard_writer": "torch file_locks models places tensors",
    "vila_triton.checkpoints.int4_views": "torch formats layouts models ops",
    "vila_triton.checkpoints.sources": "layouts models quantized tensors",
    "vila_triton.checkpoints.llava": "models sources tensors",
    "vila_triton.checkpoints.writing": "torch generation_config layouts models quantized shards sources tensors",
    "vila_triton.checkpoints.size_report": "models sources write",
    "vila_triton.quantization": "torch safetensors einops PIL awq cache checkpoint console engine file_locks formats images "
    "layouts models ops prompts quantized shards sources templates tensors tiny write",
    "vila_triton.commands": "torch PIL transformers safetensors einops vila_triton",
    "vila_triton.checkpoints.random_checkpoint": "torch tokenizers transformers checkpoint choices layouts models quantized shards sources",
    "vila_triton.checkpoints.int4_packing": "torch einops",
    "vila_triton.checkpoints.int4_layouts": "torch formats ops",
    "vila_triton.chat.prompts": "markers models.vila templates",
    "vila_triton.chat.special_tokens": "tokenizers sentencepiece transformers templates",
    "vila_triton.chat.tokenizer": "tokenizers transformers llama_tokenizer",
    "vila_triton.chat.llama_tokenizer": "sentencepiece transformers",
    "vila_triton.chat.templates": "",
    "vila_triton.chat.conversation_file": "torch safetensors chat pictures",
    "vila_triton.engine.generation_config": "files limits",
    "vila_triton.engine.stopping": "torch transformers",
    "vila_triton.engine.engine": "torch transformers cache generation_config limits models registry stopping tuned",
    "vila_triton.images.processing": "torch numpy PIL transformers checkpoint models.config preprocessor",
    "vila_triton.images.preprocessor_config": "models.fields",
    "vila_triton.tiny": "torch numpy PIL safetensors tokenizers transformers console limits tiny models ops checkpoint",
    "vila_triton.tiny.evaluate": "torch PIL arguments chat console limits models registry tiny",
    "vila_triton.registry.op": "ranges space gradient library tuned",  # the last three inside functions
    "vila_triton.registry.gradients": "torch",
    "vila_triton.arguments": "torch choices registry",
    "vila_triton.__main__": "commands console",
    "vila_triton.console": "",
    "vila_triton.files.file_locks": "",
    "vila_triton.limits": "",
    "vila_triton": "torch PIL safetensors transformers auto cache chat checkpoint choices engine generation_config "
    "images limits lock markers memory models pictures processor prompts ranges registry saved session templates tiny "
    "tokenizer tuned",
    "bench": "torch transformers triton hypothesis numpy matplotlib cycler PIL vila_triton bench",
}


def imports(name: str, path: Path) -> Iterator[str]:
    """The dotted names of the modules that a file imports anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join((*above, *([node.module] if node.module else [])))
            yield from (f"{module}.{a.name}" if f"{module}.{a.name}" in FILES else module for a in node.names)


def within(name: str, prefixes: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)


def test_modules_import_only_what_they_may() -> None:
    wrong = set()
    for name, path in FILES.items():
        rule = MAY_IMPORT[max((key for key in MAY_IMPORT if within(name, [key])), key=len)].split()
        allowed = [f"vila_triton.{x}" if f"vila_triton.{x}" in FILES else x for x in (*rule, "files", "forms")]
        found = {x for x in imports(name, path) if x.split(".")[0] not in sys.stdlib_module_names}
        wrong |= {f"{name} imports {x}" for x in found if not within(x, allowed)}
    assert not wrong


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
        print(registry.OPS["rms_norm"].impls["triton"].file, kernel_config.configured("cuda", "decode")["rms_norm"])
    """
    assert python(code, wheel, cwd=tmp_path) == f"{(wheel / 'vila_triton/kernels/rms_norm.py').resolve()} triton"
