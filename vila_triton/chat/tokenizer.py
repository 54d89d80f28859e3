"""Load the tokenizer of a checkpoint from tokenizer.model, as VILA reads it, or from tokenizer.json.

transformers' Auto classes are not used, since they may ask to run code that a file names: only JSON fields known by
name and a vocabulary are read. Whatever is wrong with the files becomes a `LoadError`.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast

from ..files.reading import LoadError, read_json, require_contained, short_repr
from .llama_tokenizer import SPECIAL_TOKEN_FIELDS, LlamaTokenizer

SENTENCEPIECE_FILE, TOKENIZER_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE = "special_tokens_map.json", "added_tokens.json"  # written by older versions
EXTRA_TOKEN_FIELDS = ("additional_special_tokens", "extra_special_tokens")
LLAMA_CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast")  # None: no class is named
TOKEN_FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in llm/ of a folder, or in the folder if there is no llm/. Errors: `LoadError`."""
    directory = folder / "llm" if (folder / "llm").is_dir() else folder
    if directory.is_dir():
        require_contained(folder, directory)
    model_file, json_file, config_file = (
        directory / name for name in (SENTENCEPIECE_FILE, TOKENIZER_FILE, CONFIG_FILE)
    )
    config = read_optional_json(config_file)
    with as_load_error(config_file):
        options = tokenizer_options(config)
    tokenizer_class = config.get("tokenizer_class")
    is_llama = tokenizer_class in LLAMA_CLASSES
    is_sentencepiece = is_llama and model_file.exists() and not is_tiktoken(model_file)
    if not is_sentencepiece and not json_file.exists():
        if not model_file.exists():
            raise LoadError(f"{directory} holds no tokenizer: neither {SENTENCEPIECE_FILE} nor {TOKENIZER_FILE}")
        reason = "it is tiktoken's" if is_llama else f"{CONFIG_FILE} says it is of class {tokenizer_class!r}"
        raise LoadError(
            f"{model_file} is no SentencePiece model of a LLaMA ({reason}), and there is no {TOKENIZER_FILE}"
        )
    if "added_tokens_decoder" not in options:
        options |= legacy_options(directory)
    with as_load_error(model_file if is_sentencepiece else json_file):
        if is_sentencepiece:
            tokenizer = load_sentencepiece(model_file, options)
        else:
            tokenizer = load_tokenizer_json(json_file, is_llama, options)
        for text in (
            "",
            "a b\n",
            *map(str, tokenizer.all_special_tokens),
        ):  # tried now, so that an error names the file
            tokenizer.decode(tokenizer(text).input_ids)
    return tokenizer


@contextmanager
def as_load_error(file: Path) -> Iterator[None]:
    """Turn any exception inside into a `LoadError` that names the file."""
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
    """Return the message of an error in 200 characters, with its type unless it is a ValueError."""
    message = " ".join(str(error).split())
    message = message if len(message) < 200 else f"{message[:200]} ..."
    return message if isinstance(error, ValueError) and message else f"{type(error).__name__}: {message}"


def read_optional_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file, an empty one if there is no file. Errors: `LoadError`."""
    with as_load_error(file):
        return read_json(file) if file.exists() else {}


def is_tiktoken(file: Path) -> bool:
    """Return True for lines of a token in base64 and its id, as in Llama 3's tokenizer.model."""
    with file.open("rb") as stream:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", stream.read(1000)) is not None


def tokenizer_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """Validate the fields of tokenizer_config.json that are used here. Errors: ValueError naming the field."""
    options: dict[str, Any] = {
        name: parse_token(config[name], name) for name in SPECIAL_TOKEN_FIELDS if config.get(name) is not None
    }
    require_type(config.get("tokenizer_class") or "", str, "tokenizer_class", "a name")
    for name in EXTRA_TOKEN_FIELDS:
        if (value := config.get(name)) is not None:
            tokens = list(value.values()) if isinstance(value, dict) else value
            tokens = require_type(tokens, list, name, "a list of tokens")
            options["extra_special_tokens"] = [parse_token(x, name) for x in tokens]
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
    """Read special_tokens_map.json and added_tokens.json, which older versions write. Errors: `LoadError`."""
    special_file, added_file = directory / SPECIAL_TOKENS_FILE, directory / ADDED_TOKENS_FILE
    special_tokens, added_tokens = read_optional_json(special_file), read_optional_json(added_file)
    with as_load_error(special_file):
        names = (*SPECIAL_TOKEN_FIELDS, *EXTRA_TOKEN_FIELDS)
        options = tokenizer_options({name: special_tokens[name] for name in names if name in special_tokens})
    special = {str(options[name]) for name in SPECIAL_TOKEN_FIELDS if name in options}
    special |= {*map(str, options.get(EXTRA_TOKEN_FIELDS[1], ()))}
    decoder = {}
    with as_load_error(added_file):
        for text, i in added_tokens.items():
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 10**9:
                raise ValueError(f"{short_repr(text)} is {short_repr(i)}, expected the id of a token")
            value = {"content": text, "special": text in special, "normalized": text not in special}
            decoder[i] = parse_token(value, short_repr(text))
    return options | ({"added_tokens_decoder": decoder} if decoder else {})


