"""Greedy acquisition: the policies against closed forms, the trajectories, and the evaluation script."""

import json

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
import scipy.stats
from flax import nnx
from nbclient import NotebookClient

from helpers.configs import ROOT
from helpers.pm_vae import ALIGNED as EXACT
from helpers.pm_vae import Exact, lookahead_on, masks_and_data, mutual_information
from helpers.runs import contents, refusal
from helpers.scripts import environment
from posterior_matching import acquisition, data, models, runs
from posterior_matching.acquisition import POLICIES, acquire, greedy_action
from posterior_matching.evaluation.acquisition import evaluate
from posterior_matching.evaluation.examples import ExampleMap
from posterior_matching.evaluation.results import load_npz

KEY = jax.random.key(0)
NAMES = ["sampling", "lookahead", "random"]

# Policies


def test_sampling_gains_are_the_mutual_information():
    x, b = masks_and_data(6)
    model = lookahead_on(EXACT.model(), EXACT)
    gains = jax.jit(lambda x, b, key: acquisition.sampling_policy(model, x, b, 4, key, features_at_once=2))
    for row in range(len(x)):
        expected = mutual_information(x[row], b[row])
        np.testing.assert_allclose(gains(x[row], b[row], KEY), expected, atol=1e-3)


def test_greedy_acquires_the_one_informative_feature_first():
    exact = Exact(d=5, e=2)
    exact.w = 0.05 * exact.w
    exact.w[3] = [1.0, -1.0]
    exact.covariance = exact.w @ exact.w.T + exact.sigma**2 * np.eye(5)
    model = lookahead_on(exact.model(), exact)
    options = {"num_steps": 2, "num_samples": 4}
    found = jax.jit(lambda x: acquire(POLICIES["sampling"], model, KEY, x, jnp.ones(5), **options))(jnp.zeros(5))
    assert found.action[0] == 3 and found.probabilities[0].argmax() == 3
    np.testing.assert_array_equal(found.mask, [[0] * 5, [0, 0, 0, 1, 0]])


@pytest.mark.parametrize(
    ("gains", "action"),
    [
        ([0.1, 0.3, 0.2], 1),
        ([0.3, 0.3, 0.3], 0),
        ([-np.inf, 0.3, 0.3 + 1e-6], 1),  # rounding errors do not decide
        ([-np.inf, -2.0, -1.0], 2),
        ([-np.inf, -np.inf, -np.inf], -1),
    ],
)
def test_ties_go_to_the_first_feature_and_observed_ones_are_never_chosen(gains, action):
    assert greedy_action(jnp.array(gains)) == action


