"""Measures the activation memory of a prefill against the length of the prompt: `python -m bench.prefill_memory`

Prefills prompts of several lengths with the bundled model's language model, in one pass and in chunks, and prints the
bytes of the cache and the peak bytes of tensors beyond parameters and cache. The column of chunks must stay flat: it
holds one chunk's activations. The reference attention gathers the cached tokens of a layer out of its pages, which
grows; the Triton kernels read the pages where they are (here in the interpreter, whose own buffers stand for registers
and shared memory and do not count).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from vila_triton.arguments import parse_kernel_settings
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.device import pick_device
from vila_triton.engine import engine
from vila_triton.limits import COUNT, COUNT_OR_ZERO
from vila_triton.models import params, vila
from vila_triton.models.config import VilaConfig
from vila_triton.ops import page_tensors
from vila_triton.registry import use
from vila_triton.tiny.config import CONFIG

from ._tool import kernels_option, tool
from .measure import rows
from .measure.peak_memory import PeakMemory


@torch.inference_mode()
def measure_prefill(p: vila.Vila, cfg: VilaConfig, length: int, chunk: int, device: torch.device) -> tuple[int, int]:
    """Returns the bytes of the cache and the peak bytes of everything else for a prompt of `length` tokens."""
    cache = PagedKVCache(cfg.llm, 0, device=device)
    cache.allocator.add_sequence()
    cache.ensure_capacity({0: length})
    ids = torch.arange(length, device=device) % cfg.llm.vocab_size
    with PeakMemory([*params.leaves(p), *page_tensors(cache.k_pages), *page_tensors(cache.v_pages), ids]) as peak:
        engine.extend(p, {0: ids}, cfg, cache, chunk_size=chunk or None)
    return cache.nbytes, peak.peak_bytes


@tool
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--lengths", type=COUNT, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--chunks", type=COUNT_OR_ZERO, nargs="+", default=[0, 128], help="0 is one pass")
    parser.add_argument("--layers", type=COUNT, default=CONFIG.llm.num_hidden_layers)
    parser.add_argument("--device")
    parser.add_argument("--set", action="append", default=[], metavar="kernels.OP=NAME")
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args()
    device = pick_device(args.device)
    cfg = replace(CONFIG, llm=replace(CONFIG.llm, num_hidden_layers=args.layers))
    specs = vila.param_specs(cfg, torch.float16)
    p = params.tree_map(lambda x: x.to(device), params.init_tree(specs, torch.Generator().manual_seed(0)))
    heads = "".join(f"{f'chunks of {chunk}' if chunk else 'one pass':>16}" for chunk in args.chunks)
    print(f"{'tokens':>8}{'cache':>12}{heads}   (KiB, {args.layers} layers)")
    with use(**parse_kernel_settings(args.set)):
        for length in args.lengths:
            results = {chunk: measure_prefill(p, cfg, length, chunk, device) for chunk in args.chunks}
            peaks = "".join(f"{peak / 1024:16.0f}" for _, peak in results.values())
            print(f"{length:8}{results[args.chunks[0]][0] / 1024:12.0f}{peaks}", flush=True)
            labels = {"kind": "memory", "choice": " ".join(args.set) or "default", "layers": args.layers}
            if args.out:
                stamp = rows.stamp(device)
                sizes = ({"length": length, "chunk": n, "cache": cache, "peak": m} for n, (cache, m) in results.items())
                rows.write(args.out, [{**labels, **row, **stamp} for row in sizes])


if __name__ == "__main__":
    sys.exit(main())
