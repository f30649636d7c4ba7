"""Evaluation: every example once, with a key of its own, whatever the batch size; results on disk."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from posterior_matching import data
from posterior_matching.errors import UserError
from posterior_matching.evaluation.examples import ExampleMap, Results, load_dataset, load_npz, open_parts, save_npz
from posterior_matching.models.vae import PosteriorMatchingVAE

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
    network = {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": 8}
    config = {"latent_dim": 2, "encoder": network, "decoder": network}
    config |= {"posterior": {"name": "DiagonalGaussian"}, "likelihood": {"name": "IdentityGaussian"}}
    return PosteriorMatchingVAE.from_config(config, (DIM,), nnx.Rngs(0))


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


def test_batches_that_an_interrupted_call_left_are_read_and_not_computed_again(table, model, tmp_path):
    whole = ExampleMap(look, model, table.dataset, 150)(jax.random.key(3), keep_in=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["00000.npz", "00001.npz", "00002.npz"]
    left = load_npz(tmp_path / "00001.npz")
    save_npz(tmp_path / "00001.npz", left | {"scalar": left["scalar"] + 100})
    (tmp_path / "00002.npz").unlink()
    found = ExampleMap(look, model, table.dataset, 150)(jax.random.key(3), keep_in=tmp_path)
    np.testing.assert_array_equal(found["draw"], whole["draw"])
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    expected = whole["scalar"] + np.where((np.arange(NUM_ROWS) >= 600) & (np.arange(NUM_ROWS) < 1200), 100, 0)
    np.testing.assert_allclose(found["scalar"], expected, rtol=1e-5)


def test_parts_of_another_evaluation_are_refused(tmp_path):
    settings = {"num_samples": 10, "dataset": "digits"}
    open_parts(tmp_path / "a" / "parts", settings)
    (tmp_path / "a" / "parts" / "x.npz").touch()
    open_parts(tmp_path / "a" / "parts", settings)
    with pytest.raises(UserError, match=r"holds an evaluation that differs \(num_samples: 10 -> 20\)"):
        open_parts(tmp_path / "a" / "parts", settings | {"num_samples": 20})
    assert (tmp_path / "a" / "parts" / "x.npz").exists()


# Data ----------------------------------------------------------------------------------------------------------------


def description(**changes):
    return {"config": {"dataset": "mixture"}, "input_shape": [8], "standardisation": None} | changes


def test_num_instances_takes_the_first_examples(table, model):
    whole = load_dataset(description(), None, "test", None)
    few = load_dataset(description(), None, "test", 30)
    assert len(whole) == 2000 and len(few) == 30
    np.testing.assert_array_equal(few.x, whole.x[:30])
    assert len(load_dataset(description(), None, "test", 2000)) == 2000
    for number in (0, -1, 2001):
        with pytest.raises(UserError, match=f"--num_instances={number}.*2000 examples"):
            load_dataset(description(), None, "test", number)
    digits = load_dataset(description(input_shape=[8, 8, 1]), "digits", "test", 7)
    assert digits.label.shape == (7,) and digits.x.shape == (7, 8, 8, 1)
    # The first examples have the keys they have in the whole.
    few = ExampleMap(look, model, data.load(str(table.path), "all"), 3)(jax.random.key(1))
    own = description(input_shape=[DIM], config={"dataset": str(table.path)})
    found = ExampleMap(look, model, load_dataset(own, None, "all", 11), 32)(jax.random.key(1))
    np.testing.assert_array_equal(found["draw"], few["draw"][:11])


def test_own_data_are_standardised_as_the_run_was(table):
    mean, std = np.arange(DIM) + 1.0, np.arange(DIM) + 0.5
    saved = {"mean": mean.tolist(), "std": std.tolist()}
    run = description(input_shape=[DIM], standardisation=saved)
    dataset = load_dataset(run, str(table.path), "all", None)
    np.testing.assert_allclose(dataset.x, (table.rows - mean) / std, rtol=1e-5)
    with pytest.raises(UserError, match="pass a file"):
        load_dataset(run, "mixture", "test", None)


def test_data_of_another_shape_are_refused(table):
    with pytest.raises(UserError, match=r"digits has examples of shape \(8, 8, 1\).*\(8,\)"):
        load_dataset(description(), "digits", "test", None)
    with pytest.raises(UserError, match=r"own.npy.*\(5,\).*\(8,\)"):
        load_dataset(description(), str(table.path), "all", None)


# Results -------------------------------------------------------------------------------------------------------------


def test_results_are_written(tmp_path, capsys):
    results = Results(tmp_path / "deep" / "results", num_examples=12, seed=5)
    for trial in (1.0, 2.0, 6.0):
        results.add(nrmse=np.float32(trial), ac_ll_nats=-trial)
    np.testing.assert_array_equal(results.trials("nrmse"), [1, 2, 6])
    results.write(nrmse=results.trials("nrmse"), grid=np.zeros((2, 3)))
    written = json.loads((tmp_path / "deep" / "results" / "results.json").read_text())
    assert set(written) == {"metrics", "num_examples", "seed", "flags", "versions", "seconds"}
    assert written["num_examples"] == 12 and written["seed"] == 5 and written["seconds"] >= 0
    assert written["metrics"]["nrmse"] == {
        "mean": 3.0,
        "std": pytest.approx(np.sqrt(14 / 3)),
        "trials": [1.0, 2.0, 6.0],
    }
    assert written["metrics"]["ac_ll_nats"]["mean"] == -3.0
    assert np.load(tmp_path / "deep" / "results" / "grid.npy", allow_pickle=False).shape == (2, 3)
    out = capsys.readouterr().out
    assert "nrmse" in out and "3.0000 ± 2.1602  (3 trials)" in out and "12 examples" in out
