"""The whole model against Hugging Face's LLaMA and SigLIP, a projector of torch's modules and a splice by torch.cat."""

from typing import Any

import hf_reference
import pytest
import torch
import torch.nn.functional as F
from hf_reference import Oracle, build, config, padded, pictures, spread

from vila_triton.hf.padding import unpad
from vila_triton.models import vila
from vila_triton.models.params import num_parameters

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
PROMPTS = {
    "no-picture": [[1, 7, 8, 9, 30, 31], [1, 5, 6], [40]],
    "one-picture": [[1, 7, -200, 9, 30]],
    "one-picture-in-the-second-row": [[1, 7, 8, 9, 10, 11, 12], [-200, 9]],
    "three-pictures": [[1, -200, 9, -200], [1, 4, 5], [-200, 8, 9, 10, 11]],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
def test_logits_and_loss_equal_hugging_face(rows: list[list[int]], side: str, dtype: torch.dtype) -> None:
    model = build(dtype=dtype, llm={"tokenizer_padding_side": side})
    n = sum(row.count(-200) for row in rows)
    images = pictures(model, n) if n else None
    ids, mask = padded(rows, side)
    labels = torch.where(ids == 9, -100, ids + 1)  # a label that differs from its token, and one kind that is ignored
    wide = [spread(row, given[m].tolist()) for row, given, m in zip(rows, labels, mask.bool())]
    with torch.no_grad():
        ours = model(ids, attention_mask=mask, labels=labels, images=images)
        theirs, places = Oracle.of(model).run(
            [torch.tensor(row) for row in rows], images, side, labels=padded(wide, side, fill=-100)[0]
        )
    expected = theirs.logits * places[..., None]
    torch.testing.assert_close(ours.logits, expected, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(ours.loss.float(), theirs.loss.float(), rtol=0, atol=1e-6)


LLAMA3 = {  # with head_dim 8: two frequencies kept, one blended, one divided
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied embeddings": {"llm": {"tie_word_embeddings": True}},
    "head_dim of its own": {"llm": {"head_dim": 12}},
    "attention_bias": {"llm": {"attention_bias": True}},
    "mlp_bias": {"llm": {"mlp_bias": True}},
    "a key/value head for every head": {"llm": {"num_key_value_heads": 4}},
    "one key/value head": {"llm": {"num_key_value_heads": 1}},
    "even grid": {"vision": {"image_size": 16}},
    "even grid in rows": {"vision": {"image_size": 16}, "order": "row"},
    "odd grid in rows": {"order": "row"},
    "pixels left over": {"vision": {"image_size": 22}},  # as in siglip-so400m-patch14-384
    "last layer": {"mm_vision_select_layer": -1},
    "second layer from the front": {"mm_vision_select_layer": -3},
    "rope_theta": {"llm": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}},
    "linear rope": {"llm": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}},
    "llama3 rope": {"llm": {"rope_parameters": LLAMA3}},
}


def difference(**changes: Any) -> float:
    model = build(**changes)
    ids, images = torch.tensor([[1, 7, -200, 9, -200, 30, 31]]), pictures(model, 2)
    with torch.no_grad():
        theirs, _ = Oracle.of(model).run(list(ids), images)
        return (model(ids, images=images).logits - theirs.logits).abs().max().item()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_of_every_geometry_equal_hugging_face(changes: dict[str, Any]) -> None:
    assert difference(**changes) < 1e-9


@pytest.mark.parametrize("old", [{"rope_theta": 500.0}, {"rope_scaling": {"type": "linear", "factor": 3.0}}], ids=str)
def test_rope_config_in_transformers_4_spelling_is_read(old: dict) -> None:
    new = {"rope_type": "default", "rope_theta": 1e4, **old, **old.get("rope_scaling", {})}
    new["rope_type"] = new.pop("type", "default")
    models = [build(llm=llm) for llm in (old, {"rope_parameters": new})]
    assert torch.equal(*(model(hf_reference.words(1, 20)).logits for model in models))


