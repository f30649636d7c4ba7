"""The documents: every command and Python example of the README and of the guides runs, links resolve, versions agree.

Commands run in the order of the documents, as written but with small configs and few samples. Only the outside world is
replaced: downloaded data and hosts. `make` only prints what it would do.
"""

import re
import shlex
import shutil
import sys
import tomllib

import nbformat
import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from helpers.configs import DIAGONAL, QUICK, ROOT, SMALL, TABULAR
from helpers.scripts import execute, finish, free_port, run_script, spawn, write_config

pytestmark = pytest.mark.process

README = (ROOT / "README.md").read_text()
GUIDES = [ROOT / "README.md"]
GUIDES += [
    ROOT / "docs" / f"{name}.md" for name in ("tables", "images", "clustering", "acquisition", "devices", "speed")
]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
LINKED = [*ROOT.glob("*.py"), *ROOT.glob("*.txt"), *ROOT.glob("*.toml"), ROOT / "Makefile"]
LINKED += [ROOT / "benchmarks", ROOT / "posterior_matching"]

STEPS = {"steps": 3, "validation_every": 3, "log_every": 1, "batch_size": 4}
# Flags by which evaluations and benchmarks are made small; each gets those it has.
FEW = {
    "eval_pm_vae_uci": {"num_instances": 9, "num_samples": 2, "num_trials": 1},
    "eval_pm_vqvae": {"num_instances": 30, "num_samples": 2, "num_trials": 1},
    "eval_pm_vdvae_imputation": {"num_instances": 30, "num_samples": 2, "num_trials": 1},
    "eval_pm_vdvae_likelihood": {"num_instances": 3, "num_samples": 2, "num_trials": 1},
    "eval_greedy_acquisition": {"num_instances": 3, "num_steps": 3, "num_samples": 2},
    "impute": {"num_samples": 2, "batch_size": 16},
    "benchmarks/train_speed": {"seconds": 0.1, "products": False},
    "benchmarks/evaluation_speed": {"num_samples": 2, "batch_size": 2, "repeats": 1, "products": False},
    "benchmarks/scale": {"only": "features", "most": 1, "seconds": 0.1},
    "benchmarks/reproduce": {"status": True},
    "benchmarks/imputation": {"methods": "mean,knn", "shares": 0.3},
}
TRAINING = {f"config.{key}": value for key, value in STEPS.items()}  # of a script that may also train


def sections():
    """The sections to run: heading -> commands that no earlier section has, Python examples."""
    sections, seen = {}, set()
    for guide in GUIDES:
        for section in guide.read_text().split("\n## ")[1:]:
            heading, text = section.split("\n", 1)
            if heading == "How well it imputes" or (guide.stem == "speed" and heading != "Measure"):
                continue  # records of measurements
            examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
            lines = re.sub(r" \\\n *", " ", re.sub(r"```.*?```", "", text, flags=re.DOTALL)).splitlines()
            commands = [re.sub(r"  +#.*", "", line.strip()) for line in lines if line.startswith("    ")]
            commands = [c for c in commands if c.split()[0] in ("python", "make", "tensorboard") and c not in seen]
            seen.update(commands)
            if commands or examples:
                sections[f"{guide.stem}: {heading}"] = commands, examples
    return sections


SECTIONS = sections()
COMMANDS = [command for commands, _ in SECTIONS.values() for command in commands]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with small configs, the user's own table and images in it."""
    folder = tmp_path_factory.mktemp("readme")
    for path in LINKED:
        (folder / path.name).symlink_to(path)
    for name in ("configs", "figures"):
        shutil.copytree(ROOT / name, folder / name)
    dense = {"pm_vae_digits": TABULAR, "pm_vae_digits_sparse": TABULAR | {"model.partial_posterior": DIAGONAL}}
    for name, changes in (SMALL | dense).items():  # dense layers compile faster than convolutions
        write_config(folder / "configs" / f"{name}.py", name, QUICK | changes | STEPS)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(100, 12)) @ rng.normal(size=(12, 12))
    values[rng.uniform(size=values.shape) < 0.1] = np.nan
    rows = [",".join("" if np.isnan(v) else f"{v:.3f}" for v in row) for row in values]
    for name in ("mine.csv", "new.csv"):
        (folder / name).write_text("\n".join([",".join("abcdefghijkl"), *rows]) + "\n")
    (folder / "photos").mkdir()
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")
    Image.fromarray(np.where(np.arange(50) < 20, 0, 255).astype(np.uint8)[None].repeat(40, 0)).save(folder / "mask.png")
    return folder


def small(command, port):
    """The arguments of a command, with few samples of everything."""
    name, *arguments = shlex.split(command)
    if name == "make":
        return ["make", "--dry-run", f"PYTHON={sys.executable}", *arguments]
    if name == "tensorboard":
        return [sys.executable, "-m", "tensorboard.main", "--inspect", *arguments]
    arguments = [a.replace("HOST0:1234", f"localhost:{port}").replace("DIR", "runs/shared") for a in arguments]
    few = FEW.get(arguments[0].removesuffix(".py"), {}) | (TRAINING if "--train" in arguments else {})
    for flag, value in few.items():
        if f"--{flag}" in arguments:
            arguments[arguments.index(f"--{flag}") + 1] = str(value)
        else:
            arguments.append(f"--{flag}={value}")
    return [sys.executable, *arguments]


