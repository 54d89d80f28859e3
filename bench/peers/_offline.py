"""Running a library's launchers without a GPU: interpreted on CPU tensors, or compiled on tensors without data."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import Config, knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner

from vila_triton.ops import KVPages
from vila_triton.registry import Unsupported

from ..compiler.gpus import TARGETS

# By CUDA architecture: the name of a GPU, and its multiprocessors.
GPUS = {
    80: ("NVIDIA A100", 108),
    89: ("NVIDIA GeForce RTX 4090", 128),
    90: ("NVIDIA H100", 132),
    100: ("NVIDIA B200", 148),
}
HALF_DTYPES = (torch.float16, torch.bfloat16)


def check_tensors(
    peer: str, x: Tensor, *others: KVPages, dtypes: Sequence[torch.dtype] = HALF_DTYPES, interpreted: bool = True
) -> None:
    """Unsupported unless a launcher can run on these tensors, which must have one dtype.

    interpreted: Triton's interpreter can run its kernels.
    """
    if x.dtype not in dtypes:
        raise Unsupported(f"{peer}: {x.dtype} is not one of {', '.join(map(str, dtypes))}")
    for y in others:
        if not isinstance(y, Tensor):
            raise Unsupported(f"{peer}: does not read our quantized pages")
        if y.dtype != x.dtype:
            raise Unsupported(f"{peer}: does not mix {x.dtype} and {y.dtype}")
    if x.device.type == "cpu" and not (interpreted and knobs.runtime.interpret):
        reason = "only interpreted (set TRITON_INTERPRET=1)" if interpreted else "not even interpreted"
        raise Unsupported(f"{peer}: runs on the CPU {reason}")
    if x.dtype == torch.bfloat16 and knobs.runtime.interpret:
        raise Unsupported(f"{peer}: Triton's interpreter computes wrong numbers in bfloat16")
    if not x.numel():
        raise Unsupported(f"{peer}: does not take an empty tensor")


def check_plain_attention(peer: str, numerics: str, return_lse: bool) -> None:
    """Unsupported if a call asks for more than the result of attention."""
    if numerics != "fast":
        raise Unsupported(f"{peer}: does not promise what the numerics {numerics!r} do")
    if return_lse:
        raise Unsupported(f"{peer}: is called without its log-sum-exp")


def active_driver() -> Any:
    """Triton's driver; where there is none, as in the interpreter, one that names an A100."""
    try:
        return triton.runtime.driver.active
    except RuntimeError:
        return SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 80, 32))


@contextmanager
def fake_gpu(x: Tensor | None = None) -> Iterator[None]:
    """Inside, questions of a launcher about its GPU are answered, and it takes its first config instead of timing all.

    This applies only where x is not on a GPU (without x: where there is none); else nothing changes. The GPU is the one
    that Triton compiles for, and an A100 if kernels are interpreted. Errors: Unsupported if it is not one of `GPUS`.
    """
    if torch.cuda.is_available() if x is None else x.is_cuda:
        yield
        return
    driver = active_driver()
    target = driver.get_current_target()
    if target.backend != "cuda" or target.arch not in GPUS:
        raise Unsupported(f"compiled without a GPU only for {', '.join(f'sm_{arch}' for arch in GPUS)}")
    name, sms = GPUS[target.arch]
    gpu = SimpleNamespace(
        name=name,
        major=target.arch // 10,
        minor=target.arch % 10,
        multi_processor_count=sms,
        shared_memory_per_block_optin=TARGETS[f"sm_{target.arch}"].max_shared_per_block,
    )
    cuda_functions = {
        "get_device_properties": lambda device=None: gpu,
        "get_device_capability": lambda device=None: (gpu.major, gpu.minor),
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
        "device": lambda device=None: nullcontext(),
    }
    driver_utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": gpu.shared_memory_per_block_optin}
    )
    with (
        patch.multiple(torch.cuda, **cuda_functions),
        patch.object(triton.runtime.driver, "_active", driver),
        patch.object(driver, "utils", driver_utils, create=True),
        use_first_config(),
    ):
        yield


@contextmanager
def use_first_config(change: Callable[[Config], Config] | None = None) -> Iterator[None]:
    """Inside, `triton.autotune` times nothing: the first config that the library's own pruning leaves is taken.

    change: makes from the library's first config the only one that there is to prune.
    """

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args))
        with patch.object(self, "configs", [change(self.configs[0])] if change else self.configs):
            config = self.prune_configs(kwargs)[0]
        if knobs.runtime.interpret:  # which fails on an argument that is a bool and no constexpr
            kwargs = {name: int(value) if isinstance(value, bool) else value for name, value in kwargs.items()}
        if config.pre_hook:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    with patch.object(Autotuner, "run", run):
        yield
