"""The TFDS builders in datasets/: prepared from text files on disk, or downloaded by a stand-in for gdown."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from posterior_matching import data
from posterior_matching.errors import UserError

ROOT = Path(__file__).parents[1]
FEATURES = {"gas": 8, "power": 6, "hepmass": 21, "miniboone": 43, "bsds": 63}
ROWS = {"train": 30, "val": 5, "test": 7}


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("POSTERIOR_MATCHING_CACHE", str(tmp_path / "cache"))
    return tmp_path


def manual_folder(name):
    return Path(os.environ["TFDS_DATA_DIR"]) / "downloads" / "manual" / name


def write_files(name, num_features, seed=0):
    folder = manual_folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = {split: rng.normal(size=(size, num_features)).astype(np.float32) for split, size in ROWS.items()}
    for split, x in rows.items():
        np.savetxt(folder / f"{split}.txt", x)
    return rows


@pytest.mark.parametrize("name", FEATURES)
def test_manual_files_come_back_exactly_and_in_order(name):
    rows = write_files(name, FEATURES[name])
    for split, own_name in {"train": "train", "validation": "val", "test": "test"}.items():
        dataset = data.load(name, split)
        assert (dataset.split, dataset.input_shape, dataset.x.dtype) == (own_name, (FEATURES[name],), np.float32)
        np.testing.assert_array_equal(dataset.x, rows[own_name])
    assert "tensorflow" not in sys.modules


def test_download_then_reuse(monkeypatch, caplog):
    import gdown

    rows = np.arange(12, dtype=np.float32).reshape(2, 6)
    fetched = []

    def download(url, output):
        fetched.append(url)
        np.savetxt(output, rows)
        return output

    monkeypatch.setattr(gdown, "download", download)
    with caplog.at_level("WARNING", logger="absl"):
        np.testing.assert_array_equal(data.load("power", "train").x, rows)
    assert "has 2 rows" in caplog.text and "1659917" in caplog.text
    np.testing.assert_array_equal(data.load("power", "test").x, rows)
    assert len(fetched) == len(set(fetched)) == 3
    assert sorted(p.name for p in manual_folder("power").iterdir()) == ["test.txt", "train.txt", "val.txt"]


def test_no_network_says_which_files_to_put_where(monkeypatch):
    import gdown
    import requests

    def download(_, output):
        Path(output).write_text("half a fi")
        raise requests.exceptions.ConnectionError("name resolution")

    def refuse(*_, **__):
        raise requests.exceptions.ConnectionError("name resolution")

    monkeypatch.setattr(gdown, "download", download)
    monkeypatch.setattr(requests, "get", refuse)
    with pytest.raises(
        UserError, match=r"train\.txt .* and val\.txt .* and test\.txt .*; or https://.*/gas\+"
    ) as error:
        data.load("gas", "train")
    assert "\n" not in str(error.value) and str(manual_folder("gas")) in str(error.value)
    assert "1rhhLpGY5-5YZ-GQaZq_FniAMK9cqvxW7" in str(error.value)
    assert not manual_folder("gas").parents[2].exists()  # nothing that a second try would take for the whole file
    rows = write_files("gas", 8)
    np.testing.assert_array_equal(data.load("gas", "train").x, rows["train"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3\n", "3 columns"),
        ("1 2 3 4 5 6\n1 2 3\n", "cannot read"),
        ("<html> quota exceeded </html>\n", "cannot read"),
        ("1 2 3 4 5 6\n1 2 inf 4 5 6\n", "row 2"),
        ("1 2 3 4 5 6\n1 2 nan 4 5 6\n", "row 2"),
        ("1 2 3 4 5 1e60\n", "not finite"),
        ("", "columns"),
    ],
)
@pytest.mark.filterwarnings("ignore:loadtxt")
def test_malformed_file(text, message):
    write_files("power", 6)
    (manual_folder("power") / "val.txt").write_text(text)
    for _ in range(2):  # the failed preparation leaves nothing that looks prepared
        with pytest.raises(UserError, match=message) as error:
            data.load("power", "train")
        assert "\n" not in str(error.value) and "val.txt" in str(error.value)
    rows = write_files("power", 6)
    np.testing.assert_array_equal(data.load("power", "val").x, rows["val"])


def test_replaced_files_are_noticed():
    rows = write_files("power", 6)
    data.load("power", "val")
    for path in manual_folder("power").iterdir():  # copied, with the same contents
        os.utime(path, (1, 1))
    np.testing.assert_array_equal(data.load("power", "val").x, rows["val"])
    write_files("power", 6, seed=1)
    with pytest.raises(UserError, match=r"train\.txt' has changed since .* was prepared: delete '.*1\.0\.0'") as error:
        data.load("power", "val")
    assert "\n" not in str(error.value)
    shutil.rmtree(manual_folder("power"))  # the prepared data are all that is needed
    np.testing.assert_array_equal(data.load("power", "val").x, rows["val"])


def foreign(folder):
    """Lets the features name a class in a module of the user's own."""
    path = folder / "features.json"
    path.write_text(path.read_text().replace("tensorflow_datasets.core.features.tensor_feature.Tensor", "evil.Tensor"))
    return "names the feature type 'evil.Tensor', which is not one of TFDS's own"


