"""One language model with random weights, run in several ways: by this project, with any choice of kernels, and by
Hugging Face's eager `LlamaForCausalLM` on the same weights.

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

from vila_triton.arguments import choices
from vila_triton.cache.paged_cache import PagedCache, Uncached
from vila_triton.engine import engine
from vila_triton.models import llama, params
from vila_triton.models.config import LlamaConfig
from vila_triton.models.vila import Vila
from vila_triton.ops import Int4, dequantize
from vila_triton.registry import OPS, REFERENCE, discover, use

HF = "hf eager"
GROUP = 128
CODES = 8  # the root mean square of a code, 0 to 15, less the zero of `params.weight`, 1


@dataclass(frozen=True)
class Model:
    """Random parameters on a device. `weights`: what the layers' linears are kept in, else all is of `dtype`."""

    weights: str
    dtype: torch.dtype
    cfg: LlamaConfig
    p: llama.Llama


def build(cfg: LlamaConfig, weights: str, device: torch.device) -> Model:
    """`weights`: the name of a dtype, or int4, which computes in bfloat16 on a CPU and in float16 on a GPU.

    Codes are drawn as codes, so a model takes no more memory than it needs; outputs are of the size of inputs.
    """
    group = GROUP if weights == "int4" else None
    half = torch.bfloat16 if device.type == "cpu" else torch.float16
    dtype = half if group else getattr(torch, weights)
    cfg = replace(cfg, group_size=group)
    with torch.device(device):
        rng = torch.Generator(device).manual_seed(0)

        def leaf(spec: params.Spec) -> Tensor:
            x = spec.tensor(rng)
            return x / (CODES * GROUP**0.5) if spec.key.endswith(".scales") else x

        return Model(weights, dtype, cfg, params.tree_map(leaf, llama.declare(cfg, dtype)))


class Runner(Protocol):
    """A way to run a model. A state holds what is cached of `batch` sequences."""

    model: Model
    name: str
    held: list[Tensor]  # its weights
    reads: LlamaConfig  # what they are kept in

    def start(self, batch: int, room: int) -> Any:
        """A state in which nothing is cached, and to which `room` tokens a sequence will be appended."""
        ...

    def step(self, state: Any, ids: Tensor) -> Tensor:
        """Append ids [b, n] to the state, in place -> logits of the last [b, v]."""
        ...

    def forget(self, state: Any, length: int) -> None:
        """Roll every sequence back to `length` tokens."""
        ...


class Ours:
    """This project's model with the kernels of `choice`, as in `chosen`."""

    def __init__(self, model: Model, choice: str):
        self.model, self.name, self.kernels = model, choice, chosen(choice)
        self.held, self.reads = params.leaves(model.p), model.cfg
        self.vila = Vila(model.p, None, None)
        self.cfg: Any = _LanguageOnly(model.cfg)

    def start(self, batch: int, room: int) -> PagedCache:
        cache = PagedCache(self.model.cfg, 0, dtype=self.model.dtype, device=self.model.p.norm.device)
        cache.reserve({cache.table.alloc(): room for _ in range(batch)})
        return cache

    def step(self, state: PagedCache, ids: Tensor) -> Tensor:
        with use(**self.kernels):
            hidden = engine.advance(self.vila, dict(zip(state.table.sequences, ids)), self.cfg, state)
            with engine.kernels(ids.device, decode=True):
                return llama.logits(self.model.p, torch.cat(hidden))

    def forget(self, state: PagedCache, length: int) -> None:
        for sequence in state.table.sequences:
            state.table.truncate(sequence, length)


@dataclass(frozen=True)
class _LanguageOnly:
    """What the engine reads of the config of a model that is given no pictures."""

    llm: LlamaConfig


def chosen(choice: str) -> Mapping[str, str]:
    """`default`: what configs/kernels.toml says; `reference`; or OP=NAME,OP=NAME, the rest being the default.

    Errors: ValueError, KeyError, naming what there is.
    """
    discover()
    if choice == "default":
        return {}
    if choice == REFERENCE:
        return dict.fromkeys(OPS, REFERENCE)
    return choices([f"kernels.{part}" for part in choice.split(",")])


