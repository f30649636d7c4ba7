"""The house: who may import whom, what a library module may not do, and how small the scripts are."""

import ast
import functools
import graphlib
import pathlib
import subprocess
import sys

import pytest

from helpers.configs import ROOT

SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py"))
BUILDERS = [path.relative_to(ROOT) for path in sorted((ROOT / "datasets").rglob("*.py"))]
LIBRARY = [path.relative_to(ROOT) for path in sorted((ROOT / "posterior_matching").rglob("*.py"))]

# The floors of the house, from the roof down: a module may import from lower floors and from its own room.
FLOORS = [
    ["script", "datasets"],  # the builders of TFDS datasets, which nobody imports by name
    ["cli", "impute"],
    ["training", "evaluation"],
    ["runs"],
    ["models"],
    ["mask_generators"],
    ["masking", "data", "numerics"],
    ["config", "parallel"],
    ["atomic"],
    ["errors"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FACE = "posterior_matching"  # the package itself imports nothing before it is asked for it


def name_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in LIBRARY + BUILDERS} | {name: pathlib.Path(f"{name}.py") for name in SCRIPTS}


def room_of(module):
    if module in SCRIPTS:
        return "script"
    parts = module.split(".")
    if parts[0] == "datasets":
        return "datasets"
    return parts[1] if len(parts) > 1 else FACE


def statements(tree):
    """All nodes but those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from statements(node)


@functools.cache
def imports(module):
    """The project's modules that a module imports, anywhere in it: the submodule where one is named."""
    found = set()
    for node in statements(ast.parse((ROOT / MODULES[module]).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if module.startswith("datasets") and node.level:  # its package has another name in a wheel
                continue
            assert not node.level, f"{module}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


def test_every_room_has_its_floor():
    assert {room_of(module) for module in MODULES} - {FACE} == FLOOR.keys()
    assert imports(FACE) == set()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down_only(module):
    room = room_of(module)
    for other in imports(module):
        assert room == FACE or room_of(other) == room != "script" or FLOOR[room_of(other)] > FLOOR[room], other


def test_builders_need_only_data():
    for module in map(name_of, BUILDERS):
        assert {room_of(other) for other in imports(module)} <= {"data", "errors"}


def test_no_circle_between_files_or_between_folders():
    folders = {}
    for module in MODULES:
        others = {room_of(other) for other in imports(module)} - {room_of(module)}
        folders.setdefault(room_of(module), set()).update(others)
    for graph in ({module: imports(module) - {module} for module in MODULES}, folders):
        assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)  # CycleError names the circle


def names(path):
    """What a module imports, and every attribute that it looks up, as it is written."""
    nodes = list(ast.walk(ast.parse((ROOT / path).read_text())))
    imported = {node.name for node in nodes if isinstance(node, ast.alias)}
    return imported | {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("path", LIBRARY, ids=str)
def test_what_library_modules_leave_to_others(path):
    used = names(path)
    if path.parts[1] != "numerics":
        assert not {"jax.default_backend", "default_backend"} & used, "only numerics/ asks for the backend"
    if path.name != "cli.py":
        assert not {"sys.argv", "argv", "flags", "absl.flags", "argparse"} & used, "only cli.py reads the command line"
    if path.name != "parallel.py":
        assert "jax.pmap" not in used, "only parallel.py knows pmap"
    if path.name != "atomic.py":
        assert not {"os.replace", "os.rename"} & used, "only atomic.py moves files to their places"


@pytest.mark.process
def test_importing_the_package_imports_nothing_heavy():
    program = "import sys, posterior_matching; print({m.split('.')[0] for m in sys.modules} & {'jax', 'flax', 'numpy'})"
    out = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == "set()"


@pytest.mark.process
def test_the_top_level_holds_what_the_design_lists():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {line.split("/")[0] for line in files.splitlines() if not line.startswith(".")}
    documents = {"README.md", "RESULTS.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "docs"}
    folders = {"configs", "datasets", "notebooks", "benchmarks", "figures", "posterior_matching", "tests"}
    build = {"Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt"}
    assert top == documents | folders | build | {f"{name}.py" for name in SCRIPTS}
    assert all(name == "impute" or name.startswith(("train_", "eval_")) for name in SCRIPTS)


def test_training_scripts_are_small():
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in SCRIPTS if name.startswith("train_")}
    assert len(lines) >= 7 and max(lines.values()) <= 105 and sum(lines.values()) < 600, lines
