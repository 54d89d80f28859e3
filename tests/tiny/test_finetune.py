"""LoRA of the bundled int4 model: what learns and what stays, beside a dense base, with `Trainer`, saved and loaded."""

import copy
import random
import re
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from vila_triton.chat.conversation import ChatModel
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.ops import Int4, dequantize
from vila_triton.tiny import finetune
from vila_triton.tiny.evaluate import build_questions, evaluate, greedy_answers
from vila_triton.tiny.finetune import INT4_CHECKPOINT, Recipe, add_adapter, build_inputs, draw_questions
from vila_triton.tiny.questions import NEW_KINDS, random_question
from vila_triton.tiny.scenes import COLORS, random_scene

SHORT = Recipe(steps=3, minutes=60, batch_size=4, rank=4, warmup_steps=1)


@pytest.fixture
def chat_model() -> ChatModel:
    return load_chat_model(INT4_CHECKPOINT, "cpu", torch.float32)


def adapted(chat_model: ChatModel, recipe: Recipe = SHORT) -> PeftModel:
    """The model of a chat model with an adapter that is the same each time."""
    torch.manual_seed(recipe.seed)
    return add_adapter(chat_model.model, recipe.rank)


def base_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    """All parameters but those of adapters, as bytes, by their name without peft's prefixes and suffixes."""
    return {
        re.sub(r"^base_model\.model\.|\.base_layer", "", name): x.detach().numpy().tobytes()
        for name, x in model.state_dict().items()
        if ".lora_" not in name
    }


def test_new_kinds_have_one_right_answer_and_words_that_the_tokenizer_knows(chat_model):
    rng = random.Random(0)
    for _ in range(100):
        scene = random_scene(rng)
        ids = chat_model.tokenizer("Which colour has more shapes?").input_ids
        assert chat_model.tokenizer.unk_token_id not in ids
        try:
            answer = random_question(rng, [scene], "majority").answer
        except ValueError:  # one color, or two that are as common
            continue
        assert 0 < max(scene.count(color=other) for other in COLORS if other != answer) < scene.count(color=answer)


def test_inputs_hold_every_question_and_label_its_answer_alone(chat_model):
    questions = draw_questions(random.Random(0), Recipe(batch_size=12))
    inputs = build_inputs(chat_model, questions)
    for question, ids, labels, mask in zip(questions, *(inputs[x] for x in ("input_ids", "labels", "attention_mask"))):
        row, answer = ids[mask.bool()].tolist(), labels[labels != -100].tolist()
        prompt = chat_model.prompt_ids(question.qa.question, len(question.images))
        assert row == prompt + answer
        assert chat_model.tokenizer.decode(answer, skip_special_tokens=True) == question.qa.answer
        assert answer[-1] == chat_model.tokenizer.eos_token_id
    assert len(inputs["images"]) == sum(len(question.images) for question in questions)


def test_only_adapters_learn_and_the_base_keeps_its_bytes(chat_model):
    before = base_bytes(chat_model.model)
    model = adapted(chat_model)
    finetune.train(model, chat_model, SHORT)
    learned = {name for name, x in model.named_parameters() if x.grad is not None or x.requires_grad}
    assert learned and all(".lora_" in name for name in learned)
    assert (
        len(learned) == 2 * 7 * chat_model.model.vila_config.llm.num_hidden_layers
    )  # of every linear, and all of them
    assert all(x.any() for name, x in model.named_parameters() if ".lora_B" in name)
    assert base_bytes(model) == before


def dequantized(int4: ChatModel) -> ChatModel:
    """A dense model with the weights that those of an int4 model stand for."""
    dense = load_chat_model(finetune.BUNDLED_CHECKPOINT, "cpu", torch.float32)
    dense.model.load_state_dict(int4.model.state_dict(), strict=False)
    with torch.no_grad():
        for ours, theirs in zip(int4.model.params.llm.layers, dense.model.params.llm.layers):
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                weight = getattr(ours, name).weight
                assert isinstance(weight, Int4)
                getattr(theirs, name).weight.copy_(dequantize(weight, torch.float32))
    return dense


