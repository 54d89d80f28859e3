"""Conversations and prompts to token ids inside vLLM, by the template and the tokenizer of a VILA folder.

An image is one token of a prompt, which the multimodal processor replaces by as many as the image has features.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchEncoding
from vllm.exceptions import VLLMValidationError
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.tokenizers.hf import get_cached_tokenizer
from vllm.utils.async_utils import make_async

from ..chat.prompts import IMAGE_TOKEN, Message, conversation_ids, insert_image_tokens, tokenize
from ..chat.templates import ChatTemplate, resolve_template
from ..chat.tokenizer import load_tokenizer
from ..checkpoints.loading import read_configs
from ..models.vila import IMAGE_TOKEN_INDEX
from .config import add_image_token


class VilaTokenizer:
    """Loads the tokenizer of a VILA folder for vLLM."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Load the tokenizer of a folder, with `<image>` as a token of it. Errors: `LoadError`, ValueError."""
        tokenizer = load_tokenizer(Path(folder))
        template = resolve_template(read_configs(Path(folder))[0].get("conversation_template"), tokenizer)
        return get_cached_tokenizer(with_images(tokenizer, template))


def with_images(tokenizer: Any, template: ChatTemplate) -> Any:
    """Return a tokenizer that tokenizes the pieces of a text around each `<image>` on their own, as VILA does."""
    image_id = add_image_token(tokenizer)

    class ImageTokenizer(type(tokenizer)):
        image_token_id: int = image_id
        conversation_template: ChatTemplate = template

        def encode(self, text: str, *args: Any, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
            """Encode a raw prompt, whose special tokens are tokens."""
            return self(text, *args, add_special_tokens=add_special_tokens, **kwargs)["input_ids"]

        def __call__(self, text: Any, *args: Any, add_special_tokens: bool = True, **kwargs: Any) -> Any:
            if isinstance(text, list | tuple) and any(IMAGE_TOKEN in str(part) for part in text):
                raise ValueError(f"{IMAGE_TOKEN} in a list of texts, expected in a prompt beside its image")
            if not (isinstance(text, str) and IMAGE_TOKEN in text):
                return tokenizer(text, *args, add_special_tokens=add_special_tokens, **kwargs)
            return BatchEncoding({"input_ids": with_image_id(tokenize(text, tokenizer, add_special_tokens), image_id)})

        def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
            """Encode a conversation, up to where the next answer begins. Errors: ValueError."""
            return with_image_id(conversation_ids(messages, template, tokenizer), image_id)

        def __reduce__(self) -> Any:
            return with_images, (tokenizer, template)

    wrapped = ImageTokenizer.__new__(ImageTokenizer)
    wrapped.__dict__.update(tokenizer.__dict__)
    return wrapped


def with_image_id(ids: Sequence[int], image_id: int) -> list[int]:
    """Prompt ids with the token of an image in the place of -200."""
    return [image_id if i == IMAGE_TOKEN_INDEX else i for i in ids]


class VilaRenderer(BaseRenderer):
    """Renders the messages of a chat by the template of the folder."""

    def __init__(self, config: Any, tokenizer: Any):
        super().__init__(config, tokenizer)
        self._render_async = make_async(self._render, executor=self._executor)

    def render_messages(self, messages: Any, params: Any) -> Any:
        """Render a conversation to token ids, beside its images."""
        return self._render(params, *parse_chat_messages(messages, self.model_config, **parse_options(params)))

    async def render_messages_async(self, messages: Any, params: Any) -> Any:
        """Render as `render_messages`, while others are served."""
        parsed = await parse_chat_messages_async(messages, self.model_config, **parse_options(params))
        return await self._render_async(params, *parsed)

    def _render(self, params: Any, conversation: Any, mm_data: Any, mm_uuids: Any) -> Any:
        if params.chat_template is not None:
            raise VLLMValidationError("a VILA folder names its template, expected no chat_template")
        refuse_template_options(params.chat_template_kwargs or {})
        refuse_names_of_images(mm_uuids or {})
        try:
            messages = [(m["role"], message_text(m)) for m in conversation]
            self.check_length(sum(len(text) for _, text in messages))
            ids = self.get_tokenizer().conversation_ids(messages)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter="messages") from None
        prompt: dict[str, Any] = {"prompt_token_ids": ids}
        if mm_data is not None:
            prompt["multi_modal_data"] = mm_data
        return conversation, prompt

    def check_length(self, num_characters: int) -> None:
        """Raise ValueError for texts that no tokenization makes fit: others would wait while they are tokenized."""
        limit = self.model_config.max_model_len
        if num_characters > limit * self.get_tokenizer().max_chars_per_token:
            raise ValueError(f"the messages have {num_characters} characters, too many for a context of {limit} tokens")

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        self.check_images(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        self.check_images(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def check_images(self, prompt: Mapping[str, Any]) -> None:
        """Raise VLLMValidationError unless a prompt has as many places for images as images."""
        images = (prompt.get("multi_modal_data") or {}).get("image")
        num_images = 0 if images is None else len(images) if isinstance(images, list | tuple) else 1
        places = prompt["prompt_token_ids"].count(self.get_tokenizer().image_token_id)
        if places != num_images:
            raise VLLMValidationError(
                f"the prompt has places for {places} images, but {num_images} were given; write {IMAGE_TOKEN} once for "
                "each image"
            )


def parse_options(params: Any) -> dict[str, Any]:
    """The options with which vLLM parses messages: their contents as lists of texts and images, in order."""
    kwargs = {name: getattr(params, name) for name in ("media_io_kwargs", "mm_processor_kwargs")}
    return {"content_format": "openai", **kwargs}


def refuse_template_options(options: Mapping[str, Any]) -> None:
    """Raise VLLMValidationError for what a request asks of a template, other than the next answer."""
    if options.get("tools"):
        raise VLLMValidationError("VILA calls no tools, expected none", parameter="tools")
    for name, expected in (("add_generation_prompt", True), ("continue_final_message", False)):
        if options.get(name, expected) != expected:
            raise VLLMValidationError(
                f"{name} is {options[name]}, and VILA's templates know {expected}", parameter=name
            )


def refuse_names_of_images(uuids: Mapping[str, Any]) -> None:
    """Raise VLLMValidationError for an image with a `uuid`, under which vLLM would cache it: whoever gives another
    image's gets answers about that one, or makes others get answers about theirs.
    """
    given = [uuid for each in uuids.values() for uuid in (each if isinstance(each, list | tuple) else [each])]
    if any(uuid is not None for uuid in given):
        raise VLLMValidationError(
            "an image has a uuid, expected none: images are known by their pixels", parameter="uuid"
        )


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, with a line `<image>` for each of its images, unless its text holds them itself.

    Errors: ValueError for other contents, and for another number of `<image>` than of images.
    """
    content = message.get("content") or ""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if others := {part["type"] for part in parts} - {"text", "image"}:
        raise ValueError(f"a message holds text and images, not {', '.join(sorted(others))}")
    text = "".join(part["text"] for part in parts if part["type"] == "text")
    if IMAGE_TOKEN in text:
        return insert_image_tokens(text, sum(part["type"] == "image" for part in parts))
    return "".join(part["text"] if part["type"] == "text" else f"{IMAGE_TOKEN}\n" for part in parts)
