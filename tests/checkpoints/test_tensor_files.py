"""Weight files: every format gives the same tensors, and damaged ones are refused with a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.models.params import LoadError

rng = torch.Generator().manual_seed(0)
HELD = {
    "a": torch.randn(3, 4, generator=rng),
    "b": torch.randn(5, 7, generator=rng).bfloat16(),
    "c": torch.arange(-3, 9, dtype=torch.int16),
    "d": torch.tensor(7),
    "e": torch.empty(0, 4, dtype=torch.float16),
    "f": torch.randn(2, 2, generator=rng).double(),
}
HALVES = {k: HELD[k] for k in "abc"}, {k: HELD[k] for k in "def"}


def index(folder: Path, whole: str, names: tuple[str, str]) -> None:
    weight_map = {k: name for name, half in zip(names, HALVES) for k in half}
    (folder / f"{whole}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def in_shards(folder: Path, save: Callable, whole: str, names: tuple[str, str]) -> None:
    for name, half in zip(names, HALVES):
        save(half, folder / name)
    index(folder, whole, names)


SHARDS = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
BINS = "pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"
CONTAINERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda folder: save_file(HELD, folder / "model.safetensors"),
    "shards": lambda folder: in_shards(folder, save_file, "model.safetensors", SHARDS),
    "bin": lambda folder: torch.save(HELD, folder / "pytorch_model.bin"),
    "bins": lambda folder: in_shards(folder, torch.save, "pytorch_model.bin", BINS),
    "pt": lambda folder: torch.save(HELD, folder / "llama-w4-g128-awq-v2.pt"),
}


@pytest.mark.parametrize("write", CONTAINERS.values(), ids=CONTAINERS)
def test_every_file_format_gives_the_same_tensors(write: Callable, tmp_path: Path) -> None:
    write(tmp_path)
    tensors = open_tensors(tmp_path)
    assert sorted(tensors) == sorted(tensors.meta) == sorted(HELD)
    for name, x in HELD.items():
        assert (tensors.meta[name].shape, tensors.meta[name].dtype) == (x.shape, x.dtype)
        assert torch.equal(tensors[name], x)
        tensors.release(name)


def test_views_and_parameters_saved_by_torch_are_read_from_their_storage(tmp_path: Path) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    views = {"t": x.T, "row": x[1], "every other": x[:, ::2], "p": torch.nn.Parameter(x.clone())}
    torch.save(views, tmp_path / "pytorch_model.bin")
    tensors = open_tensors(tmp_path / "pytorch_model.bin")
    assert all(torch.equal(tensors[name], y) for name, y in views.items())


def test_unaligned_and_released_tensors_are_read(tmp_path: Path) -> None:
    big = torch.randn(9000, generator=rng)
    header = b'{"x":{"dtype":"F32","shape":[9000],"data_offsets":[0,36000]}}'
    header += b" " * (-len(header) % 8 + 1)  # one more than writers pad
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + big.numpy().tobytes())
    assert torch.equal(open_tensors(tmp_path)["x"], big)
    save_file({"x": big}, tmp_path / "model.safetensors")
    tensors = open_tensors(tmp_path)
    x = tensors["x"]
    assert torch.equal(x, big)
    tensors.release("x")
    assert torch.equal(x, big)


class Code:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("/tmp/code-of-a-checkpoint-ran"),))


def cut(file: Path, by: int = 2) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // by])


def twice(folder: Path) -> None:
    header = (
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def after(write: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        CONTAINERS[write](folder)
        change(folder)

    return broken


def repeat(folder: Path) -> None:
    CONTAINERS["shards"](folder)
    save_file(HELD, folder / SHARDS[1])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (
        lambda folder: None,
        r"weights do not exist there. Expected model.safetensors, pytorch_model.bin .*.pt",
    ),
    "a bin cut short": (after("bin", lambda f: cut(f / "pytorch_model.bin")), "pytorch_model.bin is not a whole file"),
    "a pt cut to nothing": (after("bin", lambda f: cut(f / "pytorch_model.bin", 10**6)), "is not a whole file of"),
    "shards without an index": (
        after("shards", lambda f: (f / "model.safetensors.index.json").unlink()),
        "there is model-1-of-2.safetensors, but no index",
    ),
    "a shard that is missing": (
        after("shards", lambda f: (f / SHARDS[1]).unlink()),
        f"{SHARDS[1]} does not exist.*get",
    ),
    "a shard cut short": (after("bins", lambda f: cut(f / BINS[0])), f"{BINS[0]} is not a whole file of torch.save"),
    "a shard of other tensors": (
        after("shards", lambda f: save_file({"x": HELD["a"]}, f / SHARDS[1])),
        f"index says that d is in {SHARDS[1]}, but it is not",
    ),
    "a name in two shards": (repeat, f"a is in .*{SHARDS[1]} and in .*{SHARDS[0]}; one of them must go"),
    "a name twice in one file": (twice, "model.safetensors.*'x' twice|model.safetensors.*duplicate"),
    "an index that repeats a name": (
        after("shards", lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map":{"a":"x","a":"y"}}')),
        "'a' twice",
    ),
    "code": (
        lambda f: torch.save({"a": Code()}, f / "pytorch_model.bin"),
        "more than tensors. Python code .* never run",
    ),
    "no state dict": (lambda f: torch.save({"model": HELD}, f / "pytorch_model.bin"), "does not hold a state dict"),
    "a pt of long ago": (
        lambda f: torch.save(HELD, f / "pytorch_model.bin", _use_new_zipfile_serialization=False),
        "from before 1.6; load and save it again",
    ),
    "two pts": (
        lambda f: [torch.save(HELD, f / name) for name in ("a.pt", "b.pt")],
        "holds a.pt, b.pt. Expected .* give the file's own path",
    ),
    "weights of two kinds": (
        after("safetensors", lambda f: torch.save(HELD, f / "a.pt")),
        "as model.safetensors and as a.pt; move one",
    ),
    "a dtype of tomorrow": (
        lambda f: save_file({"a": torch.zeros(4, dtype=torch.float8_e5m2)}, f / "model.safetensors"),
        "a is F8_E5M2; known are F64",
    ),
}


@pytest.mark.parametrize("damage, message", BROKEN.values(), ids=BROKEN)
def test_damaged_weight_files_are_refused_with_a_reason(damage: Callable, message: str, tmp_path: Path) -> None:
    damage(tmp_path)
    with pytest.raises(LoadError, match=message) as error:
        open_tensors(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not Path("/tmp/code-of-a-checkpoint-ran").exists()


def test_safetensors_are_preferred_to_bin(tmp_path: Path) -> None:
    CONTAINERS["bin"](tmp_path)
    save_file({"only": HELD["a"]}, tmp_path / "model.safetensors")
    assert list(open_tensors(tmp_path)) == ["only"]


def test_two_readers_of_a_tensor_share_memory(tmp_path: Path) -> None:
    """Nothing was copied."""
    CONTAINERS["safetensors"](tmp_path)
    tensors = open_tensors(tmp_path)
    x: Tensor = tensors["a"]
    assert x.data_ptr() == tensors["a"].data_ptr()
