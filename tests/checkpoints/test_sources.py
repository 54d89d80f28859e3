"""Configs of checkpoints: equivalent spellings, defaults, and contradictions that are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import build, dense_twin, pictures
from safetensors.torch import save_file

from vila_triton import VilaLlamaForCausalLM as Model
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.checkpoints.sources import PARTS
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.models.config import ConfigError
from vila_triton.models.params import LoadError

LLM = {"hidden_size": 64, "intermediate_size": 128}  # of which every layout holds groups of 32
INT4 = {"quantization_config": {"quant_method": "vila-triton", "group_size": 32, "order": "fma"}}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in fp16 and in int4 in every layout; the int4 weights round as only the native layout and v2 can say."""
    target = tmp_path_factory.mktemp("made")
    build(dtype=torch.float16, llm=LLM).save_pretrained(target / "dense")
    build(dtype=torch.float16, llm=LLM | INT4).save_pretrained(target / "ours")
    for form in ("awq-gemm", "awq-v1", "awq-v2"):
        write_checkpoint(open_checkpoint(target / "ours"), target / form, form)
    return target


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def take(checkpoints: Path, name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints / name, tmp_path / "x"))


@torch.no_grad()
def test_dequant_rounding_is_kept_through_every_layout(checkpoints: Path) -> None:
    """Each config says what its readers expect: AutoAWQ's a quantization_config, llm-awq v2 none."""
    models = {
        form: Model.from_pretrained(checkpoints / form, device="cpu")
        for form in ("ours", "awq-gemm", "awq-v1", "awq-v2")
    }
    ids, images = torch.tensor([[1, -200, 7, 8]]), pictures(models["ours"], 1)
    logits = {form: model(ids, images=images).logits for form, model in models.items()}
    assert all(torch.equal(x, logits["ours"]) for x in logits.values())
    assert {model.vila_config.llm.rounding for model in models.values()} == {"fma"}
    set_quantization = {form: json.loads((checkpoints / form / "llm/config.json").read_text()) for form in models}
    expected = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
    assert (
        set_quantization["awq-gemm"]["quantization_config"] == expected
        and set_quantization["awq-gemm"]["int4_order"] == "fma"
    )
    assert set_quantization["awq-v1"]["quantization_config"]["version"] == "gemv"
    assert "quantization_config" not in set_quantization["awq-v2"] and "int4_order" not in set_quantization["awq-v2"]


def test_dense_format_equals_dequantized_weights(checkpoints: Path, tmp_path: Path) -> None:
    write_checkpoint(open_checkpoint(checkpoints / "ours"), tmp_path / "x", "dense")
    twin = dense_twin(Model.from_pretrained(checkpoints / "ours", device="cpu")).state_dict()
    again = Model.from_pretrained(tmp_path / "x", device="cpu").state_dict()
    assert all(torch.equal(again[name], x) for name, x in twin.items())


def nested(folder: Path) -> None:
    """Nest the configs of the parts in the top one, as TensorRT-LLM's copy of VILA1.5-3b does."""
    contents = {f"{part}_cfg": json.loads((folder / part / "config.json").read_text()) for part in PARTS}
    edit(folder / "config.json", **contents, resume_path="./vlm", _name_or_path="./vlm")
    for part in PARTS:
        (folder / part / "config.json").unlink()


def elsewhere(folder: Path) -> None:
    """Move a part to another folder, which the top config names."""
    (folder / "llm").rename(folder / "language")
    edit(folder / "config.json", llm_cfg="language")


def without_top(folder: Path) -> None:
    """Leave out fields that have defaults, or set them to null."""
    edit(folder / "config.json", mm_vision_select_layer=None, mm_vision_select_feature=None, hidden_size=None, s2=None)


def rope(folder: Path) -> None:
    """Spell the rotary embedding as transformers 4 does."""
    edit(folder / "llm/config.json", rope_theta=10000.0, rope_scaling=None, rope_parameters=None)


def older(folder: Path) -> None:
    """Name the tower as LLaVA's configs do."""
    edit(folder / "config.json", mm_vision_tower="google/siglip-so400m-patch14-384", vision_tower_cfg=None)


