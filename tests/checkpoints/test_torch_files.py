"""Files of torch.save, and zips that other tools made of them: read as torch reads them, or refused in one sentence."""

import io
import random
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.files.reading import LoadError

RNG = torch.Generator().manual_seed(0)
BASE = torch.randn(6, 8, generator=RNG)
TENSORS: dict[str, Tensor] = {
    "a": torch.randn(3, 4, generator=RNG),
    "half": torch.randn(5, 7, generator=RNG).half(),
    "bfloat16": torch.randn(3, 3, generator=RNG).bfloat16(),
    "double": torch.randn(2, 2, generator=RNG).double(),
    "int16": torch.arange(-3, 9, dtype=torch.int16),
    "int64": torch.tensor(1 << 40),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "nothing": torch.empty(0, 4),
    "turned": BASE.T,
    "row": BASE[2],
    "every other": BASE[::2, 1::3],
    "parameter": torch.nn.Parameter(torch.randn(2, generator=RNG)),
}


def saved(content: Any = TENSORS, **options: Any) -> bytes:
    torch.save(content, file := io.BytesIO(), **options)
    return file.getvalue()


def entries(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def zipped(
    entries_by_name: dict[str, bytes], prefix: str = "archive/", deflated: str | None = None, before: bytes = b""
) -> bytes:
    """Put the entries into a zip; those whose names begin with `deflated` are compressed."""
    file = io.BytesIO(before)
    with zipfile.ZipFile(file, "a") as into:
        for name, content in entries_by_name.items():
            small = deflated is not None and name.startswith(deflated)
            into.writestr(prefix + name, content, zipfile.ZIP_DEFLATED if small else zipfile.ZIP_STORED)
    return file.getvalue()


def long_zip(entries_by_name: dict[str, bytes]) -> bytes:
    """A zip with the fields of files beyond 4 GB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as into:
        for name, content in entries_by_name.items():
            with into.open(f"x/{name}", "w", force_zip64=True) as stream:
                stream.write(content)
    return file.getvalue()


def shuffled(entries_by_name: dict[str, bytes]) -> dict[str, bytes]:
    names = list(entries_by_name)
    random.Random(0).shuffle(names)
    return {name: entries_by_name[name] for name in names}


def big_endian() -> bytes:
    """The file that a big-endian machine writes."""
    entries_by_name = entries(saved())
    for i, x in enumerate(storages()):
        data = entries_by_name[f"data/{i}"]
        entries_by_name[f"data/{i}"] = b"".join(
            data[offset : offset + x.itemsize][::-1] for offset in range(0, len(data), x.itemsize)
        )
    return zipped(entries_by_name | {"byteorder": b"big"})


def storages() -> list[Tensor]:
    """One tensor of each storage, in the order in which torch numbers them."""
    first: dict[int, Tensor] = {}
    for x in TENSORS.values():
        first.setdefault(x.untyped_storage().data_ptr() or -id(x), x)
    return list(first.values())


READ: dict[str, Callable[[], bytes]] = {
    "torch's": saved,
    "a later protocol": lambda: saved(pickle_protocol=4),
    "an ordered state dict with versions": lambda: saved(versioned()),
    "stored by another tool": lambda: zipped(entries(saved())),
    "in another order": lambda: zipped(shuffled(entries(saved()))),
    "in another folder": lambda: zipped(entries(saved()), "a/b c/é/"),
    "in no folder": lambda: zipped(entries(saved()), ""),
    "with other entries": lambda: zipped({"../x/data/0": b"garbage", **entries(saved()), "data/99": b"zz"}),
    "with the fields of large files": lambda: long_zip(entries(saved())),
    "behind something else": lambda: zipped(entries(saved()), before=b"#!" + bytes(99)),
    "without a byte order": lambda: zipped({k: v for k, v in entries(saved()).items() if k != "byteorder"}),
    "big-endian": big_endian,
}


def versioned() -> OrderedDict:
    state_dict = OrderedDict(TENSORS)
    state_dict._metadata = OrderedDict({"": {"version": 1}})  # pyright: ignore
    return state_dict


@pytest.mark.parametrize("data", READ.values(), ids=READ)
def test_repackaged_zip_reads_as_torch_reads_the_original(data: Callable[[], bytes], tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(data())
    tensors, expected = open_tensors(tmp_path / "a.bin"), torch.load(io.BytesIO(saved()), weights_only=True)
    assert list(tensors) == list(expected)
    for name, x in expected.items():
        assert (tensors.meta[name].shape, tensors.meta[name].dtype) == (x.shape, x.dtype)
        assert torch.equal(tensors[name], x), name
        assert tensors[name].stride() == x.stride()


def changed(**new: bytes) -> bytes:
    return zipped(entries(saved()) | {name.replace("_", "/"): x for name, x in new.items()})


def other_place() -> bytes:
    """The directory of the zip points at another entry."""
    data = bytearray(saved())
    name = data.rindex(b"archive/data/0", 0, data.rindex(b"archive/data/1"))
    offset = name - 4  # the entry's offset ends right before its name
    other = data.index(b"archive/data/1") - 30
    data[offset : offset + 4] = struct.pack("<I", other)
    return bytes(data)


def longer(data: bytes) -> tuple[bytes, bytes]:
    """The header of an entry, and the same with a number in it that moves the entry by 4 bytes."""
    offset = data.index(b"archive/data/1") - 2
    before = data[offset : offset + 16]
    return before, bytes([before[0] + 4]) + before[1:]


def huge(shape: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    return saved({"a": torch.ones(1).as_strided(shape, stride)})


complex_ones = torch.ones(2, dtype=torch.complex64)
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "deflated": (lambda: zipped(entries(saved()), deflated=""), "data.pkl is compressed or encrypted"),
    "tensors deflated": (
        lambda: zipped(entries(saved()), deflated="data/"),
        r"data/\d+ is compressed or encrypted",
    ),
    "two pickles": (lambda: zipped(entries(saved()) | {"x/data.pkl": b""}), "the zip has 2 data.pkl, expected one"),
    "no pickle": (lambda: zipped({"data/0": b""}), "the zip has 0 data.pkl, expected one"),
    "an entry twice": (lambda: twice(), "an entry of the zip is there twice"),
    "a storage that is missing": (
        lambda: zipped({k: v for k, v in entries(saved()).items() if k != "data/1"}),
        "is not a whole file of torch.save: 'archive/data/1'",
    ),
    "a storage too short": (lambda: changed(data_0=bytes(44)), "storage of a has 44 bytes, but 48 are announced"),
    "a storage too long": (lambda: changed(data_0=bytes(52)), "storage of a has 52 bytes, but 48 are announced"),
    "another byte order": (lambda: changed(byteorder=b"middle"), "byte order is b'middle', expected 'little' or 'big'"),
    "a longer header": (
        lambda: saved().replace(*longer(saved()), 1),
        "data/1 is not where the directory of the zip says",
    ),
    "another place": (other_place, "data/0 is not where the directory of the zip says"),
    "sparse": (
        lambda: saved({"a": torch.eye(2).to_sparse()}),
        "a is made by 'torch._utils._rebuild_sparse_tensor'; save it as a plain, dense tensor",
    ),
    "sparse rows": (lambda: saved({"a": torch.eye(2).to_sparse_csr()}), "save it as a plain, dense tensor"),
    "quantized": (
        lambda: saved({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}),
        "save it as a plain, dense tensor",
    ),
    "negated": (
        lambda: saved({"a": complex_ones.conj().imag}),
        "a is a view that negates or conjugates",
    ),
    "complex": (lambda: saved({"a": complex_ones}), "a is 'torch.ComplexFloatStorage'; known are F64"),
    "float8": (lambda: saved({"a": torch.ones(2).to(torch.float8_e5m2)}), "a is 'torch.float8_e5m2'; known are F64"),
    "an expanded number": (
        lambda: huge((1 << 40,), (0,)),
        r"a has the shape \[1099511627776\], but there are 1 elements where it lies",
    ),
    "a list": (lambda: saved([torch.ones(2)]), "does not hold a state dict"),
    "a number beside": (lambda: saved({"a": torch.ones(2), "step": 3}), "does not hold a state dict"),
    "a whole model": (lambda: saved(torch.nn.Linear(2, 2)), "more than tensors. .*'torch.nn.modules.linear.Linear'"),
}


def twice() -> bytes:
    file = io.BytesIO(zipped(entries(saved())))
    with zipfile.ZipFile(file, "a") as into, pytest.warns(UserWarning, match="Duplicate"):
        into.writestr("archive/data/0", bytes(48))
    return file.getvalue()


@pytest.mark.parametrize("data, message", REFUSED.values(), ids=REFUSED)
def test_unsupported_torch_files_are_refused(data: Callable[[], bytes], message: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.bin").write_bytes(data())
    with pytest.raises(LoadError, match=f"^{file}.*{message}") as error:
        open_tensors(file)
    assert len(str(error.value)) < 500


def pickled(*steps: bytes) -> bytes:
    return zipped({"data.pkl": b"\x80\x02" + b"".join(steps) + b"."})


BOMBS = {  # what some unpickler spends gigabytes or its stack on
    "a memo of 4 billion": b"}K\x01K\x01r\xff\xff\xff\xffs",
    "an array of a terabyte": b"\x96" + (1 << 40).to_bytes(8, "little"),
    "tuples in each other as a key": b"}" + b")" + b"\x85" * 10**5 + b"K\x01s",
    "lists in each other": b"]" * 10**5,
    "marks": b"(" * 10**5 + b"t" * 10**5,
    "a text of a terabyte": b"\x8d" + (1 << 40).to_bytes(8, "little"),
}


@pytest.mark.parametrize("steps", BOMBS.values(), ids=BOMBS)
def test_pickle_bombs_are_refused(steps: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickled(steps))
    with pytest.raises(LoadError, match=r"a.pt (is not a whole file of|holds more than|does not hold)"):
        open_tensors(tmp_path / "a.pt")


def test_oversized_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(pickled(b"N0" * (1 << 22)))
    with pytest.raises(LoadError, match=r"data.pkl has 8388611 bytes, expected at most 8388608"):
        open_tensors(tmp_path / "a.pt")


def test_damaged_file_is_named_or_reads_as_torch_reads_it(tmp_path: Path) -> None:
    """Bytes are changed or the end is cut off."""
    tensors, rng = {name: TENSORS[name] for name in ("a", "half", "turned", "nothing")}, random.Random(0)
    whole, before = saved(tensors), {name: as_bytes(x) for name, x in tensors.items()}
    file, errors = tmp_path / "a.bin", 0
    for i in range(500):
        data = bytearray(whole[: rng.randrange(len(whole)) if i % 8 == 0 else None])
        for _ in range(rng.choice((1, 1, 3)) if data else 0):
            data[rng.randrange(len(data))] = rng.randrange(256)
        file.write_bytes(data)
        try:
            ours = {name: as_bytes(x) for name, x in open_tensors(file).items()}
        except LoadError as error:
            assert str(file) in str(error)
            errors += 1
            continue
        try:
            theirs = torch.load(io.BytesIO(data), weights_only=True)
        except Exception:  # of what torch looks at and we do not, such as its version
            continue
        assert ours in (before, {name: as_bytes(x) for name, x in theirs.items()})
    assert 100 < errors < 400


def as_bytes(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.shape, x.contiguous().flatten().view(torch.uint8).tolist()