def more(folder):
    path = folder / "dataset_info.json"
    path.write_text(path.read_text().replace('"30"', '"3000000000000"'))
    return "holds 30 examples, not 3000000000000"


@pytest.mark.parametrize("damage", [foreign, more])
@pytest.mark.parametrize("by_code", [True, False])
def test_a_prepared_dataset_is_not_trusted(damage, by_code, monkeypatch, tmp_path):
    write_files("power", 6)
    data.load("power", "train")
    root, name = Path(os.environ["TFDS_DATA_DIR"]), "power"
    if not by_code:
        (root / name).rename(root / (name := "own"))
    (tmp_path / "evil.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(str(tmp_path))
    message = damage(root / name / "1.0.0")
    with pytest.raises(UserError, match=message) as error:
        data.load(name, "train")
    assert "\n" not in str(error.value) and "evil" not in sys.modules


@pytest.mark.process
def test_a_wheel_holds_the_builders_and_is_not_confused_by_another_datasets(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    for folder in ("posterior_matching", "datasets"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, f"--wheel-dir={wheels}", str(source)], check=True)
    with zipfile.ZipFile(next(wheels.iterdir())) as wheel:
        wheel.extractall(wheels)
        packed = {name for name in wheel.namelist() if name.endswith(".py")}
    kept = {str(path.relative_to(source)) for path in source.rglob("*.py") if "build" not in path.parts}
    assert packed == {re.sub("^datasets/", "posterior_matching/datasets/", name) for name in kept}

    write_files("power", 6)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "datasets.py").write_text("raise SystemExit('not ours')")
    program = "from posterior_matching import data; print(data.load('power', 'train').x.shape, data.__file__)"
    for root in (wheels, ROOT):
        variables = os.environ | {"PYTHONPATH": f"{tmp_path / 'other'}{os.pathsep}{root}"}
        command = [sys.executable, "-c", program]
        result = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
        assert f"(30, 6) {root}" in result.stdout
        shutil.rmtree(tmp_path / "tfds" / "power")


@pytest.mark.process
def test_killed_while_preparing():
    rows = write_files("gas", 8)
    killed = """
import os, signal
import numpy as np
from posterior_matching import data
from posterior_matching.data import maf
def rows_then_death(self, x):
    yield 0, {"features": np.zeros(8, np.float32)}
    if len(x) == 5:  # val
        os.kill(os.getpid(), signal.SIGKILL)
maf.TabularBuilder._generate_examples = rows_then_death
data.load("gas", "train")
"""
    result = subprocess.run(
        [sys.executable, "-c", killed], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False
    )
    assert result.returncode == -9, result.stderr.decode()
    assert any(manual_folder("gas").parents[2].joinpath("gas").iterdir())  # it had begun to write
    np.testing.assert_array_equal(data.load("gas", "train").x, rows["train"])


