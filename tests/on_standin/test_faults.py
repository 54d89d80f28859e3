"""Faults that only a GPU would show, planted in the product one at a time: the checks of the stand-in find each."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import test_paths
import torch
from hf_reference import build, padded, pictures

from bench.measure import runners
from vila_triton import VilaLlamaForCausalLM
from vila_triton.cache import paged_cache, paged_tensors
from vila_triton.engine import decode_loop, decode_step, draws, sampling
from vila_triton.hf import modeling_vila_llama
from vila_triton.images import feature_cache as known_pictures
from vila_triton.models import llama, vila
from vila_triton.registry import OPS, REFERENCE, discover, use

discover()


class DropCall(ast.NodeTransformer):
    """x.name(...) becomes x."""

    def __init__(self, name: str):
        self.name, self.changes = name, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == self.name:
            self.changes += 1
            return node.func.value
        return node


class DropKeyword(ast.NodeTransformer):
    """name=... is left out of every call."""

    def __init__(self, name: str):
        self.name, self.changes = name, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        left = [k for k in node.keywords if k.arg != self.name]
        self.changes += len(node.keywords) - len(left)
        node.keywords = left
        return node


class DropArguments(ast.NodeTransformer):
    """A call of x.name takes nothing."""

    def __init__(self, name: str):
        self.name, self.changes = name, 0

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == self.name:
            node.args, self.changes = [], self.changes + 1
        return node


class Prepend(ast.NodeTransformer):
    """A statement before all others of the innermost loop, or of the function where there is none."""

    def __init__(self, statement: str):
        self.body, self.changes = ast.parse(statement).body, 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        loops = [n for n in ast.walk(node) if isinstance(n, ast.While)]
        body = (loops or [node])[-1].body
        body[:0] = self.body
        self.changes += 1
        return node


def changed(function: Any, fault: Any) -> Any:
    """The code of the function with the fault in it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition: Any = tree.body[0]
    definition.decorator_list = []
    tree = ast.fix_missing_locations(fault.visit(tree))
    assert fault.changes, f"{function.__name__} has no place for the fault"
    names: dict[str, Any] = {}
    exec(compile(tree, inspect.getfile(function), "exec"), function.__globals__, names)
    return names[function.__name__].__code__


@pytest.fixture(scope="module")
def model() -> VilaLlamaForCausalLM:
    return build(dtype=torch.float32, seed=2, gain=2.0).cuda()  # pyright: ignore[reportCallIssue]


def answers(model: VilaLlamaForCausalLM) -> None:
    """Sampled answers about a picture, which need every part of the model."""
    ids, mask = padded([[1, 5, -200, 9], [1, 7]], "left")
    with use(**dict.fromkeys(OPS, REFERENCE)), torch.no_grad():
        images = pictures(model, 1).cuda()
        options: dict[str, Any] = {"max_new_tokens": 2, "eos_token_id": 60, "do_sample": True, "seed": 1}
        model.generate(ids.cuda(), images=images, attention_mask=mask.cuda(), **options)


def waits(model: VilaLlamaForCausalLM) -> None:
    """A decoded token waits for nothing."""
    with torch.no_grad():
        test_paths.test_decode_step_waits_for_nothing((None, model), 1, {})


def captured(model: VilaLlamaForCausalLM) -> None:
    """A step is captured in a graph."""
    test_paths.test_decode_step_is_captured_and_replayed_for_other_tokens((None, model))


def known(model: VilaLlamaForCausalLM) -> None:
    """Pictures are known by their content."""
    known_pictures.ImageFeatureCache(model.encode_images)(pictures(model, 1).cuda())


def forward(model: VilaLlamaForCausalLM) -> None:
    """A pass that keeps nothing."""
    with use(**dict.fromkeys(OPS, REFERENCE)), torch.no_grad():
        model(torch.tensor([[1, 5]], device="cuda"), use_cache=False)


def random_weights(model: VilaLlamaForCausalLM) -> None:
    """A model for timing."""
    runners.build_model(model.vila_config.llm, "float32", torch.device("cuda"))


@dataclass(frozen=True)
class Fault:
    """A change of a function of the product, the check that must not pass with it, and what that says."""

    function: Callable[..., Any]
    change: Any
    check: Callable[[VilaLlamaForCausalLM], None]
    said: str


DECODE = OPS["decode_attention"].impls["triton"].fn
CAPTURING = "not permitted when stream is capturing"
COUNTER = r"assert Counter"
TWO = "found at least two devices"
OF_CPU = "Expected a 'cuda' device type for generator but found 'cpu'"
FAULTS = {
    "a value read back inside a captured launcher": Fault(
        DECODE, Prepend("seq_lens.max().item()"), captured, CAPTURING
    ),
    "a tensor of the CPU sent to the device inside one": Fault(
        DECODE, Prepend("torch.tensor([1.0], device=q.device)"), captured, CAPTURING
    ),
    "a result looked at while it is captured": Fault(
        llama.attention, Prepend("assert x.sum().isfinite()"), captured, CAPTURING
    ),
    "a value read back at every step": Fault(
        decode_loop.DecodeLoop._update, Prepend("bool(buffers.is_live.any())"), waits, COUNTER
    ),
    "a mask that selects at every step": Fault(
        paged_cache.PagedKVCache.decode_batch, Prepend("block_table[block_table > 0]"), waits, COUNTER
    ),
    "seeds on the CPU": Fault(draws.seed_tensor, DropKeyword("device"), answers, "on the same device"),
    "numbers of draws on the CPU": Fault(
        decode_step.StepBuffers.empty.__func__,  # pyright: ignore[reportFunctionMemberAccess]
        DropKeyword("device"),
        answers,
        TWO,
    ),
    "a draw that is looked at": Fault(sampling.draw_tokens, Prepend("bool(draw.any())"), waits, COUNTER),
    "angles on the CPU": Fault(
        llama.rotary_cos_sin, Prepend("positions = positions.cpu()"), answers, "cos is on cpu, expected cuda:0"
    ),
    "slots and tables on the CPU": Fault(
        paged_tensors.PagedCache._describe_step, DropKeyword("device"), answers, "cpu"
    ),
    "a cache on the CPU": Fault(
        modeling_vila_llama.VilaLlamaForCausalLM.new_cache, DropKeyword("device"), waits, "cpu"
    ),
    "places of pictures on the CPU": Fault(vila.splice_image_tokens, DropKeyword("device"), answers, TWO),
    "pixels read where they are": Fault(known_pictures.image_hash, DropCall("cpu"), known, "can't convert cuda:0"),
    "positions on the CPU": Fault(
        paged_cache.UncachedBatch.__init__, DropKeyword("device"), forward, "cos is on cpu, expected cuda:0"
    ),
    "weights drawn by a generator of the CPU": Fault(
        runners.build_model, DropArguments("Generator"), random_weights, OF_CPU
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str, model: VilaLlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    fault.check(model)
    function: Any = inspect.unwrap(fault.function)
    monkeypatch.setattr(function, "__code__", changed(function, fault.change))
    with pytest.raises((RuntimeError, TypeError, ValueError, AssertionError), match=fault.said):
        fault.check(model)
