"""A wrong value in a config.json raises one sentence naming folder and field, and costs no memory."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import build

from vila_triton import VilaLlamaForCausalLM as Model
from vila_triton.chat.cli_session import default_num_frames
from vila_triton.chat.tokenizer import load_tokenizer
from vila_triton.checkpoints.atomic_folder import atomic_folder
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.files.file_locks import FolderInUseError
from vila_triton.files.reading import LoadError
from vila_triton.hf.configuration_vila_llama import VilaLlamaConfig
from vila_triton.hf.processing_vila import VilaProcessor
from vila_triton.images.processing import ImageError, load_video_frames, open_image
from vila_triton.models.config import ConfigError, with_new_spellings
from vila_triton.paths import BUNDLED_CHECKPOINT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build(dtype=torch.float32).save_pretrained(at := tmp_path_factory.mktemp("config") / "x")
    return at


WRONG: list[tuple[str, str, tuple[Any, ...]]] = [
    ("", "page_size", ("x", 0, 10**9, 10**30, {}, 1.5, True)),
    ("", "prefill_chunk_size", ("x", 0, -1, 10**30, [])),
    ("", "conversation_template", ({}, 1, [])),
    ("", "torch_dtype", ("aaa", 1, [])),
    ("", "model_dtype", ("aaa", "", {})),
    ("", "num_video_frames", (0, 10**8, "8")),
    ("", "mm_vision_select_layer", ("-2", 1, 10**30)),
    ("", "s2", ("no", 1)),
    ("", "quantization_config", (1, "awq")),
    ("llm", "num_hidden_layers", (0, 10**7, 10**30, "2", 4096, None)),
    ("llm", "rms_norm_eps", (-1, "1e-5", 2)),
    ("llm", "rope_theta", (0, -1, "x", 10**30)),
    (
        "llm",
        "rope_scaling",
        (1, {"type": "linear", "factor": -1}, {"type": "llama3", "factor": 8, "low_freq_factor": 4}),
    ),
    ("llm", "head_dim", (0, -8, 7)),
    ("llm", "max_position_embeddings", (0, "x", 10**30)),
    ("llm", "eos_token_id", ("x", -1, [], [1, "x"])),
    ("llm", "tokenizer_padding_side", ("up", 1)),
    ("vision_tower", "layer_norm_eps", (-1, "x")),
    ("vision_tower", "image_size", (0, 10**6, "20")),
    ("vision_tower", "num_hidden_layers", (10**7, 4000)),
    ("mm_projector", "mm_projector_type", (1, "mlp10000000x_gelu")),
]
CASES = [(part, field, value) for part, field, values in WRONG for value in values]


@pytest.mark.parametrize("part, field, value", CASES, ids=lambda x: str(x)[:20])
def test_config_wrong_value_raises_error_naming_the_field(part: str, field: str, value: Any, folder: Path) -> None:
    file = folder / part / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), field: value}))
    try:
        with pytest.raises((ConfigError, LoadError)) as error:
            Model.from_pretrained(folder, device="cpu")
    finally:
        file.write_text(before)
    said = str(error.value)
    assert str(folder) in said and "\n" not in said and len(said) < 500
    assert field in said or "layers" in said or (field == "rope_scaling" and "factor" in said)


def test_config_null_counts_as_absent(folder: Path) -> None:
    file = folder / "config.json"
    before = file.read_text()
    file.write_text(json.dumps({**json.loads(before), "page_size": None, "num_labels": 10**9, "use_cache": None}))
    try:
        assert Model.from_pretrained(folder, device="cpu").new_cache(1).allocator.page_size == 16
    finally:
        file.write_text(before)


def test_config_huge_numbers_are_refused_within_one_gigabyte(folder: Path) -> None:
    """In a process that may take one more GB."""
    code = f"""
import json, resource, torch
from pathlib import Path
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.images.processing import load_video_frames
folder = Path({str(folder)!r})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layers = "num_hidden_layers"
for part, field in (("llm", layers), ("vision_tower", layers), ("vision_tower", "image_size")):
    file = folder / part / "config.json"
    text = file.read_text()
    file.write_text(json.dumps(json.loads(text) | {{field: 10**7}}))
    try:
        check_checkpoint(open_checkpoint(folder))
    except ValueError as error:
        print(error)
    file.write_text(text)
try:
    load_video_frames([], 10**9)
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and lines[-1] == "True", done.stderr
    assert lines[3] == "a video has at most 1024 frames, not 1000000000"


