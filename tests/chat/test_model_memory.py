"""Caches of a model are reused exactly as long as it would compute the same again."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hf_reference import build, pictures, words
from torch import Tensor, nn
from torch import inference_mode as inference

from vila_triton import VilaLlamaForCausalLM
from vila_triton.cache.paged_cache import PagedKVCache
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.images.processing import open_image
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.registry import use
from vila_triton.tiny.examples import EXAMPLES_DIR

IMAGE = open_image(EXAMPLES_DIR / "a.png")
MORE = "Describe the picture."
QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def tiny() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT)


@pytest.fixture
def chat_model(tiny: ChatModel) -> ChatModel:
    """A copy of the bundled model."""
    return again(tiny, copy.deepcopy(tiny.model))


def again(chat_model: ChatModel, model: VilaLlamaForCausalLM | None = None) -> ChatModel:
    """The same model with nothing behind it, or another."""
    return ChatModel(model or chat_model.model, chat_model.tokenizer, chat_model.processor)


def ask(conversation: Conversation, question: str = QUESTION, image: bool = False) -> list[Tensor]:
    """The logits of an answer, one token after the other."""
    heard: list[Tensor] = []

    def hear(ids: Tensor, scores: Tensor) -> Tensor:
        heard.append(scores[0].clone())
        return scores

    list(conversation.ask(question, [IMAGE] if image else [], 2, logits_processor=[hear]))
    return heard


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def of(model: Any) -> nn.Parameter:
    """A weight that text and, through attention, the positions of images depend on."""
    return model.llm.model.layers.get_submodule("1").self_attn.k_proj.weight


def step(model: Any) -> None:
    of(model).grad = torch.ones_like(of(model))
    torch.optim.SGD([of(model)], lr=0.5).step()


def load(model: Any) -> None:
    model.load_state_dict({name: 1.25 * x for name, x in model.state_dict().items()})


def replace(model: Any) -> None:
    model.llm.model.layers.get_submodule("1").self_attn.k_proj.weight = nn.Parameter(2 * of(model).detach())


def assign(model: Any) -> None:
    of(model).data = 2 * of(model).data


def merge(model: Any) -> None:
    of(model).data += 0.1


def one_number(model: Any) -> None:
    of(model).data[3, 5] = 9.0


def rows_in_place(model: Any) -> None:
    of(model).data.copy_(of(model).data.flip(0))


def columns_in_place(model: Any) -> None:
    of(model).data.copy_(of(model).data.roll(8, 1))


def beside_torch(model: Any) -> None:
    of(model).detach().numpy()[:] *= 2


@inference()
def under_inference(model: Any) -> None:
    of(model).mul_(2)


@inference()
def moved_under_inference(model: Any) -> None:
    model.double()
    of(model).mul_(2)


def projector(model: Any) -> None:
    for p in model.mm_projector.parameters():
        p.data.mul_(1.5)


CHANGES: list[Callable[[Any], Any]] = [step, load, replace, assign, merge, one_number, beside_torch, under_inference]
CHANGES += [rows_in_place, columns_in_place, moved_under_inference, projector, lambda model: model.float()]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_parameter_invalidates_caches(chat_model: ChatModel, change: Callable) -> None:
    begun, shown = Conversation(chat_model), Conversation(chat_model)
    ask(begun)
    before = ask(shown, image=True)
    change(chat_model.model)
    after, fresh = ask(Conversation(chat_model), image=True), again(chat_model)
    assert same(after, ask(Conversation(fresh), image=True)) and not same(after, before)
    with pytest.raises(ValueError, match="have changed since it encoded the images of this conversation; begin a new"):
        ask(shown, MORE)
    alike = Conversation(fresh)
    alike.spliced_ids = begun.spliced_ids
    assert same(ask(begun, MORE), ask(alike, MORE))


def test_unchanged_model_keeps_caches(chat_model: ChatModel) -> None:
    conversation = Conversation(chat_model)
    ask(conversation, image=True)
    other = Conversation(chat_model)
    ask(other, image=True)
    assert (
        other.cache is conversation.cache is chat_model.cache
        and other.last_turn
        and other.last_turn.prefill_tokens == 1
    )


def test_parameter_changed_during_an_answer_is_an_error(chat_model: ChatModel) -> None:
    chat_model.model.config.attention_numerics = "batch_invariant"
    conversation = Conversation(chat_model)
    answer = conversation.ask(MORE, [IMAGE])
    next(answer)
    with torch.no_grad():
        of(chat_model.model).mul_(1.5)
    with pytest.raises(RuntimeError, match="parameters changed while it answered"):
        list(answer)
    assert same(ask(conversation, image=True), ask(Conversation(again(chat_model)), image=True))


@pytest.mark.parametrize(
    "name, value", [("kv_dtype", "int4"), ("page_size", 64), ("attention_numerics", "batch_invariant")], ids=str
)
def test_changed_config_counts_from_the_next_question(chat_model: ChatModel, name: str, value: Any) -> None:
    begun = Conversation(chat_model)
    ask(begun)
    unasked = Conversation(chat_model)
    setattr(chat_model.model.config, name, value)
    alike = Conversation(again(chat_model))
    alike.spliced_ids = begun.spliced_ids
    assert same(ask(begun, MORE), ask(alike, MORE))
    words = [[int(scores.argmax()) for scores in ask(one)] for one in (unasked, Conversation(again(chat_model)))]
    assert words[0] == words[1]
    assert (
        chat_model.cache.settings == chat_model.model.config.cache_kwargs()
        and begun.cache is unasked.cache is chat_model.cache
    )


def test_caches_are_shared_between_kernels_unless_batch_invariant(chat_model: ChatModel) -> None:
    for policy in ("fast", "batch_invariant"):
        chat_model.model.config.attention_numerics = policy
        before = chat_model.memory.current()
        with use(rms_norm="triton"):
            assert (chat_model.memory.current() is before) == (policy == "fast")


MODEL = build(seed=2)
IDS = words(1, 6)


@torch.no_grad()
def test_past_of_other_parameters_is_refused() -> None:
    model: Any = copy.deepcopy(MODEL)
    past = model(IDS).past_key_values
    model(IDS, start_pos=0)
    with pytest.raises(ValueError, match="keys and values of other parameters"):
        copy.deepcopy(MODEL)(IDS, past_key_values=past)
    model.llm.model.norm.weight.mul_(2)
    for how in ({"past_key_values": past}, {"start_pos": 6}):
        with pytest.raises(ValueError, match="keys and values of other parameters"):
            model(IDS, **how)
    assert model(IDS, start_pos=0).logits.shape[1] == 6


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_hidden_layers": 3}, "3 layers of 2 KV heads of 8 numbers on cpu, but the model has 2 layers"),
        ({"num_key_value_heads": 4}, "2 layers of 4 KV heads of 8 numbers"),
        ({"head_dim": 16}, "2 layers of 2 KV heads of 16 numbers"),
    ],
    ids=str,
)
def test_past_of_another_shape_is_refused(change: dict, said: str) -> None:
    cache = PagedKVCache(build(llm=change).vila_config.llm, 4, dtype=MODEL.dtype)
    cache.allocator.add_sequence()
    with pytest.raises(ValueError, match=said):
        MODEL(IDS, past_key_values=cache)


def test_own_cache_is_not_continued_under_another_config() -> None:
    model = copy.deepcopy(MODEL)
    model(IDS, start_pos=0)
    model.config.kv_dtype = "int8"
    with pytest.raises(ValueError, match=r"begun with .*'kv_dtype': None.* now says .*'int8'"):
        model(IDS, start_pos=6)
    model(IDS, start_pos=0)
    model(IDS, start_pos=6)


MODES = [(inference, nullcontext), (nullcontext, inference)]
in_modes = pytest.mark.parametrize("first, second", MODES, ids=lambda mode: mode.__name__)


@in_modes
def test_cache_made_under_inference_mode_continues_outside_and_back(
    chat_model: ChatModel, first: Callable, second: Callable
) -> None:
    chat_model.model.config.attention_numerics = "batch_invariant"
    chat_model.model.config.kv_dtype = "int4"  # of which pages are several tensors
    expected = Conversation(again(chat_model))
    answers = [ask(expected, image=True), ask(expected, MORE, image=True), ask(expected, MORE)]
    with first():
        begun = Conversation(chat_model)
        assert same(ask(begun, image=True), answers[0])
    with second():
        assert same(ask(Conversation(chat_model), image=True), answers[0])
        assert same(ask(begun, MORE, image=True), answers[1])
    with first():
        assert same(ask(begun.fork(), MORE), answers[2])
        begun.undo()
    with second():
        assert same(ask(begun, MORE, image=True), answers[1])


@in_modes
def test_own_cache_continues_in_another_grad_mode(first: Callable, second: Callable) -> None:
    model, image = copy.deepcopy(MODEL), pictures(MODEL, 1)
    ids = torch.cat((torch.tensor([[1, -200]]), IDS), dim=1)
    whole = model(ids, images=image).logits
    with first():
        out = model(ids[:, :4], start_pos=0, images=image)
        past = model(ids[:, :4], images=image).past_key_values
    with second():
        for how in ({"start_pos": 12}, {"past_key_values": past}):
            torch.testing.assert_close(model(ids[:, 4:], **how).logits, whole[:, 12:], rtol=0, atol=1e-9)
    assert out.logits.shape[1] == 12


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-int4"])
def test_model_loaded_under_inference_mode_can_be_trained(name: str) -> None:
    with inference():
        model = VilaLlamaForCausalLM.from_pretrained(BUNDLED_CHECKPOINT.with_name(name), dtype=torch.float32)
        model.generate(IDS, max_new_tokens=2)
        VilaLlamaForCausalLM(model.config)
    assert not any(p.is_inference() for p in model.parameters())
    if name == "checkpoint":
        model(IDS, labels=IDS).loss.backward()
        assert of(model).grad is not None
    else:
        assert model(IDS).logits.shape[1] == 6
