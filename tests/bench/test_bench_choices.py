"""`bench.choices`: the cost model's seconds of each implementation by the size that varies, beside what is chosen."""

import re

import pytest

from bench import choices
from bench.measure.cases import cases
from bench.tuner.cost_model import LAUNCH_SECONDS, known_gpus, predict_seconds
from vila_triton.registry import OPS


def test_many_rows_are_dequantized_from_where_the_model_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = "--impl prefill dequant --gpu H100 A100 --rows 256 2048 8192"
    assert choices.main(["int4_matmul", *options.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [re.match(r"m=(\d+) +([\d.]+)(.) +([\d.]+)(.) +(\w+)", line) for line in lines]
    rows = [x.groups() for x in found if x]
    assert [(int(m), star == "*", chosen) for m, _, _, _, star, chosen in rows] == 2 * [
        (256, False, "prefill"), (2048, True, "dequant"), (8192, True, "dequant")
    ]  # fmt: skip
    assert lines[0].startswith("NVIDIA H100") and "dequant" in lines[0]


def test_a_prediction_is_the_sum_over_the_shapes_with_the_config_of_the_gpu() -> None:
    gpu, impl = known_gpus()["H100"], OPS["int4_matmul"].impls["prefill"]
    all_sizes = [dict(x.sizes) for x in cases("int4_matmul", "prefill") if x.sizes["m"] == 1024]
    each = [predict_seconds(impl, impl.default_config("sm_90", 1024), sizes, gpu) for sizes in all_sizes]
    assert choices.total_seconds("int4_matmul", "prefill", all_sizes, gpu) == sum(x or 0 for x in each)


def test_a_librarys_product_takes_a_launch_and_its_flops() -> None:
    gpu, impl = known_gpus()["H100"], OPS["int4_matmul"].impls["dequant"]
    sizes = dict(n=4096, G=32, group=128, dtype="float16", order="sub", bias=False, residual=False)
    few, many = (predict_seconds(impl, impl.configs[0], {**sizes, "m": m}, gpu) or 0 for m in (8192, 16384))
    assert many - few == pytest.approx(2 * 8192 * 4096 * 4096 / gpu.dot_rate)
    assert few > 2 * LAUNCH_SECONDS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("int4_matmul --gpu H1000", "no GPU 'H1000' in configs/bench/chips.toml; there are: A100"),
        ("int4_matmul --impl naive", "no cost of a launch is declared for 'naive'"),
        ("int4 --gpu H100", "no op 'int4'; there are:"),
    ],
)
def test_what_is_not_there_is_named(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert choices.main(arguments.split()) == 2
    assert message in capsys.readouterr().err
