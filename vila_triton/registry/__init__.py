"""The registry: an op is its plain-torch reference; implementations attach themselves to it from their own files.

    @op
    def rms_norm(x, weight, eps): ...                 # the meaning, the dispatch point and the oracle

    @rms_norm.requires                                # what every call must satisfy, checked before any implementation
    def _(x, weight, eps): axes("rms_norm", x=(x, "... e"), weight=(weight, "e"))

    @rms_norm.inputs                                  # the annotations are the domain tests and benches draw from
    def _(rows: Sizes(1, 64), dtype: OneOf("float32", "float16"), *, rng, device): return x, weight, eps

    @rms_norm.costs                                   # the same names -> (flops, bytes)
    def _(rows, dtype): return 4 * rows, 2 * rows

    @rms_norm.sizes("rows")                           # the inverse of inputs; rows varies from call to call
    def _(x, weight, eps): return {"rows": len(x), "e": len(weight)}

    @rms_norm.impl("triton", configs=[{"BLOCK": 128}], space=SPACE)   # in a file of kernels/
    def rms_norm_triton(x, weight, eps, *, BLOCK): ...

    rms_norm.result(lambda x, weight, eps: x.new_empty(x.shape))      # what torch.compile must know of a call

Calling ``rms_norm(x, weight, eps)`` runs what `use` chose; else what `defaults` says, within an engine; else what it
would say there of the tensors' device (see `tuned.kernels_for`); ``rms_norm.reference(x, weight, eps)`` the reference.
A choice is a name, or names by ranges of the size that varies (see `ranges`). There are no priorities and no fallback:
an implementation that cannot serve a call raises `Unsupported` and the call fails.

Files are found where they lie, in ops/ and kernels/. One that cannot be imported is named on standard error and left
aside, until something is asked for that is not there without it.
"""

from .op import OPS, REFERENCE, Impl, IntRange, OneOf, Op, Unsupported
from .registry import (
    count_calls,
    default_choices,
    describe_available,
    discover,
    explicit_choices,
    op,
    problems,
    use,
    validate_choices,
)

__all__ = [
    "OPS",
    "REFERENCE",
    "Impl",
    "IntRange",
    "OneOf",
    "Op",
    "Unsupported",
    "count_calls",
    "default_choices",
    "describe_available",
    "discover",
    "explicit_choices",
    "op",
    "problems",
    "use",
    "validate_choices",
]
