"""Projectors against their released layers, the downsampling against its closed form, and how many tokens they make."""

from typing import Any

import pytest
import torch
from hf_reference import Oracle, build, config, pictures
from reference_projectors import Projector, downsample
from reference_towers import CLIP, INTERN, SIGLIP

from vila_triton.checkpoints.loading import build_vila_config
from vila_triton.models import projector
from vila_triton.models.config import ConfigError, ProjectorConfig
from vila_triton.models.params import init_tree, leaves, tree_map

TOKENS = {  # of 5 x 5 patches
    "identity": 25,
    "linear": 25,
    "mlp1x_gelu": 25,
    "mlp2x_gelu": 25,
    "mlp4x_gelu": 25,
    "mlp_downsample": 9,
    "mlp_downsample_2x2_fix": 9,
    "mlp_downsample_3x3_fix": 4,
    "mlp_downsample_3x3_s2": 4,
    "mlp_downsample_3x3_s2_new": 4,
}


def random(cfg: ProjectorConfig, dtype: torch.dtype) -> tuple[Any, dict[str, torch.Tensor]]:
    rng, specs = torch.Generator().manual_seed(0), projector.param_specs(cfg, dtype)
    p = tree_map(lambda x: x + 0.2 * torch.randn(x.shape, generator=rng, dtype=x.dtype), init_tree(specs, rng))
    return p, {spec.key: x for spec, x in zip(leaves(specs), leaves(p))}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("order", ["column", "row"])
@pytest.mark.parametrize("kind", TOKENS)
def test_a_projector_is_its_released_layers(kind: str, order: str, dtype: torch.dtype, tolerance: float) -> None:
    values = {"mm_projector_type": kind} | ({"token_order": order} if kind == "mlp_downsample" else {})
    m, e = 12, 12 if kind == "identity" else 16
    cfg = ProjectorConfig.from_dict({**values, "mm_hidden_size": m, "hidden_size": e})
    p, tensors = random(cfg, dtype)
    x = torch.randn(2, 25, m, generator=torch.Generator().manual_seed(1), dtype=dtype)
    ours = projector.forward(p, x, cfg)
    assert ours.shape == (2, TOKENS[kind], e)
    expected = Projector(values, m, e, tensors)(x)  # loads every tensor, and no other
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("order", ["column", "row"])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8, 27])
def test_downsample_is_its_closed_form(side: int, order: str, n: int) -> None:
    x = torch.randn(2, side * side, 3)
    assert torch.equal(projector.downsample(x, order, n), downsample(x, order, n))


def test_729_patches_make_196_tokens_and_the_orders_are_transposes() -> None:
    x = torch.randn(1, 729, 1, generator=torch.Generator().manual_seed(0))
    column, row = (projector.downsample(x, order) for order in ("column", "row"))
    assert column.shape == (1, 196, 4)
    assert torch.equal(column.view(14, 14, 4).transpose(0, 1), row.view(14, 14, 4))


S2 = {"s2": True, "s2_scales": "20,40", "s2_max_split_size": 20, "mm_hidden_size": 48}
WHOLE: dict[str, tuple[dict, str, dict]] = {  # tower, projector, top: the released pairings, LLaVA's, and S2's
    "llava 1.5": (CLIP, "mlp2x_gelu", {"mm_vision_select_feature": "patch"}),
    "a class token kept": (CLIP, "linear", {"mm_vision_select_feature": "cls_patch"}),
    "40b": (INTERN, "mlp_downsample", {"mm_vision_select_layer": -1}),
    "3b-s2": (SIGLIP, "mlp_downsample", S2),
    "siglip s2 by threes": (SIGLIP, "mlp_downsample_3x3_s2", S2),
    "clip s2": (CLIP, "mlp_downsample_2x2_fix", S2),
}


@pytest.mark.parametrize("vision, kind, top", WHOLE.values(), ids=WHOLE)
def test_logits_of_every_tower_and_projector_agree_with_their_makers(vision: dict, kind: str, top: dict) -> None:
    model = build(config(vision=vision, mm_projector_cfg={"mm_projector_type": kind}, **top))
    ids, images = torch.tensor([[1, 7, -200, 9, -200, 30]]), pictures(model, 2)
    with torch.no_grad():
        theirs, _ = Oracle.of(model).run(list(ids), images)
        ours = model(ids, images=images).logits
    assert ours.shape[1] == 4 + 2 * model.vila_config.tokens_per_image
    torch.testing.assert_close(ours, theirs.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", TOKENS)
def test_image_tokens_of_a_config_are_those_the_projector_makes(kind: str) -> None:
    cfg = config(hidden_size=None, llm={"hidden_size": 24}, mm_projector_cfg={"mm_projector_type": kind})
    whole = build_vila_config(cfg.to_dict(), cfg.part_configs())
    assert whole.tokens_per_image == TOKENS[kind]
    assert whole.describe().endswith(f"{TOKENS[kind]} tokens an image") and kind in whole.describe()


def test_the_order_of_the_tokens_and_who_chose_it_are_in_the_report() -> None:
    for given, said in (("row", "row order (as the config says)"), (None, "column order (as released; token_order")):
        cfg = config(order=given)  # pyright: ignore[reportArgumentType]
        assert said in build_vila_config(cfg.to_dict(), cfg.part_configs()).describe()


REFUSED: dict[str, tuple[dict, dict, str]] = {
    "unknown": ({"mm_projector_type": "mlp0x_gelu"}, {}, r"'mlp0x_gelu' is not supported \(identity, linear, mlp{N}x"),
    "no name": ({"mm_projector_type": 3}, {}, "is 3, expected a text"),
    "columns of a type that has rows": (
        {"mm_projector_type": "mlp_downsample_2x2_fix", "token_order": "column"},
        {},
        "takes its tokens along the rows, not by column",
    ),
    "identity of another width": ({"mm_projector_type": "identity"}, {}, "identity from 24 to 32 numbers"),
    "a class token in a square": (
        {"mm_projector_type": "mlp_downsample"},
        {"vision": CLIP, "mm_vision_select_feature": "cls_patch"},
        "mlp_downsample needs a square of patches, but 'cls_patch' of clip_vision_model keeps the class token",
    ),
    "one scale's width": ({"mm_projector_type": "linear"}, S2 | {"mm_hidden_size": 24}, "is 24, but .* is 48 wide"),
}


@pytest.mark.parametrize("values, changes, message", REFUSED.values(), ids=REFUSED)
def test_what_no_projector_can_do_is_refused(values: dict, changes: dict, message: str) -> None:
    cfg = config(mm_projector_cfg=values, **changes)
    with pytest.raises(ConfigError, match=message):
        build_vila_config(cfg.to_dict(), cfg.part_configs())
