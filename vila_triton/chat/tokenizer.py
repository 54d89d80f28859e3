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

from ..files.reading import LoadError, read_json, require_contained, short_repr

SENTENCEPIECE_FILE, TOKENIZER_FILE = (
    "tokenizer.model",
    "tokenizer.json",
)  # SentencePiece's, and that of Hugging Face's tokenizers
CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
SPECIAL_TOKEN_FIELDS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
EXTRA_TOKEN_FIELDS = ("additional_special_tokens", "extra_special_tokens")
LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")  # None: what a llama's folder means that names no class
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in llm/ of a folder, or in the folder if there is no llm/. Errors: `LoadError` naming the file."""
    directory = folder / "llm" if (folder / "llm").is_dir() else folder
    if directory.is_dir():
        require_contained(folder, directory)
    config = read_optional_json(directory / CONFIG_FILE)
    with as_load_error(directory / CONFIG_FILE):
        options = tokenizer_options(config)
    tokenizer_class = config.get("tokenizer_class")
    is_sentencepiece = (
        (directory / SENTENCEPIECE_FILE).exists()
        and tokenizer_class in LLAMA_CLASSES
        and not is_tiktoken(directory / SENTENCEPIECE_FILE)
    )
    if not is_sentencepiece and not (directory / TOKENIZER_FILE).exists():
        if (directory / SENTENCEPIECE_FILE).exists():
            reason = (
                f"{CONFIG_FILE} says it is of class {tokenizer_class!r}"
                if tokenizer_class not in LLAMA_CLASSES
                else "it is tiktoken's"
            )
            raise LoadError(
                f"{directory / SENTENCEPIECE_FILE} is no SentencePiece model of a LLaMA ({reason}), and there is no {TOKENIZER_FILE}"
            )
        raise LoadError(f"{directory} holds no tokenizer: neither {SENTENCEPIECE_FILE} nor {TOKENIZER_FILE}")
    if "added_tokens_decoder" not in options:
        options |= legacy_options(directory)
    with as_load_error(directory / (SENTENCEPIECE_FILE if is_sentencepiece else TOKENIZER_FILE)):
        tokenizer = (
            load_sentencepiece(directory / SENTENCEPIECE_FILE, options)
            if is_sentencepiece
            else load_tokenizer_json(directory / TOKENIZER_FILE, tokenizer_class in LLAMA_CLASSES, options)
        )
        for text in ("", "a b\n", *map(str, tokenizer.all_special_tokens)):  # what cannot do this cannot do anything
            tokenizer.decode(tokenizer(text).input_ids)
    return tokenizer


@contextmanager
def as_load_error(file: Path) -> Iterator[None]:
    """Errors: `LoadError` naming the file, whatever goes wrong inside."""
    try:
        yield
    except (LoadError, MemoryError):
        raise
    except Exception as error:
        raise LoadError(f"{file} cannot be used: {shorten_error(error)}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust, in the tokenizers library
            raise
        raise LoadError(f"{file} cannot be used: {shorten_error(error)}") from None


def shorten_error(error: BaseException) -> str:
    """The first words of an error, with its kind if it says little."""
    message = " ".join(str(error).split())
    message = message if len(message) < 200 else f"{message[:200]} ..."
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"


def read_optional_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file that need not be there. Errors: `LoadError`."""
    with as_load_error(file):
        return read_json(file) if file.exists() else {}


def is_tiktoken(file: Path) -> bool:
    """Whether a file is lines of a token in base64 and its number, as Llama 3's tokenizer.model is."""
    with file.open("rb") as stream:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", stream.read(1000)) is not None


