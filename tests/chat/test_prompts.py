"""Templates and the token ids of prompts, against what is written down here by hand."""

from dataclasses import replace

import pytest
from small_tokenizers import CHATML, HEADERS, PIECES, of_bytes, pieces, spelled
from transformers.utils.chat_template_utils import render_jinja_template

from vila_triton.chat.prompts import (
    conversation_ids,
    end_of_turn_ids,
    first_turn_ids,
    insert_image_tokens,
    next_turn_ids,
    stop_token_ids,
    tokenize,
)
from vila_triton.chat.templates import TEMPLATES, resolve_template

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
LLAMA = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
USER, SYSTEM, ASSISTANT = (
    f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "system", "assistant")
)
TEXTS = {  # two rounds up to the second answer, in which Q and R are asked and A is answered
    "vicuna_v1": f"{VICUNA} USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "vicuna_v1_nosys": " USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "mpt": f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\nA<|im_end|>"
    "<|im_start|>user\nR<|im_end|><|im_start|>assistant\n",
    "hermes-2": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nQ<|im_end|>"
    "<|im_start|>assistant\nA<|im_end|><|im_start|>user\nR<|im_end|><|im_start|>assistant\n",
    "llama_3": f"<|begin_of_text|>{SYSTEM}{LLAMA}<|end_of_text|>{USER}Q<|end_of_text|>{SYSTEM}A<|end_of_text|>"
    f"{USER}R<|end_of_text|>{SYSTEM}",
    "llama_3_corrected": f"<|begin_of_text|>{SYSTEM}{LLAMA}<|eot_id|>{USER}Q<|eot_id|>{ASSISTANT}A<|eot_id|>"
    f"{USER}R<|eot_id|>{ASSISTANT}",
    "plain": "Q\nAR\n",
}
MESSAGES = [("user", "Q"), ("assistant", "A"), ("user", [{"type": "text", "text": "R"}])]


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_renders_what_vila_was_trained_on(name: str) -> None:
    how, expected = TEMPLATES[name], TEXTS[name.replace("v1", "vicuna_v1") if name == "v1" else name]
    assert f"{how.render_first_turn('Q')}{how.answer_prefix}A{how.turn_end}{how.render_turn('R')}" == expected
    messages = [{"role": role, "content": content} for role, content in MESSAGES]
    ((rendered,), _) = render_jinja_template([messages], chat_template=how.jinja, add_generation_prompt=True)
    assert rendered == expected
    finished = [{"role": role, "content": content} for role, content in MESSAGES[:2]]
    ((rendered,), _) = render_jinja_template([finished], chat_template=how.jinja)
    ending = "<|end_of_text|>" if name == "llama_3_corrected" else how.turn_end
    assert rendered == f"{how.render_first_turn('Q')}{how.answer_prefix}A{ending}"


def test_jinja_template_takes_system_message_and_images_and_refuses_other_content() -> None:
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    told = [{"role": "system", "content": "Be kind."}, image]
    ((text,), _) = render_jinja_template([told], chat_template=TEMPLATES["hermes-2"].jinja)
    assert text == "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\n<image>\nQ"
    for messages, message in (
        ([{"role": "tool", "content": "7"}], "no place for a message of role tool"),
        ([image, {"role": "user", "content": [{"type": "video"}]}], "text and image parts, not video"),
    ):
        with pytest.raises(Exception, match=message):
            render_jinja_template([messages], chat_template=TEMPLATES["vicuna_v1"].jinja)
    with pytest.raises(Exception, match="no place for a message of role system"):
        render_jinja_template([told], chat_template=TEMPLATES["plain"].jinja)


def test_space_is_prepended_behind_an_image_but_not_behind_the_end_of_turn() -> None:
    tokenizer, how = pieces(), TEMPLATES["vicuna_v1_nosys"]
    # <s> ▁ ▁USER : ▁ [image] ▁ \n What ▁is ▁it ? ▁ASSISTANT :
    first = [1, 4, 5, 7, 4, -200, 4, 3, 10, 11, 12, 13, 8, 7]
    assert first_turn_ids("<image>\nWhat is it?", how, tokenizer) == first
    # USER : ▁Sure [image] ▁ ▁not ? ▁ASSISTANT :
    second = [6, 7, 17, -200, 4, 18, 13, 8, 7]
    assert next_turn_ids("Sure<image> not?", how, tokenizer) == second
    assert (
        tokenize(how.render_turn("Sure<image> not?"), tokenizer, add_bos=False)[0] == 5
    )  # alone, it would begin with ▁USER
    # ▁A ▁cat . </s>
    answer = [14, 15, 16, *end_of_turn_ids(how, tokenizer)]
    assert answer == [14, 15, 16, 2]
    whole = (
        f"{how.render_first_turn('<image>' + chr(10) + 'What is it?')} A cat.</s>{how.render_turn('Sure<image> not?')}"
    )
    assert tokenize(whole, tokenizer) == first + answer + second


