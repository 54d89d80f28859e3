"""The implementations that ops run inside vLLM: those of `--additional-config`, for the rest configs/kernels.toml.

    additional_config={"vila_triton": {"kernels": {"decode_attention": "simple"}, "kernel_paths": ["mine.py"]}}

vLLM sends its config to each of its processes, so every worker chooses alike. A `use` in the process that asks for
answers has no effect.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import Context
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..engine.default_kernels import use_default_kernels
from ..hashing import canonical_json
from ..registry import discover, use, validate_choices
from ..registry.policy import CALL_COUNTER, Policy

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SECTION = "vila_triton"  # of vLLM's additional_config
OPTIONS = ("kernels", "kernel_paths")


class KernelChoices:
    """The implementations that run in this process, and how often each has run.

    kernels         by op a name or ranges of sizes, as for `use`
    kernel_paths    files and folders with implementations of one's own, for `registry.discover`
    counts          by (op, implementation) the calls so far

    Raises ValueError for an op or an implementation that does not exist, with those that do.
    """

    def __init__(self, kernels: Mapping[str, Any], kernel_paths: Sequence[str] = ()):
        if kernel_paths:
            discover(*kernel_paths)
        try:
            validate_choices(kernels)
        except (KeyError, ValueError) as error:
            raise ValueError(f"additional_config[{SECTION!r}]['kernels']: {error.args[0]}") from None
        self.kernels = kernels
        self.counts: Counter[tuple[str, str]] = Counter()
        self._policies: dict[tuple[torch.device, str], Policy] = {}

    def active(self, device: torch.device, phase: str) -> AbstractContextManager[None]:
        """Run ops inside the `with` as chosen, else as configs/kernels.toml says for this device and phase, and count
        them.

        phase: "prefill", "decode" or "batch_invariant", for which ValueError is raised as by `use_default_kernels`.
        """
        policy = self._policies.get((device, phase))
        if policy is None:  # made once, in a context without other choices, since a layer is to cost no search
            policy = self._policies[device, phase] = Context().run(self._make_policy, device, phase)
        return policy.active()

    def _make_policy(self, device: torch.device, phase: str) -> Policy:
        CALL_COUNTER.set(self.counts)
        with use(**self.kernels), use_default_kernels(device, phase):
            return Policy.current()


def kernel_choices(vllm_config: "VllmConfig") -> KernelChoices:
    """The choices of a config of vLLM. Engines of one process that choose alike share them, and count together.

    Raises ValueError for options that do not exist or are of another kind, and as `KernelChoices` does.
    """
    options = read_options(vllm_config.additional_config)
    return _choices_of(canonical_json(options.get("kernels", {})), tuple(options.get("kernel_paths", ())))


def read_options(additional_config: Any) -> dict[str, Any]:
    """The options of this plug-in in vLLM's additional_config.

    Raises ValueError for options that do not exist, with those that do, and for values of another kind.
    """
    options = additional_config.get(SECTION, {}) if isinstance(additional_config, Mapping) else {}
    name = f"additional_config[{SECTION!r}]"
    if not isinstance(options, dict):
        raise ValueError(f"{name} is {options!r}, expected a table with {' and '.join(OPTIONS)}")
    if unknown := [key for key in options if key not in OPTIONS]:
        raise ValueError(f"{name} has no option {unknown[0]!r}; there are: {', '.join(OPTIONS)}")
    if not isinstance(options.get("kernels", {}), dict):
        raise ValueError(f"{name}['kernels'] is {options['kernels']!r}, expected {{op: implementation}}")
    paths = options.get("kernel_paths", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{name}['kernel_paths'] is {paths!r}, expected a list of files and folders")
    return options


@cache
def _choices_of(kernels: str, kernel_paths: tuple[str, ...]) -> KernelChoices:
    return KernelChoices(json.loads(kernels), kernel_paths)
