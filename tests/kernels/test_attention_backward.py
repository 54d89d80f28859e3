"""Gradients of attention: planted bugs, every head dim, bits that repeat, and the log-sum-exp that they are made of."""

from typing import Any

import pytest
import torch
from mutants import Edit, Plant, by_rule, exchange, insert, plant  # noqa: F401 (plant: a fixture)

from bench.correctness.error_budget import DEVICE, assert_matches_reference, example_args, shared_example
from bench.correctness.guarded_memory import MismatchError, same_bits
from vila_triton.ops import encoder_attention, encoder_attention_backward, prefill_attention_backward
from vila_triton.registry import Impl, Op, discover

discover()
SIZES: dict[str, dict[str, Any]] = {
    "prefill_attention_backward": dict(b=1, s=24, g=2, ratio=2, d=16, dtype="float16", seed=1),
    "encoder_attention_backward": dict(b=1, s=24, h=2, d=16, dtype="float16", seed=1),
}
SMALL = {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}  # so that few tokens are several tiles
OPS = pytest.mark.parametrize("op", [prefill_attention_backward, encoder_attention_backward], ids=lambda op: op.name)


def twice(name: str) -> Edit:
    return exchange("softmax_scale", "softmax_scale * softmax_scale", f"_{name}_kernel", call="scale_heads")


PREFILL, ENCODER = "prefill_attention_grad", "encoder_attention_grad"
BUGS: dict[str, tuple[Op, Edit]] = {
    "weights are not rescaled by the log-sum-exp": (
        prefill_attention_backward,
        insert("lse = 0 * tl.where(mask_n, lse, 0)", "lse = load_lse", f"_{PREFILL}_kv_kernel"),
    ),
    "no delta": (
        prefill_attention_backward,
        exchange("sum_of_products(out, grad_out)", "0 * sum_of_products(out, grad_out)"),
    ),
    "delta of the gradient alone": (
        encoder_attention_backward,
        exchange("out", "grad_out", f"_{ENCODER}_q_kernel", call="sum_of_products"),
    ),
    "heads of a KV head are taken as if transposed": (
        prefill_attention_backward,
        insert(
            "head = head % QUERIES_PER_KV * tl.num_programs(1) + kv_head",
            "query, head, mask_n =",
            f"_{PREFILL}_kv_kernel",
        ),
    ),
    "no causal mask in grad_q": (
        prefill_attention_backward,
        insert("mask = mask | True", "mask = keys", f"_{PREFILL}_q_kernel"),
    ),
    "no causal mask in grad_k and grad_v": (
        prefill_attention_backward,
        insert("mask = mask | True", "mask = keys", f"_{PREFILL}_kv_kernel"),
    ),
    "a query sees the next token": (
        prefill_attention_backward,
        by_rule("shift a bound", "keys[None, :] <= query", f"_{PREFILL}_q_kernel"),
    ),
    "the queries behind the diagonal are left out": (
        prefill_attention_backward,
        exchange("begin + DIAGONAL", "end", f"_{PREFILL}_kv_kernel", call="range"),
    ),
    "scale applied twice to grad_q": (prefill_attention_backward, twice(f"{PREFILL}_q")),
    "scale applied twice to grad_k": (prefill_attention_backward, twice(f"{PREFILL}_kv")),
    "scale applied twice to grad_q of images": (encoder_attention_backward, twice(f"{ENCODER}_q")),
    "grad_k is not scaled": (
        encoder_attention_backward,
        exchange("scale_heads(grad_k, softmax_scale)", "grad_k", f"_{ENCODER}_kv_kernel"),
    ),
    "keys beyond the image are seen": (
        encoder_attention_backward,
        exchange("mask_n[None, :]", "None", f"_{ENCODER}_q_kernel"),
    ),
    "weights of the next head": (
        encoder_attention_backward,
        exchange("head * stride_l[2]", "(head ^ 1) * stride_l[2]", f"_{ENCODER}_kv_kernel"),
    ),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what reads too far computes with garbage
@pytest.mark.parametrize("bug", BUGS)
def test_mutants_are_detected(bug: str, plant: Plant) -> None:  # noqa: F811
    op, edit = BUGS[bug]
    plant(op.name, "mine", edit)
    discover()
    with pytest.raises(MismatchError):
        for values in ("random", "rising_scores", "negative_scores"):
            example = shared_example(op, **SIZES[op.name], values=values)
            example.check(op.impls["mine"], SMALL, "strided")


@OPS
@pytest.mark.parametrize("d", [8, 112, 160, 256])
def test_every_head_dim_matches_the_reference(op: Op, d: int) -> None:
    impl = op.impls["triton"]
    args = example_args(op, **{**SIZES[op.name], "d": d, "b": 1, "s": 20})
    assert_matches_reference(op, impl, impl.configs[-1], args)


@OPS
def test_two_runs_are_bitwise_equal(op: Op) -> None:
    impl: Impl = op.impls["triton"]
    args = example_args(op, **SIZES[op.name])
    one, two = (impl(*args, config=impl.configs[0]) for _ in range(2))
    assert all(map(same_bits, one, two))


@pytest.mark.parametrize("config", encoder_attention.impls["triton"].configs)
def test_log_sum_exp_of_images_matches_the_reference(config: dict) -> None:
    args = example_args(encoder_attention, **SIZES["encoder_attention_backward"])
    assert_matches_reference(encoder_attention, encoder_attention.impls["triton"], config, (*args, True))


@OPS
def test_of_nothing_there_is_no_gradient(op: Op) -> None:
    """No token, and no image."""
    sizes = SIZES[op.name]
    rows = sizes["h"] if "h" in sizes else sizes["g"] * sizes["ratio"]
    heads = (0, 5, rows, 16) if "h" in sizes else (0, rows, 16)
    q = torch.empty(heads, device=DEVICE)
    starts = [] if "h" in sizes else [torch.zeros(3, dtype=torch.int32, device=DEVICE)]
    for grad in op.impls["triton"](q, q, q, q, q, q[..., 0].contiguous(), *starts, 0.25):
        assert grad.shape == q.shape
