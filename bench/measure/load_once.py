"""Loads a checkpoint and reads every parameter once: `python -m bench.measure.load_once FOLDER DTYPE DEVICE`

Prints the bytes by which the highest resident set size of the process (VmHWM) grew meanwhile, and the bytes of the
parameters. `bench.load_memory` runs it in a process of its own.
"""

import argparse
import re
import sys
from pathlib import Path

import torch

from vila_triton.checkpoints import loading
from vila_triton.models.params import leaves

from .._tool import tool


def peak_kilobytes() -> int:
    """Returns VmHWM of this process, in KiB."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@tool
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("dtype", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("device")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = loading.build_vila_config(*loading.read_configs(args.folder))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the present resident set size
    before = peak_kilobytes()
    parameters = leaves(loading.load_params(args.folder, cfg, getattr(torch, args.dtype), args.device))
    for x in parameters:
        if x.numel():
            x.view(torch.uint8).max()
    print(1024 * (peak_kilobytes() - before), sum(x.nbytes for x in parameters))


if __name__ == "__main__":
    sys.exit(main())
