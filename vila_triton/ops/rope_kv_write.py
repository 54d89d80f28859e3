"""RoPE of queries and keys, and writing keys and values into the pages of the KV cache, as one op."""
# pyright: reportInvalidTypeForm=false

import torch
from torch import Tensor

from vila_triton.registry import IntRange, op

from .attention import HEAD_DIMS, QUERIES_PER_KV
from .dtypes import DTYPES, dtype_name, random_tensor
from .elementwise import rope
from .indices import check_slot_mapping
from .kv_pages import KV_FORMATS, PAGE_SIZES, KVPages, kv_bytes, kv_format
from .kv_write import check_kv_write_args, kv_write, no_slots, special_heads
from .shapes import check_axes, check_floating, check_same_dtype


@op(bitwise_exact=True, batch_invariant=True)
def rope_kv_write(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_pages: KVPages, v_pages: KVPages, slot_mapping: Tensor
) -> tuple[Tensor, Tensor, KVPages, KVPages]:
    """`rope` of q and k, then `kv_write` of the rotated k and of v: (rotated q, rotated k, k_pages, v_pages).

    q [s, h, d], k and v [s, g, d], cos and sin [s, d/2] float32; pages and slots as in `kv_write`, written in place. A
    token whose slot is below 0 is rotated, but not cached. What is cached has no gradient.

    Raises ValueError for shapes, dtypes or devices that do not fit, IndexError for slots that do not exist.
    """
    q, k = rope.reference(q, cos, sin), rope.reference(k, cos, sin)
    return q, k, *kv_write.reference(k.detach(), v.detach(), k_pages, v_pages, slot_mapping)


@rope_kv_write.requires
def _(q, k, v, cos, sin, k_pages, v_pages, slot_mapping) -> None:
    sizes = check_axes(
        "rope_kv_write", q=(q, "s h d"), k=(k, "s g d"), v=(v, "s g d"), cos=(cos, "s r"), sin=(sin, "s r")
    )
    if sizes["d"] != 2 * sizes["r"]:
        raise ValueError(f"rope_kv_write: q has head dim {sizes['d']}, but cos and sin hold {sizes['r']} pairs")
    check_floating("rope_kv_write", q=q, cos=cos, sin=sin)
    check_same_dtype("rope_kv_write", q=q, k=k, v=v)
    check_kv_write_args("rope_kv_write", k, v, k_pages, v_pages, slot_mapping)


@rope_kv_write.bounds
def _(q, k, v, cos, sin, k_pages, v_pages, slot_mapping) -> None:
    check_slot_mapping("rope_kv_write", slot_mapping, *k_pages.shape[:2])


@rope_kv_write.example_inputs
def _(
    s: IntRange(1, 30),
    g: IntRange(1, 3),
    ratio: QUERIES_PER_KV,
    d: HEAD_DIMS,
    l: PAGE_SIZES,
    dtype: DTYPES,
    kv: KV_FORMATS = "plain",
    *,
    rng: torch.Generator,
    device: str,
):
    angles = torch.rand(s, d // 2, generator=rng) * 1000
    k, v, *cached = kv_write.make_example(s, g, d, l, dtype, kv, rng=rng, device=device)
    q = random_tensor(s, g * ratio, d, dtype=dtype, rng=rng, device=device)
    return q, k, v, angles.cos().to(device), angles.sin().to(device), *cached


@rope_kv_write.hard_case("special_heads")
def _(args: tuple, rng: torch.Generator) -> tuple:
    """Special heads of keys and values; every other token stays as it is, since its angles are 0."""
    q, k, v, cos, sin, *rest = args
    cos[::2], sin[::2] = 1, 0
    return q, special_heads(k, rng), special_heads(v, rng), cos, sin, *rest


rope_kv_write.hard_case("no_slots")(no_slots)


rope_kv_write.mutates(
    "k_pages",
    "v_pages",
    fake_impl=lambda q, k, v, cos, sin, k_pages, v_pages, slot_mapping: (q.new_empty(q.shape), k.new_empty(k.shape)),
)


@rope_kv_write.sizes_from_args("s")
def _(q, k, v, cos, sin, k_pages, v_pages, slot_mapping):
    (s, g, d), h, l = k.shape, q.shape[1], k_pages.shape[1]
    return dict(s=s, g=g, ratio=h // g, d=d, l=l, dtype=dtype_name(q.dtype), kv=kv_format(k_pages))


@rope_kv_write.flops_and_bytes
def _(s, g, ratio, d, l, dtype, kv="plain"):
    head = kv_bytes(1, d, dtype, "plain")
    moved = g * (2 * ratio * head + 3 * head + 2 * kv_bytes(1, d, dtype, kv)) + 4 * d + 8
    return 3 * s * g * (ratio + 1) * d, s * moved
