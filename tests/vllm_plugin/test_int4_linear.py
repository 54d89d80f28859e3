"""Int4 linears inside vLLM: an AutoAWQ folder is served by `int4_matmul`, whole and on two ranks.

A small LLaMA is quantized by rounding; its answers are compared with those of transformers, and of vLLM, for the same
weights written out.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vila_triton.checkpoints.int4_layouts import AWQ_GEMM
from vila_triton.ops import Int4, dequantize, int4_matmul
from vila_triton.ops.int4_weight import ROUNDINGS
from vila_triton.registry import OPS

pytestmark = pytest.mark.vllm

PROMPTS = [[1, 5, 9, 70, 3, 3, 44], [1, 7, 30]]
NUM_TOKENS = 12
Answer = Callable[..., tuple[list[list[int]], Counter[str]]]
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
}


def small_llama(group_size: int, biases: bool, dense: tuple[str, ...]) -> tuple[LlamaForCausalLM, dict[str, Tensor]]:
    """A random LLaMA whose linears are rounded to int4, and the tensors of its AutoAWQ checkpoint."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=biases, mlp_bias=biases)).eval()
    values, packed = model.state_dict(), {}
    for name, x in values.items():
        if name.endswith("_proj.bias"):
            x.normal_(0, 0.3)
        stem = name.removesuffix(".weight")
        if stem.endswith("_proj") and not stem.endswith(dense or ("nothing",)):
            weight = Int4.pack(x.half(), x.shape[1] if group_size == -1 else group_size)
            x.copy_(dequantize(weight, torch.float32))
            packed |= {f"{stem}.{leaf}": y for leaf, y in AWQ_GEMM.write(weight).items()}
        else:
            packed[name] = x
    model.load_state_dict(values)
    return model, packed


def write_folder(folder: Path, model: LlamaForCausalLM, tensors: Mapping[str, Tensor], **quantization: Any) -> Path:
    folder.mkdir()
    save_file({name: x.clone() for name, x in tensors.items()}, folder / "model.safetensors")
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    if quantization:
        settings = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
        config["quantization_config"] = settings | quantization
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def answer(start_engine: Callable[..., Any]) -> Answer:
    """Greedy answers of vLLM to the prompts, and how often each implementation of int4_matmul ran for them."""

    def answer(folder: Path, kernels: Mapping[str, Any], **options: Any) -> tuple[list[list[int]], Counter[str]]:
        from vllm import SamplingParams

        options |= {"additional_config": {"vila_triton": {"kernels": dict(kernels)}}}
        engine = start_engine(folder, max_model_len=64, max_num_seqs=2, **options)
        before = counted(engine)
        params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
        return [list(x.outputs[0].token_ids) for x in outputs], counted(engine) - before

    return answer


def counted(engine: Any) -> Counter[str]:
    """The calls of int4_matmul by implementation, of all ranks."""
    counts: Counter[str] = Counter()
    for name, calls in (item for rank in engine.collective_rpc("kernel_counts") for item in rank.items()):
        op, implementation = name.split("=")
        if op == "int4_matmul":
            counts[implementation] += calls
    return counts