def parse_token(value: Any, name: str) -> str | AddedToken:
    """Parse a token that a file has as a text or as an object. Errors: ValueError naming the field."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise ValueError(f"{name} is {short_repr(value)}, expected a token: a text, or an object with its content")
    if isinstance(value, str):
        return value
    names = [flag for flag in TOKEN_FLAGS if flag in value]
    return AddedToken(content, **{n: require_type(value[n], bool, f"{name} {n}", "true or false") for n in names})


def require_type(value: Any, expected_type: type, name: str, description: str) -> Any:
    """Return the value. Errors: ValueError, naming the field, if it has another type."""
    if not isinstance(value, expected_type):
        raise ValueError(f"{name} is {short_repr(value)}, expected {description}")
    return value


def load_sentencepiece(file: Path, options: Mapping[str, Any]) -> LlamaTokenizer:
    """Load LLaMA's tokenizer from a SentencePiece model."""
    if not file.stat().st_size:
        raise ValueError("it is empty, expected a SentencePiece model")
    return LlamaTokenizer(vocab_file=str(file), **options)


def load_tokenizer_json(file: Path, is_llama: bool, options: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """Load a tokenizer.json.

    LLaMA's is changed, if needed, so that a space is put before the first word of a text, but not before a word behind
    a special token, as VILA was trained.
    """
    values = read_json(file)
    check_tokenizer_json(values)
    patched = values | prepend_space_once(values) if is_llama else values
    if patched == values:
        source: dict[str, Any] = {"tokenizer_file": str(file)}
    else:
        source = {"tokenizer_object": Tokenizer.from_str(json.dumps(patched, ensure_ascii=False))}
    # The post-processor in the file determines which BOS and EOS are added.
    options = {name: value for name, value in options.items() if name not in ("add_bos_token", "add_eos_token")}
    tokenizer = PreTrainedTokenizerFast(**source, **options)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def check_tokenizer_json(values: Mapping[str, Any]) -> None:
    """Raise ValueError for what would make the tokenizers library end the process or print a trace."""
    model, post_processor = values.get("model"), values.get("post_processor") or {}
    if not isinstance(model, dict) or not model.get("vocab"):
        raise ValueError("model is without a vocab, expected one of tokens")
    if model.get("continuing_subword_prefix") and model.get("merges"):
        raise ValueError("model continuing_subword_prefix is not supported with merges, expected null")
    require_type(post_processor, dict, "post_processor", "an object")
    for step in [post_processor, *(post_processor.get("processors") or ())]:
        if isinstance(step, dict) and step.get("type") == "TemplateProcessing":
            special_tokens = step.get("special_tokens") or {}
            used = [piece.get("SpecialToken", {}).get("id") for piece in [*step["single"], *step["pair"]]]
            if missing := [token for token in used if token is not None and token not in special_tokens]:
                raise ValueError(f"post_processor special_tokens is without {short_repr(missing[0])}, which it adds")


def prepend_space_once(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a tokenizer.json to replace, so that a space is put before a text, not before each part."""
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    prepend_and_replace = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    if (values.get("normalizer") or {}).get("normalizers") == prepend_and_replace:
        return {"normalizer": None, "pre_tokenizer": metaspace}
    own = values.get("pre_tokenizer")
    is_metaspace = isinstance(own, dict) and {**metaspace, **own} == metaspace | {"prepend_scheme": "always"}
    return {"pre_tokenizer": {**own, "prepend_scheme": "first"}} if is_metaspace and own else {}
