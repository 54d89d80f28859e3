"""The cost of a decoded token: a launch or a wait more than there were is seen here, on no GPU."""

from collections import Counter

import pytest
import torch

from bench import decode_budget
from bench.measure import decode_step, launch_work, token_time
from bench.standin.device import WAITING
from vila_triton.models.config import LlamaConfig

LAUNCHES_A_LAYER = 8  # norm, qkv, rope and write, attention, o, norm, swiglu, down
LAUNCHES_BESIDE = 1 + 32  # the last norm; the head, and operators of torch for places, angles and the next token
CFG = LlamaConfig.from_dict(
    {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 128,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 1024,
        "quantization_config": {"quant_method": "vila-triton", "group_size": 128},
    }
)


@pytest.fixture(scope="module")
def calls() -> list[decode_step.Call]:
    """The launches of a token of a small int4 model."""
    return decode_step.launches(CFG, torch.bfloat16, 1, 64, "sm_90")


def test_a_token_has_no_more_launches_than_it_had(calls: list[decode_step.Call]) -> None:
    layers = [call for call in calls if call.launch]
    counts = Counter(call.kernel for call in layers)
    assert len(layers) <= LAUNCHES_A_LAYER * 2 + 1, counts
    assert len(calls) <= LAUNCHES_A_LAYER * 2 + LAUNCHES_BESIDE, [call.kernel for call in calls if not call.launch]
    assert not [call.kernel for call in calls if call.kernel in WAITING]


def test_kernels_have_a_time_and_a_limit(calls: list[decode_step.Call]) -> None:
    on, qkv = token_time.gpu("H100"), next(call for call in calls if call.op == "int4_matmul")
    some = [next(call for call in calls if call.op == op) for op in ("", "rms_norm", "linear")] + [qkv]
    found = decode_budget.kernel_rows(some, on)
    assert [row.count for row in found] == [1] * 4
    for row in found:
        assert 2 * on.latency <= row.seconds < 1e-4 and row.limit in ("memory", "L2", "flight", "issue", "latency")
    assert launch_work.work_of(qkv).issued >= 256 * 512 / launch_work.WARP  # one instruction a weight at least


def test_a_longer_kernel_takes_longer() -> None:
    """Bytes, loads, instructions and fewer bytes in flight, each on its own."""
    on, work = token_time.gpu("A100"), token_time.Work(1000, 1e8, 1e8, 1e5, 1e6)
    base = token_time.predict(work, on)
    assert base.limit == "memory" and base.seconds == pytest.approx(1e8 / on.read + 2 * on.latency)
    for change, limit in (({"loaded_bytes": 1e9}, "L2"), ({"issued": 1e9}, "issue"), ({"in_flight": 100}, "flight")):
        changed = token_time.predict(token_time.Work(**{**vars(work), **change}), on)
        assert changed.seconds > 2 * base.seconds and changed.limit == limit


def test_published_rows_have_the_constants_errors() -> None:
    """The constants were published before the kernels they time: whoever changes one has to change these lines too."""
    found = {row["name"]: round(error, 2) for row, _, error in token_time.errors()}
    assert found == {
        "Marlin 8192 x 8192, m = 1": -0.53,
        "Marlin 8192 x 16384, m = 1": -0.52,
        "Marlin 7168 x 20480, m = 1": -0.51,
        "Marlin 8192 x 81920, m = 1": -0.36,
        "W4A8, grouped, large": 0.46,
        "W4A8 by DP4A, large layers": 0.0,
    }


def test_the_times_of_python_are_those_of_all_layers() -> None:
    assert 0 < decode_step.graph_seconds(CFG, 32, 3) < decode_step.python_seconds(CFG, 1, 32, "sm_90", 3)
