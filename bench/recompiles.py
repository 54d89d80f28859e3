"""Shows which arguments make Triton compile a kernel again: `python -m bench.recompiles [OP ...]`

Triton compiles a kernel for every new key: the types of its arguments, which of the integers are 1 or divisible by 16,
which pointers are aligned, and the values of compile-time constants. Here the launchers run over a sweep of the sizes
that vary while a model serves (tokens, cached tokens, sequences), and nothing is compiled: only the keys are computed.
For each new key the table names the arguments that distinguish it from the most similar one before.

The most variants that a kernel may have are in configs/bench/recompiles.toml; a kernel with more is an error.
"""

import argparse
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch

from vila_triton.limits import COUNT
from vila_triton.paths import config_dir
from vila_triton.registry import OPS, Op, Unsupported
from vila_triton.registry.interpreter import uses_triton_kernels

from ._tool import kernels_option, tool
from .compiler.cross_compile import intercept_launches, load_implementations, run_in_subprocesses
from .measure.cases import size_combinations

TOKENS = (1, 2, 3, 16, 17, 32, 100)
SWEEP = {  # sizes that vary while one model serves, in the alphabet of vila_triton/ops; the others are the model's
    "m": TOKENS,
    "rows": TOKENS,
    "s": TOKENS,
    "t": (0, 1, 15, 16, 100, 256, 300),
    "b": (1, 2, 16),
}
Key = dict[str, Any]  # argument -> (type, what Triton assumes of it), option -> value


@dataclass(frozen=True)
class Variant:
    """A key that made Triton compile, the sizes of the call, and the differences to the nearest key before."""

    key: Key
    sizes: dict[str, Any]
    reasons: list[str]


@dataclass
class LaunchTrace:
    """The variants of each kernel, by name, and the number of calls."""

    variants: dict[str, list[Variant]] = field(default_factory=dict)
    calls: int = 0

    def record(self, kernel: str, key: Key, sizes: dict[str, Any]) -> None:
        """Records a launch."""
        variants = self.variants.setdefault(kernel, [])
        if all(key != variant.key for variant in variants):
            nearest = min(
                (v.key for v in reversed(variants)), key=lambda old: len(list(key_differences(old, key))), default=None
            )
            variants.append(
                Variant(key, sizes, list(key_differences(nearest, key)) if nearest is not None else ["first call"])
            )


def specialization_key(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Key:
    """Returns the key by which Triton would look the launch up, by name of argument."""
    device = 0 if not kernel.device_caches else next(iter(kernel.device_caches))
    *_, binder = kernel.device_caches[device]
    _, specialization, options = binder(*args, **kwargs)
    return {p.name: tuple(x) for p, x in zip(kernel.params, specialization, strict=True)} | options


def key_differences(old: Key, new: Key) -> Iterator[str]:
    """Yields the differences of two keys, argument by argument, in words."""
    for name in new:
        a, b = old.get(name), new[name]
        if a != b:
            yield f"{name} {describe_difference(a, b)}"


def describe_difference(old: Any, new: Any) -> str:
    """Returns the difference of two values in words."""
    if not isinstance(old, tuple) or not isinstance(new, tuple):
        return f"{old} -> {new}"
    (old_type, old_note), (new_type, new_note) = old, new
    if old_type == new_type == "constexpr":
        return f"= {old_note} -> {new_note}"
    if new_type == "constexpr":
        return f"became {new_note}"
    if old_type == "constexpr":
        return f"is no longer {old_note}"
    if old_type != new_type:
        return f"{old_type} -> {new_type}"
    return "became divisible by 16" if "D" in str(new_note) else "is no longer divisible by 16"


def size_sweep(op: Op) -> Iterator[dict[str, Any]]:
    """Yields the sizes of every call of the sweep: all combinations of those of SWEEP, the rest representative.

    Errors: ValueError if the op has none of them.
    """
    varying = [name for name in op.domain if name in SWEEP]
    if not varying:
        raise ValueError(f"{op.name} has none of the sizes {', '.join(SWEEP)}, but {', '.join(op.domain)}")
    defaults = next(size_combinations({}, op))
    for values in product(*(SWEEP[name] for name in varying)):
        yield defaults | dict(zip(varying, values))


def trace_launches(impl_key: tuple[str, str]) -> LaunchTrace:
    """Launches the default config of an implementation, (op, name), over the sweep, without compiling."""
    op = OPS[impl_key[0]]
    impl = op.impls[impl_key[1]]
    launches = LaunchTrace()
    sizes: dict[str, Any] = {}

    def record_launch(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.record(self.fn.__name__, specialization_key(self, args, kwargs), sizes)

    with intercept_launches("sm_90", record_launch):
        for sizes in size_sweep(op):
            args = op.make_example(**sizes, rng=torch.Generator().manual_seed(0), device="meta")
            try:
                impl(*args)
            except Unsupported:
                continue
            launches.calls += 1
    return launches


def max_variants(kernel: str) -> int:
    """Returns the most variants that a kernel may have in the sweep."""
    table = tomllib.loads((config_dir() / "bench" / "recompiles.toml").read_text())
    return table.get(kernel, table["default"])


def check_ops(ops: Sequence[str], folder: str | None, workers: int = 2) -> list[str]:
    """Prints the variants of every kernel of the ops, or of all, traced in so many processes; returns a line for each
    kernel that has too many.

    Errors: ValueError for an op that does not exist.
    """
    load_implementations(folder, peers=False)
    if unknown := set(ops) - set(OPS):
        raise ValueError(f"no op {', '.join(sorted(unknown))}; there are: {', '.join(OPS)}")
    selected = [OPS[name] for name in ops or OPS]
    impl_keys = [(op.name, impl.name) for op in selected for impl in op.impls.values() if uses_triton_kernels(impl)]
    too_many = []
    for (op, impl), launches in zip(impl_keys, run_in_subprocesses(trace_launches, impl_keys, workers, folder)):
        for kernel, variants in launches.variants.items():
            allowed = max_variants(kernel)
            print(f"{op} {impl} {kernel}: {launches.calls} calls, {len(variants)} variants, at most {allowed}")
            for variant in variants:
                sizes_text = " ".join(f"{name}={variant.sizes[name]}" for name in variant.sizes if name in SWEEP)
                print(f"    {sizes_text:20} {'; '.join(variant.reasons)}")
            if len(variants) > allowed:
                too_many.append(
                    f"{kernel}: {len(variants)} variants, at most {allowed} (configs/bench/recompiles.toml)"
                )
    return too_many


@tool
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    parser.add_argument("--replace-kernels", metavar="FOLDER", help="take these implementations, not those of kernels/")
    parser.add_argument("--workers", type=COUNT, default=2)
    args = parser.parse_args()
    too_many = check_ops(args.ops, args.replace_kernels, args.workers)
    for line in too_many:
        print(f"bench.recompiles: {line}", file=sys.stderr)
    return int(bool(too_many))


if __name__ == "__main__":
    sys.exit(main())
