"""The work folder of a quantization, which makes it resumable.

It lies beside the target and holds one safetensors file per finished layer, and the activations that the next layer
starts from. A run that was interrupted continues behind the last finished layer and gives the same bytes. The folder is
removed when the checkpoint is written.
"""

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

from vila_triton.checkpoints.atomic_folder import resume_hint
from vila_triton.checkpoints.int4_layouts import NATIVE
from vila_triton.checkpoints.loading import TOWER_PREFIX
from vila_triton.checkpoints.quantization_config import make_quantization_config
from vila_triton.checkpoints.sources import CheckpointSource
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.console import error_text
from vila_triton.files.atomic import atomic_file, write_json
from vila_triton.files.file_locks import FolderInUseError, claim_folder
from vila_triton.files.json_schema import require_schema
from vila_triton.files.reading import parse_json, read_json
from vila_triton.models.params import LazyTensors, ParameterSpec, check_state_dict, leaves, tree_map

CACHE_PREFIX = "awq_cache."  # of the names of scales and clips in the file of a layer
ERROR_KEYS = ("rtn_error", "error", "clip_ratio")  # of a linear in the report of a layer
State = dict[str, Tensor]  # activations: "reference", in the original model; "quantized", behind quantized layers


@dataclass(frozen=True)
class StepResult:
    """The result of quantizing one layer: its int4 tree, its report, the activations behind it, and scales and clips to
    keep.
    """

    tree: Any
    report: dict[str, Any]
    state: State
    awq_cache: dict[str, Tensor]


@dataclass(frozen=True)
class LayerwiseJob:
    """A part of a checkpoint and how its layers are quantized, one after the other.

    dense_specs, int4_specs: the parameter specs of the layers, in the dtype of the checkpoint and in int4.
    initial_state computes the activations before the first layer; quantize_one(i, layer, state) quantizes layer i.
    """

    part: str
    group_size: int
    dense_specs: Sequence[Any]
    int4_specs: Sequence[Any]
    initial_state: Callable[[], State]
    quantize_one: Callable[[int, Any, State], StepResult]


@contextmanager
def resumable_work(work: Path, *inputs: Any) -> Iterator[None]:
    """Hold the work folder of these inputs for this process alone; an error that interrupts the work says what is kept.

    Errors: ValueError if the folder holds other work, or another process uses it; OSError.
    """
    try:
        with open_work_folder(work, *inputs):
            yield
    except OSError as error:
        raise OSError(f"{error_text(error)}. {resume_hint(work)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(resume_hint(work)) from None


def open_work_folder(work: Path, *inputs: Any) -> IO:
    """Make or reopen the work folder of these inputs, and return the lock that keeps other processes out.

    Errors: ValueError if it was made for other inputs.
    """
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
        raise FolderInUseError.other_work(work)
    write_json(work / "work.json", key)
    return lock


def run_steps(
    job: LayerwiseJob, source: CheckpointSource, work: Path, device: torch.device, on_progress: Callable[[int], None]
) -> CheckpointSource:
    """Quantize the layers that are not finished yet, and return the source with this part quantized.

    on_progress: called with the number of finished layers as each one begins. Errors: ValueError, naming the layer.
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
            layer = tree_map(leaf_reader(source.tensors[part], device, prefix), job.dense_specs[i])
            result = job.quantize_one(i, layer, state)
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
    """A function that copies a spec's tensor to the device and releases the memory of the original."""

    def read(spec: ParameterSpec) -> Tensor:
        x = tensors[prefix + spec.key].to(device, spec.dtype, copy=True)
        tensors.release(prefix + spec.key)
        return x

    return read


def part_dtype(source: CheckpointSource, part: str) -> torch.dtype:
    """The dtype of the floating-point tensors in a part of a checkpoint."""
    dtypes = (x.dtype for x in source.tensors[part].meta.values() if x.is_floating_point())
    return next(dtypes, torch.float16)


def part_prefix(source: CheckpointSource, part: str) -> str:
    """The prefix of the names of a part in the checkpoint, as some releases have it."""
    return TOWER_PREFIX if any(name.startswith(TOWER_PREFIX) for name in source.tensors[part]) else ""


def cast_for_storage(x: Tensor, spec: ParameterSpec) -> Tensor:
    """Cast norms and biases to the dtype of the checkpoint. Scales stay float16, to which they were rounded."""
    return x if x.dtype == torch.float16 or not x.is_floating_point() else x.to(spec.dtype)


def save_atomically(path: Path, tensors: State, report: dict[str, Any] | None = None) -> None:
    """Write a safetensors file atomically. Errors: OSError."""
    contiguous = {name: x.contiguous().cpu() for name, x in tensors.items()}
    with atomic_file(path) as partial:
        try:
            save_file(contiguous, partial, metadata={"report": json.dumps(report, sort_keys=True)})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written: {error}") from None


def source_with_results(job: LayerwiseJob, source: CheckpointSource, work: Path) -> CheckpointSource:
    """The source with the layers of a part taken from the files in the work folder."""
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
        lambda name: file_tensors.get(name, original).release(name),
    )
    return replace_with_int4(source, part, lazy, job.group_size)


def replace_with_int4(source: CheckpointSource, part: str, tensors: LazyTensors, group_size: int) -> CheckpointSource:
    """The source with other tensors of a part, whose linears are int4 in the native layout, and a config for them."""
    config = source.part_configs[part] | make_quantization_config(NATIVE, group_size, NATIVE.rounding)
    layout = NATIVE if part == "llm" else source.layout
    part_configs, all_tensors = source.part_configs | {part: config}, source.tensors | {part: tensors}
    return replace(source, part_configs=part_configs, tensors=all_tensors, layout=layout)


def read_reports(work: Path, part: str) -> list[dict[str, Any]]:
    """Read the reports of the finished layers of a part, in order. Errors: `LoadError`, naming the file."""
    results = []
    for file in sorted(work.glob(f"{part}-*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            text = (stream.metadata() or {}).get("report", "")
        report = parse_json(text, where := f"{file}, its report,")
        require_schema(report, {"scales": dict, "linears": dict}, where)
        linears = (results[0] if results else report)["linears"]
        errors = {name: dict.fromkeys(ERROR_KEYS, float) for name in linears}
        require_schema(report["linears"], errors, f"{where} linears")
        require_schema(report["scales"], {group: {"ratio": float} for group in report["scales"]}, f"{where} scales")
        results.append(report)
    return results


def already_written(work: Path, target: Path, format_name: str) -> bool:
    """True if the target holds the result of this work in this format, its report included."""
    if not (work / "work.json").exists() or not (target / "quantization.json").exists():
        return False
    report = read_json(target / "quantization.json")
    return (report.get("work"), report.get("format")) == (read_work_key(work), format_name)


def read_work_key(work: Path) -> str:
    """The key that identifies the inputs of a work folder."""
    content = read_json(work / "work.json")
    require_schema(content, {"key": str}, work / "work.json")
    return content["key"]


def remove_work_folder(work: Path) -> None:
    """Remove a work folder whose result is written."""
    shutil.rmtree(work)
