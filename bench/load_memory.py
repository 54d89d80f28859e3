"""Measures the memory of loading a sharded checkpoint against its size: `python -m bench.load_memory`

Writes a VILA1.5-3b with random weights and as few layers as reach the size, in five shards, and loads it in a fresh
process (`bench.measure.load_once`). Prints the growth of the process's highest resident set size (VmHWM, which counts
pages of mapped files) by the time that every element of every parameter has been read once.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vila_triton.checkpoints import random_checkpoint
from vila_triton.checkpoints.loading import open_checkpoint
from vila_triton.checkpoints.size_report import format_bytes, total_bytes
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.console import print_progress
from vila_triton.limits import Limits

from ._tool import tool
from .measure import rows

CASES = (
    ("dense", "float16"),
    ("dense", "bfloat16"),
    ("vila-triton", "float16"),
    ("awq-gemm", "float16"),
    ("awq-v2", "float16"),
)


def smallest_model(min_bytes: float, group_size: int | None) -> dict[str, Any]:
    """Returns the table of VILA1.5-3b with the fewest layers that take `min_bytes`; `group_size`: with int4 linears."""
    table = random_checkpoint.read_model_toml("vila1.5-3b")
    for layers in range(1, table["llm"]["num_hidden_layers"] + 1):
        candidate = random_checkpoint.scale_down(table, layers, 1)
        tensors = random_checkpoint.random_checkpoint(candidate, group_size=group_size).tensors
        if sum(map(total_bytes, tensors.values())) >= min_bytes:
            return candidate
    raise ValueError(f"VILA1.5-3b is smaller than {format_bytes(min_bytes)}")


def measure_loading(folder: Path, dtype: str, device: str) -> tuple[int, int]:
    """Loads a folder in a fresh process; returns the peak bytes of loading and the bytes of the parameters."""
    command = [sys.executable, "-m", "bench.measure.load_once", str(folder), dtype, device]
    process = subprocess.run(command, capture_output=True, text=True, cwd=rows.CHILD_FOLDER)
    if process.returncode:
        raise RuntimeError(process.stderr.strip().splitlines()[-1])
    peak, param_bytes = map(int, process.stdout.split())
    return peak, param_bytes


@tool
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=Limits(float, 1e-3, 1e3), default=1.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(f"{'on disk':>18}{'size':>10}{'loaded as':>12}{'parameters':>12}{'peak':>10}{'peak / size':>13}")
    with tempfile.TemporaryDirectory() as work_dir:
        for layout, dtype in CASES:
            folder = Path(work_dir) / layout
            if not folder.exists():
                print_progress(f"writing {layout}", is_last=True)
                native_folder, group_size = Path(work_dir) / "vila-triton", None if layout == "dense" else 128
                if native_folder.exists():
                    source = open_checkpoint(native_folder)
                else:
                    model = smallest_model(args.gigabytes * 1e9, group_size)
                    source = random_checkpoint.random_checkpoint(model, group_size=group_size)
                write_checkpoint(source, folder, layout, max_shard_bytes=int(args.gigabytes * 2e8), source_key=layout)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt"))
            peak, param_bytes = measure_loading(folder, dtype, args.device)
            sizes = f"{format_bytes(size):>10}{dtype:>12}{format_bytes(param_bytes):>12}{format_bytes(peak):>10}"
            print(f"{layout:>18}{sizes}{peak / size:13.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