@torch.no_grad()
def answer_of_transformers(model: LlamaForCausalLM) -> list[list[int]]:
    """Greedy answers of transformers."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        for _ in range(NUM_TOKENS):
            ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), 1)
        answers.append(ids[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("group_size, biases", [(32, False), (64, True), (128, False), (-1, True)])
def test_answers_are_those_of_the_weights_written_out(
    answer: Answer, group_size: int, biases: bool, tmp_path: Path
) -> None:
    model, tensors = small_llama(group_size, biases, dense=())
    expected = answer_of_transformers(model)
    assert len(set(expected[0])) > NUM_TOKENS // 2, "answers that repeat themselves say little"
    folder = write_folder(tmp_path / "int4", model, tensors, group_size=group_size)
    answers, counts = answer(folder, {}, quantization="vila_triton")
    assert answers == expected
    assert counts.total() == 4 * SIZES["num_hidden_layers"] * NUM_TOKENS  # qkv, o, gate_up, down


def test_answers_are_those_of_vllm_with_dense_weights(answer: Answer, tmp_path: Path) -> None:
    model, tensors = small_llama(32, biases=True, dense=("down_proj",))
    int4 = write_folder(tmp_path / "int4", model, tensors, group_size=32)  # which linears are dense is in the files
    answers, counts = answer(int4, {}, quantization="vila_triton")
    assert counts.total() == 3 * SIZES["num_hidden_layers"] * NUM_TOKENS
    dense, none = answer(write_folder(tmp_path / "dense", model, model.state_dict()), {})
    assert answers == dense and not none


@pytest.mark.parametrize("choice", ["packed", "splitk", "reference"])
def test_the_chosen_kernel_runs(answer: Answer, choice: str, tmp_path: Path) -> None:
    model, tensors = small_llama(64, biases=True, dense=())
    folder = write_folder(tmp_path / "int4", model, tensors, group_size=64)
    answers, counts = answer(folder, {"int4_matmul": choice}, quantization="vila_triton")
    assert answers == answer_of_transformers(model) and set(counts) == {choice}


def test_a_wrong_kernel_changes_the_answers(answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tensors = small_llama(64, biases=False, dense=())

    def first_group_everywhere(x: Tensor, w: Int4, *rest: Any) -> Tensor:
        return int4_matmul.reference(x, replace(w, scales=w.scales[:1].expand_as(w.scales)), *rest)

    wrong = replace(OPS["int4_matmul"].impls["aten"], name="wrong", fn=first_group_everywhere, configs=[{}])
    monkeypatch.setitem(OPS["int4_matmul"].impls, "wrong", wrong)
    folder = write_folder(tmp_path / "int4", model, tensors, group_size=64)
    answers, counts = answer(folder, {"int4_matmul": "wrong"}, quantization="vila_triton")
    assert answers != answer_of_transformers(model) and set(counts) == {"wrong"}


def test_code_that_vllm_compiles_runs_the_chosen_kernel(
    answer: Answer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model, tensors = small_llama(64, biases=True, dense=())
    folder = write_folder(tmp_path / "int4", model, tensors, group_size=64)
    options = {"quantization": "vila_triton", "enforce_eager": False}
    answers, counts = answer(folder, {"int4_matmul": [[2, "bags"], "blocked"]}, **options)
    assert answers == answer_of_transformers(model)
    assert set(counts) == {"bags", "blocked"}


@pytest.mark.parametrize("group_size", [32, -1])
def test_two_ranks_answer_alike(
    answer: Answer, group_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    model, tensors = small_llama(group_size, biases=True, dense=())
    folder = write_folder(tmp_path / "int4", model, tensors, group_size=group_size)
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    answers, counts = answer(folder, {"int4_matmul": "bags"}, quantization="vila_triton", **parallel)
    assert answers == answer_of_transformers(model)
    assert counts == {"bags": 2 * 4 * SIZES["num_hidden_layers"] * NUM_TOKENS}


def be_rank(rank: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let linears be made as on one of several ranks."""
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear

    for module in (parameter, linear):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: num_ranks)


Share = tuple[Any, Tensor]  # a linear as one rank holds it, and the rows and columns of the weight that are its


