"""The gradients of ops under torch's autograd.

A call whose arguments require a gradient is one node of torch's graph, whichever implementation it runs. Its backward
pass runs what `Op.gradient` registered, which is made of ops itself, `rms_norm_backward` for one, so `use`,
configs/kernels.toml and tuned tables choose there, too; under the choices of the forward pass (see `policy`). Of an op
without such a rule the reference is run again and differentiated by torch. What has no gradient is refused before
anything runs: nothing is ever taken for a constant in silence. A second derivative raises RuntimeError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache, wraps
from itertools import count
from typing import Any

import torch
from torch import Tensor, autocast
from torch.autograd import forward_ad

from .policy import Policy

is_any_autocast_enabled = torch._C._is_any_autocast_enabled


def is_record(value: Any) -> bool:
    """Return True for a dataclass such as `Int4`. torch 2.11 cannot trace `is_dataclass(None)`."""
    return value is not None and is_dataclass(value)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that an argument consists of: itself, or those in the fields of a dataclass."""
    if isinstance(value, Tensor):
        return [value]
    return [x for f in fields(value) for x in tensors_in(getattr(value, f.name))] if is_record(value) else []


def replace_leaves(value: Any, kind: type, fn: Callable[[Any], Any]) -> Any:
    """The argument with whatever it consists of that is of this kind, itself or in fields of dataclasses, replaced."""
    if isinstance(value, kind):
        return fn(value)
    if not is_record(value):
        return value
    return replace(value, **{f.name: replace_leaves(getattr(value, f.name), kind, fn) for f in fields(value)})  # pyright: ignore[reportArgumentType]


def is_recording() -> bool:
    """Return False where torch records nothing, whatever the arguments are."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def requires_gradient(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True if torch records what is computed from these arguments.

    Raises RuntimeError for arguments with tangents of torch's forward mode, which no op propagates.
    """
    if forward_ad._current_level >= 0:
        values = [x for value in (*args, *kwargs.values()) for x in tensors_in(value)]
        if any(forward_ad.unpack_dual(x).tangent is not None for x in values):
            raise RuntimeError("ops have no derivatives in forward mode, expected tensors without tangents")
    if not torch.is_grad_enabled():
        return False
    return any(x.requires_grad for value in (*args, *kwargs.values()) for x in tensors_in(value))


def needed_gradients(op: Any, values: Mapping[str, Any]) -> list[str]:
    """Return the arguments that require a gradient; raises RuntimeError if one of them has none."""
    needs = []
    for name, value in values.items():
        if not any(x.requires_grad for x in tensors_in(value)):
            continue
        if not isinstance(value, Tensor) or name not in op.differentiable:
            only = [x for x in op.differentiable if not is_record(values[x])]
            reason = op.gradient_refusal or f"only {', '.join(only)} can have one"
            raise RuntimeError(f"{op.name}: {name} requires a gradient, but {reason}; pass it with requires_grad=False")
        needs.append(name)
    return needs


@dataclass(frozen=True)
class Kept:
    """The place of a tensor among those that autograd keeps for a call."""

    index: int


