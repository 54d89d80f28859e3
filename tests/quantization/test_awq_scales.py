"""AWQ scales, clipping and GPTQ: invariants, groups of every kind, and the error that they save."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench import quality
from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine
from vila_triton.models.params import init_tree
from vila_triton.ops import Int4, dequantize
from vila_triton.quantization import awq_gptq
from vila_triton.quantization.activations import CalibrationTokens, capture_linear_inputs
from vila_triton.quantization.awq_scales import SCALE_GROUPS, apply_scales, search_channel_scale
from vila_triton.quantization.calibration_data import token_weights
from vila_triton.quantization.gptq import gptq_codes, hessian_loss
from vila_triton.quantization.hessian import compute_hessian, error_correction_map
from vila_triton.quantization.quant_grid import grid_from_range, group_min_max, search_clipping

SHRINKS = awq_gptq.CLIP_RATIOS


def group_of(kind: str, rng: torch.Generator, size: int) -> Tensor:
    """The weights of one group."""
    x = torch.randn(size, generator=rng)
    spike = torch.zeros(size)
    spike[int(torch.randint(size, (), generator=rng))] = 40.0
    groups = {
        "any": x,
        "positive": 1 + 0.1 * torch.rand(size, generator=rng),
        "negative": -1 - 0.1 * torch.rand(size, generator=rng),
        "constant": torch.full((size,), float(x[0])),
        "zero": torch.zeros(size),
        "outlier": x + spike,
        "tiny": x * 1e-7,
    }
    return groups[kind]


KINDS = ("any", "positive", "negative", "constant", "zero", "outlier", "tiny")


@given(st.lists(st.sampled_from(KINDS), min_size=2, max_size=4), st.sampled_from([32, 64]), st.integers(0, 99))
def test_quantization_error_is_bounded_for_every_kind_of_group(kinds: list[str], group: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    w = torch.stack([torch.cat([group_of(kind, rng, group) for kind in kinds]) for _ in range(3)])
    k = w.shape[1]
    x = torch.randn(4 * k, k, generator=rng) * torch.exp(torch.randn(k, generator=rng))
    hessian = compute_hessian(x, torch.ones(len(x)), group)
    plain = grid_from_range(*group_min_max(w, group)).expand_to_columns(k)
    nearest = plain.to_weights(plain.to_codes(w))
    assert ((nearest - w).abs() <= 0.501 * plain.scales).all()  # the range holds 0 and every weight
    grid = search_clipping(w, group, hessian.schur_blocks, SHRINKS)
    codes = gptq_codes(w, grid, hessian.act_order, hessian.inverse_cholesky)
    assert torch.isin(codes, torch.arange(16.0)).all() and torch.isin(grid.zeros, torch.arange(16.0)).all()
    assert torch.equal(grid.scales, grid.scales.half().float()) and (grid.scales > 0).all()
    value = grid.expand_to_columns(k).to_weights(codes)
    # What compensation gains, it gains on all inputs together; what is left is no more than rounding to nearest loses.
    assert (hessian_loss(value - w, hessian.hessian) <= 1.05 * hessian_loss(nearest - w, hessian.hessian) + 1e-12).all()
    alone = search_clipping(w, group, torch.eye(group).expand(len(kinds), -1, -1), SHRINKS).expand_to_columns(k)
    error = ((alone.to_weights(alone.to_codes(w)) - w) ** 2).unflatten(1, (-1, group)).sum(-1)
    assert (error <= ((nearest - w) ** 2).unflatten(1, (-1, group)).sum(-1)).all()
    for g, kind in enumerate(kinds):
        part = slice(g * group, (g + 1) * group)
        if kind == "zero":
            assert not alone.to_weights(alone.to_codes(w))[:, part].any()
        if kind == "constant":  # one level is enough, and there is one
            assert torch.allclose(alone.to_weights(alone.to_codes(w))[:, part], w[:, part], rtol=2**-10, atol=4e-4)


@given(st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.integers(0, 63))
def test_non_finite_values_are_refused(bad: float, position: int) -> None:
    w, blocks = torch.ones(2, 64), torch.eye(32).expand(2, -1, -1)
    w[1, position] = bad
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        search_clipping(w, 32, blocks, SHRINKS)
    with pytest.raises(ValueError, match="its inputs are NaN or infinite"):
        compute_hessian(w, torch.ones(2), 32)
    with pytest.raises(ValueError, match=r"1e\+06 wide, more than 15 steps of a float16 scale"):
        search_clipping(torch.linspace(-1e6, 1e6, 64).expand(2, -1), 32, blocks, SHRINKS)


def small(bias: bool = False) -> tuple[LlamaConfig, llama.Layer, Tensor, CalibrationTokens]:
    cfg = LlamaConfig(50, 64, 96, 1, 4, 2, 16, attention_bias=bias, mlp_bias=bias)
    rng = torch.Generator().manual_seed(1)
    layer = init_tree(llama.param_specs(cfg, torch.float32), rng).layers[0]
    x = torch.randn(300, 64, generator=rng) @ torch.randn(64, 64, generator=rng) / 8  # inputs that know of one another
    return cfg, layer, x, CalibrationTokens((100, 150, 50), torch.ones(300))


@pytest.mark.parametrize("bias", [False, True])
def test_channel_scales_do_not_change_the_layer(bias: bool) -> None:
    cfg, layer, x, tokens = small(bias)
    expected = capture_linear_inputs(layer, x, tokens, cfg)
    rng = torch.Generator().manual_seed(2)
    scales = {}
    for scale_group in SCALE_GROUPS:
        names, k = SCALE_GROUPS[scale_group], getattr(layer, SCALE_GROUPS[scale_group][0]).weight.shape[1]
        hessian = compute_hessian(getattr(expected, scale_group), tokens.weights, 32)
        hessian.mean_abs.mul_(torch.exp(torch.randn(k, generator=rng)))
        errors = search_channel_scale(
            [getattr(layer, n).weight for n in names], hessian, 32, (4, 2) if scale_group == "o" else None
        )
        s = torch.exp(torch.randn(2, 1, 16, generator=rng)).expand(2, 2, 16).flatten()  # as `o` must have it
        scales[scale_group] = s if scale_group == "o" else torch.exp(torch.randn(k, generator=rng))
        assert errors.scale.shape == (k,) and (errors.scale > 0).all()
        if scale_group == "o":  # query heads 0 and 1 share a value head, and so do 2 and 3
            assert torch.equal(errors.scale[:16], errors.scale[16:32])
    quantized = capture_linear_inputs(apply_scales(layer, scales, 2), x, tokens, cfg)
    torch.testing.assert_close(quantized.out, expected.out, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(quantized.o, expected.o, rtol=0.1)


def error(new: llama.Layer, x: Tensor, tokens: CalibrationTokens, cfg: LlamaConfig, reference: Tensor) -> float:
    linears = {f.name: getattr(new, f.name) for f in fields(new)}
    dense = {
        n: Affine(dequantize(p.weight, torch.float32), p.bias) if isinstance(p, Affine) else p
        for n, p in linears.items()
    }
    return float((capture_linear_inputs(llama.Layer(**dense), x, tokens, cfg).out - reference).square().mean())


@torch.no_grad()
def test_error_propagation_reduces_the_error_of_later_layers() -> None:
    cfg, layer, x, tokens = small()
    reference = capture_linear_inputs(layer, x, tokens, cfg).out
    spoilt = x + 0.05 * x.roll(1, 1)
    aware = awq_gptq.quantize_layer(layer, x, spoilt, tokens, cfg, 32)
    blind = awq_gptq.quantize_layer(layer, x, x, tokens, cfg, 32, propagate_error=False)
    plain = llama.quantize_linears_rtn(llama.Llama(x, (layer,), x[0], None), 32).layers[0]
    assert isinstance(aware.layer.q.weight, Int4)
    errors = [error(new, spoilt, tokens, cfg, reference) for new in (aware.layer, blind.layer, plain)]
    assert errors[0] < errors[1] < errors[2]
    assert torch.equal(blind.quantized_out, blind.reference_out) and not torch.equal(
        aware.quantized_out, aware.reference_out
    )
    assert all(report["error"] < report["rtn_error"] for report in aware.report["linears"].values())


def test_quantizing_blockwise_equals_quantizing_at_once() -> None:
    rng = torch.Generator().manual_seed(4)
    x, w = torch.randn(400, 64, generator=rng), torch.randn(100, 64, generator=rng)
    hessian = compute_hessian(x, torch.ones(400), 32)
    whole, report = awq_gptq.quantize_linear(w, None, hessian, 32, 1 << 20)
    parts, also = awq_gptq.quantize_linear(w, None, hessian, 32, 64 * 32)  # 32 rows; the last four are no whole tile
    for name in ("qweight", "scales", "zeros"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    assert also == pytest.approx(report)
    assert torch.equal(awq_gptq.dequantize_blockwise(whole, torch.float32, 64 * 32), dequantize(whole, torch.float32))


def test_error_correction_map_recovers_a_linear_change_of_inputs() -> None:
    rng = torch.Generator().manual_seed(3)
    original = torch.randn(5000, 32, generator=rng)
    quantized = original @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=rng))
    w = torch.randn(8, 32, generator=rng)
    hessian = compute_hessian(quantized, torch.ones(5000), 32)
    new = w @ error_correction_map(original, quantized, torch.ones(5000), hessian)
    assert (quantized @ new.T - original @ w.T).square().mean() < 0.02 * (
        quantized @ w.T - original @ w.T
    ).square().mean()


def test_image_tokens_count_by_image_weight() -> None:
    rows = [torch.tensor([3, -1, -2, 4]), torch.tensor([5])]
    assert token_weights(rows, 1.0).tolist() == [1] * 5
    assert token_weights(rows, 0.25).tolist() == pytest.approx([10 / 7, 2.5 / 7, 2.5 / 7, 10 / 7, 10 / 7])
    x = torch.randn(5, 32)
    by_weight = compute_hessian(x, token_weights(rows, 0.0), 32).mean_abs
    torch.testing.assert_close(by_weight, x[[0, 3, 4]].abs().mean(0))
    with pytest.raises(ValueError, match="calibration needs text"):
        token_weights([torch.tensor([-1])], 0.0)


@torch.no_grad()
def test_outliers_cost_a_fifth_of_the_rtn_error() -> None:
    subject = quality.add_outliers(quality.bundled_subject(64, 0, num_questions=60), 0)
    nearest, best = (
        quality.evaluate_model(subject, quality.quantize_model(subject, method, 128)) for method in ("rtn", "awq-gptq")
    )
    assert nearest["kl"] > 1e-3 and best["kl"] < nearest["kl"] / 5