def loss_curve(chat_model: ChatModel, recipe: Recipe) -> Tensor:
    return torch.tensor(finetune.train(adapted(chat_model, recipe), chat_model, recipe), dtype=torch.float64)


def compare_with_dense_base(chat_model: ChatModel, recipe: Recipe) -> Tensor:
    """Assert that the losses over int4 and over what it stands for differ as those of two ways to round float32 do, and
    return the losses.
    """
    dense = dequantized(chat_model)
    oracle = ChatModel(copy.deepcopy(dense.model).double(), dense.tokenizer, dense.processor)
    exact, int4, expected = (loss_curve(x, recipe) for x in (oracle, chat_model, dense))
    assert (int4 - exact).abs().max() <= 10 * (expected - exact).abs().max()
    return int4


def test_losses_are_those_over_a_dequantized_base(chat_model):
    assert len(compare_with_dense_base(chat_model, SHORT)) == SHORT.steps


@pytest.mark.slow
def test_loss_falls_as_over_a_dequantized_base_for_long(chat_model):
    losses = compare_with_dense_base(chat_model, Recipe(steps=60, minutes=60, batch_size=8))
    assert losses[-10:].mean() < losses[:10].mean() / 4


class QuestionDataset(Dataset):
    """Questions of the recipe as what `Trainer` takes: an item is a question, which `collate` makes inputs of."""

    def __init__(self, recipe: Recipe):
        self.questions = draw_questions(random.Random(recipe.seed), recipe)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Any:
        return self.questions[index]


def test_trainer_trains_the_adapter_and_what_it_saves_loads_to_the_same_logits(chat_model, tmp_path):
    before, model = base_bytes(chat_model.model), adapted(chat_model)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path),
            max_steps=20,
            per_device_train_batch_size=1,
            learning_rate=3e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
        ),
        data_collator=lambda questions: build_inputs(chat_model, questions),
        train_dataset=QuestionDataset(Recipe(batch_size=20, old_fraction=0.2)),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20 and sum(losses[-10:]) < sum(losses[:10]) and base_bytes(model) == before
    trainer.save_model(str(tmp_path / "adapter"))

    loaded = finetune.load_adapted(tmp_path / "adapter")
    inputs = build_inputs(chat_model, draw_questions(random.Random(1), SHORT))
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        assert torch.equal(loaded.model(**inputs).logits, logits)
        with model.disable_adapter():
            assert not torch.equal(model(**inputs).logits, logits)
    questions = build_questions(1, 5, {1: list(NEW_KINDS)})
    assert greedy_answers(loaded, questions) == greedy_answers(chat_model, questions)


def test_chart_of_the_losses_has_a_line_for_them_and_one_for_their_mean():
    chart = ElementTree.fromstring(finetune.draw_losses([2.0, 1.0, 0.5], SHORT))
    points = [line.attrib["points"].split() for line in chart.iterfind(".//{*}polyline")]
    assert [len(x) for x in points] == [3, 3] and "steps 3" in "".join(chart.itertext())


def test_comparison_has_new_kinds_first_and_old_ones_together():
    before = {"majority": [False, False], "at": [True, True], "where": [True, False]}
    after = before | {"majority": [True, True], "at": [True, False]}
    table = [line.split() for line in finetune.comparison_table(before, after).splitlines()]
    assert table[1] == ["majority", "(new)", "0.0%", "100.0%", "2"]
    assert table[-1] == ["all", "old", "kinds", "75.0%", "50.0%", "4"]


@pytest.mark.slow
def test_new_kind_is_learned_and_old_ones_stay(chat_model):
    recipe = Recipe(minutes=60)  # by steps, however slow the machine is
    finetune.train(adapted(chat_model, recipe), chat_model, recipe)
    right = evaluate(chat_model, build_questions(100, 3, {1: list(NEW_KINDS)}) + build_questions(10, 4))
    new = right.pop("majority")
    old = [value for values in right.values() for value in values]
    assert sum(new) / len(new) > 0.9 and sum(old) / len(old) > 0.9
