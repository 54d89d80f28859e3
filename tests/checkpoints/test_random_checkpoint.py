"""The five released models, narrow and of two layers, in the layout of their release: they load, answer, give the
logits of Hugging Face's modules reading the same files, and go through every int4 layout and back to the same bits.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference_towers
import torch
from hf_reference import Oracle, exact_norms
from reference_projectors import Projector
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM

from vila_triton import VilaLlamaForCausalLM
from vila_triton.checkpoints import random_checkpoint, size_report
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.checkpoints.writing import FORMATS, write_checkpoint
from vila_triton.commands import convert
from vila_triton.models.params import leaves

NARROW = {"vila1.5-3b": 8, "vila1.5-3b-s2": 8, "llama3-vila1.5-8b": 8, "vila1.5-13b": 8, "vila1.5-40b": 16}


def narrow(name: str) -> dict[str, Any]:
    return random_checkpoint.scale_down(
        random_checkpoint.read_model_toml(name), max_layers=2, width_divisor=NARROW[name]
    )


@pytest.fixture(scope="module", params=NARROW)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32, in shards."""
    target = tmp_path_factory.mktemp(request.param)
    model_spec = narrow(request.param)
    source = random_checkpoint.random_checkpoint(model_spec, "float32", seed=1)
    source = replace(
        source, companion_dirs=random_checkpoint.write_tokenizer_and_processor(model_spec, target / "beside")
    )
    write_checkpoint(source, target / "dense", source_key="", max_shard_bytes=5 * 10**6)
    assert (target / "dense/llm/model.safetensors.index.json").exists()
    return target


def theirs(folder: Path, model: VilaLlamaForCausalLM) -> Oracle:
    """Hugging Face's modules from the files: its own loader where it has one for them."""
    configs = {
        part: json.loads((folder / part / "config.json").read_text()) for part in ("vision_tower", "mm_projector")
    }
    top = json.loads((folder / "config.json").read_text())
    state_dict = {
        part: {name: x for file in (folder / part).glob("*.safetensors") for name, x in load_file(file).items()}
        for part in configs
    }
    tower = {name.removeprefix("vision_model."): x.to(model.dtype) for name, x in state_dict["vision_tower"].items()}
    projector = {name: x.to(model.dtype) for name, x in state_dict["mm_projector"].items()}
    return Oracle(
        LlamaForCausalLM.from_pretrained(folder / "llm", dtype=model.dtype).eval(),
        reference_towers.theirs(configs["vision_tower"], tower),
        Projector(configs["mm_projector"], top["mm_hidden_size"], top["hidden_size"], projector),
        top,
    )


@torch.no_grad()
def test_random_checkpoint_logits_equal_hugging_face(folder: Path) -> None:
    ids = torch.tensor([5, 300, -200, 7, 41, 900])
    for dtype, bound in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        model = VilaLlamaForCausalLM.from_pretrained(folder / "dense", device="cpu", dtype=dtype)
        side = model.vila_config.vision_tower.input_size
        images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)
        ours = model(ids[None], images=images).logits[0]
        with exact_norms():
            expected = theirs(folder / "dense", model).run([ids], images)[0].logits[0]
        assert (
            ours.shape == (5 + model.vila_config.tokens_per_image, model.vila_config.llm.vocab_size) == expected.shape
        )
        assert (ours - expected).abs().max() <= bound and expected.std() > 0.1


def test_random_checkpoint_answers_as_hugging_face(folder: Path) -> None:
    """Greedily, in float64; the file in configs/models/ states the number of tokens of an image."""
    model = VilaLlamaForCausalLM.from_pretrained(folder / "dense", device="cpu", dtype=torch.float64)
    assert (
        model.vila_config.tokens_per_image
        == random_checkpoint.read_model_toml(folder.name.removesuffix("0"))["image_tokens"]
    )
    ids = torch.tensor([[9, 8, 7, 250]])
    answer = model.generate(ids, max_new_tokens=6)
    with exact_norms():
        expected = theirs(folder / "dense", model).llm.generate(ids, max_new_tokens=6, do_sample=False)[:, 4:]
    assert answer.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NARROW)
def test_model_toml_states_the_bytes_of_the_checkpoint(name: str) -> None:
    model_spec = random_checkpoint.read_model_toml(name)
    for field, group in (("fp16_bytes", None), ("int4_bytes", 128)):
        assert model_spec[field] == sum(
            map(
                size_report.total_bytes,
                random_checkpoint.random_checkpoint(model_spec, group_size=group).tensors.values(),
            )
        )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_converting_through_every_layout_is_lossless(folder: Path) -> None:
    ours = folder / "ours"
    write_checkpoint(
        random_checkpoint.random_checkpoint(narrow(folder.name.removesuffix("0")), "float16", group_size=64),
        ours,
        source_key="",
    )
    before, params = contents(ours), load(ours)
    for form in ("awq-gemm", "awq-v1", "awq-v2"):
        converted, back = folder / form, folder / f"{form} and back"
        source = open_checkpoint(ours)
        check_checkpoint(source)
        write_checkpoint(source, converted, form)
        assert open_checkpoint(converted).layout.name == form  # pyright: ignore
        assert all(map(torch.equal, load(converted), params))
        write_checkpoint(open_checkpoint(converted), back)
        assert contents(back) == before
    (pt,) = (folder / "awq-v2/llm").glob("*.pt")
    assert pt.name == "awq-v2-w4-g64-awq-v2.pt" and not list((folder / "awq-v2/llm").glob("*.safetensors"))
    assert FORMATS == convert.FORMATS  # said there once more, so that --help need not import torch


def load(folder: Path) -> list[Tensor]:
    return leaves(VilaLlamaForCausalLM.from_pretrained(folder, device="cpu").params)