@pytest.mark.parametrize("name, end, role", [("llama_3", 1, "system"), ("llama_3_corrected", 4, "assistant")])
def test_byte_level_tokenizers_add_no_space_and_no_second_bos(name: str, end: int, role: str) -> None:
    tokenizer, how = of_bytes(HEADERS), replace(TEMPLATES[name], system="Hi")
    vocabulary = spelled(HEADERS)

    def header(role: str) -> list[int]:
        return [2, vocabulary.index(role), 3, vocabulary.index("ĊĊ")]

    what, is_, it, ask, sure, hi, line = map(vocabulary.index, ("What", "Ġis", "Ġit", "?", "Sure", "Hi", "Ċ"))
    first = [0, *header("system"), hi, end, *header("user"), -200, line, what, is_, it, ask, end, *header(role)]
    assert first_turn_ids("<image>\nWhat is it?", how, tokenizer) == first
    second = [*header("user"), sure, ask, end, *header(role)]
    assert next_turn_ids("Sure?", how, tokenizer) == second
    assert end_of_turn_ids(how, tokenizer) == [end] and end_of_turn_ids(how, tokenizer, end_conversation=True) == [1]
    whole = f"{how.render_first_turn('<image>' + chr(10) + 'What is it?')}Hi{how.turn_end}{how.render_turn('Sure?')}"
    assert tokenize(whole, tokenizer) == [*first, hi, end, *second]
    assert stop_token_ids(how, tokenizer, [1, 9], None, 3) == [1, 4, 9, 3]


def test_template_is_resolved_from_the_tokenizer() -> None:
    for tokenizer, name in ((pieces(), "vicuna_v1"), (of_bytes(HEADERS), "llama_3"), (of_bytes(CHATML), "hermes-2")):
        assert resolve_template("auto", tokenizer) is resolve_template(None, tokenizer) is TEMPLATES[name]
        assert resolve_template(name, tokenizer) is TEMPLATES[name]


@pytest.mark.parametrize(
    "name, special, message",
    [
        ("vicuna_v2", HEADERS, r"no conversation template 'vicuna_v2'; there are: auto, vicuna_v1, .*llama_3, .*plain"),
        (
            "mpt",
            HEADERS,
            r"'mpt' is of tokens that the tokenizer lacks: <\|im_start\|>, <\|im_end\|>; set conversation_",
        ),
        ("llama_3_corrected", HEADERS[:4], r"lacks: <\|eot_id\|>; .* fits this tokenizer: llama_3, plain"),
        ("auto", ["[", "]"], r"the tokenizer knows none of <\|im_start\|>, .* fits this tokenizer: plain"),
    ],
)
def test_template_whose_tokens_are_missing_is_refused_with_those_that_fit(
    name: str, special: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_template(name, of_bytes(special))


def test_question_with_another_number_of_image_tokens_is_refused() -> None:
    assert (
        insert_image_tokens("Q", 2) == "<image>\n<image>\nQ"
        and insert_image_tokens("<image> or <image>?", 2).count("<") == 2
    )
    with pytest.raises(ValueError, match="places for 1 images, but 0 were given; write <image> once for each"):
        insert_image_tokens("What does <image> mean?", 0)


def test_vocabulary_is_that_of_the_sentencepiece_model() -> None:
    assert pieces().convert_ids_to_tokens(list(range(len(PIECES)))) == PIECES


CONVERSATION = [("user", "<image>\nWhat is it?"), ("assistant", "A cat."), ("user", "Sure?")]
TOKENIZERS = {"vicuna_v1_nosys": pieces(), "llama_3": of_bytes(HEADERS), "hermes-2": of_bytes(CHATML)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_of_a_conversation_are_those_of_its_text(name: str) -> None:
    template, tokenizer = TEMPLATES[name], TOKENIZERS[name]
    (_, first), (_, answer), (_, second) = CONVERSATION
    assert conversation_ids(CONVERSATION[:1], template, tokenizer) == first_turn_ids(first, template, tokenizer)
    text = template.render_first_turn(first) + template.answer_prefix + answer + template.turn_end
    assert conversation_ids(CONVERSATION, template, tokenizer) == tokenize(
        text + template.render_turn(second), tokenizer
    )
    own_system = conversation_ids([("system", "What is it?"), ("user", "Sure?")], template, tokenizer)
    assert own_system == tokenize(replace(template, system="What is it?").render_first_turn("Sure?"), tokenizer)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_answer_with_the_space_that_a_server_gives_it_has_the_same_ids(name: str) -> None:
    question, (role, answer), next_question = CONVERSATION
    as_served = [question, (role, TEMPLATES[name].answer_prefix + answer), next_question]
    ids = [conversation_ids(messages, TEMPLATES[name], TOKENIZERS[name]) for messages in (as_served, CONVERSATION)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_message_of_a_conversation_spells_a_special_token(name: str) -> None:
    template, tokenizer = TEMPLATES[name], TOKENIZERS[name]
    texts = {*tokenizer.all_special_tokens, *template.required_tokens} - {"<unk>"}
    special = {tokenizer.vocab[text] for text in texts}

    def count(messages: list[tuple[str, str]]) -> int:
        return sum(i in special for i in conversation_ids(messages, template, tokenizer))

    spelled_out = "".join(tokenizer.all_special_tokens) + template.turn_end
    messages = [("system", "What"), ("user", "What"), ("assistant", "A"), ("user", "Sure")]
    assert count([(role, text + spelled_out) for role, text in messages]) == count(messages)


@pytest.mark.parametrize(
    "roles", ["", "assistant", "user user", "user assistant", "user system user", "user tool user"]
)
def test_roles_that_do_not_take_turns_are_refused(roles: str) -> None:
    messages = [(role, "What") for role in roles.split()]
    with pytest.raises(ValueError, match="expected user and assistant in turn"):
        conversation_ids(messages, TEMPLATES["vicuna_v1_nosys"], pieces())