def test_load_error_with_9000_misfitting_tensors_is_short(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_checkpoint(open_checkpoint(folder), tmp_path / "x")
    save_file({f"t{i}": torch.zeros(1) for i in range(9000)}, tmp_path / "x/llm/model.safetensors")
    with pytest.raises(LoadError, match=r"9021 of its tensors do not fit the model:(\n.*){20}\n  and 9001 more$"):
        check_checkpoint(open_checkpoint(tmp_path / "x"))


def test_num_video_frames_beyond_the_maximum_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_video_frames": 100000000}')
    with pytest.raises(ConfigError, match=r"config.json: num_video_frames is 100000000, expected .* from 1 to 1024"):
        default_num_frames(tmp_path)
    assert default_num_frames(folder) == 8


def test_fifo_as_image_or_video_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    for read in (open_image, lambda path: load_video_frames(path, 2)):
        with pytest.raises(ImageError, match=r"a.png is a FIFO, expected a file"):
            read(tmp_path / "a.png")


def test_part_folders_must_lie_in_the_checkpoint_and_stray_files_are_not_copied(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(folder), tmp_path / "x")
    (tmp_path / "x/llm/modeling_vila.py").write_text("raise SystemExit")
    (tmp_path / "x/llm/tokenizer_config.json").write_text("{}")
    write_checkpoint(open_checkpoint(tmp_path / "x"), tmp_path / "y")
    assert {file.name for file in (tmp_path / "y/llm").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer_config.json",
    }
    (tmp_path / "x/llm").rename(tmp_path / "llm")
    top = json.loads((tmp_path / "x/config.json").read_text())
    for said in ("../llm", str(tmp_path / "llm")):
        (tmp_path / "x/config.json").write_text(json.dumps(top | {"llm_cfg": said}))
        with pytest.raises(LoadError, match="llm leads out of the checkpoint, to "):
            open_checkpoint(tmp_path / "x")
    (tmp_path / "x/llm").symlink_to(tmp_path / "llm")
    with pytest.raises(LoadError, match="llm leads out of the checkpoint, to "):
        open_checkpoint(tmp_path / "x")


@pytest.fixture
def bundled(tmp_path: Path) -> Path:
    return Path(shutil.copytree(BUNDLED_CHECKPOINT, tmp_path / "bundled"))


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
@pytest.mark.parametrize("value", [{}, [], 5, "zzz"], ids=str)
def test_processor_config_wrong_value_raises_error(file: str, value: Any, bundled: Path) -> None:
    before = json.loads((bundled / "config.json").read_text())
    for field in ("conversation_template", "image_aspect_ratio")[: 1 if value == "zzz" else 2]:
        (bundled / file).write_text(json.dumps(before | {field: value}))
        with pytest.raises(ConfigError) as error:
            VilaProcessor.from_pretrained(bundled)
        assert str(bundled) in str(error.value) and field.replace("_", " ") in str(error.value).replace("_", " ")


def test_tokenizer_files_must_lie_in_the_checkpoint(bundled: Path) -> None:
    outside = (bundled / "llm").rename(bundled.parent / "outside")
    (bundled / "llm").symlink_to(outside)
    with pytest.raises(LoadError, match="llm leads out of the checkpoint, to "):
        load_tokenizer(bundled)
    (bundled / "llm").unlink()
    (bundled / "llm").mkdir()
    (bundled / "llm/tokenizer.json").symlink_to(outside / "tokenizer.json")
    with pytest.raises(LoadError, match=r"tokenizer.json leads out of the checkpoint, to "):
        load_tokenizer(bundled)


def test_second_writer_of_a_target_is_refused_at_once_and_a_dead_one_blocks_nobody(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with atomic_folder(target) as first:
        (first / "a").touch()
        for over in (False, True):
            with (
                pytest.raises(FolderInUseError, match=r"x.partial is being written by another process"),
                atomic_folder(target, over),
            ):
                pass
        assert (first / "a").exists()
    assert [file.name for file in target.iterdir()] == ["a"] and [file.name for file in tmp_path.iterdir()] == ["x"]
    if not (child := os.fork()):
        with atomic_folder(tmp_path / "y"):
            os._exit(1)
    os.waitpid(child, 0)
    with atomic_folder(tmp_path / "y") as folder:
        (folder / "b").touch()
    assert [file.name for file in (tmp_path / "y").iterdir()] == ["b"]


def test_attention_policy_is_read_as_attention_numerics_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    config = with_new_spellings({"attention_policy": "invariant", "page_size": 16})
    assert config == {"attention_numerics": "batch_invariant", "page_size": 16}
    assert VilaLlamaConfig.from_dict({"attention_policy": "fast"}).attention_numerics == "fast"
    assert capsys.readouterr().err.count("the old spelling goes away with the next release") == 3
    assert with_new_spellings({"attention_numerics": "batch_invariant"}) == {"attention_numerics": "batch_invariant"}
    assert not capsys.readouterr().err
