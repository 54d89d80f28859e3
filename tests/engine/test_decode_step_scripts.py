"""The static step against the open loop, over scripts of answers that share a cache."""

import torch
from decode_scripts import Script, play, scripts
from hf_reference import build
from hypothesis import given

MODEL = build(dtype=torch.float32, seed=2, gain=2.0)


@given(scripts())
def test_static_steps_give_the_tokens_logits_and_pages_of_the_open_loop(script: Script) -> None:
    found, expected = play(MODEL, script), play(MODEL, script, opens=True)
    assert found.heard == expected.heard
    assert all(torch.equal(*pair) for pair in zip(found.logits, expected.logits, strict=True))
    assert found.contents.keys() == expected.contents.keys()
    for seq, tensors in found.contents.items():
        assert all(torch.equal(*pair) for pair in zip(tensors, expected.contents[seq], strict=True))
    assert found.free_pages == expected.free_pages
