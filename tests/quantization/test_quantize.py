"""`vila-triton quantize`: killed and resumed, in every layout, and options that are refused."""

import argparse
import json
import os
import random
import shutil
import signal
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vila_triton.checkpoints.loading import (
    check_checkpoint,
    load_params,
    open_checkpoint,
    read_configs,
    save_checkpoint,
)
from vila_triton.checkpoints.writing import write_checkpoint
from vila_triton.commands import quantize
from vila_triton.models import llama, vila
from vila_triton.models.params import init_tree, leaves
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.quantization import pipeline as awq
from vila_triton.quantization import resumable as folder
from vila_triton.quantization.calibration_data import CalibrationSet, Sample, read_samples
from vila_triton.quantization.config import QuantizeConfig
from vila_triton.tiny.config import CONFIG, PARAM_SPECS, config_files

SHALLOW = replace(CONFIG, llm=replace(CONFIG.llm, num_hidden_layers=2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled geometry, two layers deep, with random weights in float16."""
    folder = tmp_path_factory.mktemp("source") / "vila"
    rng = torch.Generator().manual_seed(0)
    save_checkpoint(
        folder,
        *config_files(SHALLOW),
        vila.Vila(**{n: init_tree(f(getattr(SHALLOW, n), torch.float16), rng) for n, f in PARAM_SPECS.items()}),
    )
    return folder


def calibration_set() -> CalibrationSet:
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 128, (n,), generator=rng) for n in (40, 25, 300, 200)]
    rows[0][3:19] = -1 - torch.arange(16)
    return CalibrationSet(rows, torch.randn(1, 3, 64, 64, generator=rng))


def quantize_to(source: Path, target: Path, config: QuantizeConfig, form: str = "vila-triton") -> None:
    work = target.with_name(f"{target.name}.quantizing")
    write_checkpoint(
        awq.quantize_checkpoint(open_checkpoint(source), work, config, calibration_set(), torch.device("cpu")),
        target,
        form,
        source_key="test",
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_quantize_killed_five_times_writes_the_same_bytes(source: Path, tmp_path: Path) -> None:
    config, rng = QuantizeConfig(group_size=64, extra_parts=("vision_tower", "mm_projector")), random.Random(0)
    start = time.monotonic()
    quantize_to(source, tmp_path / "whole", config)
    took, killed, done = time.monotonic() - start, 0, set[int]()
    for _ in range(5):
        child = os.fork()
        if not child:
            try:
                quantize_to(source, tmp_path / "broken", config)
            finally:
                os._exit(0)
        time.sleep(rng.uniform(0.1, 0.7) * took)
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        done.add(len(list((tmp_path / "broken.quantizing").glob("[!i]*.safetensors"))))  # but for inputs
    assert killed and len(done) > 1, "nothing was interrupted"
    if not (tmp_path / "broken").exists():
        quantize_to(source, tmp_path / "broken", config)
    assert contents(tmp_path / "broken") == contents(tmp_path / "whole")
    with pytest.raises(ValueError, match="holds the beginnings of other work"):
        awq.quantize_checkpoint(
            open_checkpoint(source),
            tmp_path / "broken.quantizing",
            QuantizeConfig(group_size=32),
            calibration_set(),
            torch.device("cpu"),
        )


def logits(folder: Path, ids: Tensor) -> Tensor:
    from vila_triton.cache.paged_cache import UncachedBatch
    from vila_triton.checkpoints.loading import build_vila_config

    cfg = build_vila_config(*read_configs(folder))
    p = load_params(folder, cfg, torch.float32).llm
    cache = UncachedBatch([len(ids)], ids.device)
    return llama.logits(p, llama.forward(p, llama.embed(p, ids), cache.positions, cfg.llm, cache))


@torch.no_grad()
def test_every_output_format_holds_the_same_model(source: Path, tmp_path: Path) -> None:
    ids = torch.randint(0, 128, (50,), generator=torch.Generator().manual_seed(2))
    work, config = tmp_path / "work", QuantizeConfig(group_size=64, propagate_error=False)
    rounded = awq.quantize_checkpoint(open_checkpoint(source), work, config, calibration_set(), torch.device("cpu"))
    for form in quantize.INT4_FORMATS:
        write_checkpoint(rounded, tmp_path / form, form, source_key="test")
    expected = logits(tmp_path / "vila-triton", ids)
    assert not torch.equal(expected, logits(source, ids))
    for form in quantize.INT4_FORMATS:
        assert torch.equal(logits(tmp_path / form, ids), expected)


def command(*argv: object) -> None:
    parser = argparse.ArgumentParser()
    quantize.configure(parser.add_subparsers())
    args = parser.parse_args(["quantize", *map(str, argv)])
    args.run(args)


def test_quantize_command_writes_a_report_and_a_plot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    extra = ("--extra-parts", "vision_tower", "mm_projector")
    command(BUNDLED_CHECKPOINT, tmp_path / "out", "--samples", 8, "--group-size", 64, "--format", "awq-gemm", *extra)
    assert "8 questions about synthetic images" in capsys.readouterr().out
    assert not (tmp_path / "out.quantizing").exists()
    quant_report = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert quant_report["group_size"] == 64 and len(quant_report["layers"]) == 4
    for layer in quant_report["layers"]:
        assert set(layer["scales"]) == {"attention", "o", "mlp", "down"}
        assert all(linear["error"] < linear["rtn_error"] for linear in layer["linears"].values())
    assert len(quant_report["vision_tower"]) == 5 and len(quant_report["mm_projector"]) == 1
    assert len(ET.parse(tmp_path / "out" / "quantization.svg").findall(".//{*}polyline")) == 4 + 3 * 7 + 2 * 6 + 2 * 2
    assert open_checkpoint(tmp_path / "out").group_size() == 64
    with pytest.raises(ValueError, match="is there already and not empty"):
        command(BUNDLED_CHECKPOINT, tmp_path / "out")
    with pytest.raises(ValueError, match="is int4 already"):
        command(tmp_path / "out", tmp_path / "again")


def test_rtn_checkpoint_equals_the_models_own_rounding(source: Path, tmp_path: Path) -> None:
    command(source, tmp_path / "out", "--method", "rtn", "--group-size", 32)
    cfg = check_checkpoint(open_checkpoint(source))
    expected = llama.quantize_linears_rtn(load_params(source, cfg, torch.float16).llm, 32)
    from vila_triton.checkpoints.loading import build_vila_config

    loaded = load_params(tmp_path / "out", build_vila_config(*read_configs(tmp_path / "out")), torch.float16).llm
    assert all(torch.equal(a, b) for a, b in zip(leaves(loaded), leaves(expected), strict=True))


def test_llm_awq_cache_replaces_the_search(tmp_path: Path) -> None:
    for name, more in (("searched", ()), ("given", ("--awq-cache", tmp_path / "searched" / "awq_cache.pt"))):
        command(BUNDLED_CHECKPOINT, tmp_path / name, "--method", "llm-awq", "--samples", 16, "--group-size", 64, *more)
    a, b = (contents(tmp_path / name / "llm") for name in ("searched", "given"))
    assert a == b


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--method", "llm-awq", "--image-weight", "0.5"), "llm-awq's objective weighs all tokens alike"),
        (("--awq-cache", "x.pt"), "--awq-cache holds what llm-awq's search finds"),
        (
            ("--method", "llm-awq", "--samples", "2"),
            r"llm-awq's clipping needs 512 tokens of calibration, there are \d+",
        ),
        (("--method", "llm-awq", "--no-error-propagation"), "--no-error-propagation would do nothing"),
        (
            ("--method", "rtn", "--samples", "3", "--no-error-propagation"),
            "--samples, --no-error-propagation would do nothing",
        ),
        (("--device", "tpu9"), "device 'tpu9' is not to be had here"),
    ],
)
def test_impossible_options_are_refused_and_leave_nothing(argv: Sequence[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        command(BUNDLED_CHECKPOINT, tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.quantizing").exists()


def test_work_folder_and_target_of_other_work_are_refused(source: Path, tmp_path: Path) -> None:
    """Neither a finished folder nor the work folder of another model is taken for that of this command."""
    out, work = tmp_path / "out", tmp_path / "out.quantizing"
    begun = ("--group-size", 64, "--samples", 4)
    awq.quantize_checkpoint(
        open_checkpoint(source), work, QuantizeConfig(group_size=64), calibration_set(), torch.device("cpu")
    )
    with pytest.raises(ValueError, match=r"out\.quantizing holds the beginnings of other work"):
        command(source, out, "--method", "rtn")
    shutil.move(work, tmp_path / "aside")
    command(source, out, "--method", "rtn")
    before = contents(out)
    shutil.move(tmp_path / "aside", work)
    with pytest.raises(ValueError, match="is there already and not empty"):
        command(source, out, *begun)
    assert contents(out) == before and work.exists()

    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    awq.quantize_checkpoint(
        open_checkpoint(copy), tmp_path / "work", QuantizeConfig(group_size=64), calibration_set(), torch.device("cpu")
    )
    top = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(top | {"mm_vision_select_layer": -1}))
    with pytest.raises(ValueError, match="holds the beginnings of other work"):
        awq.quantize_checkpoint(
            open_checkpoint(copy),
            tmp_path / "work",
            QuantizeConfig(group_size=64),
            calibration_set(),
            torch.device("cpu"),
        )


def test_kill_after_writing_leaves_only_cleanup(tmp_path: Path) -> None:
    argv = (BUNDLED_CHECKPOINT, tmp_path / "out", "--samples", 4, "--group-size", 64)
    finish, folder.remove_work_folder = folder.remove_work_folder, lambda work: None
    try:
        command(*argv)
    finally:
        folder.remove_work_folder = finish
    before = contents(tmp_path / "out")
    assert (tmp_path / "out.quantizing").exists()
    with pytest.raises(ValueError, match="is there already and not empty"):
        command(*argv, "--format", "awq-gemm")
    command(*argv)
    assert contents(tmp_path / "out") == before and not (tmp_path / "out.quantizing").exists()


def test_broken_layer_is_named(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    p = vila.Vila(**{n: init_tree(f(getattr(SHALLOW, n), torch.float16), rng) for n, f in PARAM_SPECS.items()})
    p.llm.layers[1].up.weight[3, 5] = torch.nan
    save_checkpoint(tmp_path / "source", *config_files(SHALLOW), p)
    with pytest.raises(ValueError, match=r"model\.layers\.1: .*NaN or infinit"):
        awq.quantize_checkpoint(
            open_checkpoint(tmp_path / "source"),
            tmp_path / "work",
            QuantizeConfig(),
            calibration_set(),
            torch.device("cpu"),
        )


def test_calibration_files_are_read_or_refused_by_line(tmp_path: Path) -> None:
    text, pairs = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("one line\n\nanother\n")
    example = BUNDLED_CHECKPOINT.with_name("examples") / "a.png"
    pairs.write_text(json.dumps({"text": "x"}) + "\n" + json.dumps({"image": str(example), "question": "Why?"}))
    loaded = list(read_samples([text, pairs]))
    assert loaded[:3] == [Sample("one line"), Sample("another"), Sample("x")]
    assert loaded[3] == Sample("Why?", [example])
    for line, message in (
        ("{", "b.jsonl:1: expected"),
        ('{"image": "x.png"}', r"has image"),
        ('["text"]', r"b.jsonl:1: expected .* \(has list\)"),
        ('{"text": null}', "b.jsonl:1: expected .*, all of them strings"),
        ('{"image": 5, "question": "x"}', "all of them strings"),
        ('{"image": [], "question": "x"}', "for images a list of strings"),
        ('{"image": "a.png", "question": "x", "answer": null}', "all of them strings"),
        ('{"image": "nowhere.png", "question": "x"}', r"b.jsonl:1: .*nowhere.png does not exist"),
    ):
        pairs.write_text(line)
        with pytest.raises(ValueError, match=message):
            list(read_samples([pairs]))
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"a.txt: not text in UTF-8"):
        list(read_samples([text]))
