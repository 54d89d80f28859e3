"""Read a damaged file again in this process: `python -m tests.fuzz READER SEED`; all of a reader without a seed."""

import argparse
import tempfile
from pathlib import Path

import torch

from .readers import READERS
from .worker import faults, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", choices=READERS, metavar="READER", help=", ".join(READERS))
    parser.add_argument("seed", type=int, nargs="?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    reader, folder = READERS[args.reader], Path(tempfile.mkdtemp()) / "folder"
    folder.mkdir()
    if args.seed is None:
        print(report(reader, faults(reader, folder, range(reader.count))))
        return
    content = reader.damaged(reader.prepare(folder), args.seed)
    (folder / reader.file).write_bytes(content)
    print(f"{folder / reader.file}: {len(content)} bytes, {content[:2000]!r}", flush=True)
    reader.read(folder)
    print("it is read without an error")


if __name__ == "__main__":
    main()
