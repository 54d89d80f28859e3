"""Layers that are hard to quantize: zeros, tiny numbers, dead inputs, equal columns."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine
from vila_triton.models.llama import Layer
from vila_triton.models.params import init_tree
from vila_triton.ops import Int4, dequantize
from vila_triton.ops.int4_weight import SMALLEST_SCALE
from vila_triton.quantization import awq_gptq, llm_awq
from vila_triton.quantization.activations import CalibrationTokens
from vila_triton.quantization.hessian import compute_hessian

CFG, GROUP, TOKENS = LlamaConfig(50, 64, 96, 1, 4, 4, 16), 32, 600
LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


def dead(w: Tensor) -> Tensor:
    """Set some outputs to 0, so that the linears behind them have inputs that are always 0."""
    return torch.cat((w[: len(w) // 2] * 0, w[len(w) // 2 :]))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": lambda w: w * 0,
    "tiny": lambda w: w * 1e-5,
    "the least": lambda w: torch.where(w > 0, SMALLEST_SCALE, 0.0).to(w.dtype),
    "dead rows": dead,
    "dead columns": lambda w: dead(w.T).T.contiguous(),
    "constant": lambda w: torch.full_like(w, 0.03125),
}


def layer_with(name: str, kind: str) -> Layer:
    layer = init_tree(llama.param_specs(CFG, torch.float16), torch.Generator().manual_seed(1)).layers[0]
    if name.endswith("norm"):
        return replace(layer, **{name: KINDS[kind](getattr(layer, name)[None])[0]})
    return replace(layer, **{name: Affine(KINDS[kind](getattr(layer, name).weight), None)})


def inputs(dtype: torch.dtype) -> tuple[Tensor, CalibrationTokens]:
    x = torch.randn(TOKENS, CFG.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
    return x, CalibrationTokens((200,) * 3, torch.ones(TOKENS))


FEW = {("up", "zero"), ("v", "dead rows"), ("mlp_norm", "zero")}
CASES = [(name, kind) for kind in KINDS for name in LINEARS]
CASES += [(name, kind) for name in ("attention_norm", "mlp_norm") for kind in ("zero", "tiny", "dead columns")]


@pytest.mark.parametrize("method", ["awq-gptq", "llm-awq"])
@pytest.mark.parametrize(
    ("name", "kind"), [pytest.param(*case, marks=[] if case in FEW else pytest.mark.slow) for case in CASES]
)
@torch.no_grad()
def test_tiny_weights_are_quantized_as_well_as_others(name: str, kind: str, method: str) -> None:
    layer = layer_with(name, kind)
    if method == "awq-gptq":
        x, tokens = inputs(torch.float32)
        rounded = awq_gptq.quantize_layer(layer, x, x, tokens, CFG, GROUP)
        new, reference, quantized = rounded.layer, rounded.reference_out, rounded.quantized_out
    else:
        x, tokens = inputs(torch.float16)
        new, reference, _ = llm_awq.quantize_layer(layer, x, tokens, CFG, GROUP)
        dense = {n: Affine(dequantize(getattr(new, n).weight, torch.float16), None) for n in LINEARS}
        quantized = llm_awq.capture_linear_inputs(replace(new, **dense), x, tokens, CFG).out
    for n in LINEARS:
        w: Int4 = getattr(new, n).weight
        assert torch.isfinite(w.scales).all() and (w.scales > 0).all()
        if n == name and kind == "zero":
            assert not dequantize(w, torch.float32).any()
    added, error = (reference - x).float(), (quantized - reference).float()
    if method == "awq-gptq" or kind != "constant":  # groups of one sign are lost to llm-awq
        assert error.norm() <= 0.2 * added.norm()


@pytest.mark.parametrize(("name", "behind"), [("up", "down"), ("v", "o")])
@torch.no_grad()
def test_tiny_linear_counts_if_the_next_one_amplifies_it(name: str, behind: str) -> None:
    layer = layer_with(name, "tiny")
    layer = replace(layer, **{behind: Affine(getattr(layer, behind).weight * 1e5, None)})
    x, tokens = inputs(torch.float32)
    rounded = awq_gptq.quantize_layer(layer, x, x, tokens, CFG, GROUP)
    assert (rounded.quantized_out - rounded.reference_out).norm() <= 0.2 * (rounded.reference_out - x).norm()


@torch.no_grad()
def test_no_scale_overflows_the_preceding_linear() -> None:
    layer = layer_with("gate", "dead rows")
    layer = replace(layer, up=Affine(layer.up.weight * 5e4, None), mlp_norm=layer.mlp_norm * 1e-3)
    x, tokens = inputs(torch.float16)
    new, _, _ = llm_awq.quantize_layer(layer, x, tokens, CFG, GROUP)
    assert torch.isfinite(new.up.weight.scales).all()


@pytest.mark.parametrize("size", [2.0**-i for i in range(0, 25, 3)])
def test_rtn_error_is_at_most_half_a_step_at_any_magnitude(size: float) -> None:
    w = (torch.rand(64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1).mul(size).half()
    rounded = Int4.pack(w, GROUP)
    steps = rounded.scales.float().T.repeat_interleave(GROUP, 1)
    assert ((dequantize(rounded, torch.float32) - w.float()).abs() <= 0.52 * steps).all()
    assert (steps <= 2 * size / 15 + SMALLEST_SCALE).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e-6, 1e6, 1e16])
def test_hessian_is_finite_for_inputs_of_any_magnitude(scale: float) -> None:
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * scale
    x[:, 7] = 0
    hessian = compute_hessian(x, torch.ones(200), GROUP)
    for leaf in (hessian.hessian, hessian.inverse_cholesky, hessian.schur_blocks, hessian.mean_abs):
        assert torch.isfinite(leaf).all()


def test_weights_that_cannot_be_quantized_are_refused_with_the_reason() -> None:
    x, tokens = inputs(torch.float16)
    layer = layer_with("up", "zero")
    wide = torch.ones(96, 64).half() * 60000
    wide[:, ::2] *= -1
    for name, w, message in (
        ("up", wide, "up has a group wider than its dtype or 15 float16 scales"),
        ("gate", wide / 0, "gate holds NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=message):
            llm_awq.quantize_layer(replace(layer, **{name: Affine(w, None)}), x, tokens, CFG, GROUP)
    with pytest.raises(ValueError, match="the inputs of attention are NaN or infinite"):
        llm_awq.quantize_layer(layer, x / 0, tokens, CFG, GROUP)
    result = llm_awq.AwqSearchResult({"down": torch.full((96,), 2.0**-14).half()}, {}, {})
    large = replace(layer, up=Affine(torch.full((96, 64), 100.0).half(), None))
    with pytest.raises(ValueError, match="up with the scales of its inputs and outputs holds NaN or infinity"):
        llm_awq.quantize_layer(large, x, tokens, CFG, GROUP, result)
    x, tokens = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"its largest weight is 1.26e-09, which no float16 scale can tell from 0"):
        awq_gptq.quantize_layer(replace(layer, up=Affine(torch.full((96, 64), 1e-9), None)), x, x, tokens, CFG, GROUP)
    with pytest.raises(ValueError, match=r"the squares of its inputs, up to .*, are beyond torch.float32"):
        compute_hessian(x * 1e25, torch.ones(TOKENS), GROUP)
    with pytest.raises(ValueError, match="its inputs are NaN or infinite"):
        compute_hessian(x / 0, torch.ones(TOKENS), GROUP)
