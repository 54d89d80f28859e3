"""The weights of a VILA folder for vLLM: the language model's under vLLM's names, the other parts as trees of ours."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.int4_layouts import AWQ_GEMM
from ..checkpoints.loading import open_checkpoint, part_tensors
from ..models import projector, vila, vision
from ..models.config import VilaConfig
from ..models.params import leaves, load_tree
from ..ops import Int4

BY_TOKEN = ("embed_tokens.weight", "lm_head.weight")  # weights with a row for each token


def language_model_weights(
    folder: Path, cfg: VilaConfig, dtype: torch.dtype, vocab_size: int
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the language model under the names of Hugging Face's LLaMA, int4 ones in AutoAWQ's layout, which
    vLLM can split among ranks. `vocab_size` counts vLLM's tokens; those that are not the model's get rows of zeros.
    Errors: `LoadError`; ValueError for a weight that this layout cannot hold.
    """
    specs = vila.param_specs(cfg, dtype).llm
    params = load_tree(specs, *part_tensors(open_checkpoint(folder), cfg, "llm"), "cpu")
    for spec, leaf in zip(leaves(specs, Int4), leaves(params, Int4), strict=True):
        if isinstance(leaf, Int4):
            prefix = spec.qweight.key.removesuffix("qweight")
            yield from ((prefix + name, x) for name, x in AWQ_GEMM.write(leaf).items())
        elif spec.key.endswith(BY_TOKEN):
            yield spec.key, nn.functional.pad(leaf, (0, 0, 0, vocab_size - len(leaf)))
        else:
            yield spec.key, leaf


def vision_parameters(
    folder: Path, cfg: VilaConfig, dtype: torch.dtype, device: torch.device
) -> tuple[vision.Tower, projector.Projector]:
    """The vision tower and the projector on a device. Errors: `LoadError`."""
    source, specs = open_checkpoint(folder), vila.param_specs(cfg, dtype)
    tower = load_tree(specs.vision_tower, *part_tensors(source, cfg, "vision_tower"), device)
    return tower, load_tree(specs.mm_projector, *part_tensors(source, cfg, "mm_projector"), device)