@dataclass(frozen=True)
class RecordedCall:
    """All that the backward pass of a call needs beside tensors, which autograd keeps.

    values: all arguments by name, with `Kept` in place of tensors, None for those that hold tensors which no gradient
    needs; also "out" and "lse", the results, where they are needed. needs: the arguments that need a gradient.
    """

    op: Any
    values: Mapping[str, Any]
    needs: tuple[str, ...]
    policy: Policy

    @staticmethod
    def record(
        op: Any, values: Mapping[str, Any], needs: Sequence[str], outs: tuple[Tensor, ...]
    ) -> "tuple[RecordedCall, list[Tensor]]":
        """Return the record of a call, and the tensors that autograd shall keep for it."""
        wanted = {name for need in needs for name in op.saved_for(need)}
        tensors: list[Tensor] = []

        def keep(x: Tensor) -> Kept:
            tensors.append(x)
            return Kept(len(tensors) - 1)

        kept = {name: None if tensors_in(x) and name not in wanted else x for name, x in values.items()}
        kept |= {name: x for name, x in zip(("out", "lse"), outs) if name in wanted}
        kept = {name: replace_leaves(x, Tensor, keep) for name, x in kept.items()}
        return RecordedCall(op, kept, tuple(needs), Policy.current()), tensors

    def gradients(self, grads: Sequence[Tensor], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the arguments that need one, by name; tensors: those that autograd kept."""
        values = {n: replace_leaves(x, Kept, lambda kept: tensors[kept.index]) for n, x in self.values.items()}
        rule = self.op.gradient_rule
        if rule is None:
            return gradients_of_reference(self.op, values, self.needs, grads)
        found = rule(grad=grads[0], needs=self.needs, **values)
        found = found if isinstance(found, tuple) else (found,)
        names = self.op.differentiable
        by_name = dict(zip(names, found))
        if len(found) != len(names) or any(by_name[name] is None for name in self.needs):
            given = ["None" if x is None else type(x).__name__ for x in found]
            raise RuntimeError(
                f"{self.op.name}: the rule of its gradient returns ({', '.join(given)}), expected Tensors for "
                f"{', '.join(names)}, or None where no gradient is asked for, unlike {', '.join(self.needs)}"
            )
        return {name: by_name[name] for name in self.needs}


def gradients_of_reference(
    op: Any, values: Mapping[str, Any], needs: Sequence[str], grads: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Run the reference of an op again, and let torch differentiate it: the gradients of the arguments that need one,
    by name. Raises RuntimeError if nothing that the reference returns depends on them.
    """
    with torch.enable_grad():
        leaves = {name: values[name].detach().requires_grad_() for name in needs}
        out = op.reference(*{**values, **leaves}.values())
        outs = out if isinstance(out, tuple) else (out,)
        learned = [(x, grad) for x, grad in zip(outs, grads) if x.requires_grad]
        if not learned:
            raise RuntimeError(
                f"{op.name}: what its reference returns has no gradient, as torch tells; declare it by "
                f"{op.name}.no_gradient(reason), or @{op.name}.gradient(...)"
            )
        outs, grads = zip(*learned)
        found = torch.autograd.grad(outs, tuple(leaves.values()), grads, materialize_grads=True)
    return dict(zip(leaves, found))


_numbers = count()


@cache
def number_of(op_name: str, impl: str, config: str) -> tuple[int, Tensor]:
    """A number of its own for what a call can run, also as a tensor, which autograd can keep."""
    number = next(_numbers)
    return number, torch.tensor(number)


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient raises an error. `torch.autograd.grad` only runs nodes on the way to its inputs, so
    this one is behind what the result was computed from.
    """

    @staticmethod
    def forward(ctx: Any, message: str, out: Tensor, *sources: Tensor) -> Tensor:
        ctx.message = message
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def without_gradient(x: Tensor, message: str, *sources: Tensor) -> Tensor:
    """The same numbers; asking for their gradient raises RuntimeError with the message.

    sources: what they were computed from.
    """
    learned = [source for source in sources if source.requires_grad] or [torch.empty(0, requires_grad=True)]
    return NoGradient.apply(message, x.detach(), *learned)  # pyright: ignore[reportReturnType]


def first_derivative_only(name: Callable[[Any], str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the backward pass of a node, which returns gradients, and the tensors that the node has kept for them:
    asking for a derivative of these gradients raises RuntimeError, where torch's `once_differentiable` takes them for
    constants if those it gets are.

    name: of the context, what the error names.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def wrapper(ctx: Any, *grads: Any) -> Any:
            with torch.no_grad():
                found, kept = backward(ctx, *grads)
            if not torch.is_grad_enabled():  # which means that nobody asked for a graph
                return found
            message = f"{name(ctx)} has no second derivative"
            sources = [x for x in (*grads, *kept) if x is not None]
            return tuple(without_gradient(x, message, *sources) if isinstance(x, Tensor) else x for x in found)

        return wrapper

    return decorate


class OpNode(torch.autograd.Function):
    """A call of an op as a node of autograd's graph.

    Beside what gradients need autograd keeps a number that tells which implementation ran: a checkpoint, which makes
    anew what was kept, may run under other choices, and is then refused.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, values: Mapping[str, Any], needs: list[str], *_: Tensor) -> Any:
        args = tuple(values.values())
        decision = op.decide(args, {})
        out = op.run_decided(decision, args, {})
        outs = out if isinstance(out, tuple) else (out,)
        ctx.call, tensors = RecordedCall.record(op, values, needs, outs)
        ctx.ran = op.name, decision[0].name, str(decision[1])
        ctx.is_numbered = not torch.compiler.is_compiling()  # torch traces through `cache`, and would number anew
        ctx.save_for_backward(*tensors, *((number_of(*ctx.ran)[1],) if ctx.is_numbered else ()))
        ctx.mark_non_differentiable(*outs[1:] if op.keeps_lse else ())
        return out

    @staticmethod
    @first_derivative_only(lambda ctx: ctx.call.op.name)
    def backward(ctx: Any, *grads: Any) -> Any:
        # Under the choices of the forward pass already as tensors are unpacked, when a checkpoint runs it again.
        with ctx.call.policy.active(), autocast(grads[0].device.type, enabled=False):
            tensors = ctx.saved_tensors
            if ctx.is_numbered and int(tensors[-1]) != number_of(*ctx.ran)[0]:
                name, impl, _ = ctx.ran
                raise RuntimeError(
                    f"{name}: the forward pass ran {impl!r}, but a checkpoint ran it anew by another choice or config; "
                    "pass context_fn=vila_triton.registry.keep_choices to torch.utils.checkpoint.checkpoint"
                )
            found = ctx.call.gradients(grads, tensors)
        return (None, None, None, *(found[name] for name in ctx.call.needs)), tensors