def share(kind: str, group_size: int, rank: int, monkeypatch: pytest.MonkeyPatch, num_kv_heads: int = 2) -> Share:
    """Load a linear of 128 or 256 inputs as one of two ranks does, and cut the same out of the whole weight."""
    from vllm.model_executor.layers import linear

    from vila_triton.vllm_plugin.int4_linear import Int4Config

    be_rank(rank, 2, monkeypatch)
    options: dict[str, Any] = dict(bias=False, quant_config=Int4Config(group_size), prefix="a.b", return_bias=False)
    rng = torch.Generator().manual_seed(1)

    def load(n: int, k: int, *shard: Any) -> Tensor:
        whole = Int4.pack(torch.randn(n, k, generator=rng), k if group_size == -1 else group_size)
        for name, x in AWQ_GEMM.write(whole).items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, x, *shard)
        return dequantize(whole, torch.float32)

    def half(x: Tensor, dim: int = 0) -> Tensor:
        return x.chunk(2, dim)[rank]

    if kind == "qkv":
        layer = linear.QKVParallelLinear(128, 32, 4, num_kv_heads, **options)
        q, k, v = load(128, 128, "q"), load(32 * num_kv_heads, 128, "k"), load(32 * num_kv_heads, 128, "v")
        expected = torch.cat((half(q), k, v) if num_kv_heads == 1 else (half(q), half(k), half(v)))
    elif kind == "gate_up":
        layer = linear.MergedColumnParallelLinear(128, [256, 256], **options)
        expected = torch.cat([half(load(256, 128, i)) for i in (0, 1)])
    elif kind == "row":
        layer = linear.RowParallelLinear(256, 128, **options)
        expected = half(load(128, 256), 1)
    else:
        layer = linear.ReplicatedLinear(256, 128, **options)
        expected = load(128, 256)
    return layer, expected


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("kind", ["qkv", "one kv head", "gate_up", "row", "replicated"])
def test_a_rank_holds_its_part(kind: str, group_size: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    one = kind == "one kv head"
    layer, expected = share("qkv" if one else kind, group_size, rank, monkeypatch, num_kv_heads=1 if one else 2)
    layer.quant_method.process_weights_after_loading(layer)
    assert set(dict(layer.named_parameters())) == {"qweight", "scales", "zeros"}, "the packed tensors are gone"
    one_hot = torch.eye(expected.shape[1])
    assert torch.equal(layer.quant_method.apply(layer, one_hot), expected.T)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_and_rounding(dtype: torch.dtype, rounding: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from vila_triton.vllm_plugin.int4_linear import Int4Config

    be_rank(0, 1, monkeypatch)
    weight = replace(Int4.pack(torch.randn(128, 256).to(dtype), 64), rounding=rounding)
    config: Any = Int4Config(64, rounding)
    layer: Any = ReplicatedLinear(256, 128, params_dtype=dtype, quant_config=config, prefix="a.b", return_bias=False)
    for name, x in {**AWQ_GEMM.write(weight), "bias": torch.randn(128).to(dtype)}.items():
        getattr(layer, name).weight_loader(getattr(layer, name), x)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 256).to(dtype)
    assert torch.equal(layer(x), int4_matmul(x, weight, layer.bias))


def test_batch_invariant_numerics_run_a_kernel_that_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import envs

    from vila_triton.vllm_plugin.int4_linear import CHOICES

    monkeypatch.setitem(vars(envs), "VLLM_BATCH_INVARIANT", True)  # an engine keeps what it has read of os.environ
    layer, _ = share("replicated", 64, 0, monkeypatch)
    method = layer.quant_method
    method.process_weights_after_loading(layer)
    method.apply(layer, torch.randn(3, 256))
    assert ("int4_matmul", "rowwise") in CHOICES[method.choices].counts


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        ("columns", (128, [24, 24]), r"a\.b: 128 inputs over 2 .*\[12 \+ 12, 128\] to each, and its 12 outputs are no"),
        ("row", (192, 128), r"a\.b: 192 inputs over 2 .*\[128, 96\] to each, and its 96 inputs do not .* groups of 64"),
    ],
)
def test_parts_that_are_no_weight_are_refused(
    kind: str, sizes: tuple[Any, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.layers import linear

    from vila_triton.vllm_plugin.int4_linear import Int4Config

    be_rank(1, 2, monkeypatch)
    make = linear.MergedColumnParallelLinear if kind == "columns" else linear.RowParallelLinear
    with pytest.raises(ValueError, match=message):
        make(*sizes, quant_config=Int4Config(64), prefix="a.b")


@pytest.mark.parametrize("kind", ["row", "gate_up"])
def test_a_checkpoint_of_other_groups_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = share(kind, 128, 0, monkeypatch)
    k = layer.input_size
    finer = AWQ_GEMM.write(Int4.pack(torch.randn(256, k), 64))  # its first groups would fit
    with pytest.raises(ValueError, match=rf"a\.b\.scales: .*\[{k // 64}, 256\] .*, expected {k // 128} rows of floats"):
        layer.scales.weight_loader(layer.scales, finer["scales"], *([0] if kind == "gate_up" else []))
    with pytest.raises(ValueError, match=r"a\.b\.qzeros: .* torch\.float32, expected \d rows of integers"):
        layer.qzeros.weight_loader(layer.qzeros, torch.ones(k // 128, 32), *([0] if kind == "gate_up" else []))


def test_a_linear_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = share("gate_up", 64, 0, monkeypatch)
    layer.qweight.loaded_shards = [0]
    with pytest.raises(ValueError, match=r"a\.b\.qweight is not in the checkpoint, or only a part of it"):
        layer.quant_method.process_weights_after_loading(layer)


GOOD = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 8}, "8 bits, zero_point True, expected 4 bits with zeros"),
        ({"zero_point": False}, "4 bits, zero_point False, expected 4 bits with zeros"),
        ({"group_size": "64"}, "group_size is '64', expected inputs, or -1 for all"),
        ({"group_size": 0}, "group_size is 0, expected inputs, or -1 for all"),
        ({"order": "add"}, "rounding is 'add', expected one of sub, fma"),
        ({"version": "gemv"}, "version 'gemv'; .* convert --format awq-gemm"),
        ({"lm_head": True}, "lm_head is quantized"),
    ],
)
def test_configs_of_other_weights_are_refused(change: Mapping[str, Any], message: str) -> None:
    from vila_triton.vllm_plugin.int4_linear import Int4Config

    with pytest.raises(ValueError, match=f"^vila_triton: .*{message}"):
        Int4Config.from_config({**GOOD, **change})


def test_the_config_says_the_rounding_and_the_dense_linears(tmp_path: Path) -> None:
    from vila_triton.vllm_plugin.int4_linear import Int4Config

    model, tensors = small_llama(64, biases=False, dense=("q_proj", "k_proj", "v_proj"))
    write_folder(tmp_path / "int4", model, tensors)
    config = Int4Config.from_config({"w_bit": 4, "q_group_size": -1, "zero_point": True})
    assert (config.group_size, config.rounding) == (-1, "sub")
    config.maybe_update_config(str(tmp_path / "int4"), SimpleNamespace(int4_order="fma"))
    assert config.rounding == "fma"
    dense = {f"model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qkv"}
    assert set(config.modules_to_not_convert) == dense
    assert Int4Config.from_config(GOOD | {"order": "fma"}).rounding == "fma"
    assert [Int4Config.override_quantization_method(GOOD, user) for user in ("vila_triton", "awq", None)] == [
        "vila_triton",
        None,
        None,
    ]
