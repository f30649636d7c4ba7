"""The training loop, with a linear regression whose every update NumPy can repeat, and with a small PM-VAE."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from benchmarks import synthetic
from configs import common
from helpers.arrays import Compilations, assert_close, assert_same
from helpers.configs import MLP, small, untrained
from helpers.runs import assert_same_runs, crash_after, refusal, rows
from posterior_matching import data, models, parallel, runs
from posterior_matching.config import call, plain
from posterior_matching.errors import UserError
from posterior_matching.training import batching, log, loop
from posterior_matching.training.batching import EpochOrder, TrainingFeed
from posterior_matching.training.experiment import Batch, Experiment, Phase, TrainingOptions
from posterior_matching.training.loop import fit
from posterior_matching.training.optimizer import OptimizerOptions
from posterior_matching.training.step import CompiledPhase, _compiled

pytestmark = pytest.mark.slow

# Most of these tests run the same few programs; compiling is most of what they do.
DEVICES = 4
DIM = 3
OPTIMIZER = plain(common.optimizer()) | {"learning_rate": 0.1, "decay_rate": 1.0, "transition_steps": 1}
DEFAULTS = plain(common.training())
OPTIONS = {field.name: DEFAULTS[field.name] for field in dataclasses.fields(TrainingOptions)}
OPTIONS |= {"steps": 8, "batch_size": 3, "validation_every": 4, "log_every": 2, "evaluate_checkpoint": "best"}


class Linear(nnx.Module):
    """y = x W + b, and a count of the training steps as its mutable state."""

    def __init__(self, *, input_shape=None, rngs=None):
        del input_shape, rngs
        self.kernel = nnx.Param(jnp.array([[0.5], [-1.0], [0.25]]))
        self.bias = nnx.Param(jnp.zeros(1))
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return (x @ self.kernel[...] + self.bias[...])[:, 0]


def squared_error(model, batch, rngs=None):
    """The last column is what the others predict."""
    del rngs
    if batch.training:
        model.count[...] += 1
    error = jnp.square(model(batch.x[:, :DIM]) - batch.x[:, DIM])
    return {"loss": error, "error_squared": 2.0 * error, "constant_nats": jnp.float32(3.0)}


def table(num_rows=37, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, DIM))
    y = x @ [1.0, 2.0, -1.0] + 0.5 + offset + 0.1 * rng.normal(size=num_rows)
    return data.Dataset("table", "train", np.column_stack([x, y]).astype(np.float32))


def errors(model, dataset):
    x, y = dataset.x[:, :DIM], dataset.x[:, DIM]
    return np.square(np.asarray(model(x), np.float64) - y)


def optimizer(**changes):
    return call(OptimizerOptions, OPTIMIZER | changes, "config.optimizer")


def experiment(*phases, train=None, validation=None, loss=squared_error, trainable=nnx.Param, **changes):
    """A linear regression; or other phases."""
    changes["optimizer"] = OPTIMIZER | changes.get("optimizer", {})
    options = call(TrainingOptions, OPTIONS | changes, "config")
    return Experiment(
        config={"dataset": "table", "model": {}, "evaluate_checkpoint": "best"},
        options=options,
        phases=phases or [Phase(Linear(), loss, None, options.optimizer, trainable)],
        train_set=train or table(),
        validation_set=validation or table(13, seed=1),
    )


@pytest.fixture
def linear(tmp_path, monkeypatch):
    """`linear(name, *phases, **changes)` trains such an experiment in the run directory `name`.

    It crashes after step `stop` if that is given.
    """
    monkeypatch.setitem(models.MODELS, "linear", Linear)

    def run_it(name="run", *phases, stop=None, **changes):
        chosen = experiment(*phases, **changes)
        run = runs.open_run(str(tmp_path / name), "linear", chosen.config, {"input_shape": [DIM + 1]})
        if stop is None:
            return fit(chosen, run)
        with crash_after(stop):
            fit(chosen, run)

    run_it.path = tmp_path / "run"
    return run_it


def weights(model):
    return np.asarray(model.kernel[...]), np.asarray(model.bias[...])


def feed_for(chosen):
    options = chosen.options
    feed = TrainingFeed({"x": chosen.train_set.x}, options.batch_size, options.seed, 1.0)
    return lambda step, num_steps=1: feed.get(step, num_steps, 0)


def compiled(chosen, index=0, first_step=0, last_step=100):
    return CompiledPhase(chosen, chosen.phases[index], first_step, last_step)


def run_steps(chosen, num_steps, phase=None, model=None, first_step=0):
    """Runs steps one by one and returns all states (first: the initial one) and all metrics, of the first device."""
    phase = phase or compiled(chosen)
    state, constants = parallel.replicate(phase.initial_state(model))
    get = feed_for(chosen)
    states, metrics = [parallel.unreplicate(state)], []
    for step in range(first_step, first_step + num_steps):
        state, values = phase.train(state, constants, *get(step))
        states.append(parallel.unreplicate(state))
        metrics.append({k: v[0] for k, v in parallel.unreplicate(values).items()})
    return states, metrics


# Several devices = one -----------------------------------------------------------------------------------------------


def global_rows(num_rows, batch_size, seed, step):
    """Device d owns rows d, d + 4, ... and goes through them in an order of its own."""
    shares = [np.arange(d, num_rows, DEVICES) for d in range(DEVICES)]
    return np.concatenate(
        [share[EpochOrder(len(share), seed, d).batches(step, 1, batch_size)[0]] for d, share in enumerate(shares)]
    )


def reference_run(train, num_steps, options, batch_size=3, seed=0):
    """The same training on one device with the global batch, by optax's own AdamW: the parameters and the metrics."""

    def learning_rate(step):
        warm = jnp.minimum(1.0, step / options["warmup_steps"])
        return warm * options["learning_rate"] * options["decay_rate"] ** (step / options["transition_steps"])

    mask = {"kernel": True, "bias": False}
    direction = optax.chain(
        optax.clip_by_global_norm(options["clip_norm"]),
        optax.adamw(learning_rate, weight_decay=options["weight_decay"], mask=mask, eps=options["eps"]),
    )
    parameters = dict(zip(("kernel", "bias"), weights(Linear()), strict=True))
    state = direction.init(parameters)

    def loss(p, rows):
        return jnp.mean(jnp.square((rows[:, :DIM] @ p["kernel"] + p["bias"])[:, 0] - rows[:, DIM]))

    metrics = []
    for step in range(num_steps):
        rows = train.x[global_rows(len(train), batch_size, seed, step)]
        value, gradients = jax.value_and_grad(loss)(parameters, rows)
        norm, rate = optax.tree.norm(gradients), learning_rate(step)
        metrics.append({"loss": value, "error_squared": 2 * value, "gradient_norm": norm, "learning_rate": rate})
        updates, state = direction.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters, metrics


