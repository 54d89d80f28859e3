"""gemlite: Triton kernels chosen by rows: up to 4 a product without tensor cores, below 64 split along k, else whole.

    pip install --no-deps --no-build-isolation gemlite==0.6.0.post2      # it also imports tqdm and numpy

"gemlite" is the library as it is: below 64 rows, parts of a sum are added up by atomics in the dtype of x. In
"gemlite_float32" they are in float32, its option `output_dtype`, and what it returns is then converted.

`tune=False` runs the config that the library ships for this GPU, shape and group, else the first that its own pruning
leaves; with `tune=True` it times its candidates for a shape it ships none for (tens of seconds each, the gate's small
shapes included).

float16 and bfloat16 (its float32 products are TF32); groups are multiples of 32; n is padded to a multiple of 128, as
it is in every released model. It loads scales and zeros without a mask, past the last group too, where 0 · NaN would
spoil a sum; so ours are followed by zeros. Without a GPU it sees the one that Triton compiles for, and reads the
configs shipped for that.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from vila_triton.ops import Int4, int4_matmul
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.registry import Unsupported

from ._awq import check_plain_call, pad_rows
from ._cached_conversion import convert_once
from ._offline import check_tensors, fake_gpu, use_first_config

with fake_gpu():
    gemlite: Any = import_module("gemlite")
    core: Any = import_module("gemlite.core")
    utils: Any = import_module("gemlite.triton_kernels.utils")

CONFIGS = [{"tune": False}, {"tune": True}]
DTYPES = {torch.float16: gemlite.DType.FP16, torch.bfloat16: gemlite.DType.BF16}
PADDING_GROUPS = 32  # rows after the last group: k is split 16 ways at most, and a tile is 1024 wide


def to_gemlite_layer(w: Int4, output_dtype: Any) -> Any:
    """The library's own linear layer with this weight. output_dtype: None for the dtype of the weight."""
    w = pad_rows(w, 128)
    n, k = w.shape
    dtype = DTYPES[w.scales.dtype]
    layer = gemlite.GemLiteLinear(4, w.group_size, k, n, input_dtype=dtype, output_dtype=output_dtype or dtype)
    layer.pack(unpack_codes(w).to(torch.uint8), w.scales.t().contiguous(), w.zeros.t().contiguous())
    for name in ("scales", "zeros"):  # [G, n]
        rows = F.pad(getattr(layer, name), (0, 0, 0, PADDING_GROUPS))
        setattr(layer, name, torch.nn.Parameter(rows[:-PADDING_GROUPS], requires_grad=False))
    return layer


@cache
def read_shipped_configs(file: str | None) -> dict:
    """Returns the content of a JSON file of configs that the library ships, or an empty dict if the file is None."""
    return json.loads(Path(file).read_text()) if file else {}


@contextmanager
def fake_gpu_queries(x: Tensor) -> Iterator[None]:
    """Inside, if x is on no GPU, the library uses fresh answers to what it asked its GPU when it was imported."""
    with fake_gpu(x):
        if x.is_cuda:
            yield
            return
        with (
            patch.object(core, "GEMLITE_TRITON_CONFIG_CACHE", read_shipped_configs(core.get_default_cache_config())),
            patch.object(utils, "GPU_COMPUTE_CAPABILITY", torch.cuda.get_device_capability()[0]),
        ):
            yield


@int4_matmul.impl("gemlite", configs=CONFIGS)
def int4_matmul_gemlite(
    x: Tensor,
    w: Int4,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    tune: bool = False,
    **tile: int,
) -> Tensor:
    """Multiplies x [..., k] by the weight [n, k] with gemlite as it is and returns [..., n]; see `run_gemlite`."""
    check_plain_call("gemlite", w, bias, residual)
    return run_gemlite(x, w, tune, tile)


@int4_matmul.impl("gemlite_float32", configs=CONFIGS)
def int4_matmul_gemlite_float32(
    x: Tensor,
    w: Int4,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    tune: bool = False,
    **tile: int,
) -> Tensor:
    """Multiplies as "gemlite" does, but adds up in float32 and converts the result to the dtype of x."""
    check_plain_call("gemlite", w, bias, residual)
    return run_gemlite(x, w, tune, tile, output_dtype=gemlite.DType.FP32).to(x.dtype)


def override_config(config: triton.Config, tile: Mapping[str, int]) -> triton.Config:
    """The library's config with the blocks, warps and stages of a tile in place of its own, as far as it has such."""
    overrides = {name.replace("BLOCK_", "BLOCK_SIZE_"): value for name, value in tile.items()}
    blocks = {name: overrides.get(name, value) for name, value in config.kwargs.items()}
    warps, stages = tile.get("num_warps", config.num_warps), tile.get("num_stages", config.num_stages)
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


@contextmanager
def select_config(tune: bool, tile: Mapping[str, int]) -> Iterator[None]:
    """Inside, the library runs the tile if there is one, else the config that `tune` stands for."""
    if tune:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(use_first_config(partial(override_config, tile=tile) if tile else None))
        if tile:  # else a config that the library ships for this shape wins
            stack.enter_context(patch.object(core, "GEMLITE_TRITON_CONFIG_CACHE", {}))
        yield


def run_gemlite(x: Tensor, w: Int4, tune: bool, tile: Mapping[str, int], output_dtype: Any = None) -> Tensor:
    """Multiplies x [..., k] by the weight [n, k] with gemlite and returns [..., n].

    tune: the library times its own candidates. tile: blocks, warps and stages in place of the library's, if not empty.
    output_dtype: gemlite's, None for that of the weight. Raises Unsupported for calls, dtypes and group sizes that the
    library does not take and for tuning without a GPU, ValueError for tuning with a tile.
    """
    check_tensors("gemlite", x, w.scales, dtypes=[*DTYPES])
    if w.group_size % 32:
        raise Unsupported(f"gemlite: the group is {w.group_size}, expected a multiple of 32")
    if tune and not x.is_cuda:
        raise Unsupported("gemlite: tunes itself only on a GPU")
    n, k = w.shape
    if tune and tile:
        raise ValueError(f"gemlite: tune and a tile ({', '.join(tile)}) exclude one another")
    with fake_gpu_queries(x), select_config(tune, tile):
        layer = convert_once(to_gemlite_layer, w, output_dtype=output_dtype)
        # The function under its custom op, since on tensors without data the op itself only tells its shape.
        out = core.forward_functional._init_fn(x.reshape(-1, k), None, layer.get_tensor_args(), layer.get_meta_args())
    return out[:, :n].reshape(*x.shape[:-1], n)
