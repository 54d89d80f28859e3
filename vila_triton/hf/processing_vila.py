"""`VilaProcessor`: texts and images to inputs of the model, as Hugging Face's processors do."""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

from vila_triton.files.atomic import write_json
from vila_triton.files.reading import read_json

from ..chat.prompts import IMAGE_TOKEN, tokenize
from ..chat.special_tokens import alias_special_tokens
from ..chat.templates import TEMPLATES, resolve_template
from ..chat.tokenizer import load_tokenizer
from ..files.reading import short_repr
from ..images.processing import ImageInput, list_images, load_image, preprocess_images
from ..images.processing import load_image_processor as load_image_processor
from ..models.config import ConfigError, RunSettings, read_dataclass
from ..models.vila import IMAGE_TOKEN_INDEX
from .unsupported import unsupported_method

PROCESSOR_CONFIG_NAME = "processor_config.json"
PLAIN_TEMPLATE = TEMPLATES["plain"]  # has no special tokens
# What transformers' loaders and pipelines add, and means nothing for a folder.
LOADER_ARGUMENTS = ("_from_auto", "_from_pipeline", "dtype", "local_files_only", "revision", "use_fast")
CONFIG_KEYS = ("conversation_template", "image_aspect_ratio")


NO_PARSER = "answers are plain text: `decode` and `batch_decode` give it"
NO_HUB = "`save_pretrained` writes a folder, which huggingface_hub's upload_folder sends"


