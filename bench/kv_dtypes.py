"""What a cached token takes in each KV dtype, and what that does to a model: `python -m bench.kv_dtypes`.

Bytes are those of the tensors that a cache of the model allocates, scales and zeros included, over all layers. The
error is measured on the bundled model (or `--folder`): held-out questions are answered over float16 pages, then the
same tokens are decoded over pages of each other dtype. Only the logits of decoded tokens count: a prompt run in one
piece sees its own keys and values before they are rounded, every later token sees them after.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vila_triton.cache.paged_cache import KV_DTYPES, PAGE_SIZE, PagedCache
from vila_triton.chat.conversation import Talker
from vila_triton.limits import COUNT, MANY, SEED
from vila_triton.models.config import LlamaConfig
from vila_triton.paths import BUNDLED_CHECKPOINT

from . import shadow
from ._tool import tool
from .measure import model_configs, rows
from .measure import prompts as questions

BEFORE = "float16"


def bytes_of_token(cfg: LlamaConfig, kv_dtype: str) -> float:
    """Bytes of a cached token's keys and values in all layers."""
    return PagedCache(cfg, 1, kv_dtype=kv_dtype, device="meta").nbytes / PAGE_SIZE


def error(talker: Talker, kv_dtype: str, prompts: Sequence[questions.Prompt], steps: int) -> dict[str, Any]:
    """What becomes of the decoded tokens' logits over all prompts, relative to those over float16 pages."""
    before, now = [], []
    for prompt in prompts:
        talker.model.config.kv_dtype = BEFORE
        logits, tokens, prefilled = shadow.run(talker, prompt, steps)
        before.append(logits[prefilled:].float())
        talker.model.config.kv_dtype = kv_dtype
        now.append(shadow.run(talker, prompt, steps, tokens)[0][prefilled:].float())
    old, new = torch.cat(before), torch.cat(now)  # [t, v]
    shift = shadow.shift(old, new, 0)
    return {
        "positions": len(old),
        "relative": ((new - old).norm() / old.norm()).item(),
        "divergence": shift.divergence.mean().item(),
        "most": shift.divergence.max().item(),
        "flips": len(shift.flips),
    }


@tool
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=BUNDLED_CHECKPOINT, help="a VILA folder to measure the error on")
    parser.add_argument("--count", type=MANY, default=20, help="questions; 0: bytes only")
    parser.add_argument("--steps", type=COUNT, default=32, help="tokens of an answer at most")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", type=Path, help="append the rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    found: list[dict[str, Any]] = []
    print(f"{'bytes a cached token':24}{''.join(f'{name:>12}' for name in KV_DTYPES)}")
    for model in model_configs.known():
        taken = {name: bytes_of_token(model_configs.load(model).llm, name) for name in KV_DTYPES}
        print(f"{model:24}{''.join(f'{n:12,.0f}' for n in taken.values())}")
        found += [{"kind": "kv bytes", "model": model, "kv_dtype": name, "bytes": n} for name, n in taken.items()]
    if args.count:
        prompts = questions.bundled(args.count, args.seed)
        talker = Talker.from_pretrained(args.folder)
        heads = ("positions", "logits off", "KL mean", "KL most", "flips")
        print(f"\n{'against ' + BEFORE + ' pages':24}{''.join(f'{head:>12}' for head in heads)}")
        for name in KV_DTYPES:
            row = error(talker, name, prompts, args.steps)
            about = "".join(f"{row[key]:12.2e}" for key in ("relative", "divergence", "most"))
            print(f"{name:24}{row['positions']:12}{about}{row['flips']:12}")
            found.append({"kind": "kv error", "model": args.folder.name, "kv_dtype": name, "seed": args.seed, **row})
    if args.out:
        stamp = rows.stamp(torch.device("cpu") if not args.count else talker.model.device)
        rows.write(args.out, [{**row, **stamp} for row in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
