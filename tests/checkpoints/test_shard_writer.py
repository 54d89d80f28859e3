"""The shard writer: bytes depend on the tensors only, and no kill or error leaves what looks whole."""

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vila_triton.checkpoints.atomic_folder import atomic_folder
from vila_triton.checkpoints.shard_writer import ShardWriter
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.files.file_locks import FolderInUseError

DTYPES = (torch.float16, torch.int32, torch.float64, torch.int16)


def random_tensors(sizes: list[int]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(len(sizes))
    draw = (torch.randint(-99, 99, (n, 3), generator=rng) for n in sizes)
    return {f"t{i}": x.to(DTYPES[i % 4]) for i, x in enumerate(draw)}


def write(
    folder: Path, tensors: dict[str, Tensor], limit: int, key: str = "", order: list[str] | None = None
) -> set[str]:
    """Write the missing tensors and return their names."""
    shards = ShardWriter(folder, {name: x.to("meta") for name, x in tensors.items()}, key, limit)
    missing = set(shards.missing)
    for name in order or tensors:
        if name in missing:
            shards.write_tensor(name, tensors[name])
    shards.close()
    return missing


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 2000), st.randoms())
def test_tensors_written_in_any_order_read_back_equal(tmp_path_factory, sizes, limit, random) -> None:
    tensors, folders = random_tensors(sizes), []
    for _ in range(2):
        order = list(tensors)
        random.shuffle(order)
        folders.append(tmp_path_factory.mktemp("shards"))
        write(folders[-1], tensors, limit, order=order)
        read = open_tensors(folders[-1])
        assert sorted(read) == sorted(tensors) and all(torch.equal(read[name], x) for name, x in tensors.items())
        for file in folders[-1].glob("*.safetensors"):
            sizes_of = [x.nbytes for x in open_tensors(file).meta.values()]
            assert len(sizes_of) == 1 or sum(sizes_of) <= limit
    assert contents(folders[0]) == contents(folders[1])


TENSORS = random_tensors([40, 0, 30, 7, 20, 50, 8])


def test_killed_writer_resumes_and_writes_the_same_bytes(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "whole") as folder:
        write(folder / "llm", TENSORS, 400)
    target = tmp_path / "killed"
    for puts in (1, 2, 3):  # three processes, each killed after so many tensors
        if not (child := os.fork()):
            with atomic_folder(target) as folder:
                shards = ShardWriter(folder / "llm", TENSORS, max_shard_bytes=400)
                for name in [name for name in TENSORS if name in shards.missing][:puts]:
                    shards.write_tensor(name, TENSORS[name])
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert not target.exists()
    with atomic_folder(target) as folder:
        assert 0 < len(write(folder / "llm", TENSORS, 400)) < len(TENSORS)
    assert contents(target) == contents(tmp_path / "whole")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["killed", "whole"]


def interrupted(target: Path) -> Path:
    """A folder left by an interrupt, with two of its shards whole."""
    with pytest.raises(KeyboardInterrupt, match=r"What was finished is in .*partial"), atomic_folder(target) as folder:
        shards = ShardWriter(folder, TENSORS, "a", 400)
        for name in list(TENSORS)[:4]:
            shards.write_tensor(name, TENSORS[name])
        raise KeyboardInterrupt
    return target.with_name(f"{target.name}.partial")


def test_damaged_finished_shard_is_written_again(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "x")
    shard, *others = sorted(partial.glob("*.safetensors"))
    damaged = set(open_tensors(shard))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    again = write(partial, TENSORS, 400, "a")
    assert damaged < again and not again & set(open_tensors(others[0]))
    assert all(torch.equal(open_tensors(partial)[name], x) for name, x in TENSORS.items())


def test_partial_folder_of_other_work_is_refused(tmp_path: Path) -> None:
    partial = interrupted(tmp_path / "x")
    before = contents(partial)
    for tensors, limit, key in ((TENSORS, 400, "b"), (TENSORS, 2000, "a"), (random_tensors([40]), 400, "a")):
        with pytest.raises(ValueError, match=r"x.partial holds the beginnings of other work; remove it"):
            ShardWriter(partial, tensors, key, limit)
    with pytest.raises(FolderInUseError), atomic_folder(tmp_path / "x") as folder:
        ShardWriter(folder, TENSORS, "b", 400)
    assert contents(partial) == before


def test_folder_without_tensors_is_written(tmp_path: Path) -> None:
    """A projector that is the identity has none."""
    for _ in range(2):  # the second time over the first
        ShardWriter(tmp_path / "x", {}).close()
        assert not open_tensors(tmp_path / "x").meta


def test_errors_leave_nothing_and_existing_folders_are_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with pytest.raises(ZeroDivisionError), atomic_folder(target) as folder:
        write(folder, TENSORS, 400)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    target.mkdir()
    with atomic_folder(target) as folder:  # an empty folder is fine
        write(folder, TENSORS, 400)
    with pytest.raises(ValueError, match="x is there already and not empty"), atomic_folder(target):
        pass
    with (
        pytest.raises(OSError, match=r"No space left.*What was finished is in .*y.partial"),
        atomic_folder(tmp_path / "y"),
    ):
        raise OSError(28, "No space left on device")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):  # what begins afresh keeps nothing
        with pytest.raises(type(error)) as raised, atomic_folder(tmp_path / "z", overwrite=True):
            raise error
        assert raised.value is error
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x", "y.partial"]


def test_tensors_that_were_not_announced_are_refused(tmp_path: Path) -> None:
    shards = ShardWriter(tmp_path, TENSORS)
    with pytest.raises(ValueError, match=r"t0 is torch.float32 \[40, 3\], but torch.float16 \[40, 3\] was announced"):
        shards.write_tensor("t0", TENSORS["t0"].float())
    shards.write_tensor("t0", TENSORS["t0"])
    with pytest.raises(ValueError, match="t0 has been written already"):
        shards.write_tensor("t0", TENSORS["t0"])
    with pytest.raises(ValueError, match="6 tensors were not written, among them t1"):
        shards.close()
    with pytest.raises(ValueError, match=r"x is torch\.complex64, which is not written"):
        ShardWriter(tmp_path / "other", {"x": torch.zeros(1, dtype=torch.complex64)})
