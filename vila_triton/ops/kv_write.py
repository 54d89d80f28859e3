"""Writing new keys and values into the pages of the KV cache."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS
from .dtypes import DTYPES, dtype_name, random_tensor
from .indices import check_slot_mapping
from .kv_pages import (
    KV_FORMATS,
    PAGE_SIZES,
    KVPages,
    check_pages,
    empty_kv_pages,
    kv_bytes,
    kv_format,
    quantize_kv,
    write_tokens,
)
from .shapes import check_axes, check_dtype, check_floating


@op(bitwise_exact=True, batch_invariant=True)
def kv_write(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor) -> tuple[KVPages, KVPages]:
    """Write new keys and values into their slots, in place, quantized as the pages are; returns the pages.

    k and v [s, g, d]; k_pages and v_pages [p, l, g, d]; slot_mapping [s] int64, each slot at most once; a slot below 0
    means that the token is not cached.

    Raises ValueError for shapes, dtypes or devices that do not fit, IndexError for slots that do not exist.
    """
    is_cached = slot_mapping >= 0
    for new, pages in ((k, k_pages), (v, v_pages)):
        write_tokens(new[is_cached], pages, slot_mapping[is_cached])
    return k_pages, v_pages


@kv_write.requires
def _(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor) -> None:
    check_kv_write_args("kv_write", k, v, k_pages, v_pages, slot_mapping)


def check_kv_write_args(
    op_name: str, k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor
) -> None:
    """ValueError unless the arguments of `kv_write` fit together."""
    check_axes(
        op_name,
        k=(k, "s g d"),
        v=(v, "s g d"),
        k_pages=(k_pages, "p l g d"),
        v_pages=(v_pages, "p l g d"),
        slot_mapping=(slot_mapping, "s"),
    )
    check_pages(op_name, k_pages, v_pages)
    check_floating(op_name, k=k, v=v)
    check_dtype(op_name, torch.int64, slot_mapping=slot_mapping)


@kv_write.bounds
def _(k: Tensor, v: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor) -> None:
    check_slot_mapping("kv_write", slot_mapping, *k_pages.shape[:2])


@kv_write.example_inputs
def _(
    s: IntRange(1, 40),
    g: IntRange(1, 3),
    d: HEAD_DIMS,
    l: PAGE_SIZES,
    dtype: DTYPES,
    kv: KV_FORMATS = "plain",
    *,
    rng: torch.Generator,
    device: str,
):
    """Random slots of a few pages, full of other tokens; about one token in eight is not cached."""
    pages = -(-s // l) + 1
    k, v = (random_tensor(s, g, d, dtype=dtype, rng=rng, device=device) for _ in range(2))
    like = empty_kv_pages((0, d), getattr(torch, dtype) if kv == "plain" else kv, device)
    cached = [quantize_kv(random_tensor(pages, l, g, d, dtype=dtype, rng=rng, device=device), like) for _ in range(2)]
    slots = torch.randperm(pages * l, generator=rng)[:s]
    slots[torch.rand(s, generator=rng) < 1 / 8] = -1
    return k, v, *cached, slots.to(device)


def special_heads(x: Tensor, rng: torch.Generator) -> Tensor:
    """New heads x [s, g, d], each of them either as it is or replaced by a constant, zeros, subnormal numbers, numbers
    near the largest, or numbers halfway between two codes, which are rounded up.
    """
    info = torch.finfo(x.dtype)
    halves = torch.randint(-7, 7, x.shape, generator=rng).to(x) + 0.5
    halves[..., 0], halves[..., 1] = torch.tensor([[-7, 127], [8, 0]])[
        :, torch.randint(2, x.shape[:2], generator=rng)
    ].to(x)
    kinds = torch.stack(
        (x, x[..., :1].expand_as(x), 0 * x, x * info.smallest_normal / 8, x.clamp(-2, 2) * (info.max / 8), halves)
    )
    kind = torch.randint(len(kinds), x.shape[:2], generator=rng).to(x.device)
    return kinds.gather(0, kind[None, ..., None].expand_as(x[None]))[0]


@kv_write.hard_case("special_heads")
def _(args: tuple, rng: torch.Generator) -> tuple:
    k, v, *rest = args
    return special_heads(k, rng), special_heads(v, rng), *rest


@kv_write.hard_case("no_slots")
def no_slots(args: tuple, rng: torch.Generator) -> tuple:
    """No token is cached."""
    *rest, slot_mapping = args
    return *rest, -1 - torch.randint(100, slot_mapping.shape, generator=rng).to(slot_mapping)


kv_write.mutates("k_pages", "v_pages")


@kv_write.sizes_from_args("s")
def _(k, v, k_pages, v_pages, slot_mapping):
    (s, g, d), l = k.shape, k_pages.shape[1]
    return dict(s=s, g=g, d=d, l=l, dtype=dtype_name(k.dtype), kv=kv_format(k_pages))


@kv_write.flops_and_bytes
def _(s, g, d, l, dtype, kv="plain"):
    return 0, 2 * s * g * (kv_bytes(1, d, dtype, "plain") + kv_bytes(1, d, dtype, kv)) + 8 * s
