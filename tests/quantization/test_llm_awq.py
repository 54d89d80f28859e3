"""Method llm-awq compared with a second transcription of its objective, token by token; and its cache files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from vila_triton.models import llama
from vila_triton.models.config import LlamaConfig
from vila_triton.models.params import LoadError, init_tree, tree_map
from vila_triton.ops import dequantize
from vila_triton.ops.int4_weight import unpack_codes
from vila_triton.quantization import awq_cache_file, llm_awq
from vila_triton.quantization import pipeline as awq
from vila_triton.quantization.activations import CalibrationTokens
from vila_triton.quantization.resumable import CACHE_PREFIX, save_atomically
from vila_triton.registry import OPS, REFERENCE, use

GROUP, ROWS, LENGTH = 32, 3, 200
HF = {name: f"self_attn.{name}_proj" for name in "qkvo"} | {n: f"mlp.{n}_proj" for n in ("gate", "up", "down")}


def model(kv_heads: int) -> tuple[LlamaConfig, llama.Layer, Tensor]:
    cfg = LlamaConfig(50, 64, 96, 1, 4, kv_heads, 16)
    rng = torch.Generator().manual_seed(kv_heads)
    layer = init_tree(llama.param_specs(cfg, torch.float64), rng).layers[0]
    loud = torch.exp(torch.randn(64, generator=rng, dtype=torch.float64))
    layer = replace(layer, attention_norm=loud, mlp_norm=loud.flip(0))
    return cfg, layer, torch.randn(ROWS * LENGTH, 64, generator=rng, dtype=torch.float64)


class Transcription:
    """llm-awq's scale and clipping searches written as loops: weights by Hugging Face's names, all in float64."""

    def __init__(self, p: llama.Layer, cfg: LlamaConfig, x: Tensor) -> None:
        names = ("q", "k", "v", "o", "gate", "up", "down")
        self.w = {name: getattr(p, name).weight.clone() for name in names}
        self.norm1, self.norm2, self.cfg = p.attention_norm.clone(), p.mlp_norm.clone(), cfg
        self.h = self.normed(x, self.norm1)
        self.a = self.attend(self.w, self.h)
        x = x + self.a @ self.w["o"].T
        self.m = self.normed(x, self.norm2)
        self.g = silu(self.m @ self.w["gate"].T) * (self.m @ self.w["up"].T)

    def normed(self, x: Tensor, w: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.cfg.rms_norm_eps) * w

    def attend(self, w: dict[str, Tensor], h: Tensor) -> Tensor:
        d, heads, kv = 16, 4, self.cfg.num_key_value_heads
        prefix = torch.arange(LENGTH).float()[:, None] * (1.0 / 10000 ** (torch.arange(0, d, 2).float() / d))
        cos, sin = (torch.cat((f(prefix),) * 2, -1).double() for f in (torch.cos, torch.sin))
        turn = lambda y: y * cos + torch.cat((-y[..., d // 2 :], y[..., : d // 2]), -1) * sin  # noqa: E731
        out = []
        for row in h.split(LENGTH):
            q, k, v = ((row @ w[n].T).view(LENGTH, -1, d).transpose(0, 1) for n in "qkv")
            k, v = (y.repeat_interleave(heads // kv, 0) for y in (k, v))
            scores = turn(q) @ turn(k).transpose(1, 2) / d**0.5
            scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), float("-inf"))
            out.append((scores.softmax(-1) @ v).transpose(0, 1).reshape(LENGTH, -1))
        return torch.cat(out)

    @staticmethod
    def quantize(w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pseudo-quantised weight, integers, scales, zeros."""
        rows = w.reshape(-1, GROUP)
        high, low = rows.amax(1, keepdim=True), rows.amin(1, keepdim=True)
        s = (high - low).clamp(min=1e-5) / 15
        z = (-torch.round(low / s)).clamp(0, 15)
        q = torch.clamp(torch.round(rows / s) + z, 0, 15)
        return ((q - z) * s).reshape(w.shape), q.reshape(w.shape), s, z

    def scale(self, names: str, x: Tensor, module) -> Tensor:
        x_max, reference = x.abs().view(-1, x.shape[-1]).mean(0), module(self.w)
        best, least = None, float("inf")
        for i in range(20):
            s = x_max.pow(i / 20).clamp(min=1e-4).view(-1)
            s = s / (s.max() * s.min()).sqrt()
            tried = self.w | {n: self.quantize(self.w[n] * s)[0] / s for n in names.split()}
            loss = (reference - module(tried)).pow(2).mean().item()
            if loss < least:
                best, least = s, loss
        assert best is not None
        return best

    def scales(self) -> dict[str, Tensor]:
        mlp = lambda w: (silu(self.m @ w["gate"].T) * (self.m @ w["up"].T)) @ w["down"].T  # noqa: E731
        result = {"attention": self.scale("q k v", self.h, lambda w: self.attend(w, self.h) @ w["o"].T)}
        if self.w["v"].shape == self.w["o"].shape:
            result["o"] = self.scale("o", self.a, lambda w: self.a @ w["o"].T)
        result["mlp"] = self.scale("gate up", self.m, mlp)
        return result | {"down": self.scale("down", self.g, lambda w: self.g @ w["down"].T)}

    def apply(self, result: dict[str, Tensor]) -> None:
        s = result["attention"]
        self.norm1, self.h = self.norm1 / s, self.h / s
        self.w |= {n: self.w[n] * s for n in "qkv"}
        if "o" in result:
            s = result["o"]
            self.w["v"], self.w["o"], self.a = self.w["v"] / s[:, None], self.w["o"] * s, self.a / s
        s = result["mlp"]
        self.norm2, self.m = self.norm2 / s, self.m / s
        self.w |= {n: self.w[n] * s for n in ("gate", "up")}
        s = result["down"]
        self.w["up"], self.w["down"], self.g = self.w["up"] / s[:, None], self.w["down"] * s, self.g / s

    def clips(self) -> dict[str, Tensor]:
        inputs = {"v": self.h, "o": self.a, "gate": self.m, "up": self.m, "down": self.g}
        return {name: self.clip(self.w[name], x) for name, x in inputs.items()}

    def clip(self, w: Tensor, x: Tensor) -> Tensor:
        x = x.view(1, len(x), -1, GROUP)
        x = x[:, 0 :: x.shape[1] // 512]  # [1, tokens, G, group]
        w = w.reshape(len(w), 1, -1, GROUP)
        greatest = w.abs().amax(-1, keepdim=True)
        best, least, reference = greatest.clone(), torch.ones_like(greatest) * 1e9, (x * w).sum(-1)
        for i in range(10):
            bound = greatest * (1 - i / 20)
            tried = self.quantize(torch.clamp(w, -bound, bound))[0]
            err = ((x * tried).sum(-1) - reference).pow(2).mean(1).view(least.shape)
            better = err < least
            least[better], best[better] = err[better], bound[better]
        return best.squeeze(1)


@pytest.mark.parametrize("kv_heads", [4, 2], ids=["o scaled", "grouped queries"])
@torch.no_grad()
def test_scales_clips_and_codes_minimize_the_llm_awq_objective(kv_heads: int, tmp_path: Path) -> None:
    cfg, layer, x = model(kv_heads)
    tokens = CalibrationTokens((LENGTH,) * ROWS, torch.ones(len(x)))
    with use(**dict.fromkeys(OPS, REFERENCE)):  # in the order of sums of the transcription: bounds may be tied
        rounded, _, result = llm_awq.quantize_layer(layer, x, tokens, cfg, GROUP)
    other = Transcription(layer, cfg, x)
    scales = other.scales()
    other.apply(scales)
    clips = other.clips()
    last: Any = {"rtol": 1e-13, "atol": 0.0}  # attention may add up in another order
    assert list(result.scales) == list(scales) and list(result.clips) == list(clips)
    for scale_group, s in scales.items():
        torch.testing.assert_close(result.scales[scale_group], s, **last)
    for name, bound in clips.items():
        torch.testing.assert_close(result.clips[name], bound[..., 0], **last)
    assert {r for r in result.ratios.values() if r}, "no scale was worth anything: the test shows nothing"
    torch.testing.assert_close(rounded.attention_norm, other.norm1, **last)
    for name, w in other.w.items():
        if name in clips:
            bound = clips[name].repeat_interleave(GROUP, 1).view_as(w)
            w = torch.minimum(torch.maximum(w, -bound), bound)
        _, q, s, z = other.quantize(w)
        int4 = getattr(rounded, name).weight
        assert torch.equal(unpack_codes(int4), q.int())
        assert torch.equal(int4.zeros.T.flatten(), z.flatten().half())
        assert torch.equal(int4.scales.T.flatten(), s.flatten().half())
    file = tmp_path / "cache.pt"
    awq_cache_file.save_awq_cache(file, [result])
    (again,) = awq_cache_file.load_awq_cache(file, cfg, GROUP, torch.float64)
    same = llm_awq.apply_search_result(layer, again, cfg, GROUP)
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), rounded, same)
    cache = torch.load(file, weights_only=True)
    assert cache["scale"][0][:2] == (
        "model.layers.0.input_layernorm",
        tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"),
    )
    assert cache["clip"][0][0] == "model.layers.0.self_attn.v_proj" and cache["clip"][0][1].shape == (
        16 * kv_heads,
        2,
        1,
    )


