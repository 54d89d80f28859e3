"""Predicted times of an op at its cases: one launch, no faster than memory."""

from bench import predict
from bench.measure import token_time
from bench.measure.cases import cases


def test_decoding_is_one_launch_within_the_bandwidth() -> None:
    on = token_time.gpu("H100")
    lines, share = predict.case_rows(cases("decode_attention", "kernelbench_hard")[0], on)
    assert [line[2] for line in lines] == ["_decode_attention_kernel"]
    assert 0.3 < share < on.read / on.bandwidth
