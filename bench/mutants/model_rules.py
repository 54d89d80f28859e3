"""The rules that make mutants of the Python around the kernels: the cache, prompts, positions, packing, sampling."""

import ast
from collections.abc import Iterator

from .kernel_rules import OTHER_COMPARISON, called, rule, swap_operands
from .source import Change, Rule, Source

MODEL_RULES: dict[str, Rule] = {"swap operands": swap_operands}
OPPOSITES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}
NEGATED = {ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is"}


@rule("another comparison", MODEL_RULES)
def another_comparison(source: Source, node: ast.AST) -> Iterator[Change]:
    """< and <=, > and >=; == and !=, in and not in, is and is not."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        operators = NEGATED | {k: v for k, v in OTHER_COMPARISON.items() if k not in NEGATED}
        left, right = source.operand(node.left), source.operand(node.comparators[0])
        yield source.replace(node, f"{left} {operators[type(node.ops[0])]} {right}")


@rule("negate a condition", MODEL_RULES)
def negate_condition(source: Source, node: ast.AST) -> Iterator[Change]:
    """if c becomes if not c; so do conditional expressions and comprehensions."""
    tests = [node.test] if isinstance(node, ast.If | ast.IfExp) else []
    tests += node.ifs if isinstance(node, ast.comprehension) else []
    for test in tests:
        if not isinstance(test, ast.Compare):
            yield source.replace(test, f"not {source.operand(test)}")


@rule("and becomes or", MODEL_RULES)
def and_becomes_or(source: Source, node: ast.AST) -> Iterator[Change]:
    """and becomes or, and or and; or an operand is left out."""
    if isinstance(node, ast.BoolOp):
        operator = " or " if isinstance(node.op, ast.And) else " and "
        yield source.replace(node, f"({operator.join(map(source.operand, node.values))})")
        for i in range(len(node.values)):
            others = [source.operand(x) for j, x in enumerate(node.values) if j != i]
            yield source.replace(node, f"({(' and ' if isinstance(node.op, ast.And) else ' or ').join(others)})")


@rule("off by one", MODEL_RULES)
def off_by_one(source: Source, node: ast.AST) -> Iterator[Change]:
    """An index, an end of a slice or of a range, one further."""
    ends = [node.lower, node.upper] if isinstance(node, ast.Slice) else []
    if isinstance(node, ast.Call) and called(source, node) in ("range", "torch.arange"):
        ends += [x for x in node.args[:2] if not isinstance(x, ast.Starred)]
    for end in ends:
        if end is not None:
            yield source.replace(end, f"{source.operand(end)} + 1")
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield source.replace(node, str(node.value + 1))


@rule("drop an offset", MODEL_RULES)
def drop_offset(source: Source, node: ast.AST) -> Iterator[Change]:
    """a + b becomes a, or a - b."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        yield source.replace(node, source.operand(node.left))
        other = "-" if isinstance(node.op, ast.Add) else "+"
        yield source.replace(node, f"{source.operand(node.left)} {other} {source.operand(node.right)}")


@rule("swap arguments", MODEL_RULES)
def swap_arguments(source: Source, node: ast.AST) -> Iterator[Change]:
    """The first two arguments of a call change places."""
    if isinstance(node, ast.Call) and len(node.args) >= 2:
        left, right = node.args[:2]
        if not all(isinstance(x, ast.Name | ast.Attribute | ast.Subscript | ast.BinOp) for x in (left, right)):
            return
        between = source.text[source.span(left)[1] : source.span(right)[0]]
        swapped = f"{source.segment(right)}{between}{source.segment(left)}"
        yield Change(source.span(left)[0], source.span(right)[1], swapped)


@rule("drop a statement", MODEL_RULES)
def drop_statement(source: Source, node: ast.AST) -> Iterator[Change]:
    """A call for its effect, an update in place, a check."""
    in_place = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript)
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if in_place or call or isinstance(node, ast.AugAssign | ast.Raise | ast.Delete):
        yield source.replace(node, "pass")


@rule("the opposite function", MODEL_RULES)
def opposite_function(source: Source, node: ast.AST) -> Iterator[Change]:
    """min and max, any and all; not x becomes x; += becomes -=."""
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in OPPOSITES:
            end = source.span(node.func)[1]
            yield Change(end - len(name), end, OPPOSITES[name])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield source.replace(node, source.operand(node.operand))
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add | ast.Sub):
        operator = "-=" if isinstance(node.op, ast.Add) else "+="
        yield source.replace(node, f"{source.segment(node.target)} {operator} {source.segment(node.value)}")
