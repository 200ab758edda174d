"""Do the tests notice a fault in the core? Draws one-place changes of it, an operator, a constant,
a condition or a dropped statement, and runs the tests on each.

    python tests/benchmarks/mutants.py --checkout . --draw 40 --work_dir /tmp/mutants
    python tests/benchmarks/mutants.py --checkout ../older --work_dir /tmp/mutants   # the same ones

First with the tests that start neither Ray nor a process; --whole N runs the whole suite on at most
N of those that survive. A change is kept as the text of its line, so that another version of the
code can be tried with those of its lines that are the same.
"""

import ast
import copy
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from dreambooth.cli import ArgumentParser, absolute_path

MODULES = ["dataset", "images", "models", "latents", "loss"]
CORE = ["train.py", *(f"dreambooth/{name}.py" for name in MODULES)]
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
# Fixtures and files of tests that start Ray or a process.
SLOW_FIXTURES = {
    "ray_address", "run_script", "run_train", "one_worker", "two_workers", "train_here",
}  # fmt: skip
SLOW_FILES = {
    "test_run_sh.py", "test_crash.py", "test_cluster.py", "test_benchmarks.py",
    "test_fidelity.py", "test_readme.py", "test_gpus.py",
}  # fmt: skip
FIRST = ["loss", "latents", "dataset", "images", "models", "train", "plan"]
PLUGIN = f"""
def pytest_collection_modifyitems(config, items):
    first = {FIRST!r}
    names = ["test_" + name + ".py" for name in first]
    kept = [i for i in items if not set(i.fixturenames) & {SLOW_FIXTURES!r}]
    kept = [i for i in kept if i.path.name not in {SLOW_FILES!r}]
    kept.sort(key=lambda i: names.index(i.path.name) if i.path.name in names else 99)
    items[:] = kept
"""


def changes_of(source):
    """Each one-place change of a module's functions: pairs of a line, or of a statement's lines,
    before and after."""
    tree = ast.parse(source)
    lines = source.splitlines()
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or function.name in ("build_parser", "main"):
            continue
        for node in ast.walk(function):
            before = (
                "\n".join(lines[node.lineno - 1 : node.end_lineno]) if has_lines(node) else None
            )
            if before is None:
                continue
            for changed in changed_nodes(node):
                start, end = node.col_offset, node.end_col_offset
                first, last = lines[node.lineno - 1], lines[node.end_lineno - 1]
                yield before, first[:start] + ast.unparse(changed) + last[end:]


def has_lines(node):
    return hasattr(node, "lineno") and hasattr(node, "end_col_offset")


def changed_nodes(node):
    """The one-place changes of one node."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        changed = copy.deepcopy(node)
        changed.op = OPERATORS[type(node.op)]()
        yield ast.parse(f"({ast.unparse(changed)})").body[0].value
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        changed = copy.deepcopy(node)
        changed.ops[0] = OPERATORS[type(node.ops[0])]()
        yield changed
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield ast.Constant(node.value + 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if is_call or isinstance(node, ast.AugAssign):
        yield ast.Pass()


def draw(checkouts, count, seed=0):
    """`count` changes of lines that stand once in the core of each of `checkouts`."""
    cores = [{name: (Path(c) / name).read_text() for name in CORE} for c in checkouts]
    found = []
    for name, source in cores[0].items():
        for before, after in changes_of(source):
            if before != after and all(
                sum(s.count(before) for s in c.values()) == 1 for c in cores
            ):
                found.append({"file": name, "before": before, "after": after})
    unique = list({(c["file"], c["before"], c["after"]): c for c in found}.values())
    return random.Random(seed).sample(unique, count)


def apply(change, folder):
    for name in CORE:
        file = Path(folder) / name
        source = file.read_text()
        if source.count(change["before"]) == 1:
            file.write_text(source.replace(change["before"], change["after"]))
            return
    raise ValueError(f"not there: {change['before']}")


def is_noticed(change, checkout, work_dir, whole):
    """Whether a test fails on a copy of the checkout with the change."""
    folder = Path(work_dir) / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
    apply(change, folder)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if not whole:
        (folder / "only_quick.py").write_text(PLUGIN)
        command += ["-p", "only_quick"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800)
    if done.returncode not in (0, 1, 2):
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode != 0


def main(args):
    file = Path(args.work_dir) / "mutants.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if args.draw:
        file.write_text(json.dumps(draw([args.checkout, *args.also], args.draw), indent=1))
    changes = json.loads(file.read_text())
    survivors = []
    for number, change in enumerate(changes):
        noticed = is_noticed(change, args.checkout, args.work_dir, whole=False)
        print(f"{number:3} {'noticed' if noticed else 'SURVIVES'} {change['file']}", flush=True)
        if not noticed:
            print(f"{change['before']}\n->\n{change['after']}", flush=True)
            survivors.append(change)
    for change in survivors[: args.whole]:
        noticed = is_noticed(change, args.checkout, args.work_dir, whole=True)
        print(f"whole suite: {'noticed' if noticed else 'SURVIVES'} {change['after']}", flush=True)
    print(f"{len(changes) - len(survivors)} of {len(changes)} noticed by the quick tests")


def parse_args(argv=None):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--checkout", type=absolute_path, required=True, help="the code and its tests")
    add("--also", nargs="+", type=absolute_path, default=[], help="others that must have the lines")
    add("--draw", type=int, help="draw so many changes (default: those in --work_dir)")
    add("--whole", type=int, default=10, help="survivors to try against the whole suite")
    add("--work_dir", type=absolute_path, required=True, help="for the list and a copy")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
