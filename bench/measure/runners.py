"""One language model with random weights, run by vila-triton with any choice of kernels, and by Hugging Face's eager
`LlamaForCausalLM` on the same weights.

Every runner does the same work: it appends new tokens to cached ones and returns the logits of the last of them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM
from transformers import LlamaConfig as TheirConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vila_triton.arguments import parse_kernel_settings
from vila_triton.cache.paged_cache import PagedKVCache, UncachedBatch
from vila_triton.engine import engine
from vila_triton.models import llama, params
from vila_triton.models.config import LlamaConfig
from vila_triton.models.vila import Vila
from vila_triton.ops import Int4, dequantize
from vila_triton.registry import OPS, REFERENCE, discover, use

HF = "hf eager"
GROUP_SIZE = 128
CODE_RMS = 8  # the root mean square of a code, 0 to 15, less the zero of `params.weight`, 1


@dataclass(frozen=True)
class RandomModel:
    """Random parameters on a device. `weight_format` is that of the layers' linears, all else is of `dtype`."""

    weight_format: str
    dtype: torch.dtype
    cfg: LlamaConfig
    p: llama.Llama


def build_model(cfg: LlamaConfig, weight_format: str, device: torch.device) -> RandomModel:
    """Returns a model with random weights. `weight_format` is the name of a dtype, or int4, which computes in bfloat16
    on a CPU and in float16 on a GPU.

    int4 codes are drawn as codes, so a model takes no more memory than it needs. Outputs of linears are as large as
    inputs.
    """
    group_size = GROUP_SIZE if weight_format == "int4" else None
    half = torch.bfloat16 if device.type == "cpu" else torch.float16
    dtype = half if group_size else getattr(torch, weight_format)
    cfg = replace(cfg, group_size=group_size)
    with torch.device(device):
        rng = torch.Generator(device).manual_seed(0)

        def leaf(spec: params.ParameterSpec) -> Tensor:
            x = spec.init_tensor(rng)
            return x / (CODE_RMS * GROUP_SIZE**0.5) if spec.key.endswith(".scales") else x

        p = llama.join_leaves(params.tree_map(leaf, llama.param_specs(cfg, dtype)))
        return RandomModel(weight_format, dtype, cfg, p)


class Runner(Protocol):
    """A way to run a model. A state holds the cached tokens of `batch` sequences."""

    model: RandomModel
    name: str
    weights: list[Tensor]  # its weights
    weight_config: LlamaConfig  # what they are kept in
    own_seconds: float | None  # the time of the last step by a clock of the runner's own, if it has one

    def start(self, batch: int, capacity: int) -> Any:
        """Returns a state without cached tokens, to which `capacity` tokens per sequence will be appended."""
        ...

    def step(self, state: Any, ids: Tensor) -> Tensor:
        """Appends ids [b, n] to the state, in place; returns the logits of the last ones [b, v]."""
        ...

    def truncate(self, state: Any, length: int) -> None:
        """Rolls every sequence back to `length` tokens."""
        ...


class VilaTritonRunner:
    """vila-triton's model with the kernels of `choice`, as in `parse_kernel_choices`."""

    own_seconds: float | None = None

    def __init__(self, model: RandomModel, choice: str):
        self.model, self.name, self.kernels = model, choice, parse_kernel_choices(choice)
        self.weights, self.weight_config = params.leaves(model.p), model.cfg
        self.vila = Vila(model.p, None, None)  # pyright: ignore[reportArgumentType]
        self.cfg: Any = _LanguageConfig(model.cfg)

    def start(self, batch: int, capacity: int) -> PagedKVCache:
        cache = PagedKVCache(self.model.cfg, 0, dtype=self.model.dtype, device=self.model.p.norm.device)
        cache.ensure_capacity({cache.allocator.add_sequence(): capacity for _ in range(batch)})
        return cache

    def step(self, state: PagedKVCache, ids: Tensor) -> Tensor:
        with use(**self.kernels):
            hidden = engine.extend(self.vila, dict(zip(state.allocator.sequences, ids)), self.cfg, state)
            with engine.use_default_kernels(ids.device, "decode"):
                return llama.logits(self.model.p, torch.cat(hidden))

    def truncate(self, state: PagedKVCache, length: int) -> None:
        for sequence in state.allocator.sequences:
            state.allocator.truncate(sequence, length)


@dataclass(frozen=True)
class _LanguageConfig:
    """The part of a model's config that the engine reads where there are no images."""

    llm: LlamaConfig


