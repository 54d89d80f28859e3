"""The folder beside the target: for every finished step a file, for the next its inputs; so work outlives a kill."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vila_triton.checkpoints.int4_layouts import OURS
from vila_triton.checkpoints.loading import TOWER_PREFIX
from vila_triton.checkpoints.shard_writer import part as temporary
from vila_triton.checkpoints.shard_writer import write_json
from vila_triton.checkpoints.sources import Source, quantization
from vila_triton.checkpoints.tensor_files import open_tensors, read_json
from vila_triton.console import reason_of
from vila_triton.files.file_locks import claim
from vila_triton.files.json_schema import require_form
from vila_triton.files.reading import parse_json
from vila_triton.models.params import Lazy, Spec, leaves, require_fit, tree_map

FOUND = "awq_cache."  # names in a step's file of what was found, beside its tensors
SHARES = ("nearest", "ours", "shrink")  # what a step's report says of a linear
State = dict[str, Tensor]


@dataclass(frozen=True)
class How:
    """mode "ours" or "upstream"; group: inputs that share a scale; propagate: later layers make good what rounding did
    to earlier ones (ours); image_weight: how much a token of a picture counts, for each 1 of a word's (ours); also: of
    the tower and the projector those that are rounded too (ours).
    """

    mode: str = "ours"
    group: int = 128
    propagate: bool = True
    image_weight: float = 1.0
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """What a step leaves: its rounded tree, its report, the inputs of the next, what else is to be kept."""

    tree: Any
    report: dict[str, Any]
    state: State
    found: dict[str, Tensor]


@dataclass(frozen=True)
class Steps:
    """A part of a checkpoint and how its trees are rounded, one after the other.

    before, after: the declarations of the trees, in the dtype of the checkpoint and in int4.
    """

    part: str
    group: int
    before: Sequence[Any]
    after: Sequence[Any]
    start: Callable[[], State]
    one: Callable[[int, Any, State], Step]


@contextmanager
def begun(work: Path, *what: Any) -> Iterator[None]:
    """Inside, the folder of this work is there for this process alone; what ends it early says what is kept.

    Errors: ValueError if other work was begun there, or another process is at it; OSError.
    """
    kept = f"What was finished is in {work}: the same command goes on from there"
    try:
        with begin(work, *what):
            yield
    except OSError as error:
        raise OSError(f"{reason_of(error)}. {kept}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept) from None


def begin(work: Path, *what: Any) -> IO:
    """The folder of this work, and the lock that keeps others out of it."""
    text = hashlib.sha256()
    for x in what:
        text.update(repr((x.shape, x.dtype) if isinstance(x, Tensor) else x).encode())
        if isinstance(x, Tensor):
            text.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    key = {"key": text.hexdigest()}
    work.mkdir(parents=True, exist_ok=True)
    lock = claim(work)
    if (work / "work.json").exists() and read_json(work / "work.json") != key:
        lock.close()
        raise ValueError(f"{work} holds the beginnings of other work; remove it, or write elsewhere")
    write_json(work / "work.json", key)
    return lock


def carry_out(steps: Steps, source: Source, work: Path, device: torch.device, say: Callable[[int], None]) -> Source:
    """Take the steps that are not done yet; the source with this part rounded.

    say: told of steps finished, as each begins. Errors: ValueError, naming the tree.
    """
    part, total, prefix = steps.part, len(steps.before), prefix_of(source, steps.part)
    done = sum((work / f"{part}-{i:03}.safetensors").exists() for i in range(total))
    state: State = {}
    if done < total:
        state = dict(open_tensors(work / f"inputs-{part}-{done:03}.safetensors")) if done else steps.start()
        state = {name: x.to(device) for name, x in state.items()}

    for i in range(done, total):
        say(i)
        try:
            made = steps.one(i, tree_map(taking(source.tensors[part], device, prefix), steps.before[i]), state)
        except ValueError as error:
            where = commonpath([spec.key.replace(".", "/") for spec in leaves(steps.before[i])]).replace("/", ".")
            raise ValueError(f"{part}, {where}: {error}") from None
        state = made.state
        pairs = zip(leaves(steps.after[i]), leaves(made.tree), strict=True)
        named = {prefix + spec.key: as_stored(x, spec) for spec, x in pairs}
        if i + 1 < total:
            stored(work / f"inputs-{part}-{i + 1:03}.safetensors", state)
        found = {FOUND + name: x for name, x in made.found.items()}
        stored(work / f"{part}-{i:03}.safetensors", named | found, made.report)
        (work / f"inputs-{part}-{i:03}.safetensors").unlink(missing_ok=True)
    return joined(steps, source, work)


def taking(tensors: Lazy, device: torch.device, prefix: str = "") -> Callable[[Spec], Tensor]:
    """A leaf of a tree of declarations -> its copy on the device; what was read for it may go."""

    def take(spec: Spec) -> Tensor:
        x = tensors[prefix + spec.key].to(device, spec.dtype, copy=True)
        tensors.forget(prefix + spec.key)
        return x

    return take


def dtype_of(source: Source, part: str) -> torch.dtype:
    """Of what is not int4 in a part of a checkpoint."""
    kinds = (x.dtype for x in source.tensors[part].meta.values() if x.is_floating_point())
    return next(kinds, torch.float16)


def prefix_of(source: Source, part: str) -> str:
    """What stands before the names of a part in a checkpoint, as released."""
    return TOWER_PREFIX if any(name.startswith(TOWER_PREFIX) for name in source.tensors[part]) else ""


def as_stored(x: Tensor, spec: Spec) -> Tensor:
    """Scales stay float16, which they were rounded to; norms and biases get the checkpoint's dtype."""
    return x if x.dtype == torch.float16 or not x.is_floating_point() else x.to(spec.dtype)


