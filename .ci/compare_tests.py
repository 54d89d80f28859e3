"""Show that a restructured test suite lost nothing: `python .ci/compare_tests.py REVISION`.

Every test of REVISION is looked up in the working tree, by the map in .ci/renamed_tests.tsv where it was renamed: lines
`old file<TAB>new file`, and `old file::old name<TAB>new file::new name`. It must have at least as many asserts,
`pytest.raises` and collected cases as it had. Prints what each lost and a line of totals; exits with 1 on a loss.
"""

import argparse
import ast
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Content:
    """What a test function holds: asserts, expected errors, and cases that pytest collects of it."""

    asserts: int
    raises: int
    cases: int

    def losses(self, new: "Content") -> list[str]:
        pairs = (("asserts", self.asserts, new.asserts), ("raises", self.raises, new.raises))
        pairs += (("cases", self.cases, new.cases),)
        return [f"{name} {old} -> {now}" for name, old, now in pairs if now < old]


def is_raises(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("pytest.raises", "pytest.warns", "pytest.fail")


def tests_of(root: Path) -> dict[str, Content]:
    """The tests of a tree, `file::name` (of a method `file::Class::name`) -> content."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{root}: tests cannot be collected\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    cases = Counter(line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line)
    contents = {}
    for file in sorted({name.partition("::")[0] for name in cases}):
        tree = ast.parse((root / file).read_text())
        scopes = [(file, tree), *((f"{file}::{c.name}", c) for c in tree.body if isinstance(c, ast.ClassDef))]
        for prefix, scope in scopes:
            for test in (x for x in scope.body if isinstance(x, ast.FunctionDef)):
                if count := cases.get(f"{prefix}::{test.name}"):
                    nodes = list(ast.walk(test))
                    asserts = sum(isinstance(node, ast.Assert) for node in nodes)
                    contents[f"{prefix}::{test.name}"] = Content(asserts, sum(map(is_raises, nodes)), count)
    return contents


def extract(revision: str, folder: Path) -> None:
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as file:
        file.extractall(folder, filter="data")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="the commit that the suite is compared with")
    parser.add_argument("--map", type=Path, default=ROOT / ".ci" / "renamed_tests.tsv")
    args = parser.parse_args()
    renamed = dict(line.split("\t") for line in args.map.read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        extract(args.revision, Path(folder))
        old = tests_of(Path(folder))
    new = tests_of(ROOT)
    lost = []
    for name, content in old.items():
        file, _, test = name.partition("::")
        target = renamed.get(name, f"{renamed.get(file, file)}::{test}")
        if target not in new:
            lost.append(f"{name}: there is no {target}")
        elif losses := content.losses(new[target]):
            lost.append(f"{name} -> {target}: {', '.join(losses)}")
    print(*lost, sep="\n")
    for tree, tests in (("before", old), ("now", new)):
        totals = (sum(getattr(x, field) for x in tests.values()) for field in ("cases", "asserts", "raises"))
        print(f"{tree}: {len(tests):,} tests, " + "{:,} cases, {:,} asserts, {:,} raises".format(*totals))
    print(f"{len(lost)} of {len(old):,} tests lost something")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
