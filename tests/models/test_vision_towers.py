"""Picture towers against transformers' own modules, in every kind and way of looking that VILA has."""

from typing import Any

import pytest
import reference_towers
import torch
from reference_towers import CLIP, INTERN, INTERN_300M, SIGLIP, features, theirs
from torch import Tensor

from vila_triton.models import vision, vision_layers
from vila_triton.models.config import ConfigError, VisionConfig
from vila_triton.models.params import init_tree, leaves, tree_map

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
TOP = {"mm_vision_select_layer": -2, "mm_vision_select_feature": "patch"}
S2 = {"s2": True, "s2_scales": "40,20", "s2_max_split_size": 20}
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip": (SIGLIP, TOP | {"mm_vision_select_feature": "cls_patch"}),
    "siglip s2": (SIGLIP, TOP | S2 | {"mm_vision_select_feature": "cls_patch"}),
    "clip": (CLIP, TOP),
    "clip with its class token": (CLIP, TOP | {"mm_vision_select_feature": "cls_patch"}),
    "clip with gelu": (CLIP | {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, TOP),
    "clip s2 at three scales": (CLIP, TOP | S2 | {"s2_scales": "20,40,60"}),
    "intern": (INTERN, TOP | {"mm_vision_select_layer": -1}),
    "intern of 300M": (INTERN_300M, TOP | {"mm_vision_select_layer": -3}),
}


def random(cfg: VisionConfig, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """A tree no leaf of which is special, and its tensors by name."""
    rng = torch.Generator().manual_seed(0)
    specs = vision.param_specs(cfg, dtype)
    p = tree_map(lambda x: x + 0.2 * torch.randn(x.shape, generator=rng, dtype=x.dtype), init_tree(specs, rng))
    return p, {spec.key: x for spec, x in zip(leaves(specs), leaves(p))}


def pictures(cfg: VisionConfig, dtype: torch.dtype, n: int = 2) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, cfg.input_size, cfg.input_size, generator=rng, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("values, top", TOWERS.values(), ids=TOWERS)
@torch.no_grad()
def test_tower_features_equal_transformers(values: dict, top: dict, dtype: torch.dtype) -> None:
    cfg = VisionConfig.from_dict(values, top)
    p, tensors = random(cfg, dtype)
    images = pictures(cfg, dtype)
    ours, expected = vision.forward(p, images, cfg), features(theirs(values, tensors), images, top)
    assert ours.shape == (2, cfg.num_features, cfg.feature_dim)
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[dtype])


def test_select_feature_default_depends_on_class_token() -> None:
    asked = {name: VisionConfig.from_dict(values).select_feature for name, (values, _) in TOWERS.items()}
    assert asked["siglip"] == "cls_patch" and asked["clip"] == asked["intern"] == "patch"


REFUSED: dict[str, tuple[dict, dict, str]] = {
    "a tower nobody knows": ({"model_type": "radio"}, {}, "'radio' is not supported .siglip_vision_model, clip"),
    "patch of siglip": (SIGLIP, {"mm_vision_select_feature": "patch"}, "has none: it would lose the top left patch"),
    "another feature": (CLIP, {"mm_vision_select_feature": "cls"}, "'cls' is not supported .cls_patch, patch are"),
    "a setting that is no truth value": (INTERN | {"qkv_bias": 1}, {}, "qkv_bias is 1, expected true or false"),
    "another norm": (INTERN | {"norm_type": "batch_norm"}, {}, "norm_type 'batch_norm' is not supported"),
    "tiles of another size": (SIGLIP, S2 | {"s2_max_split_size": 16}, "2 tiles of 10 pixels, but the tower takes 20"),
    "scales that are no sizes": (SIGLIP, S2 | {"s2_scales": "20,x"}, "s2_scales is '20,x', expected sizes"),
    "a scale of nothing": (SIGLIP, S2 | {"s2_scales": "0,20"}, "expected up to 16 sizes"),
    "s2 of a class token": (CLIP, S2 | {"mm_vision_select_feature": "cls_patch"}, "s2 needs a square of patches"),
    "dynamic s2": (SIGLIP, {"dynamic_s2": True}, "dynamic_s2 True is not supported"),
    "a smaller picture than a patch": (SIGLIP, {"vision_resolution": 3}, "a patch of 4 is more than a side of 3"),
    "another interpolation": (SIGLIP, {"vision_resolution": 24, "interpolate_mode": "cubic"}, "'cubic' is not"),
    "a resolution of another kind": (SIGLIP, {"vision_resolution": "24"}, "resolution is '24', expected a whole"),
}


