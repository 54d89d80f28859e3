"""Read generation_config.json: how a model samples, when an answer ends, and how long it may get.

As in Hugging Face, an argument of the caller counts first, then this file, then a default. The file beside the model's
config.json counts before that in the language model's folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_triton.files.reading import LoadError, read_json
from vila_triton.limits import COUNT, COUNT_OR_ZERO, Limits

GENERATION_CONFIG_NAME = "generation_config.json"
DEFAULT_NEW_TOKENS = 128
POSITIVE_FACTOR = Limits(float, 1e-6, 1e6)  # below it logits become infinite
ARGUMENT_LIMITS = {  # of the arguments of a call
    "max_new_tokens": COUNT,
    "temperature": POSITIVE_FACTOR,
    "top_k": COUNT,
    "top_p": Limits(float, 0, 1, exclude_minimum=True),
    "repetition_penalty": POSITIVE_FACTOR,
}
FILE_LIMITS = ARGUMENT_LIMITS | {
    "temperature": Limits(float, 0, 1e6),
    "top_k": COUNT_OR_ZERO,
    "max_length": Limits(int, 1, 2**31 - 1),
}
TOKEN_FIELDS = ("eos_token_id", "pad_token_id", "bos_token_id")
SAMPLING_FIELDS = ("temperature", "top_k", "top_p")  # have an effect only with do_sample
NEUTRAL_VALUES = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
HONORED_FIELDS = ("do_sample", "repetition_penalty", "max_new_tokens", "max_length", *SAMPLING_FIELDS)
NEUTRAL_OTHERS: dict[str, float] = dict.fromkeys(
    ("num_beams", "num_beam_groups", "num_return_sequences", "use_cache"), 1
)  # besides 0
NEUTRAL_OTHERS |= dict.fromkeys(("length_penalty", "typical_p", "encoder_repetition_penalty"), 1)


def read_generation_config(folders: Sequence[Path], vocab_size: int) -> dict[str, Any]:
    """Read the files of these folders into one config, where the first folder counts most; null counts as absent.

    Errors: `LoadError` naming file and field, for invalid values.
    """
    config: dict[str, Any] = {}
    for file in reversed([folder / GENERATION_CONFIG_NAME for folder in folders]):
        if file.exists():
            values = {name: value for name, value in read_json(file).items() if value is not None}
            for name, value in values.items():
                if expected := expected_instead(name, value, vocab_size):
                    raise LoadError(f"{file}: {name} is {str(value)[:60]}, expected {expected}")
            if values.get("do_sample") and (temperature := values.get("temperature", 1)) < POSITIVE_FACTOR.minimum:
                raise LoadError(f"{file}: temperature is {temperature} and do_sample true, which contradict each other")
            config |= values
    if isinstance(config.get("pad_token_id"), int) and config["pad_token_id"] < 0:  # early LLaMAs: no padding token
        del config["pad_token_id"]
    return config


def expected_instead(name: str, value: Any, vocab_size: int) -> str | None:
    """Describe what the value of a field must be, None if it is that."""
    if name == "do_sample":
        return None if isinstance(value, bool) else "true or false"
    if name in FILE_LIMITS:
        return None if FILE_LIMITS[name].contains(value) else str(FILE_LIMITS[name])
    if name in TOKEN_FIELDS:
        ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
        minimum = -1 if name == "pad_token_id" else 0
        if not all(isinstance(i, int) and not isinstance(i, bool) and minimum <= i < vocab_size for i in ids):
            return f"the id of a token below {vocab_size}" + (", or several" if name == "eos_token_id" else "")
    return None


def ignored_settings(config: Mapping[str, Any]) -> list[str]:
    """The settings of a config that would change answers and are not supported, as "name=value"."""
    known = ("transformers_version", *HONORED_FIELDS, *TOKEN_FIELDS)
    others = {name: value for name, value in config.items() if not name.startswith("_") and name not in known}
    return [f"{name}={value!r}"[:60] for name, value in others.items() if value and value != NEUTRAL_OTHERS.get(name)]


def effective_settings(config: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a config that have an effect beside the arguments of a call."""
    settings = sampling_arguments(config, arguments, 0, 2**31)
    defaults = sampling_arguments({}, arguments, 0, 2**31)
    changed = {name for name in settings if name != "do_sample" and settings[name] != defaults.get(name)}
    changed |= {"max_length"} if changed - config.keys() else set()  # it became a number of new tokens
    return {name: config[name] for name in HONORED_FIELDS if name in changed & config.keys()}


def sampling_arguments(
    config: Mapping[str, Any], arguments: Mapping[str, Any], prompt_length: int, context_length: int
) -> dict[str, Any]:
    """Merge arguments that are not None and a config into arguments of `SamplingParams.from_generate_kwargs`.

    prompt_length: the longest prompt's tokens; context_length: the model's.
    Errors: ValueError for a prompt that leaves nothing of the config's max_length.
    """
    arguments = {name: value for name, value in arguments.items() if value is not None or name == "eos_token_id"}
    from_file = {name: config.get(name) for name in ("do_sample", *NEUTRAL_VALUES)}
    settings = {name: x for name, x in from_file.items() if x not in (None, NEUTRAL_VALUES.get(name))} | arguments
    if not settings.get("do_sample"):
        settings = {name: value for name, value in settings.items() if name in arguments or name not in SAMPLING_FIELDS}
    if "max_new_tokens" not in settings and "max_new_tokens" in config:
        settings["max_new_tokens"] = config["max_new_tokens"]
    elif "max_new_tokens" not in settings and "max_length" in config:
        limit = min(config["max_length"], context_length)
        if limit <= prompt_length:
            raise ValueError(
                f"the prompt has {prompt_length} positions, but max_length is {config['max_length']} and the model's "
                f"context {context_length}; shorten the prompt or say max_new_tokens"
            )
        settings["max_new_tokens"] = limit - prompt_length
    return {"max_new_tokens": DEFAULT_NEW_TOKENS} | settings
