"""Write a folder that appears when it is whole, and that the next process can finish if this one is killed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vila_triton.files.file_locks import LOCK_NAME, FolderInUseError, claim_folder
from vila_triton.files.reading import LoadError

from .shard_writer import JOURNAL_NAME
from .tensor_files import find_weight_files


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into, `target`.partial, which becomes `target` when the block ends without an error.

    After an interrupt or an OSError such as a full disk it stays, and the next call for the same target goes on in it;
    `FolderInUseError` leaves it alone. After any other error it is removed.
    overwrite: begin afresh, remove it after every error, and move its files into a target that may exist, in place of
    the weights there. The target's own config.json is away meanwhile.
    Errors: ValueError if the target is a file, or exists and is not empty; `FolderInUseError` if another process writes
    it.
    """
    folder = target.with_name(f"{target.name}.partial")
    require_free(target, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    with claim_folder(folder):
        require_free(target, overwrite)  # another process may just have finished it
        if overwrite:
            clear_folder(folder)
        try:
            yield folder
        except BaseException as error:
            if overwrite or not isinstance(error, OSError | KeyboardInterrupt | FolderInUseError):
                shutil.rmtree(folder)
            elif isinstance(error, OSError):
                raise OSError(f"{error}. {resume_hint(folder)}") from error
            elif isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(resume_hint(folder)) from None
            raise
        for journal in folder.rglob(JOURNAL_NAME):
            journal.unlink()
        if overwrite and target.exists():
            replace_files(folder, target)
        else:
            if target.exists():
                target.rmdir()
            folder.replace(target)
            (target / LOCK_NAME).unlink()  # others still find it locked


def resume_hint(folder: Path) -> str:
    """Say in an error where finished work is kept."""
    return f"What was finished is in {folder}: the same command goes on from there"


def require_free(target: Path, overwrite: bool = False) -> None:
    """Check that a folder can be written at `target`.

    Errors: ValueError if it is a file, or, unless it is to be overwritten, a folder that is not empty.
    """
    if not overwrite and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is there already and not empty; give another folder, or remove it")
    if overwrite and target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, expected a folder, or the name of a new one")


def clear_folder(folder: Path) -> None:
    """Remove everything in a folder but its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK_NAME:
            path.unlink()


def replace_files(folder: Path, target: Path) -> None:
    """Move the files of a folder over those of another, config.json last; all weights that were there are removed."""
    (target / "config.json").unlink(missing_ok=True)
    files = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file() and file.name != LOCK_NAME)
    for subfolder in {file.parent for file in files} - {Path()}:
        (target / subfolder).mkdir(parents=True, exist_ok=True)
        stale = {*(target / subfolder).glob("model*.safetensors*"), *(target / subfolder).glob("pytorch_model*.bin*")}
        with suppress(LoadError):
            stale |= set(find_weight_files(target / subfolder)[0])
        for file in stale:
            file.unlink()
    for file in sorted(files, key=lambda file: file == Path("config.json")):
        (folder / file).replace(target / file)
    shutil.rmtree(folder)
