"""`vila-triton convert` and `build`: the bundled model answers alike in every layout, and failures leave nothing."""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from vila_triton import VilaLlamaForCausalLM
from vila_triton.__main__ import main
from vila_triton.checkpoints.loading import open_checkpoint
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.checkpoints.writing import FORMATS, write_checkpoint
from vila_triton.commands import build, convert
from vila_triton.models.params import LoadError

TINY = Path(__file__).parents[2] / "vila_triton" / "tiny"
INT4 = TINY / "checkpoint-int4"


def command(*argv: object) -> None:
    """Run a command line in this process."""
    parser = argparse.ArgumentParser()
    into = parser.add_subparsers(required=True)
    convert.configure(into)
    build.configure(into)
    args = parser.parse_args([str(word) for word in argv])
    args.run(args)


def ask(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    """The answer of `vila-triton ask`, without its line of statistics."""
    capsys.readouterr()
    image, question = TINY / "examples" / "a.png", "How many blue shapes are there?"
    argv = ["ask", "--model", model, "--device", "cpu", "--max-new-tokens", 8, "--image", image, question]
    monkeypatch.setattr(sys, "argv", ["vila-triton", *map(str, argv)])
    status, (out, err) = main(), capsys.readouterr()
    assert status == 0, err
    assert err.startswith("[prompt ")
    return out.strip()


@pytest.mark.parametrize("form", FORMATS)
def test_converted_layouts_give_the_same_answer(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command("convert", INT4, tmp_path / form, "--format", form, "--shard-size", 0.001)
    assert f"as {form}" in capsys.readouterr().out
    assert ask(tmp_path / form, monkeypatch, capsys) == "2"


def test_bin_checkpoints_give_the_same_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(TINY / "checkpoint", tmp_path / "x")
    for part in ("llm", "vision_tower", "mm_projector"):
        file = tmp_path / "x" / part / "model.safetensors"
        torch.save(dict(open_tensors(file)), file.with_name("pytorch_model.bin"))
        file.unlink()
    assert ask(tmp_path / "x", monkeypatch, capsys) == "2"


def test_dry_run_prints_sizes_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command("convert", INT4, tmp_path / "x", "--format", "awq-v2", "--dry-run")
    command("build", "vila1.5-40b", tmp_path / "y", "--dry-run")
    out = capsys.readouterr().out
    assert "int4 linears (vila-triton, groups of 64)" in out and "fp16: 80.1 GB\nint4, groups of 128: 31 GB" in out
    assert not list(tmp_path.iterdir())


def test_killed_conversion_resumes(tmp_path: Path) -> None:
    """Killed three times, it ends with the files of an uninterrupted conversion and nothing else."""
    source = open_checkpoint(INT4)
    for form in ("awq-v2", "awq-gemm"):
        write_checkpoint(source, tmp_path / "whole" / form, form, max_shard_bytes=10**5)
        target = tmp_path / "killed" / form
        for share in (0.3, 0.6, 0.9):
            if not (child := os.fork()):

                def die(done: int, total: int, share: float = share) -> None:
                    if done > share * total:
                        os.kill(os.getpid(), signal.SIGKILL)

                write_checkpoint(source, target, form, max_shard_bytes=10**5, progress=die)
            assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
            assert not target.exists()
        steps: list[int] = []
        write_checkpoint(
            source, target, form, max_shard_bytes=10**5, progress=lambda done, total, to=steps.append: to(done)
        )
        assert steps[0] > 0.5 * steps[-1]  # most was kept
        assert files(target) == files(tmp_path / "whole" / form)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"awq-v2", "awq-gemm"}


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_failed_conversion_leaves_nothing(tmp_path: Path) -> None:
    out, source = tmp_path / "out", tmp_path / "source"
    with pytest.raises(ValueError, match="is not int4, so it cannot be written as awq-v2; quantize it first"):
        command("convert", TINY / "checkpoint", out, "--format", "awq-v2")
    shutil.copytree(INT4, source)
    tensors = {name: x.clone() for name, x in open_tensors(source / "llm").items()}
    name = "model.layers.3.mlp.down_proj"
    for change, error, message in (
        ({f"{name}.zeros": tensors[f"{name}.zeros"] + 0.5}, LoadError, f"{name}: its zeros are not all whole numbers"),
        ({f"{name}.zeros": tensors[f"{name}.zeros"][:1]}, LoadError, f"{name}: .* groups of 64 are not one weight"),
        ({"model.norm.weight": tensors["model.norm.weight"][:3]}, LoadError, r"misshapen   model.norm.weight \[3\]"),
    ):
        save_file(tensors | change, source / "llm/model.safetensors")
        with pytest.raises(error, match=message):
            command("convert", source, out, "--format", "awq-gemm")
        assert not out.exists() and {path.name for path in tmp_path.iterdir()} == {"source"}
    with pytest.raises(ValueError, match=r"source is there already and not empty; give another folder"):
        command("convert", INT4, source)
    for argv, message in (
        (("build", "vila2", out), "no model 'vila2'; there are: .*vila1.5-13b"),
        (("build", "llama-2-7b", out), "has no vision_tower, mm_projector: it is no VILA"),
        (("build", "vila1.5-3b", out, "--width-divisor", 7), "2560 numbers in 20 heads cannot be divided by 7"),
        (("build", "vila1.5-3b", out, "--int4", 48), "k = 2560 and group_size = 48"),
    ):
        with pytest.raises(ValueError, match=message):
            command(*argv)
    assert not out.exists()


def test_build_is_determined_by_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        command(
            "build", "vila1.5-3b", tmp_path / name, "--layers", 1, "--width-divisor", 8, "--seed", seed, "--int4", 64
        )
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and a["llm/model.safetensors"] != c["llm/model.safetensors"]
    model = VilaLlamaForCausalLM.from_pretrained(tmp_path / "a", device="cpu")
    assert model.vila_config.llm.num_hidden_layers == 1 and model.vila_config.llm.group_size == 64


@pytest.mark.parametrize("layers, narrow", [(1, 8), (1, 1)])
def test_build_prints_the_int4_size_of_any_width(layers: int, narrow: int, tmp_path: Path, capsys: Any) -> None:
    command("build", "vila1.5-3b", tmp_path / "x", "--layers", layers, "--width-divisor", narrow, "--dry-run")
    assert f"int4, groups of {64 if narrow == 8 else 128}: " in capsys.readouterr().out


def test_system_error_is_printed_as_a_sentence(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (file := tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["vila-triton", "convert", str(INT4), str(file / "x")])
    assert main() == 1 and "Not a directory" in capsys.readouterr().err


def test_saving_onto_a_file_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (file := tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        write_checkpoint(open_checkpoint(INT4), file, overwrite=True)
    assert list(tmp_path.iterdir()) == [file]
