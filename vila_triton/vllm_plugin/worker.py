"""Counts of the kernels that a worker of vLLM has run: `--worker-extension-cls
vila_triton.vllm_plugin.worker.KernelCounts`.
"""

from typing import TYPE_CHECKING

from .kernel_choices import kernel_choices

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class KernelCounts:
    """A base class that vLLM adds to its worker."""

    vllm_config: "VllmConfig"

    def kernel_counts(self) -> dict[str, int]:
        """The calls of ops in this process since it started, as {"decode_attention=triton": 1280}.

        `LLM.collective_rpc("kernel_counts")` asks every worker for it.
        """
        counts = kernel_choices(self.vllm_config).counts
        return {f"{op}={impl}": calls for (op, impl), calls in sorted(counts.items())}
