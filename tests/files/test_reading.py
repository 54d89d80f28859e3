"""Strict reading: every damaged file is refused in a sentence that begins with its name."""

import json
import os
import socket
from pathlib import Path

import pytest

from vila_triton.files.reading import (
    MAX_JSON_DEPTH,
    LoadError,
    join_items,
    parse_json,
    read_json,
    require_contained,
    require_file,
    short_repr,
)

WRONG = {
    "not closed": (b'{"a": 1', "is not JSON"),
    "nothing": (b"", "is not JSON"),
    "not UTF-8": (b'{"a": "\xff"}', "is not JSON: 'utf-8' codec"),
    "a mark of byte order": (b"\xef\xbb\xbf{}", "is not JSON: .*BOM"),
    "a key twice": (b'{"b": {"a": 1, "a": 1}}', "it has 'a' twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a finite number"),
    "an infinity": (b'{"a": -Infinity}', "-Infinity is not a finite number"),
    "a number like one": (b'{"a": 1e999}', "1e999 is not a finite number"),
    "five thousand digits": (b'{"a": 1' + b"0" * 5000 + b"}", "is not JSON: .*digits"),
    "half a pair of surrogates": (b'{"a": "\\ud83d"}', "holds half of a character"),
    "a list": (b"[1]", "holds a list, expected an object"),
    "a text": (b'"a"', "holds a str, expected an object"),
    "one level too many": (
        b'{"a":' * (MAX_JSON_DEPTH + 1) + b"1" + b"}" * (MAX_JSON_DEPTH + 1),
        "is nested deeper than 64",
    ),
    "100,000 levels": (b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", "is nested deeper than 64"),
}


@pytest.mark.parametrize("text, message", WRONG.values(), ids=WRONG)
def test_invalid_json_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.json").write_bytes(text)
    with pytest.raises(LoadError, match=f"^{file}.*{message}") as error:
        read_json(file)
    assert len(str(error.value)) < 400


def test_valid_json_is_read(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None, True, "é \U0001f600"], "big": int(1e30), "deep": json.loads("[" * 62 + "]" * 62)}
    for ascii_only in (True, False):  # the pair of surrogates written as such, or not
        (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_json(tmp_path / "a.json") == values
    assert parse_json(b"[1]", "line 3") == [1]
    with pytest.raises(LoadError, match=r"^line 3 is not JSON"):
        parse_json("]", "line 3")
    with pytest.raises(LoadError, match=r"a.json is not read: it has \d+ bytes, expected at most 10"):
        read_json(tmp_path / "a.json", max_bytes=10)


def test_fifos_and_devices_are_refused_without_blocking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most a hundred letters
    with socket.socket(socket.AF_UNIX) as unix_socket:
        unix_socket.bind("socket")
        for path, message in (
            (tmp_path / "pipe", "pipe is a FIFO, expected a file"),
            (tmp_path / "socket", "socket is a device or a socket, expected a file"),
            (Path("/dev/zero"), "/dev/zero is a device or a socket, expected a file"),
            (tmp_path, "is a folder, expected a file"),
            (tmp_path / "none", "none does not exist"),
        ):
            for read in (require_file, read_json):
                with pytest.raises(LoadError, match=message):
                    read(path)


def test_lists_and_values_are_shortened_in_errors() -> None:
    assert join_items([1, 2, 3]) == "1, 2, 3" and join_items(range(10**4), 3) == "0, 1, 2, and 9997 more"
    assert (
        len(short_repr("x" * 10**6)) < 100
        and len(short_repr([["y" * 10**6] * 9] * 99)) < 120
        and short_repr("ab") == "'ab'"
    )


def hub(folder: Path) -> Path:
    """A snapshot in Hugging Face's cache: every file is a link to a blob."""
    snapshot, blobs = folder / "models--x--y/snapshots/0a1b", folder / "models--x--y/blobs"
    (snapshot / "llm").mkdir(parents=True)
    blobs.mkdir()
    for name, blob, up in (("config.json", "c0", "../.."), ("llm/model.safetensors", "c1", "../../..")):
        (blobs / blob).write_text("{}")
        (snapshot / name).symlink_to(f"{up}/blobs/{blob}")
    return snapshot


def test_links_within_a_checkpoint_and_to_hub_blobs_are_followed(tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    require_contained(snapshot, snapshot, snapshot / "llm")
    (tmp_path / "link").symlink_to(snapshot)
    require_contained(tmp_path / "link", tmp_path / "link", tmp_path / "link/llm")
    (snapshot / "again.json").symlink_to("config.json")
    (snapshot / "nowhere").symlink_to("none.json")
    require_contained(snapshot, snapshot)


@pytest.mark.parametrize("to", ["/etc/passwd", "../../../secret", "/etc", "round"])
def test_links_out_of_a_checkpoint_are_refused(to: str, tmp_path: Path) -> None:
    snapshot = hub(tmp_path)
    (tmp_path / "secret").touch()
    (snapshot / "llm/round").symlink_to(to)
    with pytest.raises(LoadError, match=r"llm/round (leads out of the checkpoint, to |is a symbolic link in a circle)"):
        require_contained(snapshot, snapshot, snapshot / "llm")
    (snapshot / "llm/round").unlink()
    (snapshot / "tower").symlink_to("/usr")
    with pytest.raises(LoadError, match="tower leads out of the checkpoint, to /usr; put what is there into"):
        require_contained(snapshot, snapshot / "tower")


def test_fifo_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(LoadError, match=r"tokenizer.json is a FIFO"):
        require_contained(tmp_path, tmp_path)
