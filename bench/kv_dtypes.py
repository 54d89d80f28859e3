"""Measures the bytes of a cached token in each KV dtype, and the error it causes: `python -m bench.kv_dtypes`

Bytes are those of the tensors that a cache of the model allocates, scales and zero points included, over all layers.
The error is measured on the bundled model (or `--folder`): held-out questions are answered over float16 pages, then the
same tokens are decoded over pages of each other dtype. Only the logits of decoded tokens count: a prompt in one piece
attends to its own keys and values before they are quantized, every later token after.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vila_triton.cache.paged_cache import KV_DTYPES, PagedKVCache
from vila_triton.cache.paged_tensors import DEFAULT_PAGE_SIZE
from vila_triton.chat.conversation import ChatModel
from vila_triton.hf.chat_model import load_chat_model
from vila_triton.limits import COUNT, COUNT_OR_ZERO, SEED
from vila_triton.models.config import LlamaConfig
from vila_triton.paths import BUNDLED_CHECKPOINT

from . import shadow
from ._tool import kernels_option, tool
from .measure import model_configs, rows
from .measure.prompts import Prompt, bundled_prompts

BASELINE_DTYPE = "float16"


def bytes_per_token(cfg: LlamaConfig, kv_dtype: str) -> float:
    """Returns the bytes of a cached token's keys and values in all layers."""
    return PagedKVCache(cfg, 1, kv_dtype=kv_dtype, device="meta").nbytes / DEFAULT_PAGE_SIZE


def logits_error(chat_model: ChatModel, kv_dtype: str, prompts: Sequence[Prompt], steps: int) -> dict[str, Any]:
    """Returns the error of the decoded tokens' logits over all prompts, relative to those over float16 pages."""
    baseline_logits, kv_logits = [], []
    for prompt in prompts:
        chat_model.model.config.kv_dtype = BASELINE_DTYPE
        logits, tokens, prefilled = shadow.run_prompt(chat_model, prompt, steps)
        baseline_logits.append(logits[prefilled:].float())
        chat_model.model.config.kv_dtype = kv_dtype
        kv_logits.append(shadow.run_prompt(chat_model, prompt, steps, tokens)[0][prefilled:].float())
    old, new = torch.cat(baseline_logits), torch.cat(kv_logits)  # [t, v]
    shift = shadow.logit_shift(old, new, 0)
    return {
        "positions": len(old),
        "relative": ((new - old).norm() / old.norm()).item(),
        "divergence": shift.divergence.mean().item(),
        "most": shift.divergence.max().item(),
        "flips": len(shift.flips),
    }


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[kernels_option()]
    )
    parser.add_argument("--folder", type=Path, default=BUNDLED_CHECKPOINT, help="a VILA folder to measure the error on")
    parser.add_argument("--count", type=COUNT_OR_ZERO, default=20, help="questions; 0: bytes only")
    parser.add_argument("--steps", type=COUNT, default=32, help="tokens of an answer at most")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    print(f"{'bytes a cached token':24}{''.join(f'{name:>12}' for name in KV_DTYPES)}")
    for model in model_configs.model_files():
        token_bytes = {name: bytes_per_token(model_configs.load_model(model).llm, name) for name in KV_DTYPES}
        print(f"{model:24}{''.join(f'{n:12,.0f}' for n in token_bytes.values())}")
        results += [
            {"kind": "kv bytes", "model": model, "kv_dtype": name, "bytes": n} for name, n in token_bytes.items()
        ]
    if args.count:
        prompts = bundled_prompts(args.count, args.seed)
        chat_model = load_chat_model(args.folder)
        heads = ("positions", "logits off", "KL mean", "KL most", "flips")
        print(f"\n{'against ' + BASELINE_DTYPE + ' pages':24}{''.join(f'{head:>12}' for head in heads)}")
        for name in KV_DTYPES:
            row = logits_error(chat_model, name, prompts, args.steps)
            figures = "".join(f"{row[key]:12.2e}" for key in ("relative", "divergence", "most"))
            print(f"{name:24}{row['positions']:12}{figures}{row['flips']:12}")
            results.append({"kind": "kv error", "model": args.folder.name, "kv_dtype": name, "seed": args.seed, **row})
    if args.out:
        stamp = rows.stamp(torch.device("cpu") if not args.count else chat_model.model.device)
        rows.write(args.out, [{**row, **stamp} for row in results])
    return 0


if __name__ == "__main__":
    sys.exit(main())
