"""Filling files of rows: observed cells as they were, in constant memory, whole or not at all."""

import csv
import io
import itertools
import json
import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from helpers.configs import DATA
from helpers.scripts import run_script
from posterior_matching.data import read_table
from posterior_matching.errors import UserError
from posterior_matching.impute import rows as imputation
from posterior_matching.impute.defaults import table_config
from posterior_matching.impute.files import impute
from posterior_matching.impute.imputer import RowImputer
from posterior_matching.impute.rows import impute_file
from posterior_matching.models.vae import PosteriorMatchingVAE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]

MLP = {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": 8, "layer_norm": False, "dropout": 0.0}
MODEL = {"latent_dim": 2, "encoder": MLP, "decoder": MLP, "partial_encoder": MLP}
MODEL |= {"posterior": {"name": "TriLGaussian"}, "partial_posterior": {"name": "TriLGaussian"}}
SMALL = {f"model.{key}": value for key, value in MODEL.items()}
SMALL |= {"steps": 4, "validation_every": 2, "log_every": 1, "batch_size": 4}
FEW = {"batch_size": 32, "num_samples": 2}


# The imputer ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """Not trained; the fourth column is a category of three values."""
    options = MODEL | {"likelihood": {"name": "Columns"}, "cardinalities": (0, 0, 0, 3)}
    return PosteriorMatchingVAE(**options, input_shape=(4,), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)).astype(np.float32)
    x[:, 3] = rng.integers(0, 3, 50)
    x[rng.uniform(size=x.shape) < 0.4] = np.nan
    return x


@pytest.mark.parametrize(
    "fill", [RowImputer.point, lambda imputer, x: next(imputer.draws(x, 1))], ids=["point", "draws"]
)
def test_a_row_is_filled_the_same_whatever_rows_are_around_it(fill, model, rows):
    imputer = RowImputer(model, batch_size=8, num_samples=4)
    filled = fill(imputer, rows)
    order = np.random.default_rng(1).permutation(len(rows))
    np.testing.assert_array_equal(fill(imputer, rows[order]), filled[order])
    np.testing.assert_array_equal(fill(imputer, rows[7:8]), filled[7:8])
    observed = ~np.isnan(rows)
    np.testing.assert_array_equal(filled[observed], rows[observed])
    assert np.isfinite(filled).all() and set(filled[:, 3]) <= {0.0, 1.0, 2.0}
    other_seed = fill(RowImputer(model, batch_size=8, num_samples=4, seed=1), rows)
    assert (other_seed[:, :3] != filled[:, :3])[~observed[:, :3]].all()


def test_copies_differ_and_do_not_depend_on_their_number(model, rows):
    imputer, holes = RowImputer(model, batch_size=8), np.isnan(rows)[:, :3]
    copies = list(imputer.draws(rows, 3))
    assert all((a[:, :3] != b[:, :3])[holes].all() for a, b in itertools.pairwise(copies))
    np.testing.assert_array_equal(next(imputer.draws(rows, 1)), copies[0])


def test_draws_of_equal_rows_are_independent_whatever_the_chunks(model, rows):
    imputer, table = RowImputer(model, batch_size=8, num_samples=4), np.repeat(rows[:3], 20, axis=0)
    (whole,), earlier = imputer.draws(table, 1), Counter()
    holes = np.isnan(table[:, :3])
    assert all(len(np.unique(whole[i : i + 20, :3][holes[i : i + 20]])) == holes[i : i + 20].sum() for i in (0, 20, 40))
    chunks = [next(imputer.draws(chunk, 1, earlier)) for chunk in np.split(table, [7, 25])]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    np.testing.assert_array_equal(whole[::20], next(imputer.draws(rows[:3], 1)))
    assert len(np.unique(imputer.point(table), axis=0)) == 3  # point estimates of equal rows are equal


class Conditional(nnx.Module):
    """Draws y ~ N(2 x, 3^2) where it is missing, from the true conditional."""

    def draw(self, x, b, num_samples, *, key, candidates):  # noqa: ARG002
        y = 2 * x[..., 0] + 3 * jax.random.normal(key, (num_samples, len(x)))
        return jnp.where(b == 1, x, jnp.stack([jnp.broadcast_to(x[..., 0], y.shape), y], axis=-1))


def test_pooled_estimates_of_a_table_of_equal_rows():
    """Rubin's rules on the mean of y, with x in {0, 1}: the variance between copies is sigma^2 n_missing / n^2."""
    n, missing, copies, sigma = 400, 160, 100, 3.0
    x = np.random.default_rng(0).integers(0, 2, n).astype(np.float32)
    y = 2 * x + sigma * np.random.default_rng(1).normal(size=n).astype(np.float32)
    y[:missing] = np.nan
    filled = RowImputer(Conditional()).draws(np.stack([x, y], axis=1), copies)
    between = np.var([copy[:, 1].mean() for copy in filled], ddof=1)
    expected = sigma**2 * missing / n**2
    assert abs(between / expected - 1) < 4 * np.sqrt(2 / (copies - 1))  # a chi-squared variable with copies - 1 degrees


