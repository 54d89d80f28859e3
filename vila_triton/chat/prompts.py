"""Text with pictures in it to token ids.

Rounds are tokenized one by one, since what came before is in the cache. So that they give the ids that the whole
conversation would, two things are done as upstream's training did them. The pieces around a picture are tokenized each
on its own. And a round is tokenized behind the token that ended the answer before it, which is then left out: in a
SentencePiece vocabulary a text begins with a space, but "USER" right after "</s>" has none and is another token.
An answer keeps the ids it was generated with: should the tokenizer spell its text otherwise, they are not replaced.
"""

from collections.abc import Callable
from typing import Any

from ..models.vila import IMAGE_TOKEN_INDEX
from .special_tokens import Names, control, renamed
from .templates import Template, is_token

IMAGE = "<image>"
SPACE = "▁"  # how SentencePiece writes it


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


def tokenize(text: str, tokenizer: Any, first: bool = True, names: Names | None = None) -> list[int]:
    """Token ids of a text, -200 for each `<image>`; the text between is tokenized piecewise, as VILA does.

    `first`: the text begins with the BOS, once, if it says so itself or if the tokenizer adds one. Else it goes on from
    another: the space that a tokenizer puts before a text does not come before a special token.
    `names`: the special tokens are not spelled as usual, but by these.
    Errors: ValueError for what is no text, as half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is no character ({error.reason})") from None
    pieces = [spell(piece, tokenizer, names) for piece in text.split(IMAGE)]
    bos = [tokenizer.bos_token_id]
    adds = first and tokenizer("").input_ids[:1] == bos != [None]
    ids = bos if adds and pieces[0][:1] != bos else []
    if not first and len(pieces[0]) > 1:
        space, token = tokenizer.convert_ids_to_tokens(pieces[0][:2])
        if space == SPACE and text.startswith(names.of.get(token, token) if names else token):
            pieces[0] = pieces[0][1:]
    for i, piece in enumerate(pieces):
        ids = ids + [IMAGE_TOKEN_INDEX] * bool(i) + piece
    return ids


def spell(piece: str, tokenizer: Any, names: Names | None = None) -> list[int]:
    """Ids of a text without pictures, which lose none of the spaces that it begins with.

    Tokenizers that put a space before a text only if it has none would lose one: they are given one more.
    """
    ids = names.ids if names else lambda text: tokenizer(text, add_special_tokens=False).input_ids
    if piece.startswith((" ", SPACE)) and ids("a") == ids(" a") != ids("  a"):
        piece = f" {piece}"
    return ids(piece) if piece else []


def first_round(question: str, template: Template, tokenizer: Any) -> list[int]:
    """Ids of a first question, up to where its answer begins."""
    return typed(question, template, tokenizer, Template.first)


def next_round(question: str, template: Template, tokenizer: Any) -> list[int]:
    """Ids of a later question; they come behind those of `closing`."""
    ids = typed(question, template, tokenizer, lambda how, text: how.end + how.round(text), first=False)
    return ids[len(closing(template, tokenizer)) :]


def typed(
    question: str, template: Template, tokenizer: Any, write: Callable[[Template, str], str], first: bool = True
) -> list[int]:
    """Ids of what a template makes of a question. Special tokens are only those of the template: what a user types is
    text, whatever it spells.
    """
    ids = tokenize(write(template, question), tokenizer, first)
    special = {*control(tokenizer, template).values()}
    own = tokenize(write(template, ""), tokenizer, first)
    if sum(i in special for i in ids) == sum(i in special for i in own):
        return ids
    names = renamed(tokenizer, template)
    return tokenize(write(template.spelled(names.of), question), tokenizer, first, names)


def closing(template: Template, tokenizer: Any, last: bool = False) -> list[int]:
    """What ends an answer, whatever the model ended it with; or the last answer of a finished conversation."""
    return tokenize((last and template.finish) or template.end, tokenizer, first=False)


def stops(template: Template, tokenizer: Any, *configured: int | list[int] | None) -> list[int]:
    """Ids that end an answer: the template's, the tokenizer's and those of the model's configs."""
    named = [tokenizer.convert_tokens_to_ids(text) for text in template.stops if is_token(text, tokenizer)]
    ids = [*named, tokenizer.eos_token_id]
    for eos in configured:
        ids += eos if isinstance(eos, list) else [eos]
    return list(dict.fromkeys(i for i in ids if i is not None))
