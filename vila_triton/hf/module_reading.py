"""Read the parameters that a model's modules hold, peft's among them.

The functional model calls no module, so one that it does not know is an error: what it computes would be left out.
"""

from typing import Any

from torch import Tensor, nn

from vila_triton.models.layers import LowRank

from .linear_modules import Holder, Int4Linear

LORA, MODULES_TO_SAVE = "peft.tuners.lora.layer.Linear", "peft.utils.other.ModulesToSaveWrapper"
LINEARS = (nn.Linear, Int4Linear)
ADVICE = "adapters here are peft's plain LoRA of linear maps, and its modules_to_save"


class ModuleReading:
    """All that a module and those below it hold.

    tensors: parameters by the names they have without adapters. low_rank: the terms that active adapters add to linear
    maps, by the names of these. merged: the tensors of adapters that are part of a weight now, by its name and theirs.
    """

    def __init__(self, module: nn.Module):
        self.tensors: dict[str, Tensor] = {}
        self.low_rank: dict[str, tuple[LowRank, ...]] = {}
        self.merged: dict[str, list[Tensor]] = {}
        self._read(module, "")

    def all_tensors(self) -> list[Tensor]:
        """Those of adapters as well."""
        terms = [x for terms in self.low_rank.values() for term in terms for x in (term.a, term.b)]
        return [*self.tensors.values(), *terms, *(x for merged in self.merged.values() for x in merged)]

    def adapters(self) -> object:
        """All of adapters that is no tensor, to compare."""
        terms = {name: [(term.scaling, term.dropout) for term in terms] for name, terms in self.low_rank.items()}
        return terms, list(self.merged)

    def _read(self, module: nn.Module, prefix: str) -> None:
        check_not_hooked(module, prefix.removesuffix(".") or type(module).__name__)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                self.tensors[prefix + name] = parameter
        for name, child in module._modules.items():
            if child is not None:
                path = prefix + name
                if type(child) is not Holder:
                    child = self._unwrapped(child, path)
                self._read(child, f"{path}.")

    def _unwrapped(self, module: Any, path: str) -> nn.Module:
        """The module that holds the parameters of this name; low-rank terms around it are noted."""
        kind = None if type(module) in LINEARS else class_path(module)
        if kind == MODULES_TO_SAVE:
            module = module_to_save(module)
            return module if type(module) is Holder else self._unwrapped(module, path)
        if kind == LORA:
            check_not_hooked(module, path)
            self.low_rank[path] = low_rank_terms(module, path)
            for name in module.merged_adapters:
                self.merged[f"{path}.{name}"] = [module.lora_A[name].weight, module.lora_B[name].weight]
            module = module.base_layer
        if type(module) not in LINEARS:
            raise TypeError(f"{path} is a {class_path(module)}, which the model cannot take in; {ADVICE}")
        return module


def class_path(module: object) -> str:
    """The full name of an object's class: peft may not be installed."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_not_hooked(module: nn.Module, path: str) -> None:
    """Errors: TypeError for a module with hooks or another forward pass, which nobody would call."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    if any(hooks) or "forward" in module.__dict__:
        raise TypeError(
            f"{path} has hooks or another forward pass (as of peft's adapter_names, or of accelerate), but the model "
            "reads its parameters and does not call it"
        )


def module_to_save(wrapper: Any) -> nn.Module:
    """The module in whose place peft trains a copy: the copy of the active adapter, if there is one."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def low_rank_terms(wrapper: Any, path: str) -> tuple[LowRank, ...]:
    """The terms that peft's LoRA of a linear map adds to it now. Errors: TypeError for other kinds of LoRA."""
    if wrapper.disable_adapters and wrapper.merged:
        wrapper.unmerge()  # as peft does in a forward pass
    if wrapper.disable_adapters or wrapper.merged:
        return ()
    terms = []
    for name in wrapper.active_adapters:
        if name not in wrapper.lora_A:
            continue
        a, b, dropout = wrapper.lora_A[name], wrapper.lora_B[name], wrapper.lora_dropout[name]
        if variant := wrapper.lora_variant.get(name):
            raise TypeError(f"{path}: adapter {name!r} is a {class_path(variant)}, not plain LoRA; {ADVICE}")
        for part in (a, b, dropout):
            check_not_hooked(part, path)
        if b.bias is not None:
            raise TypeError(f"{path}: adapter {name!r} has lora_bias=True; {ADVICE}, without lora_bias")
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        terms.append(LowRank(a.weight, b.weight, wrapper.scaling[name], p))
    return tuple(terms)
