"""A wrong argument in Python raises one sentence that names the argument, before anything runs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from op_arguments import flat_arguments, grouped_arguments
from PIL import Image

from bench.correctness import repro_bundle
from bench.measure import rows
from vila_triton import VilaProcessor, ops
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.checkpoints.random_checkpoint import read_model_toml
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.models.config import LlamaConfig
from vila_triton.quantization import awq_cache_file, calibration_data
from vila_triton.registry import OPS
from vila_triton.registry.op import Op

TINY = Path(__file__).parents[2] / "vila_triton" / "tiny" / "checkpoint"
A = TINY.parent / "examples" / "a.png"


@pytest.fixture(scope="module")
def talker() -> ChatModel:
    return load_chat_model(str(TINY), max_pages=99)


def arguments(op: Op) -> dict[str, Any]:
    sizes = {name: getattr(size, "low", None) or getattr(size, "values", [1])[0] for name, size in op.domain.items()}
    return flat_arguments(op, op.make_example(**sizes, rng=torch.Generator().manual_seed(0), device="cpu"))


OPTIONAL = {"bias", "residual", "numerics", "return_lse"}


@pytest.mark.parametrize("name", sorted(OPS))
def test_op_argument_of_wrong_type_is_named(name: str) -> None:
    op, values = OPS[name], arguments(OPS[name])
    for argument, value in values.items():
        if argument in OPTIONAL:
            continue
        wrong: list[Any] = [None, "x"]
        if isinstance(value, torch.Tensor):
            wrong.append(value.int() if value.is_floating_point() else value.float())
        elif isinstance(value, float):
            wrong.append(float("nan"))
        for x in wrong:
            with pytest.raises((TypeError, ValueError), match=rf"^{name}: (\w+ and zeros of )?(\w_pages|{argument}\b)"):
                op(**grouped_arguments(op, {**values, argument: x}))
    with pytest.raises(TypeError, match=rf"^{name}\(\) missing .* required positional argument"):
        op(next(iter(values.values())))


IDS = torch.tensor([[1, 5]])
MODEL: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a text": (lambda m: m.generate("hello"), "input_ids: a str is no tensor"),
    "a list": (lambda m: m.generate([[1, 5]]), "input_ids: a list is no tensor"),
    "floats": (lambda m: m.generate(torch.rand(1, 3)), r"the input is torch.float32 of shape \[1, 3\], expected"),
    "an image": (lambda m: m.generate(IDS, Image.open(A)), "images: a PngImageFile is no tensor of pixels"),
    "images": (lambda m: m.generate(IDS, [Image.open(A)]), "images: a PngImageFile is no tensor of pixels"),
    "forward": (lambda m: m([[1, 5]]), "input_ids: a list is no tensor"),
    "embeddings": (lambda m: m(inputs_embeds=3), "inputs_embeds: a int is no tensor"),
    "config": (lambda m: m.from_pretrained(TINY, config={}), "config is a dict, expected a VilaLlamaConfig"),
}


@pytest.mark.parametrize("mistake", MODEL)
def test_model_argument_of_wrong_type_is_named(talker: ChatModel, mistake: str) -> None:
    call, told = MODEL[mistake]
    with pytest.raises((TypeError, ValueError), match=told):
        call(talker.model)


PROCESSOR: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a number": (lambda p: p(text=3), "a text is a str, not int"),
    "numbers": (lambda p: p(text=["a", 3]), "a text is a str, not int"),
    "an image": (lambda p: p(text="<image>", images=3), "images are PIL images or paths .*, not int"),
    "no ids": (lambda p: p.decode("x"), "token ids are whole numbers, not 'x'"),
    "no message": (lambda p: p.apply_chat_template([], tokenize=True), "there is no message"),
    "no content": (lambda p: p.apply_chat_template([{"role": "user"}]), "a message of role user has no content"),
}


@pytest.mark.parametrize("mistake", PROCESSOR)
def test_processor_argument_of_wrong_type_is_named(mistake: str) -> None:
    call, told = PROCESSOR[mistake]
    with pytest.raises(Exception, match=told):
        call(VilaProcessor.from_pretrained(TINY))


def test_conversation_takes_text_and_images_or_paths(talker: ChatModel) -> None:
    def answer(question: Any, *images: Any) -> list[int]:
        return list(Conversation(talker).ask(question, *images, max_new_tokens=2))

    assert answer("How many?", [Image.open(A)]) == answer("How many?", Image.open(A)) == answer("How many?", str(A))
    for wrong, told in (
        ((None,), "the question is a NoneType"),
        (("How many?", [3]), "an image is a PIL image or the"),
    ):
        with pytest.raises(TypeError, match=told):
            answer(*wrong)
    for limit in (0, -1, 1.5, "x", True):
        with pytest.raises(ValueError, match=f"max_pages is {limit!r}, expected a whole number of at least 1"):
            ChatModel(talker.model, talker.tokenizer, talker.processor, max_pages=limit)  # pyright: ignore[reportArgumentType]


def test_path_that_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ValueError, match="fifo is a FIFO, expected a file"):
        next(calibration_data.read_samples([tmp_path / "fifo"]))
    with pytest.raises(ValueError, match=r"a\.png is no TOML"):
        read_model_toml(A)
    for read in (repro_bundle.load, lambda path: next(rows.read(path))):
        with pytest.raises(ValueError, match="fifo is a FIFO, expected a file"):
            read(tmp_path / "fifo")
    for path, told in ((tmp_path / "fifo", "is a FIFO, expected a file"), (A, r"\(torch.save of scale and clip\)$")):
        with pytest.raises(ValueError, match=told):  # without torch's advice, which is to run what the file says
            awq_cache_file.load_awq_cache(path, LlamaConfig(128, 64, 128, 1, 2, 2, 32), 32, torch.float16)


def test_unknown_debug_mode_is_refused_on_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VILA_TRITON_DEBUG", "yes")
    with pytest.raises(ValueError, match="VILA_TRITON_DEBUG is 'yes', expected 1, or 0"):
        ops.decode_attention(**grouped_arguments(OPS["decode_attention"], arguments(OPS["decode_attention"])))