def test_rows_without_holes_are_not_computed(rows):
    class Untouchable(nnx.Module):
        """A model that cannot do anything."""

    whole = np.nan_to_num(rows)
    np.testing.assert_array_equal(RowImputer(Untouchable()).point(whole), whole)


def test_draws_are_those_of_the_model(model):
    """Given the same cells, as `model.draw` has them: the quartiles agree up to sampling error."""
    row, n, candidates = np.array([[0.3, np.nan, -1.0, np.nan]], np.float32), 2000, 160_000
    copies = np.concatenate(list(RowImputer(model, batch_size=1, num_samples=candidates).draws(row, n)))
    draw = jax.jit(lambda x, b: model.draw(x, b, n, key=jax.random.key(1), candidates=candidates))
    expected = np.asarray(draw(np.nan_to_num(row), 1.0 - np.isnan(row)))[:, 0]
    variance = 2 * (1 / n + 10 / candidates)  # of a share p, over p (1 - p): at least a tenth of them is effective
    for share in (0.25, 0.5, 0.75):
        below = (copies[:, 1] < np.quantile(expected[:, 1], share)).mean()
        assert abs(below - share) < 5 * np.sqrt(share * (1 - share) * variance)
    for category in range(3):
        p = (expected[:, 3] == category).mean()
        assert abs((copies[:, 3] == category).mean() - p) < 5 * np.sqrt(p * (1 - p) * variance) + 1e-3


# Files ---------------------------------------------------------------------------------------------------------------

COLOURS = ("red", " green", '"blu;e"')


def line(i):
    weight = "" if i % 5 == 1 else f"{1.5 + 0.25 * (i % 13):.2f}"
    return f"r{i};{weight};{'NA' if i % 7 == 2 else i % 4};{'' if i % 6 == 3 else COLOURS[i % 3]};"