def test_cache_is_used_follows_its_sources_and_is_optional(folders, monkeypatch):
    rows = write_files("gas", 8)
    data.load("gas", "train")
    from posterior_matching.data import tfds

    with monkeypatch.context() as patch:
        patch.setattr(tfds, "_decode_all", lambda *_: pytest.fail("decoded again"))
        np.testing.assert_array_equal(data.load("gas", "train").x, rows["train"])
    shutil.rmtree(folders / "tfds" / "gas")  # prepared anew from other files
    rows = write_files("gas", 8, seed=1)
    np.testing.assert_array_equal(data.load("gas", "train").x, rows["train"])
    entry = max((folders / "cache").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for damage in (b"", b"PK\x03\x04 not a zip", entry.read_bytes()[:-40]):
        entry.write_bytes(damage)
        np.testing.assert_array_equal(data.load("gas", "train").x, rows["train"])
    (folders / "a file").write_text("")
    monkeypatch.setenv("POSTERIOR_MATCHING_CACHE", str(folders / "a file" / "cache"))
    np.testing.assert_array_equal(data.load("gas", "train").x, rows["train"])


def test_slices_and_unknown_splits():
    rows = write_files("gas", 8)
    np.testing.assert_array_equal(data.load("gas", "train[:10%]").x, rows["train"][:3])
    np.testing.assert_array_equal(data.load("gas", "train[10:]").x, rows["train"][10:])
    for split in ("training", "train[:x]"):
        with pytest.raises(UserError, match="train, val, test"):
            data.load("gas", split)
    with pytest.raises(UserError, match="empty"):
        data.load("gas", "train[:0]")


def test_a_prepared_dataset_without_code():
    rows = write_files("gas", 8)
    data.load("gas", "train")
    root = Path(os.environ["TFDS_DATA_DIR"])
    (root / "gas").rename(root / "own_rows")
    folder = root / "own_rows" / "1.0.0"
    for path in folder.glob("gas-*"):
        path.rename(folder / path.name.replace("gas", "own_rows"))
    info = (folder / "dataset_info.json").read_text().replace('"gas"', '"own_rows"')
    (folder / "dataset_info.json").write_text(info)
    np.testing.assert_array_equal(data.load("own_rows", "train").x, rows["train"])
    np.testing.assert_array_equal(data.load("own_rows:1.0.0", "test").x, rows["test"])

    (folder / "dataset_info.json").write_text(info.replace("array_record", "riegeli"))
    with pytest.raises(UserError, match="stored as riegeli: delete it"):
        data.load("own_rows", "train")
    (folder / "dataset_info.json").write_text(info)
    features = (folder / "features.json").read_text()
    (folder / "features.json").write_text(
        features.replace('"features": {\n            "features"', '"features": {\n            "inputs"')
    )
    with pytest.raises(UserError, match=r"neither a uint8 'image' nor 'features'.*inputs \(8,\)"):
        data.load("own_rows", "train")


def test_folder_that_is_not_a_dataset():
    folder = Path(os.environ["TFDS_DATA_DIR"]) / "gas" / "1.0.0"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=str(folder)) as error:
        data.load("gas", "train")
    assert "\n" not in str(error.value)
    rows = write_files("gas", 8)
    folder.rmdir()
    data.load("gas", "train")
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace('"30"', '"31"'))  # one more than there are
    with pytest.raises(UserError, match="holds 30 examples, not 31"):
        data.load("gas", "train")
    (folder / "dataset_info.json").write_text(info)
    np.testing.assert_array_equal(data.load("gas", "train").x, rows["train"])
