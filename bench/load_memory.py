"""Memory of loading a sharded checkpoint against its size: `python -m bench.load_memory`.

Writes a VILA1.5-3b of as few layers as reach the size, with random weights, in five shards; loads it in a fresh process
and prints the most memory that the process held beyond what it had before (VmHWM, which counts pages of mapped files),
after every number of every parameter has been read once.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vila_triton.checkpoints import random_checkpoint, size_report
from vila_triton.checkpoints.loading import open_checkpoint
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.console import print_progress
from vila_triton.limits import Limits

from ._tool import tool
from .measure import rows

LOAD = """
import re, sys
from pathlib import Path
import torch
from vila_triton import checkpoint
from vila_triton.models.params import leaves

def kilobytes(field):
    return int(re.search(rf"{field}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
folder, dtype, device = Path(sys.argv[1]), getattr(torch, sys.argv[2]), sys.argv[3]
cfg = checkpoint.geometry(*checkpoint.read_configs(folder))
Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
before = kilobytes("VmHWM")
p = checkpoint.load_params(folder, cfg, dtype, device)
for x in leaves(p):
    x.view(torch.uint8).max() if x.numel() else None
print(1024 * (kilobytes("VmHWM") - before), sum(x.nbytes for x in leaves(p)))
"""
CASES = (
    ("dense", "float16"),
    ("dense", "bfloat16"),
    ("vila-triton", "float16"),
    ("awq-gemm", "float16"),
    ("awq-v2", "float16"),
)


def smallest_model(min_bytes: float, group_size: int | None) -> dict[str, Any]:
    """VILA1.5-3b with as few layers as reach a size in bytes."""
    model_table = random_checkpoint.read_model_toml("vila1.5-3b")
    for layers in range(1, model_table["llm"]["num_hidden_layers"] + 1):
        candidate = random_checkpoint.scale_down(model_table, layers, 1)
        if (
            sum(
                map(
                    size_report.total_bytes,
                    random_checkpoint.random_checkpoint(candidate, group_size=group_size).tensors.values(),
                )
            )
            >= min_bytes
        ):
            return candidate
    raise ValueError(f"VILA1.5-3b is smaller than {size_report.format_bytes(min_bytes)}")


def measure_loading(folder: Path, dtype: str, device: str) -> tuple[int, int]:
    """Peak bytes of loading, and bytes of the parameters."""
    command = [sys.executable, "-c", LOAD, str(folder), dtype, device]
    process = subprocess.run(command, capture_output=True, text=True, cwd=rows.ROOT)
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
                    source = random_checkpoint.random_checkpoint(
                        smallest_model(args.gigabytes * 1e9, group_size), group_size=group_size
                    )
                write_checkpoint(source, folder, layout, max_shard_bytes=int(args.gigabytes * 2e8), source_key=layout)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt"))
            peak, param_bytes = measure_loading(folder, dtype, args.device)
            sizes = f"{size_report.format_bytes(size):>10}{dtype:>12}{size_report.format_bytes(param_bytes):>12}{size_report.format_bytes(peak):>10}"
            print(f"{layout:>18}{sizes}{peak / size:13.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