class Theirs:
    """Hugging Face's eager model on the same weights; those of an int4 model are made plain tensors first."""

    def __init__(self, model: Model):
        self.model = model
        self.name = f"{HF}, dequantized" if model.cfg.group_size else HF
        ours = self.reads = replace(model.cfg, group_size=None)
        own = ("group_size", "rope_theta", "rope_scaling")  # which Hugging Face has under other names, or not
        about: dict[str, Any] = {f.name: getattr(ours, f.name) for f in fields(ours) if f.name not in own}
        scaling = asdict(ours.rope_scaling) if ours.rope_scaling else {"rope_type": "default"}
        about["rope_parameters"] = {"rope_theta": ours.rope_theta, **scaling}
        about["attn_implementation"] = "eager"
        config = TheirConfig(**about)
        with torch.device("meta"):
            self.net = LlamaForCausalLM(config).eval()
        dense = params.leaves(llama.declare(ours, model.dtype))
        values = {spec.key: leaf for spec, leaf in zip(dense, params.leaves(plain(model.p, model.dtype)), strict=True)}
        self.net.load_state_dict(values, assign=True)
        self.held: list[Tensor] = [*self.net.parameters()]
        self.net.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.p.norm.device)

    def start(self, batch: int, room: int) -> DynamicCache:
        return DynamicCache(config=self.net.config)

    def step(self, state: DynamicCache, ids: Tensor) -> Tensor:
        return self.net(ids, past_key_values=state, logits_to_keep=1).logits[:, -1]

    def forget(self, state: DynamicCache, length: int) -> None:
        state.crop(length - state.get_seq_length())  # counted from the end


def plain(tree: Any, dtype: torch.dtype) -> Any:
    """The same tree with int4 leaves made plain tensors of the dtype."""
    if isinstance(tree, Int4):
        return dequantize(tree, dtype)
    if isinstance(tree, tuple):
        return tuple(plain(part, dtype) for part in tree)
    if hasattr(tree, "__dataclass_fields__"):
        return replace(tree, **{f.name: plain(getattr(tree, f.name), dtype) for f in fields(tree)})
    return tree


def exact(model: Model, ids: Tensor) -> Tensor:
    """Logits [v] after ids [t], in float64 by the references, one layer at a time."""

    def wide(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    p: Any = replace(model.p, layers=(params.tree_map(wide, layer) for layer in model.p.layers))  # pyright: ignore
    p = replace(p, norm=wide(p.norm))
    past = Uncached([len(ids)], ids.device)
    head = p.embedding if p.head is None else p.head
    with use(**dict.fromkeys(OPS, REFERENCE)):
        x = llama.llama(p, wide(llama.embed(p, ids)), past.positions, model.cfg, past)[-1:]
        return llama.logits(replace(p, head=wide(head)), x)[0]


@torch.inference_mode()
def wrong(runner: Runner, ids: Tensor) -> str | None:
    """Why the logits of a runner after ids [t] are not those of its model, in one line; None if they are.

    They may lie at most twice as far from the exact ones (root mean square) as those of the references do: once as a
    whole, and once with the last token in a step of its own, as in decoding.
    """
    want = exact(runner.model, ids)

    def off(runner: Runner, cut: int) -> float:
        state = runner.start(1, len(ids))
        for part in (ids[:cut], ids[cut:]):
            if len(part):
                out = runner.step(state, part[None])
        return float((out[0].double() - want).square().mean().sqrt())  # pyright: ignore

    for cut, how in ((len(ids), "prefill"), (len(ids) - 1, "decode")):
        error, allowed = off(runner, cut), 2 * off(Ours(runner.model, REFERENCE), cut)
        if not error <= allowed:
            return f"the logits of a {how} are off by {error:.2e}, and those of the references by {allowed / 2:.2e}"
    return None
