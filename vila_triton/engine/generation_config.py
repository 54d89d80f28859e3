"""What generation_config.json says of how a model answers: when it ends, how it draws, and how long.

As in Hugging Face: what a caller says counts first, then this file, then a default; one that stands beside the whole
model's config.json before that of the language model's folder.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files.reading import LoadError, read_json
from ..limits import COUNT, MANY, Limits

FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 128
FACTOR = Limits(float, 1e-6, 1e6)  # below it logits become infinite
NUMBERS = {  # that an answer may be asked for with
    "max_new_tokens": COUNT,
    "temperature": FACTOR,
    "top_k": COUNT,
    "top_p": Limits(float, 0, 1, above=True),
    "repetition_penalty": FACTOR,
}
IN_FILE = NUMBERS | {"temperature": Limits(float, 0, 1e6), "top_k": MANY, "max_length": Limits(int, 1, 2**31 - 1)}
TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
DRAWN = ("temperature", "top_k", "top_p")  # mean something only where tokens are drawn
OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
ANSWERING = ("do_sample", "repetition_penalty", "max_new_tokens", "max_length", *DRAWN)
OTHERS = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "length_penalty": 1.0, "typical_p": 1.0}
OTHERS |= {"encoder_repetition_penalty": 1.0, "use_cache": True}  # values of the rest that change nothing, beside 0


def read_generation(folders: Sequence[Path], vocab_size: int) -> dict[str, Any]:
    """What the files in these folders say, the first before the later; null says nothing.

    Errors: `LoadError` naming file and field, for values that mean nothing.
    """
    said: dict[str, Any] = {}
    for file in reversed([folder / FILE for folder in folders]):
        if file.exists():
            values = {name: value for name, value in read_json(file).items() if value is not None}
            for name, value in values.items():
                if wanted := wrong(name, value, vocab_size):
                    raise LoadError(f"{file}: {name} is {str(value)[:60]}, expected {wanted}")
            if values.get("do_sample") and (heat := values.get("temperature", 1)) < FACTOR.least:
                raise LoadError(f"{file}: temperature is {heat} and do_sample true, which contradict each other")
            said |= values
    if isinstance(said.get("pad_token_id"), int) and said["pad_token_id"] < 0:  # none, as LLaMA's first versions say it
        del said["pad_token_id"]
    return said


def wrong(name: str, value: Any, vocab_size: int) -> str | None:
    """What is expected instead of a value, if it is no value of that name."""
    if name == "do_sample":
        return None if isinstance(value, bool) else "true or false"
    if name in IN_FILE:
        return None if IN_FILE[name].hold(value) else str(IN_FILE[name])
    if name in TOKENS:
        ids = value if name == "eos_token_id" and isinstance(value, list) and value else [value]
        low = -1 if name == "pad_token_id" else 0
        fine = all(isinstance(i, int) and not isinstance(i, bool) and low <= i < vocab_size for i in ids)
        return None if fine else f"the id of a token below {vocab_size}" + (", or several" if name == TOKENS[0] else "")
    return None


def ignored(said: Mapping[str, Any]) -> list[str]:
    """What of it would change answers and is not honoured here."""
    named = (
        name for name in said if not name.startswith("_") and name not in ("transformers_version", *ANSWERING, *TOKENS)
    )
    return [f"{name}={said[name]!r}"[:60] for name in named if said[name] and said[name] != OTHERS.get(name)]


def decided(said: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What of it counts beside what was chosen."""
    how = settled(said, chosen, 0, 2**31)
    without = settled({}, chosen, 0, 2**31)
    changed = {name for name in how if name != "do_sample" and how[name] != without.get(name)}
    changed |= {"max_length"} if changed - said.keys() else set()  # it became a number of new tokens
    return {name: said[name] for name in ANSWERING if name in changed & said.keys()}


def settled(said: Mapping[str, Any], chosen: Mapping[str, Any], longest: int, context: int) -> dict[str, Any]:
    """Arguments of `Sampling.of`: those chosen that are not None, and what else the files say, for prompts of at most
    `longest` tokens in a context of so many.

    Errors: ValueError for a prompt that is longer than the files let it become.
    """
    chosen = {name: value for name, value in chosen.items() if value is not None or name == "eos_token_id"}
    names = ("do_sample", "repetition_penalty", *DRAWN)
    rest = {name: said[name] for name in names if said.get(name, OFF.get(name)) != OFF.get(name)}
    how = rest | chosen
    if not how.get("do_sample"):
        how = {name: value for name, value in how.items() if name in chosen or name not in DRAWN}
    if "max_new_tokens" not in how and "max_new_tokens" in said:
        how["max_new_tokens"] = said["max_new_tokens"]
    elif "max_new_tokens" not in how and "max_length" in said:
        limit = min(said["max_length"], context)
        if limit <= longest:
            raise ValueError(
                f"the prompt has {longest} positions, but max_length in {FILE} is {said['max_length']} and the model's "
                f"context {context}; shorten the prompt or say max_new_tokens"
            )
        how["max_new_tokens"] = limit - longest
    return {"max_new_tokens": DEFAULT_NEW_TOKENS} | how
