"""Attention over vLLM's KV cache by the ops of this project: `--attention-backend CUSTOM`.

Decode rows (one new token) run `decode_attention` in the phase "decode", all others `prefill_attention` in the phase
"prefill"; `kv_write` comes before both. Which implementations these are is said by `kernel_choices`. Under
VLLM_BATCH_INVARIANT every row runs `prefill_attention` with numerics "batch_invariant", since decode kernels sum in
another order.

vLLM's platform for CPUs asks for the backend CPU_ATTN, whatever was chosen. So `CPU_ATTN` of this module is registered
in its place, which is this backend where CUSTOM was chosen, and vLLM's own elsewhere.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import AttentionSpec

from ..ops import PagedKV, RaggedBatch, decode_attention, kv_write, prefill_attention
from ..ops.attention import HEAD_DIMS
from ..ops.dtypes import DTYPES, dtype_name
from ..ops.kv_pages import PAGE_SIZES
from .kernel_choices import kernel_choices


def choose_attention(vllm_config: VllmConfig) -> None:
    """Choose this backend for a model that is about to be made, unless `--attention-backend` chose another."""
    if vllm_config.attention_config.backend is None:
        vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM


def __getattr__(name: str) -> type[AttentionBackend]:
    """`CPU_ATTN`: the backend for a layer that is being made on a CPU. vLLM caches it for each chosen backend."""
    if name != "CPU_ATTN":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    config = get_current_vllm_config_or_none()
    is_chosen = config is not None and config.attention_config.backend == AttentionBackendEnum.CUSTOM
    return PagedAttentionBackend if is_chosen else CPUAttentionBackend


class PagedAttentionBackend(AttentionBackend):
    """Describes this backend to vLLM: the sizes and dtypes that the ops are tested at, any layout of the cache."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [getattr(torch, name) for name in DTYPES.values]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return AttentionBackendEnum.CUSTOM.name

    @staticmethod
    def get_impl_cls() -> type["PagedAttention"]:
        return PagedAttention

    @staticmethod
    def get_builder_cls() -> type["PagedAttentionMetadataBuilder"]:
        return PagedAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return list(PAGE_SIZES.values)

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return sorted(HEAD_DIMS.values)

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False


@dataclass
class PagedAttentionMetadata(AttentionMetadata):
    """One step: b sequences with s new tokens, laid end to end, of which the first `num_decodes` have one each.

    slot_mapping    [s] int64, -1 for a token that is not cached
    block_table     [b, pages] int32
    seq_lens        [b] int32, with the new tokens
    prefill_batch   of the sequences behind the first `num_decodes`, which begin at row `num_decodes`
    """

    num_decodes: int
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    prefill_batch: RaggedBatch

    @property
    def num_tokens(self) -> int:
        return len(self.slot_mapping)

    @property
    def has_prefills(self) -> bool:
        return self.num_tokens > self.num_decodes


