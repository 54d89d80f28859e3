"""Code that no mutant is made of, each kind with its reason: no result of an interpreted call depends on it."""

import ast
import re

from .source import Source

COST_MODEL = re.compile(r"launch_cost|is_valid|is_promising")
LAUNCH_SETTINGS = re.compile(r"num_warps|num_stages|stages_for_dtype")
COMPILED_ONLY = re.compile(r'\b(ASM|OPAQUE|COMPILED|bfloat16)\b|"cuda"')
COMPILED_FUNCTIONS = {"opaque_copy", "ieee_operand", "target_flags", "code_to_bfloat16", "num_sms"}

TEXT = "text, what errors say, assertions of the compiler"
SIGNATURE = "decorators, defaults and annotations"
CONFIGS = "configs, search spaces and constants at module level"
COST = "cost models and search spaces"
COMPILED = "what only compiled code runs: assembly, bfloat16, CUDA"
LAUNCH = "num_warps and num_stages"


def reason_to_leave_out(source: Source, node: ast.AST) -> str | None:
    """Returns the reason that a node is left out; None if it is not."""
    function, inside = source.function(node), node
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return TEXT
    for parent in source.ancestors(node):
        if isinstance(parent, ast.Raise | ast.JoinedStr | ast.Assert):
            return TEXT
        if isinstance(parent, ast.Call) and "static_assert" in source.segment(parent.func):
            return TEXT
        if isinstance(parent, ast.FunctionDef | ast.ClassDef | ast.AnnAssign) and is_signature(parent, inside):
            return SIGNATURE
        inside = parent
    if not source.file.startswith("kernels/"):
        return None
    if function is None:
        return CONFIGS
    if COST_MODEL.search(function.name):
        return COST
    if function.name in COMPILED_FUNCTIONS or is_compiled_only(source, node):
        return COMPILED
    return LAUNCH if is_launch_setting(source, node) else None


def is_signature(parent: ast.FunctionDef | ast.ClassDef | ast.AnnAssign, inside: ast.AST) -> bool:
    """Returns True for a part of a definition that is not its body, or of an assignment that is not its value."""
    if isinstance(parent, ast.AnnAssign):
        return inside is not parent.value
    return not isinstance(inside, ast.stmt)


def is_compiled_only(source: Source, node: ast.AST) -> bool:
    """Returns True for the branch, or the rest of a condition, that an interpreted kernel never reaches."""
    inside = node
    for parent in source.ancestors(node):
        if isinstance(parent, ast.If) and inside in parent.body and COMPILED_ONLY.search(source.segment(parent.test)):
            return True
        if isinstance(parent, ast.BoolOp | ast.IfExp) and COMPILED_ONLY.search(source.segment(parent)):
            return True
        inside = parent
    return False


def is_launch_setting(source: Source, node: ast.AST) -> bool:
    """Returns True for a value that becomes a number of warps or stages, which an interpreted kernel does not see."""
    for parent in source.ancestors(node):
        if isinstance(parent, ast.keyword) and LAUNCH_SETTINGS.search(parent.arg or ""):
            return True
        if isinstance(parent, ast.Assign) and LAUNCH_SETTINGS.search(source.segment(parent.targets[0])):
            return "BLOCK" not in source.segment(parent.targets[0])
    return False
