"""int4 linear maps in models of transformers: rounded as they load, or read from a checkpoint in any int4 layout.

`registration.install` makes `Int4Quantizer` the one of `Int4Config`, and if asked that of transformers' `AwqConfig`, in
place of one that needs gptqmodel. transformers loads weights as they lie on disk; then each becomes an `Int4Linear`.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoints.int4_layouts import NATIVE, Layout
from ..checkpoints.int4_views import int4_linears
from ..checkpoints.quantization_config import QUANT_METHOD, detect_quantization, make_quantization_config
from ..checkpoints.tensor_files import open_tensors
from ..files.reading import LoadError
from ..models.config_fields import QuantizationSettings, read_dataclass
from ..models.params import LazyTensors
from ..ops import Int4, dequantize
from ..ops.int4_weight import check_int4_shape, check_values
from .configuration_vila_llama import parse_dtype
from .linear_modules import Int4Linear


class Int4Config(QuantizationConfigMixin):
    """The `quantization_config` of a model whose linear maps are int4: on disk, in the layout vila-triton, or dense
    there and rounded to nearest as they load.

    group_size: inputs that share a scale, -1 for all. modules_to_not_convert: names or patterns of linear maps that
    stay dense, beside the head, which always does. order: see `Int4.rounding`. Errors: `ConfigError`, naming the value.
    """

    def __init__(
        self,
        group_size: int = 128,
        modules_to_not_convert: list[str] | None = None,
        order: str = "sub",
        bits: int = 4,
        quant_method: str = QUANT_METHOD,
    ):
        values = dict(group_size=group_size, modules_to_not_convert=modules_to_not_convert, order=order, bits=bits)
        settings = read_dataclass(QuantizationSettings, values, type(self).__name__)
        self.quant_method: Any = quant_method
        self.bits, self.group_size, self.order = settings.bits, settings.group_size, settings.order
        self.modules_to_not_convert = settings.modules_to_not_convert

    def to_dict(self) -> dict[str, Any]:
        """As the llm/config.json of a VILA folder has it."""
        skipped = self.modules_to_not_convert or ()
        return make_quantization_config(NATIVE, self.group_size, self.order, skipped)["quantization_config"]


class StoredLinear(nn.Module):
    """An int4 linear map as a checkpoint holds it, until all of its tensors are loaded.

    tensors: those on disk by the last part of their names, here on the meta device. dense: the module in whose place it
    stands.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dense: nn.Linear):
        super().__init__()
        self.tensor_names = tuple(tensors)
        for name, x in tensors.items():
            self.register_parameter(name, nn.Parameter(x, requires_grad=False))
        self.bias: nn.Parameter | None = dense.bias
        self.dtype = dense.weight.dtype

    def to_int4(self, layout: Layout, group_size: int, rounding: Any) -> Int4Linear:
        """The module that runs. Errors: ValueError for tensors that are not one weight of this layout."""
        weight = layout.read({name: self.get_parameter(name).data for name in self.tensor_names}, group_size)
        check_values("int4 linear map", weight.scales, zeros=weight.zeros)
        scales, zeros = weight.scales.to(self.dtype), weight.zeros.to(self.dtype)
        return Int4Linear(replace(weight, scales=scales, zeros=zeros, rounding=rounding), self.bias)


class Int4Quantizer(HfQuantizer):
    """Makes linear maps of a model of transformers int4, which stay frozen; adapters beside them are trained."""

    layout: Layout = NATIVE  # on disk
    linears: Mapping[str, int] = {}  # those to round, with their group sizes

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> None:
        """Errors: `LoadError`, ValueError for what cannot be read or rounded, before anything is loaded."""
        if not self.pre_quantized:
            self.linears = linears_to_round(model, self.quantization_config)
            return
        if not checkpoint_files:
            raise LoadError("int4 linear maps are read from the files of a checkpoint, and from nothing else")
        where = str(Path(checkpoint_files[0]).parent)
        tensors = merged(open_tensors(Path(file)) for file in checkpoint_files)
        stored_config = json.loads(self.quantization_config.to_json_string())
        config = {"quantization_config": stored_config, "int4_order": getattr(model.config, "int4_order", None)}
        native, layout = detect_quantization(config, tensors, where)
        assert layout is not None  # `quant_method` is one that is known
        self.layout = layout
        self.quantization_config = Int4Config(**native["quantization_config"])
        modules = dict(model.named_modules())
        for stem, names in int4_linears(tensors.meta).items():
            dense = modules.get(stem)
            if not isinstance(dense, nn.Linear):
                raise LoadError(f"{where}: {stem} is int4, but no linear map of {type(model).__name__}")
            stored = StoredLinear({last: tensors.meta[name] for last, name in names.items()}, dense)
            n, k = self._to_int4(stored, stem).weight.shape
            if (n, k) != (dense.out_features, dense.in_features):
                expected = [dense.out_features, dense.in_features]
                raise LoadError(f"{where}: {stem} is {[n, k]}, but the config makes it {expected}")
            model.set_submodule(stem, stored)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Errors: ValueError naming the linear map, for values that no int4 weight has, and for several devices."""
        devices = sorted({str(p.device) for p in model.parameters()})
        if len(devices) > 1:
            raise ValueError(f"int4 linear maps are loaded onto one device, but device_map names {', '.join(devices)}")
        for name, module in list(model.named_modules()):
            if isinstance(module, StoredLinear):
                model.set_submodule(name, self._to_int4(module, name))
            elif name in self.linears:
                weight = Int4.pack(module.weight, self.linears[name])
                model.set_submodule(name, Int4Linear(weight, module.bias))
        return model

    def _to_int4(self, stored: StoredLinear, name: str) -> Int4Linear:
        config = self.quantization_config
        try:
            return stored.to_int4(self.layout, config.group_size, config.order)
        except ValueError as error:
            raise LoadError(f"{name}: {error}") from None

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """Make int4 linear maps dense, in place."""
        if isinstance(dtype, str):  # that of a config which has been saved
            dtype = parse_dtype(dtype)
        for name, module in list(model.named_modules()):
            if isinstance(module, Int4Linear):
                n, k = module.weight.shape
                dense = nn.Linear(k, n, device="meta")
                dense.weight = nn.Parameter(dequantize(module.weight, dtype or module.weight.dtype))
                dense.bias = module.bias
                model.set_submodule(name, dense)
        return model


def merged(parts: Iterable[LazyTensors]) -> LazyTensors:
    """The tensors of several files."""
    by_name = {name: part for part in parts for name in part.meta}
    return LazyTensors({name: part.meta[name] for name, part in by_name.items()}, lambda name: by_name[name][name])


def linears_to_round(model: Any, config: Int4Config) -> dict[str, int]:
    """The linear maps of a model that shall be int4, and their group sizes. Errors: ValueError if there are none, and
    naming one whose inputs cannot be divided into groups.
    """
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, config.modules_to_not_convert, model._keep_in_fp32_modules, add_default_skips=True
    )
    group_sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and should_convert_module(name, skipped):
            group_sizes[name] = module.in_features if config.group_size == -1 else config.group_size
            try:
                check_int4_shape(module.in_features, group_sizes[name])
            except ValueError as error:
                raise ValueError(f"{name}: {error}; modules_to_not_convert leaves it dense") from None
    if not group_sizes:
        raise ValueError(f"{type(model).__name__} has no linear map to convert")
    return group_sizes
