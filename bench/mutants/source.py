"""A source file as text and syntax tree together, and the mutants that rules make of it."""

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vila_triton.hashing import short_hash

ATOMS = (ast.Name, ast.Constant, ast.Attribute, ast.Subscript, ast.Call, ast.Tuple, ast.List)


@dataclass(frozen=True)
class Mutant:
    """One fault in a file: at `line` (from 1) and `column` (from 0, in characters) the text `before` becomes `after`.

    `id` depends on the file's name, the function, the rule, the text of the line and the change, so that it stays the
    same when something else is edited.
    """

    file: str
    function: str
    rule: str
    line: int
    column: int
    before: str
    after: str
    id: str

    @property
    def last_line(self) -> int:
        return self.line + self.before.count("\n")

    def apply(self, text: str) -> str:
        """Returns the text of the file with the fault in it. Errors: ValueError if the file is another by now."""
        lines = text.splitlines(keepends=True)
        start = sum(map(len, lines[: self.line - 1])) + self.column
        if not text.startswith(self.before, start):
            raise ValueError(f"{self.file}:{self.line} is no longer {self.before!r}")
        return text[:start] + self.after + text[start + len(self.before) :]

    def diff(self) -> str:
        """Returns the change in one line."""
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{before}  ->  {after or '(nothing)'}"


@dataclass(frozen=True)
class Change:
    """Characters `start` to `end` of a file become `after`."""

    start: int
    end: int
    after: str


Rule = Callable[["Source", ast.AST], Iterator[Change]]


class Source:
    """A Python file: the text, the characters and the ancestors of each node of its syntax tree."""

    def __init__(self, text: str, file: str = ""):
        self.text, self.file, self.tree = text, file, ast.parse(text)
        self.lines = text.splitlines(keepends=True)
        self.line_starts = [0]
        for line in self.lines:
            self.line_starts.append(self.line_starts[-1] + len(line))
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def offset(self, line: int, byte: int) -> int:
        """Returns the place of a byte of a line in characters of the text."""
        return self.line_starts[line - 1] + len(self.lines[line - 1].encode()[:byte].decode())

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Returns the first character of a node, and the one behind it; parentheses around it do not belong to it."""
        n: ast.expr = node  # pyright: ignore[reportAssignmentType]
        return self.offset(n.lineno, n.col_offset), self.offset(n.end_lineno or 0, n.end_col_offset or 0)

    def segment(self, node: ast.AST) -> str:
        """Returns the text of a node."""
        start, end = self.span(node)
        return self.text[start:end]

    def operand(self, node: ast.AST) -> str:
        """Returns the text of a node, in parentheses if it has operands itself."""
        text = self.segment(node)
        return text if isinstance(node, ATOMS) and not text.startswith("(") else f"({text})"

    def replace(self, node: ast.AST, after: str) -> Change:
        """Returns the change of a whole node."""
        return Change(*self.span(node), after)

    def ancestors(self, node: ast.AST) -> Iterator[ast.AST]:
        """Yields the nodes that hold a node, the closest first."""
        while node in self.parents:
            node = self.parents[node]
            yield node

    def function(self, node: ast.AST) -> ast.FunctionDef | None:
        """Returns the outermost function that a node lies in."""
        functions = [x for x in (node, *self.ancestors(node)) if isinstance(x, ast.FunctionDef)]
        return functions[-1] if functions else None

    def qualified_name(self, node: ast.AST) -> str:
        """Returns the dotted name of the classes and functions that a node lies in; "" at module level."""
        scopes = [x.name for x in (node, *self.ancestors(node)) if isinstance(x, ast.FunctionDef | ast.ClassDef)]
        return ".".join(reversed(scopes))

    def mutant(self, node: ast.AST, rule: str, change: Change, number: int = 0) -> Mutant:
        """Returns the mutant that a change makes, `number` of those that are alike but for their place."""
        before = self.text[change.start : change.end]
        line = next(i for i in range(len(self.line_starts) - 1, 0, -1) if self.line_starts[i - 1] <= change.start)
        column = change.start - self.line_starts[line - 1]
        function = self.qualified_name(node)
        parts = (self.file, function, rule, self.lines[line - 1].strip(), before, change.after, str(number))
        name = short_hash("\0".join(parts).encode())
        return Mutant(self.file, function, rule, line, column, before, change.after, name)

    def mutants(self, rules: dict[str, Rule]) -> Iterator[tuple[ast.AST, Mutant]]:
        """Yields every mutant with the node that its rule changed; a change that two rules make is the first one's."""
        taken: set[tuple[int, int, str]] = set()
        alike: Counter[str] = Counter()
        for node in ast.walk(self.tree):
            for name, rule in rules.items():
                for change in rule(self, node):
                    key = (change.start, change.end, change.after)
                    if key not in taken and self.text[change.start : change.end] != change.after:
                        taken.add(key)
                        first = self.mutant(node, name, change)
                        yield node, self.mutant(node, name, change, alike[first.id])
                        alike[first.id] += 1