@pytest.mark.parametrize("change", [nested, elsewhere, without_top, rope, older])
def test_equivalent_configs_load_the_same_model(
    change: Callable[[Path], None], checkpoints: Path, tmp_path: Path
) -> None:
    folder = take(checkpoints, "dense", tmp_path)
    before = Model.from_pretrained(folder, device="cpu")
    change(folder)
    after = Model.from_pretrained(folder, device="cpu")
    assert after.vila_config == before.vila_config
    assert all(torch.equal(x, after.state_dict()[name]) for name, x in before.state_dict().items())


def mixed(folder: Path) -> None:
    """Give one linear another group size."""
    contents = {name: x.clone() for name, x in open_tensors(folder / "llm").items()}
    stem = "model.layers.1.mlp.down_proj"
    contents |= {f"{stem}.{leaf}": contents[f"{stem}.{leaf}"][::2].contiguous() for leaf in ("scales", "qzeros")}
    save_file(contents, folder / "llm/model.safetensors")


def set_quantization(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "llm/config.json", quantization_config=values or None)


AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
REFUSED: dict[str, tuple[str, Callable[[Path], object], type[Exception], str]] = {
    "int4 said of a dense one": (
        "dense",
        set_quantization(**AWQ),
        LoadError,
        "says int4 .awq., but there is no .qweight",
    ),
    "ours unsaid": ("ours", set_quantization(), LoadError, "down_proj: the config does not say the group size"),
    "another method": (
        "awq-gemm",
        set_quantization(quant_method="gptq", bits=4),
        ConfigError,
        "'gptq' is not supported",
    ),
    "another version": (
        "awq-gemm",
        set_quantization(**AWQ | {"version": "gemv"}),
        LoadError,
        "layout awq-gemm, but the config says",
    ),
    "another group": (
        "awq-gemm",
        set_quantization(**AWQ | {"group_size": 64}),
        LoadError,
        "says groups of 64, but .* groups of 32",
    ),
    "eight bits": (
        "awq-gemm",
        set_quantization(**AWQ | {"bits": 8}),
        LoadError,
        "8 bits, zero_point True is not supported",
    ),
    "no zeros": (
        "awq-gemm",
        set_quantization(**AWQ | {"zero_point": False}),
        LoadError,
        "zero_point False is not supported",
    ),
    "another order": (
        "ours",
        set_quantization(**INT4["quantization_config"] | {"order": "up"}),
        ConfigError,
        "order is 'up', expected 'sub' or 'fma'",
    ),
    "a quantization of no kind": (
        "ours",
        lambda folder: edit(folder / "llm/config.json", quantization_config="int4"),
        LoadError,
        "quantization_config is a str, expected an object",
    ),
    "two kinds in one": ("awq-gemm", mixed, LoadError, "groups of 32, but .*down_proj .* of 64; all int4 linears must"),
    "a part that is not there": (
        "dense",
        lambda folder: (elsewhere(folder), edit(folder / "config.json", llm_cfg="nowhere")),
        LoadError,
        "llm does not exist, and config.json says 'nowhere', which is not there either",
    ),
}


@pytest.mark.parametrize("name, change, error, message", REFUSED.values(), ids=REFUSED)
def test_contradicting_config_and_tensors_are_refused(
    name: str, change: Callable[[Path], object], error: type[Exception], message: str, checkpoints: Path, tmp_path: Path
) -> None:
    folder = take(checkpoints, name, tmp_path)
    change(folder)
    with pytest.raises(error, match=message):
        check_checkpoint(open_checkpoint(folder))


def test_save_pretrained_into_the_source_folder_replaces_its_weights(checkpoints: Path, tmp_path: Path) -> None:
    """The folder may be of another layout; its old weight files are removed."""
    folder = take(checkpoints, "awq-v2", tmp_path)
    model = Model.from_pretrained(folder, device="cpu")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.save_pretrained(folder)
    again = Model.from_pretrained(folder, device="cpu").state_dict()
    assert all(torch.equal(again[name], x) for name, x in before.items())
    assert all(torch.equal(model.state_dict()[name], x) for name, x in before.items())  # still the old files'
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
