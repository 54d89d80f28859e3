"""Code in a checkpoint is never run, and nobody is asked whether it may be."""

import ast
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_sentencepiece
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor

from vila_triton import VilaLlamaForCausalLM, VilaProcessor
from vila_triton.__main__ import main
from vila_triton.chat.conversation import Conversation
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.paths import BUNDLED_CHECKPOINT

pytestmark = pytest.mark.filterwarnings("ignore:.*of generation_config.json")  # it does not count
ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("Config", "Model", "ModelForCausalLM", "Tokenizer", "Processor", "ImageProcessor", "FeatureExtractor")
MAP = {f"Auto{name}": ["mine.Mine", "mine.Mine"] if name == "Tokenizer" else "mine.Mine" for name in CLASSES}
FILES = ("tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "processor_config", "config")
FILES += ("preprocessor_config", "chat_template", "video_preprocessor_config", "adapter_config")
ONLY_WHERE_IT_IS = ("special_tokens_map", "added_tokens", "adapter_config", "chat_template", "preprocessor_config")


def kernels_of(directory: Path) -> dict[str, Any]:
    """The fields that could name a file of kernels, were any read from a checkpoint."""
    paths = [str(directory / "mine.py")]
    chosen = {"kernels": paths, "kernel_paths": paths}
    return {**chosen, "vila_triton": chosen, "additional_config": {"vila_triton": chosen}, "vila_triton.kernels": paths}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundled model with code in every folder, named in every file that could name it."""
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_CHECKPOINT, folder)
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    for directory in (folder, *(folder / part for part in ("llm", "vision_tower", "mm_projector"))):
        for name in ("mine.py", "custom_generate/generate.py", "custom_generate/mine.py", "tokenization_mine.py"):
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_text(code)
        for name in FILES:
            file = directory / f"{name}.json"
            if file.exists() or name not in ONLY_WHERE_IT_IS:
                values = json.loads(file.read_text()) if file.exists() else {}
                named = {"auto_map": MAP, "custom_generate": "mine", "trust_remote_code": True}
                file.write_text(json.dumps(values | named | kernels_of(directory)))

    def asked(*args: Any) -> str:
        raise AssertionError("somebody was asked")

    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr(sys, "stdin", None)
    return folder


LOADERS: dict[str, Callable[[Path], Any]] = {
    "model": lambda folder: VilaLlamaForCausalLM.from_pretrained(folder, device="cpu"),
    "processor": VilaProcessor.from_pretrained,
    "talker": lambda folder: [*Conversation(load_chat_model(folder, "cpu")).ask("Why?", max_new_tokens=1)],
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModelForCausalLM": lambda folder: AutoModelForCausalLM.from_pretrained(folder, device="cpu"),
    "AutoProcessor": AutoProcessor.from_pretrained,
    "ask": lambda folder: command("ask", "--model", folder, "Why?"),
    "convert": lambda folder: command("convert", folder, folder.with_name("other"), "--format", "dense"),
    "quantize": lambda folder: command("quantize", folder, folder.with_name("other"), "--method", "rtn", *GROUPS),
    "build": lambda folder: command("build", folder, folder.with_name("other"), "--dry-run"),
}
GROUPS = ("--group-size", "64")


def command(*argv: Any) -> None:
    sys.argv = ["vila-triton", *map(str, argv)]
    assert main() in (0, 1)


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_run_no_foreign_code_and_do_not_ask(name: str, planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [])
    before = set(sys.modules)
    LOADERS[name](planted)
    assert not (planted.parent / "ran").exists()
    assert not [module for module in set(sys.modules) - before if module.startswith("transformers_modules")]


@pytest.mark.parametrize("file, field, message", [
    ("llm/tokenizer_config.json", "tokenizer_class", None),
    ("vision_tower/preprocessor_config.json", "image_processor_type", "image_processor_type is Mine, expected CLIP"),
    ("llm/config.json", "model_type", "a silu llama is needed, not silu mine|model_type"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["talker", "processor"])
def test_class_named_in_a_config_is_not_imported(
    name: str, file: str, field: str, message: str | None, planted: Path
) -> None:
    path = planted / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: "Mine"}))
    try:
        LOADERS[name](planted)
        assert message is None or field == "model_type"
    except ValueError as error:
        assert message and field in f"{field} {error}" and len(str(error)) < 300
    assert not (planted.parent / "ran").exists()


def test_tokenizer_model_is_not_run_as_code(planted: Path) -> None:
    (planted / "llm" / "tokenizer.json").unlink()
    config = planted / "llm" / "tokenizer_config.json"
    config.write_text(json.dumps({"auto_map": MAP, "tokenizer_class": "LlamaTokenizer"}))
    small_sentencepiece.place(planted / "llm", "small")
    LOADERS["talker"](planted)
    assert not (planted.parent / "ran").exists()


def test_every_auto_class_call_forbids_remote_code() -> None:
    calls, wrong = 0, []
    for folder in ("vila_triton", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            if "Auto" not in (text := file.read_text()):
                continue
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and re.fullmatch(r"Auto\w+\.from_pretrained", ast.unparse(node.func)):
                    calls += 1
                    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    wrong += [f"{file.name}:{node.lineno}"] if keywords.get("trust_remote_code") != "False" else []
    assert calls and not wrong
