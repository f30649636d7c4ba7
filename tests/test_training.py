"""The training loop, with a linear regression whose every update NumPy can repeat, and with a small PM-VAE."""

import contextlib
import functools
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
from ml_collections import ConfigDict

import train_pm_vae
from configs import common
from posterior_matching import data, parallel, runs
from posterior_matching.config import parse
from posterior_matching.errors import UserError
from posterior_matching.training import log, loop
from posterior_matching.training.batching import EpochOrder, TrainingFeed
from posterior_matching.training.loop import Experiment, OptimizerOptions, Pretraining, Program, TrainingOptions, fit

# Most of these tests run the same few programs; compiling is most of what they do.
pytestmark = pytest.mark.usefixtures("compilation_cache")

DEVICES = 4
DIM = 3


class Linear(nnx.Module):
    """y = x W + b, and a count of the training steps as its mutable state."""

    def __init__(self):
        self.kernel = nnx.Param(jnp.array([[0.5], [-1.0], [0.25]]))
        self.bias = nnx.Param(jnp.zeros(1))
        self.count = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        return (x @ self.kernel[...] + self.bias[...])[:, 0]

    @classmethod
    def from_config(cls, config, input_shape, rngs):
        del config, input_shape, rngs
        return cls()


def squared_error(model, batch, rngs, step, training):
    del rngs, step
    if training:
        model.count[...] += 1
    error = jnp.square(model(batch["x"]) - batch["y"])
    return {"loss": error, "error_squared": 2.0 * error, "constant_nats": jnp.float32(3.0)}


def table(num_rows=37, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_rows, DIM)).astype(np.float32)
    y = (x @ [1.0, 2.0, -1.0] + 0.5 + offset + 0.1 * rng.normal(size=num_rows)).astype(np.float32)
    return {"x": x, "y": y}


def linear_experiment(loss=squared_error, trainable=nnx.Param):
    return Experiment(Linear(), loss, prepare=lambda rows: rows, trainable=trainable)


def options(**changes):
    values = {"seed": 0, "steps": 8, "batch_size": 3, "validation_every": 4, "log_every": 2}
    values["optimizer"] = {"learning_rate": 0.1}
    return TrainingOptions(**values | changes)


@pytest.fixture
def linear(tmp_path, monkeypatch):
    """`linear(name, loss=..., train=..., **options)` trains in the run directory `name`."""
    monkeypatch.setitem(runs.MODELS, "linear", Linear)

    def run_it(name="run", loss=squared_error, train=None, validation=None, trainable=nnx.Param, **changes):
        config = ConfigDict({"dataset": "table", "model": {}, "evaluate_checkpoint": "best"})
        run = runs.open_run(str(tmp_path / name), "linear", config, (DIM,))
        train, validation = train or table(), validation or table(13, seed=1)
        return fit(linear_experiment(loss, trainable), run, options(**changes), train, validation)

    run_it.path = tmp_path / "run"
    return run_it


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def saved_steps(path, name):
    return sorted(int(p.name) for p in (path / "checkpoints" / name).iterdir())


def weights(model):
    return np.asarray(model.kernel[...]), np.asarray(model.bias[...])


def start(program):
    state, frozen = program.initial_state()
    return parallel.replicate((state, frozen))


def feed_for(program_options, train):
    feed = TrainingFeed(train, program_options.batch_size, program_options.seed, 1.0)
    return lambda step, num_steps=1: feed.get(step, num_steps, 0)


def run_steps(program, program_options, train, num_steps):
    """Runs steps one by one and returns all states (first: the initial one) and all metrics, of the first device."""
    state, frozen = start(program)
    get = feed_for(program_options, train)
    states, metrics = [parallel.unreplicate(state)], []
    for step in range(num_steps):
        state, found = program.train(state, frozen, *get(step))
        states.append(parallel.unreplicate(state))
        metrics.append({k: v[0] for k, v in parallel.unreplicate(found).items()})
    return states, metrics


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol), found, expected)


# Several devices = one -----------------------------------------------------------------------------------------------


def global_rows(num_rows, batch_size, seed, step):
    """Device d owns rows d, d + 4, ... and goes through them in an order of its own."""
    shares = [np.arange(d, num_rows, DEVICES) for d in range(DEVICES)]
    return np.concatenate(
        [share[EpochOrder(len(share), seed, d).batches(step, 1, batch_size)[0]] for d, share in enumerate(shares)]
    )


