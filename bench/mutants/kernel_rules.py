"""The rules that make mutants of kernels and their launchers: each is a fault that has been made in such code.

A rule takes a node of the syntax tree and yields the changes of the text that it makes of it.
"""

import ast
import re
from collections.abc import Iterator

from .source import Change, Rule, Source

KERNEL_RULES: dict[str, Rule] = {}
FACTOR = re.compile(r"scale|LOG2_E|largest|rstd|ln_2|divisor|0\.0625|1 / ")  # names and numbers that rescale
NON_COMMUTATIVE = (ast.Sub, ast.Div, ast.FloorDiv, ast.Mod, ast.LShift, ast.RShift)
SWAPPED_CALLS = {"tl.dot": (0, 1), "tl.where": (1, 2), "tl.join": (0, 1), "select_heads": (1, 2)}
SHIFTED = {ast.Lt: "- 1", ast.LtE: "+ 1", ast.Gt: "+ 1", ast.GtE: "- 1"}  # of the right side; the other way is `<=`
OTHER_COMPARISON = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "=="}


def rule(name: str, rules: dict[str, Rule] = KERNEL_RULES):
    """Registers a rule by the name that tables print."""

    def register(fn: Rule) -> Rule:
        rules[name] = fn
        return fn

    return register


def called(source: Source, node: ast.AST) -> str:
    """Returns the text of what a call calls; "" if the node is no call."""
    return source.segment(node.func) if isinstance(node, ast.Call) else ""


def without_arguments(source: Source, call: ast.Call, names: tuple[str, ...]) -> Iterator[Change]:
    """Yields the change that leaves out keyword arguments that lie side by side."""
    arguments = sorted([*call.args, *call.keywords], key=lambda x: source.span(x)[0])
    dropped = [i for i, x in enumerate(arguments) if isinstance(x, ast.keyword) and x.arg in names]
    if dropped and dropped[0] and dropped == list(range(dropped[0], dropped[-1] + 1)):
        yield Change(source.span(arguments[dropped[0] - 1])[1], source.span(arguments[dropped[-1]])[1], "")


@rule("drop a mask")
def drop_mask(source: Source, node: ast.AST) -> Iterator[Change]:
    """A load or a store without its mask, with a part of it, or told that there is none."""
    if not isinstance(node, ast.Call):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd) and not is_bits(source, node):
            yield source.replace(node, source.operand(node.left))
            yield source.replace(node, source.operand(node.right))
        return
    name = called(source, node)
    if name in ("tl.load", "tl.store"):
        yield from without_arguments(source, node, ("mask", "other"))
    elif re.match(r"load_|attend_", name):
        for argument in node.args:
            if isinstance(argument, ast.Name) and re.search(r"mask$", argument.id):
                yield source.replace(argument, "None")


def is_bits(source: Source, node: ast.BinOp) -> bool:
    """Returns True for `&` of bits: one side is a number, or is shifted."""
    text = source.segment(node)
    return ">>" in text or isinstance(node.right, ast.Constant | ast.UnaryOp)


@rule("shift a bound")
def shift_bound(source: Source, node: ast.AST) -> Iterator[Change]:
    """x < N - 1; a range that begins or ends a step, or one, elsewhere; a least or largest value one more or less."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SHIFTED:
        right = node.comparators[0]
        yield source.replace(right, f"{source.operand(right)} {SHIFTED[type(node.ops[0])]}")
    name = called(source, node)
    if not isinstance(node, ast.Call):
        return
    if name in ("range", "tl.range") and node.args:
        first, last = (node.args[0], node.args[1]) if len(node.args) > 1 else (None, node.args[0])
        step = source.segment(node.args[2]) if len(node.args) > 2 else "1"
        yield source.replace(last, f"{source.operand(last)} - {step}")
        if first is not None:
            yield source.replace(first, f"{source.operand(first)} + {step}")
        if step != "1":
            yield source.replace(last, f"{source.operand(last)} - 1")
    if name in ("tl.minimum", "tl.maximum", "min", "max") and len(node.args) == 2:
        for argument in node.args:
            yield source.replace(argument, f"{source.operand(argument)} + 1")


@rule("drop a bound")
def drop_bound(source: Source, node: ast.AST) -> Iterator[Change]:
    """A minimum or maximum becomes one of its arguments."""
    if called(source, node) in ("tl.minimum", "tl.maximum", "min", "max") and isinstance(node, ast.Call):
        for argument in node.args if len(node.args) == 2 else ():
            yield source.replace(node, source.operand(argument))


@rule("< becomes <=")
def other_comparison(source: Source, node: ast.AST) -> Iterator[Change]:
    """The other comparison at the edge: < and <=, > and >=, == and !=."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OTHER_COMPARISON:
        left, right = node.left, node.comparators[0]
        operator = OTHER_COMPARISON[type(node.ops[0])]
        yield source.replace(node, f"{source.operand(left)} {operator} {source.operand(right)}")


