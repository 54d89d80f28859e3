"""Planted bugs: kernel files with one change of their syntax tree, found as any file of kernels/ is.

A change is picked by the code that it is made to, compared as a syntax tree, so that neither formatting nor what stands
elsewhere matters: `by_rule` is a rule of `bench.mutants`; `exchange` and `insert` are for bugs that no rule makes.
"""

import ast
import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.mutants.kernel_rules import KERNEL_RULES
from bench.mutants.source import Source
from vila_triton import kernels
from vila_triton.registry import OPS, discover

ORIGIN = {"int4_matmul": "packed"}  # the variant whose file is changed, where it is not "triton"
Edit = Callable[[str], str]  # the text of a file with a change in it
Plant = Callable[..., None]


def normal(code: str | ast.AST) -> str:
    """Code as Python itself would write it."""
    return ast.unparse(ast.parse(code) if isinstance(code, str) else code)


def lies_in(source: Source, node: ast.AST, function: str) -> bool:
    return not function or source.qualified_name(node).split(".")[-1] == function


def statement_of(source: Source, node: ast.AST) -> ast.AST:
    return next(x for x in (node, *source.ancestors(node)) if isinstance(x, ast.stmt))


def by_rule(rule: str, code: str, function: str = "", statement: str = "", after: str | None = None) -> Edit:
    """The change that a rule makes of the shortest expression that contains this code, in a function of this name.

    statement: how the statement that it lies in begins
    after: which of several changes that the rule makes of it; default: the first
    """

    def edit(text: str) -> str:
        source = Source(text)
        made = [
            (len(normal(node)), mutant)
            for node, mutant in source.mutants({rule: KERNEL_RULES[rule]})
            if code in normal(node) and lies_in(source, node, function) and after in (None, mutant.after)
            if normal(statement_of(source, node)).startswith(statement)
        ]
        assert made, f"the rule {rule!r} makes nothing of {code!r}"
        shortest = min(length for length, _ in made)
        return next(mutant for length, mutant in made if length == shortest).apply(text)

    return edit


def exchange(old: str, new: str, function: str = "", call: str = "", keyword: str = "") -> Edit:
    """The first expression that is `old` becomes `new`: in a function of this name, as an argument of a call of that
    name, or as this keyword argument.
    """

    def edit(text: str) -> str:
        source, wanted = Source(text), normal(old)
        nodes = [
            node
            for node in ast.walk(source.tree)
            if isinstance(node, ast.expr) and normal(node) == wanted and lies_in(source, node, function)
        ]
        parents = source.parents
        nodes = [node for node in nodes if not call or is_call(parents[node], call)]
        nodes = [node for node in nodes if not keyword or getattr(parents[node], "arg", "") == keyword]
        assert nodes, f"{old!r} is nowhere in {call or keyword or function or 'the file'}"
        start, end = source.span(min(nodes, key=source.span))
        return f"{text[:start]}{new}{text[end:]}"

    return edit


def is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and normal(node.func) == name


def in_first_config(key: str, value: int) -> Edit:
    """Another value of a key of the first config."""

    def edit(text: str) -> str:
        source = Source(text)
        dicts = [node for node in ast.walk(source.tree) if isinstance(node, ast.Dict)]
        config = next(
            node for node in sorted(dicts, key=source.span) if key in map(ast.literal_eval, filter(None, node.keys))
        )
        place = [ast.literal_eval(x) for x in config.keys if x].index(key)
        start, end = source.span(config.values[place])
        return f"{text[:start]}{value}{text[end:]}"

    return edit


def insert(statement: str, after: str, function: str = "") -> Edit:
    """A statement behind the first one that begins like this."""

    def edit(text: str) -> str:
        source = Source(text)
        nodes = [
            node
            for node in ast.walk(source.tree)
            if isinstance(node, ast.stmt) and normal(node).startswith(after) and lies_in(source, node, function)
        ]
        assert nodes, f"no statement begins with {after!r}"
        start, end = source.span(min(nodes, key=source.span))
        indent = " " * (start - text.rfind("\n", 0, start) - 1)
        return f"{text[:end]}\n{indent}{statement}{text[end:]}"

    return edit


def renamed(text: str, name: str, new: str) -> str:
    """The text of a kernel file whose implementation `name` is called `new`."""
    source = Source(text)
    names = [
        decorator.args[0]
        for node in source.tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if isinstance(decorator, ast.Call) and normal(decorator.func).endswith(".impl")
        if ast.literal_eval(decorator.args[0]) == name
    ]
    assert names, f"no implementation is called {name}"
    start, end = source.span(names[0])
    return f'{text[:start]}"{new}"{text[end:]}'


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """plant(op, name, edit): a kernel of the op as variant `name`, edited; again: another version of it."""
    discover()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(kernels, "__path__", [*kernels.__path__, str(tmp_path)])
    before = {op: dict(OPS[op].impls) for op in OPS}

    def write(op: str, name: str, edit: Edit = lambda text: text) -> None:
        origin = OPS[op].impls[ORIGIN.get(op, "triton")]
        file = tmp_path / f"{op}_{name}.py"
        file.write_text(renamed(edit(origin.file.read_text()), origin.name, name))
        linecache.clearcache()
        importlib.invalidate_caches()
        module = f"{kernels.__name__}.{file.stem}"
        if module in sys.modules:
            importlib.reload(sys.modules[module])

    yield write
    files = {name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}
    for name in [name for name, file in files.items() if file.startswith(str(tmp_path))]:
        del sys.modules[name]
    for op, impls in before.items():
        OPS[op].impls.clear()
        OPS[op].impls.update(impls)
