"""Quantize a decoder layer with AWQ's channel scales, clipped grids and GPTQ (--method awq-gptq).

All three are chosen by the Hessian-weighted error that remains after GPTQ has compensated what the other inputs can
express.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vila_triton.models.config import LlamaConfig
from vila_triton.models.layers import Affine, linear
from vila_triton.models.llama import Layer, mlp_hidden
from vila_triton.models.params import tree_map
from vila_triton.ops import Int4, dequantize, rms_norm
from vila_triton.ops.int4_tiles import TILE_N
from vila_triton.ops.int4_weight import SMALLEST_SCALE

from .activations import CalibrationTokens, attention_output, capture_linear_inputs
from .awq_scales import SCALE_GROUPS, apply_scales_to_linear, search_channel_scale, unscale_norms
from .gptq import gptq_codes, hessian_loss
from .hessian import HessianInfo, compute_hessian, error_correction_map
from .quant_grid import grid_from_range, group_min_max, pack_int4, search_clipping

WEIGHTS_PER_BLOCK = 1 << 18  # weights that are quantized together, or a 32nd of a layer if that is more
CLIP_RATIOS = tuple(1 - i / 20 for i in range(6))


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer in int4, its output [s, e] before and after, and its entry in the report."""

    layer: Layer
    reference_out: Tensor  # of the original layer, on the original hidden states
    quantized_out: Tensor  # of the quantized layer, on the hidden states behind the quantized layers
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
    """Quantize the linears of a decoder layer to int4.

    x: its input [s, e] in the original model; quantized_x: its input behind the quantized layers before it. With
    propagate_error each linear is quantized from the inputs that it gets behind all quantized linears, and its weight
    corrected for the difference (`error_correction_map`); without, from the inputs of the original model.
    Everything is computed in the dtype of x. Beside the layer, only the linears of one scale group are held in it.
    Errors: ValueError naming the linear.
    """
    quantizer = LayerQuantizer(layer, x, tokens, cfg, group_size)
    reference_out = quantizer.inputs.out
    if not propagate_error:
        for scale_group in SCALE_GROUPS:
            quantizer.quantize(scale_group)
        return QuantizedLayer(quantizer.quantized, reference_out, reference_out, quantizer.report)
    h = rms_norm(quantized_x, quantizer.scaled.attention_norm, cfg.rms_norm_eps)
    attention = quantizer.quantize("attention", h)
    a = tokens.map_batches(lambda rows, cache: attention_output(attention, rows, cfg, cache), h)
    h = quantized_x + linear(quantizer.quantize("o", a).o, a)
    m = rms_norm(h, quantizer.scaled.mlp_norm, cfg.rms_norm_eps)
    g = mlp_hidden(quantizer.quantize("mlp", m), m)
    h = h + linear(quantizer.quantize("down", g).down, g)
    return QuantizedLayer(quantizer.quantized, reference_out, h, quantizer.report)


