"""UCI Adult as a built-in dataset: its rows, its columns, and what is said when its files are not there."""

import shutil
import zipfile

import numpy as np
import pandas as pd
import pytest

from helpers.configs import SHARED
from helpers.runs import refusal
from posterior_matching import data
from posterior_matching.data import adult

needs_adult = pytest.mark.skipif(not (SHARED / "tables" / "adult.data").exists(), reason="the shared data are not here")
# Two complete Americans, one of another country, one with a missing value.
ROWS = """39, State-gov, 77516, Bachelors, 13, Never-married, Adm-clerical, Not-in-family, White, Male, {gain}, 0, 40, United-States, <=50K{dot}
50, Private, 83311, HS-grad, 9, Divorced, Sales, Husband, Black, Female, 0, {loss}, 13, United-States, >50K{dot}
28, Private, 338409, Bachelors, 13, Divorced, Sales, Wife, Black, Female, 0, 0, 40, Cuba, <=50K{dot}
37, ?, 284582, Masters, 14, Divorced, ?, Wife, White, Female, 0, 0, 40, United-States, <=50K{dot}
"""  # noqa: E501


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    folder = tmp_path / "downloads" / "manual" / "adult"
    folder.mkdir(parents=True)
    return folder


def write(folder):
    rows = "".join(ROWS.format(gain=i, loss=i % 7, dot="") for i in range(10))
    (folder / "adult.data").write_text(rows + "\n")
    (folder / "adult.test").write_text("|1x3 Cross validator\n" + ROWS.format(gain=5, loss=0, dot=".") + "\n")


def adult_source(saved=None, **options):
    return data.open_source(data.DataOptions("adult", "train", "validation", data.TableOptions(**options)), saved)


def test_rows_with_missing_values_and_of_other_countries_are_left_out(folder):
    write(folder)
    source = adult_source()
    parts = {split: source.split(split) for split in ("train", "validation", "test")}
    assert [len(part) for part in parts.values()] == [16, 4, 2]
    train = source.schema.decode(np.concatenate([parts["train"].x, parts["validation"].x]))
    assert set(train["income"]) == {"<=50K", ">50K"} and "native-country" not in train
    assert sorted(train["capital-gain"]) == sorted([0] * 10 + list(range(10)))


def test_real_columns_are_standardised_by_all_complete_rows_of_the_training_file(folder):
    write(folder)
    columns = {column.name: column for column in adult_source().schema.columns}
    age = [39, 50, 28] * 10
    assert columns["age"].mean == pytest.approx(np.mean(age)) and columns["age"].std == pytest.approx(np.std(age))


def test_the_columns_of_a_run_and_the_keys_of_config_table_are_used(folder):
    write(folder)
    dropped = adult_source(drop=("fnlwgt",), categorical=("education-num",))
    assert [c.name for c in dropped.schema.columns if c.kind == "categorical"].count("education-num") == 1
    assert "fnlwgt" not in [c.name for c in dropped.schema.columns]
    own = adult_source(dropped.to_json(), drop=("fnlwgt",))
    assert own.schema == dropped.schema and own.split("test").x.shape == (2, len(dropped.schema))


def test_the_files_are_downloaded_once(folder, monkeypatch):
    def fetch(url, path):
        assert url == adult.URL
        write(folder)
        with zipfile.ZipFile(path, "w") as archive:
            for name in adult.FILES:
                archive.write(folder / name, name)
                (folder / name).unlink()

    monkeypatch.setattr(adult, "fetch", fetch)
    assert len(data.load("adult", "test")) == 2
    monkeypatch.setattr(adult, "fetch", lambda _, archive: archive.stat())  # as of a file that is there
    assert len(data.load("adult", "test")) == 2


def test_what_to_do_without_a_network_or_with_another_file(folder, monkeypatch):
    def fetch(*_):
        raise ConnectionError("no connection")

    monkeypatch.setattr(adult, "fetch", fetch)
    message = refusal(data.load, "adult", "test")
    assert "no connection" in message and adult.URL in message and str(folder) in message
    write(folder)
    shutil.copy(folder / "adult.data", folder / "adult.test")
    for text in ("a,b\n1,2\n", "1," * 20 + "\n", ""):
        (folder / "adult.data").write_text(text)
        assert "adult.data' is not the file of UCI Adult" in refusal(data.load, "adult", "test")
    (folder / "adult.data").unlink()
    (folder / "adult.zip").write_bytes(b"half of it")
    monkeypatch.setattr(adult, "fetch", lambda *_: None)
    assert "File is not a zip file" in refusal(data.load, "adult", "test")


@needs_adult
@pytest.mark.filterwarnings("ignore")
def test_the_published_files_give_the_published_table(folder):
    for name in adult.FILES:
        shutil.copy(SHARED / "tables" / name, folder / name)
    table, columns = adult.read()
    assert sorted(columns.cardinalities) == [0] * 6 + [2, 2, 5, 6, 7, 7, 14, 16]
    sizes = {name: len(rows) for name, rows in table.parts.items()}
    complete = [pd.read_csv(folder / name, header=None, comment="|", na_values=" ?").dropna() for name in adult.FILES]
    american = [(rows[13] == " United-States").sum() for rows in complete]
    assert [len(rows) for rows in complete] == [30_162, 15_060]
    assert sizes["train"] + sizes["val"] == american[0] and sizes["test"] == american[1]
    assert sizes["val"] == american[0] // 5