def stored(path: Path, tensors: State, report: dict[str, Any] | None = None) -> None:
    """A safetensors file that is there whole or not at all. Errors: OSError."""
    held = {name: x.contiguous().cpu() for name, x in tensors.items()}
    try:
        save_file(held, temporary(path), metadata={"report": json.dumps(report, sort_keys=True)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    temporary(path).replace(path)


def joined(steps: Steps, source: Source, work: Path) -> Source:
    """The source with a part's trees taken from the files in `work`."""
    part, prefix = steps.part, prefix_of(source, steps.part)
    old = {prefix + spec.key for spec in leaves(tuple(steps.before))}
    held, new = source.tensors[part], {}
    for file, tree in zip(sorted(work.glob(f"{part}-*.safetensors")), steps.after, strict=True):
        tensors = open_tensors(file)
        names = [name for name in tensors if not name.startswith(FOUND)]
        require_fit(tree, {name.removeprefix(prefix): tensors.meta[name] for name in names}, str(file))
        new |= dict.fromkeys(names, tensors)
    meta = {name: x for name, x in held.meta.items() if name not in old}
    lazy = Lazy(
        meta | {name: tensors.meta[name] for name, tensors in new.items()},
        lambda name: new[name][name] if name in new else held[name],
        lambda name: new.get(name, held).forget(name),
    )
    return with_int4(source, part, lazy, steps.group)


def with_int4(source: Source, part: str, tensors: Lazy, group: int) -> Source:
    """The source with a part whose linears are int4 in our layout, as its config says."""
    said = source.parts[part] | quantization(OURS, group, OURS.order)
    layout = OURS if part == "llm" else source.layout
    parts, held = source.parts | {part: said}, source.tensors | {part: tensors}
    return replace(source, parts=parts, tensors=held, layout=layout)


def reports(work: Path, part: str) -> list[dict[str, Any]]:
    """What the finished steps of a part say of themselves, in order. Errors: `LoadError`, naming the file."""
    found = []
    for file in sorted(work.glob(f"{part}-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("report", "")
        said = parse_json(text, where := f"{file}, its report,")
        require_form(said, {"scales": dict, "linears": dict}, where)
        linears = (found[0] if found else said)["linears"]
        require_form(said["linears"], {name: dict.fromkeys(SHARES, float) for name in linears}, f"{where} linears")
        require_form(said["scales"], {place: {"ratio": float} for place in said["scales"]}, f"{where} scales")
        found.append(said)
    return found


def wrote(work: Path, target: Path, form: str) -> bool:
    """Whether a folder is what this work was written as, its report included."""
    if not (work / "work.json").exists() or not (target / "quantization.json").exists():
        return False
    said = read_json(target / "quantization.json")
    return (said.get("work"), said.get("format")) == (key_of(work), form)


def key_of(work: Path) -> str:
    """What tells one work from another."""
    held = read_json(work / "work.json")
    require_form(held, {"key": str}, work / "work.json")
    return held["key"]


def finish(work: Path) -> None:
    shutil.rmtree(work)