def applied(p: llama.Layer, cache: dict[str, Any]) -> dict[str, Tensor]:
    """Apply a cache file as llm-awq does: entry after entry, in the order of the file, each result rounded to the dtype
    of the weights; then codes, scales and zeros.
    """
    w = {HF[name]: getattr(p, name).weight.clone() for name in HF}
    w |= {"input_layernorm": p.attention_norm.clone(), "post_attention_layernorm": p.mlp_norm.clone()}
    for before, after, s in cache["scale"]:
        before, s = before.split(".", 3)[3], s.to(p.attention_norm.dtype)
        w[before] = w[before] / (s[:, None] if w[before].ndim == 2 else s)
        w |= {name: w[name] * s for name in (x.split(".", 3)[3] for x in after)}
    for name, bound in cache["clip"]:
        name, bound = name.split(".", 3)[3], bound.to(p.attention_norm.dtype)
        w[name] = torch.clamp(w[name].view(*bound.shape[:2], -1), -bound, bound).view_as(w[name])
    out = {name: x for name, x in w.items() if x.ndim == 1}
    for name in HF.values():
        _, q, s, z = Transcription.quantize(w[name])
        out |= {f"{name}.codes": q, f"{name}.scales": s.half(), f"{name}.zeros": z.half()}
    return out


