"""The calls in whose kernels faults are planted: every use of shared memory, at sizes that end inside a tile."""

from dataclasses import dataclass
from typing import Any

INT4 = {"order": "sub", "bias": False, "group": 64, "n": 80, "G": 5}
PAGED = {"kv": "plain", "numerics": "fast", "b": 2, "ratio": 4, "d": 64, "l": 32, "t": 70}
MORE_SIZES: dict[str, tuple[dict[str, Any], ...]] = {
    "int4_matmul": ({"G": 4}, {"G": 2}),
    "decode_attention": ({"b": 1, "t": 64}, {"b": 1, "t": 96}),
    "prefill_attention": ({"b": 1, "s": 64, "t": 64},),
}
TARGETS = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Case:
    """A call of an implementation with one of its configs, in aligned memory.

    more_sizes  for faults of bounds that show at other sizes only, where the same kernel runs
    """

    op: str
    impl: str
    config: int
    target: str
    sizes: dict[str, Any]
    more_sizes: tuple[dict[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}-{self.impl}-{self.config}-{self.target}-{self.sizes['dtype']}"


def cases_for(target: str) -> list[Case]:
    """Returns the cases of a target: float32 once, for what only its kernels have, all others in bfloat16."""
    sizes: dict[tuple[str, str, int], dict[str, Any]] = {
        ("int4_matmul", "splitk", 0): {**INT4, "m": 20},
        ("int4_matmul", "prefill", 0): {**INT4, "m": 80},
        ("int4_matmul", "gemv", 0): {**INT4, "m": 1},
        ("int4_swiglu", "triton", 0): {**{k: v for k, v in INT4.items() if k != "bias"}, "m": 20},
        ("linear", "triton", 0): {"m": 80, "n": 96, "k": 272},
        ("decode_attention", "triton", 0): {**PAGED, "g": 2},
        ("prefill_attention", "triton", 0): {**PAGED, "g": 1, "s": 80},
        ("encoder_attention", "triton", 0): {"b": 1, "s": 90, "h": 1, "d": 72},
        ("rms_norm", "triton", 0): {"rows": 3, "e": 1100},
    }
    bfloat16 = {"dtype": "bfloat16"}
    cases = [
        Case(*key, target, value | bfloat16, tuple(value | bfloat16 | more for more in MORE_SIZES.get(key[0], ())))
        for key, value in sizes.items()
    ]
    if target == "sm_80":
        cases.append(Case("int4_matmul", "splitk", 0, target, {**INT4, "m": 20, "dtype": "float32"}))
    return cases
