"""VILA inside vLLM: the model, int4 linears and paged attention on the ops of this project.

vLLM brings continuous batching, prefix caching, the OpenAI server, tensor and pipeline parallelism. It finds `register`
by the entry point `vllm.general_plugins`, and calls it in each of its processes. Nothing else in this package imports
vLLM.

    config, loading       the config of a VILA folder as vLLM reads it, and its weights under vLLM's names
    model, processing     VILA as a multimodal model of vLLM: our vision tower and projector, vLLM's LLaMA
    chat                  conversations to token ids, by our templates
    int4_linear           linears with int4 weights, as a quantization of vLLM
    attention             attention over vLLM's KV cache, as a backend of vLLM
    kernel_choices        the implementations that run in the processes of vLLM
    worker                counts of calls, asked from outside
    server, middleware    `vila-triton serve`
"""

from importlib.metadata import version

MODE = "vila_triton"  # what vLLM calls our tokenizer and renderer: `tokenizer_mode`
TESTED_VERSIONS = ("0.32",)  # of vLLM, whose classes for plug-ins change with every release


def register() -> None:
    """Register everything with vLLM. Errors: RuntimeError for a version of vLLM that this was not tested with."""
    check_version()
    from transformers import AutoConfig
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from . import int4_linear, media  # noqa: F401 (their classes register themselves)
    from .config import VllmVilaConfig

    AutoConfig.register(VllmVilaConfig.model_type, VllmVilaConfig, exist_ok=True)
    ModelRegistry.register_model("VilaLlamaForCausalLM", f"{__name__}.model:VilaForVllm")
    TokenizerRegistry.register(MODE, f"{__name__}.chat", "VilaTokenizer")
    RENDERER_REGISTRY.register(MODE, f"{__name__}.chat", "VilaRenderer")

    register_attention()


def register_attention() -> None:
    """Register the attention backend, as CUSTOM and for CPUs; what other models run stays as it is."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.attention.PagedAttentionBackend")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.attention.CPU_ATTN")


def check_version() -> None:
    """Raise RuntimeError for a version of vLLM that the plug-in was not tested with."""
    from vllm import __version__

    if ".".join(__version__.split(".")[:2]) not in TESTED_VERSIONS:
        raise RuntimeError(
            f"vila-triton {version('vila-triton')} plugs into vLLM {', '.join(TESTED_VERSIONS)}, not {__version__}; "
            "install one of these, or set VLLM_PLUGINS= to run vLLM without it"
        )
