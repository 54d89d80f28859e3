"""What a model computed is used again only while it would compute it again, and wherever that may be."""

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

PICTURE = open_image(EXAMPLES_DIR / "a.png")
MORE = "Describe the picture."
QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def tiny() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT)


@pytest.fixture
def talker(tiny: ChatModel) -> ChatModel:
    """A copy of the bundled model."""
    return again(tiny, copy.deepcopy(tiny.model))


def again(talker: ChatModel, model: VilaLlamaForCausalLM | None = None) -> ChatModel:
    """The same model with nothing behind it, or another."""
    return ChatModel(model or talker.model, talker.tokenizer, talker.processor)


def ask(conversation: Conversation, question: str = QUESTION, picture: bool = False) -> list[Tensor]:
    """The logits of an answer, one token after the other."""
    heard: list[Tensor] = []

    def hear(ids: Tensor, scores: Tensor) -> Tensor:
        heard.append(scores[0].clone())
        return scores

    list(conversation.ask(question, [PICTURE] if picture else [], 2, logits_processor=[hear]))
    return heard


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def of(model: Any) -> nn.Parameter:
    """A weight on which both words and pictures depend, as the positions of pictures are attended to."""
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
def test_after_a_parameter_changed_nothing_answers_for_the_old_one(talker: ChatModel, change: Callable) -> None:
    begun, shown = Conversation(talker), Conversation(talker)
    ask(begun)
    before = ask(shown, picture=True)
    change(talker.model)
    after, fresh = ask(Conversation(talker), picture=True), again(talker)
    assert same(after, ask(Conversation(fresh), picture=True)) and not same(after, before)
    with pytest.raises(ValueError, match="are others than when this conversation was shown its pictures; begin a new"):
        ask(shown, MORE)
    alike = Conversation(fresh)
    alike.spliced_ids = begun.spliced_ids
    assert same(ask(begun, MORE), ask(alike, MORE))


def test_while_nothing_changes_nothing_is_forgotten(talker: ChatModel) -> None:
    conversation = Conversation(talker)
    ask(conversation, picture=True)
    other = Conversation(talker)
    ask(other, picture=True)
    assert other.cache is conversation.cache is talker.cache and other.last_turn and other.last_turn.prefill_tokens == 1


def test_an_answer_during_which_a_parameter_changes_is_an_error(talker: ChatModel) -> None:
    talker.model.config.attention_policy = "invariant"
    conversation = Conversation(talker)
    answer = conversation.ask(MORE, [PICTURE])
    next(answer)
    with torch.no_grad():
        of(talker.model).mul_(1.5)
    with pytest.raises(RuntimeError, match="parameters changed while it answered"):
        list(answer)
    assert same(ask(conversation, picture=True), ask(Conversation(again(talker)), picture=True))


@pytest.mark.parametrize(
    "name, value", [("kv_dtype", "int4"), ("page_size", 64), ("attention_policy", "invariant")], ids=str
)
def test_a_changed_config_counts_from_the_next_question(talker: ChatModel, name: str, value: Any) -> None:
    begun = Conversation(talker)
    ask(begun)
    unasked = Conversation(talker)
    setattr(talker.model.config, name, value)
    alike = Conversation(again(talker))
    alike.spliced_ids = begun.spliced_ids
    assert same(ask(begun, MORE), ask(alike, MORE))
    words = [[int(scores.argmax()) for scores in ask(one)] for one in (unasked, Conversation(again(talker)))]
    assert words[0] == words[1]
    assert talker.cache.settings == talker.model.config.cache_kwargs() and begun.cache is unasked.cache is talker.cache


def test_what_one_kernel_computed_serves_another_but_for_the_invariant_policy(talker: ChatModel) -> None:
    for policy in ("fast", "invariant"):
        talker.model.config.attention_policy = policy
        before = talker.memory.current()
        with use(rms_norm="triton"):
            assert (talker.memory.current() is before) == (policy == "fast")


MODEL = build(seed=2)
IDS = words(1, 6)


@torch.no_grad()
def test_a_past_of_other_parameters_is_refused() -> None:
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
def test_a_past_of_another_shape_is_refused(change: dict, said: str) -> None:
    cache = PagedKVCache(build(llm=change).vila_config.llm, 4, dtype=MODEL.dtype)
    cache.allocator.add_sequence()
    with pytest.raises(ValueError, match=said):
        MODEL(IDS, past_key_values=cache)


def test_the_models_own_cache_is_not_continued_under_another_config() -> None:
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
def test_what_was_begun_in_one_mode_goes_on_in_another(talker: ChatModel, first: Callable, second: Callable) -> None:
    talker.model.config.attention_policy = "invariant"
    talker.model.config.kv_dtype = "int4"  # of which pages are several tensors
    expected = Conversation(again(talker))
    answers = [ask(expected, picture=True), ask(expected, MORE, picture=True), ask(expected, MORE)]
    with first():
        begun = Conversation(talker)
        assert same(ask(begun, picture=True), answers[0])
    with second():
        assert same(ask(Conversation(talker), picture=True), answers[0])
        assert same(ask(begun, MORE, picture=True), answers[1])
    with first():
        assert same(ask(begun.fork(), MORE), answers[2])
        begun.undo()
    with second():
        assert same(ask(begun, MORE, picture=True), answers[1])


@in_modes
def test_the_models_own_cache_goes_on_in_another_mode(first: Callable, second: Callable) -> None:
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
def test_a_model_loaded_or_asked_under_inference_mode_can_be_trained(name: str) -> None:
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