def reference_run(train, num_steps, optimizer, batch_size=3, seed=0):
    """The same training on one device with the global batch, by optax's own AdamW."""

    def learning_rate(step):
        warm = jnp.minimum(1.0, step / optimizer["warmup_steps"])
        return warm * optimizer["learning_rate"] * optimizer["decay_rate"] ** (step / optimizer["transition_steps"])

    mask = {"kernel": True, "bias": False}
    direction = optax.chain(
        optax.clip_by_global_norm(optimizer["clip_norm"]),
        optax.adamw(learning_rate, weight_decay=optimizer["weight_decay"], mask=mask, eps=optimizer["eps"]),
    )
    start_model = Linear()
    parameters = {"kernel": start_model.kernel[...], "bias": start_model.bias[...]}
    state = direction.init(parameters)

    def loss(p, x, y):
        return jnp.mean(jnp.square((x @ p["kernel"] + p["bias"])[:, 0] - y))

    for step in range(num_steps):
        chosen = global_rows(len(train["x"]), batch_size, seed, step)
        gradients = jax.grad(loss)(parameters, train["x"][chosen], train["y"][chosen])
        updates, state = direction.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters


def test_four_devices_equal_one_with_the_global_batch(linear):
    optimizer = {
        "learning_rate": 0.1,
        "decay_rate": 0.5,
        "transition_steps": 5,
        "warmup_steps": 3,
        "weight_decay": 0.3,
        "clip_norm": 2.0,
        "eps": 1e-3,
    }
    expected = reference_run(table(), 20, optimizer)
    assert np.abs(expected["kernel"] - weights(Linear())[0]).max() > 0.2  # it has learned something
    model = linear(steps=20, optimizer=optimizer)
    np.testing.assert_allclose(model.kernel[...], expected["kernel"], rtol=1e-5)
    np.testing.assert_allclose(model.bias[...], expected["bias"], rtol=1e-5)