def parse_kernel_choices(choice: str) -> Mapping[str, str]:
    """Reads a choice of kernels: `default` for configs/kernels.toml; `reference`; or OP=NAME,OP=NAME for some ops.

    Errors: ValueError or KeyError naming the ops and implementations there are.
    """
    discover()
    if choice == "default":
        return {}
    if choice == REFERENCE:
        return dict.fromkeys(OPS, REFERENCE)
    return parse_kernel_settings([f"kernels.{part}" for part in choice.split(",")])


def hugging_face_model(p: llama.Llama, cfg: LlamaConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    """Returns Hugging Face's eager model of the same weights, which it shares; int4 weights are dequantized."""
    dense_config = replace(cfg, group_size=None)
    skipped = ("group_size", "rope_theta", "rope_scaling")  # which Hugging Face has under other names, or not
    arguments: dict[str, Any] = {
        f.name: getattr(dense_config, f.name) for f in fields(dense_config) if f.name not in skipped
    }
    scaling = asdict(dense_config.rope_scaling) if dense_config.rope_scaling else {"rope_type": "default"}
    arguments["rope_parameters"] = {"rope_theta": dense_config.rope_theta, **scaling}
    arguments["attn_implementation"] = "eager"
    config = TheirConfig(**arguments)
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    specs = params.leaves(llama.param_specs(dense_config, dtype))
    leaves = [leaf.detach() for leaf in params.leaves(dequantize_tree(p, dtype))]
    net.load_state_dict({spec.key: leaf for spec, leaf in zip(specs, leaves, strict=True)}, assign=True)
    net.model.rotary_emb = LlamaRotaryEmbedding(config).to(p.norm.device)
    return net


class HuggingFaceRunner:
    """Hugging Face's eager model on the same weights, those of an int4 model dequantized."""

    own_seconds: float | None = None

    def __init__(self, model: RandomModel):
        self.model = model
        self.name = f"{HF}, dequantized" if model.cfg.group_size else HF
        self.weight_config = replace(model.cfg, group_size=None)
        self.net = hugging_face_model(model.p, model.cfg, model.dtype).eval()
        self.weights: list[Tensor] = [*self.net.parameters()]

    def start(self, batch: int, capacity: int) -> DynamicCache:
        return DynamicCache(config=self.net.config)

    def step(self, state: DynamicCache, ids: Tensor) -> Tensor:
        return self.net(ids, past_key_values=state, logits_to_keep=1).logits[:, -1]

    def truncate(self, state: DynamicCache, length: int) -> None:
        state.crop(length - state.get_seq_length())  # counted from the end


def dequantize_tree(tree: Any, dtype: torch.dtype) -> Any:
    """Returns the same tree with int4 leaves dequantized."""
    if isinstance(tree, Int4):
        return dequantize(tree, dtype)
    if isinstance(tree, tuple):
        return tuple(dequantize_tree(part, dtype) for part in tree)
    if hasattr(tree, "__dataclass_fields__"):
        return replace(tree, **{f.name: dequantize_tree(getattr(tree, f.name), dtype) for f in fields(tree)})
    return tree


def float64_logits(model: RandomModel, ids: Tensor) -> Tensor:
    """Returns the logits [v] after ids [t], in float64 by the references, one layer at a time."""

    def to_float64(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    p: Any = replace(model.p, layers=(params.tree_map(to_float64, layer) for layer in model.p.layers))  # pyright: ignore
    p = replace(p, norm=to_float64(p.norm))
    past = UncachedBatch([len(ids)], ids.device)
    head = params.tree_map(to_float64, llama.head(p))
    with use(**dict.fromkeys(OPS, REFERENCE)):
        x = llama.forward(p, to_float64(llama.embed(p, ids)), past.positions, model.cfg, past)[-1:]
        return llama.logits(replace(p, head=head), x)[0]


@torch.inference_mode()
def logits_error(runner: Runner, ids: Tensor) -> str | None:
    """Returns one line saying why a runner's logits after ids [t] are wrong, None if they are right.

    Their root mean square distance from float64 may be at most twice that of the references: once as a whole, and once
    with the last token in a step of its own, as in decoding.
    """
    expected = float64_logits(runner.model, ids)

    def rms_error(runner: Runner, cut: int) -> float:
        state = runner.start(1, len(ids))
        for part in (ids[:cut], ids[cut:]):
            if len(part):
                out = runner.step(state, part[None])
        return float((out[0].double() - expected).square().mean().sqrt())  # pyright: ignore

    for cut, phase in ((len(ids), "prefill"), (len(ids) - 1, "decode")):
        error, allowed = rms_error(runner, cut), 2 * rms_error(VilaTritonRunner(runner.model, REFERENCE), cut)
        if not error <= allowed:
            return f"the logits of a {phase} are off by {error:.2e}, and those of the references by {allowed / 2:.2e}"
    return None
