"""The tiles that launchers make of a config: no more than registers and shared memory hold, whatever the operands."""

from importlib import import_module
from typing import Any

import pytest
import torch

from vila_triton.ops import KVPages, empty_kv_pages

encoder, prefill, decode, backward, shared = (  # pyright sees no module behind that door
    import_module(f"vila_triton.kernels.{name}")
    for name in ("encoder_attention", "prefill_attention", "decode_attention", "_attention_backward", "_launch")
)
CONFIG = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
SMALL = {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 3}


def heads(d: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(1, 1, d, dtype=dtype)


@pytest.mark.parametrize(
    ("config", "d", "dtype", "changes"),
    [
        (CONFIG, 64, torch.float16, {}),
        (CONFIG, 80, torch.float16, {}),
        (CONFIG, 81, torch.float16, {"num_stages": 1}),
        (CONFIG, 127, torch.float16, {"num_stages": 1}),
        (CONFIG, 128, torch.float16, {}),
        (CONFIG, 129, torch.float16, {"BLOCK_M": 64, "BLOCK_N": 32}),
        (SMALL, 256, torch.float16, {}),
        (CONFIG, 80, torch.float32, {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
        (SMALL, 81, torch.float32, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
    ],
)
def test_tile_of_the_encoder(config: dict, d: int, dtype: torch.dtype, changes: dict) -> None:
    assert encoder.fit_tile(config, heads(d, dtype)) == {**config, **changes}


@pytest.mark.parametrize(
    ("d", "dtype", "kv", "changes"),
    [
        (128, torch.float16, "plain", {}),
        (129, torch.float16, "plain", {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4}),
        (64, torch.float16, "int4", {"BLOCK_N": 32}),
        (32, torch.float16, "int8", {"BLOCK_N": 32}),
        (40, torch.float16, "int8", {"BLOCK_N": 32, "num_stages": 4}),
        (80, torch.float32, "plain", {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
        (81, torch.float32, "int8", {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
    ],
)
def test_tile_of_prefill(d: int, dtype: torch.dtype, kv: Any, changes: dict) -> None:
    kind: Any = dtype if kv == "plain" else kv
    pages: KVPages = empty_kv_pages((1, 16, 1, d), kind, "cpu")
    assert prefill.fit_tile(CONFIG, heads(d, dtype), pages) == {**CONFIG, **changes}


@pytest.mark.parametrize(
    ("d", "dtype", "num_stages", "changes"),
    [
        (64, torch.bfloat16, 2, {}),
        (65, torch.float16, 2, {"BLOCK_M": 64}),
        (72, torch.float16, 1, {"BLOCK_M": 64, "BLOCK_N": 16}),
        (128, torch.float16, 1, {"BLOCK_M": 64}),
        (129, torch.float16, 2, {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
        (80, torch.float32, 2, {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}),
        (81, torch.float32, 2, {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}),
    ],
)
def test_tile_of_the_gradients_of_attention(d: int, dtype: torch.dtype, num_stages: int, changes: dict) -> None:
    config = CONFIG | {"num_stages": num_stages}
    assert backward.fit_tile(config, heads(d, dtype)) == {**config, **changes}


@pytest.mark.parametrize(
    ("config", "ratio", "d", "itemsize", "quantized", "tile"),
    [
        (0, 4, 128, 2, False, (32, 1, 3)),
        (0, 32, 128, 2, False, (32, 2, 3)),
        (0, 4, 129, 2, False, (16, 2, 3)),
        (0, 4, 64, 2, True, (32, 2, 3)),
        (1, 4, 128, 2, False, (64, 4, 3)),
        (1, 4, 256, 2, True, (16, 4, 3)),
        (1, 4, 64, 4, False, (16, 4, 1)),
        (0, 4, 64, 4, True, (16, 2, 1)),
    ],
)
def test_tile_of_decoding(config: int, ratio: int, d: int, itemsize: int, quantized: bool, tile: Any) -> None:
    fitted = decode.fit_tile(decode.CONFIGS[config], ratio, d, itemsize, quantized)
    assert fitted == dict(zip(("BLOCK_N", "num_warps", "num_stages"), tile))


def test_blocks_are_halved_in_float32_and_fit_a_product() -> None:
    for dtype, rows, stages in ((torch.float16, 64, 3), (torch.float32, 32, 1)):
        assert (
            shared.rows_for_dtype(64, heads(1, dtype)) == rows and shared.stages_for_dtype(3, heads(1, dtype)) == stages
        )
        assert shared.rows_for_dtype(16, heads(1, dtype)) == 16 and shared.stages_for_dtype(1, heads(1, dtype)) == 1
    assert [shared.dot_block(n) for n in (1, 16, 17, 64, 72)] == [16, 16, 32, 64, 128]
