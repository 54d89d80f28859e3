"""The chat templates of the language models that VILA is built on."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..files.reading import short_repr

CONTENT_MACRO = (  # a message's content: a text, or a list of texts and images
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
    """A conversation as text: opening, then for every turn user_prefix, question, assistant_prefix, answer, turn_end.

    `{system}` in the opening stands for the system message. `answer_prefix` precedes an answer that is given as text; a
    generated answer begins with it by itself, and ends with one of `stop_strings`.
    """

    system: str
    opening: str
    user_prefix: str
    assistant_prefix: str
    answer_prefix: str
    turn_end: str
    stop_strings: tuple[str, ...]
    conversation_end: str | None = None  # ends the last answer, if it is not `turn_end`

    def render_turn(self, question: str) -> str:
        """Return the text of a turn up to where its answer begins."""
        return f"{self.user_prefix}{question}{self.assistant_prefix}"

    def render_first_turn(self, question: str) -> str:
        """Return the same for the first turn, behind the opening with the system message."""
        return self.opening.replace("{system}", self.system) + self.render_turn(question)

    def with_aliases(self, aliases: Mapping[str, str]) -> "ChatTemplate":
        """Return the template with its special tokens replaced by their aliases."""
        pattern = re.compile("|".join(map(re.escape, sorted(aliases, key=len, reverse=True))) or "$^")
        names = ("system", "opening", "user_prefix", "assistant_prefix", "answer_prefix", "turn_end")
        return replace(self, **{n: pattern.sub(lambda match: aliases[match[0]], getattr(self, n)) for n in names})

    @property
    def required_tokens(self) -> list[str]:
        """The special tokens of the template; each must be one token of the tokenizer."""
        parts = (self.opening, self.user_prefix, self.assistant_prefix, self.turn_end, self.conversation_end or "")
        return re.findall(r"<\|\w+\|>|</?s>", "".join(parts))

    @property
    def jinja(self) -> str:
        """The template in Jinja, for `apply_chat_template`; each image of a message becomes a line `<image>`."""
        before, _, after = self.opening.partition("{system}")
        opening = (
            "{%- set has_system = messages[0].role == 'system' -%}"
            f"{{{{ {before!r} }}}}{{{{ body(messages[0].content) if has_system else {self.system!r} }}}}"
            f"{{{{ {after!r} }}}}"
        )
        if not self.opening:
            opening = "{%- set has_system = false -%}"
        return (
            f"{CONTENT_MACRO}{opening}{{%- for message in messages -%}}{{%- if message.role == 'user' -%}}"
            f"{{{{ {self.user_prefix!r} }}}}{{{{ body(message.content) }}}}"
            "{%- if add_generation_prompt or not loop.last -%}"
            f"{{{{ {self.assistant_prefix!r} }}}}{{%- endif -%}}"
            "{%- elif message.role == 'assistant' -%}"
            f"{{{{ {self.answer_prefix!r} }}}}{{{{ body(message.content) }}}}"
            f"{{{{ {self.conversation_end or self.turn_end!r} if loop.last else {self.turn_end!r} }}}}"
            "{%- elif not (has_system and loop.first) -%}"
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
# *system*, and <|end_of_text|> ends every turn. `llama_3_corrected` is VILA's later correction: the assistant's header,
# and <|eot_id|>. A checkpoint answers best to the template that it was trained on, so both are here.
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
    "plain": ChatTemplate("", "", "", "\n", "", "", ()),  # of pre-training: an image and its caption
}

# The template of a tokenizer that has this special token: more reliable than the name of a folder.
TEMPLATE_BY_TOKEN = {"<|im_start|>": "hermes-2", "<|start_header_id|>": "llama_3", "</s>": "vicuna_v1"}


def is_single_token(text: str, tokenizer: Any) -> bool:
    """Return True if a text is one token, but for a word boundary before it."""
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids)
    return [token for token in tokens if token != "▁"] == [text]


def resolve_template(name: str | None, tokenizer: Any) -> ChatTemplate:
    """Return a template by name, or for "auto" and None the one that a model with this tokenizer was trained on.

    Errors: ValueError, with the names that are possible, for an unknown name and for a template whose special tokens
    the tokenizer lacks.
    """
    missing = {
        key: [text for text in dict.fromkeys(entry.required_tokens) if not is_single_token(text, tokenizer)]
        for key, entry in TEMPLATES.items()
    }
    compatible = [key for key in TEMPLATES if not missing[key]]
    advice = f"set conversation_template in config.json to one that fits this tokenizer: {', '.join(compatible)}"
    if name in (None, "auto"):
        for token, family in TEMPLATE_BY_TOKEN.items():
            if family in compatible and is_single_token(token, tokenizer):
                return TEMPLATES[family]
        tokens = ", ".join(TEMPLATE_BY_TOKEN)
        raise ValueError(f"the tokenizer knows none of {tokens}, which tell its template; {advice}")
    if not isinstance(name, str) or name not in TEMPLATES:
        raise ValueError(f"no conversation template {short_repr(name)}; there are: auto, {', '.join(TEMPLATES)}")
    if missing[name]:
        tokens = ", ".join(missing[name])
        raise ValueError(f"conversation template {name!r} is of tokens that the tokenizer lacks: {tokens}; {advice}")
    return TEMPLATES[name]
