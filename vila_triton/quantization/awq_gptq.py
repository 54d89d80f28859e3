"""Our way to round a layer: scales, clipping and rounding all judged by what the other inputs cannot make good."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine, linear
from vila_triton.models.llama import Layer, mlp_hidden
from vila_triton.models.params import tree_map
from vila_triton.ops import Int4, dequantize, rms_norm
from vila_triton.ops.int4 import SMALLEST_SCALE
from vila_triton.ops.int4_tiles import TILE_N

from .activations import CalibrationTokens, attention_output, capture_linear_inputs
from .awq_scales import SCALE_GROUPS, apply_scales_to_linear, search_channel_scale, unscale_norms
from .gptq import gptq_codes, hessian_loss
from .hessian import HessianInfo, compute_hessian, error_correction_map
from .quant_grid import grid_from_range, group_min_max, pack_int4, search_clipping

WEIGHTS_PER_BLOCK = 1 << 18  # weights rounded at a time, or a 32nd of a layer if that is more
CLIP_RATIOS = tuple(1 - i / 20 for i in range(6))


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer in int4, what leaves it, and what its report says."""

    layer: Layer
    reference_out: Tensor  # [s, e] out of the layer as it was
    quantized_out: Tensor  # [s, e] out of the rounded one
    report: dict[str, Any]