def test_spliced_image_takes_one_position_per_token_numbered_through_the_batch() -> None:
    rows = [torch.tensor([1, -200, 5, -200, 7]), torch.tensor([2, 3]), torch.tensor([-200])]
    spliced = vila.splice_image_tokens(rows, [3, 3, 2], vocab_size=10)
    assert [row.tolist() for row in spliced] == [[1, -1, -2, -3, 5, -4, -5, -6, 7], [2, 3], [-7, -8]]
    labels = vila.splice_labels(rows, [torch.arange(5), torch.arange(2), torch.arange(1)], [3, 3, 2])
    assert [row.tolist() for row in labels] == [[0, *[-100] * 3, 2, *[-100] * 3, 4], [0, 1], [-100, -100]]


GOLDEN = {  # VILA's prepare_inputs_labels_for_multimodal, pictures of 3 positions, as it was run
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]],
}


@pytest.mark.parametrize("side", GOLDEN)
def test_unpadded_batch_has_layout_of_vila(side: str) -> None:
    ids, mask = torch.tensor([[1, -200, 5, 6], [1, 2, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    batch = unpad(ids, mask, None, None, [3], 10, padding_side=side)
    assert batch.mask.int().tolist() == GOLDEN[side]
    assert [row.tolist() for row in batch.rows] == [[1, -1, -2, -3, 5, 6], [1, 2]]


def test_unpad_truncates_beyond_max_length_with_a_warning() -> None:
    ids = torch.tensor([[1, -200, 5, 6], [1, 2, 3, 4]])
    with pytest.warns(UserWarning, match="Inputs truncated"):
        batch = unpad(ids, None, None, ids, [3], 10, max_length=4)
    assert [row.tolist() for row in batch.rows] == [[1, -1, -2, -3], [1, 2, 3, 4]]
    assert batch.labels and [len(row) for row in batch.labels] == [4, 4] and batch.mask.shape == (2, 4)


@pytest.mark.parametrize("bias", [False, True])
def test_int4_model_equals_model_with_dequantized_weights(bias: bool) -> None:
    quantization = {"quant_method": "vila-triton", "group_size": 16}
    model = build(llm={"quantization_config": quantization, "attention_bias": bias})
    twin = hf_reference.dense_twin(model)
    assert num_parameters(model.params) < num_parameters(twin.params)
    ids, images = torch.tensor([[1, 7, -200, 9]]), pictures(model, 1)
    torch.testing.assert_close(model(ids, images=images).logits, twin(ids, images=images).logits, rtol=0, atol=1e-9)


def test_gradients_of_every_part_equal_hugging_face() -> None:
    model = build(config(llm={"tie_word_embeddings": True}))
    oracle, images = Oracle.of(model), pictures(model, 2)
    rows = [[1, 7, -200, 9, 30], [1, -200, 5]]
    ids, mask = padded(rows)
    model(ids, attention_mask=mask, labels=ids, images=images).loss.backward()
    theirs, _ = oracle.run([torch.tensor(row) for row in rows], images)
    targets, _ = padded([spread(row, row) for row in rows], fill=-100)
    F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).backward()
    parts = {"llm": oracle.llm, "vision_tower": oracle.tower, "mm_projector": oracle.projector}
    for part, module in parts.items():
        for name, p in module.named_parameters():
            got = model.get_parameter(f"{part}.{name}").grad
            if p.grad is None:  # what lies behind the selected layer of the tower
                assert part == "vision_tower" and (got is None or not got.any()), name
            else:
                torch.testing.assert_close(got, p.grad, rtol=1e-7, atol=1e-10, msg=name)


@pytest.mark.parametrize("ids, invalid", [([1, -5, 3], -5), ([1, 10, 0], 10), ([3, -1, 12], -1)], ids=str)
def test_token_id_outside_of_the_vocabulary_is_named(ids: list[int], invalid: int) -> None:
    with pytest.raises(ValueError, match=f"token id {invalid} is not in the vocabulary of 10"):
        vila.splice_image_tokens([torch.tensor(ids)], [], vocab_size=10)


def test_token_0_beside_an_image_has_its_own_embedding() -> None:
    params, features = build().params, torch.randn(2, 32).double()
    embedded = vila.embed_spliced(params, torch.tensor([0, -1, 5, -2, 0]), features)
    text: Any = params.llm.embedding
    assert torch.equal(embedded, torch.stack((text[0], features[0], text[5], features[1], text[0])))
