"""Text with pictures in it to token ids.

Rounds are tokenized one by one, since what came before is in the cache. So that they give the ids that the whole
conversation would, two things are done as upstream's training did them. The pieces around a picture are tokenized each
on its own. And a round is tokenized behind the token that ended the answer before it, which is then left out: in a
SentencePiece vocabulary a text begins with a space, but "USER" right after "</s>" has none and is another token.
An answer keeps the ids it was generated with: should the tokenizer spell its text otherwise, they are not replaced.
"""

from pathlib import Path
from typing import Any

from .models.vila import IMAGE_TOKEN_INDEX
from .templates import Template, is_token

IMAGE = "<image>"


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in llm/ of a folder, or in the folder if there is no llm/.

    legacy=False, as upstream has it: no space comes before what stands right behind a special token.
    """
    from transformers import AutoTokenizer

    place = folder / "llm" if (folder / "llm").is_dir() else folder
    return AutoTokenizer.from_pretrained(place, legacy=False, trust_remote_code=False)


def with_pictures(question: str, pictures: int) -> str:
    """The question with a place for each picture: before it, unless it holds `<image>` itself.

    Errors: ValueError if it holds another number of places than there are pictures.
    """
    places = question.count(IMAGE)
    if not places:
        return f"{IMAGE}\n" * pictures + question
    if places != pictures:
        raise ValueError(
            f"the question has places for {places} pictures, but {pictures} were given; "
            f"write {IMAGE} once for each, or not at all"
        )
    return question


def tokenize(text: str, tokenizer: Any, first: bool = True) -> list[int]:
    """Token ids of a text, -200 for each `<image>`; the text between is tokenized piecewise.

    `first`: the text begins with the BOS, once, if it says so itself or if the tokenizer adds one.
    """
    pieces = [tokenizer(piece, add_special_tokens=False).input_ids if piece else [] for piece in text.split(IMAGE)]
    bos = [tokenizer.bos_token_id]
    adds = first and tokenizer("").input_ids[:1] == bos != [None]
    ids = bos if adds and pieces[0][:1] != bos else []
    for i, piece in enumerate(pieces):
        ids = ids + [IMAGE_TOKEN_INDEX] * bool(i) + piece
    return ids


def first_round(question: str, template: Template, tokenizer: Any) -> list[int]:
    """Ids of a first question, up to where its answer begins."""
    return tokenize(template.first(question), tokenizer)


def next_round(question: str, template: Template, tokenizer: Any) -> list[int]:
    """Ids of a later question; they come behind those of `closing`."""
    ids = tokenize(template.end + template.round(question), tokenizer, first=False)
    return ids[len(closing(template, tokenizer)) :]


def closing(template: Template, tokenizer: Any) -> list[int]:
    """What ends an answer, whatever the model ended it with."""
    return tokenize(template.end, tokenizer, first=False)


def stops(template: Template, tokenizer: Any, config: dict[str, Any]) -> list[int]:
    """Ids that end an answer: the template's, the tokenizer's and those of llm/config.json."""
    named = [tokenizer.convert_tokens_to_ids(text) for text in template.stops if is_token(text, tokenizer)]
    eos = config.get("eos_token_id")
    ids = [*named, tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    return list(dict.fromkeys(i for i in ids if i is not None))
