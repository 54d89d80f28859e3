"""The vision tower and the projector in int4: every kind of tower, written and read again, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_towers import CLIP, INTERN, SIGLIP
from torch import Tensor

from bench.measure.peak_memory import PeakMemory
from vila_triton.checkpoints.loading import build_vila_config, load_params, open_checkpoint, save_checkpoint
from vila_triton.checkpoints.sources import CheckpointSource
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.engine import engine
from vila_triton.files.atomic import write_json
from vila_triton.files.reading import read_json
from vila_triton.models import vila, vision
from vila_triton.models.params import LazyTensors, init_tree
from vila_triton.ops import Int4
from vila_triton.quantization import pipeline as awq
from vila_triton.quantization import vision as seeing
from vila_triton.quantization.calibration_data import CalibrationSet
from vila_triton.quantization.config import QuantizeConfig
from vila_triton.tiny.config import CONFIG, config_files

BOTH = ("vision_tower", "mm_projector")
HOW = QuantizeConfig(group_size=32, extra_parts=BOTH)
S2 = {"s2": True, "s2_scales": "20,40", "s2_max_split_size": 20}
TOWERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "siglip": (SIGLIP, {"mm_vision_select_feature": "cls_patch"}),
    "clip s2": (CLIP, {"mm_vision_select_feature": "patch", **S2}),
    "intern": (INTERN, {"mm_vision_select_feature": "patch", "mm_vision_select_layer": -1}),
}


def saved(folder: Path, tower: dict[str, Any], more: dict[str, Any], **sizes: int) -> CheckpointSource:
    """Save one layer of the bundled language model, random, behind another vision tower, whose MLPs are no whole groups
    of 32.
    """
    top, parts = config_files(replace(CONFIG, llm=replace(CONFIG.llm, num_hidden_layers=1)))
    tower = tower | {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 4} | sizes
    width = tower["hidden_size"] * len(more.get("s2_scales", "20").split(","))
    top |= {"mm_hidden_size": width, **more}
    parts |= {"vision_tower": tower, "mm_projector": parts["mm_projector"] | {"mm_projector_type": "mlp2x_gelu"}}
    p = init_tree(vila.param_specs(build_vila_config(top, parts), torch.float16), torch.Generator().manual_seed(0))
    save_checkpoint(folder, top, parts, p)
    return open_checkpoint(folder)


def calibration_set(source: CheckpointSource, num_images: int = 40) -> CalibrationSet:
    cfg = build_vila_config(source.config, source.part_configs)
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 128, (200,), generator=rng) for _ in range(3)]
    rows[0][: cfg.tokens_per_image] = -1 - torch.arange(cfg.tokens_per_image)
    side = cfg.vision_tower.input_size
    smooth = torch.randn(num_images, 3, 4, 4, generator=rng)  # as in images, neighbours are alike
    return CalibrationSet(rows, torch.nn.functional.interpolate(smooth, (side, side), mode="bilinear"))


def features(folder: Path, pixels: Tensor) -> Tensor:
    """Image features in float32, [n, tokens, e]."""
    source = open_checkpoint(folder)
    cfg = build_vila_config(source.config, source.part_configs)
    return engine.encode_images(load_params(folder, cfg, torch.float32), pixels, cfg)


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_quantized_tower_and_projector_beat_rtn(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", *TOWERS[name])
    calibration, fresh = calibration_set(source), calibration_set(source, 60).pixel_values
    assert calibration.pixel_values is not None and fresh is not None
    results = {
        "ours": awq.quantize_checkpoint(source, tmp_path / "work", HOW, calibration, torch.device("cpu")),
        "blind": awq.quantize_checkpoint(
            source, tmp_path / "work2", replace(HOW, propagate_error=False), calibration, torch.device("cpu")
        ),
        "nearest": awq.round_to_nearest(source, HOW),
    }
    for config, result in results.items():
        write_checkpoint(result, tmp_path / config, source_key=config)
    again = open_checkpoint(tmp_path / "ours")
    assert [again.group_size(part) for part in ("llm", *BOTH)] == [32, 32, 32]
    assert again.part_configs["vision_tower"]["intermediate_size"] == 96
    assert "vision_tower int4 (groups of 32), mm_projector int4 (groups of 32)" in again.summary()
    p = load_params(tmp_path / "ours", build_vila_config(again.config, again.part_configs), torch.float32)
    layer = p.vision_tower.layers[0]
    assert isinstance(layer.fc2.weight, Int4) and layer.fc2.weight.shape == (64, 96)
    assert isinstance(p.mm_projector.stages[1].linear.weight, Int4)
    expected = features(tmp_path / "source", fresh[40:])
    lost = {config: float((features(tmp_path / config, fresh[40:]) - expected).square().mean()) for config in results}
    assert 0 < lost["ours"] < 0.7 * lost["nearest"] and lost["ours"] < lost["blind"] < lost["nearest"]

    quantized = features(tmp_path / "ours", fresh[40:])
    write_checkpoint(again, tmp_path / "v2", "awq-v2")  # the language model's layout is no matter of the tower's
    assert torch.equal(features(tmp_path / "v2", fresh[40:]), quantized)
    write_checkpoint(again, tmp_path / "dense", "dense")  # in float16
    assert open_checkpoint(tmp_path / "dense").group_size("vision_tower") == 0
    assert (features(tmp_path / "dense", fresh[40:]) - quantized).square().mean() < 0.01 * lost["ours"]


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS)
def test_padded_tower_gives_the_same_features(name: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "source", *TOWERS[name])
    cfg = build_vila_config(source.config, source.part_configs)
    wide = seeing.pad_mlp_to_groups(source, cfg.vision_tower, 32)
    assert wide.tensors["vision_tower"].meta.keys() == source.tensors["vision_tower"].meta.keys()
    write_checkpoint(wide, tmp_path / "wide", source_key="wide")
    pixels = calibration_set(source, 2).pixel_values
    assert pixels is not None
    torch.testing.assert_close(
        features(tmp_path / "wide", pixels), features(tmp_path / "source", pixels), rtol=1e-5, atol=1e-5
    )
    assert seeing.pad_mlp_to_groups(source, cfg.vision_tower, 16) is source


def test_images_are_subsampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seeing.positions_per_image(CONFIG.vision_tower) == 64
    monkeypatch.setattr(seeing, "MAX_POSITIONS", 64 * 10)
    assert seeing.subsample_images(torch.arange(25), 64).tolist() == list(range(0, 25, 3))
    assert len(seeing.subsample_images(torch.arange(10), 64)) == 10
    monkeypatch.setattr(seeing, "MAX_POSITIONS", 1)
    assert seeing.subsample_images(torch.arange(3), 64).tolist() == [0]
    pixels, config = torch.zeros(300, 1), QuantizeConfig(extra_parts=BOTH)
    monkeypatch.setattr(seeing, "MAX_POSITIONS", 64 * 100)
    assert awq.calibration_image_counts(CONFIG, config, pixels) == {
        "vision_tower": 100,
        "mm_projector": 300,
    }  # 64 and 16 an image


def test_only_requested_parts_are_quantized(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", *TOWERS["siglip"])
    results = awq.quantize_checkpoint(
        source, tmp_path / "work", replace(HOW, extra_parts=BOTH[1:]), calibration_set(source), torch.device("cpu")
    )
    assert [results.group_size(part) for part in ("llm", *BOTH)] == [32, 0, 32]
    assert results.part_configs["vision_tower"] == source.part_configs["vision_tower"]
    write_checkpoint(results, tmp_path / "made", source_key="")
    with pytest.raises(ValueError, match="made is int4 already; quantize"):
        awq.prepare_source(open_checkpoint(tmp_path / "made"), HOW)


@pytest.mark.parametrize(
    "config, sizes, message",
    [
        (
            QuantizeConfig(method="llm-awq", extra_parts=BOTH),
            {},
            "llm-awq's objective has no place for vision_tower, mm_projector",
        ),
        (
            QuantizeConfig(group_size=32, extra_parts=("eyes",)),
            {},
            "no part 'eyes'; there are: llm, vision_tower, mm_projector",
        ),
        (
            QuantizeConfig(group_size=64, extra_parts=BOTH),
            {"hidden_size": 96},
            "vision_tower: encoder.*q_proj: int4 weight: k = 96 and group_size = 64",
        ),
    ],
)
def test_unsupported_vision_quantization_is_refused(
    config: QuantizeConfig, sizes: dict[str, int], message: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", *TOWERS["siglip"], **sizes)
    with pytest.raises(ValueError, match=message):
        awq.quantize_checkpoint(source, tmp_path / "work", config, calibration_set(source), torch.device("cpu"))
    assert not (tmp_path / "work").exists()


@torch.no_grad()
def test_memory_does_not_grow_with_the_depth_of_the_tower(tmp_path: Path) -> None:
    peaks = []
    for layers in (3, 20):
        source = saved(tmp_path / f"{layers}", *TOWERS["siglip"], num_hidden_layers=layers)
        pixels = calibration_set(source, 1).pixel_values
        assert pixels is not None
        with PeakMemory([pixels]) as peak:
            p, cfg = seeing.open_streamed_tower(source, torch.device("cpu"), torch.float32)
            vision.forward(p, pixels, cfg.vision_tower)
        peaks.append(peak.peak_bytes)
    layer_bytes = 4 * (4 * 64 * 64 + 2 * 64 * 80)  # bytes of the linears of a layer in float32
    assert peaks[1] - peaks[0] < layer_bytes / 2


def test_projector_without_linears_is_refused(tmp_path: Path) -> None:
    top, parts = config_files(CONFIG)
    parts["vision_tower"] |= {"hidden_size": 256}
    parts["mm_projector"] |= {"mm_projector_type": "identity"}
    cfg = build_vila_config(top := top | {"mm_hidden_size": 256}, parts)
    save_checkpoint(
        tmp_path / "source",
        top,
        parts,
        init_tree(vila.param_specs(cfg, torch.float16), torch.Generator().manual_seed(0)),
    )
    with pytest.raises(ValueError, match="mm_projector has no linear that could be quantized"):
        awq.prepare_source(open_checkpoint(tmp_path / "source"), HOW)


def test_vision_parts_without_calibration_images_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", *TOWERS["siglip"])
    sequences = [row.clamp(min=0) for row in calibration_set(source).sequences]
    with pytest.raises(ValueError, match=r"vision_tower, mm_projector: .* but calibration has no images"):
        awq.quantize_checkpoint(source, tmp_path / "work", HOW, CalibrationSet(sequences, None), torch.device("cpu"))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    "quant_config, message",
    [
        ({"quant_method": "bitsandbytes", "bits": 4}, "vision_tower: quantization 'bitsandbytes' is not supported"),
        ({"quant_method": "vila-triton", "group_size": 32, "order": "fma"}, "order is 'fma', expected 'sub'"),
        (
            {"quant_method": "vila-triton", "group_size": 64},
            "in groups of 64 are not one weight",
        ),
        ({"quant_method": "awq", "group_size": 32}, "in the layout vila-triton, but the config says"),
    ],
)
def test_quantization_config_that_the_tower_contradicts_is_refused(
    quant_config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = saved(tmp_path / "source", *TOWERS["siglip"])
    write_checkpoint(awq.round_to_nearest(source, HOW), tmp_path / "made", source_key="")
    file = tmp_path / "made" / "vision_tower" / "config.json"
    write_json(file, read_json(file) | {"quantization_config": quant_config})
    with pytest.raises(ValueError, match=message):
        quantized = open_checkpoint(tmp_path / "made")
        build_vila_config(quantized.config, quantized.part_configs)


def test_broken_linear_is_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", *TOWERS["siglip"])
    name, tensors = "vision_model.encoder.layers.1.mlp.fc2.weight", source.tensors["vision_tower"]
    broken = tensors[name].clone()
    broken[3, 5] = torch.nan
    lazy = LazyTensors(tensors.meta, lambda key: broken if key == name else tensors[key])
    source = replace(source, tensors=source.tensors | {"vision_tower": lazy})
    with pytest.raises(ValueError, match=r"vision_tower, encoder.layers.1: mlp.fc2: the weight holds NaN or infinity"):
        awq.quantize_checkpoint(source, tmp_path / "work", HOW, calibration_set(source), torch.device("cpu"))