@rule("swap operands")
def swap_operands(source: Source, node: ast.AST) -> Iterator[Change]:
    """a - b becomes b - a, and so for what else is not commutative."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, NON_COMMUTATIVE):
        operator = source.text[source.span(node.left)[1] : source.span(node.right)[0]].strip("() \n")
        yield source.replace(node, f"{source.operand(node.right)} {operator} {source.operand(node.left)}")
    places = SWAPPED_CALLS.get(called(source, node))
    if places and isinstance(node, ast.Call) and len(node.args) > places[1]:
        left, right = (node.args[i] for i in places)
        between = source.text[source.span(left)[1] : source.span(right)[0]]
        swapped = f"{source.segment(right)}{between}{source.segment(left)}"
        yield Change(source.span(left)[0], source.span(right)[1], swapped)


@rule("drop a cast to int64")
def drop_int64(source: Source, node: ast.AST) -> Iterator[Change]:
    """x.to(tl.int64) becomes x; a constant of int64 becomes one of int32."""
    if not isinstance(node, ast.Call) or not node.args or source.segment(node.args[-1]) != "tl.int64":
        return
    if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
        yield source.replace(node, source.operand(node.func.value))
    elif called(source, node) == "tl.cast":
        yield source.replace(node, source.operand(node.args[0]))
    else:
        yield source.replace(node.args[-1], "tl.int32")


@rule("drop a rescale")
def drop_rescale(source: Source, node: ast.AST) -> Iterator[Change]:
    """a * scale becomes a, a / b becomes a, and tl.fma(a, scale, b) becomes a + b."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for factor, other in ((node.left, node.right), (node.right, node.left)):
            if FACTOR.search(source.segment(factor)):
                yield source.replace(node, source.operand(other))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        yield source.replace(node, source.operand(node.left))
    if called(source, node) == "tl.fma" and isinstance(node, ast.Call):
        a, _, b = map(source.operand, node.args)
        yield source.replace(node, f"({a} + {b})")


