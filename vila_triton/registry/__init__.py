"""The registry: an op is its plain-torch reference; implementations attach themselves to it from their own files.

    @op
    def rms_norm(x, weight, eps): ...                 # the meaning, the dispatch point and the oracle of tests

    @rms_norm.requires                                # checked before every call, whichever implementation runs
    def _(x, weight, eps): check_axes("rms_norm", x=(x, "... e"), weight=(weight, "e"))

    @rms_norm.example_inputs                          # tests and benchmarks draw sizes from the annotations
    def _(rows: IntRange(1, 64), dtype: OneOf("float32", "float16"), *, rng, device): return x, weight, eps

    @rms_norm.hard_case("zero_rows")                  # tests draw these values as well as random ones
    def _(args, rng): return torch.zeros_like(args[0]), *args[1:]

    @rms_norm.sizes_from_args("rows")                 # the inverse; "rows" differs from call to call of a model
    def _(x, weight, eps): return {"rows": len(x), "dtype": "float32"}

    @rms_norm.flops_and_bytes                         # of a call, from the same sizes
    def _(rows, dtype): return 4 * rows, 2 * rows

    @rms_norm.gradient(x="x weight", weight="x weight")   # of each argument, and what autograd keeps for it
    def _(*, grad, needs, x, weight, eps): return rms_norm_backward(grad, x, weight, eps)   # an op, too

    rms_norm.fake_impl(lambda x, weight, eps: x.new_empty(x.shape))   # the result's shape, for torch.compile

    @rms_norm.impl("triton", configs=[{"BLOCK": 128}], space=SPACE)   # in a file of kernels/
    def rms_norm_triton(x, weight, eps, *, BLOCK): ...

A call ``rms_norm(x, weight, eps)`` runs the implementation that `use` names. Elsewhere an engine's `default_choices`
decide, and outside of one configs/kernels.toml and the tuned table of the device. `rms_norm.reference` always runs the
reference. There are no priorities and no fallback: an implementation that cannot serve a call raises
`Unsupported`, and the call fails.

Where an argument requires a gradient, a call is a node of torch's graph, whatever it runs. The backward pass runs under
the choices of the forward pass, after its `with` or in another thread as well; a checkpoint keeps them with
``context_fn=keep_choices``, and is refused where it would run something else.

    size_ranges    a choice: one implementation, or several by ranges of a size
    domain         the values that a size may have
    search_space   the configs of a kernel, and the cost of one launch
    target_configs which of its configs an architecture runs
    gradients      calls of ops as nodes of torch's autograd
    custom_ops     ops as `torch.library` custom ops, for torch.compile
    policy         what decides which implementation runs, kept for the backward pass
    declaration    what the decorators above say of an op
    op             `Op` and `Impl`
    signature      what decisions and plans of an op may depend on
    launch_plans   what an implementation launched for one signature, launched again without it
    imports        imports files of ops and implementations, and reports those that fail
    sources        files of others, by path or by an installed distribution, and where a kernel came from
    discovery      finds all files, and checks that what is chosen exists
    kernel_config  configs/kernels.toml: the defaults by device and phase
    tuned_tables   configs/tuned/DEVICE.json: configs and choices by size, measured by `python -m bench.tune`
    registry       `op`, `use`, `default_choices`, `count_calls`
    interpreter    Triton's interpreter, made safe for threads

A module imports only from those above it. `import vila_triton.registry` does not import torch; `gradients`,
`custom_ops`, `signature`, `launch_plans` and `tuned_tables` do, and are imported when needed.
"""

from .discovery import describe_available, discover, validate_choices
from .domain import IntRange, OneOf
from .imports import problems
from .op import OPS, REFERENCE, Impl, Op, Unsupported
from .policy import keep_choices
from .registry import count_calls, default_choices, explicit_choices, op, use

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
    "keep_choices",
    "op",
    "problems",
    "use",
    "validate_choices",
]
