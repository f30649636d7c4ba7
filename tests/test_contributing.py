"""The steps of CONTRIBUTING.md, in a copy of the repository: its code goes to the files that it names."""

import re
import shutil
import sys

import pytest

from helpers.configs import ROOT
from helpers.scripts import finish, spawn

pytestmark = pytest.mark.process

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PARTS = re.split(r"```python\n(.*?)```\n", TEXT, flags=re.DOTALL)  # text and code in turn
QUICK = [f"--config.{key}=4" for key in ("steps", "validation_every", "batch_size")]

# A dataset and a mask generator, tried by the new family.
TRY = """
from configs import toy_digits
from posterior_matching import data
import train_toy

config = toy_digits.get_config()
config.update({"steps": 2, "validation_every": 2, "batch_size": 4})
config.mask_generator = {"name": "StripesMaskGenerator", "period": 3}
train_toy.train(config, "runs/stripes")
config = toy_digits.get_config()
config.update({"steps": 2, "validation_every": 2, "batch_size": 4, "dataset": "rings"})
train_toy.train(config, "runs/rings")
assert data.load("rings", "test").x.shape == (1000, 2)
"""


def add(path, code):
    """Writes a new file; or adds lines to one: imports and entries of a registry to theirs, other code at the end."""
    if not path.exists():
        path.write_text(code)
        return
    text = path.read_text()
    if '": ' in code.splitlines()[-1] and code.splitlines()[-1].startswith("    "):
        *imports, entry = code.splitlines()
        text = text.replace("from posterior_matching", "\n".join(imports) + "\nfrom posterior_matching", 1)
        path.write_text(re.sub(r"^(MODELS\b.*\{\n)", rf"\1{entry}\n", text, flags=re.MULTILINE))
    else:
        path.write_text(f"{text}\n\n{code}")


@pytest.fixture(scope="module")
def contributed(tmp_path_factory):
    """The copy, and the code that is to be run there."""
    folder, examples, path = tmp_path_factory.mktemp("contributed"), [], None
    for name in ("posterior_matching", "configs", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for source in [*ROOT.glob("train_*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(source, folder)
    for text, code in zip(PARTS[::2], PARTS[1::2], strict=False):
        if text.rstrip().endswith("In Python:"):
            examples.append(code)
            continue
        named = re.findall(r"`([\w/]+\.py)`", text)
        path = named[-1] if named else path
        add(folder / path, code)
    return folder, examples


def run(folder, *arguments):
    return finish(spawn([sys.executable, *arguments], folder, PYTHONPATH=str(folder)))[0]


def test_the_new_family_trains_and_loads_and_the_contract_discovers_it(contributed):
    folder, (example,) = contributed
    (command,) = re.findall(r"^    python (train_toy\.py .*)$", TEXT, flags=re.MULTILINE)
    assert "done: step 4 of 4" in run(folder, *command.split(), *QUICK)
    assert "(10, 8, 8, 8, 1)" in run(folder, "-c", example + "\nprint(imputations.shape)")
    promises = ("tests/test_contract.py", "-k", "toy and (unobserved_values or recorded)", "--record")
    assert "2 passed" in run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", *promises)
    assert (folder / "tests" / "goldens" / "toy.json").exists()


def test_the_new_dataset_and_the_new_mask_generator_train(contributed):
    folder, _ = contributed
    assert run(folder, "-c", TRY).count("done: step 2 of 2") == 2