@pytest.mark.parametrize("values, top, message", REFUSED.values(), ids=REFUSED)
def test_tower_unsupported_config_is_refused(values: dict, top: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VisionConfig.from_dict(values, top)


@pytest.mark.parametrize("values", [SIGLIP, CLIP, INTERN], ids=["siglip", "clip", "intern"])
@pytest.mark.parametrize("resolution", [12, 36, 4])
def test_position_embeddings_at_another_resolution_are_interpolated(values: dict, resolution: int) -> None:
    """The closed form, one place at a time; of 81 or 9 places some are whole."""
    cfg = VisionConfig.from_dict(values, {"vision_resolution": resolution})
    first = cfg.num_class_tokens
    trained = torch.randn(first + 25, 4, dtype=torch.float64)
    n, new = (resolution // 4) ** 2, vision_layers.position_embeddings(trained, cfg)
    assert torch.equal(new[:first], trained[:first]) and new.shape == (first + n, 4)
    for i in range(n):
        place = i * 24 / max(n - 1, 1)
        low = int(place)
        expected = trained[first + low] * (1 - place % 1) + trained[first + min(low + 1, 24)] * (place % 1)
        torch.testing.assert_close(new[first + i], expected, rtol=0, atol=1e-12)
    p, _ = random(cfg, torch.float64)
    images = pictures(cfg, torch.float64)
    assert images.shape[-1] == resolution and vision.forward(p, images, cfg).shape[1] == cfg.num_features == n
    with pytest.raises(ValueError, match=rf"shape \[1, 3, 20, 20\], expected .*, 3, {resolution}, {resolution}\]"):
        vision.forward(p, torch.zeros(1, 3, 20, 20), cfg)


def test_position_embeddings_in_half_precision_are_rounded_from_double() -> None:
    """Of more places than float16 can count."""
    cfg = VisionConfig.from_dict(SIGLIP, {"vision_resolution": 4 * 257})
    trained = torch.rand(25, 4, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        exact = vision_layers.position_embeddings(trained.to(dtype).double(), cfg)
        error = (vision_layers.position_embeddings(trained.to(dtype), cfg) - exact).abs().max()
        assert error <= 2 * torch.finfo(dtype).eps  # of the share and of the result, half a unit each, and of lerp


def test_position_embeddings_at_trained_resolution_are_unchanged() -> None:
    for resolution in (-1, 20, None):
        assert VisionConfig.from_dict(SIGLIP, {"vision_resolution": resolution}) == VisionConfig.from_dict(SIGLIP)


def test_gradients_of_s2_tower_equal_reference() -> None:
    values, top = TOWERS["clip s2 at three scales"]
    cfg = VisionConfig.from_dict(values, top)
    p, tensors = random(cfg, torch.float64)
    images = pictures(cfg, torch.float64, 1)
    for x in tensors.values():
        x.requires_grad_()
    tower = theirs(values, {name: x.detach() for name, x in tensors.items()})
    vision.forward(p, images, cfg).square().sum().backward()
    reference_towers.features(tower, images, top).square().sum().backward()
    reached = {name: x.grad for name, x in tower.named_parameters() if x.grad is not None}
    assert "embeddings.class_embedding" in reached and "encoder.layers.1.mlp.fc2.weight" in reached
    for name, expected in reached.items():
        torch.testing.assert_close(tensors[name].grad, expected, rtol=1e-7, atol=1e-9, msg=name)
