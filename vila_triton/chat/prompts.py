"""Questions with `<image>` in them to token ids, turn by turn.

Turns are tokenized one by one, since those before are in the cache. Two things, which VILA's training did as well, give
them the ids that the whole conversation would have. The pieces of text around an image are tokenized separately. And a
turn is tokenized behind the token that ended the answer before it, which is then left out: in a SentencePiece
vocabulary a text begins with a space, but "USER" right behind "</s>" has none and is another token. An answer keeps the
ids that it was generated with, even if the tokenizer would split its text in another way.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..models.vila import IMAGE_TOKEN_INDEX
from .llama_tokenizer import SPACE_SYMBOL
from .special_tokens import SpecialTokenAliases, alias_special_tokens, special_token_ids
from .templates import ChatTemplate, is_single_token

IMAGE_TOKEN = "<image>"
Message = tuple[str, str]  # role and text


def insert_image_tokens(question: str, num_images: int) -> str:
    """Put an `<image>` for each image before the question, unless it holds them itself.

    Errors: ValueError if it holds another number of them.
    """
    count = question.count(IMAGE_TOKEN)
    if not count:
        return f"{IMAGE_TOKEN}\n" * num_images + question
    if count != num_images:
        raise ValueError(
            f"the question has places for {count} images, but {num_images} were given; "
            f"write {IMAGE_TOKEN} once for each, or not at all"
        )
    return question


def tokenize(text: str, tokenizer: Any, add_bos: bool = True, aliases: SpecialTokenAliases | None = None) -> list[int]:
    """Return the token ids of a text, with -200 for each `<image>`; the pieces between are tokenized on their own.

    With `add_bos` the text begins with one BOS if it spells it or the tokenizer adds it. Without, it continues another
    text: the space that a tokenizer puts before a text is left out before a special token. With `aliases` special
    tokens are spelled by these alone. Errors: ValueError for half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} of the text is no character ({error.reason})") from None
    pieces = [encode_piece(piece, tokenizer, aliases) for piece in text.split(IMAGE_TOKEN)]
    bos = tokenizer.bos_token_id
    adds_bos = add_bos and bos is not None and tokenizer("").input_ids[:1] == [bos]
    ids: list[Any] = [bos] if adds_bos and pieces[0][:1] != [bos] else []
    if not add_bos and len(pieces[0]) > 1:
        space, token = tokenizer.convert_ids_to_tokens(pieces[0][:2])
        if space == SPACE_SYMBOL and text.startswith(aliases.aliases.get(token, token) if aliases else token):
            pieces[0] = pieces[0][1:]
    ids += pieces[0]
    for piece in pieces[1:]:
        ids += [IMAGE_TOKEN_INDEX, *piece]
    return ids


def encode_piece(piece: str, tokenizer: Any, aliases: SpecialTokenAliases | None = None) -> list[int]:
    """Return the ids of a text without images, keeping all spaces that it begins with.

    Tokenizers that put a space before a text only if it has none would lose one, so they are given one more.
    """
    encode = aliases.encode if aliases else lambda text: tokenizer(text, add_special_tokens=False).input_ids
    if piece.startswith((" ", SPACE_SYMBOL)) and encode("a") == encode(" a") != encode("  a"):
        piece = f" {piece}"
    return encode(piece) if piece else []


def first_turn_ids(question: str, template: ChatTemplate, tokenizer: Any) -> list[int]:
    """Return the ids of the first turn up to where its answer begins."""
    return question_ids(question, template, tokenizer, ChatTemplate.render_first_turn)


def next_turn_ids(question: str, template: ChatTemplate, tokenizer: Any) -> list[int]:
    """Return the ids of a later turn up to its answer; they follow those of `end_of_turn_ids`."""
    turn_end = end_of_turn_ids(template, tokenizer)
    ids = question_ids(question, template, tokenizer, lambda t, text: t.turn_end + t.render_turn(text), add_bos=False)
    return ids[len(turn_end) :]


def question_ids(
    question: str,
    template: ChatTemplate,
    tokenizer: Any,
    render: Callable[[ChatTemplate, str], str],
    add_bos: bool = True,
) -> list[int]:
    """Return the ids of a rendered question. Only the template's special tokens count as such; the user's are text."""
    ids = tokenize(render(template, question), tokenizer, add_bos)
    special_ids = {*special_token_ids(tokenizer, template).values()}
    template_ids = tokenize(render(template, ""), tokenizer, add_bos)
    if sum(i in special_ids for i in ids) == sum(i in special_ids for i in template_ids):
        return ids
    aliases = alias_special_tokens(tokenizer, template)
    return tokenize(render(template.with_aliases(aliases.aliases), question), tokenizer, add_bos, aliases)


def conversation_ids(messages: Sequence[Message], template: ChatTemplate, tokenizer: Any) -> list[int]:
    """Return the ids of a conversation up to where its next answer begins, with -200 for each `<image>`.

    messages: (role, text) in order: one of the system may be the first, then "user" and "assistant" take turns, and the
    last is the user's. Only the template spells special tokens; those of messages are text, answers included.
    Errors: ValueError for another order of roles.
    """
    turns = [*messages]
    aliases = alias_special_tokens(tokenizer, template)
    spelled = template.with_aliases(aliases.aliases)
    system = turns.pop(0)[1] if turns and turns[0][0] == "system" else spelled.system
    roles = [role for role, _ in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise ValueError(
            f"the roles of the messages are {', '.join(role for role, _ in messages) or 'none'}; expected user and "
            "assistant in turn, with the user's as the last, and perhaps one of the system before them"
        )
    text = spelled.opening.replace("{system}", system)
    for (_, question), (_, answer) in zip(turns[::2], turns[1::2]):
        answer = answer.removeprefix(spelled.answer_prefix)  # vLLM's answers begin with it
        text += spelled.render_turn(question) + spelled.answer_prefix + answer + spelled.turn_end
    return tokenize(text + spelled.render_turn(turns[-1][1]), tokenizer, aliases=aliases)


def end_of_turn_ids(template: ChatTemplate, tokenizer: Any, end_conversation: bool = False) -> list[int]:
    """Return the ids that follow an answer in the conversation; those behind the last one if `end_conversation`."""
    return tokenize((end_conversation and template.conversation_end) or template.turn_end, tokenizer, add_bos=False)


def stop_token_ids(template: ChatTemplate, tokenizer: Any, *eos_token_ids: int | list[int] | None) -> list[int]:
    """Return the ids that end an answer: the template's, the tokenizer's and those of the model's configs."""
    stop_tokens = [text for text in template.stop_strings if is_single_token(text, tokenizer)]
    ids = [*map(tokenizer.convert_tokens_to_ids, stop_tokens), tokenizer.eos_token_id]
    for eos in eos_token_ids:
        ids += eos if isinstance(eos, list) else [eos]
    return list(dict.fromkeys(i for i in ids if i is not None))