class LayerQuantizer:
    """Searches the channel scales of a decoder layer, then quantizes its linears, one scale group after the other.

    inputs: those of the linears in the original model, divided by the scales; scaled: the original layer with its norms
    divided by the scales; quantized: the same with the linears that are done in int4; report: the scales, and the
    errors of these linears.
    """

    def __init__(self, layer: Layer, x: Tensor, tokens: CalibrationTokens, cfg: LlamaConfig, group_size: int) -> None:
        self.layer, self.tokens, self.cfg, self.group_size, self.dtype = layer, tokens, cfg, group_size, x.dtype
        self.inputs = capture_linear_inputs(tree_map(lambda leaf: leaf.to(x.dtype), layer), x, tokens, cfg)
        self.scales: dict[str, Tensor] = {}
        self.report: dict[str, Any] = {"scales": {}, "linears": {}}
        heads = (cfg.num_attention_heads, cfg.num_key_value_heads)
        for scale_group, names in SCALE_GROUPS.items():
            choice = search_channel_scale(
                [getattr(layer, name).weight for name in names],
                compute_hessian(getattr(self.inputs, scale_group), tokens.weights, group_size),
                group_size,
                heads if scale_group == "o" else None,
            )
            self.scales[scale_group] = choice.scale
            scaled_inputs = getattr(self.inputs, scale_group) / choice.scale
            self.inputs = replace(self.inputs, **{scale_group: scaled_inputs})
            entry = {"ratio": choice.ratio, "uses_weights": choice.uses_weights, "largest": float(choice.scale.max())}
            self.report["scales"][scale_group] = entry
        self.scaled = self.quantized = unscale_norms(layer, self.scales)
        weights = [getattr(layer, name).weight.numel() for names in SCALE_GROUPS.values() for name in names]
        self.weights_per_block = max(WEIGHTS_PER_BLOCK, sum(weights) // 32)

    def quantize(self, scale_group: str, quantized_inputs: Tensor | None = None) -> Layer:
        """Quantize the linears of a scale group, from the inputs behind quantized linears if they are given.

        Returns the scaled layer with these linears dequantized, for what runs behind them.
        """
        inputs = getattr(self.inputs, scale_group)
        x, weights = inputs if quantized_inputs is None else quantized_inputs, self.tokens.weights
        hessian, correction = compute_hessian(x, weights, self.group_size), None
        if quantized_inputs is not None:
            correction = error_correction_map(inputs, x, weights, hessian)
        dequantized = self.scaled
        for name in SCALE_GROUPS[scale_group]:
            scaled_linear = apply_scales_to_linear(self.layer, name, self.scales, self.cfg.num_key_value_heads)
            bias = None if scaled_linear.bias is None else scaled_linear.bias.to(self.dtype)
            try:
                int4, self.report["linears"][name] = quantize_linear(
                    scaled_linear.weight, correction, hessian, self.group_size, self.weights_per_block
                )
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            del scaled_linear
            self.quantized = replace(self.quantized, **{name: Affine(int4, bias)})
            if quantized_inputs is not None:
                weight = dequantize_blockwise(int4, self.dtype, self.weights_per_block)
                dequantized = replace(dequantized, **{name: Affine(weight, bias)})
        return dequantized


def quantize_linear(
    w: Tensor, correction: Tensor | None, hessian: HessianInfo, group_size: int, weights_per_block: int
) -> tuple[Int4, dict[str, float]]:
    """Quantize a weight [n, k], multiplied by `correction` [k, k] if there is one, a block of rows at a time.

    Returns the int4 weight and its entry in the report: `error` and `rtn_error`, of rounding to nearest, as shares of
    the output's energy, and `clip_ratio`, the mean ratio of a group's grid to the range of its weights.
    Errors: ValueError for a weight that is not finite, or too large or too small for float16 scales.
    """
    if 0 < (largest := float(w.abs().max())) < SMALLEST_SCALE:
        raise ValueError(f"its largest weight is {largest:.3g}, which no float16 scale can tell from 0")
    blocks, totals = [], torch.zeros(4, dtype=torch.float64)
    for rows in w.split(rows_per_block(w.shape[1], weights_per_block)):
        target = rows if correction is None else rows @ correction
        grid = search_clipping(target, group_size, hessian.schur_blocks, CLIP_RATIOS)
        codes = gptq_codes(target, grid, hessian.act_order, hessian.inverse_cholesky)
        rtn_grid = grid_from_range(*group_min_max(rows, group_size)).expand_to_columns(w.shape[1])
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
    error, rtn_error = (error / energy, rtn_error / energy) if energy else (0.0, 0.0)
    return int4, {"rtn_error": rtn_error, "error": error, "clip_ratio": clip_ratio / int4.scales.numel()}


def rows_per_block(k: int, weights_per_block: int) -> int:
    """The number of rows of k weights, whole tiles, that make up a block."""
    return max(1, weights_per_block // k // TILE_N) * TILE_N


def dequantize_blockwise(w: Int4, dtype: torch.dtype, weights_per_block: int) -> Tensor:
    """Dequantize w [n, k] a block of rows at a time, which takes less memory than `dequantize`."""
    (n, k), step = w.shape, rows_per_block(w.shape[1], weights_per_block)
    out = torch.empty(n, k, dtype=dtype, device=w.scales.device)
    for i in range(0, n, step):
        tiles, rows = slice(i // TILE_N, (i + step) // TILE_N), slice(i, i + step)
        block = replace(w, qweight=w.qweight[tiles], scales=w.scales[:, rows], zeros=w.zeros[:, rows])
        out[rows] = dequantize(block, dtype)
    return out