def tokenizer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says, of what counts here. Errors: ValueError naming the field."""
    options: dict[str, Any] = {
        name: parse_token(config[name], name) for name in SPECIAL_TOKEN_FIELDS if config.get(name) is not None
    }
    require_type(config.get("tokenizer_class") or "", str, "tokenizer_class", "a name")
    for name in EXTRA_TOKEN_FIELDS:
        if (value := config.get(name)) is not None:
            tokens = list(value.values()) if isinstance(value, dict) else value
            options["extra_special_tokens"] = [
                parse_token(x, name) for x in require_type(tokens, list, name, "a list of tokens")
            ]
    decoder = require_type(config.get("added_tokens_decoder") or {}, dict, "added_tokens_decoder", "an object")
    if decoder:
        field_names = {key: f"added_tokens_decoder[{key!r}]" for key in decoder}
        if wrong_fields := [name for key, name in field_names.items() if not re.fullmatch(r"\d{1,9}", key)]:
            raise ValueError(f"{wrong_fields[0]}: expected the id of a token as its key")
        objects = {key: require_type(decoder[key], dict, name, "an object") for key, name in field_names.items()}
        options["added_tokens_decoder"] = {
            int(key): parse_token(objects[key], name) for key, name in field_names.items()
        }
    for name in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces"):
        if config.get(name) is not None:
            options[name] = require_type(config[name], bool, name, "true or false")
    if (padding_side := config.get("padding_side")) is not None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is {padding_side!r}, expected 'left' or 'right'")
        options["padding_side"] = padding_side
    if (max_length := config.get("model_max_length")) is not None:
        if isinstance(max_length, bool) or not isinstance(max_length, (int, float)) or not 0 < max_length < math.inf:
            raise ValueError(f"model_max_length is {max_length!r}, expected a number above 0")
        options["model_max_length"] = int(max_length)
    if isinstance(config.get("chat_template"), str):
        options["chat_template"] = config["chat_template"]
    return options


def legacy_options(directory: Path) -> dict[str, Any]:
    """What older versions write beside tokenizer_config.json: special_tokens_map.json and added_tokens.json."""
    options: dict[str, Any] = {}
    special_tokens_map, added_tokens = (
        read_optional_json(directory / SPECIAL_TOKENS_FILE),
        read_optional_json(directory / ADDED_TOKENS_FILE),
    )
    with as_load_error(directory / SPECIAL_TOKENS_FILE):
        options |= tokenizer_options(
            {
                name: special_tokens_map[name]
                for name in (*SPECIAL_TOKEN_FIELDS, *EXTRA_TOKEN_FIELDS)
                if name in special_tokens_map
            }
        )
    special_texts = {str(options[name]) for name in SPECIAL_TOKEN_FIELDS if name in options} | {
        *map(str, options.get(EXTRA_TOKEN_FIELDS[1], ()))
    }
    with as_load_error(directory / ADDED_TOKENS_FILE):
        for text, i in added_tokens.items():
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 10**9:
                raise ValueError(f"{short_repr(text)} is {short_repr(i)}, expected the id of a token")
        flags = {
            text: {"special": text in special_texts, "normalized": text not in special_texts} for text in added_tokens
        }
        decoder = {
            i: parse_token({"content": text, **flags[text]}, short_repr(text)) for text, i in added_tokens.items()
        }
    return options | ({"added_tokens_decoder": decoder} if decoder else {})


def parse_token(value: Any, name: str) -> Any:
    """A token that a file writes as a text or as an object. Errors: ValueError naming the field."""
    from transformers import AddedToken

    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise ValueError(f"{name} is {short_repr(value)}, expected a token: a text, or an object with its content")
    if isinstance(value, str):
        return value
    flags = {
        flag: require_type(value[flag], bool, f"{name} {flag}", "true or false")
        for flag in TOKEN_FLAGS
        if flag in value
    }
    return AddedToken(content, **flags)


def require_type(value: Any, expected_type: type, name: str, description: str) -> Any:
    """Errors: ValueError naming the field, for a value of another kind."""
    if not isinstance(value, expected_type):
        raise ValueError(f"{name} is {short_repr(value)}, expected {description}")
    return value


def load_sentencepiece(file: Path, options: Mapping[str, Any]) -> Any:
    """LLaMA's tokenizer over a SentencePiece model."""
    from .llama_tokenizer import LlamaTokenizer

    if not file.stat().st_size:
        raise ValueError("it is empty, expected a SentencePiece model")
    return LlamaTokenizer(vocab_file=str(file), **options)


def load_tokenizer_json(file: Path, is_llama: bool, options: Mapping[str, Any]) -> Any:
    """The tokenizer that a tokenizer.json is. Of a LLaMA's, a text's first word begins with a space, and no later one
    that stands behind a special token, whichever way it was converted: as VILA was trained.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    values = read_json(file)
    check_tokenizer_json(values)
    patched = values | prepend_space_once(values) if is_llama else values
    backend = Tokenizer.from_str(json.dumps(patched, ensure_ascii=False)) if patched != values else None
    source: dict[str, Any] = {"tokenizer_file": str(file)} if backend is None else {"tokenizer_object": backend}
    options = {name: value for name, value in options.items() if name not in ("add_bos_token", "add_eos_token")}
    tokenizer = PreTrainedTokenizerFast(**source, **options)  # its post_processor says what BOS it adds
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def check_tokenizer_json(values: Mapping[str, Any]) -> None:
    """Errors: ValueError for what the tokenizers library takes and then ends the process, or prints a trace, over."""
    model, post_processor = values.get("model"), values.get("post_processor") or {}
    if not isinstance(model, dict) or not model.get("vocab"):
        raise ValueError("model is without a vocab, expected one of tokens")
    if model.get("continuing_subword_prefix") and model.get("merges"):
        raise ValueError("model continuing_subword_prefix is not supported with merges, expected null")
    require_type(post_processor, dict, "post_processor", "an object")
    for step in [post_processor, *(post_processor.get("processors") or ())]:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            special_tokens = step.get("special_tokens") or {}
            parts = [part.get("SpecialToken", {}).get("id") for part in [*step["single"], *step["pair"]]]
            if missing := [part for part in parts if part is not None and part not in special_tokens]:
                raise ValueError(f"post_processor special_tokens is without {short_repr(missing[0])}, which it adds")


def prepend_space_once(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a tokenizer.json by which a space is put before a text, and not before every part of it."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    normalizers = (values.get("normalizer") or {}).get("normalizers")
    if normalizers == [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]:
        return {"normalizer": None, "pre_tokenizer": metaspace | {"prepend_scheme": "first"}}
    pre_tokenizer = values.get("pre_tokenizer")
    if isinstance(pre_tokenizer, dict) and {**metaspace, **pre_tokenizer} == metaspace | {
        "prepend_scheme": pre_tokenizer.get("prepend_scheme")
    }:
        return (
            {"pre_tokenizer": pre_tokenizer | {"prepend_scheme": "first"}}
            if pre_tokenizer.get("prepend_scheme") == "always"
            else {}
        )
    return {}
