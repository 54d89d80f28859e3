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
from .special_tokens import SpecialTokenAliases, alias_special_tokens, special_token_ids
from .templates import ChatTemplate, is_single_token

IMAGE_TOKEN = "<image>"
SPACE_SYMBOL = "▁"  # how SentencePiece writes it


def insert_image_tokens(question: str, num_images: int) -> str:
    """The question with a place for each picture: before it, unless it holds `<image>` itself.

    Errors: ValueError if it holds another number of places than there are pictures.
    """
    num_tokens = question.count(IMAGE_TOKEN)
    if not num_tokens:
        return f"{IMAGE_TOKEN}\n" * num_images + question
    if num_tokens != num_images:
        raise ValueError(
            f"the question has places for {num_tokens} pictures, but {num_images} were given; "
            f"write {IMAGE_TOKEN} once for each, or not at all"
        )
    return question


def tokenize(text: str, tokenizer: Any, add_bos: bool = True, aliases: SpecialTokenAliases | None = None) -> list[int]:
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
    pieces = [encode_piece(piece, tokenizer, aliases) for piece in text.split(IMAGE_TOKEN)]
    bos_ids = [tokenizer.bos_token_id]
    prepend_bos = add_bos and tokenizer("").input_ids[:1] == bos_ids != [None]
    ids = bos_ids if prepend_bos and pieces[0][:1] != bos_ids else []
    if not add_bos and len(pieces[0]) > 1:
        space, token = tokenizer.convert_ids_to_tokens(pieces[0][:2])
        if space == SPACE_SYMBOL and text.startswith(aliases.aliases.get(token, token) if aliases else token):
            pieces[0] = pieces[0][1:]
    for i, piece in enumerate(pieces):
        ids = ids + [IMAGE_TOKEN_INDEX] * bool(i) + piece
    return ids


def encode_piece(piece: str, tokenizer: Any, aliases: SpecialTokenAliases | None = None) -> list[int]:
    """Ids of a text without pictures, which lose none of the spaces that it begins with.

    Tokenizers that put a space before a text only if it has none would lose one: they are given one more.
    """
    encode = aliases.encode if aliases else lambda text: tokenizer(text, add_special_tokens=False).input_ids
    if piece.startswith((" ", SPACE_SYMBOL)) and encode("a") == encode(" a") != encode("  a"):
        piece = f" {piece}"
    return encode(piece) if piece else []


def first_turn_ids(question: str, template: ChatTemplate, tokenizer: Any) -> list[int]:
    """Ids of a first question, up to where its answer begins."""
    return question_ids(question, template, tokenizer, ChatTemplate.render_first_turn)


def next_turn_ids(question: str, template: ChatTemplate, tokenizer: Any) -> list[int]:
    """Ids of a later question; they come behind those of `closing`."""
    ids = question_ids(
        question,
        template,
        tokenizer,
        lambda chat_template, text: chat_template.turn_end + chat_template.render_turn(text),
        add_bos=False,
    )
    return ids[len(end_of_turn_ids(template, tokenizer)) :]


def question_ids(
    question: str,
    template: ChatTemplate,
    tokenizer: Any,
    render: Callable[[ChatTemplate, str], str],
    add_bos: bool = True,
) -> list[int]:
    """Ids of what a template makes of a question. Special tokens are only those of the template: what a user types is
    text, whatever it spells.
    """
    ids = tokenize(render(template, question), tokenizer, add_bos)
    special_ids = {*special_token_ids(tokenizer, template).values()}
    template_ids = tokenize(render(template, ""), tokenizer, add_bos)
    if sum(i in special_ids for i in ids) == sum(i in special_ids for i in template_ids):
        return ids
    aliases = alias_special_tokens(tokenizer, template)
    return tokenize(render(template.with_aliases(aliases.aliases), question), tokenizer, add_bos, aliases)


def end_of_turn_ids(template: ChatTemplate, tokenizer: Any, end_conversation: bool = False) -> list[int]:
    """What ends an answer, whatever the model ended it with; or the last answer of a finished conversation."""
    return tokenize((end_conversation and template.conversation_end) or template.turn_end, tokenizer, add_bos=False)


def stop_token_ids(template: ChatTemplate, tokenizer: Any, *eos_token_ids: int | list[int] | None) -> list[int]:
    """Ids that end an answer: the template's, the tokenizer's and those of the model's configs."""
    template_ids = [
        tokenizer.convert_tokens_to_ids(text) for text in template.stop_strings if is_single_token(text, tokenizer)
    ]
    ids = [*template_ids, tokenizer.eos_token_id]
    for eos in eos_token_ids:
        ids += eos if isinstance(eos, list) else [eos]
    return list(dict.fromkeys(i for i in ids if i is not None))
