"""Linears with int4 weights in vLLM: the quantization `vila_triton`, whose products are `int4_matmul`.

Weights travel in AutoAWQ's "gemm" layout, whose columns are outputs: vLLM fuses q, k, v and gate, up along these and
gives each rank its columns or rows. Behind that they become one `Int4` a linear. Embeddings and lm_head stay dense.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.parameter import (
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
)
from vllm.transformers_utils.config import get_safetensors_params_metadata

from ..checkpoints.int4_layouts import AWQ_GEMM
from ..checkpoints.quantization_config import AWQ_VERSIONS
from ..hashing import canonical_json
from ..models.config_fields import GroupSize, expected_instead
from ..ops import Int4, int4_matmul
from ..ops.int4_tiles import CODES_PER_WORD
from ..ops.int4_weight import check_int4_shape, check_rounding
from .kernel_choices import KernelChoices, kernel_choices, read_options

QUANTIZATION = "vila_triton"
CHOICES: dict[str, KernelChoices] = {}  # by the JSON of the options in vLLM's additional_config
UNLOADED_FORMATS = ("dummy", "sharded_state")  # of `--load-format`: the first has no checkpoint, the second tiles


@register_quantization_config(QUANTIZATION)
class Int4Config(QuantizationConfig):
    """Int4 linears of one group size, with zero points; `rounding` is that of `Int4`.

    group_size: inputs that share a scale; -1: all inputs of a linear. modules_to_not_convert: parts of the names of
    linears that are dense, as in AutoAWQ. Errors: ValueError for what `Int4` does not hold.
    """

    def __init__(
        self,
        group_size: int,
        rounding: Literal["sub", "fma"] = "sub",
        modules_to_not_convert: Sequence[str] = (),
        weight_bits: int = 4,
        zero_point: bool = True,
    ) -> None:
        super().__init__()
        if expected_instead(GroupSize, group_size) or not group_size:
            raise ValueError(f"{QUANTIZATION}: group_size is {group_size!r}, expected inputs, or -1 for all of them")
        check_rounding(QUANTIZATION, rounding)
        if weight_bits != 4 or zero_point is not True:
            raise ValueError(
                f"{QUANTIZATION}: {weight_bits!r} bits, zero_point {zero_point!r}, expected 4 bits with zeros"
            )
        self.group_size = group_size
        self.rounding: Literal["sub", "fma"] = rounding
        self.modules_to_not_convert = list(modules_to_not_convert)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Int4Config":
        """Read AutoAWQ's quantization_config, or ours. Errors: ValueError, of another layout or a quantized lm_head."""
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if AWQ_GEMM not in AWQ_VERSIONS.get(version, ()):
            raise ValueError(
                f"{QUANTIZATION}: the checkpoint is AWQ, version {version!r}; vLLM takes gemm, to which `vila-triton "
                "convert --format awq-gemm` turns it"
            )
        if config.get("lm_head"):
            raise ValueError(f"{QUANTIZATION}: the checkpoint's lm_head is quantized; a dense one is supported")
        values = {
            "group_size": cls.get_from_keys(config, ["group_size", "q_group_size"]),
            "rounding": cls.get_from_keys_or(config, ["rounding", "order"], AWQ_GEMM.rounding),
            "modules_to_not_convert": config.get("modules_to_not_convert") or (),
            "weight_bits": cls.get_from_keys_or(config, ["bits", "w_bit", "weight_bits"], 4),
            "zero_point": config.get("zero_point", True),
        }
        return cls(**values)

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None):
        """Take an AWQ checkpoint where the user says `quantization="vila_triton"`, and only then."""
        return QUANTIZATION if user_quant == QUANTIZATION and hf_quant_cfg.get("quant_method") == "awq" else None

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Take what AWQ's config does not say: the rounding, which stands beside it, and the linears that are dense."""
        self.rounding = getattr(hf_config, "int4_order", self.rounding)
        check_rounding(QUANTIZATION, self.rounding)
        if not self.modules_to_not_convert:
            tensors = get_safetensors_params_metadata(model_name, revision=revision)
            self.modules_to_not_convert = [x.removesuffix(".weight") for x in tensors if x.endswith("_proj.weight")]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.modules_to_not_convert = hf_to_vllm_mapper.apply_list(self.modules_to_not_convert)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a linear; None for what is no linear. Errors: ValueError for experts, and for q, k, v or gate
        and up of which only some are dense.
        """
        if not isinstance(layer, LinearBase | RoutedExperts):
            return None
        if isinstance(layer, RoutedExperts):
            raise ValueError(f"{prefix}: {QUANTIZATION} quantizes linears, and these are experts")
        is_dense = is_layer_skipped(
            prefix, self.modules_to_not_convert, self.packed_modules_mapping, match_mode="substring"
        )
        return UnquantizedLinearMethod() if is_dense else Int4LinearMethod(self)

    @classmethod
    def get_name(cls) -> Any:
        return QUANTIZATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # the oldest GPU that kernels are compiled for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json", "quant_config.json"]


@register_weight_loader_v2_supported_method
class Int4LinearMethod(LinearMethodBase):
    """Makes the packed parameters of a linear, turns them into those of an `Int4`, and multiplies by it."""

    def __init__(self, config: Int4Config):
        self.config = config
        vllm_config = get_current_vllm_config_or_none()
        self.choices = canonical_json(read_options(vllm_config and vllm_config.additional_config))
        CHOICES[self.choices] = KernelChoices({}) if vllm_config is None else kernel_choices(vllm_config)
        # A step of vLLM may hold tokens of both phases; the number of rows decides.
        self.phase = "batch_invariant" if envs.VLLM_BATCH_INVARIANT else "prefill"
        if vllm_config is not None:  # what is wrong with a choice is said now
            CHOICES[self.choices].active(vllm_config.device_config.device, self.phase)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create qweight [k, n/8] int32, qzeros [G, n/8] int32 and scales [G, n], k and n of this rank.

        Errors: ValueError naming the linear if a rank's share is not made of whole groups, or of words of 8 outputs.
        """
        k, n = input_size_per_partition, sum(output_partition_sizes)
        one_group = self.config.group_size in (-1, input_size)
        group_size = k if one_group else self.config.group_size
        check_share(layer, input_size, k, output_partition_sizes, group_size)
        G = 1 if one_group else input_size // group_size  # of all ranks

        def loader(name: str, num_rows: int) -> dict[str, Any]:
            check = checked_loader(f"{describe(layer)}.{name}", num_rows, extra_weight_attrs["weight_loader"])
            return {"weight_loader": check, "output_dim": 1}

        # A scale that stands for all inputs is the same on every rank: it is not divided along them.
        zeros_type, along_k = (PackedColumnParameter, {}) if one_group else (PackedvLLMParameter, {"input_dim": 0})
        scales_type = ChannelQuantScaleParameter if one_group else GroupQuantScaleParameter
        packing: dict[str, Any] = {"packed_dim": 1, "packed_factor": CODES_PER_WORD}
        codes = torch.empty(k, n // CODES_PER_WORD, dtype=torch.int32)
        zeros = torch.empty(k // group_size, n // CODES_PER_WORD, dtype=torch.int32)
        scales = torch.empty(k // group_size, n, dtype=params_dtype)
        layer.qweight = PackedvLLMParameter(data=codes, input_dim=0, **packing, **loader("qweight", input_size))
        layer.qzeros = zeros_type(data=zeros, **along_k, **packing, **loader("qzeros", G))
        layer.scales = scales_type(data=scales, **along_k, **loader("scales", G))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Turn the packed parameters into qweight, scales and zeros of an `Int4`, and free them.

        Errors: ValueError naming the linear if the checkpoint did not hold all of them.
        """
        check_loaded(layer)
        weight = AWQ_GEMM.read({name: getattr(layer, name).data for name in AWQ_GEMM.tensor_names}, 0)
        del layer.qzeros
        # Parameters, for vLLM to count and to move.
        for name in ("qweight", "scales", "zeros"):
            setattr(layer, name, nn.Parameter(getattr(weight, name), requires_grad=False))
        layer.group_size = weight.group_size

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x · wᵀ + bias: x [..., k], w [n, k] -> [..., n], by the implementation of `int4_matmul` that is chosen."""
        run = traced_product if torch.compiler.is_compiling() else product
        weight = layer.qweight, layer.scales, layer.zeros, layer.group_size, self.config.rounding
        return run(x, bias, *weight, self.choices, self.phase)


def product(
    x: Tensor,
    bias: Tensor | None,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    group_size: int,
    rounding: str,
    choices: str,
    phase: str,
) -> Tensor:
    """x · wᵀ + bias [..., n] in a phase, where w is the `Int4` of the next five arguments, under one of `CHOICES`."""
    weight: Any = qweight, scales, zeros, group_size, rounding
    with CHOICES[choices].active(x.device, phase):
        return int4_matmul(x, Int4(*weight), bias)


# In code that vLLM compiles this is one node: the choices are looked up when it runs.
traced_product = torch.library.custom_op("vila_triton::vllm_int4_linear", product, mutates_args=())
traced_product.register_fake(lambda x, bias, qweight, scales, *_: x.new_empty(*x.shape[:-1], scales.shape[1]))


def describe(layer: nn.Module) -> str:
    """The name of a linear in the model, or its class."""
    return getattr(layer, "prefix", "") or type(layer).__name__


def check_share(layer: Any, input_size: int, k: int, output_sizes: Sequence[int], group_size: int) -> None:
    """Raise ValueError unless the part of a linear that lies on one rank, [sum(output_sizes), k], is an int4 weight."""
    problem = ""
    if odd := [n for n in output_sizes if n % CODES_PER_WORD]:
        problem = f"its {odd[0]} outputs are no multiple of {CODES_PER_WORD}, which a word of the layout holds"
    elif k % group_size:
        problem = f"its {k} inputs do not divide into groups of {group_size}"
    else:
        try:
            check_int4_shape(k, group_size)
        except ValueError as error:
            problem = str(error)
    if problem:
        ranks = getattr(layer, "tp_size", 1)
        raise ValueError(
            f"{describe(layer)}: {input_size} inputs over {ranks} tensor-parallel ranks leave "
            f"[{' + '.join(map(str, output_sizes))}, {k}] to each, and {problem}"
        )


def checked_loader(name: str, num_rows: int, load: Callable[..., None]) -> Callable[..., None]:
    """A loader of a parameter that checks what the checkpoint holds, where vLLM would take the first rows of more.

    num_rows: those of the whole tensor. It notes on the parameter which parts of a fused linear were loaded.
    """

    def load_checked(parameter: nn.Parameter, loaded: Tensor, *shard: Any) -> None:
        is_float = parameter.is_floating_point()
        if loaded.dim() != 2 or len(loaded) != num_rows or loaded.is_floating_point() != is_float:
            found, expected = f"{list(loaded.shape)} {loaded.dtype}", "floats" if is_float else "integers"
            raise ValueError(f"{name}: the checkpoint holds {found}, expected {num_rows} rows of {expected}")
        load(parameter, loaded, *shard)
        parts = [part for x in shard or (None,) for part in (x if isinstance(x, tuple) else (x,))]
        vars(parameter).setdefault("loaded_shards", []).extend(parts)

    return load_checked


def check_loaded(layer: Any) -> None:
    """Raise ValueError unless all parts of the packed parameters were loaded; where there is nothing to load, pass."""
    config = get_current_vllm_config_or_none()
    if config is not None and config.load_config.load_format in UNLOADED_FORMATS:
        return
    for name in AWQ_GEMM.tensor_names:
        shards = set(vars(getattr(layer, name)).get("loaded_shards", ()))
        if None not in shards and len(shards) < len(layer.output_partition_sizes):
            raise ValueError(f"{describe(layer)}.{name} is not in the checkpoint, or only a part of it")
