"""int4 linear maps in models of transformers: rounded as they load, from AWQ checkpoints, from our own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_hugging_face import random_ids, small_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from bench.correctness.error_budget import unit_roundoff
from vila_triton import VilaLlamaForCausalLM
from vila_triton.checkpoints.int4_layouts import AWQ_GEMM, AWQ_V1, AWQ_V2
from vila_triton.files.reading import LoadError
from vila_triton.hf import Int4Config, install
from vila_triton.hf.linear_modules import Int4Linear
from vila_triton.models.config import ConfigError
from vila_triton.ops import Int4, dequantize, int4_matmul
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import count_calls, use

install(awq=True)
IDS = random_ids(2, 9)
VERSIONS = {"gemm": AWQ_GEMM, "gemv": AWQ_V1, "gemv_fast": AWQ_V2}
LLAMA: dict[str, Any] = {"hidden_size": 128, "num_attention_heads": 4}  # of AWQ checkpoints here
DENSE = "model.layers.1.mlp.up_proj"  # in them
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
HOW: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "vila_triton"}


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    small_model("qwen2", head_dim=64).save_pretrained(folder)
    return folder


def awq_folder(folder: Path, version: str = "gemm") -> tuple[Path, dict[str, Any]]:
    """Write an AWQ checkpoint of a tiny LLaMA under AutoAWQ's names; return it and its weights, `Int4` or dense."""
    small_model("llama", **LLAMA).half().save_pretrained(folder)
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    stored = dict[str, Tensor]()
    for name, x in weights.items():
        stem = name.removesuffix(".weight")
        if not stem.endswith("_proj") or stem == DENSE:
            stored[name] = x
            continue
        weights[name] = Int4.pack(x, 64)
        for last, tensor in VERSIONS[version].write(weights[name]).items():
            stored[f"{stem}.{'qzeros' if last == 'scaled_zeros' else last}"] = tensor.contiguous()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit_quantization(folder, quant_method="awq", bits=4, group_size=64, zero_point=True, version=version)
    return folder, weights


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_quantization(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    edit_config(folder, quantization_config=config | values)


def load(folder: Path, **how: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **{**HOW, **how})


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS).logits


def assert_as_near_as_dense(model: Any, dense: Any) -> None:
    """Logits are at most twice as far from those in float64 as a dense model's of the same weights, and a rounding."""
    found, plain, truth = logits(model), logits(dense), logits(dense.double())
    budget = 2 * (plain - truth).abs().max() + unit_roundoff(torch.float32) * truth.abs().max()
    assert (found - truth).abs().max() <= budget < 1e-3 * truth.abs().max()


def test_linear_maps_are_rounded_as_they_load_and_saved_as_they_are(dense_folder: Path, tmp_path: Path) -> None:
    model = load(dense_folder, quantization_config=Int4Config(group_size=32, modules_to_not_convert=["down_proj"]))
    is_int4 = {name: isinstance(m, Int4Linear) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert not is_int4.pop("lm_head") and is_int4 == {name: "down_proj" not in name for name in is_int4}
    with count_calls() as calls:
        expected = logits(model)
    assert calls["int4_matmul", "blocked"] == 12 and "reference" not in {impl for _, impl in calls}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        **{"quant_method": "vila-triton", "bits": 4, "group_size": 32},
        "modules_to_not_convert": ["down_proj"],
    }
    again = load(tmp_path)
    assert torch.equal(logits(again), expected)
    q_proj = load_file(dense_folder / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    found, packed = again.model.layers[0].self_attn.q_proj.weight, Int4.pack(q_proj, 32)
    assert torch.equal(dequantize(found, torch.float32), dequantize(packed, torch.float32))
    again.save_pretrained(tmp_path / "again")  # its config spells the dtype from here on
    again.dequantize()
    assert not any(isinstance(m, Int4Linear) for m in again.modules())
    assert_as_near_as_dense(model, again)


@pytest.mark.parametrize("version", VERSIONS)
def test_awq_checkpoint_answers_as_its_dense_weights(version: str, tmp_path: Path) -> None:
    folder, weights = awq_folder(tmp_path / "awq", version)
    model = load(folder)
    dense = small_model("llama", **LLAMA)
    weights = {name: dequantize(x, torch.float32) if isinstance(x, Int4) else x for name, x in weights.items()}
    dense.load_state_dict(weights)
    with count_calls() as calls:
        found = model.generate(IDS, **GREEDY)
    assert torch.equal(found, dense.generate(IDS, **GREEDY)) and len(found[:, 9:].unique()) > 4
    assert sum(n for (op, impl), n in calls.items() if op == "int4_matmul" and impl != "reference") == 8 * 13
    assert "reference" not in {impl for _, impl in calls}
    assert type(model.get_submodule(DENSE)) is nn.Linear
    assert_as_near_as_dense(model, dense)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), expected)


