"""A model is trained as Hugging Face's are: `Trainer`, gradient checkpointing, autocast, frozen parts."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_reference import build, padded, pictures, words
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

from vila_triton import VilaLlamaConfig, VilaLlamaForCausalLM, use
from vila_triton.checkpoints.loading import PARTS
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import count_calls

MODEL = build(gain=2.0).train()
ROWS = [[1, 5, -200, *words(8).tolist()], [7, 5, 9, -200, 6]]
Gradients = dict[str, Tensor]


def given(**more: Any) -> dict[str, Any]:
    ids, mask = padded(ROWS)
    return {"input_ids": ids, "attention_mask": mask, "images": pictures(MODEL, 2), "labels": ids, **more}


def gradients(model: VilaLlamaForCausalLM, **more: Any) -> Gradients:
    model.zero_grad()
    loss: Any = model(**given(**more)).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def model() -> VilaLlamaForCausalLM:
    return copy.deepcopy(MODEL)


def test_checkpointed_layers_run_anew_with_the_kernels_of_the_forward_pass(model: VilaLlamaForCausalLM) -> None:
    expected, kept = gradients(model), [0, 0]

    def keep(x: Tensor) -> Tensor:
        kept[model.is_gradient_checkpointing] += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(**given())
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with use(linear="reference", rope="reference"), count_calls() as calls:
            loss: Any = model(**given()).loss
    assert kept[True] < kept[False] / 4
    forward = dict(calls)
    model.zero_grad()
    loss.backward()
    layers = len(model.params.llm.layers)
    assert calls["rope", "reference"] - forward["rope", "reference"] >= 2 * layers and ("linear", "aten") not in calls
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=0, atol=1e-12)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    model.activation_checkpointing_enable()
    assert model.eval()(**given()).past_key_values is not None  # nothing is run anew where nothing is trained


def test_dropout_of_an_adapter_is_the_same_where_a_layer_is_run_anew(model: VilaLlamaForCausalLM) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(model, config).train()  # pyright: ignore[reportArgumentType]
    results = []
    for enable in (lambda: None, adapted.gradient_checkpointing_enable):
        enable()
        torch.manual_seed(1)
        results.append({name: x.clone() for name, x in gradients(adapted).items()})
    assert len(results[0]) == 12 and all("lora" in name for name in results[0])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_compiled_model_has_the_gradients_of_an_eager_one(model: VilaLlamaForCausalLM) -> None:
    torch._dynamo.reset()
    model.gradient_checkpointing_enable()
    torch.compile(model, backend="aot_eager")(**given()).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, gradients(MODEL), rtol=0, atol=1e-12)


REFUSED: dict[str, Callable[[Any], Any]] = {
    "use_reentrant=True would run layers anew with other kernels": lambda model: model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "takes use_reentrant=False alone, and not preserve_rng_state=False, every_n_layers=2, offload=True": (
        lambda model: model.activation_checkpointing_enable({"preserve_rng_state": False}, 2, offload=True)
    ),
    "write to the cache again: it needs use_cache=False": lambda model: model(**given(use_cache=True)),
    "none of past_key_values, start_pos, chunk_prefilling": lambda model: model(**given(start_pos=0)),
    "and none of past_key_values": lambda model: model(**given(chunk_prefilling=True)),
    "num_items_in_batch is 0, expected the number of labels": lambda model: model(**given(num_items_in_batch=0)),
    "labels: all are -100 behind the first of each sequence": lambda model: model(
        torch.tensor([[1, 5]]), labels=torch.tensor([[1, -100]])
    ),
    "save_pretrained writes the model's own parameters": lambda model: model.save_pretrained("x", state_dict={}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_training_does_not_take_is_refused(message: str, model: VilaLlamaForCausalLM) -> None:
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=message):
        REFUSED[message](model)
    assert model.cache is None and not Path("x").exists()


def test_noise_on_embeddings_that_the_model_does_not_call_is_refused(
    model: VilaLlamaForCausalLM, tmp_path: Path
) -> None:
    args = TrainingArguments(str(tmp_path), neftune_noise_alpha=5.0, report_to=[], use_cpu=True)
    with pytest.raises(NotImplementedError, match=r"hooks of theirs .*neftune_noise_alpha"):
        Trainer(model, args, train_dataset=[]).train()


def test_data_parallel_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"VilaLlamaForCausalLM is not replicated by torch\.nn\.DataParallel"):
        MODEL._replicate_for_data_parallel()  # what DataParallel calls


FROZEN: dict[str, Callable[[str], bool]] = {
    **{part: lambda name, part=part: name.startswith(part) for part in PARTS},
    "all but the projector": lambda name: not name.startswith("mm_projector"),
    "all but q and v": lambda name: not name.endswith(("llm.q_proj.weight", "v_proj.weight")),
    "all but norms": lambda name: "norm" not in name,
}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_parameters_have_no_gradient_and_the_others_theirs(
    frozen: str, checkpointed: bool, model: VilaLlamaForCausalLM
) -> None:
    expected = gradients(MODEL)
    for name, p in model.named_parameters():
        p.requires_grad_(not FROZEN[frozen](name))
    if checkpointed:
        model.gradient_checkpointing_enable()
    found = gradients(model)
    assert found.keys() == {name for name in expected if not FROZEN[frozen](name)}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-12)


def test_inputs_of_a_frozen_model_require_gradients_where_that_is_asked_for(model: VilaLlamaForCausalLM) -> None:
    model.requires_grad_(False)
    assert not model(**given()).loss.requires_grad
    model.enable_input_require_grads()
    model(**given()).loss.backward()
    model(inputs_embeds=torch.randn(1, 3, 32).double(), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    with torch.no_grad():
        assert not model(**given()).loss.requires_grad
    model.disable_input_require_grads()
    assert not model(**given()).loss.requires_grad


def test_states_and_attentions_of_checkpointed_layers_have_their_gradients(model: VilaLlamaForCausalLM) -> None:
    results = []
    for enable in (lambda: None, model.gradient_checkpointing_enable):
        enable()
        model.zero_grad()
        out = model(**given(), output_hidden_states=True, output_attentions=True)
        (out.hidden_states[1].square().sum() + sum(x.square().sum() for x in out.attentions)).backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((*out.hidden_states, *out.attentions, *found.values()))
    assert len(out.attentions) == 2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_model_in_training_keeps_no_cache_and_answers_after_a_step(model: VilaLlamaForCausalLM) -> None:
    assert model(**given()).past_key_values is None
    assert model(**given(use_cache=True)).past_key_values is not None
    ids = torch.tensor([[1, 5, 6]])
    before = model.generate(ids, max_new_tokens=4)
    gradients(model)
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    after = model.generate(ids, max_new_tokens=4)
    assert before.tolist() != after.tolist() and model.training


@pytest.mark.parametrize("checkpointed", [False, True])
def test_trainer_does_the_steps_of_a_plain_loop(
    checkpointed: bool, model: VilaLlamaForCausalLM, tmp_path: Path
) -> None:
    """Also where the batches of a step have different numbers of labels; what it saves is loaded again."""
    images, labels = pictures(MODEL, 4), words(4, 6)
    labels[:, 0] = labels[1, 2:5] = labels[2, :5] = -100
    rows = [
        {"input_ids": torch.tensor([-200, *words(5, seed=i)]), "labels": labels[i], "images": images[i]}
        for i in range(4)
    ]
    settings: dict[str, Any] = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_grad_norm": 0}
    settings |= {"train_sampling_strategy": "sequential", "disable_tqdm": True, "report_to": [], "use_cpu": True}
    args = TrainingArguments(str(tmp_path), gradient_checkpointing=checkpointed, **settings)
    Trainer(model, args, train_dataset=rows).train()  # pyright: ignore[reportArgumentType]
    plain = copy.deepcopy(MODEL)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for pair in (rows[:2], rows[2:]):
        optimizer.zero_grad()
        plain(**{name: torch.stack([row[name] for row in pair]) for name in pair[0]}).loss.backward()
        optimizer.step()
    saved = VilaLlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=1e-12)
        assert torch.equal(saved.get_parameter(name), model.get_parameter(name))


def test_config_alone_knows_the_vocabulary_by_which_peft_tells_whether_embeddings_have_grown() -> None:
    assert VilaLlamaConfig.from_pretrained(BUNDLED_CHECKPOINT).vocab_size == 128
