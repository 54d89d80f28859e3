"""Hugging Face's ways to the bundled model: Auto classes, the processor, messages."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, TextStreamer

from vila_triton import VilaLlamaConfig, VilaLlamaForCausalLM, VilaProcessor
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.tiny.examples import EXAMPLES_DIR

PICTURES = [Image.open(EXAMPLES_DIR / f"{name}.png") for name in "abcd"]
QUESTION = "How many blue shapes are there?"


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(BUNDLED_CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, dtype=torch.float32, device="cpu", page_size=32)


def message(question: str, *pictures: Any) -> list[dict]:
    images = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def test_auto_classes_load_it_in_the_dtype_and_with_the_settings_asked_for(processor: Any, model: Any) -> None:
    assert isinstance(AutoConfig.from_pretrained(BUNDLED_CHECKPOINT), VilaLlamaConfig)
    assert isinstance(model, VilaLlamaForCausalLM) and isinstance(processor, VilaProcessor)
    assert (model.dtype, model.device.type, model.new_cache(1).allocator.page_size) == (torch.float32, "cpu", 32)
    with pytest.raises(TypeError, match="takes config, device and dtype, and not device_map"):
        AutoModelForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, device_map="auto")


def test_importing_the_package_loads_nothing_of_transformers() -> None:
    code = "import sys, vila_triton; assert not {'torch', 'transformers'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("loop", ["engine", "transformers"])
def test_messages_to_streamed_text_as_in_a_conversation(processor: Any, model: Any, loop: str) -> None:
    inputs = processor.apply_chat_template(
        message(QUESTION, PICTURES[0]), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    heard: list[str] = []
    streamer: Any = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.on_finalized_text = lambda text, stream_end=False: heard.append(text)
    answer = model.generate(**inputs, max_new_tokens=16, streamer=streamer, loop=loop)
    talker = ChatModel(model, processor.tokenizer, processor.image_processor)
    assert answer.tolist() == [list(Conversation(talker).ask(QUESTION, PICTURES[:1]))]
    assert inputs["input_ids"].tolist() == [talker.prompt_ids(QUESTION, 1)]
    assert "".join(heard).strip() == processor.batch_decode(answer, skip_special_tokens=True)[0] == "2"


def test_a_batch_answers_as_each_alone(processor: Any, model: Any) -> None:
    talks = [message(QUESTION, PICTURES[0]), message("Describe the picture.", PICTURES[3]), message("Hello.")]
    talks.append(message("Which image has more shapes?", *PICTURES[1:3]))
    texts = [processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]
    pictures = [[part["image"] for part in talk[0]["content"][:-1]] for talk in talks]
    flat = [picture for some in pictures for picture in some]
    batch = processor(text=texts, images=pictures)
    assert all(torch.equal(batch[name], processor(text=texts, images=flat)[name]) for name in batch)
    answers = processor.batch_decode(model.generate(**batch, max_new_tokens=40), skip_special_tokens=True)
    for text, some, together in zip(texts, pictures, answers):
        alone = model.generate(**processor(text=text, images=some or None), max_new_tokens=40)
        assert processor.batch_decode(alone, skip_special_tokens=True) == [together]


def test_rows_are_padded_on_the_tokenizers_side_or_not_at_all(processor: Any, monkeypatch: Any) -> None:
    rows = processor(text=["a", "a shape"], padding=False, return_tensors=None)["input_ids"]
    for side in ("left", "right"):
        monkeypatch.setattr(processor.tokenizer, "padding_side", side)
        batch = processor(text=["a", "a shape"])
        pad, row = [processor.tokenizer.pad_token_id], rows[0]
        assert batch["input_ids"].tolist() == [pad + row if side == "left" else row + pad, rows[1]]
        assert batch["attention_mask"].tolist() == [[0, 1, 1] if side == "left" else [1, 1, 0], [1, 1, 1]]
    assert processor(text="a", add_special_tokens=False)["input_ids"].tolist() == [rows[0][1:]]


def test_what_is_saved_is_what_is_loaded(processor: Any, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again: Any = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, VilaProcessor) and again.chat_template == processor.chat_template
    asked = {"text": f"<image>{QUESTION}", "images": PICTURES[0].resize((50, 90))}
    assert all(torch.equal(values, again(**asked)[name]) for name, values in processor(**asked).items())


ONE: Any = PICTURES[0]
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few": (
        {"text": "<image>"},
        ValueError,
        "the texts have places for 1 images, but 0 were given; write <image>",
    ),
    "too many": ({"text": ["a", "<image>"], "images": [ONE, ONE]}, ValueError, "places for 1 images, but 2"),
    "of another text": ({"text": ["a", "<image>"], "images": [[ONE], []]}, ValueError, "text 0 has places for 0 imag"),
    "lists": ({"text": ["a", "b"], "images": [[]]}, ValueError, "1 lists of images were given for 2 texts"),
    "mixed": ({"text": ["a", "b"], "images": [[], ONE]}, ValueError, "images mix images and lists of images"),
    "no text": ({"images": ONE}, TypeError, "got no text"),
    "an empty list": ({"text": []}, ValueError, "got no text: the list is empty"),
    "padding": ({"text": "a", "padding": "max_length"}, ValueError, "padding is 'max_length', expected True or 'long"),
    "an argument": ({"text": "a", "max_length": 5}, TypeError, "takes text, .*; got max_length"),
    "no image": ({"text": "<image>", "images": [3]}, TypeError, "an image is a PIL image or the path .*, not int"),
    "no file": ({"text": "<image>", "images": "none.png"}, ValueError, "none.png does not exist"),
    "tensors": ({"text": "a", "return_tensors": "np"}, ValueError, "return_tensors is 'np', expected 'pt' or None"),
}


@pytest.mark.parametrize("how, kind, message", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_refused(processor: Any, how: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        processor(**how)


def test_a_path_is_the_picture_in_the_file(processor: Any) -> None:
    path = EXAMPLES_DIR / "a.png"
    parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": "x"}]
    talk = [{"role": "user", "content": parts}]
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
    assert torch.equal(inputs["images"], processor(text="<image>", images=Image.open(path))["images"])


def test_a_label_outside_the_vocabulary_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="label 1000000 is not in the vocabulary of 128"):
        model(torch.tensor([[1, 5]]), labels=torch.full((1, 2), 10**6))
