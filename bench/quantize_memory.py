"""Measures the memory of the quantizer against the depth of a model: `python -m bench.quantize_memory [--layers 2 16]`

Writes random models of several depths, quantizes each, and prints the peak bytes of tensors, in all and as a multiple
of one layer in float32, in which the search works. Depth must not matter. Two parts are listed apart: the activations
of one layer (inputs of its linears in the original and in the quantized model), and the Hessian of its widest inputs
with the matrices made from it, four in all, which are not small beside a layer at any width.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from vila_triton.checkpoints.loading import open_checkpoint, save_checkpoint
from vila_triton.limits import COUNT
from vila_triton.models import vila
from vila_triton.models.params import init_tree, num_parameters
from vila_triton.quantization import pipeline as awq
from vila_triton.quantization.calibration_data import CalibrationSet
from vila_triton.quantization.config import QuantizeConfig
from vila_triton.tiny.config import CONFIG, config_files

from ._tool import kernels_option, tool
from .measure import rows
from .measure.peak_memory import PeakMemory


def measure_peak(layers: int, width: int, tokens: int, group_size: int) -> dict[str, float]:
    """Returns bytes: the peak, one layer, activations, Hessians (`moments`)."""
    f = 2 * width
    llm = replace(CONFIG.llm, num_hidden_layers=layers, hidden_size=width, intermediate_size=f, head_dim=width // 8)
    cfg = replace(CONFIG, llm=llm, mm_projector=replace(CONFIG.mm_projector, hidden_size=width))
    rng = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        p = init_tree(vila.param_specs(cfg, torch.float16), rng)
        layer = 4 * num_parameters(p.llm.layers[0])
        save_checkpoint(Path(folder) / "model", *config_files(cfg), p)
        del p
        prompts = CalibrationSet(list(torch.randint(0, 128, (tokens,), generator=rng).split(64)), None)
        with PeakMemory([]) as peak:
            try:
                source, options = open_checkpoint(Path(folder) / "model"), QuantizeConfig(group_size=group_size)
                awq.quantize_checkpoint(source, Path(folder) / "work", options, prompts, torch.device("cpu"))
            except KeyboardInterrupt:  # without the advice to go on: the folder goes, too
                raise KeyboardInterrupt from None
    # x and seen before and after, the inputs of the four places before and after, and what leaves the layer
    activations = 4 * tokens * (6 * width + 2 * (3 * width + f) + width)
    return {"peak": peak.peak_bytes, "layer": layer, "activations": activations, "moments": 4 * 4 * f * f}


@tool
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--layers", type=COUNT, nargs="+", default=[2, 16])
    parser.add_argument("--width", type=COUNT, default=512)
    parser.add_argument("--tokens", type=COUNT, default=512)
    parser.add_argument("--group", type=COUNT, default=128)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args()
    print("  layers      peak     layer  activations   moments  beyond both, in layers   (MiB)")
    for layers in args.layers:
        result = measure_peak(layers, args.width, args.tokens, args.group)
        ratio = (result["peak"] - result["activations"] - result["moments"]) / result["layer"]
        sizes = [result[name] / 2**20 for name in ("peak", "layer", "activations", "moments")]
        print(f"{layers:8}{sizes[0]:10.2f}{sizes[1]:10.2f}{sizes[2]:13.2f}{sizes[3]:10.2f}{ratio:24.2f}", flush=True)
        if args.out:
            labels = {"kind": "quantize memory", "layers": layers, "width": args.width, "tokens": args.tokens}
            rows.write(args.out, [{**labels, **result, **rows.stamp(torch.device("cpu"))}])


if __name__ == "__main__":
    sys.exit(main())
