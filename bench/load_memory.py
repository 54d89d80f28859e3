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
from vila_triton.checkpoints.loading import open_source
from vila_triton.checkpoints.writing import write
from vila_triton.console import bar
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
    ("ours", "float16"),
    ("awq-gemm", "float16"),
    ("awq-v2", "float16"),
)


def smallest(size: float, group: int | None) -> dict[str, Any]:
    """VILA1.5-3b with as few layers as reach a size in bytes."""
    found = random_checkpoint.table("vila1.5-3b")
    for layers in range(1, found["llm"]["num_hidden_layers"] + 1):
        less = random_checkpoint.narrowed(found, layers, 1)
        if sum(map(size_report.nbytes, random_checkpoint.random_source(less, group=group).tensors.values())) >= size:
            return less
    raise ValueError(f"VILA1.5-3b is smaller than {size_report.size(size)}")


def measure(folder: Path, dtype: str, device: str) -> tuple[int, int]:
    """Peak bytes of loading, and bytes of the parameters."""
    command = [sys.executable, "-c", LOAD, str(folder), dtype, device]
    done = subprocess.run(command, capture_output=True, text=True, cwd=rows.ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    peak, held = map(int, done.stdout.split())
    return peak, held


@tool
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=Limits(float, 1e-3, 1e3), default=1.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print(f"{'on disk':>18}{'size':>10}{'loaded as':>12}{'parameters':>12}{'peak':>10}{'peak / size':>13}")
    with tempfile.TemporaryDirectory() as place:
        for form, dtype in CASES:
            folder = Path(place) / form
            if not folder.exists():
                bar(f"writing {form}", last=True)
                ours, group = Path(place) / "ours", None if form == "dense" else 128
                if ours.exists():
                    source = open_source(ours)
                else:
                    source = random_checkpoint.random_source(smallest(args.gigabytes * 1e9, group), group=group)
                write(source, folder, form, limit=int(args.gigabytes * 2e8), key=form)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".pt"))
            peak, held = measure(folder, dtype, args.device)
            sizes = f"{size_report.size(size):>10}{dtype:>12}{size_report.size(held):>12}{size_report.size(peak):>10}"
            print(f"{form:>18}{sizes}{peak / size:13.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
