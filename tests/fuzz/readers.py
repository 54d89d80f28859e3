"""Every reader of files, and how many damaged ones it is tried on."""

from functools import partial
from pathlib import Path

from vila_triton.checkpoints.shard_writer import JOURNAL_NAME
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.quantization import resumable
from vila_triton.registry import tuned_tables

from . import mutate
from .whole import (
    GENERATION,
    INT4,
    ROWS,
    SPECIAL,
    TEXT,
    calibrate,
    call_again,
    checkpoint,
    encoded_images,
    filmed,
    go_on,
    load_cache,
    look,
    look_up,
    only_header,
    process,
    rounded,
    saved_by_torch,
    search_on,
    some_tensors,
    talk,
    touch_all,
    watch,
    whole_bundles,
    whole_caches,
    whole_conversations,
    whole_index,
    whole_journals,
    whole_lines,
    whole_processor,
    whole_safetensors,
    whole_sentencepiece,
    whole_shard_journals,
    whole_tables,
    whole_torch,
    whole_work,
    write_on,
)
from .worker import Reader


def json_of_checkpoint(
    name: str, count: int, file: str, source: Path = BUNDLED_CHECKPOINT, whole: bytes = b""
) -> Reader:
    """A JSON file of a model, or `whole` in its place."""
    names = ("/folder", Path(file).name)  # the second where a question shows what the file says wrongly
    prepare = partial(checkpoint, file, source=source, whole=whole)
    return Reader(name, count, file, prepare, mutate.of_json, talk, names)


READERS = {
    reader.name: reader
    for reader in (
        Reader(
            "safetensors",
            2000,
            "x.safetensors",
            whole_safetensors,
            mutate.of_safetensors,
            lambda folder: touch_all(folder / "x.safetensors"),
        ),
        Reader("bin", 1500, "x.bin", whole_torch, mutate.of_torch, lambda folder: touch_all(folder / "x.bin")),
        Reader(
            "pt before 1.6",
            200,
            "x.pt",
            lambda folder: [saved_by_torch(some_tensors(), zipped=False)],
            mutate.of_bytes,
            lambda folder: touch_all(folder / "x.pt"),
        ),
        Reader(
            "index",
            700,
            "model.safetensors.index.json",
            partial(whole_index, "safetensors"),
            mutate.of_json,
            touch_all,
            ("the index", "index.json"),
        ),
        Reader(
            "index of bin",
            300,
            "pytorch_model.bin.index.json",
            partial(whole_index, "bin"),
            mutate.of_json,
            touch_all,
            ("the index", "index.json"),
        ),
        json_of_checkpoint("root config", 1000, "config.json"),
        json_of_checkpoint("llm config", 1000, "llm/config.json"),
        json_of_checkpoint("int4 config", 600, "llm/config.json", INT4),
        json_of_checkpoint("tower config", 800, "vision_tower/config.json"),
        json_of_checkpoint("projector config", 400, "mm_projector/config.json"),
        json_of_checkpoint("generation config", 500, "llm/generation_config.json", whole=GENERATION),
        json_of_checkpoint("preprocessor", 800, "vision_tower/preprocessor_config.json"),
        json_of_checkpoint("tokenizer.json", 1000, "llm/tokenizer.json"),
        json_of_checkpoint("tokenizer config", 800, "llm/tokenizer_config.json"),
        json_of_checkpoint("special tokens", 400, "llm/special_tokens_map.json", whole=SPECIAL),
        Reader("tokenizer.model", 700, "llm/tokenizer.model", whole_sentencepiece, mutate.of_bytes, talk, ("/llm",)),
        Reader("processor config", 300, "processor_config.json", whole_processor, mutate.of_json, process),
        Reader(
            "weights of a part",
            300,
            "mm_projector/model.safetensors",
            partial(checkpoint, "mm_projector/model.safetensors"),
            partial(only_header, mutate.of_safetensors),
            talk,
            ("/mm_projector",),
        ),
        Reader("session", 1200, "talk", whole_conversations, mutate.of_safetensors, go_on, ("/talk",)),
        Reader("bundle", 1000, "call.bundle", whole_bundles, mutate.of_torch, call_again),
        Reader(
            "tuned table",
            1200,
            "toy-gpu.json",
            whole_tables,
            mutate.of_json,
            look_up,
            errors=(ValueError, OSError, tuned_tables.StaleTableError),
        ),
        Reader("tuner journal", 1000, ROWS, whole_journals, mutate.of_lines, search_on),
        Reader(
            "shard journal",
            400,
            JOURNAL_NAME,
            whole_shard_journals,
            mutate.of_json,
            write_on,
            (JOURNAL_NAME, "folder holds the beginnings of other work"),
        ),
        Reader(
            "work journal",
            200,
            "work.json",
            partial(whole_work, "work.json"),
            mutate.of_json,
            rounded,
            ("work.json", "folder holds the beginnings of other work"),
        ),
        Reader(
            "quantization.json",
            200,
            "quantization.json",
            partial(whole_work, "quantization.json"),
            mutate.of_json,
            lambda folder: resumable.already_written(folder, folder, "vila-triton"),
        ),
        Reader(
            "step of the quantiser",
            200,
            "llm-001.safetensors",
            partial(whole_work, "llm-001.safetensors"),
            partial(only_header, mutate.of_safetensors),
            rounded,
        ),
        Reader("awq cache", 500, "found.pt", whole_caches, mutate.of_torch, load_cache),
        Reader(
            "calibration lines",
            600,
            "calib.jsonl",
            whole_lines,
            mutate.of_lines,
            partial(calibrate, "calib.jsonl"),
            said=("calibration has no samples",),
        ),
        Reader(
            "calibration text",
            300,
            "calib.txt",
            lambda folder: [(TEXT + "\n").encode() * 4],
            mutate.of_text,
            partial(calibrate, "calib.txt"),
            said=("calibration has no samples",),
        ),
        *(
            Reader(kind, count, "picture", partial(encoded_images, kind), mutate.of_image, look, ("/picture",))
            for kind, count in (("png", 500), ("jpeg", 400), ("gif", 300), ("webp", 400), ("tiff", 500), ("bmp", 300))
        ),
        *(
            Reader(f"film, {kind}", 200, "film", partial(filmed, kind), mutate.of_image, watch, ("/film",))
            for kind in ("gif", "webp", "png")
        ),
    )
}
