"""The VILA folder and its configs: lossless saving and loading, and errors that name what does not fit."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import build, config, pictures
from safetensors.torch import load_file, save_file
from torch import Tensor

from vila_triton import VilaLlamaConfig, VilaLlamaForCausalLM
from vila_triton.models.config import ConfigError
from vila_triton.models.params import LoadError

Model = VilaLlamaForCausalLM


def test_init_vlm_keeps_the_parts_of_the_model() -> None:
    model = build()
    before = [id(model.get_submodule(part)) for part in ("llm", "vision_tower", "mm_projector")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.init_vlm(VilaLlamaConfig())  # says nothing of the model it would make
    assert before == [id(model.get_submodule(part)) for part in ("llm", "vision_tower", "mm_projector")]


def test_model_dtype_comes_from_the_config_or_is_float16_with_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Model(config(torch.bfloat16)).dtype == torch.bfloat16
    cfg = config()
    delattr(cfg, "model_dtype")
    with pytest.warns(UserWarning, match="model_dtype not found in config, defaulting to torch.float16."):
        model = Model(cfg)
    assert cfg.model_dtype == "torch.float16" and {p.dtype for p in model.parameters()} == {torch.float16}
    with pytest.raises(ConfigError, match="__import__"):
        Model(config(model_dtype="__import__('os')"))  # upstream evaluates this


@pytest.mark.parametrize("part", ["llm_cfg", "vision_tower_cfg", "mm_projector_cfg"])
def test_config_without_a_part_is_refused(part: str) -> None:
    cfg = config()
    setattr(cfg, part, None)
    with pytest.raises(ValueError, match=f"`llm_cfg` `mm_projector_cfg` `vision_tower_cfg` not found.*{part}"):
        Model(cfg)


INT4 = {"quantization_config": {"quant_method": "vila-triton", "group_size": 16}}


@pytest.mark.parametrize("llm", [{}, INT4, {"tie_word_embeddings": True}], ids=["plain", "int4", "tied"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_saved_model_loads_bitwise_equal(dtype: torch.dtype, llm: dict, tmp_path: Path) -> None:
    model = build(dtype=dtype, llm=llm, prefill_chunk_size=7)
    model.save_pretrained(tmp_path)
    again = Model.from_pretrained(tmp_path, device="cpu")
    assert again.dtype == dtype and not again.training and again.config.prefill_chunk_size == 7
    before, after = model.state_dict(), again.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert {key.split(".")[0] for key in before} == {"llm", "vision_tower", "mm_projector"}
    ids, images = torch.tensor([[1, -200, 7, 8]]), pictures(model, 1)
    before, after = (m(ids, images=images).logits for m in (model, again))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9 if dtype == torch.float64 else 0.01)
    assert Model.from_pretrained(tmp_path, device="cpu", dtype=torch.float32).dtype == torch.float32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(dtype=torch.float16).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path) -> dict[str, Tensor]:
    return Model.from_pretrained(folder, device="cpu").state_dict()


def rewrite(part: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of one part of a folder."""
    tensors = load_file(part / "model.safetensors")
    change(tensors)
    save_file(tensors, part / "model.safetensors")


def test_mismatched_tensors_are_all_named_in_one_error(folder: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up.weight"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
        tensors["lm_head.weight"] = tensors["lm_head.weight"].T.contiguous()
        tensors["model.norm.weight"] = tensors["model.norm.weight"].int()

    rewrite(folder / "llm", spoil)
    with pytest.raises(LoadError) as error:
        load(folder)
    first, *problems = str(error.value).splitlines()
    assert str(folder / "llm") in first and "4 " in first
    assert [" ".join(line.split()) for line in problems] == [
        "missing model.layers.0.mlp.up_proj.weight [48, 32]",
        "wrong dtype model.norm.weight torch.int32, expected torch.float16",
        "misshapen lm_head.weight [32, 61], expected [61, 32]",
        "unexpected model.layers.0.mlp.up.weight [48, 32]",
    ]


def halve(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def write(values: Any) -> Callable[[Path], Any]:
    return lambda file: file.write_text(values if isinstance(values, str) else json.dumps(values))


INDEX, WEIGHTS = "llm/model.safetensors.index.json", "llm/model.safetensors"
BROKEN: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "weights cut short": (WEIGHTS, halve, "is not a whole safetensors file"),
    "weights cut in the header": (WEIGHTS, lambda file: file.write_bytes(file.read_bytes()[:100]), "not a whole"),
    "empty weights": (WEIGHTS, write(""), "is not a whole safetensors file"),
    "no weights": (WEIGHTS, Path.unlink, "weights do not exist"),
    "no config": ("config.json", Path.unlink, "does not exist"),
    "no config of a part": ("mm_projector/config.json", Path.unlink, "does not exist"),
    "a config that is no JSON": ("llm/config.json", write("{"), "is not JSON"),
    "a config that is no object": ("vision_tower/config.json", write([1]), "holds a list, expected an object"),
    "an index out of the folder": (INDEX, write({"weight_map": {"a": "../../x"}}), "'../../x', which is not a file of"),
    "an index to a missing shard": (INDEX, write({"weight_map": {"a": "x.safetensors"}}), "does not exist"),
    "an index without a map": (INDEX, write({}), "weight_map"),
    "an index to no names": (INDEX, write({"weight_map": {"a": 1}}), "weight_map"),
}


@pytest.mark.parametrize("name, damage, message", BROKEN.values(), ids=BROKEN)
def test_broken_file_is_named(name: str, damage: Callable, message: str, folder: Path) -> None:
    damage(folder / name)
    with pytest.raises(LoadError, match=message) as error:
        load(folder)
    assert str((folder / name).parent) in str(error.value)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"nowhere is not a folder; .*llm, vision_tower, mm_projector"):
        load(tmp_path / "nowhere")


