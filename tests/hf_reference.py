"""Small random models, and the same weights in Hugging Face's modules and a hand-written projector."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import reference_towers
import torch
import torch.nn.functional as F
from pytest import MonkeyPatch
from reference_projectors import Projector
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vila_triton import VilaLlamaConfig, VilaLlamaForCausalLM

LLM: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
}
VISION = reference_towers.SIGLIP


def config(
    dtype: torch.dtype = torch.float64,
    llm: dict | None = None,
    vision: dict | None = None,
    order: str = "column",
    **top: Any,
) -> VilaLlamaConfig:
    """A 2-layer LLaMA with grouped queries, a 3-layer SigLIP with a 5 x 5 grid (9 tokens a picture), and changes."""
    llm, vision = LLM | (llm or {}), VISION | (vision or {})
    return VilaLlamaConfig(
        **{
            "llm_cfg": llm,
            "vision_tower_cfg": vision,
            "mm_projector_cfg": {"mm_projector_type": "mlp_downsample", "token_order": order},
            "hidden_size": llm["hidden_size"],
            "mm_hidden_size": vision["hidden_size"],
            "mm_vision_select_layer": -2,
            "model_dtype": str(dtype),
            **top,
        }
    )


def build(
    cfg: VilaLlamaConfig | None = None, *, seed: int = 0, gain: float = 1.0, **changes: Any
) -> VilaLlamaForCausalLM:
    """A model no leaf of which is special: norms are not 1, biases are not 0, int4 zeros are any code.

    With a gain above 1 its layers change the words more, and greedy answers do not repeat one word.
    """
    torch.manual_seed(seed)
    model = VilaLlamaForCausalLM(cfg or config(**changes)).eval()
    for name, p in model.named_parameters():
        if name.endswith("zeros"):
            p.data.copy_(torch.randint(0, 16, p.shape))
        elif name.endswith("scales"):
            p.data.uniform_(0.01, 0.05)
        elif p.ndim == 1:
            p.data.add_(torch.randn_like(p) * 0.2)
        elif name.startswith("llm.model.layers") and p.is_floating_point():
            p.data.mul_(gain)
    return model


def pictures(model: VilaLlamaForCausalLM, n: int, seed: int = 1) -> Tensor:
    side = model.vila_config.vision_tower.input_size
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=model.dtype)


def words(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(3, LLM["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: Sequence[Sequence[int]], side: str = "right", fill: int = 0) -> tuple[Tensor, Tensor]:
    """Rows as one tensor [b, longest], and its mask."""
    longest = max(map(len, rows))
    pad = [[fill] * (longest - len(row)) for row in rows]
    ids = torch.tensor([[*p, *row] if side == "left" else [*row, *p] for row, p in zip(rows, pad)])
    ones = torch.tensor([[0] * len(p) + [1] * len(row) for row, p in zip(rows, pad)])
    return ids, ones if side == "left" else ones.flip(1)


def spread(row: Sequence[int], labels: Sequence[int]) -> list[int]:
    """The labels of a row whose pictures are widened to 9 positions; nothing predicts its first token."""
    return [-100, *[x for i, label in zip(row, labels) for x in ([label] if i != -200 else [-100] * 9)][1:]]


@contextmanager
def exact_norms() -> Iterator[None]:
    """LlamaRMSNorm without its detour through float32, which costs float64 inputs half their digits."""

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    with MonkeyPatch.context() as patch:
        patch.setattr(LlamaRMSNorm, "forward", forward)
        yield


@dataclass
class Oracle:
    """The three parts as others wrote them; every method takes the same prompts as our model."""

    llm: Any  # LlamaForCausalLM
    tower: Any  # SiglipVisionModel, CLIPVisionModel or InternVLVisionModel
    projector: Projector
    top: dict[str, Any]  # how a picture is seen

    @classmethod
    def of(cls, model: VilaLlamaForCausalLM, attention: str = "sdpa") -> "Oracle":
        llm: Any
        parts, cfg = model.config.part_configs(), model.vila_config
        held = {part: model.get_submodule(part).state_dict() for part in parts}
        llm = LlamaForCausalLM(LlamaConfig(**{**parts["llm"], "attn_implementation": attention}))
        missing, unexpected = llm.to(model.dtype).eval().load_state_dict(held["llm"], strict=False)
        assert not unexpected and missing == ["lm_head.weight"] * cfg.llm.tie_word_embeddings
        llm.tie_weights()
        tower = reference_towers.theirs(parts["vision_tower"], held["vision_tower"], attention)
        projector = Projector(
            parts["mm_projector"], cfg.vision_tower.feature_dim, cfg.llm.hidden_size, held["mm_projector"]
        )
        how = {f"mm_vision_select_{name}": getattr(cfg.vision_tower, f"select_{name}") for name in ("layer", "feature")}
        return cls(llm, tower, projector, {**model.config.to_dict(), **how})

    def features(self, images: Tensor) -> Tensor:
        return self.projector(reference_towers.features(self.tower, images, self.top))

    def embeds(self, rows: Sequence[Tensor], images: Tensor | None) -> list[Tensor]:
        """Words and pictures of each row [t] side by side: [t', e]."""
        queue = list(self.features(images)) if images is not None else []
        embed = self.llm.get_input_embeddings()
        rows_out = [torch.cat([queue.pop(0) if i == -200 else embed(i)[None] for i in row]) for row in rows]
        assert not queue
        return rows_out

    def run(self, rows: Sequence[Tensor], images: Tensor | None = None, side: str = "right", **more: Any) -> Any:
        """Hugging Face's output for the padded batch, and the mask [b, longest] of its places."""
        rows = self.embeds(rows, images)
        longest = max(map(len, rows))
        pad = lambda n: (longest - n, 0) if side == "left" else (0, longest - n)  # noqa: E731
        embeds = torch.stack([F.pad(row, (0, 0, *pad(len(row)))) for row in rows])
        mask = torch.stack([F.pad(torch.ones(len(row), dtype=torch.long), pad(len(row))) for row in rows])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with exact_norms():
            out = self.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **more)
        return out, mask.bool()


def dense_twin(model: VilaLlamaForCausalLM) -> VilaLlamaForCausalLM:
    """The same model with every int4 weight written out."""
    from vila_triton.ops import Int4, dequantize

    values = dict(model.state_dict())
    for key in [k for k in values if k.endswith("qweight")]:
        stem = key.removesuffix(".qweight")
        leaves = (values.pop(f"{stem}.{leaf}") for leaf in ("qweight", "scales", "zeros"))
        w = Int4(*leaves, group_size=model.vila_config.llm.group_size or 0, rounding=model.vila_config.llm.rounding)
        values[f"{stem}.weight"] = dequantize(w, model.dtype)
    parts = model.config.part_configs()
    llm = {k: v for k, v in parts["llm"].items() if k != "quantization_config"}
    twin = build(VilaLlamaConfig(**{**model.config.to_dict(), "llm_cfg": llm}))
    twin.load_state_dict(values)
    return twin