class VilaProcessor(ProcessorMixin):
    """The tokenizer, image processor and conversation template of a VILA folder.

    `processor(text=..., images=...)` takes texts with one `<image>` for each image, `apply_chat_template` messages with
    roles and contents. The results go into `model(**inputs)` and `model.generate(**inputs)`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        conversation_template: str | None = None,
        image_aspect_ratio: str | None = None,
    ):
        chat_template = resolve_template(conversation_template, tokenizer).jinja
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.conversation_template = conversation_template
        self.image_aspect_ratio = image_aspect_ratio

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, folder: str | Path, **kwargs: Any
    ) -> "VilaProcessor":
        """Load the processor of a VILA folder, or one that `save_pretrained` wrote.

        Errors: `LoadError` if the folder is neither, `ConfigError` for values in its configs, TypeError for other
        arguments: none is honoured.
        """
        if unknown := [name for name, value in kwargs.items() if value and name not in LOADER_ARGUMENTS]:
            raise TypeError(f"VilaProcessor.from_pretrained takes a folder, and not {', '.join(unknown)}")
        folder = Path(folder)
        files = [path for name in ("config.json", PROCESSOR_CONFIG_NAME) if (path := folder / name).exists()] or [
            folder / "config.json"
        ]
        values: dict[str, Any] = {}
        for path in files:
            settings = {key: value for key, value in read_json(path).items() if key in CONFIG_KEYS}
            read_dataclass(RunSettings, settings, str(path))
            values |= settings
        parts = load_image_processor(folder), load_tokenizer(folder)
        try:
            return cls(*parts, **values)
        except ValueError as error:
            raise ConfigError(f"{', '.join(map(str, files))}: {error}") from None

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, folder: str | Path
    ) -> None:
        """Write a folder that `from_pretrained` reads, beside a model or alone."""
        self.tokenizer.save_pretrained(Path(folder) / "llm")
        self.image_processor.save_pretrained(Path(folder) / "vision_tower")
        settings = {key: getattr(self, key) for key in CONFIG_KEYS}
        write_json(Path(folder) / PROCESSOR_CONFIG_NAME, {"processor_class": type(self).__name__, **settings})

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: ImageInput = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenize texts and preprocess images -> input_ids [b, t] (-200 for each `<image>`), attention_mask [b, t],
        and with images also images [n, 3, H, W].

        images: one image or path, a list of them in the order of all texts, or one list for each text.
        add_special_tokens: begin each text with one BOS if the tokenizer has it so. split_special_tokens: read special
        tokens that a text spells as plain text, apart from `<image>`; upstream reads them as tokens, as is the default
        here.
        padding: pad on the tokenizer's side and return tensors. Without padding, or with return_tensors=None, return
        lists.
        Errors: ValueError if the number of images is not that of `<image>`; TypeError for other arguments.
        """
        unknown = [name for name, value in kwargs.items() if value is not None]  # transformers gives videos=None
        if unknown or text is None:
            unexpected = ", ".join(unknown) or "no text"
            raise TypeError(
                "VilaProcessor takes text, images, padding, return_tensors, add_special_tokens, split_special_tokens; "
                f"got {unexpected}"
            )
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors is {return_tensors!r}, expected 'pt' or None")
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding is {padding!r}, expected True or 'longest', or False")
        texts: list[Any] = list(text) if isinstance(text, (list, tuple)) else [text]
        if invalid := [line for line in texts if not isinstance(line, str)]:
            raise TypeError(f"a text is a str, not {type(invalid[0]).__name__}")
        if not texts:
            raise ValueError("VilaProcessor got no text: the list is empty")
        pil_images = flatten_images(texts, images)
        names = alias_special_tokens(self.tokenizer, PLAIN_TEMPLATE) if split_special_tokens else None
        rows = [tokenize(line, self.tokenizer, add_special_tokens, names) for line in texts]
        mask = [[1] * len(row) for row in rows]
        if padding:
            pad_id = next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)
            rows, mask = self._pad(rows, pad_id), self._pad(mask, 0)
        as_tensors = return_tensors == "pt" and (padding or len(texts) == 1)
        inputs: dict[str, Any] = {"input_ids": rows, "attention_mask": mask}
        if as_tensors:
            inputs = {name: torch.tensor(values) for name, values in inputs.items()}
        if pil_images:
            inputs["images"] = preprocess_images(pil_images, self.image_processor, self.image_aspect_ratio)
        return BatchFeature(inputs)

    def _pad(self, rows: Sequence[list[int]], value: int) -> list[list[int]]:
        longest = max(map(len, rows))
        pads = [[value] * (longest - len(row)) for row in rows]
        left = self.tokenizer.padding_side == "left"
        return [[*pad, *row] if left else [*row, *pad] for row, pad in zip(rows, pads)]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in every processor. Errors: ValueError for a conversation without messages."""
        if not len(conversation):
            raise ValueError("there is no message in the conversation")
        return super().apply_chat_template(conversation, *args, **kwargs)

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> str:
        """Decode token ids to text, with `<image>` for each image unless special tokens are skipped."""
        try:
            ids = [operator.index(token) for token in torch.as_tensor(token_ids).flatten().tolist()]
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"token ids are whole numbers, not {short_repr(token_ids)}") from None
        ends = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_INDEX]
        parts = [ids[start:end] for start, end in zip([0, *(i + 1 for i in ends)], [*ends, len(ids)])]
        if invalid := [token for part in parts for token in part if token < 0]:
            raise ValueError(f"token {invalid[0]} is of no text: only {IMAGE_TOKEN_INDEX}, an image, is below 0")
        texts = [self.tokenizer.decode(part, skip_special_tokens=skip_special_tokens, **kwargs) for part in parts]
        return ("" if skip_special_tokens else IMAGE_TOKEN).join(texts)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """Decode several sequences of token ids."""
        return [self.decode(row, skip_special_tokens, **kwargs) for row in sequences]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """The texts of answers, or of prompts [b, t], for pipelines."""
        return self.batch_decode(generated_outputs, skip_special_tokens, **kwargs)

    push_to_hub = unsupported_method("push_to_hub", NO_HUB)
    parse_response = unsupported_method("parse_response", NO_PARSER)
    post_process_multimodal_output = unsupported_method("post_process_multimodal_output", NO_PARSER)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "images"]


def flatten_images(texts: Sequence[str], images: ImageInput) -> list[Any]:
    """Load all images in order. Errors: ValueError if the texts have not as many places for images."""
    entries = list_images(images)
    num_placeholders = [line.count(IMAGE_TOKEN) for line in texts]
    lists = [isinstance(entry, (list, tuple)) for entry in entries]
    nested = any(lists)
    if nested and not all(lists):
        raise ValueError("images mix images and lists of images; expected either images or a list for each text")
    counts = [len(entry) for entry in entries] if nested else [len(entries)]
    if nested and len(counts) != len(texts):
        raise ValueError(f"{len(counts)} lists of images were given for {len(texts)} texts; expected one for each")
    for i, (n, expected) in enumerate(zip(counts, num_placeholders if nested else [sum(num_placeholders)])):
        if n != expected:
            where = f"text {i} has" if nested else "the texts have"
            raise ValueError(
                f"{where} places for {expected} images, but {n} were given; write {IMAGE_TOKEN} once for each"
            )
    return [load_image(image) for entry in entries for image in (entry if nested else [entry])]