def quantize_layer(
    layer: Layer,
    x: Tensor,
    quantized_x: Tensor,
    tokens: CalibrationTokens,
    cfg: LlamaConfig,
    group_size: int,
    propagate_error: bool = True,
) -> QuantizedLayer:
    """Round the linears of a layer; x [s, e] are its inputs, `seen` those it gets from the rounded layers before.

    With `propagate` a linear learns from the inputs that the rounded ones before it give, and makes good what they
    spoilt; without, from what it always had. The work is done in the dtype of x, whatever that of the layer: beside
    the layer, only linears of one place are held in it.
    """
    reference = capture_linear_inputs(tree_map(lambda leaf: leaf.to(x.dtype), layer), x, tokens, cfg)
    heads = (cfg.num_attention_heads, cfg.num_key_value_heads)
    report: dict[str, Any] = {"scales": {}, "linears": {}}
    scales: dict[str, Tensor] = {}
    for scale_group, names in SCALE_GROUPS.items():
        choice = search_channel_scale(
            [getattr(layer, name).weight for name in names],
            compute_hessian(getattr(reference, scale_group), tokens.weights, group_size),
            group_size,
            heads if scale_group == "o" else None,
        )
        scales[scale_group] = choice.scale
        reference = replace(reference, **{scale_group: getattr(reference, scale_group) / choice.scale})
        report["scales"][scale_group] = {"ratio": choice.ratio, "duo": choice.duo, "largest": float(choice.scale.max())}
    norms = unscale_norms(layer, scales)
    quantized = norms
    weights = [getattr(layer, name).weight.numel() for names in SCALE_GROUPS.values() for name in names]
    weights_per_block = max(WEIGHTS_PER_BLOCK, sum(weights) // 32)

    def quantize_scale_group(scale_group: str, quantized_inputs: Tensor) -> Layer:
        """The layer as it was but for the rounded linears of the place, as numbers."""
        nonlocal quantized
        hessian, original_inputs, dequantized = (
            compute_hessian(quantized_inputs, tokens.weights, group_size),
            getattr(reference, scale_group),
            norms,
        )
        correction = (
            None
            if quantized_inputs is original_inputs
            else error_correction_map(original_inputs, quantized_inputs, tokens.weights, hessian)
        )
        for name in SCALE_GROUPS[scale_group]:
            scaled_linear = apply_scales_to_linear(layer, name, scales, cfg.num_key_value_heads)
            bias = None if scaled_linear.bias is None else scaled_linear.bias.to(x.dtype)
            try:
                int4, report["linears"][name] = quantize_linear(
                    scaled_linear.weight, correction, hessian, group_size, weights_per_block
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            del scaled_linear
            quantized = replace(quantized, **{name: Affine(int4, bias)})
            if propagate_error:
                dequantized = replace(
                    dequantized, **{name: Affine(dequantize_blockwise(int4, x.dtype, weights_per_block), bias)}
                )
        return dequantized

    def attention(dequantized: Layer, h: Tensor) -> Tensor:
        return tokens.map_batches(lambda rows, cache: attention_output(dequantized, rows, cfg, cache), h)

    if not propagate_error:
        for scale_group in SCALE_GROUPS:
            quantize_scale_group(scale_group, getattr(reference, scale_group))
        return QuantizedLayer(quantized, reference.out, reference.out, report)
    h = rms_norm(quantized_x, norms.attention_norm, cfg.rms_norm_eps)
    a = attention(quantize_scale_group("attention", h), h)
    quantized_x = quantized_x + linear(quantize_scale_group("o", a).o, a)
    m = rms_norm(quantized_x, norms.mlp_norm, cfg.rms_norm_eps)
    g = mlp_hidden(quantize_scale_group("mlp", m), m)
    quantized_x = quantized_x + linear(quantize_scale_group("down", g).down, g)
    return QuantizedLayer(quantized, reference.out, quantized_x, report)


def quantize_linear(
    w: Tensor, correction: Tensor | None, hessian: HessianInfo, group_size: int, weights_per_block: int
) -> tuple[Int4, dict[str, float]]:
    """A weight [n, k], after `stand_in` if there is one, some rows at a time; and what to say of it."""
    if 0 < (largest := float(w.abs().max())) < SMALLEST_SCALE:
        raise ValueError(f"its largest weight is {largest:.3g}, which no float16 scale can tell from 0")
    blocks, totals = [], torch.zeros(4, dtype=torch.float64)
    for rows in w.split(rows_per_block(w.shape[1], weights_per_block)):
        target = rows if correction is None else rows @ correction
        grid = search_clipping(target, group_size, hessian.schur_blocks, CLIP_RATIOS)
        codes = gptq_codes(target, grid, hessian.act_order, hessian.inverse_cholesky)
        low, high = group_min_max(rows, group_size)
        rtn_grid = grid_from_range(low, high).expand_to_columns(w.shape[1])
        error = hessian_loss(grid.expand_to_columns(w.shape[1]).to_weights(codes) - target, hessian.hessian)
        rtn_error = hessian_loss(rtn_grid.to_weights(rtn_grid.to_codes(rows)) - rows, hessian.hessian)
        low, high = group_min_max(target, group_size)
        clip_ratio = 15 * grid.scales / (high - low).clamp(min=15 * SMALLEST_SCALE)
        energy = hessian_loss(rows, hessian.hessian)
        totals += torch.stack([x.double().sum().cpu() for x in (rtn_error, error, energy, clip_ratio)])
        blocks.append(pack_int4(codes, grid, torch.float16))
    int4 = Int4(
        torch.cat([x.qweight for x in blocks]),
        torch.cat([x.scales for x in blocks], 1),
        torch.cat([x.zeros for x in blocks], 1),
        group_size,
    )
    rtn_error, error, energy, clip_ratio = totals.tolist()
    report = {"nearest": rtn_error / energy, "ours": error / energy} if energy else {"nearest": 0.0, "ours": 0.0}
    return int4, report | {"shrink": clip_ratio / int4.scales.numel()}


def rows_per_block(k: int, weights_per_block: int) -> int:
    """Rows [k] of a weight that are worked on together: whole tiles."""
    return max(1, weights_per_block // k // TILE_N) * TILE_N


def dequantize_blockwise(w: Int4, dtype: torch.dtype, weights_per_block: int) -> Tensor:
    """`dequantize`, some rows at a time."""
    (n, k), step = w.shape, rows_per_block(w.shape[1], weights_per_block)
    out = torch.empty(n, k, dtype=dtype, device=w.scales.device)
    for i in range(0, n, step):
        tiles, rows = slice(i // TILE_N, (i + step) // TILE_N), slice(i, i + step)
        block = replace(w, qweight=w.qweight[tiles], scales=w.scales[:, rows], zeros=w.zeros[:, rows])
        out[rows] = dequantize(block, dtype)
    return out