def test_gradient_over_devices_is_that_of_the_global_batch():
    train = table()
    states, metrics = run_steps(Program(linear_experiment(), options()), options(), train, 1)
    chosen = global_rows(37, 3, 0, 0)
    error = train["x"][chosen] @ weights(Linear())[0][:, 0] - train["y"][chosen]
    gradient = 2 * np.mean(error[:, None] * train["x"][chosen], axis=0)
    momentum = states[1].opt_state[1].mu  # after one step of Adam: 0.1 * gradient
    np.testing.assert_allclose(momentum["kernel"][...][:, 0], 0.1 * gradient, rtol=1e-5)
    np.testing.assert_allclose(momentum["bias"][...], [0.1 * 2 * error.mean()], rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["loss"], np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["error_squared"], 2 * np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(
        metrics[0]["gradient_norm"], np.hypot(np.linalg.norm(gradient), 2 * error.mean()), rtol=1e-5
    )


def small_pm_vae_config():
    config = common.pm_vae_tabular(latent_dim=2, encoder_blocks=1, decoder_blocks=0, dropout=0.3)
    config.model.partial_encoder.residual_blocks = 0
    config.model.posterior = {"name": "DiagonalGaussian"}
    for part in ("encoder", "decoder", "partial_encoder"):
        config.model[part].hidden_units = 8
    config.model.partial_posterior = {"name": "DiagonalGaussian"}
    config.update({"dataset": "mixture", "batch_size": 8, "noise_std": 0.1, "seed": 3, "steps": 4})
    config.optimizer.weight_decay = 0.1
    return config


@pytest.fixture(scope="module")
def pm_vae():
    config = small_pm_vae_config()
    dataset = data.load("mixture", "test")
    experiment = train_pm_vae.make_experiment(config, dataset, dataset)
    (program_options,) = parse(
        {k: v for k, v in config.items() if k in TrainingOptions.__annotations__}, TrainingOptions
    )
    program = Program(experiment, program_options)
    train = {"x": dataset.x}
    states, metrics = run_steps(program, program_options, train, 4)
    return SimpleNamespace(
        experiment=experiment, options=program_options, program=program, train=train, states=states, metrics=metrics
    )


def test_pm_vae_gradient_is_the_mean_over_devices_with_their_own_keys(pm_vae):
    graphdef, parameters, rest = nnx.split(pm_vae.experiment.model, nnx.Param, ...)

    def loss(parameters, rows, key):
        model = nnx.merge(graphdef, parameters, rest, copy=True)
        streams = {name: jax.random.fold_in(key, i) for i, name in enumerate(("noise", "mask", "sample", "dropout"))}
        batch = pm_vae.experiment.prepare({"x": rows})
        terms = pm_vae.experiment.loss(model, batch, nnx.Rngs(**streams), step=0, training=True)
        return jnp.mean(terms["loss"])

    differentiate = jax.jit(jax.value_and_grad(loss))
    step_key = jax.random.fold_in(jax.random.key(3), 0)
    found = [
        differentiate(parameters, pm_vae.train["x"][chosen], jax.random.fold_in(step_key, device))
        for device, chosen in enumerate(global_rows(2000, 8, 3, 0).reshape(DEVICES, 8))
    ]
    losses = [float(value) for value, _ in found]
    assert len(set(losses)) == DEVICES
    gradient = jax.tree.map(lambda *parts: sum(parts) / DEVICES, *(gradient for _, gradient in found))
    np.testing.assert_allclose(pm_vae.metrics[0]["loss"], np.mean(losses), rtol=1e-5)
    momentum = pm_vae.states[1].opt_state[1].mu
    assert_close(jax.tree.map(lambda m: 10 * m, momentum), gradient, rtol=1e-4, atol=1e-5)
    assert max(np.abs(g).max() for g in jax.tree.leaves(gradient)) > 0.01


def test_all_devices_hold_the_same_state(pm_vae):
    state, frozen = start(pm_vae.program)
    state, metrics = pm_vae.program.train(state, frozen, *feed_for(pm_vae.options, pm_vae.train)(0))
    for leaf in jax.tree.leaves((state, metrics)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


# Dispatch and compilation --------------------------------------------------------------------------------------------


def test_a_scan_over_steps_equals_step_by_step(pm_vae):
    state, frozen = start(pm_vae.program)
    state, metrics = pm_vae.program.train(state, frozen, *feed_for(pm_vae.options, pm_vae.train)(0, 4))
    metrics = parallel.unreplicate(metrics)
    for name, values in metrics.items():
        one_by_one = [m[name] for m in pm_vae.metrics]
        np.testing.assert_allclose(values, one_by_one, rtol=1e-4, err_msg=name)
    assert len(set(metrics["loss"].tolist())) == 4
    assert_close(parallel.unreplicate(state), pm_vae.states[4], rtol=1e-4, atol=1e-5)


def test_a_fit_does_not_depend_on_the_dispatch(linear, tmp_path, monkeypatch):
    changes = {"steps": 11, "ema_decay": 0.7, "data_memory_budget_gb": 0.0}
    one_by_one = linear("single", **changes)
    monkeypatch.setattr(loop, "steps_per_dispatch", lambda _: 2)
    many = linear("many", **changes)
    assert_close(weights(many), weights(one_by_one))
    for found, expected in zip(rows(tmp_path / "many"), rows(tmp_path / "single"), strict=True):
        found.pop("steps_per_second"), expected.pop("steps_per_second")
        assert found == pytest.approx(expected, rel=1e-5)


def test_steps_per_dispatch(monkeypatch):
    intervals = {"log_every": 100, "validation_every": 1000}
    assert loop.steps_per_dispatch(options(**intervals)) == 1
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loop.steps_per_dispatch(options(**intervals)) == 100
    assert loop.steps_per_dispatch(options(checkpoint_every=250, **intervals)) == 50
    assert loop.steps_per_dispatch(options(log_every=7, validation_every=1000)) == 1
    many = loop.steps_per_dispatch(options(log_every=6000, validation_every=6000))
    assert many <= 1000 and 6000 % many == 0


def test_dispatches_meet_every_interval_wherever_a_run_begins(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = options(log_every=20, validation_every=50, steps=137)
    for first in (0, 3, 10, 49, 136, 137):
        ends, step = [], first
        while step < chosen.steps:
            step += loop._steps_in_dispatch(step, chosen)
            ends.append(step)
        stops = {s for s in range(first + 1, 138) if s % 20 == 0 or s % 50 == 0 or s == 137}
        assert stops <= set(ends) and (not ends or ends[-1] == 137)


def test_one_compilation_of_the_step_and_one_of_validation(linear, caplog, monkeypatch):
    traced, compiled_before = [], []

    def loss(model, batch, rngs, step, training):
        traced.append(training)
        return squared_error(model, batch, rngs, step, training)

    class Feed(TrainingFeed):
        def get(self, *args):
            compiled_before.append(sum("Finished XLA compilation" in r.getMessage() for r in caplog.records))
            return super().get(*args)

    monkeypatch.setattr(loop, "TrainingFeed", Feed)
    with jax.log_compiles():
        linear(loss=loss, steps=24, validation_every=4, ema_decay=0.9)
    assert sorted(traced) == [False, True]
    assert len(compiled_before) == 24 and compiled_before[0] < compiled_before[1]
    assert len(set(compiled_before[1:4])) == 1  # all steps before the first validation
    assert len(set(compiled_before[4:])) == 1  # and everything after it


# The update ----------------------------------------------------------------------------------------------------------


def test_ema_follows_its_formula_and_is_what_validation_and_evaluation_use(linear):
    chosen = options(ema_decay=0.8, steps=8, validation_every=8)
    states, _ = run_steps(Program(linear_experiment(), chosen), chosen, table(), 8)
    expected = np.asarray(states[0].trainable["kernel"][...], np.float64)
    for state in states[1:]:
        expected = 0.8 * expected + 0.2 * np.asarray(state.trainable["kernel"][...], np.float64)
    np.testing.assert_allclose(states[-1].ema["kernel"][...], expected, rtol=1e-5)
    assert np.abs(states[-1].trainable["kernel"][...] - expected).max() > 0.01

    validation = table(13, seed=1)
    model = linear(steps=8, validation_every=8, ema_decay=0.8)
    np.testing.assert_allclose(model.kernel[...], expected, rtol=1e-5)
    loss = np.mean(np.square(np.asarray(model(validation["x"])) - validation["y"]))
    np.testing.assert_allclose(rows(linear.path)[-1]["val_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(runs.load_model(linear.path).kernel[...], expected, rtol=1e-5)


def test_mutable_state_is_carried_saved_and_not_touched_by_validation(linear):
    assert int(linear(steps=8).count[...]) == 8
    assert int(runs.load_model(linear.path).count[...]) == 8
    assert int(linear(steps=11).count[...]) == 11  # resumed


def test_weight_decay_acts_on_matrices_only():
    def zero(model, batch, rngs, step, training):
        del rngs, step, training
        return {"loss": 0.0 * model(batch["x"])}  # Adam's step of a zero gradient is zero: only the decay acts

    def decayed(weight_decay):
        chosen = options(optimizer={"learning_rate": 0.1, "weight_decay": weight_decay})
        experiment = linear_experiment(zero)
        experiment.model.bias[...] = jnp.array([2.0])
        return run_steps(Program(experiment, chosen), chosen, table(), 3)[0][-1].trainable

    after = decayed(0.5)
    np.testing.assert_allclose(after["kernel"][...], weights(Linear())[0] * 0.95**3, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"][...], [2.0])
    np.testing.assert_array_equal(decayed(0.0)["kernel"][...], weights(Linear())[0])


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
    schedule = OptimizerOptions(learning_rate=0.2, **changes).schedule()
    for step, value in expected.items():
        np.testing.assert_allclose(schedule(jnp.int32(step)), value, rtol=1e-6, err_msg=f"step {step}")


def test_the_step_uses_and_reports_the_schedule():
    chosen = options(optimizer={"learning_rate": 0.2, "warmup_steps": 4})
    states, metrics = run_steps(Program(linear_experiment(), chosen), chosen, table(), 3)
    np.testing.assert_allclose([m["learning_rate"] for m in metrics], [0.0, 0.05, 0.1], rtol=1e-6)
    assert_same(states[1].trainable, states[0].trainable)
    # Adam's second step is about 1 in every entry, so the parameter moves by about the learning rate.
    moved = np.abs(states[2].trainable["kernel"][...] - states[1].trainable["kernel"][...])
    assert 0.02 < moved.max() < 0.08


def test_clip_norm_limits_the_gradient_that_the_optimiser_sees():
    chosen = options(optimizer={"learning_rate": 0.1, "clip_norm": 0.01})
    states, metrics = run_steps(Program(linear_experiment(), chosen), chosen, table(), 1)
    assert metrics[0]["gradient_norm"] > 1  # reported as it is
    np.testing.assert_allclose(10 * optax.tree.norm(states[1].opt_state[1].mu), 0.01, rtol=1e-5)


def test_frozen_parameters_do_not_move_and_have_no_optimiser_state(linear):
    only_bias = nnx.All(nnx.Param, nnx.PathContains("bias"))
    state, frozen = Program(linear_experiment(trainable=only_bias), options()).initial_state()
    assert [leaf.shape for leaf in jax.tree.leaves(frozen)] == [(DIM, 1)]
    assert sorted(np.shape(leaf) for leaf in jax.tree.leaves(state.opt_state)) == [(), (1,), (1,)]  # count, mu, nu

    optimizer = {"learning_rate": 0.1, "weight_decay": 0.5}
    model = linear(trainable=only_bias, optimizer=optimizer, ema_decay=0.5)
    np.testing.assert_array_equal(model.kernel[...], Linear().kernel[...])
    assert float(model.bias[0]) != 0
    np.testing.assert_array_equal(runs.load_model(linear.path).kernel[...], Linear().kernel[...])


# Validation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [1, 7, 12, 13, 50])
def test_validation_is_the_plain_mean_over_examples(linear, num_rows):
    validation = table(num_rows, seed=4)
    model = linear(steps=4, validation=validation)
    error = np.square(np.asarray(model(validation["x"]), np.float64) - validation["y"])
    (row,) = rows(linear.path)
    np.testing.assert_allclose(row["val_loss"], error.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["val_error_squared"], 2 * error.mean(), rtol=1e-5)
    np.testing.assert_allclose(row["val_constant_nats"], 3.0, rtol=1e-6)


def noisy(model, batch, rngs, step, training):
    del step, training
    noise = jax.random.normal(rngs.noise(), batch["y"].shape)
    return {"loss": jnp.square(model(batch["x"]) - batch["y"] + noise)}


def test_validation_is_repeatable_and_independent_of_chunks(monkeypatch):
    validation = table(50)

    def validate(**changes):
        chosen = options(**changes)
        program = Program(linear_experiment(noisy), chosen)
        state, frozen = start(program)
        chunks = loop._ValidationChunks(validation, chosen)
        losses = [program.validate(state.trainable, state.mutable, frozen, chunks)["loss"] for _ in range(2)]
        assert losses[0] == losses[1]
        return losses[0]

    loss = validate()
    assert loss != validate(seed=1)
    assert loss == validate(data_memory_budget_gb=0.0)
    small_chunks = functools.partial(loop.evaluation_chunks, chunk_gb=1e-12)  # one batch each
    monkeypatch.setattr(loop, "evaluation_chunks", small_chunks)
    np.testing.assert_allclose(validate(), loss, rtol=1e-6)
    np.testing.assert_allclose(validate(data_memory_budget_gb=0.0), loss, rtol=1e-6)


def test_validation_draws_fresh_noise_for_every_batch_and_device():
    def noise_only(model, batch, rngs, step, training):
        del step, training
        # Squared sum: large if batches or devices shared their noise.
        return {"loss": 0 * model(batch["x"]) + jax.random.normal(rngs.noise(), batch["y"].shape)}

    chosen = options(batch_size=1)
    program = Program(linear_experiment(noise_only), chosen)
    state, frozen = start(program)
    validation = {"x": np.zeros((4000, DIM), np.float32), "y": np.zeros(4000, np.float32)}
    chunks = loop._ValidationChunks(validation, chosen)
    loss = program.validate(state.trainable, state.mutable, frozen, chunks)["loss"]
    assert abs(loss) < 5 / math.sqrt(4000)  # the same number everywhere would be of order 1, per device 0.5


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
    assert saved_steps(linear.path, "best") == [best] and saved_steps(linear.path, "latest") == [60]
    model, validation = runs.load_model(linear.path, checkpoint="best"), RISING["validation"]
    loss = np.mean(np.square(np.asarray(model(validation["x"])) - validation["y"]))
    np.testing.assert_allclose(loss, losses[best], rtol=1e-5)
    # A resumed run remembers what the best loss was.
    linear(steps=70, **swinging)
    assert saved_steps(linear.path, "best") == [best] and saved_steps(linear.path, "latest") == [70]


def test_resuming_continues_as_if_never_stopped(linear, tmp_path):
    changes = {"ema_decay": 0.9, "loss": noisy, "log_every": 1}
    linear("whole", steps=16, **changes)
    linear("parts", steps=8, **changes)
    linear("parts", steps=16, **changes)
    for name in ("best", "latest"):
        whole, parts = (runs.load_model(tmp_path / run, checkpoint=name) for run in ("whole", "parts"))
        assert_same(nnx.state(parts), nnx.state(whole))
    columns = [[{**row, "steps_per_second": 0} for row in rows(tmp_path / run)] for run in ("whole", "parts")]
    assert columns[0] == columns[1]


def test_the_best_checkpoint_is_on_disk_before_the_latest_begins(linear, monkeypatch):
    best_saved, original = [], ocp.CheckpointManager.save

    def save(manager, step, **kwargs):
        if manager.directory.name == "best":
            best_saved.append(step)
        else:
            assert saved_steps(linear.path, "best") == best_saved[-1:]
        return original(manager, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    linear(steps=60, **RISING)
    assert len(best_saved) >= 3 and best_saved[-1] < 60


def test_killed_between_the_best_and_the_latest_checkpoint(linear, tmp_path):
    for name in ("10", "15"):
        linear(name, steps=int(name), **RISING)
    assert saved_steps(tmp_path / "15", "best") == [15]
    shutil.rmtree(tmp_path / "15" / "checkpoints" / "latest")
    shutil.copytree(tmp_path / "10" / "checkpoints" / "latest", tmp_path / "15" / "checkpoints" / "latest")
    linear("15", steps=60, **RISING)
    linear("whole", steps=60, **RISING)
    for name in ("best", "latest"):
        assert saved_steps(tmp_path / "15", name) == saved_steps(tmp_path / "whole", name)
        killed, whole = (runs.load_model(tmp_path / run, checkpoint=name) for run in ("15", "whole"))
        assert_same(nnx.state(killed), nnx.state(whole))


def test_checkpoint_every_saves_between_validations(linear, monkeypatch):
    saved = []
    original = runs.Run.save
    monkeypatch.setattr(
        runs.Run, "save", lambda self, step, *rest, **kw: (saved.append(step), original(self, step, *rest, **kw))
    )
    linear(steps=10, validation_every=4, checkpoint_every=3)
    assert saved == [3, 4, 6, 8, 9, 10]
    assert [row["step"] for row in rows(linear.path)] == [4, 8, 10]


def test_nothing_to_do(linear, capsys):
    linear(steps=8)
    before = (linear.path / "metrics.jsonl").read_text()
    linear(steps=4)
    assert "nothing to do: step 8 of 4" in capsys.readouterr().out
    assert (linear.path / "metrics.jsonl").read_text() == before and saved_steps(linear.path, "latest") == [8]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_before_leaving(linear, tmp_path, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    sent = []

    def send(step):
        if step == 5 and not sent:  # once, though there are four devices
            sent.append(step)
            os.kill(os.getpid(), number)

    def loss(model, batch, rngs, step, training):
        if training:
            jax.debug.callback(send, step)
        return squared_error(model, batch, rngs, step, training)

    with pytest.raises(UserError, match="interrupted: saved at step") as error:
        linear(loss=loss, steps=5000, validation_every=5000, log_every=5000)
    assert str(linear.path) in str(error.value) and "\n" not in str(error.value)
    (step,) = saved_steps(linear.path, "latest")
    assert f"step {step};" in str(error.value) and 6 <= step < 5000
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    linear(steps=step + 7)
    linear("whole", steps=step + 7)
    parts, whole = (runs.load_model(tmp_path / name, checkpoint="latest") for name in ("run", "whole"))
    assert_same(nnx.state(parts), nnx.state(whole))


# Non-finite values ---------------------------------------------------------------------------------------------------


def bad_at(*steps, kind="loss"):
    """The squared error, but not finite at these steps (counted from 0) of training."""

    def loss(model, batch, rngs, step, training):
        terms = squared_error(model, batch, rngs, step, training)
        if training:
            bad = jnp.isin(step, jnp.array(steps))
            if kind == "loss":
                terms["loss"] = terms["loss"] * jnp.where(bad, jnp.inf, 1.0)
            else:  # the gradient of sqrt at 0 is infinite, its value is not
                terms["loss"] = terms["loss"] + jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.sum(model.kernel[...] ** 2))
        return terms

    return loss


@pytest.mark.parametrize("kind, named", [("loss", "loss"), ("gradient", "gradient_norm")])
def test_a_nonfinite_step_stops_the_run(linear, kind, named):
    with pytest.raises(UserError) as error:
        linear(loss=bad_at(6, kind=kind), steps=50)
    message = str(error.value)
    assert "\n" not in message
    assert f"{named} not finite at step 7" in message.replace("loss, gradient_norm", "loss")
    assert f"the last good checkpoint is step 4 in {linear.path}" in message
    assert saved_steps(linear.path, "latest") == [4] == saved_steps(linear.path, "best")
    assert [row["step"] for row in rows(linear.path)] == [4]
    assert all(np.isfinite(w).all() for w in weights(runs.load_model(linear.path, checkpoint="latest")))


def test_a_nonfinite_first_step_leaves_no_checkpoint(linear):
    with pytest.raises(UserError, match="not finite at step 1; no checkpoint was saved"):
        linear(loss=bad_at(0), steps=50, log_every=1)
    assert saved_steps(linear.path, "latest") == []


def test_a_nonfinite_step_just_before_a_checkpoint_is_not_saved(linear):
    with pytest.raises(UserError, match=r"not finite at step 5.*last good checkpoint is step 4"):
        linear(loss=bad_at(4), steps=50, log_every=50, checkpoint_every=5)
    assert saved_steps(linear.path, "latest") == [4]


def test_diverging_training_stops(linear):
    with pytest.raises(UserError, match=r"not finite at step \d"):
        linear(steps=50, optimizer={"learning_rate": 1e30})
    for name in ("best", "latest"):
        if saved_steps(linear.path, name):
            assert all(np.isfinite(w).all() for w in weights(runs.load_model(linear.path, checkpoint=name)))


def test_a_nonfinite_validation_loss_stops_the_run(linear):
    validation = table(13)
    validation["y"][7] = np.inf
    with pytest.raises(UserError, match="the validation loss is inf at step 4; no checkpoint was saved"):
        linear(validation=validation)
    assert saved_steps(linear.path, "latest") == []


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skipping_leaves_the_state_untouched(kind):
    chosen = options(skip_nonfinite_updates=True, ema_decay=0.9)
    experiment = linear_experiment(bad_at(2, 3, 5, kind=kind))
    states, metrics = run_steps(Program(experiment, chosen), chosen, table(), 7)
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
    linear(loss=bad_at(2, 5), steps=8, skip_nonfinite_updates=True, log_every=4)
    first, second = rows(linear.path)
    assert first["train_skipped_updates"] == 1 and second["train_skipped_updates"] == 2
    assert math.isfinite(first["train_loss"]) and math.isfinite(second["train_gradient_norm"])


def test_metrics_are_json_even_if_every_update_was_skipped(linear):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    linear(loss=bad_at(4, 5, 6, 7), steps=8, skip_nonfinite_updates=True, log_every=4)
    for line in (linear.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_a_long_run_of_skips_stops_the_run(linear, monkeypatch):
    monkeypatch.setattr(log, "_MAX_CONSECUTIVE_SKIPS", 5)
    linear("short", loss=bad_at(*range(4, 8), *range(9, 13)), steps=16, skip_nonfinite_updates=True)
    with pytest.raises(UserError, match=r"updates in a row not finite and skipped.*last good checkpoint") as error:
        linear(loss=bad_at(*range(5, 500)), steps=500, skip_nonfinite_updates=True, log_every=1)
    assert "5 updates in a row" in str(error.value)


# Pretraining ---------------------------------------------------------------------------------------------------------

BORDER = 5


class Pair(nnx.Module):
    """What is pretrained has another structure than what is trained."""

    def __init__(self):
        self.first, self.second = Linear(), Linear()
        self.second.kernel[...] *= 2.0


def pretrained_experiment(loss=squared_error):
    def pair_error(model, batch, *rest, **options):
        return {"loss": sum(squared_error(m, batch, *rest, **options)["loss"] for m in (model.first, model.second))}

    def finish(pair):
        pair.second.bias[...] += 1.0
        return pair.second, {"answer": 42.0}

    pair = Experiment(Pair(), pair_error, prepare=lambda rows: rows)
    pretraining = Pretraining(pair, BORDER, OptimizerOptions(learning_rate=0.05), finish)
    return Experiment(Linear(), loss, prepare=lambda rows: rows, pretraining=pretraining)


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """`pretrained(name, stop=...)` trains; it crashes after step `stop` if that is given."""
    monkeypatch.setitem(runs.MODELS, "linear", Linear)
    add = log.TrainingLog.add

    def run_it(name="run", stop=None, loss=squared_error, **changes):
        def crash(self, step, *args):
            if step == stop + 1:
                raise ZeroDivisionError
            add(self, step, *args)

        config = ConfigDict({"dataset": "table", "model": {}, "evaluate_checkpoint": "best"})
        run = runs.open_run(str(tmp_path / name), "linear", config, (DIM,))
        intervals = {"steps": 13, "validation_every": 4, "checkpoint_every": 3, "log_every": 1}
        chosen = options(**intervals | {"ema_decay": 0.7} | changes)
        with monkeypatch.context() as patch, contextlib.suppress(ZeroDivisionError):
            if stop is not None:
                patch.setattr(log.TrainingLog, "add", crash)
            return fit(pretrained_experiment(loss), run, chosen, table(), table(13, seed=1))

    run_it.path = tmp_path / "run"
    return run_it


def test_pretraining_then_training_with_an_optimiser_and_steps_of_its_own(pretrained):
    """As if two programs had run one after the other."""
    seen = []

    def loss(model, batch, rngs, step, training):
        if training:
            jax.debug.callback(lambda s: seen.append(int(s)), step)
        return squared_error(model, batch, rngs, step, training)

    optimizer = {"learning_rate": 0.1, "warmup_steps": 3}
    model = pretrained(loss=loss, optimizer=optimizer)
    experiment = pretrained_experiment()
    first_options = options(ema_decay=0.7, optimizer={"learning_rate": 0.05})
    first = Program(experiment.pretraining.experiment, first_options)
    states, _ = run_steps(first, first_options, table(), BORDER)
    pair = nnx.merge(first.graphdef, states[-1].ema, nnx.State({}), states[-1].mutable)
    chosen = options(ema_decay=0.7, optimizer=optimizer)
    main = Program(experiment, chosen, BORDER)
    state, frozen = parallel.replicate(main.initial_state(experiment.pretraining.finish(pair)[0]))
    get, rates = feed_for(chosen, table()), []
    for step in range(BORDER, 13):
        state, metrics = main.train(state, frozen, *get(step))
        rates.append(float(parallel.unreplicate(metrics)["learning_rate"][0]))
    state = parallel.unreplicate(state)
    np.testing.assert_allclose(model.kernel[...], state.ema["kernel"][...], rtol=1e-5)
    np.testing.assert_allclose(model.bias[...], state.ema["bias"][...], rtol=1e-5)
    np.testing.assert_allclose(rates[:4], [0.0, 0.1 / 3, 0.2 / 3, 0.1], rtol=1e-5)
    assert int(state.step) == 13 and set(seen) == set(range(8))  # the schedules of the loss, too, begin at the border
    assert int(model.count[...]) == 13  # what the pretraining counted was handed over


def test_where_pretraining_ends_the_initialised_model_is_validated(pretrained):
    pretrained(optimizer={"learning_rate": 0.0}, ema_decay=None)  # averaging equal weights may round
    found = rows(pretrained.path)
    assert [row["step"] for row in found] == [4, 5, 8, 12, 13]
    assert found[1]["val_answer"] == 42.0 and all(key == "step" or key.startswith("val_") for key in found[1])
    assert found[1]["val_loss"] == found[2]["val_loss"]  # nothing was learned since then
    assert "val_error_squared" not in found[0] and "val_error_squared" in found[1]
    assert found[2]["train_learning_rate"] == 0.0


@pytest.mark.parametrize("stop", [3, BORDER, 6, 12])
def test_stopped_in_any_phase_it_goes_on_as_if_never_stopped(pretrained, tmp_path, stop):
    pretrained("whole")
    assert pretrained("parts", stop=stop) is None
    assert saved_steps(tmp_path / "parts", "latest") == [stop]
    assert bool(saved_steps(tmp_path / "parts", "best")) == (stop == 12)
    pretrained("parts")
    for name in ("best", "latest"):
        parts, whole = (runs.load_model(tmp_path / run, checkpoint=name) for run in ("parts", "whole"))
        assert_same(nnx.state(parts), nnx.state(whole))
    columns = [[{**row, "steps_per_second": 0} for row in rows(tmp_path / run)] for run in ("whole", "parts")]
    assert columns[0] == columns[1]


@pytest.mark.parametrize("stop", [3, BORDER])
def test_a_run_that_is_still_pretraining_has_no_model(pretrained, stop):
    pretrained(stop=stop)
    with pytest.raises(UserError, match=f"is still pretraining, at step {stop}: train it longer"):
        runs.load_model(pretrained.path, checkpoint="latest")
    with pytest.raises(UserError, match="holds no best checkpoint yet"):
        runs.load_model(pretrained.path, checkpoint="best")


def test_there_must_be_steps_after_pretraining(pretrained):
    with pytest.raises(UserError, match=r"config\.steps must exceed the 5 steps of pretraining, it is 5"):
        pretrained(steps=BORDER)
    assert not pretrained.path.exists()


def test_a_dispatch_never_crosses_the_end_of_pretraining(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = options(log_every=20, validation_every=50, steps=137)
    for border in (0, 7, 40, 53):
        ends, step = [], 0
        while step < chosen.steps:
            step += loop._steps_in_dispatch(step, chosen, border)
            ends.append(step)
        stops = {s for s in range(1, 138) if s % 20 == 0 or s % 50 == 0 or s == 137} | ({border} - {0})
        assert stops <= set(ends) and ends[-1] == 137


# Options and log -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steps", "batch_size", "validation_every", "log_every", "checkpoint_every"])
def test_counts_must_be_positive(name):
    with pytest.raises(UserError, match=f"config.{name} must be at least 1, not 0"):
        options(**{name: 0})


@pytest.mark.parametrize("changes, message", [({"seed": -1}, "config.seed"), ({"evaluate_checkpoint": "last"}, "best")])
def test_other_bad_options(changes, message):
    with pytest.raises(UserError, match=message):
        options(**changes)


def test_an_unknown_optimizer_key_names_the_nearest():
    with pytest.raises(UserError, match=r"config.optimizer.learning_rat'.*learning_rate"):
        Program(linear_experiment(), options(optimizer={"learning_rat": 0.1}))


def test_logged_training_metrics_are_means_since_the_last_write(linear):
    linear(steps=4, log_every=2, validation_every=4)
    _, metrics = run_steps(Program(linear_experiment(), options()), options(), table(), 4)
    (row,) = rows(linear.path)
    assert row["step"] == 4 and row["steps_per_second"] > 0
    for name in ("loss", "gradient_norm", "learning_rate", "error_squared"):
        np.testing.assert_allclose(row[f"train_{name}"], np.mean([m[name] for m in metrics[2:]]), rtol=1e-5)
