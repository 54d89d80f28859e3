"""The files of tokenizers and image processors, damaged in every field: one error names the file, and no code runs."""

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_sentencepiece
from PIL import Image
from small_tokenizers import HEADERS, of_bytes, pieces

from vila_triton.chat.prompts import first_turn_ids
from vila_triton.chat.templates import resolve_template
from vila_triton.chat.tokenizer import load_tokenizer
from vila_triton.images.processing import ImageError, load_image_processor, preprocess_images
from vila_triton.models.params import LoadError
from vila_triton.paths import BUNDLED_CHECKPOINT

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "x",
    "",
    "\ud800",
    [],
    [1],
    {},
    {"a": 1},
]
ADDED = {"<|x|>": 118, "[y]": 119}
NAMES = {"pad_token": {"content": "[y]", "lstrip": False}, "additional_special_tokens": ["<|x|>"]}
CONFIG = {
    "added_tokens_decoder": {"2": {"content": "</s>", "special": True, "lstrip": False}, "118": {"content": "<|x|>"}},
    **{"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False}},
    **{"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "model_max_length": 99, "padding_side": "right"},
    **{"legacy": False, "sp_model_kwargs": {}, "additional_special_tokens": ["<|x|>"], "chat_template": "{{ 1 }}"},
}


def changes(value: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every place in a JSON value with every other value, and with nothing, at most 3 entries of a long list."""
    for new in (*VALUES, ...):
        yield path, new
    items = [*value.items()] if isinstance(value, dict) else [*enumerate(value)] if isinstance(value, list) else []
    for key, inner in items[:3] if len(items) > 30 else items:
        yield from changes(inner, (*path, key))


def changed(value: Any, path: tuple, new: Any) -> Any:
    """The value with another one in a place, or without that place."""
    if not path:
        return {} if new is ... else new
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    if len(path) == 1 and new is ...:
        del copy[path[0]]
    return copy


def folders(tmp_path: Path) -> dict[str, Path]:
    found = {name: tmp_path / name for name in ("bytes", "pieces", "words", "sentencepiece", "older")}
    of_bytes(HEADERS).save_pretrained(found["bytes"])
    pieces().save_pretrained(found["pieces"])
    shutil.copytree(
        BUNDLED_CHECKPOINT / "llm", found["words"], ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    for name in ("sentencepiece", "older"):
        found[name].mkdir()
        small_sentencepiece.place(found[name], "small")
    (found["sentencepiece"] / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (found["older"] / "added_tokens.json").write_text(json.dumps(ADDED))
    (found["older"] / "special_tokens_map.json").write_text(json.dumps(NAMES))
    return found


BYTES = {
    "empty": b"",
    "not UTF-8": b'{"a": "\xff"}',
    "cut": b'{"a": ',
    "deep": b'{"a":' + b"[" * 10**5,
    "twice": b'{"a":1,"a":2}',
}


def damaged(folder: Path) -> Iterator[tuple[Path, bytes, str]]:
    """Each JSON file of a folder with each change."""
    for file in sorted(folder.glob("*.json")):
        content = file.read_bytes()
        value = json.loads(content)
        for path, new in changes(value):
            yield file, json.dumps(changed(value, path, new)).encode(), f"{file.name} {path} {new!r}"[:200]
        for name, other in BYTES.items():
            yield file, other, f"{file.name} {name}"
        file.write_bytes(content)


def try_tokenizer(folder: Path, file: Path, what: str) -> bool:
    """Return True if it loads; it must work then, else the error must name the file."""
    try:
        tokenizer = load_tokenizer(folder)
    except LoadError as error:
        assert file.name in str(error) and len(str(error)) < 500, (what, str(error))
        return False
    ids = tokenizer("What is it </s>").input_ids
    tokenizer.decode(ids)
    try:
        first_turn_ids("What </s> is it?", resolve_template("auto", tokenizer), tokenizer)
    except ValueError as error:
        assert "template" in str(error), (what, str(error))
    return True


@pytest.mark.parametrize("share", [0.02, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words", "sentencepiece", "older"])
def test_damaged_tokenizer_file_is_one_error_naming_it(kind: str, share: float, tmp_path: Path) -> None:
    folder, rng, loaded = folders(tmp_path)[kind], random.Random(5), []
    for file, content, what in damaged(folder):
        if rng.random() < share:
            file.write_bytes(content)
            loaded.append(try_tokenizer(folder, file, what))
    assert loaded.count(False)


PREPROCESSOR: dict[str, Any] = json.loads(
    (BUNDLED_CHECKPOINT / "vision_tower" / "preprocessor_config.json").read_text()
)
CLIPS = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": True, "crop_size": {"height": 64, "width": 64}}


@pytest.mark.parametrize("more", [{}, {**CLIPS, "size": {"shortest_edge": 64}}], ids=["siglip", "clip"])
def test_damaged_image_processor_file_is_one_error_naming_file_and_field(more: dict, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    held, loaded = PREPROCESSOR | more, 0
    contents = [(json.dumps(changed(held, path, new)).encode(), (path, new)) for path, new in changes(held)]
    for content, what in [*contents, *((content, name) for name, content in BYTES.items() if name != "deep")]:
        file.write_bytes(content)
        try:
            processor = load_image_processor(tmp_path)
            loaded += 1
            if loaded % 4 == 0:
                assert preprocess_images([Image.new("RGB", (5, 9))], processor, "pad").isfinite().all(), what
        except (ImageError, LoadError) as error:
            assert len(str(error)) < 500, what
            field = what[0][0] if isinstance(what, tuple) and what[0] else ""
            no_json = re.search("is not a finite number|half of a character", str(error))
            assert "preprocessor_config.json" in str(error) and (no_json or field in str(error)), (what, str(error))
    assert 20 < loaded < len(contents) / 2


NONSENSE = [("image_std", 0), ("image_std", [0.5, 0, 0.5]), ("image_std", -1), ("image_mean", "nan")]
NONSENSE += [("size", {"height": 0, "width": 5}), ("size", -5), ("size", {"shortest_edge": 10**9})]


@pytest.mark.parametrize("field, value", [*NONSENSE, ("rescale_factor", 0), ("resample", 9)], ids=str)
def test_invalid_numbers_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {field: value}))
    with pytest.raises(ImageError, match=rf"preprocessor_config\.json is no image processor: {field} is .*, expected"):
        load_image_processor(tmp_path)
