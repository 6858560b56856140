"""How many deliberate faults in solvers/, formats/ and blocks/ do the tests see?

    python benchmarks/mutants.py [--mutants 300] [--seed 0] [--only TEXT] [--part 1/2] [--skip N]
        [--quick]

cosmic-ray lists the places where it can make a fault: a + becomes a -, a number changes, a test
is negated, a loop does not run. A seeded sample of places is taken, and one fault is made at each,
in a copy of the package. The tests of the module run first, then those of its package; the fault is
killed as soon as one test fails. Faults in type annotations are left out: nothing reads them.
"""

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401  (this and the next three are imported once, before all forks)
import pytest
import torch
import torch._dynamo
import transformers.models.llama.modeling_llama  # noqa: F401
from cosmic_ray.ast import Visitor, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from results import append

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lowbit"
PACKAGES = ("solvers", "formats", "blocks")
TIMEOUT = 900  # seconds for the tests of a mutant; one that takes longer is killed
METHODS = ("methods/test_gptq.py", "methods/test_omniquant.py", "methods/test_mixedquant.py")
# Tests of a package, in order, which run where the module's own tests see nothing.
OF_PACKAGE = {
    "solvers": ("solvers", *METHODS, "methods/test_methods.py"),
    "formats": ("formats", "load/test_model.py"),
    "blocks": ("blocks", *METHODS, "methods/test_methods.py"),
}
OF_MODULE = {"solvers/block_learner": "methods/test_omniquant.py"}


class Places(Visitor):
    """Collects the places in a file where an operator can make a fault."""

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.found: list[Any] = []

    def visit(self, node: Any) -> Any:
        self.found += list(self.operator.mutation_positions(node))
        return node


class WithoutAnnotations(ast.NodeTransformer):
    """Removes type annotations, which the tests cannot notice."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:  # noqa: N802
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)


def differs(code: str, changed: str) -> bool:
    """Whether changed code is Python, and means something else."""

    def meaning(text: str) -> str:
        return ast.dump(WithoutAnnotations().visit(ast.parse(text)))

    try:
        return meaning(changed) != meaning(code)
    except SyntaxError:
        return False


def faults(file: Path) -> dict[Any, list[tuple[Any, int]]]:
    """Returns what can be done at each place of a file: operators and their occurrences."""
    tree, places = get_ast(file.read_text()), dict[Any, list[tuple[Any, int]]]()
    for name in operator_names():
        try:
            operator = get_operator(name)()
        except TypeError:  # an operator that needs the names of variables
            continue
        visitor = Places(operator)
        visitor.walk(tree)
        for occurrence, place in enumerate(visitor.found):
            places.setdefault(place, []).append((operator, occurrence))
    return places


def sample(count: int, seed: int, only: str) -> list[tuple[Path, str, str]]:
    """Returns the mutants: file, changed code and a description of the change."""
    files = [f for p in PACKAGES for f in sorted((SOURCE / p).rglob("*.py"))]
    places = [(file, place, what) for file in files for place, what in sorted(faults(file).items())]
    draw = random.Random(seed)
    draw.shuffle(places)
    found: list[tuple[Path, str, str]] = []
    for file, place, what in places:
        operator, occurrence = draw.choice(what)
        code = file.read_text()
        changed = mutate_code(code, operator, occurrence)
        if changed is None or not differs(code, changed):
            continue
        (line, _), _ = place
        # A fault may remove lines, so that the changed code ends before this one.
        before, after = (
            (text.splitlines()[line - 1 :] or [""])[0].strip() for text in (code, changed)
        )
        label = f"{file.relative_to(SOURCE)}:{line} {type(operator).__name__}"
        found.append((file, changed, f"{label}: {before}  ->  {after}"))
        if len(found) == count:
            break
    return [mutant for mutant in found if only in mutant[2]]


def tests_of(file: Path) -> list[str]:
    """Returns the test files and folders that cover a module, the nearest first."""
    inside = file.relative_to(SOURCE).with_suffix("")
    package, name = inside.parts[0], inside.parts[1]
    if name == "__init__":
        name = package
    own = OF_MODULE.get(inside.as_posix(), f"{package}/test_{name}.py")
    if inside.name == "cpu":  # chooses the compiled kernel of a format
        own = "formats/test_formats.py"
    listed = [own] if (ROOT / "tests" / own).exists() else []
    return [*listed, *(t for t in OF_PACKAGE[package] if t not in listed)]


def fails(tests: str, source: Path, deadline: float, marks: str) -> bool:
    """Whether tests fail, or take too long, with the package in `source`; in a forked process.

    marks: the tests that run, as pytest's -m takes it.
    """
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        sys.path.insert(0, str(source))
        os.environ["PYTHONPATH"] = str(source)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", marks]
        found = pytest.main([*options, str(ROOT / "tests" / tests)])
        os._exit(found != pytest.ExitCode.NO_TESTS_COLLECTED and found)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def killed_by(file: Path, code: str, quick: bool) -> str | None:
    """Returns the tests that see a mutant; None if it survives.

    quick: whether tests beyond the module's own run only if they are not slow.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        shutil.copytree(SOURCE, source / "lowbit")  # with what is compiled already
        (source / "lowbit" / file.relative_to(SOURCE)).write_text(code)
        deadline = time.monotonic() + TIMEOUT
        first, *others = tests_of(file)
        if fails(first, source, deadline, "not exhaustive"):
            return first
        marks = "not exhaustive and not families" + (" and not slow" if quick else "")
        return next((t for t in others if fails(t, source, deadline, marks)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mutants", type=int, default=300, help="size of the sample")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--only", default="", help="text in the descriptions of mutants to run")
    parser.add_argument("--part", default="1/1", help="run one of several equal parts: 2/3")
    parser.add_argument("--skip", type=int, default=0, help="mutants of the part to leave out")
    parser.add_argument("--quick", action="store_true", help="leave out slow tests of other files")
    args = parser.parse_args()
    torch.set_num_threads(1)  # forked processes have no threads of their parent
    os.chdir(ROOT)
    part, parts = map(int, args.part.split("/"))
    mutants = sample(args.mutants, args.seed, args.only)[part - 1 :: parts]
    survivors = []
    for number, (file, code, label) in enumerate(mutants, 1):
        if number <= args.skip:
            continue
        seen = killed_by(file, code, args.quick)
        print(f"{number}/{len(mutants)} {seen or 'SURVIVED'}: {label}", flush=True)
        survivors += [] if seen else [label]
    killed = len(mutants) - len(survivors)
    print(f"{killed} of {len(mutants)} killed; survivors:", *survivors, sep="\n  ")
    if not args.only and parts == 1:
        row = {"case": f"{len(mutants)} mutants, seed {args.seed}", "metric": "killed"}
        append("mutants", [row | {"value": f"{100 * killed / len(mutants):.1f}", "unit": "%"}])


if __name__ == "__main__":
    main()
