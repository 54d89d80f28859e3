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

from vila_triton.checkpoints.int4_layouts import NATIVE
from vila_triton.checkpoints.loading import TOWER_PREFIX
from vila_triton.checkpoints.shard_writer import partial_path as temporary
from vila_triton.checkpoints.shard_writer import write_json
from vila_triton.checkpoints.sources import CheckpointSource, make_quantization_config
from vila_triton.checkpoints.tensor_files import open_tensors, read_json
from vila_triton.console import error_text
from vila_triton.files.file_locks import claim_folder
from vila_triton.files.json_schema import require_schema
from vila_triton.files.reading import parse_json
from vila_triton.models.params import LazyTensors, ParameterSpec, check_state_dict, leaves, tree_map

CACHE_PREFIX = "awq_cache."  # names in a step's file of what was found, beside its tensors
ERROR_KEYS = ("nearest", "ours", "shrink")  # what a step's report says of a linear
State = dict[str, Tensor]


@dataclass(frozen=True)
class QuantizeConfig:
    """mode "ours" or "upstream"; group: inputs that share a scale; propagate: later layers make good what rounding did
    to earlier ones (ours); image_weight: how much a token of a picture counts, for each 1 of a word's (ours); also: of
    the tower and the projector those that are rounded too (ours).
    """

    mode: str = "ours"
    group_size: int = 128
    propagate_error: bool = True
    image_weight: float = 1.0
    extra_parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepResult:
    """What a step leaves: its rounded tree, its report, the inputs of the next, what else is to be kept."""

    tree: Any
    report: dict[str, Any]
    state: State
    awq_cache: dict[str, Tensor]


@dataclass(frozen=True)
class LayerwiseJob:
    """A part of a checkpoint and how its trees are rounded, one after the other.

    before, after: the declarations of the trees, in the dtype of the checkpoint and in int4.
    """

    part: str
    group_size: int
    dense_specs: Sequence[Any]
    int4_specs: Sequence[Any]
    initial_state: Callable[[], State]
    quantize_one: Callable[[int, Any, State], StepResult]


