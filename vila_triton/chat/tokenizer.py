"""The tokenizer of a checkpoint, from the files that are there: tokenizer.model as VILA reads it, or tokenizer.json.

Nothing goes through transformers' Auto classes, which may ask whether they may run code that a file names: what is read
is JSON of fields known by name, and a vocabulary. Whatever is wrong with the files ends in one `LoadError`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.reading import LoadError, read_json, require_own, shown

MODEL, JSON = "tokenizer.model", "tokenizer.json"  # SentencePiece's, and that of Hugging Face's tokenizers
CONFIG, NAMES, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
EXTRA = ("additional_special_tokens", "extra_special_tokens")
LLAMA = (None, "LlamaTokenizer", "LlamaTokenizerFast")  # None: what a llama's folder means that names no class
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in llm/ of a folder, or in the folder if there is no llm/. Errors: `LoadError` naming the file."""
    place = folder / "llm" if (folder / "llm").is_dir() else folder
    if place.is_dir():
        require_own(folder, place)
    config = values_of(place / CONFIG)
    with naming(place / CONFIG):
        said = settings(config)
    kind = config.get("tokenizer_class")
    pieces = (place / MODEL).exists() and kind in LLAMA and not is_tiktoken(place / MODEL)
    if not pieces and not (place / JSON).exists():
        if (place / MODEL).exists():
            why = f"{CONFIG} says it is of class {kind!r}" if kind not in LLAMA else "it is tiktoken's"
            raise LoadError(f"{place / MODEL} is no SentencePiece model of a LLaMA ({why}), and there is no {JSON}")
        raise LoadError(f"{place} holds no tokenizer: neither {MODEL} nor {JSON}")
    if "added_tokens_decoder" not in said:
        said |= legacy(place)
    with naming(place / (MODEL if pieces else JSON)):
        tokenizer = of_pieces(place / MODEL, said) if pieces else of_json(place / JSON, kind in LLAMA, said)
        for text in ("", "a b\n", *map(str, tokenizer.all_special_tokens)):  # what cannot do this cannot do anything
            tokenizer.decode(tokenizer(text).input_ids)
    return tokenizer


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Errors: `LoadError` naming the file, whatever goes wrong inside."""
    try:
        yield
    except (LoadError, MemoryError):
        raise
    except Exception as error:
        raise LoadError(f"{file} cannot be used: {shortened(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, in the tokenizers library
            raise
        raise LoadError(f"{file} cannot be used: {shortened(error)}") from None


def shortened(error: BaseException) -> str:
    """The first words of an error, with its kind if it says little."""
    words = " ".join(str(error).split())
    words = words if len(words) < 200 else f"{words[:200]} ..."
    return words if isinstance(error, ValueError) and words else f"{type(error).__name__}: {words}"


def values_of(file: Path) -> dict[str, Any]:
    """The object in a JSON file that need not be there. Errors: `LoadError`."""
    with naming(file):
        return read_json(file) if file.exists() else {}


def is_tiktoken(file: Path) -> bool:
    """Whether a file is lines of a token in base64 and its number, as Llama 3's tokenizer.model is."""
    with file.open("rb") as opened:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", opened.read(1000)) is not None


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says, of what counts here. Errors: ValueError naming the field."""
    said: dict[str, Any] = {name: token(config[name], name) for name in NAMED if config.get(name) is not None}
    expected(config.get("tokenizer_class") or "", str, "tokenizer_class", "a name")
    for name in EXTRA:
        if (value := config.get(name)) is not None:
            listed = list(value.values()) if isinstance(value, dict) else value
            said["extra_special_tokens"] = [token(x, name) for x in expected(listed, list, name, "a list of tokens")]
    decoder = expected(config.get("added_tokens_decoder") or {}, dict, "added_tokens_decoder", "an object")
    if decoder:
        named = {key: f"added_tokens_decoder[{key!r}]" for key in decoder}
        if wrong := [name for key, name in named.items() if not re.fullmatch(r"\d{1,9}", key)]:
            raise ValueError(f"{wrong[0]}: expected the id of a token as its key")
        objects = {key: expected(decoder[key], dict, name, "an object") for key, name in named.items()}
        said["added_tokens_decoder"] = {int(key): token(objects[key], name) for key, name in named.items()}
    for name in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"):
        if config.get(name) is not None:
            said[name] = expected(config[name], bool, name, "true or false")
    if (side := config.get("padding_side")) is not None:
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}, expected 'left' or 'right'")
        said["padding_side"] = side
    if (longest := config.get("model_max_length")) is not None:
        if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not 0 < longest < math.inf:
            raise ValueError(f"model_max_length is {longest!r}, expected a number above 0")
        said["model_max_length"] = int(longest)
    if isinstance(config.get("chat_template"), str):
        said["chat_template"] = config["chat_template"]
    return said


def legacy(place: Path) -> dict[str, Any]:
    """What older versions write beside tokenizer_config.json: special_tokens_map.json and added_tokens.json."""
    said: dict[str, Any] = {}
    names, added = values_of(place / NAMES), values_of(place / ADDED)
    with naming(place / NAMES):
        said |= settings({name: names[name] for name in (*NAMED, *EXTRA) if name in names})
    special = {str(said[name]) for name in NAMED if name in said} | {*map(str, said.get(EXTRA[1], ()))}
    with naming(place / ADDED):
        for text, i in added.items():
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 10**9:
                raise ValueError(f"{shown(text)} is {shown(i)}, expected the id of a token")
        flags = {text: {"special": text in special, "normalized": text not in special} for text in added}
        decoder = {i: token({"content": text, **flags[text]}, shown(text)) for text, i in added.items()}
    return said | ({"added_tokens_decoder": decoder} if decoder else {})


def token(value: Any, name: str) -> Any:
    """A token that a file writes as a text or as an object. Errors: ValueError naming the field."""
    from transformers import AddedToken

    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise ValueError(f"{name} is {shown(value)}, expected a token: a text, or an object with its content")
    if isinstance(value, str):
        return value
    flags = {flag: expected(value[flag], bool, f"{name} {flag}", "true or false") for flag in FLAGS if flag in value}
    return AddedToken(content, **flags)


def expected(value: Any, kind: type, name: str, words: str) -> Any:
    """Errors: ValueError naming the field, for a value of another kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {shown(value)}, expected {words}")
    return value