@rule("change a stride")
def change_stride(source: Source, node: ast.AST) -> Iterator[Change]:
    """The stride of another axis: of those that a kernel takes, the next one; the next of a tuple."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id.startswith("stride_"):
        function = source.function(node)
        names = [x.arg for x in function.args.args if x.arg.startswith("stride_")] if function else []
        subscript = isinstance(source.parents[node], ast.Subscript)
        if node.id in names and len(names) > 1 and not subscript:
            yield source.replace(node, names[(names.index(node.id) + 1) % len(names)])
    if isinstance(node, ast.Subscript) and re.match(r"strides?(_|$)", source.segment(node.value)):
        yield from other_axis(source, node.slice)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "stride" and node.args:
        yield from other_axis(source, node.args[0])


def other_axis(source: Source, axis: ast.AST) -> Iterator[Change]:
    """Yields the change of an axis into its neighbor: 0 and 1, 2 and 3."""
    if isinstance(axis, ast.Constant) and isinstance(axis.value, int):
        yield source.replace(axis, str(axis.value ^ 1))


@rule("first tile only")
def first_tile_only(source: Source, node: ast.AST) -> Iterator[Change]:
    """A loop that runs once, a program that takes the place of the first, a grid of one program along an axis."""
    name = called(source, node)
    if name in ("range", "tl.range") and isinstance(node, ast.Call):
        texts = [source.operand(x) for x in node.args]
        last = node.args[1] if len(texts) > 1 else node.args[0]
        first, step = (texts[0] if len(texts) > 1 else "0"), (texts[2] if len(texts) > 2 else "1")
        lesser = "tl.minimum" if is_kernel(source, node) else "min"
        yield source.replace(last, f"{lesser}({source.segment(last)}, {first} + {step})")
    if name == "tl.program_id":
        whole = node
        for parent in source.ancestors(node):
            if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.FloorDiv | ast.Mod) and parent.left is whole:
                whole = parent
                break
            if not isinstance(parent, ast.Attribute | ast.Call):
                break
        yield source.replace(whole, f"({source.segment(whole)} * 0)")
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and "kernel" in source.segment(node.func.value)
    ):
        grid = node.func.slice
        for size in grid.elts if isinstance(grid, ast.Tuple) else [grid]:
            yield source.replace(size, "1")


def is_kernel(source: Source, node: ast.AST) -> bool:
    """Returns True within a function that Triton compiles."""
    function = source.function(node)
    return bool(function) and any("triton.jit" in source.segment(x) for x in function.decorator_list)


@rule("change a constant")
def change_constant(source: Source, node: ast.AST) -> Iterator[Change]:
    """A number becomes the next one, and True becomes False."""
    if not isinstance(node, ast.Constant) or isinstance(source.parents[node], ast.keyword | ast.Compare):
        return
    if isinstance(node.value, bool):
        yield source.replace(node, str(not node.value))
    elif isinstance(node.value, int) and node.value > 16:
        yield source.replace(node, str(node.value - 1))
    elif isinstance(node.value, int | float):
        yield source.replace(node, str(node.value + 1))


@rule("order of rounding")
def order_of_rounding(source: Source, node: ast.AST) -> Iterator[Change]:
    """(a - b) * scale becomes a * scale - b * scale, which rounds twice as often."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        for inner, factor in ((node.left, node.right), (node.right, node.left)):
            if not isinstance(inner, ast.BinOp) or not isinstance(inner.op, ast.Add | ast.Sub):
                continue
            if re.search(r"scale|zero|1 / ", source.segment(factor)):
                sign, by = "+" if isinstance(inner.op, ast.Add) else "-", source.operand(factor)
                both = f"{source.operand(inner.left)} * {by} {sign} {source.operand(inner.right)} * {by}"
                yield source.replace(node, f"({both})")


@rule("dtype of a sum")
def dtype_of_sum(source: Source, node: ast.AST) -> Iterator[Change]:
    """Sums and what goes into them in float16: what is added up, a product of tiles, memory for parts of sums."""
    half = "tl.float16"
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and is_sum(source, node.target):
        target, value = source.segment(node.target), source.segment(node.value)
        yield source.replace(node, f"{target} = ({target} + {value}).to({half})")
    name = called(source, node)
    if name == "tl.dot" or (name == "tl.sum" and isinstance(source.parents[node], ast.Assign)):
        yield source.replace(node, f"{source.segment(node)}.to({half}).to(tl.float32)")
    if isinstance(node, ast.Attribute) and source.segment(node) in ("tl.float32", "torch.float32"):
        parent = source.parents[node]
        cast = isinstance(parent, ast.Call) and called(source, parent).endswith(".to")
        memory = isinstance(parent, ast.keyword) and parent.arg == "dtype"
        if cast or memory:
            yield source.replace(node, source.segment(node).replace("32", "16"))


def is_sum(source: Source, target: ast.AST) -> bool:
    """Returns True for a variable that began as zeros in the function."""
    function, name = source.function(target), source.segment(target)
    return function is not None and any(
        isinstance(x, ast.Assign) and source.segment(x.targets[0]) == name and called(source, x.value) == "tl.zeros"
        for x in ast.walk(function)
    )
