"""How conversations are written down for the language models that VILA is built on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..files.reading import short_repr

CONTENT_MACRO = (  # a message's content: a text, or a list of texts and pictures
    "{%- for message in messages -%}"
    "{%- if message.content is not defined or message.content is none -%}"
    "{{ raise_exception('a message of role ' ~ message.role ~ ' has no content') }}{%- endif -%}{%- endfor -%}"
    "{%- macro body(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}{{ '<image>\\n' }}{%- elif part.type == 'text' -%}{{ part.text }}"
    "{%- else -%}{{ raise_exception('a message holds text and image parts, not ' ~ part.type) }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)


@dataclass(frozen=True)
class ChatTemplate:
    """opening, then for every round: user, question, assistant, answer, end.

    `{system}` in the opening is where the system text stands. `lead` comes before an answer that is given as a text;
    one that a model generates brings it along, and ends with one of `stops`.
    """

    system: str
    opening: str
    user_prefix: str
    assistant_prefix: str
    answer_prefix: str
    turn_end: str
    stop_strings: tuple[str, ...]
    conversation_end: str | None = None  # what ends the last answer of all, if it is not `end`

    def render_turn(self, question: str) -> str:
        """The text of a round, up to where its answer begins."""
        return f"{self.user_prefix}{question}{self.assistant_prefix}"

    def render_first_turn(self, question: str) -> str:
        """The same of the first round, which has the system text before it."""
        return self.opening.replace("{system}", self.system) + self.render_turn(question)

    def with_aliases(self, aliases: Mapping[str, str]) -> "ChatTemplate":
        """The same with other names for its special tokens."""
        pattern = re.compile("|".join(map(re.escape, sorted(aliases, key=len, reverse=True))) or "$^")
        text_fields = ("system", "opening", "user_prefix", "assistant_prefix", "answer_prefix", "turn_end")
        return replace(
            self, **{part: pattern.sub(lambda hit: aliases[hit[0]], getattr(self, part)) for part in text_fields}
        )

    @property
    def required_tokens(self) -> list[str]:
        """The texts in it that must each be one token."""
        text = "".join(
            (self.opening, self.user_prefix, self.assistant_prefix, self.turn_end, self.conversation_end or "")
        )
        return re.findall(r"<\|\w+\|>|</?s>", text)

    @property
    def jinja(self) -> str:
        """The same for `apply_chat_template`, where each picture of a message is a line `<image>`."""
        before_system, _, after_system = self.opening.partition("{system}")
        opening = (
            "{%- set told = messages[0].role == 'system' -%}"
            f"{{{{ {before_system!r} }}}}{{{{ body(messages[0].content) if told else {self.system!r} }}}}{{{{ {after_system!r} }}}}"
        )
        if not self.opening:
            opening = "{%- set told = false -%}"
        return (
            f"{CONTENT_MACRO}{opening}{{%- for message in messages -%}}{{%- if message.role == 'user' -%}}"
            f"{{{{ {self.user_prefix!r} }}}}{{{{ body(message.content) }}}}"
            f"{{%- if add_generation_prompt or not loop.last -%}}{{{{ {self.assistant_prefix!r} }}}}{{%- endif -%}}"
            "{%- elif message.role == 'assistant' -%}"
            f"{{{{ {self.answer_prefix!r} }}}}{{{{ body(message.content) }}}}"
            f"{{{{ {self.conversation_end or self.turn_end!r} if loop.last else {self.turn_end!r} }}}}"
            "{%- elif not (told and loop.first) -%}"
            "{{ raise_exception('this template has no place for a message of role ' ~ message.role) }}"
            "{%- endif -%}{%- endfor -%}"
        )


def _vicuna(system: str) -> ChatTemplate:
    return ChatTemplate(system, "{system} ", "USER: ", " ASSISTANT:", " ", "</s>", ("</s>",))


def _chatml(system: str) -> ChatTemplate:
    return ChatTemplate(
        system,
        "<|im_start|>system\n{system}<|im_end|>",
        "<|im_start|>user\n",
        "<|im_end|><|im_start|>assistant\n",
        "",
        "<|im_end|>",
        ("<|im_end|>",),
    )


def _llama_3(answer_role: str, turn_end: str) -> ChatTemplate:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return ChatTemplate(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
        f"<|begin_of_text|>{header('system')}{{system}}{turn_end}",
        header("user"),
        turn_end + header(answer_role),
        "",
        turn_end,
        ("<|end_of_text|>", "<|eot_id|>"),
        "<|end_of_text|>",
    )


_VICUNA = _vicuna(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# As in VILA 1.5. `llama_3` is what Llama-3-VILA1.5-8b was trained on: its answers come under the header of the
# *system*, and <|end_of_text|> ends every turn. `llama_3_corrected` is what VILA made of it later: the assistant's
# header, and <|eot_id|>. A checkpoint answers best to what it was trained on, so both are there.
TEMPLATES = {
    "vicuna_v1": _VICUNA,
    "v1": _VICUNA,
    "vicuna_v1_nosys": _vicuna(""),  # what the bundled model was trained on
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    "hermes-2": _chatml("Answer the questions."),
    "llama_3": _llama_3("system", "<|end_of_text|>"),
    "llama_3_corrected": _llama_3("assistant", "<|eot_id|>"),
    "plain": ChatTemplate("", "", "", "\n", "", "", ()),  # of pre-training: a picture and what it is called
}

# Told by what only tokenizers of that family know, and not by the name of a folder, which anybody may change.
TEMPLATE_BY_TOKEN = {"<|im_start|>": "hermes-2", "<|start_header_id|>": "llama_3", "</s>": "vicuna_v1"}


def is_single_token(text: str, tokenizer: Any) -> bool:
    """Whether a text is one token, but for the space that may come before it."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    return [token for token in tokens if token != "▁"] == [text]


def resolve_template(name: str | None, tokenizer: Any) -> ChatTemplate:
    """A template by name, or with "auto" or None the one that the tokenizer's model was trained on.

    Errors: ValueError for a name that there is not, or one whose turns the tokenizer cannot tell apart; it lists those
    that fit.
    """
    compatible = [
        key
        for key, entry in TEMPLATES.items()
        if all(is_single_token(text, tokenizer) for text in entry.required_tokens)
    ]
    advice = f"set conversation_template in config.json to one that fits this tokenizer: {', '.join(compatible)}"
    if name in (None, "auto"):
        name = next(
            (
                template_name
                for token, template_name in TEMPLATE_BY_TOKEN.items()
                if template_name in compatible and is_single_token(token, tokenizer)
            ),
            None,
        )
        if name is None:
            raise ValueError(
                f"the tokenizer knows none of {', '.join(TEMPLATE_BY_TOKEN)}, which tell its template; {advice}"
            )
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ValueError(f"no conversation template {short_repr(name)}; there are: auto, {', '.join(TEMPLATES)}")
    if name not in compatible:
        missing = ", ".join(
            text for text in dict.fromkeys(TEMPLATES[name].required_tokens) if not is_single_token(text, tokenizer)
        )
        raise ValueError(f"conversation template {name!r} is of tokens that the tokenizer lacks: {missing}; {advice}")
    return TEMPLATES[name]
