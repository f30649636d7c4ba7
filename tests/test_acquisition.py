"""Greedy acquisition: the policies against closed forms, the trajectories, and the evaluation script."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from helpers.configs import LEAST
from helpers.pm_vae import ALIGNED as EXACT
from helpers.pm_vae import lookahead_on, masks_and_data, mutual_information
from helpers.runs import contents, refusal, untrained_run
from helpers.scripts import execute
from posterior_matching import data, models
from posterior_matching.evaluation.acquisition import evaluate
from posterior_matching.evaluation.examples import ExampleMap
from posterior_matching.evaluation.results import load_npz
from posterior_matching.models import greedy
from posterior_matching.models.greedy import POLICIES, acquire, greedy_action

KEY = jax.random.key(0)
NAMES = ["sampling", "lookahead", "random"]

# Policies


def test_greedy_acquires_the_feature_of_the_largest_mutual_information():
    model, (x, _) = lookahead_on(EXACT.model(), EXACT), masks_and_data(1)
    options = {"num_steps": 6, "num_samples": 4}
    found = jax.jit(lambda x: acquire(POLICIES["sampling"], model, KEY, x, jnp.ones(6), **options))(x[0])
    for action, mask in zip(found.action, found.mask, strict=True):
        assert action == mutual_information(x[0], mask).argmax()


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


CONFIG = {"pm_vae": LEAST}


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
    model = models.build("lookahead", CONFIG, dataset.input_shape, nnx.Rngs(1))

    def run(name):
        def acquire_example(model, key, x, available):
            options = {"num_steps": 9, "num_samples": 3}
            return acquire(POLICIES[name], model, key, x, available, **options)._asdict()

        return ExampleMap(acquire_example, model, dataset, 2)(KEY)

    return {name: run(name) for name in NAMES}, dataset


def test_trajectories_acquire_one_available_feature_after_the_other(acquired):
    found, dataset = acquired
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
    found, dataset = acquired
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


# The script


OPTIONS = {"num_instances": 7, "num_samples": 2, "num_steps": 6, "batch_size": 1}  # on each of four devices


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run on digits whose weights are random, evaluated; an evaluation of it was interrupted before."""
    path = untrained_run(tmp_path_factory.mktemp("acquisition"), "lookahead", CONFIG)
    evaluate(path, policies=("random",), **OPTIONS)
    trajectories = path / "trajectories"
    # As if killed in the second batch of another policy, whose first has left its mark.
    shown = load_npz(trajectories / "random.npz")
    parts = trajectories / "lookahead.parts"
    parts.mkdir()
    settings = json.loads((trajectories / "settings.json").read_text()) | {"part": "lookahead.parts/00000"}
    mark = {k: v[:4] for k, v in shown.items() if k not in ("x", "settings")}
    np.savez(parts / "00000.npz", settings=json.dumps(settings, sort_keys=True), **mark)
    (parts / "00001.npz").write_text("cut")
    evaluate(path, **OPTIONS)
    return path


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_samples": 3}, "holds an evaluation that differs (num_samples: 2 -> 3): use its values, or delete it"),
        ({"policies": ("samplng",)}, "unknown policy 'samplng': did you mean 'sampling'?"),
        ({"num_steps": 1}, "num_steps must be at least 2, not 1"),
        ({"num_steps": 65}, "num_steps must be at most 64, the number of features, not 65"),
        ({"memory_budget_gb": np.nan}, "memory_budget_gb must be a finite number"),
    ],
)
def test_other_settings_and_bad_arguments_are_refused(run_dir, change, message):
    before = contents(run_dir)
    assert message in refusal(evaluate, run_dir, **OPTIONS | change)
    assert contents(run_dir) == before


@pytest.mark.process
def test_the_notebook_executes(run_dir):
    assert "nats; then feature" in execute("greedy_acquisition_plots", RUN_DIR=str(run_dir))[0]


def test_a_memory_budget_decides_how_many_features_are_looked_at_together():
    model = models.build("lookahead", CONFIG, (9,), nnx.Rngs(1))
    x, b = jnp.zeros((4, 9)), jnp.ones((4, 9)).at[:, ::2].set(0.0)
    fit = [greedy.features_that_fit(model, x, b, 8, budget) for budget in (0.0, 1e3)]
    assert fit == [1, 9]
    gains = [greedy.sampling_policy(model, x[0], b[0], 8, KEY, features_at_once=n) for n in (1, 4, 9)]
    for found in gains[1:]:
        np.testing.assert_allclose(found, gains[0], rtol=1e-5, atol=1e-5)