TEXT = "\n".join(["id;weight;count;colour;empty", *map(line, range(90)), ""])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run `run` on `rows.csv`."""
    folder = tmp_path_factory.mktemp("impute")
    (folder / "rows.csv").write_text(TEXT)
    config = SMALL | {"table.drop": ("id",), "table.log": ("weight",)}
    paths = (str(folder / "run"), str(folder / "rows.csv"), str(folder / "filled.csv"))
    impute(*paths, train=True, config=config, **FEW)
    return folder


def fill(run, output="out.csv", rows="rows.csv", **options):
    return impute_file(str(run / "run"), str(run / rows), str(run / output), **(FEW | options))


def test_only_holes_change(run):
    texts = TEXT, (run / "filled.csv").read_text()
    before, after = (list(csv.reader(io.StringIO(text), delimiter=";")) for text in texts)
    assert len(before) == len(after) and before[0] == after[0]
    for old, new in zip(before[1:], after[1:], strict=True):
        assert all(a == b for a, b in zip(old, new, strict=True) if a not in ("", "NA"))
        assert float(new[1]) > 0 and new[2] in "0123" and new[3].strip() in ("red", "green", "blu;e") and new[4] == ""


def test_chunks_make_no_difference(run, monkeypatch):
    whole = fill(run, "whole.csv")[0].read_bytes()
    monkeypatch.setattr(imputation, "_CHUNK_ROWS", 7)
    assert fill(run, "chunks.csv")[0].read_bytes() == whole
    assert fill(run, "batches.csv", batch_size=32, seed=1)[0].read_bytes() != whole


def test_several_imputations_are_several_files(run):
    files = fill(run, "many.csv.gz", num_imputations=3)
    assert [file.name for file in files] == ["many_1.csv.gz", "many_2.csv.gz", "many_3.csv.gz"]
    frames = [pd.read_csv(file, sep=";") for file in files]
    assert all(frame["weight"].notna().all() and len(frame) == 90 for frame in frames)
    holes = pd.read_csv(run / "rows.csv", sep=";")["weight"].isna()
    assert (frames[0]["weight"] != frames[1]["weight"])[holes].all()
    assert (frames[0]["weight"] == frames[1]["weight"])[~holes].all()
    one = fill(run, "one.csv", kind="draws")[0]
    pd.testing.assert_frame_equal(pd.read_csv(one, sep=";"), frames[0])


def test_other_rows_in_another_order_of_columns(run):
    (run / "new.csv").write_text("colour,weight,empty,count,id\n,,,,x\nred,2.5,,1,y\nmauve,,,1,z\n,,,,\nred,1.5,,,w\n")
    new = fill(run, "new_out.csv", "new.csv", unknown_categories="missing")[0].read_text().splitlines()
    assert len(new) == 6 and new[0] == "colour,weight,empty,count,id" and new[2] == "red,2.5,,1,y"
    assert new[1] == new[4] + "x" and all(new[1].split(",")[i] for i in (0, 1, 3))
    assert new[3].startswith("mauve,") and new[3].split(",")[1]  # what is unknown is kept as it came


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "rows.csv"}, "is the input: give it another name"),
        ({"output": "nowhere/out.csv"}, "cannot write .*: there is no directory"),
        ({"output": "run"}, "is a directory"),
        ({"output": "out.xlsx"}, "its name must end in .csv"),
        ({"output": "out.parquet"}, "cannot write the text of .* as .parquet"),
        ({"rows": "nothing.csv"}, "no file"),
        ({"kind": "mean"}, "kind must be 'point' or 'draws'"),
        ({"kind": "point", "num_imputations": 2}, "copies would be equal, use kind=draws"),
        ({"num_imputations": 0}, "num_imputations must be at least 1"),
        ({"checkpoint": "third"}, "unknown checkpoint 'third'"),
        ({"rows": "mauve.csv"}, r"'mauve' in column 4 .* \(line 91\) is not one of .* --unknown_categories=missing"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(options, message, run, monkeypatch):
    monkeypatch.setattr(imputation, "_CHUNK_ROWS", 30)  # the mauve cell is in the last
    (run / "mauve.csv").write_text(TEXT.rsplit("\n", 2)[0] + "\nr89;2.5;1;mauve;\n")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    with pytest.raises(UserError, match=message) as error:
        fill(run, **options)
    assert "\n" not in str(error.value)
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(run, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=r"cannot write .*: Permission denied"):
        impute_file(str(run / "run"), str(run / "rows.csv"), str(tmp_path / "out.csv"), **FEW)


def test_training_first(run):
    """An existing run is used as it is, and not trained with another config."""
    config = json.loads((run / "run" / "config.json").read_text())
    assert config["config"]["table"]["log"] == ["weight"] and config["config"]["steps"] == 4
    arguments = (str(run / "run"), str(run / "rows.csv"), str(run / "again.csv"))
    impute(*arguments, train=True, **FEW)
    assert (run / "again.csv").read_bytes() == (run / "filled.csv").read_bytes()
    with pytest.raises(UserError, match=r"--config.steps changes how to train, but .* holds a run already"):
        impute(*arguments, train=True, config={"steps": 3})
    with pytest.raises(UserError, match=r"--config.steps changes how to train, but nothing is trained without --train"):
        impute(str(run / "none"), *arguments[1:], config={"steps": 3})
    with pytest.raises(UserError, match="none does not exist"):
        impute(str(run / "none"), *arguments[1:])
    with pytest.raises(UserError, match="there is no directory"):
        impute(str(run / "none"), str(run / "rows.csv"), str(run / "no" / "out.csv"), train=True)
    assert not (run / "none").exists()


# The script ----------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_the_script(run):
    paths = ["--run_dir", run / "run", "--input", run / "rows.csv", "--output", run / "script.csv"]
    run_script("impute", *paths, "--batch_size=32", "--num_samples=2")
    assert (run / "script.csv").read_bytes() == (run / "filled.csv").read_bytes()
    for flag, message in (
        ("--config.stepz=3", "unknown key 'config.stepz': did you mean 'steps'?"),
        ("--config.steps=many", "bad value 'many' for 'config.steps': its type is int"),
        ("--config.table.drop=('id',)", "--config.table.drop changes how to train, but"),
        ("--num_imputation=3", "unknown flag --num_imputation: did you mean 'num_imputations'?"),
    ):
        _, err = run_script("impute", *paths, flag, status=1)
        assert message in err and err.count("\n") == 1


# Users' tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["f07_observed_cells_changed_skewed/money", "f09_decimal_comma/eu", "f22_latin1/latin1"]
)
def test_nothing_but_holes_changes_in_cases(name, tmp_path):
    path, output = DATA / "cases" / f"{name}.csv", tmp_path / "filled.csv"
    impute(str(tmp_path / "run"), str(path), str(output), train=True, config=SMALL, batch_size=256, num_samples=2)
    before, after = read_table(path), read_table(output)
    assert after.text == before.text
    for name in before.names:
        holes = before.cells(name).missing
        assert (before.frame[name][~holes] == after.frame[name][~holes]).all()  # the very text
        assert not after.cells(name).missing.any()


def test_the_default_config_is_complete():
    """`configs/pm_vae_table.py` adds how to read the data, and leaves the batch size to the number of rows."""
    from configs import pm_vae_table

    config = pm_vae_table.get_config()
    assert set(config) - set(table_config()) == {"images", "table"} and config.batch_size is None
