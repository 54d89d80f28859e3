"""VILA inside vLLM answers as our engine does: dense and int4, alone and in a batch, on one process and on two."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from vila_triton.__main__ import main
from vila_triton.chat.conversation import ChatModel
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.paths import BUNDLED_CHECKPOINT, config_dir
from vila_triton.tiny.evaluate import EvalQuestion, build_questions

pytestmark = pytest.mark.vllm
NUM_QUESTIONS = 100
MAX_TOKENS = 24
WRONG_KERNEL = """
from vila_triton.ops import decode_attention

@decode_attention.impl("upside_down")
def upside_down(*args, **kwargs):
    return -decode_attention.reference(*args, **kwargs)
"""
CLIP = """
[vision_tower]
model_type = "clip_vision_model"
hidden_size = 1024
intermediate_size = 4096
num_hidden_layers = 24
num_attention_heads = 16
image_size = 336
patch_size = 14
select_layer = -2

[mm_projector]
mm_projector_type = "mlp2x_gelu"
"""
MODELS = ("vila1.5-3b", "vila1.5-3b-s2", "llama3-vila1.5-8b", "vila1.5-13b", "vila1.5-40b")  # all of VILA 1.5


def vila_triton(*arguments: object) -> None:
    """Run a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vila-triton", *map(str, arguments)])
        assert not main()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, and it in int4."""
    target = tmp_path_factory.mktemp("int4") / "model"
    vila_triton("quantize", BUNDLED_CHECKPOINT, target, "--group-size", 64, "--method", "rtn")
    return {"dense": BUNDLED_CHECKPOINT, "int4": target}


@pytest.fixture(scope="module")
def questions() -> list[EvalQuestion]:
    """Held-out questions of all kinds that the model was trained on, about one, two and three images."""
    return build_questions(8, seed=21)[:NUM_QUESTIONS]


def own_answers(chat_model: ChatModel, questions: Sequence[EvalQuestion]) -> list[list[int]]:
    """The token ids of our engine's greedy answers, one question at a time."""
    rows = []
    for question in questions:
        ids = torch.tensor([chat_model.prompt_ids(question.qa.question, len(question.images))])
        pixels = chat_model.preprocess_images(question.images) if question.images else None
        rows.append(chat_model.model.generate(ids, pixels, max_new_tokens=MAX_TOKENS, do_sample=False)[0].tolist())
    return rows


def messages(question: EvalQuestion) -> list[dict[str, Any]]:
    images = [{"type": "image_pil", "image_pil": image} for image in question.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.qa.question}]}]