def of_pieces(file: Path, said: Mapping[str, Any]) -> Any:
    """LLaMA's tokenizer over a SentencePiece model."""
    from .llama_tokenizer import LlamaTokenizer

    if not file.stat().st_size:
        raise ValueError("it is empty, expected a SentencePiece model")
    return LlamaTokenizer(vocab_file=str(file), **said)


def of_json(file: Path, llama: bool, said: Mapping[str, Any]) -> Any:
    """The tokenizer that a tokenizer.json is. Of a LLaMA's, a text's first word begins with a space, and no later one
    that stands behind a special token, whichever way it was converted: as VILA was trained.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    values = read_json(file)
    check(values)
    changed = values | begun_once(values) if llama else values
    backend = Tokenizer.from_str(json.dumps(changed, ensure_ascii=False)) if changed != values else None
    source: dict[str, Any] = {"tokenizer_file": str(file)} if backend is None else {"tokenizer_object": backend}
    said = {name: value for name, value in said.items() if name not in ("add_bos_token", "add_eos_token")}
    tokenizer = PreTrainedTokenizerFast(**source, **said)  # its post_processor says what BOS it adds
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def check(values: Mapping[str, Any]) -> None:
    """Errors: ValueError for what the tokenizers library takes and then ends the process, or prints a trace, over."""
    model, steps = values.get("model"), values.get("post_processor") or {}
    if not isinstance(model, dict) or not model.get("vocab"):
        raise ValueError("model is without a vocab, expected one of tokens")
    if model.get("continuing_subword_prefix") and model.get("merges"):
        raise ValueError("model continuing_subword_prefix is not supported with merges, expected null")
    expected(steps, dict, "post_processor", "an object")
    for step in [steps, *(steps.get("processors") or ())]:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            known = step.get("special_tokens") or {}
            parts = [part.get("SpecialToken", {}).get("id") for part in [*step["single"], *step["pair"]]]
            if missing := [part for part in parts if part is not None and part not in known]:
                raise ValueError(f"post_processor special_tokens is without {shown(missing[0])}, which it adds")


def begun_once(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a tokenizer.json by which a space is put before a text, and not before every part of it."""
    before = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    steps = (values.get("normalizer") or {}).get("normalizers")
    if steps == [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]:
        return {"normalizer": None, "pre_tokenizer": before | {"prepend_scheme": "first"}}
    own = values.get("pre_tokenizer")
    if isinstance(own, dict) and {**before, **own} == before | {"prepend_scheme": own.get("prepend_scheme")}:
        return {"pre_tokenizer": own | {"prepend_scheme": "first"}} if own.get("prepend_scheme") == "always" else {}
    return {}