class PagedAttentionMetadataBuilder(AttentionMetadataBuilder[PagedAttentionMetadata]):
    """Makes the metadata of a step from vLLM's, without waiting for the device."""

    reorder_batch_threshold: int | None = 1  # vLLM puts sequences of one new token first

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.page_size = kv_cache_spec.block_size
        if self.page_size not in PAGE_SIZES:
            raise ValueError(refusal(f"blocks of {self.page_size} tokens", *PAGE_SIZES.values))

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedAttentionMetadata:
        """Raises ValueError for attention that is not causal. `common_prefix_len` and `fast_build` change nothing."""
        common = common_attn_metadata
        if common.causal is not True:
            raise ValueError(refusal("attention that is not causal"))
        starts = common.query_start_loc_cpu  # padding counts no tokens here, while `num_actual_tokens` may count it
        new_lens = starts.diff()
        is_decode = (new_lens == 1) & (not envs.VLLM_BATCH_INVARIANT)
        num_decodes = int(is_decode.cumprod(0).sum())
        num_pages = -(-common.max_seq_len // self.page_size)
        return PagedAttentionMetadata(
            num_decodes,
            common.slot_mapping[: int(starts[-1])],
            common.block_table_tensor[:, :num_pages],
            common.seq_lens,
            RaggedBatch(
                common.query_start_loc[num_decodes:] - num_decodes,
                common.compute_num_computed_tokens()[num_decodes:],
            ),
        )


class PagedAttention(AttentionImpl[PagedAttentionMetadata]):
    """Attention of one layer. Raises ValueError for what it cannot do, when it is made."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **other: Any,
    ):
        config, dtype = get_current_vllm_config(), torch.get_default_dtype()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        for feature, is_asked_for in {
            "ALiBi": alibi_slopes is not None,
            f"a sliding window of {sliding_window} tokens": sliding_window is not None,
            f"scores capped at {logits_soft_cap}": bool(logits_soft_cap),
            f"attention of the type {getattr(attn_type, 'value', attn_type)}": attn_type != AttentionType.DECODER,
            "layers that share one KV cache": kv_sharing_target_layer_name is not None,
            "tokens that see later ones": config.model_config.is_mm_prefix_lm,
            "windows that keep a prefix": config.model_config.rswa_window is not None,
            "context parallelism": self.total_cp_world_size > 1,
            **{name: value is not None and value is not False for name, value in other.items()},
        }.items():
            if is_asked_for:
                raise ValueError(refusal(feature))
        if head_size not in HEAD_DIMS:
            raise ValueError(refusal(f"heads of {head_size} numbers", *HEAD_DIMS.values))
        if dtype_name(dtype) not in DTYPES:
            raise ValueError(refusal(dtype_name(dtype), *DTYPES.values))
        if kv_cache_dtype not in ("auto", dtype_name(dtype)):
            raise ValueError(refusal(f"a KV cache in {kv_cache_dtype}", "auto", dtype_name(dtype)))
        self.numerics = "batch_invariant" if envs.VLLM_BATCH_INVARIANT else "fast"
        self.choices = kernel_choices(config)
        for phase in self.phases:
            self.choices.active(config.device_config.device, phase)  # what is wrong with a choice is said now

    @property
    def phases(self) -> tuple[str, str]:
        """The phases that decode rows and all others run in."""
        return ("batch_invariant", "batch_invariant") if self.numerics == "batch_invariant" else ("decode", "prefill")

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write the new keys and values into the cache and attention into `output`, in place; returns that.

        query, output [s, h, d], key, value [s, g, d], s with padding behind the new tokens; kv_cache [p, g, l, 2·d],
        keys before values, at any strides. Without metadata, which is how vLLM warms up, the output is 0.

        Raises NotImplementedError where the output is to be quantized.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError(refusal("an output that is quantized"))
        if attn_metadata is None:
            return output.zero_()
        step, device = attn_metadata, query.device
        decode_phase, prefill_phase = self.phases
        s, b = step.num_tokens, step.num_decodes
        q, k, v = query[:s], key[:s], value[:s]
        k_pages, v_pages = (x.transpose(1, 2) for x in kv_cache.split(self.head_size, -1))  # [p, l, g, d]
        with self.choices.active(device, prefill_phase if step.has_prefills else decode_phase):
            kv_write(k, v, k_pages, v_pages, step.slot_mapping)
        if b:
            cache = PagedKV(k_pages, v_pages, step.block_table[:b])
            with self.choices.active(device, decode_phase):
                output[:b] = decode_attention(q[:b], cache, step.seq_lens[:b], self.scale, self.numerics)
        if step.has_prefills:
            cache = PagedKV(k_pages, v_pages, step.block_table[b:])
            with self.choices.active(device, prefill_phase):
                output[b:s] = prefill_attention(
                    q[b:], k[b:], v[b:], cache, step.prefill_batch, self.scale, self.numerics
                )
        return output


def refusal(feature: str, *allowed: object) -> str:
    """The sentence about something that this backend does not do, and what it does instead."""
    hint = f", expected {' or '.join(map(str, allowed))}" if allowed else ""
    return f"the attention of vila_triton does not support {feature}{hint}; choose another --attention-backend"