@pytest.mark.parametrize(("version", "dtype"), [("gemm", torch.bfloat16), ("gemv_fast", torch.float16)])
def test_awq_checkpoint_loads_in_half_precision(version: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder, weights = awq_folder(tmp_path, version)
    model = load(folder, dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    name = "model.layers.0.mlp.gate_proj"
    found, expected = model.get_submodule(name).weight, weights[f"{name}.weight"]
    assert torch.equal(unpack_codes(found), unpack_codes(expected)) and found.rounding == VERSIONS[version].rounding
    for part in ("scales", "zeros"):
        assert torch.equal(getattr(found, part), getattr(expected, part).to(dtype))


@pytest.mark.parametrize(("part", "value"), [("zeros", 16), ("zeros", 0.5), ("scales", float("nan"))])
def test_values_that_no_int4_weight_has_are_refused(part: str, value: float, tmp_path: Path) -> None:
    model = load(Path(BUNDLED_CHECKPOINT).with_name("checkpoint-int4") / "llm")
    getattr(model.model.layers[0].mlp.up_proj.weight, part).data[0, 0] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{part} (hold NaN|are not all whole numbers)"):
        load(tmp_path)


def test_wrong_kernel_changes_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(x: Tensor, w: Int4, *rest: Any) -> Tensor:
        return int4_matmul.reference(2 * x, w, *rest)

    model = load(awq_folder(tmp_path)[0])
    expected = model.generate(IDS, **GREEDY)
    monkeypatch.setattr(int4_matmul, "impls", dict(int4_matmul.impls))
    int4_matmul.impl("doubled")(doubled)
    with use(int4_matmul="doubled"):
        assert not torch.equal(model.generate(IDS, **GREEDY), expected)


def test_language_model_of_an_int4_vila_folder_answers_as_our_engine() -> None:
    folder = Path(BUNDLED_CHECKPOINT).with_name("checkpoint-int4")
    ids, count = torch.tensor([[1, 40, 41, 42, 43]]), 12
    expected = VilaLlamaForCausalLM.from_pretrained(folder, device="cpu", dtype="float32").generate(
        ids, max_new_tokens=count, eos_token_id=None
    )
    found = load(folder / "llm").generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=None)
    assert torch.equal(found[:, 5:], expected)


def test_adapters_train_beside_int4_linear_maps(dense_folder: Path) -> None:
    """Their gradients are those beside the dense weights that int4 ones stand for, within twice the error of these."""

    def gradients(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        adapted = get_peft_model(model, lora).to(model.dtype)
        adapted(IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None and "lora" in name}

    int4, dense, exact = (load(dense_folder, quantization_config=Int4Config(group_size=32)) for _ in range(3))
    truth = gradients(exact.dequantize().double())
    found, plain = gradients(int4), gradients(dense.dequantize())
    assert len(found) == 8 and not any(p.requires_grad for n, p in int4.named_parameters() if "lora" not in n)
    for name, x in truth.items():
        budget = 2 * (plain[name] - x).abs().max() + unit_roundoff(torch.float32) * x.abs().max()
        assert x.abs().max() and (found[name] - x).abs().max() <= budget, name


def test_what_cannot_be_rounded_is_refused(dense_folder: Path) -> None:
    too_wide = r"layers.0.self_attn.q_proj: int4 weight: k = 96 .* modules_to_not_convert leaves it dense"
    with pytest.raises(ValueError, match=too_wide):
        load(dense_folder, quantization_config=Int4Config())
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no linear map to convert"):
        load(dense_folder, quantization_config=Int4Config(modules_to_not_convert=["model"]))


@pytest.mark.parametrize("settings", [{"bits": 3}, {"order": "up"}, {"group_size": "x"}], ids=str)
def test_config_of_unknown_values_is_refused(settings: dict) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"Int4Config: {name} is {value!r}, expected"):
        Int4Config(**settings)


def test_checkpoint_that_contradicts_its_config_is_refused(tmp_path: Path) -> None:
    folder, _ = awq_folder(tmp_path)

    def refused(reason: str) -> None:
        with pytest.raises(LoadError, match=reason):
            load(folder)

    edit_quantization(folder, version="gemv")
    refused("int4 linears are in the layout awq-gemm, but the config says")
    edit_quantization(folder, version="gemm", group_size=32)
    refused("the config says groups of 32, but")
    edit_quantization(folder, group_size=64, zero_point=False)
    refused("zero_point False is not supported")
    edit_quantization(folder, zero_point=True)
    edit_config(folder, num_hidden_layers=1)
    refused(r"model\.layers\.1\.\S+ is int4, but no linear map of LlamaForCausalLM")
    edit_config(folder, num_hidden_layers=2, intermediate_size=192)
    refused(r"down_proj is \[128, 128\], but the config makes it \[128, 192\]")
    edit_config(folder, intermediate_size=128)
    load(folder)


def test_quantizer_of_somebody_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    install(awq=True)  # a second time
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "awq", int)
    install()
    with pytest.raises(ValueError, match="transformers has another quantizer 'awq' already: <class 'int'>"):
        install(awq=True)