def test_four_devices_equal_one_with_the_global_batch():
    changes = {"decay_rate": 0.5, "transition_steps": 5, "warmup_steps": 3, "weight_decay": 0.3, "clip_norm": 2.0}
    changes |= {"eps": 1e-3}  # not scaled away by Adam, what is clipped matters
    expected, expected_metrics = reference_run(table(), 20, OPTIMIZER | changes)
    assert np.abs(expected["kernel"] - weights(Linear())[0]).max() > 0.2  # it has learned something
    assert max(m["gradient_norm"] for m in expected_metrics) > 4 and expected_metrics[0]["learning_rate"] == 0
    states, metrics = run_steps(experiment(optimizer=changes), 20)
    np.testing.assert_allclose(states[-1].trainable["kernel"][...], expected["kernel"], rtol=1e-5)
    np.testing.assert_allclose(states[-1].trainable["bias"][...], expected["bias"], rtol=1e-5)
    for found, row in zip(metrics, expected_metrics, strict=True):
        np.testing.assert_allclose([found[key] for key in row], list(row.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def pm_vae():
    """A PM-VAE whose loss uses every stream of random numbers."""
    changes = {"model__encoder": MLP | {"dropout": 0.3}, "noise_std": 0.1, "seed": 3, "batch_size": 8}
    chosen = untrained("pm_vae", small("pm_vae_mixture", **changes), data.load("mixture", "test"))
    phase = compiled(chosen)
    states, metrics = run_steps(chosen, 4, phase)
    return SimpleNamespace(experiment=chosen, phase=phase, states=states, metrics=metrics)


def test_pm_vae_gradient_is_the_mean_over_devices_with_their_own_keys(pm_vae):
    phase, x = pm_vae.experiment.phases[0], pm_vae.experiment.train_set.x
    graphdef, parameters, rest = nnx.split(phase.model, nnx.Param, ...)

    def loss(parameters, rows, key):
        model = nnx.merge(graphdef, parameters, rest, copy=True)
        streams = {name: jax.random.fold_in(key, i) for i, name in enumerate(("noise", "mask", "sample", "dropout"))}
        batch = Batch(rows, jnp.ones_like(rows), None, jnp.int32(0))
        return jnp.mean(phase.loss(model, batch, nnx.Rngs(**streams))["loss"])

    differentiate = jax.jit(jax.value_and_grad(loss))
    step_key = jax.random.fold_in(jax.random.key(3), 0)
    by_device = [
        differentiate(parameters, x[chosen], jax.random.fold_in(step_key, device))
        for device, chosen in enumerate(global_rows(2000, 8, 3, 0).reshape(DEVICES, 8))
    ]
    losses = [float(value) for value, _ in by_device]
    assert len(set(losses)) == DEVICES
    gradient = jax.tree.map(lambda *parts: sum(parts) / DEVICES, *(gradient for _, gradient in by_device))
    np.testing.assert_allclose(pm_vae.metrics[0]["loss"], np.mean(losses), rtol=1e-5)
    momentum = pm_vae.states[1].opt_state[1].mu
    assert_close(jax.tree.map(lambda m: 10 * m, momentum), gradient, rtol=1e-4, atol=1e-5)
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 0.01


def test_a_scan_over_steps_equals_step_by_step_and_devices_hold_the_same_state(pm_vae):
    state, constants = parallel.replicate(pm_vae.phase.initial_state())
    state, metrics = pm_vae.phase.train(state, constants, *feed_for(pm_vae.experiment)(0, 4))
    for leaf in jax.tree.leaves((state, metrics)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    metrics = parallel.unreplicate(metrics)
    for name, values in metrics.items():
        np.testing.assert_allclose(values, [m[name] for m in pm_vae.metrics], rtol=1e-4, err_msg=name)
    assert len(set(metrics["loss"].tolist())) == 4
    assert_close(parallel.unreplicate(state), pm_vae.states[4], rtol=1e-4, atol=1e-5)


# Dispatch and compilation --------------------------------------------------------------------------------------------


def test_a_fit_does_not_depend_on_the_dispatch(linear, tmp_path, monkeypatch):
    """Dispatches meet every interval and the ends of phases, at 5 and 8."""
    changes = {"steps": 13, "checkpoint_every": 6, "ema_decay": 0.7, "data_memory_budget_gb": 0.0}
    one_by_one, dispatches = linear("single", *phases(3), **changes), []

    class Feed(TrainingFeed):
        def get(self, first_step, num_steps, following):
            dispatches.append(num_steps)
            return super().get(first_step, num_steps, following)

    monkeypatch.setattr(loop, "TrainingFeed", Feed)
    monkeypatch.setattr(loop, "on_cpu", lambda: False)  # as many steps per dispatch as the intervals allow: two
    many = linear("many", *phases(3), **changes)
    assert dispatches == [2, 2, 1, 1, 2, 2, 2, 1]
    assert_close(weights(many), weights(one_by_one))
    for ours, expected in zip(rows(tmp_path / "many"), rows(tmp_path / "single"), strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)


def test_steps_per_dispatch(monkeypatch):
    def steps(**changes):
        return loop.max_steps_per_dispatch(experiment(**{"log_every": 100, "validation_every": 1000} | changes).options)

    assert steps() == 1
    monkeypatch.setattr(loop, "on_cpu", lambda: False)
    assert steps() == 100 and steps(checkpoint_every=250) == 50 and steps(log_every=7) == 1
    many = steps(log_every=6000, validation_every=6000)
    assert many <= 1000 and 6000 % many == 0


def test_one_compilation_of_the_step_and_one_of_validation(linear, monkeypatch):
    traced, compilations, before_step = [], Compilations(), []

    def loss(model, batch, rngs):
        traced.append(batch.training)
        return squared_error(model, batch, rngs)

    class Feed(TrainingFeed):
        def get(self, *args):
            before_step.append(len(compilations))
            return super().get(*args)

    monkeypatch.setattr(loop, "TrainingFeed", Feed)
    linear(loss=loss, steps=24, validation_every=4, ema_decay=0.9)
    assert sorted(traced) == [False, True]
    assert len(before_step) == 24 and before_step[0] < before_step[1]
    assert len(set(before_step[1:4])) == 1  # all steps before the first validation
    assert len(set(before_step[4:])) == 1  # and everything after it


def test_folds_and_seeds_share_a_program_and_get_what_they_would_get_alone(linear):
    traced, results = [], {}

    def loss(model, batch, rngs):
        traced.append(batch.training)
        noise = jax.random.normal(rngs.sample(), ())
        return {"loss": jnp.square(model(batch.x[:, :DIM]) - batch.x[:, DIM] - noise)}

    def fold(name, number):
        trained = linear(name, loss=loss, seed=number, train=table(seed=number), validation=table(13, seed=number + 9))
        return *weights(trained), rows(linear.path.parent / name)[-1]["val_loss"]

    for number in (0, 1):
        _compiled.cache_clear()
        results[number] = fold(f"alone{number}", number)
    traced.clear()
    _compiled.cache_clear()
    for number in (0, 1):
        for together, alone in zip(fold(f"together{number}", number), results[number], strict=True):
            np.testing.assert_array_equal(together, alone)
    assert sorted(traced) == [False, True]
    assert results[0][2] != results[1][2]


CHANGES = {
    "loss": {"loss": lambda *arguments: squared_error(*arguments)},
    "range of values": {"train": data.Dataset("table", "train", np.zeros((37, DIM + 1), np.float32), max_value=2.0)},
    "optimiser": {"optimizer": {"learning_rate": 0.5}},
    "averaging": {"ema_decay": 0.5},
    "bad steps": {"skip_nonfinite_updates": True},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_other_steps_are_other_programs(changes):
    assert compiled(experiment()).train is compiled(experiment(steps=30)).train
    assert compiled(experiment(**changes)).train is not compiled(experiment()).train
    assert compiled(experiment(), first_step=2).train is not compiled(experiment()).train


def test_other_options_of_a_family_are_other_programs():
    def train_of(**changes):
        chosen = untrained("pm_vae", small("pm_vae", **changes), synthetic.dataset("digits", 16))
        return CompiledPhase(chosen, chosen.phases[0], 0, 1).train

    assert train_of() is train_of(seed=3)
    for changes in ({"matching_coef": 0.5}, {"noise_std": 0.5}, {"model.latent_dim": 3}):
        assert train_of(**changes) is not train_of()


# The update ----------------------------------------------------------------------------------------------------------


def test_ema_follows_its_formula_and_is_what_validation_and_evaluation_use(linear):
    changes = {"ema_decay": 0.8, "steps": 8, "validation_every": 8}
    states, _ = run_steps(experiment(**changes), 8)
    kernels = [np.asarray(state.trainable["kernel"][...], np.float64) for state in states]
    expected = kernels[0]
    for kernel in kernels[1:]:
        expected = 0.8 * expected + 0.2 * kernel
    np.testing.assert_allclose(states[-1].ema["kernel"][...], expected, rtol=1e-5)
    assert np.abs(kernels[-1] - expected).max() > 0.01
    model = linear(**changes)
    np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5)
    np.testing.assert_allclose(rows(linear.path)[-1]["val_loss"], errors(model, table(13, seed=1)).mean(), rtol=1e-5)
    np.testing.assert_allclose(runs.load_model(linear.path).kernel[...], expected, rtol=1e-5)


def test_mutable_state_is_carried_saved_and_not_touched_by_validation(linear):
    assert int(linear(steps=8).count[...]) == 8
    assert int(runs.load_model(linear.path).count[...]) == 8
    assert int(linear(steps=11).count[...]) == 11  # resumed


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {0: 0.2, 7: 0.2, 1000: 0.2}),
        ({"decay_rate": 0.25, "transition_steps": 10}, {0: 0.2, 5: 0.1, 10: 0.05, 15: 0.025}),
        ({"decay_rate": 0.25, "transition_steps": 10, "staircase": True}, {0: 0.2, 9: 0.2, 10: 0.05, 19: 0.05}),
        ({"warmup_steps": 4}, {0: 0.0, 1: 0.05, 3: 0.15, 4: 0.2, 100: 0.2}),
        ({"warmup_steps": 20, "decay_rate": 0.25, "transition_steps": 10}, {5: 0.025, 10: 0.025, 20: 0.0125}),
    ],
)
def test_learning_rate_schedule(changes, expected):
    schedule = optimizer(learning_rate=0.2, **changes).schedule()
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(jnp.int32(step)), value, rtol=1e-6, err_msg=f"step {step}")


