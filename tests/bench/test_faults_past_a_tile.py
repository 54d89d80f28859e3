"""`check` finds kernels that are right at small or uneven sizes only: in their first tiles, their first groups, or few
splits; on pages that are not full; for few sequences.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bench.correctness import find_failure as search
from bench.correctness.find_failure import Shrinker, find_failure
from bench.correctness.guarded_memory import MismatchError
from vila_triton.ops import PagedKV
from vila_triton.registry import OPS, Impl, discover

discover()
SECONDS = 30.0  # of the processor, in which `check` finds each


def of_first_columns(count: int | str, blocks: int = 1) -> Callable[..., Callable]:
    """Faults that leave the columns past a count, or past so many blocks of the config, at 0."""

    def fault(fn: Callable, *args: Any, **config: Any) -> Tensor:
        out = fn(*args, **config).clone()
        out[..., count if isinstance(count, int) else blocks * config[count] :] = 0
        return out

    return lambda fn: lambda *args, **config: fault(fn, *args, **config)


def first_row_tile(fn: Callable) -> Callable:
    def fault(*args: Any, **config: Any) -> Tensor:
        out = fn(*args, **config).clone()
        out[config["BLOCK_M"] :] = 0
        return out

    return fault


def zeros_past_group_16(fn: Callable) -> Callable:
    def fault(x: Tensor, w: Any, *terms: Tensor | None, **config: Any) -> Tensor:
        zeros = torch.cat((w.zeros[:16], (w.zeros[16:] + 1) % 16))
        return fn(x, replace(w, zeros=zeros), *terms, **config)

    return fault


def partial_sums_in_float16(fn: Callable) -> Callable:
    empty = torch.empty

    def half(*shape: Any, dtype: Any = None, **options: Any) -> Tensor:
        return empty(*shape, dtype=torch.float16 if dtype == torch.float32 else dtype, **options)

    def fault(x: Tensor, *args: Any, **config: Any) -> Tensor:
        if x.dtype != torch.float16:
            return fn(x, *args, **config)
        with patch.object(torch, "empty", half):
            return fn(x, *args, **config)

    return fault


def last_key_of_a_full_page_forgotten(fn: Callable) -> Callable:
    def fault(q: Tensor, cache: PagedKV, seq_lens: Tensor, *args: Any, **config: Any) -> Tensor:
        is_full = (seq_lens > 1) & (seq_lens % cache.page_size == 0)
        return fn(q, cache, seq_lens - is_full.int(), *args, **config)

    return fault


def first_three_sequences(fn: Callable) -> Callable:
    def fault(*args: Any, **config: Any) -> Tensor:
        out = fn(*args, **config).clone()
        out[3:] = 0
        return out

    return fault


FAULTS: dict[str, tuple[str, str, Callable[[Callable], Callable]]] = {
    "splitk computes its first 128 columns": ("int4_matmul", "splitk", of_first_columns(128)),
    "int4 prefill computes its first row tile": ("int4_matmul", "prefill", first_row_tile),
    "rms_norm computes its first block": ("rms_norm", "triton", of_first_columns("BLOCK")),
    "swiglu computes its first block": ("swiglu", "triton", of_first_columns("BLOCK")),
    "linear computes its first row tile": ("linear", "triton", first_row_tile),
    "zeros are wrong past group 16": ("int4_matmul", "splitk", zeros_past_group_16),
    "rms_norm computes its first four blocks": ("rms_norm", "triton", of_first_columns("BLOCK", blocks=4)),
    "decode forgets the last key of a full page": ("decode_attention", "triton", last_key_of_a_full_page_forgotten),
    "decode serves three sequences": ("decode_attention", "triton", first_three_sequences),
    "split-k parts are float16": ("int4_matmul", "splitk", partial_sums_in_float16),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of interpreted kernels on hard values
@pytest.mark.parametrize("name", FAULTS)
def test_check_finds_a_fault_past_a_tile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shrinker, "shrink", lambda self: None)
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=time.process_time))  # whatever else runs here
    op, impl, fault = FAULTS[name]
    right = OPS[op].impls[impl]
    wrong = Impl(op, "wrong", fault(right.fn), right.configs, right.file)
    result = find_failure(OPS[op], wrong, right.configs[0], 100, SECONDS)
    assert result.simplest and isinstance(result.simplest.error, MismatchError), result.coverage
