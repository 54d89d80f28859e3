"""The undamaged file of each reader, and how the package reads it."""

import io
import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from safetensors.torch import save

from bench import tune
from bench.correctness import repro_bundle
from bench.correctness.error_budget import example_args
from bench.tuner import journal, table
from vila_triton.chat.cli_session import default_num_frames
from vila_triton.chat.conversation import ChatModel, Conversation
from vila_triton.chat.conversation_file import load_conversation
from vila_triton.chat.conversation_file import save_conversation as save_conversation
from vila_triton.checkpoints.loading import check_checkpoint, open_checkpoint
from vila_triton.checkpoints.shard_writer import JOURNAL_NAME, ShardWriter
from vila_triton.checkpoints.tensor_files import open_tensors
from vila_triton.files.reading import read_json
from vila_triton.hashing import canonical_json, short_hash
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.hf.processing_vila import VilaProcessor
from vila_triton.images.processing import load_video_frames, open_image
from vila_triton.models.config import LlamaConfig
from vila_triton.paths import BUNDLED_CHECKPOINT
from vila_triton.quantization import awq_cache_file, calibration_data, report, resumable
from vila_triton.quantization import pipeline as awq
from vila_triton.quantization.config import QuantizeConfig
from vila_triton.registry import OPS, discover, tuned_tables
from vila_triton.registry.sources import source_of
from vila_triton.tiny.examples import EXAMPLES_DIR as EXAMPLES

from . import mutate
from .worker import PLANTED

INT4 = BUNDLED_CHECKPOINT.with_name("checkpoint-int4")
TEXT = "How many shapes are there? Describe the picture: a yellow triangle left of two blue squares, and 3 stars. "


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# Tensors


def some_tensors() -> dict[str, torch.Tensor]:
    kinds = {"half": torch.float16, "brain": torch.bfloat16, "whole": torch.int64, "bytes": torch.uint8}
    encoded_images = {name: torch.randint(0, 9, (3, 4), generator=generator()).to(kind) for name, kind in kinds.items()}
    return {
        **encoded_images,
        "number": torch.tensor(1.5),
        "none": torch.empty(0, 3),
        "truth": torch.tensor([True, False]),
    }


def touch_all(path: Path) -> None:
    tensors = open_tensors(path)
    for name in tensors:
        tensors[name].clone()
        tensors.release(name)


def whole_safetensors(folder: Path) -> list[bytes]:
    return [save(some_tensors(), {"format": "pt"}), save({"x": torch.arange(6.0)})]


def saved_by_torch(content: Any, zipped: bool = True) -> bytes:
    torch.save(content, out := io.BytesIO(), _use_new_zipfile_serialization=zipped)
    return out.getvalue()


def whole_torch(folder: Path) -> list[bytes]:
    x = torch.arange(12.0).reshape(3, 4)
    return [saved_by_torch(some_tensors()), saved_by_torch({"x": x, "view": x.T, "row": x[1], "odd": x.half()[1:, 1:]})]


