"""Conversation templates, and text with pictures in it to token ids."""

from dataclasses import dataclass
from typing import Any

from .models.vila import IMAGE_TOKEN_INDEX

IMAGE = "<image>"


@dataclass(frozen=True)
class Template:
    """How questions and answers are written down: system, then rounds of user and assistant, each ended by the EOS."""

    system: str
    user: str
    assistant: str

    def first(self, question: str) -> str:
        """The text of the first round, up to where the answer begins."""
        return f"{self.system} {self.following(question)}" if self.system else self.following(question)

    def following(self, question: str) -> str:
        """The text of a later round; it stands right after the EOS of the answer before."""
        return f"{self.user} {question} {self.assistant}"


# As in VILA 1.5; `vicuna_v1_nosys` is what the bundled model was trained with.
TEMPLATES = {
    "vicuna_v1": Template(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        "USER:",
        "ASSISTANT:",
    ),
    "vicuna_v1_nosys": Template("", "USER:", "ASSISTANT:"),
}


def template(name: str) -> Template:
    """A template by name. Errors: ValueError listing those there are."""
    if name not in TEMPLATES:
        raise ValueError(f"no conversation template {name!r}; there are: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def with_pictures(question: str, pictures: int) -> str:
    """The question with a place for each picture: before it, unless it holds `<image>` itself.

    Errors: ValueError if it holds another number of places than there are pictures.
    """
    places = question.count(IMAGE)
    if not places:
        return f"{IMAGE}\n" * pictures + question
    if places != pictures:
        raise ValueError(f"the question has places for {places} pictures, but {pictures} were given")
    return question


def tokenize(text: str, tokenizer: Any, first: bool = True) -> list[int]:
    """Token ids of a text, -200 for each `<image>`; the text between is tokenized piecewise. BOS only if `first`."""
    ids: list[int] = []
    for i, piece in enumerate(text.split(IMAGE)):
        tokens = tokenizer(piece).input_ids
        starts = bool(tokens) and tokens[0] == tokenizer.bos_token_id
        ids += [IMAGE_TOKEN_INDEX] if i else []
        ids += tokens if first and not i else tokens[starts:]
    return ids