def check_not_reentrant(op: Any) -> None:
    """RuntimeError for a call that a reentrant checkpoint makes: it cannot know the choices of the forward pass."""
    if torch._C._current_graph_task_id() == -1:  # outside of a backward pass
        return
    if type(torch._C._current_autograd_node()).__name__ == "CheckpointFunctionBackward":
        raise RuntimeError(
            f"{op.name}: a checkpoint with use_reentrant=True does not keep the choices of implementations, expected "
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False, context_fn=vila_triton.registry.keep_choices)"
        )


def run_recorded(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a call whose arguments require a gradient, as a node of autograd's graph.

    Raises RuntimeError, before anything runs, if one of them has none.
    """
    check_not_reentrant(op)
    values = op.bind(args, kwargs)
    needs = needed_gradients(op, values)
    returns_lse = bool(values.get("return_lse"))
    values |= {"return_lse": True} if op.keeps_lse else {}
    out = OpNode.apply(op, values, needs, *(values[name] for name in needs))
    if not op.keeps_lse:
        return out
    out, lse = out  # pyright: ignore[reportGeneralTypeIssues]
    message = f"{op.name}: the log-sum-exp has no gradient"
    return (out, without_gradient(lse, message, *(values[name] for name in needs))) if returns_lse else out


def autocast_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The kind of device that the arguments lie on, if `torch.autocast` is enabled there; else ""."""
    device = next((x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), "cpu")
    return device if torch.is_autocast_enabled(device) else ""


def cast_for_autocast(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], device: str
) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments with tensors of 16 and 32 bits in the dtype of `torch.autocast` on a kind of device; dataclasses,
    as int4 weights, stay.
    """
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return tuple(map(cast, args)), {name: cast(x) for name, x in kwargs.items()}