@contextmanager
def resumable_work(work: Path, *inputs: Any) -> Iterator[None]:
    """Inside, the folder of this work is there for this process alone; what ends it early says what is kept.

    Errors: ValueError if other work was begun there, or another process is at it; OSError.
    """
    resume_hint = f"What was finished is in {work}: the same command goes on from there"
    try:
        with open_work_folder(work, *inputs):
            yield
    except OSError as error:
        raise OSError(f"{error_text(error)}. {resume_hint}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_hint) from None


def open_work_folder(work: Path, *inputs: Any) -> IO:
    """The folder of this work, and the lock that keeps others out of it."""
    digest = hashlib.sha256()
    for x in inputs:
        digest.update(repr((x.shape, x.dtype) if isinstance(x, Tensor) else x).encode())
        if isinstance(x, Tensor):
            digest.update(x.contiguous().view(torch.uint8).numpy().tobytes())
    key = {"key": digest.hexdigest()}
    work.mkdir(parents=True, exist_ok=True)
    lock = claim_folder(work)
    if (work / "work.json").exists() and read_json(work / "work.json") != key:
        lock.close()
        raise ValueError(f"{work} holds the beginnings of other work; remove it, or write elsewhere")
    write_json(work / "work.json", key)
    return lock


def run_steps(
    job: LayerwiseJob, source: CheckpointSource, work: Path, device: torch.device, on_progress: Callable[[int], None]
) -> CheckpointSource:
    """Take the steps that are not done yet; the source with this part rounded.

    say: told of steps finished, as each begins. Errors: ValueError, naming the tree.
    """
    part, total, prefix = job.part, len(job.dense_specs), part_prefix(source, job.part)
    done = sum((work / f"{part}-{i:03}.safetensors").exists() for i in range(total))
    state: State = {}
    if done < total:
        state = dict(open_tensors(work / f"inputs-{part}-{done:03}.safetensors")) if done else job.initial_state()
        state = {name: x.to(device) for name, x in state.items()}

    for i in range(done, total):
        on_progress(i)
        try:
            result = job.quantize_one(
                i, tree_map(leaf_reader(source.tensors[part], device, prefix), job.dense_specs[i]), state
            )
        except ValueError as error:
            where = commonpath([spec.key.replace(".", "/") for spec in leaves(job.dense_specs[i])]).replace("/", ".")
            raise ValueError(f"{part}, {where}: {error}") from None
        state = result.state
        pairs = zip(leaves(job.int4_specs[i]), leaves(result.tree), strict=True)
        tensors = {prefix + spec.key: cast_for_storage(x, spec) for spec, x in pairs}
        if i + 1 < total:
            save_atomically(work / f"inputs-{part}-{i + 1:03}.safetensors", state)
        cached = {CACHE_PREFIX + name: x for name, x in result.awq_cache.items()}
        save_atomically(work / f"{part}-{i:03}.safetensors", tensors | cached, result.report)
        (work / f"inputs-{part}-{i:03}.safetensors").unlink(missing_ok=True)
    return source_with_results(job, source, work)


def leaf_reader(tensors: LazyTensors, device: torch.device, prefix: str = "") -> Callable[[ParameterSpec], Tensor]:
    """A leaf of a tree of declarations -> its copy on the device; what was read for it may go."""

    def read(spec: ParameterSpec) -> Tensor:
        x = tensors[prefix + spec.key].to(device, spec.dtype, copy=True)
        tensors.release(prefix + spec.key)
        return x

    return read


def part_dtype(source: CheckpointSource, part: str) -> torch.dtype:
    """Of what is not int4 in a part of a checkpoint."""
    dtypes = (x.dtype for x in source.tensors[part].meta.values() if x.is_floating_point())
    return next(dtypes, torch.float16)


def part_prefix(source: CheckpointSource, part: str) -> str:
    """What stands before the names of a part in a checkpoint, as released."""
    return TOWER_PREFIX if any(name.startswith(TOWER_PREFIX) for name in source.tensors[part]) else ""


def cast_for_storage(x: Tensor, spec: ParameterSpec) -> Tensor:
    """Scales stay float16, which they were rounded to; norms and biases get the checkpoint's dtype."""
    return x if x.dtype == torch.float16 or not x.is_floating_point() else x.to(spec.dtype)


def save_atomically(path: Path, tensors: State, report: dict[str, Any] | None = None) -> None:
    """A safetensors file that is there whole or not at all. Errors: OSError."""
    contiguous = {name: x.contiguous().cpu() for name, x in tensors.items()}
    try:
        save_file(contiguous, temporary(path), metadata={"report": json.dumps(report, sort_keys=True)})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None
    temporary(path).replace(path)


def source_with_results(job: LayerwiseJob, source: CheckpointSource, work: Path) -> CheckpointSource:
    """The source with a part's trees taken from the files in `work`."""
    part, prefix = job.part, part_prefix(source, job.part)
    replaced = {prefix + spec.key for spec in leaves(tuple(job.dense_specs))}
    original, file_tensors = source.tensors[part], {}
    for file, tree in zip(sorted(work.glob(f"{part}-*.safetensors")), job.int4_specs, strict=True):
        tensors = open_tensors(file)
        names = [name for name in tensors if not name.startswith(CACHE_PREFIX)]
        check_state_dict(tree, {name.removeprefix(prefix): tensors.meta[name] for name in names}, str(file))
        file_tensors |= dict.fromkeys(names, tensors)
    meta = {name: x for name, x in original.meta.items() if name not in replaced}
    lazy = LazyTensors(
        meta | {name: tensors.meta[name] for name, tensors in file_tensors.items()},
        lambda name: file_tensors[name][name] if name in file_tensors else original[name],
        lambda name: file_tensors.get(name, original).forget(name),
    )
    return replace_with_int4(source, part, lazy, job.group_size)


def replace_with_int4(source: CheckpointSource, part: str, tensors: LazyTensors, group_size: int) -> CheckpointSource:
    """The source with a part whose linears are int4 in our layout, as its config says."""
    config = source.part_configs[part] | make_quantization_config(NATIVE, group_size, NATIVE.rounding)
    layout = NATIVE if part == "llm" else source.layout
    part_configs, all_tensors = source.part_configs | {part: config}, source.tensors | {part: tensors}
    return replace(source, parts=part_configs, tensors=all_tensors, layout=layout)


def read_reports(work: Path, part: str) -> list[dict[str, Any]]:
    """What the finished steps of a part say of themselves, in order. Errors: `LoadError`, naming the file."""
    results = []
    for file in sorted(work.glob(f"{part}-*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            text = (stream.metadata() or {}).get("report", "")
        report = parse_json(text, where := f"{file}, its report,")
        require_schema(report, {"scales": dict, "linears": dict}, where)
        linears = (results[0] if results else report)["linears"]
        require_schema(
            report["linears"], {name: dict.fromkeys(ERROR_KEYS, float) for name in linears}, f"{where} linears"
        )
        require_schema(report["scales"], {place: {"ratio": float} for place in report["scales"]}, f"{where} scales")
        results.append(report)
    return results


def already_written(work: Path, target: Path, format_name: str) -> bool:
    """Whether a folder is what this work was written as, its report included."""
    if not (work / "work.json").exists() or not (target / "quantization.json").exists():
        return False
    report = read_json(target / "quantization.json")
    return (report.get("work"), report.get("format")) == (read_work_key(work), format_name)


def read_work_key(work: Path) -> str:
    """What tells one work from another."""
    content = read_json(work / "work.json")
    require_schema(content, {"key": str}, work / "work.json")
    return content["key"]


def remove_work_folder(work: Path) -> None:
    shutil.rmtree(work)
