"""One language model with random weights, trained by `VilaLlamaForCausalLM` with any choice of kernels, and by Hugging
Face's eager `LlamaForCausalLM` on the same weights.

Every runner does the same work: the loss of every token after the first, and its gradients for every parameter; of an
int4 model for adapters of rank 16 at every linear of the layers (peft's LoRA), which Hugging Face's has on dequantized
weights.
"""

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vila_triton import VilaLlamaConfig, VilaLlamaForCausalLM
from vila_triton.models.config import LlamaConfig, ProjectorConfig
from vila_triton.registry import REFERENCE, use
from vila_triton.tiny.config import CONFIG, config_files

from .peak_memory import PeakMemory
from .runners import CODE_RMS, GROUP_SIZE, HF, hugging_face_model, parse_kernel_choices

RANK = 16
LINEARS = r"(.*\.)?model\.layers\.\d+\..*_proj"  # of the language model: a tower has linears of these names, too


def build_model(cfg: LlamaConfig, weight_format: str, device: torch.device) -> VilaLlamaForCausalLM:
    """Returns a model with random weights and, since no images are trained on, the bundled model's vision tower.
    `weight_format` is the name of a dtype, or int4, which computes in bfloat16 on a CPU and in float16 on a GPU.
    """
    half = "bfloat16" if device.type == "cpu" else "float16"
    is_int4 = weight_format == "int4"
    llm = replace(cfg, group_size=GROUP_SIZE if is_int4 else None)
    projector = ProjectorConfig("mlp_downsample", CONFIG.vision_tower.hidden_size, cfg.hidden_size)
    top, parts = config_files(replace(CONFIG, llm=llm, mm_projector=projector))
    top["model_dtype"] = f"torch.{half if is_int4 else weight_format}"
    torch.manual_seed(0)
    model: Any = VilaLlamaForCausalLM(VilaLlamaConfig.from_configs(top, parts))
    with torch.no_grad():
        for name, x in model.llm.state_dict().items():
            if name.endswith(".scales"):  # outputs of linears are as large as inputs
                x.div_(CODE_RMS * GROUP_SIZE**0.5)
    for part in (model.vision_tower, model.mm_projector):
        part.requires_grad_(False)
    return model.to(device)


@dataclass(frozen=True)
class TrainingRunner:
    """A way to train a model: a module with Hugging Face's interface, under a choice of kernels."""

    name: str  # the choice, as in `parse_kernel_choices`, or Hugging Face's
    net: Any
    checkpointed: bool

    @property
    def kernels(self) -> Mapping[str, str]:
        return {} if self.name == HF else parse_kernel_choices(self.name)

    @property
    def dtype(self) -> torch.dtype:
        return next(x.dtype for x in self.net.parameters() if x.is_floating_point())

    def loss(self, ids: Tensor) -> Tensor:
        """Returns the loss of ids [b, t]."""
        self.net.train()
        if self.checkpointed:
            self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.net.gradient_checkpointing_disable()
        with use(**self.kernels):
            return self.net(input_ids=ids, labels=ids, use_cache=False).loss

    def step(self, ids: Tensor) -> None:
        """Leaves the gradients of the loss in all parameters, in new tensors."""
        self.clear()
        self.loss(ids).backward()

    def clear(self) -> None:
        """Frees the gradients."""
        self.net.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step, by the parameters' names in Hugging Face's model."""
        named = {language_name(name): p.grad for name, p in self.net.named_parameters()}
        return {name: grad for name, grad in named.items() if grad is not None}

    def tensors(self) -> list[Tensor]:
        """All tensors that are there before a step."""
        return [*self.net.parameters(), *self.net.buffers()]


def language_name(name: str) -> str:
    """The name of a parameter without what wraps the language model: a part of VILA, an adapter."""
    return re.sub(r"^.*?(?=model\.(layers|embed_tokens|norm)\.|lm_head\.)", "", name)


def make_runners(
    cfg: LlamaConfig, weight_format: str, names: Sequence[str], device: torch.device
) -> list[TrainingRunner]:
    """Returns a runner of each name, without and with checkpointing, all of the same weights."""
    ours = build_model(cfg, weight_format, device)
    nets: dict[bool, Any] = {False: ours}
    if HF in names:
        nets[True] = hugging_face_model(ours.params.llm, ours.vila_config.llm, ours.dtype).requires_grad_()
    if weight_format == "int4":
        nets = {is_theirs: with_adapters(net) for is_theirs, net in nets.items()}
    return [TrainingRunner(name, nets[name == HF], checkpointed) for checkpointed in (False, True) for name in names]


def with_adapters(net: Any) -> Any:
    """Returns the model wrapped by peft, with random adapters that are the same for every model; all else is frozen."""
    from peft import LoraConfig, get_peft_model  # of the extra `test`

    wrapped = get_peft_model(net, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LINEARS))
    adapters = {language_name(name): p for name, p in wrapped.named_parameters() if p.requires_grad}
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, x in sorted(adapters.items()):
            x.copy_(torch.randn(x.shape, generator=rng) / x.shape[1] ** 0.5)
    return wrapped


def gradient_errors(runner: TrainingRunner, exact: Mapping[str, Tensor], ids: Tensor) -> dict[str, float]:
    """Returns the distance of each gradient from the exact one, relative to that: root mean squares."""
    runner.step(ids)
    found = runner.gradients()
    runner.clear()
    if found.keys() != exact.keys():
        raise ValueError(f"gradients of {sorted(found.keys() ^ exact.keys())} are missing or too many")
    return {name: float((found[name].double() - x).norm() / x.norm()) for name, x in exact.items()}


def exact_gradients(net: Any, ids: Tensor) -> dict[str, Tensor]:
    """Returns the gradients of a model of ours in float64, by the references."""
    exact = TrainingRunner(REFERENCE, copy.deepcopy(net).double(), checkpointed=False)
    exact.step(ids)
    return exact.gradients()


def wrong_gradients(runner: TrainingRunner, exact: Mapping[str, Tensor], allowed: float, ids: Tensor) -> str | None:
    """Returns one line saying why a runner's gradients are wrong, None if they are right: if the largest of
    `gradient_errors` is at most `allowed`, which is twice that of the references in the same dtype.
    """
    name, error = max(gradient_errors(runner, exact, ids).items(), key=lambda item: item[1])
    if error <= allowed:
        return None
    return f"the gradient of {name} is off by {error:.2e} of it, and those of the references by {allowed / 2:.2e}"


def kept_tensors(runner: TrainingRunner, ids: Tensor) -> Counter[tuple[str, int]]:
    """Counts what autograd keeps of a forward pass for the backward pass, beside parameters: storages, by the dtype and
    shape of the tensor that is kept of each first, and the bytes of the storage.
    """
    known = {x.untyped_storage()._cdata for x in (*runner.tensors(), ids)}
    kept: dict[int, tuple[str, int]] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in known:
            label = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
            kept.setdefault(storage._cdata, (label, storage.nbytes()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = runner.loss(ids)  # holds what is kept, whose addresses others would take otherwise
    del loss
    return Counter(kept.values())


def peak_bytes(runner: TrainingRunner, ids: Tensor) -> int:
    """Returns the most bytes that tensors of a step held at once beyond the parameters, gradients included."""
    device = ids.device
    runner.clear()
    if device.type == "cuda":
        runner.step(ids)  # compiles
        runner.clear()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
        runner.step(ids)
        peak = torch.cuda.max_memory_allocated(device) - allocated
    else:
        with PeakMemory([*runner.tensors(), ids]) as memory:
            runner.step(ids)
        peak = memory.peak_bytes
    runner.clear()
    return peak
