"""peft's adapters around the linear maps of a model: they count as in a model of Hugging Face, or are an error."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import LLM, build, pictures, words
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn

from vila_triton import VilaLlamaForCausalLM
from vila_triton.chat.conversation import Conversation
from vila_triton.engine.current_parameters import CurrentParameters
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.hf.linear_modules import Int4Linear
from vila_triton.models.layers import Affine
from vila_triton.models.params import leaves
from vila_triton.ops.int4_weight import dequantize

INT4 = Path(__file__).parents[2] / "vila_triton" / "tiny" / "checkpoint-int4"
TARGETS = ["q_proj", "v_proj", "out_proj", "o_proj", "gate_proj", "down_proj", "mm_projector.layers.2", "lm_head"]
IDS = words(2, 6)


def small() -> VilaLlamaForCausalLM:
    return build(dtype=torch.float64)


def int4(dtype: torch.dtype = torch.float32) -> VilaLlamaForCausalLM:
    return VilaLlamaForCausalLM.from_pretrained(INT4, device="cpu", dtype=dtype)


def adapted(model: VilaLlamaForCausalLM, seed: int = 0, **options: Any) -> Any:
    """With random adapters, of which peft makes half of each 0, so that they change nothing yet."""
    peft_model = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": TARGETS, **options}))
    return randomized(peft_model, "default", seed).eval()


def randomized(model: Any, adapter: str, seed: int = 0) -> Any:
    rng = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if f".{adapter}." in name:
            p.data.copy_(torch.randn(p.shape, generator=rng) * 0.2)
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    return model(input_ids=ids, **more).logits


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_adapters_of_all_parts_count_as_weights_that_they_are_merged_into() -> None:
    model, plain = adapted(small(), use_rslora=True, rank_pattern={"v_proj": 1}, alpha_pattern={"o_proj": 1}), small()
    row = torch.tensor([[3, -200, 5, 6]])
    before = logits(plain, row, images=pictures(plain, 1))
    with_adapters = logits(model, row, images=pictures(plain, 1))
    assert (with_adapters - before).abs().max() > 0.1
    around = {name: module for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    parts = {}
    for name, module in around.items():
        r, alpha = (1 if "v_proj" in name else 3), (1 if "o_proj" in name else 6)
        parts[name] = module.lora_A["default"].weight, module.lora_B["default"].weight, alpha / r**0.5
        a, b, scaling = parts[name]
        plain.get_parameter(f"{name}.weight").data.add_(scaling * b @ a)
    assert_same(with_adapters, logits(plain, row, images=pictures(plain, 1)))
    for trained in (model, plain):
        trained(input_ids=row, images=pictures(plain, 1), labels=torch.tensor([[3, -100, 5, 6]])).loss.backward()
    for name, (a, b, scaling) in parts.items():
        grad = plain.get_parameter(f"{name}.weight").grad
        if grad is not None:  # the last layer of the tower is not run
            assert_same(a.grad, scaling * b.T @ grad)
            assert_same(b.grad, scaling * grad @ a.T)
    assert_same(logits(model.merge_and_unload(), row, images=pictures(plain, 1)), with_adapters)
    assert type(model.base_model.model.llm.model.get_submodule("layers.0.self_attn.q_proj")) is nn.Linear


@torch.no_grad()
def test_adapters_of_an_int4_model_count_as_in_its_dequantized_twin() -> None:
    model = adapted(int4(), target_modules=["q_proj", "up_proj", "down_proj"])
    config = copy.deepcopy(model.base_model.model.config)
    del config.llm_cfg["quantization_config"]
    twin: Any = VilaLlamaForCausalLM(config).float().eval()
    state = {name.replace(".base_layer", ""): x for name, x in model.base_model.model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, Int4Linear):
            dense = dequantize(module.weight, torch.float32)
            name = name.removeprefix("base_model.model.")
            state[name.removesuffix(".base_layer") + ".weight"] = dense
            x = torch.randn(2, module.in_features)
            torch.testing.assert_close(module(x), x @ dense.T, rtol=1e-4, atol=1e-4)
    missing, _ = twin.load_state_dict(state, strict=False)
    assert not missing
    twin = get_peft_model(twin, model.peft_config["default"])
    twin.load_state_dict({n: x for n, x in model.state_dict().items() if "lora_" in n}, strict=False)
    assert (logits(twin) - logits(twin.merge_and_unload())).abs().max() < 1e-4
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-4)


def test_int4_is_frozen_and_takes_no_adapter_in() -> None:
    model = int4()
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 3 * 7 * 4 and {n.rpartition(".")[2] for n in frozen} == {"qweight", "scales", "zeros"}
    model.llm.requires_grad_(False)  # pyright: ignore
    assert not any(p.requires_grad for p in model.llm.parameters())  # pyright: ignore
    model.requires_grad_()
    assert frozen == [n for n, p in model.named_parameters() if not p.requires_grad]
    peft_model = adapted(model)
    bits = {n: x.clone() for n, x in model.state_dict().items() if "lora" not in n}
    for merge in (peft_model.merge_and_unload, lambda: peft_model.merge_adapter(safe_merge=True)):
        with pytest.raises(AttributeError, match=r"int4 weight has no data: .* be merged into it"):
            merge()
    peft_model(input_ids=IDS, labels=IDS).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if "lora_" in n and n.startswith("llm.")
    }
    assert all(torch.equal(x, model.state_dict()[n]) for n, x in bits.items())


def test_switching_merging_and_disabling_adapters() -> None:
    base = logits(small())
    model = adapted(small())
    first = logits(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    randomized(model, "other", seed=1)
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    second = logits(model)
    assert (second - first).abs().max() > 1e-2
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    assert_same(logits(model), both)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.merge_adapter()
    assert_same(logits(model), first)
    with model.disable_adapter():  # peft takes it out again
        assert_same(logits(model), base)
    assert_same(logits(model), first)
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.set_scale("default", 0.0)
    assert_same(logits(model), base)
    assert_same(logits(model.unload()), base)


def test_dropout_of_adapters_is_in_training_only() -> None:
    model = adapted(small(), lora_dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(small()))
    assert torch.equal(logits(model.eval()), logits(adapted(small())))


@pytest.mark.filterwarnings("error:.*save_embedding_layers")
@pytest.mark.parametrize("make", [small, int4])
def test_saved_adapter_loads_again(make: Callable[[], VilaLlamaForCausalLM], tmp_path: Path) -> None:
    model = adapted(make(), target_modules=TARGETS[:-1])
    model.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(make(), str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert not any("embed" in name or "base" in name for name in torch_names(tmp_path))
    with pytest.raises(ValueError, match="a checkpoint has no place for adapters"):
        model.base_model.model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    with model.disable_adapter():
        model.base_model.model.save_pretrained(tmp_path / "whole")
    whole = VilaLlamaForCausalLM.from_pretrained(tmp_path / "whole", device="cpu")
    assert torch.equal(logits(whole), logits(make()))


def torch_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        return [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118


MOVES: dict[str, Callable[[Any], Any]] = {
    "a copy": copy.deepcopy,
    "a pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to another dtype": lambda model: model.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_model_with_adapters_is_moved_and_copied(move: str) -> None:
    model = adapted(small())
    want, moved = logits(model), MOVES[move](model)
    torch.testing.assert_close(logits(moved), want, rtol=1e-4, atol=1e-4)
    assert all(layer.qkv is not None for layer in moved.base_model.model.params.llm.layers)


def test_caches_notice_other_adapters() -> None:
    model = adapted(small(), task_type="CAUSAL_LM")
    inner, past = model.base_model.model, model(input_ids=IDS, use_cache=True).past_key_values
    versions = [inner.parameter_versions()]

    def changed() -> bool:
        versions.append(inner.parameter_versions())
        with pytest.raises(ValueError, match="keys and values of other parameters"):
            model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(past))
        return versions[-1] not in versions[:-1]

    assert model(input_ids=IDS[:, :1], past_key_values=copy.deepcopy(past)) is not None
    with model.disable_adapter():
        assert changed()
    model.merge_adapter()
    assert changed()
    with model.disable_adapter():  # taken out of the weights again, in place
        logits(model)
        assert versions[1] == inner.parameter_versions()
    assert inner.parameter_versions() == versions[0]
    model.base_model.model.llm.model.get_submodule("layers.0.self_attn.q_proj").set_scale("default", 0.5)
    assert changed()
    with torch.no_grad():
        model.base_model.model.llm.model.get_submodule("layers.1.mlp.down_proj.lora_B.default").weight.mul_(2)
    assert changed()
    p, scaled = (model.base_model.model.params.llm for _ in range(2))
    assert CurrentParameters(p).places == CurrentParameters(scaled).places
    model.base_model.model.llm.model.get_submodule("layers.0.self_attn.q_proj").set_scale("default", 2.0)
    assert CurrentParameters(p).places != CurrentParameters(model.base_model.model.params.llm).places


def test_answers_with_an_adapter_are_those_of_the_merged_model() -> None:
    model = adapted(build(dtype=torch.float64, gain=4.0), task_type="CAUSAL_LM")
    plain = build(dtype=torch.float64, gain=4.0)
    how: dict[str, Any] = {"input_ids": IDS[:1], "max_new_tokens": 6, "eos_token_id": None}
    answers = {loop: model.generate(**how, loop=loop) for loop in ("engine", "transformers")}
    assert torch.equal(answers["engine"], answers["transformers"])
    assert not torch.equal(answers["engine"], plain.generate(**how))
    with model.disable_adapter():
        assert torch.equal(model.generate(**how), plain.generate(**how))
    assert torch.equal(model.merge_and_unload().generate(**how), answers["engine"])


def test_conversations_begin_anew_with_other_adapters() -> None:
    def answer(chat: Any) -> list[int]:
        return list(Conversation(chat).ask("What colour is it?", [Image.new("RGB", (64, 64), "red")], max_new_tokens=4))

    chat, fresh = (load_chat_model(INT4, device="cpu", dtype=torch.float32) for _ in range(2))
    plain, caches = answer(chat), chat.memory.current()
    assert chat.memory.current() is caches
    model = adapted(chat.model, target_modules=["down_proj", "q_proj"], lora_alpha=60)
    assert chat.memory.current() is not caches
    adapted(fresh.model, target_modules=["down_proj", "q_proj"], lora_alpha=60)
    assert answer(chat) == answer(fresh) != plain
    with model.disable_adapter():
        assert answer(chat) == plain


def test_copies_that_peft_trains_in_full_count() -> None:
    saved = ["mm_projector", "embed_tokens", "up_proj"]
    model, row = adapted(small(), target_modules=["q_proj"], modules_to_save=saved), torch.tensor([[3, -200, 5]])
    images = pictures(small(), 1)
    changed = logits(model, row, images=images)
    model(input_ids=row, images=images, labels=torch.tensor([[3, -100, 5]])).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None and "lora" not in n}
    assert {name for name in saved if any(name in n and "modules_to_save.default" in n for n in trained)} == {*saved}
    assert not any("original_module" in n for n in trained)
    with model.disable_adapter():
        assert torch.equal(logits(model, row, images=images), logits(small(), row, images=images))
    assert_same(logits(model.merge_and_unload(), row, images=images), changed)


def hooked(name: str, how: str = "register_forward_hook") -> Callable[[Any], Any]:
    def hook(model: Any) -> Any:
        getattr(model.get_submodule(name), how)(lambda *_: None)
        return model

    return hook


def with_a_bias(model: Any) -> Any:
    mlp = model.get_submodule("llm.model.layers.0.mlp")
    mlp.up_proj = nn.Linear(*reversed(mlp.up_proj.weight.shape), dtype=torch.float64)
    return model


def pruned(model: Any) -> Any:
    from torch.nn.utils import prune

    linear = prune.identity(model.get_submodule("llm.model.layers.0.mlp.up_proj"), "weight")
    linear._forward_pre_hooks.clear()
    return model


UNKNOWN: dict[str, tuple[Callable[[Any], Any], str]] = {
    "DoRA": (lambda m: adapted(m, use_dora=True), "adapter 'default' is a peft.*Dora.*, not plain LoRA"),
    "a bias": (lambda m: adapted(m, lora_bias=True, target_modules=["fc1"]), "adapter 'default' has lora_bias=True"),
    "IA3": (lambda m: get_peft_model(m, IA3Config(target_modules=["q_proj"], feedforward_modules=[])), "peft.*ia3"),
    "LoHa": (lambda m: get_peft_model(m, LoHaConfig(target_modules=["q_proj"])), "q_proj is a peft.*loha"),
    "OFT": (
        lambda m: get_peft_model(m, OFTConfig(target_modules=["q_proj"], oft_block_size=4)),
        "q_proj is a peft.*oft",
    ),
    "a hook": (hooked("llm.model.layers.0.mlp.up_proj"), "up_proj has hooks or another forward pass"),
    "a hook of a layer": (hooked("llm.model.layers.0"), "model.layers.0 has hooks"),
    "a hook of a part": (hooked("mm_projector"), "ParamsModule has hooks"),
    "a hook of gradients": (hooked("llm.model.norm", "register_full_backward_hook"), "model.norm has hooks"),
    "a hook of an adapter": (
        lambda m: hooked("base_model.model.llm.model.layers.0.self_attn.q_proj.lora_A.default")(adapted(m)),
        "q_proj has hooks",
    ),
    "a bias that the model has not": (with_a_bias, "model.layers.0.mlp.up_proj.bias: the model has no such parameter"),
    "pruning": (pruned, "up_proj.weight is no parameter of its module any more"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_would_be_left_out_is_an_error(name: str) -> None:
    change, message = UNKNOWN[name]
    model = change(small())
    with pytest.raises(TypeError, match=message):
        model(input_ids=torch.tensor([[-200, 3]]), images=pictures(small(), 1))


def test_an_adapter_for_each_row_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"has hooks or another forward pass .as of peft's adapter_names"):
        adapted(small())(input_ids=IDS, adapter_names=["default", "__base__"])


def test_all_linear_maps_but_the_head() -> None:
    model = adapted(small(), target_modules="all-linear")
    layers = 7 * LLM["num_hidden_layers"] + 2 + 6 * 3
    assert len({n.partition(".lora_A")[0] for n, _ in model.named_parameters() if "lora_A" in n}) == layers


def test_linear_maps_alone_are_linear_modules() -> None:
    model = small()
    for part, count in (("llm", 7 * LLM["num_hidden_layers"] + 1), ("mm_projector", 2), ("vision_tower", 6 * 3)):
        modules = [m for m in model.get_submodule(part).modules() if isinstance(m, nn.Linear)]
        linears = [
            p for p in leaves(getattr(model.params, part), Affine) if isinstance(p, Affine) and p.weight.ndim == 2
        ]
        assert [m.weight.data_ptr() for m in modules] == [p.weight.data_ptr() for p in linears] and len(
            modules
        ) == count
