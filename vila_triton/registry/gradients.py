"""The gradients of ops under torch's autograd.

A call whose arguments require a gradient is one node of torch's graph, whichever implementation it runs. Its backward
pass runs what `Op.gradient` registered, which is made of ops itself, `rms_norm_backward` for one, so `use`,
configs/kernels.toml and tuned tables choose there, too; under the choices of the forward pass (see `policy`). Of an op
without such a rule the reference is run again and differentiated by torch. What has no gradient is refused before
anything runs: nothing is ever taken for a constant in silence. A second derivative raises RuntimeError.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .policy import Policy


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors that an argument consists of: itself, or those in the fields of a dataclass."""
    if isinstance(value, Tensor):
        return [value]
    return [x for f in fields(value) for x in tensors_in(getattr(value, f.name))] if is_dataclass(value) else []


def requires_gradient(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True if torch records what is computed from these arguments."""
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
            reason = op.gradient_refusal or f"only {', '.join(op.differentiable)} can have one"
            raise RuntimeError(f"{op.name}: {name} requires a gradient, but {reason}; pass it with requires_grad=False")
        needs.append(name)
    return needs


@dataclass(frozen=True)
class RecordedCall:
    """What the backward pass of a call needs beside tensors, which autograd keeps.

    values: all arguments by name, None in place of tensors and of what the gradients do not need. needs: the arguments
    that need a gradient. kept: the names of the tensors that autograd keeps, "out" and "lse" for results among them.
    """

    op: Any
    values: Mapping[str, Any]
    needs: tuple[str, ...]
    kept: tuple[str, ...]
    policy: Policy

    @staticmethod
    def record(
        op: Any, values: Mapping[str, Any], needs: Sequence[str], outs: tuple[Tensor, ...]
    ) -> "tuple[RecordedCall, list[Tensor]]":
        """Return the record of a call, and the tensors that autograd shall keep for it."""
        wanted = {name for need in needs for name in op.saved_for(need)}
        tensors = {n: x for n, x in (*values.items(), *zip(("out", "lse"), outs)) if isinstance(x, Tensor)}
        kept = tuple(name for name in tensors if name in wanted)
        unneeded = {name for name, x in values.items() if tensors_in(x) and name not in wanted}
        rest = {name: None if name in tensors or name in unneeded else x for name, x in values.items()}
        return RecordedCall(op, rest, tuple(needs), kept, Policy.current()), [tensors[name] for name in kept]

    def gradients(self, grads: tuple[Any, ...], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the gradients of the arguments that need one, by name; tensors: those that autograd kept."""
        values = {**self.values, **dict(zip(self.kept, tensors, strict=True))}
        rule = self.op.gradient_rule
        if rule is None:
            return gradients_of_reference(self.op.reference, values, self.needs, grads)
        found = rule(grad=grads[0], needs=self.needs, **values)
        found = dict(zip(self.op.differentiable, found if isinstance(found, tuple) else (found,), strict=True))
        return {name: found[name] for name in self.needs}


def gradients_of_reference(
    reference: Callable[..., Any], values: Mapping[str, Any], needs: Sequence[str], grads: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Run a reference again, and let torch differentiate it: the gradients of the arguments that need one, by name."""
    with torch.enable_grad():
        leaves = {name: values[name].detach().requires_grad_() for name in needs}
        out = reference(*{**values, **leaves}.values())
        outs = out if isinstance(out, tuple) else (out,)
        found = torch.autograd.grad(outs, tuple(leaves.values()), grads[: len(outs)], materialize_grads=True)
    return dict(zip(leaves, found))


class OpNode(torch.autograd.Function):
    """A call of an op as a node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, op: Any, values: Mapping[str, Any], needs: list[str], *_: Tensor) -> Any:
        out = op.run_implementation(*values.values())
        outs = out if isinstance(out, tuple) else (out,)
        ctx.call, tensors = RecordedCall.record(op, values, needs, outs)
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*outs[1:] if op.keeps_lse else ())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        # A checkpoint runs its forward pass anew as tensors are unpacked: that, too, is under the choices of the first.
        with ctx.call.policy.active(), torch.autocast(grads[0].device.type, enabled=False):
            found = ctx.call.gradients(grads, ctx.saved_tensors)
        return None, None, None, *(found[name] for name in ctx.call.needs)


def run_recorded(op: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Run a call whose arguments require a gradient, as a node of autograd's graph.

    Raises RuntimeError, before anything runs, if one of them has none.
    """
    values = op.bind(args, kwargs)
    needs = needed_gradients(op, values)
    returns_lse = bool(values.get("return_lse"))
    values |= {"return_lse": True} if op.keeps_lse else {}
    out = OpNode.apply(op, values, needs, *(values[name] for name in needs))
    if not op.keeps_lse:
        return out
    out, lse = out  # pyright: ignore[reportGeneralTypeIssues]
    message = f"{op.name}: the log-sum-exp has no gradient"
    return (out, without_gradient(lse, message)) if returns_lse else out


class NoGradient(torch.autograd.Function):
    """The identity, whose gradient raises an error; it keeps no graph of the arguments alive."""

    @staticmethod
    def forward(ctx: Any, message: str, out: Tensor, grad_anchor: Tensor) -> Tensor:
        ctx.message = message
        return out

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(ctx.message)


def without_gradient(x: Tensor, message: str) -> Tensor:
    """The same numbers; asking for their gradient raises RuntimeError with the message."""
    return NoGradient.apply(message, x.detach(), torch.empty(0, requires_grad=True))  # pyright: ignore[reportReturnType]


def cast_for_autocast(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """The arguments with tensors of 16 and 32 bits in the dtype of `torch.autocast`, where that is enabled on their
    device; dataclasses, as int4 weights, stay.
    """
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    device = tensors[0].device.type if tensors else "cpu"
    if not torch.is_autocast_enabled(device):
        return args, kwargs
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Any) -> Any:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return tuple(map(cast, args)), {name: cast(x) for name, x in kwargs.items()}