def test_every_command_stands_in_a_block_and_every_script_in_a_command():
    for guide in GUIDES:
        if guide.stem != "speed":
            assert not re.findall(r"`(?:python (?!-c)|make )[^`]*[ /][^`]*`", guide.read_text())
    scripts = {command.split()[1] for command in COMMANDS if command.startswith("python")}
    assert {path.name for path in ROOT.glob("*.py")} <= scripts
    assert set(re.findall(r"configs/(\w+)\.py", " ".join(COMMANDS))) <= SMALL.keys()


def prose(document):
    return re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)


def anchors(document):
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_resolve(document):
    for link in re.findall(r"\]\(([^)]+)\)", prose(document)):
        if not link.startswith("https://"):
            file, _, anchor = link.partition("#")
            path = document.parent / file if file else document
            assert path.exists() and (not anchor or anchor in anchors(path)), link


def test_the_readme_links_every_document():
    for document in DOCUMENTS:
        assert f"]({document.relative_to(ROOT)}" in README or document.name == "README.md"


def test_the_readme_names_what_is_there():
    table = README.split("## Where to find it")[1].split("\n## ")[0]
    rows = re.findall(r"`(\S+\.py)`\]\(\S+\) \| `(\S+)` \|", table)
    assert rows
    for file, name in rows:
        assert re.search(rf"(def|class) {name.split('.')[-1]}\b", (ROOT / file).read_text()), name


def test_pinned_versions_lie_in_the_declared_ranges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for file, declared in (
        ("requirements.txt", project["dependencies"]),
        ("requirements-dev.txt", project["optional-dependencies"]["dev"]),
    ):
        ranges = [Requirement(line) for line in declared]
        lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
        for pin in map(Requirement, lines):
            if pin.marker is None or pin.marker.evaluate():
                matching = [r for r in ranges if r.name == pin.name and (r.marker is None or r.marker.evaluate())]
                (version,) = (specifier.version for specifier in pin.specifier)
                assert len(matching) == 1 and version in matching[0].specifier, pin


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_commands_of_a_section_run(heading, checkout):
    commands, examples = SECTIONS[heading]
    side_by_side, port = [], free_port()
    for command in commands:
        words = small(command, port)
        if "--num_processes" in command:
            side_by_side.append(spawn(words, checkout))
            continue
        if command.startswith("python"):
            out = "".join(run_script(checkout / words[1].removesuffix(".py"), *words[2:], cwd=checkout))
        else:
            out = "".join(finish(spawn(words, checkout)))
        if command.startswith("make"):
            assert "train_pm_vae.py" in out or "pytest" in out
        elif command.startswith("tensorboard"):
            assert "loss" in out
        elif command.startswith("python impute"):
            output = command.split("--output ")[1].split()[0]
            assert list(checkout.glob(output.split(".")[0] + ("*.csv" if "." in output else "/*.png")))
        elif "--output" in command:
            assert (checkout / command.split("--output ")[1]).stat().st_size > 10_000
        elif command.startswith("python eval"):
            assert list((checkout / re.search(r"--run_dir (\S+)", command)[1]).glob("*/results.json"))
        elif command.startswith("python train"):
            assert (checkout / re.search(r"--run_dir (\S+)", command)[1] / "metrics.jsonl").exists()
        else:
            assert re.search(r"\d", out)
    assert len(side_by_side) in (0, 2)
    for process in side_by_side:
        finish(process)
    assert not side_by_side or (checkout / "runs" / "shared" / "metrics.jsonl").exists()
    for example in examples:
        example = example.replace("random_state=0", f"random_state=0, config={STEPS}, num_samples=2")
        (checkout / "example.py").write_text(example)
        assert re.search(r"\d", run_script(checkout / "example", cwd=checkout)[0])


@pytest.mark.parametrize(
    ("script", "run_dir", "output", "message"),
    [
        ("learning_curves", None, "a.png", "error: missing flag --run_dir: a run directory; give it once for each run"),
        ("method", "nowhere", "a.png", "error: run directory nowhere does not exist"),
        ("learning_curves", "configs", "a.png", "error: configs is not a run directory: it has no config.json"),
        ("learning_curves", "runs/digits", "no/a.png", "error: cannot write --output=no/a.png: .*No such file.*"),
        ("method", "runs/digits", "a.xyz", "error: cannot write --output=a.xyz: Format 'xyz' is not supported.*"),
    ],
)
def test_figures_say_what_is_wrong_in_one_line(script, run_dir, output, message, checkout):
    runs = [] if run_dir is None else ["--run_dir", run_dir]
    _, err = run_script(checkout / "figures" / script, *runs, "--output", output, cwd=checkout, status=1)
    assert re.fullmatch(message, err.strip()), err
    assert not (checkout / output).exists()


def test_the_notebook_of_partial_posteriors_executes(checkout):
    """On the run left by the section on training."""
    quickly = {"NUM_IMAGES": "60", "NUMBA_OPT": "0"}  # UMAP is compiled by Numba
    text, pictures = execute("mnist_plots", RUN_DIR=str(checkout / "runs" / "digits"), **quickly)
    assert "60 test images of digits" in text and re.search(r"everything +\d+\.\d\d", text)
    assert pictures == 2


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "notebooks").glob("*.ipynb")])
def test_notebooks_are_committed_with_their_outputs(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and any(cell.outputs for cell in code)
    assert path.stat().st_size < 300_000