def vllm_answers(engine: Any, questions: Sequence[EvalQuestion]) -> list[list[int]]:
    """The token ids of vLLM's greedy answers to all questions at once."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = engine.chat([messages(question) for question in questions], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.fixture(scope="module")
def start_vila(start_engine: Callable[..., Any]) -> Callable[..., Any]:
    """Start vLLM on a VILA folder, with these options beside those of every test."""

    def start(folder: Path, **options: Any) -> Any:
        defaults = {"skip_tokenizer_init": False, "tokenizer_mode": "vila_triton", "limit_mm_per_prompt": {"image": 3}}
        return start_engine(folder, **{**defaults, **options})

    return start


@pytest.fixture(scope="module", params=["dense", "int4"])
def served(request: pytest.FixtureRequest, folders: dict[str, Path], start_vila: Callable[..., Any]) -> Any:
    """A folder, and an engine of vLLM on it."""
    return folders[request.param], start_vila(folders[request.param], block_size=16)


def test_answers_are_those_of_our_engine_batched_and_alone(served: Any, questions: list[EvalQuestion]) -> None:
    folder, engine = served
    expected = own_answers(load_chat_model(folder, dtype=torch.float32), questions)
    assert len(questions) == NUM_QUESTIONS and len({tuple(row) for row in expected}) > 10
    assert vllm_answers(engine, questions) == expected
    assert [vllm_answers(engine, [question])[0] for question in questions] == expected


def test_our_ops_answer(served: Any) -> None:
    folder, engine = served
    (before,) = engine.collective_rpc("kernel_counts")
    vllm_answers(engine, build_questions(1, seed=22)[:2])  # images that are not in vLLM's cache
    (after,) = engine.collective_rpc("kernel_counts")
    ops = {name.partition("=")[0] for name in after if after[name] > before.get(name, 0)}
    expected = {"prefill_attention", "decode_attention", "kv_write", "encoder_attention"}
    assert ops >= expected | ({"int4_matmul"} if folder != BUNDLED_CHECKPOINT else set())


def test_two_requests_about_one_image_share_its_pages(served: Any, questions: list[EvalQuestion]) -> None:
    from vllm import SamplingParams

    engine, params = served[1], SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    first, other = [question for question in questions if len(question.images) == 1][-2:]

    def cached_tokens(question: EvalQuestion) -> int:
        return engine.chat(messages(question), params, use_tqdm=False)[0].num_cached_tokens

    assert engine.reset_prefix_cache()
    assert cached_tokens(first) == 0
    assert cached_tokens(EvalQuestion(other.qa, first.images)) == 16  # a whole page, most of it of the image
    assert cached_tokens(EvalQuestion(other.qa, other.images)) == 0


def test_a_wrong_kernel_changes_the_answers(
    folders: dict[str, Path], questions: list[EvalQuestion], start_vila: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "upside_down.py").write_text(WRONG_KERNEL)
    choices = {
        "kernels": {"decode_attention": "upside_down"},
        "kernel_paths": [str(tmp_path / "upside_down.py")],
    }
    engine = start_vila(folders["dense"], additional_config={"vila_triton": choices})
    right = own_answers(load_chat_model(folders["dense"], dtype=torch.float32), questions[:20])
    assert sum(a != b for a, b in zip(vllm_answers(engine, questions[:20]), right, strict=True)) > 10
    assert engine.collective_rpc("kernel_counts")[0]["decode_attention=upside_down"] > 0


@pytest.mark.parametrize("weights", ["dense", "int4"])
@pytest.mark.parametrize("name", [*MODELS, "with CLIP"])
def test_every_tower_projector_and_template(
    name: str, weights: str, start_vila: Callable[..., Any], tmp_path: Path, questions: list[EvalQuestion]
) -> None:
    int4 = ["--int4", 32] if weights == "int4" else []
    sizes = ["--layers", 2, "--width-divisor", 8, "--dtype", "float32"]
    if name == "with CLIP":
        siglip = (config_dir() / "models" / "vila1.5-3b.toml").read_text()
        (tmp_path / "clip.toml").write_text(siglip.partition("[vision_tower]")[0] + CLIP)
    vila_triton("build", tmp_path / "clip.toml" if name == "with CLIP" else name, tmp_path / "model", *sizes, *int4)
    asked = [question for question in questions if len(question.images) < 3][:4]
    engine = start_vila(tmp_path / "model", max_model_len=2048)
    assert vllm_answers(engine, asked) == own_answers(load_chat_model(tmp_path / "model", dtype=torch.float32), asked)


@pytest.mark.parametrize("layout", ["awq-gemm", "awq-v1", "awq-v2"])
def test_every_layout_of_int4_weights(
    layout: str,
    folders: dict[str, Path],
    questions: list[EvalQuestion],
    start_vila: Callable[..., Any],
    tmp_path: Path,
) -> None:
    vila_triton("convert", folders["int4"], tmp_path / "model", "--format", layout)
    engine = start_vila(tmp_path / "model")
    expected = own_answers(load_chat_model(tmp_path / "model", dtype=torch.float32), questions[:20])
    assert vllm_answers(engine, questions[:20]) == expected


TWO_RANKS = """
import json, sys
from pathlib import Path

paths, folder, options, target = json.loads(sys.argv[1])
sys.path[:0] = paths
if __name__ == "__main__":
    from test_model import build_questions, vllm_answers
    from vllm import LLM

    engine = LLM(folder, **options)
    Path(target).write_text(json.dumps(vllm_answers(engine, build_questions(8, seed=21)[:20])))
"""


@pytest.mark.parametrize("weights", ["dense", "int4"])
def test_two_processes_give_the_same_answers(
    weights: str, folders: dict[str, Path], questions: list[EvalQuestion], tmp_path: Path
) -> None:
    paths = [str(path) for path in (Path(__file__).parent, *Path(__file__).parents[1:3])]
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "tokenizer_mode": "vila_triton"}
    options |= {"limit_mm_per_prompt": {"image": 3}, "distributed_executor_backend": "mp", "tensor_parallel_size": 2}
    script, target = tmp_path / "two_ranks.py", tmp_path / "answers.json"
    script.write_text(TWO_RANKS)
    command = [sys.executable, str(script), json.dumps([paths, str(folders[weights]), options, str(target)])]
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    expected = own_answers(load_chat_model(folders[weights], dtype=torch.float32), questions[:20])
    assert json.loads(target.read_text()) == expected
