"""Replayed steps, run one ahead of what is read, against the open loop, over scripts of answers that share a cache."""

from copy import deepcopy
from typing import Any

import torch
from decode_scripts import Script, play, scripts
from hf_reference import build
from hypothesis import given
from test_decode_graphs import KERNELS, capturable  # noqa: F401 (a fixture)

from bench import standin
from vila_triton.registry import use

MODEL = build(seed=2, gain=2.0)  # in float64: rows of a bucket differ in the last bits from rows alone
GPU: Any = deepcopy(MODEL).cuda() if standin.is_active() else MODEL  # pyright: ignore[reportCallIssue]


@given(scripts(on_gpu=True))
def test_replayed_steps_give_the_tokens_and_pages_of_the_open_loop(script: Script) -> None:
    with use(**KERNELS["cuda"]):
        found = play(GPU, script)
    with use(**KERNELS["cpu"]):
        expected = play(MODEL, script, opens=True)
    assert found.heard == expected.heard
    assert found.contents.keys() == expected.contents.keys()
    for seq, tensors in found.contents.items():
        for ours, theirs in zip(tensors, expected.contents[seq], strict=True):
            torch.testing.assert_close(ours, theirs)
    assert found.free_pages == expected.free_pages