def whole_index(suffix: str, folder: Path) -> list[bytes]:
    parts = [{"a": torch.ones(2), "b": torch.ones(3)}, {"c": torch.ones(4)}]
    names = [f"model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for part, name in zip(parts, names):
        (folder / name).write_bytes(save(part) if suffix == "safetensors" else saved_by_torch(part))
    weight_map = {key: name for part, name in zip(parts, names) for key in part}
    return [json.dumps({"metadata": {"total_size": 36}, "weight_map": weight_map}).encode()]


# Checkpoints


def checkpoint(file: str, folder: Path, source: Path = BUNDLED_CHECKPOINT, whole: bytes = b"") -> list[bytes]:
    """A copy of a model with Python files beside it that must not run; returns the bytes of the file to damage."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    for directory in (folder, folder / "llm", folder / "vision_tower"):
        (directory / "planted.py").write_text(f"open({PLANTED!r}, 'w')\n")
    return [whole or (folder / file).read_bytes()]


def talk(folder: Path) -> None:
    """Do as `ask` does: read everything and answer a question with an image."""
    default_num_frames(folder)
    talker = load_chat_model(folder, "cpu")
    list(Conversation(talker).ask("How many shapes?", [sample_image()], max_new_tokens=2))


@lru_cache
def sample_image() -> Image.Image:
    return open_image(EXAMPLES / "a.png")


GENERATION = json.dumps(
    {"bos_token_id": 1, "eos_token_id": [2, 5], "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 5}
    | {"max_length": 512, "pad_token_id": 3, "transformers_version": "4.36.2"}
).encode()
SPECIAL = json.dumps(
    {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "normalized": False, "special": True}}
    | {"unk_token": "<unk>", "pad_token": "<pad>", "additional_special_tokens": ["<image>"]}
).encode()


def whole_sentencepiece(folder: Path) -> list[bytes]:
    """VILA's folder as it was released: tokenizer.model and no tokenizer.json."""
    import sentencepiece

    checkpoint("config.json", folder)
    (folder / "llm" / "tokenizer.json").unlink()
    about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "llm" / "tokenizer_config.json").write_text(json.dumps({**about, "add_bos_token": True, "legacy": False}))
    models = []
    for kind in ("bpe", "unigram"):
        lines, out = iter([TEXT * 3, TEXT[::-1]]), io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=out, vocab_size=50, model_type=kind, minloglevel=2
        )
        models.append(out.getvalue())
    return models


def whole_processor(folder: Path) -> list[bytes]:
    VilaProcessor.from_pretrained(BUNDLED_CHECKPOINT).save_pretrained(folder)
    (folder / "planted.py").write_text(f"open({PLANTED!r}, 'w')\n")
    return [(folder / "processor_config.json").read_bytes()]


def process(folder: Path) -> None:
    VilaProcessor.from_pretrained(folder)(text="<image> What?", images=sample_image())


# Conversations and pictures


@lru_cache
def talker() -> ChatModel:
    return load_chat_model(BUNDLED_CHECKPOINT, "cpu")


def whole_conversations(folder: Path) -> list[bytes]:
    results = []
    for name, images in (("words", []), ("pictures", [sample_image()])):
        conversation = Conversation(talker())
        list(conversation.ask("How many shapes are there?", images, max_new_tokens=3))
        save_conversation(conversation, folder / name)
        results.append((folder / name).read_bytes())
    return results


def go_on(folder: Path) -> None:
    conversation = load_conversation(talker(), folder / "talk")
    list(conversation.ask("Describe the picture.", max_new_tokens=2))
    save_conversation(conversation, folder / "talk")


def encoded_images(kind: str, folder: Path) -> list[bytes]:
    """Images of a format in each mode that it has, one of them rotated by its EXIF data."""
    results, exif = [], Image.Exif()
    exif[0x0112] = 6
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"):
        image = sample_image().resize((24, 20))
        image = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        try:
            image.save(out := io.BytesIO(), kind, **({"exif": exif} if mode == "RGB" else {}))
        except (OSError, ValueError):  # the format has no such mode
            continue
        results.append(out.getvalue())
    return results


def filmed(kind: str, folder: Path) -> list[bytes]:
    first, *others = [sample_image().resize((24, 20)).rotate(30 * i) for i in range(4)]
    first.save(out := io.BytesIO(), kind, save_all=True, append_images=others, duration=40)
    return [out.getvalue()]


def look(folder: Path) -> None:
    talker().preprocess_images([open_image(folder / "picture")])


def watch(folder: Path) -> None:
    load_video_frames(folder / "film", 3)


# Bundles, tables, journals


def whole_bundles(folder: Path) -> list[bytes]:
    discover()
    weight = {"m": 2, "n": 3, "G": 2, "group": 32, "dtype": "float16", "order": "fma", "bias": True}
    norm = {"rows": 2, "e": 8, "dtype": "float16"}
    results = []
    for op, sizes in (("int4_matmul", weight), ("rms_norm", norm)):
        args = example_args(OPS[op], 0, **sizes)
        repro_bundle.save(folder / op, OPS[op].impls["reference"], {}, args, 0, "strided", sizes, "a test")
        results.append((folder / op).read_bytes())
    return results