def test_shards_load_like_one_file(folder: Path) -> None:
    before, file = load(folder), folder / WEIGHTS
    tensors = list(load_file(file).items())
    shards = {"model-1-of-2.safetensors": tensors[:5], "model-2-of-2.safetensors": tensors[5:]}
    for name, state_dict in shards.items():
        save_file(dict(state_dict), file.with_name(name))
    file.unlink()
    write({"weight_map": {key: name for name, state_dict in shards.items() for key, _ in state_dict}})(folder / INDEX)
    after = load(folder)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_extra_tensors_of_older_checkpoints_are_ignored(tmp_path: Path) -> None:
    build(dtype=torch.float16, llm={"tie_word_embeddings": True}).save_pretrained(tmp_path)
    before, extra = load(tmp_path), torch.ones(3)
    rewrite(tmp_path / "llm", lambda state_dict: state_dict.update({
        "lm_head.weight": extra, "model.layers.1.self_attn.rotary_emb.inv_freq": extra.clone(),
    }))  # fmt: skip

    for prefix in ("vision_model.", ""):  # of transformers 4, which we write, and of 5

        def rename(state_dict: dict[str, Tensor], prefix: str = prefix) -> None:
            for key in list(state_dict):
                state_dict[prefix + key.removeprefix("vision_model.")] = state_dict.pop(key)
            state_dict[f"{prefix}head.probe"] = extra
            state_dict[f"{prefix}embeddings.position_ids"] = torch.arange(3)

        rewrite(tmp_path / "vision_tower", rename)
        after = load(tmp_path)
        assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "another tower": ("vision_tower", {"model_type": "radio"}, "'radio' is not supported"),
    "another activation": ("vision_tower", {"hidden_act": "relu"}, "'relu' is not supported"),
    "another projector": ("mm_projector", {"mm_projector_type": "mlp"}, "'mlp' is not supported"),
    "no projector": ("mm_projector", {"mm_projector_type": None}, "mm_projector: missing mm_projector_type"),
    "another token order": ("mm_projector", {"token_order": "zigzag"}, "'zigzag', expected 'column' or 'row'"),
    "another rope": ("llm", {"rope_scaling": {"type": "yarn", "factor": 2}}, "'yarn' is not supported"),
    "a rope without its factor": ("llm", {"rope_scaling": {"type": "linear"}}, "rope_scaling: missing factor"),
    "another quantization": ("llm", {"quantization_config": {"quant_method": "gptq"}}, "'gptq' is not supported"),
    "another language model": ("llm", {"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
    "a language model without a width": ("llm", {"hidden_size": None}, "llm: missing hidden_size"),
    "heads that do not divide": ("llm", {"num_key_value_heads": 3}, "4 heads are not a multiple of 3"),
    "s2 of another size": (
        "",
        {"s2": True, "s2_scales": "24,48"},
        "1 tiles of 24 pixels, but the tower takes 20",
    ),
    "another feature": ("", {"mm_vision_select_feature": "patch"}, "'patch' drops the class token, and siglip"),
    "a layer the tower has not": ("", {"mm_vision_select_layer": -4}, "-4 of 3 layers; it must be -1 to -3"),
    "a layer counted from the front": ("", {"mm_vision_select_layer": 2}, "2 of 3 layers; it must be -1 to -3"),
    "another width": ("", {"hidden_size": 40}, "hidden_size is 40, but the part it joins is 32 wide"),
    "another picture width": ("", {"mm_hidden_size": 40}, "mm_hidden_size is 40, .* 24 wide"),
    "another dtype": ("", {"model_dtype": "torch.int8"}, "'torch.int8' is not supported"),
}


@pytest.mark.parametrize("part, change, message", CONFIGS.values(), ids=CONFIGS)
def test_unsupported_config_is_refused(part: str, change: dict, message: str, folder: Path) -> None:
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_changed_model_is_saved_as_it_is_and_answers(tmp_path: Path) -> None:
    from vila_triton.hf.chat_model import load_chat_model
    from vila_triton.paths import BUNDLED_CHECKPOINT

    model = VilaLlamaForCausalLM.from_pretrained(BUNDLED_CHECKPOINT, device="cpu").float()
    model.save_pretrained(tmp_path)
    again = load_chat_model(tmp_path, "cpu")
    assert again.model.dtype == torch.float32 and again.tokenizer("How many?").input_ids
    assert all(torch.equal(x, again.model.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize(
    "part, field, value",
    [
        ("llm", "num_attention_heads", "4"),
        ("llm", "num_attention_heads", 0),
        ("llm", "rope_scaling", "linear"),
        ("vision_tower", "patch_size", 0),
        ("vision_tower", "num_attention_heads", 3),
    ],
)
def test_config_field_of_wrong_type_is_named(part: str, field: str, value: object) -> None:
    from vila_triton.checkpoints import loading
    from vila_triton.paths import BUNDLED_CHECKPOINT

    top, parts = loading.read_configs(BUNDLED_CHECKPOINT)
    parts[part][field] = value
    with pytest.raises(ConfigError, match=f"{part}.*({field}|{value} heads)"):
        loading.build_vila_config(top, parts)
