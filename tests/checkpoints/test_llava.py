"""LLaVA-1.5 in its original layout and in transformers', compared with transformers' own class."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import exact_norms
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vila_triton import VilaLlamaForCausalLM
from vila_triton.checkpoints import random_checkpoint
from vila_triton.checkpoints.llava import CLIP_CONFIG, CLIP_NAME
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.models.params import LoadError, leaves

IMAGE = 305
LLM = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 7}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """transformers' model in float64, and the folder that it wrote."""
    torch.manual_seed(0)
    config = LlavaConfig(
        text_config=LlamaConfig(**LLM),  # pyright: ignore
        vision_config=CLIPVisionConfig(**TOWER),  # pyright: ignore
        image_token_index=IMAGE,
    )
    model = LlavaForConditionalGeneration(config).double().eval()
    folder = tmp_path_factory.mktemp("llava") / "hf"
    model.save_pretrained(folder)
    with_tokenizer(folder)
    yield model, folder


def with_tokenizer(folder: Path) -> None:
    model_spec = {"template": "vicuna_v1", "vision_tower": {"model_type": "clip_vision_model", "image_size": 28}}
    shutil.rmtree(folder / "beside", ignore_errors=True)
    (folder / "beside").mkdir()
    for file in random_checkpoint.write_tokenizer_and_processor(model_spec, folder / "beside")["llm"].iterdir():
        shutil.move(file, folder / file.name)
    shutil.rmtree(folder / "beside")


def older_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors as transformers 4 wrote them."""
    names = {re.sub(r"^(?!language_model)(model\.)?", "", name): name for name in tensors}
    names = {re.sub(r"^lm_head", "language_model.lm_head", new): old for new, old in names.items()}
    names = {re.sub(r"^language_model\.(?!model|lm_head)", "language_model.model.", new): o for new, o in names.items()}
    assert {name.split(".")[0] for name in names} == {"language_model", "multi_modal_projector", "vision_tower"}
    names = {re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", n): o for n, o in names.items()}
    return {new: tensors[old] for new, old in names.items()}


def original(source: Path, folder: Path, tower_among: bool) -> None:
    """The same model as LLaVA's own code saves it: two .bin and an index, the tower among them or in a folder."""
    tensors = older_names(load_file(source / "model.safetensors"))
    names = {
        "language_model.": "",
        "multi_modal_projector.linear_1": "model.mm_projector.0",
        "multi_modal_projector.linear_2": "model.mm_projector.2",
        "vision_tower.": "model.vision_tower.vision_tower.",
    }
    for old, new in names.items():
        tensors = {new + key.removeprefix(old) if key.startswith(old) else key: x for key, x in tensors.items()}
    folder.mkdir()
    tower = {name: x for name, x in tensors.items() if "vision_tower" in name}
    clip_folder = folder / "clip"
    clip_folder.mkdir()
    (clip_folder / "config.json").write_text(
        json.dumps({"model_type": "clip", "vision_config": {**CLIP_CONFIG, **TOWER}})
    )
    if not tower_among:
        tensors = {name: x for name, x in tensors.items() if name not in tower}
        tower_tensors = {name.removeprefix("model.vision_tower.vision_tower."): x for name, x in tower.items()}
        torch.save(
            {**tower_tensors, "text_model.final_layer_norm.bias": torch.ones(3)}, clip_folder / "pytorch_model.bin"
        )
    half = len(tensors) // 2
    files = {
        f"pytorch_model-0000{i}-of-00002.bin": dict(part)
        for i, part in enumerate((list(tensors.items())[:half], list(tensors.items())[half:]), 1)
    }
    for name, part in files.items():
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in files.items() for key in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        **LLM,
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "image_aspect_ratio": "pad",
        "rms_norm_eps": 1e-6,
        "torch_dtype": "float64",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    with_tokenizer(folder)


def hf_older(source: Path, folder: Path) -> None:
    shutil.copytree(source, folder)
    save_file(older_names(load_file(source / "model.safetensors")), folder / "model.safetensors")


LAYOUTS: dict[str, Callable[[Path, Path], object]] = {
    "hf": shutil.copytree,
    "hf, older": hf_older,
    "original": lambda source, folder: original(source, folder, tower_among=True),
    "original, tower apart": lambda source, folder: original(source, folder, tower_among=False),
}


@pytest.fixture(scope="module", params=LAYOUTS)
def folder(request: pytest.FixtureRequest, theirs: tuple[Any, Path]) -> Path:
    layout_folder = theirs[1].parent / request.param
    if not layout_folder.exists():
        LAYOUTS[request.param](theirs[1], layout_folder)
    return layout_folder


def pixels() -> Tensor:
    return torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def test_logits_equal_transformers(folder: Path, theirs: tuple[Any, Path]) -> None:
    model = VilaLlamaForCausalLM.from_pretrained(folder, device="cpu")
    assert model.dtype == torch.float64 and model.vila_config.tokens_per_image == 16
    ours = model(torch.tensor([[7, -200, 8, 9]]), images=pixels()).logits
    with exact_norms():
        ids = torch.tensor([[7, *[IMAGE] * 16, 8, 9]])
        expected = theirs[0](input_ids=ids, pixel_values=pixels()).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert expected.std() > 0.05


def test_llava_answers_and_converts_to_a_vila_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from test_convert import ask

    source = open_checkpoint(folder)
    check_checkpoint(source)
    write_checkpoint(source, tmp_path / "vila")
    again = VilaLlamaForCausalLM.from_pretrained(tmp_path / "vila", device="cpu")
    before = VilaLlamaForCausalLM.from_pretrained(folder, device="cpu")
    assert all(map(torch.equal, leaves(again.params), leaves(before.params)))
    answers = {ask(clip_folder, monkeypatch, capsys) for clip_folder in (folder, tmp_path / "vila")}
    mode = source.config.get("image_aspect_ratio")
    assert len(answers) == 1 and mode == ("pad" if "original" in folder.name else None)


def test_missing_parts_of_a_llava_are_named(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    original(theirs[1], tmp_path / "x", tower_among=False)
    shutil.rmtree(tmp_path / "x/clip")
    with pytest.raises(
        LoadError, match=r"mm_vision_tower is 'openai/clip', .* put its config.json and weights into .*/x"
    ):
        open_checkpoint(tmp_path / "x")
    original(theirs[1], tmp_path / "y", tower_among=True)
    config = json.loads((tmp_path / "y/config.json").read_text())
    shutil.rmtree(tmp_path / "y/clip")
    (tmp_path / "y/config.json").write_text(json.dumps({**config, "mm_vision_tower": CLIP_NAME}))
    assert open_checkpoint(tmp_path / "y").part_configs["vision_tower"]["image_size"] == 336  # known by its name
    with pytest.raises(LoadError, match=r"y: \d+ of its tensors do not fit"):
        check_checkpoint(open_checkpoint(tmp_path / "y"))
    hf = json.loads((theirs[1] / "config.json").read_text())
    shutil.copytree(theirs[1], tmp_path / "z")
    for change, message in (
        ({"vision_feature_select_strategy": "cls"}, "strategy is 'cls', expected 'default' or 'full'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu', expected 'gelu'"),
    ):
        (tmp_path / "z/config.json").write_text(json.dumps(hf | change))
        with pytest.raises(LoadError, match=message):
            open_checkpoint(tmp_path / "z")