def tensors(p: llama.Layer) -> dict[str, Tensor]:
    """The codes, scales and zeros of a quantized layer."""
    out: dict[str, Tensor] = {"input_layernorm": p.attention_norm, "post_attention_layernorm": p.mlp_norm}
    for name, hf in HF.items():
        w: Any = getattr(p, name).weight
        out |= {f"{hf}.codes": unpack_codes(w), f"{hf}.scales": w.scales.T, f"{hf}.zeros": w.zeros.T}
    return out


def differing(p: llama.Layer, cache: dict[str, Any], layer: llama.Layer) -> list[str]:
    """The tensors of a quantized layer that differ from what llm-awq makes of a cache file."""
    theirs = applied(layer, cache)
    return [n for n, x in tensors(p).items() if not torch.equal(x.float().flatten(), theirs[n].float().flatten())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_our_cache_applied_by_llm_awq_gives_the_same_tensors(dtype: torch.dtype, tmp_path: Path) -> None:
    cfg, layer, x = model(4)
    layer, x = tree_map(lambda leaf: leaf.to(dtype), layer), x.to(dtype)
    tokens = CalibrationTokens((LENGTH,) * ROWS, torch.ones(len(x)))
    rounded, _, result = llm_awq.quantize_layer(layer, x, tokens, cfg, GROUP)
    work = tmp_path / "work"
    work.mkdir()
    kept = {f"scale.{scale_group}": s for scale_group, s in result.scales.items()}
    kept |= {f"clip.{name}": bound for name, bound in result.clips.items()}
    save_atomically(
        work / "llm-000.safetensors", {CACHE_PREFIX + name: s for name, s in kept.items()}, {}
    )  # where names are sorted
    awq.save_cache(work, tmp_path / "cache.pt")
    cache = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert [before.split(".")[3:] for before, _, _ in cache["scale"]] == [
        ["input_layernorm"],
        ["self_attn", "v_proj"],
        ["post_attention_layernorm"],
        ["mlp", "up_proj"],
    ]
    assert [name.split(".")[4] for name, _ in cache["clip"]] == [f"{n}_proj" for n in ("v", "o", "gate", "up", "down")]
    assert all(s.dtype == dtype for *_, s in cache["scale"] + cache["clip"])
    assert not differing(rounded, cache, layer)
    (again,) = awq_cache_file.load_awq_cache(tmp_path / "cache.pt", cfg, GROUP, dtype)
    assert not differing(llm_awq.apply_search_result(layer, again, cfg, GROUP), cache, layer)


@pytest.mark.parametrize(("dtype", "order"), [(torch.bfloat16, (0, 1, 2, 3)), (torch.float16, (3, 1, 0, 2))])
@torch.no_grad()
def test_llm_awq_cache_applied_here_gives_the_same_tensors(
    dtype: torch.dtype, order: tuple[int, ...], tmp_path: Path
) -> None:
    """The cache was searched in float64, so that its numbers are not float16 by chance."""
    cfg, exact, x = model(4)
    layer = tree_map(lambda leaf: leaf.to(dtype), exact)
    other = Transcription(exact, cfg, x)
    scales = other.scales()
    other.apply(scales)
    prefix = "model.layers.0."
    scale = [
        (prefix + before, tuple(prefix + HF[n] for n in names), scales[scale_group])
        for scale_group, before, names in (
            ("attention", "input_layernorm", "qkv"),
            ("o", HF["v"], "o"),
            ("mlp", "post_attention_layernorm", ("gate", "up")),
            ("down", HF["up"], ("down",)),
        )
    ]
    cache = {
        "scale": [scale[i] for i in order],
        "clip": [(prefix + HF[n], bound) for n, bound in other.clips().items()],
    }
    torch.save(cache, tmp_path / "cache.pt")
    (result,) = awq_cache_file.load_awq_cache(tmp_path / "cache.pt", cfg, GROUP, dtype)
    assert not differing(llm_awq.apply_search_result(layer, result, cfg, GROUP), cache, layer)


@torch.no_grad()
def test_llm_awq_limits_for_one_sign_groups_and_few_tokens() -> None:
    w = torch.linspace(1.0, 1.1, 64).view(2, 32)
    assert dequantize(llm_awq.quantize_int4(w, 32), torch.float32).max() < 0.12  # known: awq-gptq is the default
    with pytest.raises(ValueError, match="needs 512 tokens of calibration, there are 511"):
        llm_awq.search_clip(w, torch.ones(511, 32), 32)


def test_files_that_are_no_awq_cache_are_refused(tmp_path: Path) -> None:
    file, up, cfg = tmp_path / "cache.pt", "model.layers.0.mlp.up_proj", LlamaConfig(50, 64, 96, 1, 4, 2, 16)
    scale = ("model.layers.0.input_layernorm", tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv"))
    for cache, message in (
        ([1], "expected a dictionary of scale and clip"),
        (
            {"scale": [("model.layers.7.mlp.up_proj", ("model.layers.7.mlp.down_proj",), torch.ones(4))], "clip": []},
            "does not fit a LLaMA of 1 layers",
        ),
        ({"scale": [(*scale, torch.ones(4, 4))], "clip": []}, r"\[4, 4\], expected finite numbers \[64\]"),
        ({"scale": [(*scale, torch.arange(64.0))], "clip": []}, "a scale is not above 0"),
        ({"scale": [(*scale, torch.ones(64) / 0)], "clip": []}, "expected finite numbers"),
        ({"scale": [(*scale, torch.full((64,), 1e-9))], "clip": []}, "a scale is not above 0 in torch.float16"),
        ({"scale": [(*scale, torch.full((64,), 1e9))], "clip": []}, "holds numbers beyond torch.float16"),
        ({"scale": [(scale[0].replace("0", "-1"), scale[1], torch.ones(64))], "clip": []}, "does not fit"),
        ({"scale": [], "clip": [("model.layers.0.self_attn.q_proj", torch.ones(4, 1, 1))]}, "does not fit"),
        ({"scale": [], "clip": [(up, torch.ones(96, 1, 1))]}, r"\[96, 1, 1\], expected finite numbers \[96, 2, 1\]"),
        ({"scale": [], "clip": [(up, -torch.ones(96, 2, 1))]}, "a bound is below 0"),
        ({"scale": [], "clip": []}, "it holds no scale and no clip"),
    ):
        torch.save(cache, file)
        with pytest.raises(LoadError, match=message):
            awq_cache_file.load_awq_cache(file, cfg, 32, torch.float16)
    torch.save({"scale": [], "clip": [], "more": Path}, file)
    with pytest.raises(LoadError, match="is not a cache"):
        awq_cache_file.load_awq_cache(file, cfg, 32, torch.float16)
