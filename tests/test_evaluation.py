"""Evaluation: every example once, with its own key, whatever the batch size; results on disk, whole or not there."""

import errno
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from helpers.configs import LEAST
from helpers.runs import untrained_run
from posterior_matching import data, mask_generators, models
from posterior_matching.errors import UserError
from posterior_matching.evaluation import pictures, uci
from posterior_matching.evaluation.examples import EvaluationOptions, ExampleMap, load_examples, open_run
from posterior_matching.evaluation.results import PartialResults, Results, with_log

NUM_ROWS, DIM = 1797, 5


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A file of 1,797 rows, some values missing."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(NUM_ROWS, DIM)) * [1, 2, 3, 4, 5] + 10
    rows[rng.uniform(size=rows.shape) < 0.1] = np.nan
    path = tmp_path_factory.mktemp("table") / "own.npy"
    np.save(path, rows)
    return SimpleNamespace(path=path, rows=rows, dataset=data.load(str(path), "all"))


@pytest.fixture(scope="module")
def model():
    return models.build("pm_vae", LEAST, (DIM,), nnx.Rngs(0))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run on digits whose weights are random."""
    masks = {"name": "BernoulliMaskGenerator", "p": 0.0}
    return untrained_run(tmp_path_factory.mktemp("evaluation"), "pm_vae", LEAST, mask_generator=masks)


# Every example once --------------------------------------------------------------------------------------------------


def look(model, key, x, available):
    """What an example is given."""
    del model
    return {"draw": jax.random.bits(key, (2,)), "x": x, "available": available, "scalar": x.sum()}


@pytest.mark.parametrize("batch_size", [1, 32, 449, 450])
def test_every_example_is_seen_once_in_order_with_its_own_key(table, model, batch_size):
    found = ExampleMap(look, model, table.dataset, batch_size)(jax.random.key(3))
    np.testing.assert_array_equal(found["x"], np.nan_to_num(table.dataset.x))
    np.testing.assert_array_equal(found["available"], ~np.isnan(table.rows))
    assert found["scalar"].shape == (NUM_ROWS,)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(NUM_ROWS))
    np.testing.assert_array_equal(found["draw"], jax.vmap(lambda k: jax.random.bits(k, (2,)))(keys))
    assert len(np.unique(found["draw"], axis=0)) == NUM_ROWS


def test_results_do_not_depend_on_the_batch_size(table, model):
    def estimate(model, key, x, available):
        key_mask, key_impute, key_likelihood = jax.random.split(key, 3)
        x, available = x[None], available[None]
        b = jax.random.bernoulli(key_mask, 0.5, x.shape) * available
        likelihood = model.is_log_prob(x, b, 4, key=key_likelihood, available=available)
        imputation = model.impute(x, b, 4, key=key_impute)[:, 0]
        return {"b": b[0], "imputation": imputation, "ac_ll": likelihood.log_p_xu_given_xo[0]}

    small, large = (ExampleMap(estimate, model, table.dataset, size)(jax.random.key(0)) for size in (7, 200))
    np.testing.assert_array_equal(small["b"], large["b"])
    for name, values in small.items():
        assert values.shape == large[name].shape and len(values) == NUM_ROWS
        np.testing.assert_allclose(values, large[name], rtol=1e-4, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(values.mean(), large[name].mean(), rtol=1e-5, err_msg=name)
    assert np.isfinite(small["ac_ll"]).all() and small["ac_ll"].std() > 0.1


# Parts of an interrupted evaluation ----------------------------------------------------------------------------------

SETTINGS = {"num_samples": 10, "dataset": "digits"}


def counted(calls):
    def compute():
        calls.append(1)
        return {"a": np.arange(1000.0)}

    return compute


def test_a_damaged_or_foreign_part_is_computed_again(tmp_path):
    parts, calls, path = PartialResults.open(tmp_path, SETTINGS), [], tmp_path / "one.npz"
    parts.get("one", counted(calls))
    content = path.read_bytes()
    np.savez(path, a=np.zeros(3))
    flipped = content[:200] + bytes([content[200] ^ 1]) + content[201:]
    for count, damaged in enumerate((path.read_bytes(), b"", content[: len(content) // 2], b"garbage", flipped), 2):
        path.write_bytes(damaged)
        for _ in range(2):
            np.testing.assert_array_equal(parts.get("one", counted(calls))["a"], np.arange(1000.0))
        assert len(calls) == count


def test_a_part_of_other_settings_or_of_another_place_is_computed_again(tmp_path):
    calls = []
    PartialResults(tmp_path, SETTINGS).within("trial_1").get("one", counted(calls))
    PartialResults(tmp_path, SETTINGS | {"num_samples": 20}).within("trial_1").get("one", counted(calls))
    (tmp_path / "trial_2").mkdir()
    (tmp_path / "trial_1" / "one.npz").rename(tmp_path / "trial_2" / "one.npz")
    PartialResults(tmp_path, SETTINGS | {"num_samples": 20}).within("trial_2").get("one", counted(calls))
    assert len(calls) == 3


@pytest.mark.parametrize("content", [b"", b'{"num_samples": 1', b"[1]", b"\xff\x00"])
def test_damaged_settings_are_written_again_and_what_was_computed_with_others_is_not_used(content, tmp_path):
    calls = []
    PartialResults.open(tmp_path, SETTINGS).get("one", counted(calls))
    for settings in (SETTINGS, SETTINGS | {"num_samples": 20}):
        (tmp_path / "settings.json").write_bytes(content)
        PartialResults.open(tmp_path, settings).get("one", counted(calls))
        assert json.loads((tmp_path / "settings.json").read_text()) == settings
    assert len(calls) == 2


def test_the_end_of_one_evaluation_does_not_disturb_another_of_the_same(tmp_path):
    first, second = (PartialResults.open(tmp_path / "parts", SETTINGS) for _ in range(2))

    def compute():
        second.remove()
        return {"a": np.ones(3)}

    np.testing.assert_array_equal(first.get("one", compute)["a"], np.ones(3))
    second.remove()
    first.within("deep").get("two", compute)
    first.remove()
    assert not list(tmp_path.iterdir())


# Data ----------------------------------------------------------------------------------------------------------------


def description(**changes):
    config = {"dataset": "mixture", "train_split": "train", "validation_split": "validation"}
    return {"config": config, "input_shape": [8]} | changes


def load_dataset(description, dataset, split, num_instances, at_most=None):
    chosen = EvaluationOptions(run_dir="", dataset=dataset, split=split, num_instances=num_instances)
    return load_examples(description, chosen, at_most)[1]


def test_num_instances_takes_the_first_examples():
    whole = load_dataset(description(), None, "test", None)
    np.testing.assert_array_equal(load_dataset(description(), None, "test", 30).x, whole.x[:30])
    for number, at_most, count in ((2000, None, 2000), (None, 7, 7), (None, 7000, 2000), (8, 7, 8)):
        assert len(load_dataset(description(), None, "test", number, at_most)) == count
    for number in (0, -1, 2001):
        with pytest.raises(UserError, match=f"num_instances={number}.*2000 examples"):
            load_dataset(description(), None, "test", number)
    digits = load_dataset(description(input_shape=[8, 8, 1]), "digits", "test", 7)
    assert digits.label.shape == (7,) and digits.x.shape == (7, 8, 8, 1)


def test_own_data_are_standardised_as_the_run_was(table):
    mean, std = np.arange(DIM) + 1.0, np.arange(DIM) + 0.5
    columns = data.TableSchema.from_standardisation(mean.tolist(), std.tolist()).to_json()
    run = description(input_shape=[DIM], columns=columns)
    dataset = load_dataset(run, str(table.path), "all", None)
    np.testing.assert_allclose(dataset.x, (table.rows - mean) / std, rtol=1e-5)
    with pytest.raises(UserError, match="pass a file"):
        load_dataset(run, "mixture", "test", None)
    with pytest.raises(UserError, match=r"own.npy.*\(5,\).*\(8,\)"):
        load_dataset(description(), str(table.path), "all", None)


# Results -------------------------------------------------------------------------------------------------------------


def test_results_are_written(tmp_path, capsys):
    results = Results(tmp_path / "deep" / "results", 12, {"seed": 5, "run_dir": tmp_path})
    for trial in (1.0, 2.0, 6.0):
        results.add(nrmse=np.float32(trial), ac_ll_nats=-trial)
        results.add_mean(psnr_db=[trial, np.inf, np.nan])
    np.testing.assert_array_equal(results.trials("nrmse"), [1, 2, 6])
    results.write(nrmse=results.trials("nrmse"), grid=np.zeros((2, 3)))
    assert {path.name for path in results.folder.iterdir()} == {"results.json", "nrmse.npy", "grid.npy"}
    written = json.loads((tmp_path / "deep" / "results" / "results.json").read_text())
    assert set(written) == {"metrics", "num_examples", "seed", "flags", "versions", "seconds"}
    assert written["num_examples"] == 12 and written["seed"] == 5 and written["seconds"] >= 0
    assert written["flags"] == {"seed": 5, "run_dir": str(tmp_path)} and written["metrics"] == results.metrics
    nrmse = {"mean": 3.0, "std": pytest.approx(np.sqrt(14 / 3)), "trials": [1.0, 2.0, 6.0]}
    assert written["metrics"]["nrmse"] == written["metrics"]["psnr_db"] == nrmse
    assert written["metrics"]["ac_ll_nats"]["mean"] == -3.0
    assert np.load(tmp_path / "deep" / "results" / "grid.npy", allow_pickle=False).shape == (2, 3)
    out = capsys.readouterr().out
    assert "nrmse" in out and "3.0000 ± 2.1602  (3 trials)" in out and "12 examples" in out
    assert "warning: 6 infinite or NaN values were left out of the mean of psnr_db" in out


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def write(value, **arrays):
        results = Results(tmp_path, 12, {"seed": value})
        results.add(nrmse=value)
        results.write(nrmse=results.trials("nrmse"), **arrays)

    def save_small(file, array, **options):
        full_disk() if array.size > 1 else save(file, array, **options)

    write(1.0, grid=np.ones(3))
    save = np.save
    monkeypatch.setattr(np, "save", save_small)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        write(2.0, grid=np.zeros(3))
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "nrmse.npy", "grid.npy"}
    assert json.loads((tmp_path / "results.json").read_text())["seed"] == 1.0
    np.testing.assert_array_equal(np.load(tmp_path / "nrmse.npy"), [1.0])
    with pytest.raises(UserError, match=r"cannot write .*nrmse.npy/results: Not a directory"):
        Results(tmp_path / "nrmse.npy" / "results", 1, {"seed": 0})


# From Python ---------------------------------------------------------------------------------------------------------

COUNTS = ("num_samples", "chunk_size", "num_trials", "batch_size")
FEW = {"num_instances": 3, "num_samples": 2, "num_trials": 2, "batch_size": 2}


def columns(path):
    """The first two columns of the picture, originals and observed parts, without the white gaps."""
    picture = np.asarray(Image.open(path), float) / 255
    scale = picture.shape[1] // 80  # eight images of 8 pixels and gaps of 2
    small = picture[::scale, ::scale]
    return [np.stack([small[10 * n : 10 * n + 8, 10 * m : 10 * m + 8] for n in range(3)]) for m in range(2)]


@pytest.mark.parametrize(
    ("masks", "p"),
    [
        ("BernoulliMaskGenerator:p=1.0", 1),
        ("config", 0),
        (mask_generators.BernoulliMaskGenerator(0.0), 0),
    ],
)
def test_an_evaluation_is_a_function_and_its_picture_has_its_masks(masks, p, run_dir, capsys):
    results = uci.evaluate(run_dir, mask_generator=masks, **FEW)
    written = json.loads((run_dir / "uci_results" / "results.json").read_text())
    np.testing.assert_equal(written["metrics"], results.metrics)
    assert written["flags"]["mask_generator"] == str(masks)
    assert written["flags"] | FEW == written["flags"] and written["flags"]["baselines"] is False
    assert len(results.trials("nrmse")) == 2 and results.num_examples == 3
    assert np.isnan(results.trials("nrmse")).all() == (p == 1)  # nothing is left to impute
    original, observed = columns(run_dir / "uci_results" / "imputations.png")
    np.testing.assert_allclose(original, data.load("digits", "test").x[:3, ..., 0] / 16, atol=0.01)
    np.testing.assert_allclose(observed, original if p else 0.5, atol=0.01)
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["trial 1 of 2", "trial 2 of 2"]


def test_gaps_are_simulated_for_a_limited_number_of_examples(run_dir, monkeypatch):
    gap = lambda **options: uci.evaluate(run_dir, **FEW | options).metrics["simulated_gap_xo_nats"]["mean"]  # noqa: E731
    three, two = gap(), gap(num_instances=2)
    monkeypatch.setattr(uci, "_MOST_SIMULATED", 2)
    assert gap() == pytest.approx(two, rel=1e-5) and three != pytest.approx(two, rel=1e-3)


def test_the_numbers_stay_when_the_picture_fails(run_dir, monkeypatch):
    monkeypatch.setattr(pictures, "replacing", full_disk)
    with pytest.raises(UserError, match=r"cannot write .*imputations.png: No space left on device"):
        uci.evaluate(run_dir, seed=11, **FEW)
    assert json.loads((run_dir / "uci_results" / "results.json").read_text())["seed"] == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refine_steps": -1}, "refine_steps must be at least 0, not -1"),
        ({"num_sampels": 8}, "unknown key 'num_sampels': did you mean 'num_samples'"),
        *(({name: 0}, f"{name} must be at least 1, not 0") for name in COUNTS),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"num_samples": "many"}, "num_samples must be a valid integer, not 'many'"),
        ({"split": "tset"}, "no split 'tset'"),
        ({"checkpoint": "newest"}, "checkpoint must be 'best' or 'latest', not 'newest'"),
        ({"checkpoint": "best"}, "holds no best checkpoint"),
        ({"mask_generator": "SquareMaskGenerator:size=9"}, r"size must lie in 1\.\.8"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_anything_is_written(change, message, run_dir):
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    with pytest.raises(UserError, match=message) as caught:
        uci.evaluate(run_dir, **FEW | change)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before


def test_a_run_opens_with_its_model_and_data(run_dir):
    run = open_run(run_dir, "pm_vae", num_instances=4)
    assert run.x.shape == (4, 8, 8, 1) and run.x.max() == 1 and run.mask_shape == (8, 8, 1)
    assert run.model.impute(run.x, np.zeros_like(run.x), 2, key=jax.random.key(0)).shape == (2, 4, 8, 8, 1)
    assert run.training_rows().shape == (len(data.load("digits", "train")), 64)
    with pytest.raises(UserError, match="is a run of pm_vae, not of vade"):
        open_run(run_dir, "vade")


# Progress ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
def test_a_log_has_a_line_for_each_trial_and_a_terminal_has_none(terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert list(with_log(["a", "b"], "policy")) == ["a", "b"]
    lines = [line.rpartition(":")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ([] if terminal else ["policy 1 of 2", "policy 2 of 2"])