def test_frozen_parameters_do_not_move_and_have_no_optimiser_state(linear):
    only_bias = nnx.All(nnx.Param, nnx.PathContains("bias"))
    phase = compiled(experiment(trainable=only_bias))
    state, constants = phase.initial_state()
    assert [leaf.shape for leaf in jax.tree.leaves(constants.frozen)] == [(DIM, 1)]
    assert sorted(np.shape(leaf) for leaf in jax.tree.leaves(state.opt_state)) == [(), (1,), (1,)]  # count, mu, nu
    model = linear(trainable=only_bias, optimizer={"weight_decay": 0.5}, ema_decay=0.5)
    assert float(model.bias[0]) != 0
    for trained in (model, runs.load_model(linear.path)):
        np.testing.assert_array_equal(trained.kernel[...], Linear().kernel[...])


# Validation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 7, 12, 13, 50])
def test_validation_is_the_plain_mean_over_examples(linear, num_rows):
    validation = table(num_rows, seed=4)
    expected = errors(linear(steps=4, validation=validation), validation).mean()
    (row,) = rows(linear.path)
    np.testing.assert_allclose(row["val_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(row["val_error_squared"], 2 * expected, rtol=1e-5)
    np.testing.assert_allclose(row["val_constant_nats"], 3.0, rtol=1e-6)


def noisy(model, batch, rngs):
    noise = jax.random.normal(rngs.noise(), batch.x[:, DIM].shape)
    return {"loss": jnp.square(model(batch.x[:, :DIM]) - batch.x[:, DIM] + noise)}


def test_validation_is_repeatable_and_independent_of_chunks(linear, tmp_path, monkeypatch):
    def validate(name, **changes):
        linear(name, loss=noisy, validation=table(50), optimizer={"learning_rate": 0.0}, **changes)
        first, second = rows(tmp_path / name)
        assert first["val_loss"] == second["val_loss"]  # nothing was learned in between
        return first["val_loss"]

    loss = validate("run")
    assert loss != validate("other", seed=1)
    assert loss == validate("streamed", data_memory_budget_gb=0.0)
    chunks = batching.evaluation_chunks
    monkeypatch.setattr(batching, "evaluation_chunks", lambda *args: chunks(*args, chunk_gb=1e-12))  # one batch each
    np.testing.assert_allclose(validate("chunks"), loss, rtol=1e-6)
    np.testing.assert_allclose(validate("streamed_chunks", data_memory_budget_gb=0.0), loss, rtol=1e-6)


def test_validation_draws_fresh_noise_for_every_batch_and_device(linear):
    def noise_only(model, batch, rngs):
        return {"loss": 0 * model(batch.x[:, :DIM]) + jax.random.normal(rngs.noise(), batch.x[:, DIM].shape)}

    validation = data.Dataset("zeros", "test", np.zeros((4000, DIM + 1), np.float32))
    linear(loss=noise_only, batch_size=1, validation=validation, steps=1)
    # The same number everywhere would be of order 1, per device 0.5.
    assert abs(rows(linear.path)[0]["val_loss"]) < 5 / math.sqrt(4000)


# Checkpoints ---------------------------------------------------------------------------------------------------------

# Training data lie higher than validation data, so that the validation loss falls and then rises.
RISING = {"train": table(offset=20.0), "validation": table(13, seed=1, offset=5.0), "validation_every": 5}
RISING["optimizer"] = {"learning_rate": 0.2}


def test_the_best_checkpoint_has_the_lowest_validation_loss(linear):
    swinging = RISING | {"optimizer": {"learning_rate": 1.5}, "validation_every": 2}
    linear(steps=60, **swinging)
    losses = {row["step"]: row["val_loss"] for row in rows(linear.path)}
    best = min(losses, key=losses.get)
    later = [loss for step, loss in losses.items() if step >= best]
    assert best not in (2, 60) and any(after < before for before, after in itertools.pairwise(later))
    assert runs.latest_step(linear.path, "best") == best and runs.latest_step(linear.path, "latest") == 60
    model = runs.load_model(linear.path, checkpoint="best")
    np.testing.assert_allclose(errors(model, RISING["validation"]).mean(), losses[best], rtol=1e-5)
    # A resumed run remembers what the best loss was.
    linear(steps=70, **swinging)
    assert runs.latest_step(linear.path, "best") == best and runs.latest_step(linear.path, "latest") == 70


def test_the_best_checkpoint_is_on_disk_before_the_latest_begins(linear, monkeypatch):
    best_saved, original = [], ocp.CheckpointManager.save

    def save(manager, step, **kwargs):
        if manager.directory.name == "best":
            best_saved.append(step)
        else:
            assert runs.latest_step(linear.path, "best") == (best_saved or [0])[-1]
        return original(manager, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    linear(steps=60, **RISING)
    assert len(best_saved) >= 3 and best_saved[-1] < 60


def test_killed_between_the_best_and_the_latest_checkpoint(linear, tmp_path):
    for name in ("10", "15"):
        linear(name, steps=int(name), **RISING)
    assert runs.latest_step(tmp_path / "15", "best") == 15
    shutil.rmtree(tmp_path / "15" / "checkpoints" / "latest")
    shutil.copytree(tmp_path / "10" / "checkpoints" / "latest", tmp_path / "15" / "checkpoints" / "latest")
    linear("15", steps=60, **RISING)
    linear("whole", steps=60, **RISING)
    assert_same_runs(tmp_path / "15", tmp_path / "whole")


def test_checkpoint_every_saves_between_validations(linear, monkeypatch):
    saved, save = [], runs.Run.save
    monkeypatch.setattr(runs.Run, "save", lambda run, step, *rest: (saved.append(step), save(run, step, *rest)))
    linear(steps=10, validation_every=4, checkpoint_every=3)
    assert saved == [3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in rows(linear.path)] == [4, 8, 10]


def test_nothing_to_do(linear, capsys):
    linear(steps=8)
    before = (linear.path / "metrics.jsonl").read_text()
    linear(steps=4)
    assert "nothing to do: step 8 of 4" in capsys.readouterr().out
    assert (linear.path / "metrics.jsonl").read_text() == before and runs.latest_step(linear.path, "latest") == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_leaving(linear, tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    sent = []

    def send(step):
        if step == 5 and not sent:  # once, though there are four devices
            sent.append(step)
            os.kill(os.getpid(), number)

    def loss(model, batch, rngs):
        if batch.training:
            jax.debug.callback(send, batch.step)
        return squared_error(model, batch, rngs)

    message = refusal(linear, loss=loss, steps=5000, validation_every=5000, log_every=5000)
    step = runs.latest_step(linear.path)
    assert f"interrupted: saved at step {step};" in message and str(linear.path) in message and 6 <= step < 5000
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    for name in ("run", "whole"):
        linear(name, steps=step + 7)
    parts, whole = (runs.load_model(tmp_path / name, checkpoint="latest") for name in ("run", "whole"))
    assert_same(nnx.state(parts), nnx.state(whole))


# Non-finite values ---------------------------------------------------------------------------------------------------


def bad_at(*steps, kind="loss"):
    """The squared error, but not finite at these steps (counted from 0) of training."""

    def loss(model, batch, rngs):
        terms = squared_error(model, batch, rngs)
        if batch.training:
            bad = jnp.isin(batch.step, jnp.array(steps))
            if kind == "loss":
                terms["loss"] = terms["loss"] * jnp.where(bad, jnp.inf, 1.0)
            else:  # the gradient of sqrt at 0 is infinite, its value is not
                terms["loss"] = terms["loss"] + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.sum(model.kernel[...] ** 2))
        return terms

    return loss


@pytest.mark.parametrize("kind, named", [("loss", "loss"), ("gradient", "gradient_norm")])
def test_a_nonfinite_step_stops_the_run(linear, kind, named):
    message = refusal(linear, loss=bad_at(6, kind=kind), steps=50)
    assert f"{named} not finite at step 7" in message.replace("loss, gradient_norm", "loss")
    assert f"the last good checkpoint is step 4 in {linear.path}" in message
    assert runs.latest_step(linear.path) == 4 == runs.latest_step(linear.path, "best")
    assert [row["step"] for row in rows(linear.path)] == [4]
    assert all(np.isfinite(w).all() for w in weights(runs.load_model(linear.path, checkpoint="latest")))


@pytest.mark.parametrize(
    "changes, message, saved",
    [
        ({"loss": bad_at(0), "log_every": 1}, "not finite at step 1; no checkpoint was saved", 0),
        # Nothing is logged between step 4 and the checkpoint.
        (
            {"loss": bad_at(4), "log_every": 50, "checkpoint_every": 5},
            r"at step 5.*last good checkpoint is step 4",
            4,
        ),
        ({"optimizer": {"learning_rate": 1e30}}, r"not finite at step \d.* config\.optimizer\.learning_rate", 0),
        (
            {"validation": data.Dataset("inf", "test", np.full((13, DIM + 1), np.inf, np.float32))},
            "the validation loss is (inf|nan) at step 4; no checkpoint was saved",
            0,
        ),
    ],
)
def test_what_is_not_finite_is_not_saved(linear, changes, message, saved):
    with pytest.raises(UserError, match=message):
        linear(steps=50, **changes)
    assert runs.latest_step(linear.path) == saved


def test_a_checkpoint_that_was_not_validated_is_not_called_good(linear):
    """The loss at its step was finite, but of the weights before; its own weights give infinity."""
    changes = {"optimizer": {"learning_rate": 1e30}, "validation_every": 50, "checkpoint_every": 1}
    message = refusal(linear, steps=50, **changes)
    assert runs.latest_step(linear.path) >= 1
    assert "no saved checkpoint was validated" in message and "last good" not in message


def test_tensorboard_sees_events_before_the_run_ends(linear, monkeypatch):
    sizes = []

    def size(*_):
        sizes.append(sum(path.stat().st_size for path in (linear.path / "tb").iterdir()))

    monkeypatch.setattr(log, "_FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(log.TrainingLog, "restart_clock", size)
    linear(steps=8)
    assert len(set(sizes)) > 1 and sizes == sorted(sizes)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skipping_leaves_the_state_untouched(kind):
    chosen = experiment(loss=bad_at(2, 3, 5, kind=kind), skip_nonfinite_updates=True, ema_decay=0.9)
    states, metrics = run_steps(chosen, 7)
    learned = [s._replace(step=0, skipped=0, skipped_in_a_row=0) for s in states]
    assert_same(learned[3], learned[2])
    assert_same(learned[4], learned[2])
    assert_same(learned[6], learned[5])
    assert int(learned[7].mutable["count"][...]) == 4
    assert not np.array_equal(learned[5].trainable["kernel"][...], learned[4].trainable["kernel"][...])
    assert [int(s.step) for s in states] == list(range(8))
    assert [int(m["skipped_updates"]) for m in metrics] == [0, 0, 1, 2, 2, 3, 3]
    assert [int(m["skipped_in_a_row"]) for m in metrics] == [0, 0, 1, 2, 0, 1, 0]


def test_skipped_updates_are_counted_and_left_out_of_means(linear):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    linear(loss=bad_at(2, 4, 5, 6, 7), steps=8, skip_nonfinite_updates=True, log_every=4)
    lines = (linear.path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert math.isfinite(first["train_loss"]) and math.isfinite(first["train_gradient_norm"])
    assert first["train_skipped_updates"] == 1 and second["train_skipped_updates"] == 5  # all four


def test_a_long_run_of_skips_stops_the_run(linear, monkeypatch):
    monkeypatch.setattr(log, "_MAX_CONSECUTIVE_SKIPS", 5)
    linear("short", loss=bad_at(*range(4, 8), *range(9, 13)), steps=16, skip_nonfinite_updates=True)
    message = refusal(linear, loss=bad_at(*range(5, 500)), steps=500, skip_nonfinite_updates=True, log_every=1)
    assert "5 updates in a row not finite and skipped" in message and "last good checkpoint" in message


# Phases --------------------------------------------------------------------------------------------------------------


class Pair(nnx.Module):
    """A model of another structure than what is trained afterwards."""

    def __init__(self):
        self.first, self.second = Linear(), Linear()
        self.second.kernel[...] *= 2.0


def pair_error(model, batch, rngs):
    return {"loss": sum(squared_error(part, batch, rngs)["loss"] for part in (model.first, model.second))}


def second_of_pair(pair):
    pair.second.bias[...] += 1.0
    return pair.second, {"answer": 42.0}


def doubled(model):
    model.kernel[...] *= 2.0
    return model, {"doubled": 1.0}


def phases(count, loss=squared_error, **last):
    """Two or three phases that end at 5, (8), and the end; the last with optimiser options of its own."""
    three = [
        Phase(Pair(), pair_error, 5, optimizer(learning_rate=0.05)),
        Phase(Linear(), squared_error, 3, optimizer(learning_rate=0.2), begin=second_of_pair),
        Phase(Linear(), loss, None, optimizer(**last), begin=doubled),
    ]
    return three if count == 3 else [three[0], dataclasses.replace(three[2], begin=second_of_pair)]


PHASED = {"steps": 13, "validation_every": 4, "checkpoint_every": 3, "log_every": 1, "ema_decay": 0.7}


def test_phases_are_as_if_one_program_ran_after_another(linear):
    seen = []

    def loss(model, batch, rngs):
        if batch.training:
            jax.debug.callback(lambda s: seen.append(int(s)), batch.step)
        return squared_error(model, batch, rngs)

    model = linear("run", *phases(3, loss, warmup_steps=3), **PHASED)
    chosen, before, rates = experiment(*phases(3, warmup_steps=3), **PHASED), None, []
    for index, (first, last) in enumerate(((0, 5), (5, 8), (8, 13))):
        phase = compiled(chosen, index, first, last)
        begin = chosen.phases[index].begin
        states, metrics = run_steps(chosen, last - first, phase, begin and begin(before)[0], first)
        before = nnx.merge(phase.graphdef, states[-1].ema, nnx.State({}), states[-1].mutable)
        rates.append([float(m["learning_rate"]) for m in metrics])
    np.testing.assert_allclose(model.kernel[...], before.kernel[...], rtol=1e-5)
    np.testing.assert_allclose(model.bias[...], before.bias[...], rtol=1e-5)
    np.testing.assert_allclose(
        np.concatenate(rates), [0.05] * 5 + [0.2] * 3 + [0, 0.1 / 3, 0.2 / 3, 0.1, 0.1], rtol=1e-5
    )
    assert int(states[-1].step) == 13 and set(seen) == set(range(5))  # batch.step begins with the phase
    assert int(model.count[...]) == 13  # what the phases before counted was handed over


def test_where_a_phase_ends_the_model_of_the_next_is_validated(linear):
    linear("run", *phases(3, learning_rate=0.0), **PHASED | {"ema_decay": None})  # averaging equal weights may round
    by_step = {row["step"]: row for row in rows(linear.path)}
    assert list(by_step) == [4, 5, 8, 12, 13]
    assert by_step[5]["val_answer"] == 42.0 and by_step[8]["val_doubled"] == 1.0
    for step in (5, 8):
        assert all(key == "step" or key.startswith("val_") for key in by_step[step])
    assert by_step[8]["val_loss"] == by_step[12]["val_loss"]  # nothing was learned since then
    assert "val_error_squared" not in by_step[4] and "val_error_squared" in by_step[5]
    assert by_step[12]["train_learning_rate"] == 0.0


@pytest.mark.parametrize("count, last_phase, stops", [(2, 5, (3, 5, 6, 12)), (3, 8, (5, 6, 8, 9))])
def test_stopped_in_any_phase_it_goes_on_as_if_never_stopped(linear, tmp_path, count, last_phase, stops):
    """Before its last phase begins to train, it has no model."""
    linear("whole", *phases(count), **PHASED)
    for stop in stops:
        name, path = f"stopped at {stop}", tmp_path / f"stopped at {stop}"
        linear(name, *phases(count), stop=stop, **PHASED)
        assert runs.latest_step(path, "latest") == stop
        assert bool(runs.latest_step(path, "best")) == (stop == 12)
        if stop <= last_phase:
            message = refusal(runs.load_model, path, checkpoint="latest")
            assert f"is still pretraining, at step {stop}: train it longer" in message
            assert "holds no best checkpoint yet" in refusal(runs.load_model, path, checkpoint="best")
        linear(name, *phases(count), **PHASED)
        assert_same_runs(path, tmp_path / "whole")


# Options and log -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [({name: 0}, rf"config\.{name} ") for name in ("steps", "batch_size", "validation_every", "log_every")]
    + [
        ({"checkpoint_every": 0}, r"config\.checkpoint_every "),
        ({"seed": -1}, r"config\.seed "),
        ({"evaluate_checkpoint": "last"}, r"config\.evaluate_checkpoint .*'best' or 'latest', not 'last'"),
        ({"optimizer": {"learning_rat": 0.1}}, r"config\.optimizer\.learning_rat'.*learning_rate"),
        ({"optimizer": {"learning_rate": float("inf")}}, r"config\.optimizer\.learning_rate "),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        experiment(**changes)


def test_logged_training_metrics_are_means_since_the_last_write(linear):
    linear(steps=4, log_every=2, validation_every=4)
    _, metrics = run_steps(experiment(), 4)
    (row,) = map(json.loads, (linear.path / "metrics.jsonl").read_text().splitlines())
    assert row["step"] == 4 and row["steps_per_second"] > 0
    for name in ("loss", "gradient_norm", "learning_rate", "error_squared"):
        np.testing.assert_allclose(row[f"train_{name}"], np.mean([m[name] for m in metrics[2:]]), rtol=1e-5)