def call_again(folder: Path) -> None:
    repro_bundle.resolve(repro_bundle.load(folder / "call.bundle"))


SEARCH = {"op": "int4_matmul", "impl": "gemv", "kernel": "a", "space": "b", "triton": "3", "device": "Toy GPU"}
ROWS = f"int4_matmul-gemv-{short_hash(canonical_json(SEARCH).encode())}.jsonl"
CONFIGS = ({"BLOCK_N": 16, "BLOCK_K": 128, "num_warps": 4}, {"BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 2})


def whole_journals(folder: Path) -> list[bytes]:
    discover()
    content = journal.Journal(folder, SEARCH)
    stamp = {"date": "2026-01-01", "commit": "abc", "torch": "2.11", "timer": "gpu"}
    for m in (1, 4, 16):
        sizes = {"m": m, "n": 64, "G": 2, "group": 64, "dtype": "float16"}
        for i, config in enumerate(CONFIGS):
            content.add("compiled", config, sizes, registers=40, spills=0, shared=1024, reason=None)
            content.add("gated", config, sizes, reason=None)
            times = {"seconds": 1e-5 * (i + m), "predicted": 2e-5, "reason": None}
            content.add("tune", config, sizes, status="timed", **times, **stamp)
        late = {"status": "cost", "seconds": None, "predicted": None, "reason": "predicted 9 times as long"}
        content.add("tune", {**CONFIGS[0], "num_warps": 8}, sizes, **late, **stamp)
    return [content.file.read_bytes()]


def search_on(folder: Path) -> None:
    """Do as `bench.tune` does with a journal that it finds."""
    journal.find_journals(folder, "int4_matmul", "gemv")
    content = journal.Journal(folder, SEARCH)
    rows, varying = list(content.entries["tune"].values()), OPS["int4_matmul"].dynamic_sizes
    for kind in content.entries:
        content.get(kind, CONFIGS[0], {"m": 1})
    if entry := table.build_entry(SEARCH, rows, varying):
        table.write_table(folder / "tables", "Toy GPU", entry)
        list(table.regret_report(rows, CONFIGS[0], varying))


def whole_tables(folder: Path) -> list[bytes]:
    discover()
    sizes = {"n": 64, "G": 2, "group": 64, "dtype": "float16"}
    for name in ("splitk", "gemv"):
        impl = OPS["int4_matmul"].impls[name]
        ranges = [
            {"sizes": {**sizes, "m": m}, "tuned_at": {"m": at}, "config": dict(impl.configs[0]), "seconds": 1e-5 * at}
            for m, at in (([0, 2], 1), ([3, None], 8))
        ]
        otherwise = {"config": dict(impl.configs[-1]), "worst_regret": 1.1, "sizes_without_time": 0}
        entry = {
            "op": "int4_matmul",
            "impl": name,
            **tuned_tables.entry_fingerprint(impl),
            "source": source_of(impl),
            "ranges": ranges,
            "otherwise": otherwise,
        }
        file = table.write_table(folder, "Toy GPU", entry)
    content = json.loads(file.read_text())
    content["choices"]["int4_matmul"] = {"first": 1, "last": 8, "choice": [[1, "gemv"], "splitk"]}
    return [json.dumps(content).encode()]


def look_up(folder: Path) -> None:
    """Look a table up as a call on a GPU does, then list stale entries and write one anew, as `bench.tune` does."""
    for cached in (
        tuned_tables.load_table,
        tuned_tables.valid_entry,
        tuned_tables.table_choice,
        tuned_tables.tuned_config_at,
    ):
        cached.cache_clear()
    with (
        patch.object(tuned_tables, "tables_dir", lambda: folder),
        patch.object(tuned_tables, "gpu_name", lambda device: "Toy GPU"),
    ):
        for phase in ("prefill", "decode"):
            tuned_tables.default_choices_for(torch.device("cuda"), phase)
        for name in ("splitk", "gemv"):
            for m in (1, 8, 10**6):
                sizes = {"m": m, "n": 64, "G": 2, "group": 64, "dtype": "float16"}
                config = tuned_tables.tuned_config_at(OPS["int4_matmul"].impls[name], "Toy GPU", tuple(sizes.items()))
                assert config is None or dict(**config)
    list(tune.stale_entries(folder))
    kept = next((e for e in tuned_tables.read_table(folder / "toy-gpu.json")["entries"] if e["impl"] == "splitk"), None)
    if kept:
        table.write_table(folder, "Toy GPU", {**kept, "impl": "splitk"})


# The quantiser


META = {name: torch.empty(4, 4, device="meta", dtype=torch.float16) for name in "abc"}


def shards(folder: Path) -> ShardWriter:
    return ShardWriter(folder, META, "a test", max_shard_bytes=40)


def whole_shard_journals(folder: Path) -> list[bytes]:
    begun = shards(folder)
    for name in ("a", "b"):
        begun.write_tensor(name, torch.ones(4, 4, dtype=torch.float16))
    return [(folder / JOURNAL_NAME).read_bytes()]


def write_on(folder: Path) -> None:
    content = shards(folder)
    for name in sorted(content.missing):
        content.write_tensor(name, torch.ones(4, 4, dtype=torch.float16))
    content.close()
    touch_all(folder)


def prompts() -> calibration_data.CalibrationSet:
    return calibration_data.CalibrationSet([torch.randint(0, 128, (8,), generator=generator()) for _ in range(2)], None)


def rounded(folder: Path) -> None:
    """Resume `quantize` on finished work, and write its report."""
    resumable.already_written(folder, folder, "vila-triton")
    source, settings = open_checkpoint(BUNDLED_CHECKPOINT), QuantizeConfig(group_size=64)
    quantized = awq.quantize_checkpoint(source, folder, settings, prompts(), torch.device("cpu"))
    for name in quantized.tensors["llm"]:
        quantized.tensors["llm"][name].clone()
    check_checkpoint(quantized)
    about = {"method": "awq-gptq", "work": resumable.read_work_key(folder), "format": "vila-triton"}
    report.write_report(folder, about, {"llm": resumable.read_reports(folder, "llm")})


def whole_work(file: str, folder: Path) -> list[bytes]:
    rounded(folder)
    return [(folder / file).read_bytes()]


def only_header(change: mutate.Mutate, rng: Any, whole: bytes) -> bytes:
    """Damage near the beginning of a large file."""
    return change(rng, whole[:8192]) + whole[8192:] if rng.random() < 0.9 else change(rng, whole)


def whole_caches(folder: Path) -> list[bytes]:
    llm = "model.layers.0."
    scale = [(llm + "input_layernorm", tuple(f"{llm}self_attn.{x}_proj" for x in "qkv"), torch.ones(256))]
    clip = [(llm + "mlp.down_proj", torch.ones(256, 8, 1))]
    return [saved_by_torch({"scale": scale, "clip": clip})]


def load_cache(folder: Path) -> None:
    awq_cache_file.load_awq_cache(
        folder / "found.pt",
        LlamaConfig.from_dict(read_json(BUNDLED_CHECKPOINT / "llm" / "config.json")),
        64,
        torch.float16,
    )


def calibrate(file: str, folder: Path) -> None:
    samples = calibration_data.sample_subset(list(calibration_data.read_samples([folder / file])), 4, 0)
    calibration_data.build_calibration_set(samples, talker().tokenizer, talker().processor, talker().model.config, 16)


def whole_lines(folder: Path) -> list[bytes]:
    shutil.copy(EXAMPLES / "a.png", folder)
    samples: list[Any] = [{"text": TEXT}, {"image": "a.png", "question": "How many?", "answer": "3"}]
    samples.append({"image": ["a.png", "a.png"], "question": "Which <image> and <image>?"})
    return ["\n".join(map(json.dumps, samples)).encode()]