def test_the_random_policy_chooses_among_the_unobserved_equally_often():
    b = jnp.array([0.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    keys = jax.random.split(KEY, 4000)
    actions = jax.jit(jax.vmap(lambda k: greedy_action(POLICIES["random"](None, b, b, 1, k))))(keys)
    counts = np.bincount(actions, minlength=6)
    assert (counts[[1, 4]] == 0).all()
    assert scipy.stats.chisquare(counts[[0, 2, 3, 5]]).pvalue > 1e-4


# Trajectories


NETWORK = {"name": "ResidualMLP", "residual_blocks": 0, "hidden_units": 8}


def untrained(shape):
    """A lookahead posterior of random weights that compiles fast."""
    parts = {"posterior": {"name": "DiagonalGaussian"}, "likelihood": {"name": "IdentityGaussian"}}
    config = {"pm_vae": {"latent_dim": 3, "encoder": NETWORK, "decoder": NETWORK} | parts}
    return models.build("lookahead", config, shape, nnx.Rngs(1)), config


@pytest.fixture(scope="module", params=["image", "table"])
def acquired(request):
    """Trajectories of every policy for data of both kinds, the table's with missing values; and the data."""
    rng = np.random.default_rng(0)
    if request.param == "image":
        dataset = data.Dataset("own", "test", rng.uniform(size=(11, 3, 3, 2)).astype(np.float32))
    else:
        x = rng.normal(size=(11, 9)).astype(np.float32)
        x[rng.uniform(size=x.shape) < 0.3] = np.nan
        dataset = data.Dataset("own", "test", x)
    model, _ = untrained(dataset.input_shape)

    def run(name, batch_size):
        def acquire_example(model, key, x, available):
            options = {"num_steps": 9, "num_samples": 3}
            return acquire(POLICIES[name], model, key, x, available, **options)._asdict()

        return ExampleMap(acquire_example, model, dataset, batch_size)(KEY)

    return run, {name: run(name, 2) for name in NAMES}, dataset


def test_trajectories_acquire_one_available_feature_after_the_other(acquired):
    _, found, dataset = acquired
    available = np.asarray(data.decode(dataset.x, dataset.max_value)[1]).reshape(11, -1)
    for name, trajectory in found.items():
        mask = trajectory["mask"].reshape(11, 9, -1)
        assert (mask[:, 0] == 0).all()
        for row in range(11):
            actions = trajectory["action"][row]
            count = min(9, int(available[row].sum()))
            assert (actions[:count] >= 0).all() and (actions[count:] == -1).all(), name
            assert len(set(actions[:count])) == count and available[row][actions[:count]].all(), name
            for t in range(1, 9):
                np.testing.assert_array_equal(np.flatnonzero(mask[row, t]), np.sort(actions[:t][actions[:t] >= 0]))
            probabilities = trajectory["probabilities"][row]
            np.testing.assert_allclose(probabilities.sum(-1), actions >= 0, atol=1e-5)
            forbidden = (mask[row] == 1) | (available[row] == 0)
            assert (probabilities[forbidden] == 0).all()


def test_errors_are_those_of_the_mean_imputation(acquired):
    _, found, dataset = acquired
    x, available = (np.asarray(a, np.float64) for a in data.decode(dataset.x, dataset.max_value))
    for trajectory in found.values():
        for t in range(9):
            b, imputation = trajectory["mask"][:, t], trajectory["imputation"][:, t]
            known = np.broadcast_to(available, x.shape)
            np.testing.assert_array_equal((imputation * b)[known * b == 1], np.float32(x * b)[known * b == 1])
            error = (np.square(x - imputation) * known * (1 - b)).reshape(11, -1).sum(-1)
            hidden = (known * (1 - b)).reshape(11, -1).sum(-1)
            rmse = np.sqrt(error / known.reshape(11, -1).sum(-1))
            np.testing.assert_allclose(trajectory["rmse"][:, t], rmse, rtol=1e-4, atol=1e-6)
            expected = np.sqrt(error / np.maximum(hidden, 1))
            np.testing.assert_allclose(trajectory["unobserved_rmse"][:, t], expected, rtol=1e-4, atol=1e-6)
    # With the same mask, all policies have the same imputation.
    for name in NAMES[1:]:
        np.testing.assert_allclose(found[name]["imputation"][:, 0], found["sampling"]["imputation"][:, 0], atol=1e-6)


def test_trajectories_do_not_depend_on_the_batch_size(acquired):
    run, found, dataset = acquired
    name = "sampling" if len(dataset.input_shape) == 1 else "lookahead"
    other = run(name, 1)
    np.testing.assert_array_equal(other["action"], found[name]["action"])
    np.testing.assert_allclose(other["imputation"], found[name]["imputation"], rtol=1e-4, atol=1e-5)


# The script


OPTIONS = {"num_instances": 7, "num_samples": 2, "num_steps": 6, "batch_size": 1}  # on each of four devices


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run on digits whose weights are random, evaluated; an evaluation of it was interrupted before."""
    folder = tmp_path_factory.mktemp("acquisition")
    model, config = untrained((8, 8, 1))
    settings = {"dataset": "digits", "evaluate_checkpoint": "latest", "model": config}
    run = runs.open_run(str(folder / "run"), "lookahead", settings, (8, 8, 1))
    run.create()
    with run.finished_saving():
        run.save(1, runs.flat_weights(nnx.state(model)), {"step": np.int32(1)}, {}, best=False)
    evaluate(run.path, policies=("random",), **OPTIONS)
    trajectories = run.path / "trajectories"
    # As if killed in the second batch of another policy, whose first has left its mark.
    shown = load_npz(trajectories / "random.npz")
    parts = trajectories / "lookahead.parts"
    parts.mkdir()
    settings = json.loads((trajectories / "settings.json").read_text()) | {"part": "lookahead.parts/00000"}
    mark = {k: v[:4] for k, v in shown.items() if k not in ("x", "settings")}
    np.savez(parts / "00000.npz", settings=json.dumps(settings, sort_keys=True), **mark)
    (parts / "00001.npz").write_text("cut")
    evaluate(run.path, **OPTIONS)
    return run.path


def test_results_are_written_for_every_policy(run_dir):
    folder = run_dir / "trajectories"
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [*(f"{name}.npz" for name in NAMES), "results.json", "settings.json"]
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["num_examples"] == 7
    expected = {f"{m}rmse_{name}_{k}" for m in ("", "unobserved_") for name in NAMES for k in (1, 3, 5, "mean")}
    assert set(results["metrics"]) == expected
    truth = data.load("digits", "test").x[:7] / np.float32(16)
    for name in NAMES:
        found = load_npz(folder / f"{name}.npz")
        assert found["action"].shape == (7, 6) and found["imputation"].shape == (7, 6, 8, 8, 1)
        np.testing.assert_array_equal(found["x"], truth)
        mean = results["metrics"][f"rmse_{name}_3"]["mean"]
        np.testing.assert_allclose(mean, found["rmse"][:, 3].mean(), rtol=1e-6)


def test_an_interrupted_evaluation_goes_on_and_a_finished_one_stays(run_dir):
    found, shown = (load_npz(run_dir / "trajectories" / f"{name}.npz") for name in ("lookahead", "random"))
    np.testing.assert_array_equal(found["action"][:4], shown["action"][:4])  # what the interrupted one had
    assert (found["action"][4:] != shown["action"][4:]).any()


def test_other_settings_are_not_mixed(run_dir):
    before = contents(run_dir)
    message = refusal(evaluate, run_dir, **OPTIONS | {"num_samples": 3})
    assert "holds an evaluation that differs (num_samples: 2 -> 3): use its values, or delete it" in message
    assert contents(run_dir) == before


@pytest.mark.process
def test_the_notebook_executes(run_dir):
    notebook = nbformat.read(ROOT / "notebooks" / "greedy_acquisition_plots.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(ROOT / "notebooks"), env=environment(RUN_DIR=str(run_dir)))
    assert "nats; then feature" in notebook.cells[-1].outputs[-1].text


def test_a_memory_budget_decides_how_many_features_are_looked_at_together():
    model, _ = untrained((9,))
    x, b = jnp.zeros((4, 9)), jnp.ones((4, 9)).at[:, ::2].set(0.0)
    fit = [acquisition.features_that_fit(model, x, b, 8, budget) for budget in (0.0, 1e3)]
    assert fit == [1, 9]
    gains = [acquisition.sampling_policy(model, x[0], b[0], 8, KEY, features_at_once=n) for n in (1, 4, 9)]
    for found in gains[1:]:
        np.testing.assert_allclose(found, gains[0], rtol=1e-5, atol=1e-5)
