"""The bits of many calls of the implementations that run code of a file, in a process that forgets them afterwards."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vila_triton.hashing import short_hash
from vila_triton.registry import OPS, Impl, Unsupported

from ..correctness.error_budget import example_args
from ..correctness.example_plan import ExamplePlan
from ..correctness.find_failure import MAX_DRAWS
from ..correctness.guarded_memory import MEMORY_LAYOUTS, MemoryLayout, bit_pattern, guard_tensor, map_tensors, tensors
from ..correctness.tiles import recorded_launches
from ..measure.rows import ROOT
from .find_mutant import impls_of
from .module_text import replace_module_text
from .processes import Extend
from .source import Mutant

CALL_SECONDS = 60.0
UNSUPPORTED = Unsupported.__name__  # in place of the hash of a call that is refused

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """Calls of every config of every implementation that runs code of a file, `num_draws` in all, each made in both
    memory layouts: of the file as it is, at the sizes of the plan of each config that it supports; with a mutant, at
    given sizes.
    """

    file: str
    num_draws: int
    mutant: Mutant | None = None
    sizes: Sequence[Sequence[Sizes]] = ()


@dataclass(frozen=True)
class CallBits:
    """The sizes for each config, and a hash of each call."""

    sizes: Sequence[Sequence[Sizes]]
    hashes: Sequence[str]


def call_all(calls: Calls, extend: Extend) -> CallBits:
    """Makes the calls, with the mutant in place from now on if there is one."""
    all_sizes: list[list[Sizes]] = []
    hashes: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        if calls.mutant:
            text = calls.mutant.apply((ROOT / calls.file).read_text())
            replace_module_text(calls.file, text, Path(folder))
        configs = [(impl, config) for impl in impls_of(calls.file) for config in impl.configs]
        for number, (impl, config) in enumerate(configs):
            plan = ExamplePlan(OPS[impl.op], config)
            draws = calls.sizes[number] if calls.mutant else (sizes for sizes, _ in plan)
            count = -(-calls.num_draws // len(configs))
            all_sizes.append([])
            for sizes in islice(draws, MAX_DRAWS * count):
                if len(all_sizes[-1]) == count:
                    break
                extend(CALL_SECONDS)
                with recorded_launches() as launches:
                    bits = [hash_of_call(impl, config, sizes, layout) for layout in MEMORY_LAYOUTS]
                if UNSUPPORTED in bits and not calls.mutant:
                    plan.refuse(sizes)
                    continue
                plan.observe(sizes, launches)
                all_sizes[-1].append(sizes)
                hashes += bits
    return CallBits(all_sizes, hashes)


def hash_of_call(impl: Impl, config: Mapping[str, Any], sizes: Sizes, layout: MemoryLayout) -> str:
    """Returns a hash of the bits of a call's results and arguments; the type of the exception, if it raises one."""
    rng = torch.Generator().manual_seed(sizes["seed"])
    args = map_tensors(lambda x: guard_tensor(x, rng, layout).view, example_args(OPS[impl.op], **sizes))
    try:
        found = [*tensors(impl(*args, config=config)), *tensors(args)]
    except Exception as error:  # a mutant may fail in any way
        return type(error).__name__
    bits = (bit_pattern(x).contiguous().numpy().tobytes() for x in found)
    return short_hash(*bits, str([(x.dtype, x.shape) for x in found]).encode())
