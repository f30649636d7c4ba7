"""Training and evaluation as users start them: processes, signals, files."""

import functools
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import train_pm_vae
from posterior_matching import data, masking, runs
from posterior_matching.data import builtin
from posterior_matching.training.experiment import Batch

ROOT = Path(__file__).parents[1]
MNIST = Path(os.environ.get("TFDS_DATA_DIR", ROOT.parent / "shared" / "tensorflow_datasets"))

# Networks without blocks compile fastest.
TINY = """
from configs import common

def get_config():
    config = common.pm_vae_tabular(latent_dim=2, encoder_blocks=0, decoder_blocks=0)
    for part in ("encoder", "decoder", "partial_encoder"):
        config.model[part].hidden_units = 8
    config.model.posterior = {"name": "DiagonalGaussian"}
    config.model.partial_posterior = {"name": "DiagonalGaussian"}
    config.update({"dataset": "mixture", "train_split": "test", "batch_size": 16, "ema_decay": 0.9})
    config.update({"steps": 120, "validation_every": 20, "log_every": 10, "checkpoint_every": 30})
    config.optimizer.learning_rate = 0.01
    return config
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    (folder / "tiny.py").write_text(TINY)
    return folder


def environment(num_devices=1):
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # compiled as for users
    if num_devices > 1:
        variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={num_devices}"
    return variables


def start(folder, script, *arguments, num_devices=1):
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment(num_devices), **pipes)


def finish(process):
    out, process.err = process.communicate(timeout=300)
    assert process.returncode == 0, process.err
    return out


def train(folder, run_dir, *arguments):
    return start(folder, "train_pm_vae", "--config=tiny.py", f"--run_dir={run_dir}", *arguments)


def evaluate(folder, run_dir, *arguments):
    return start(folder, "eval_pm_vae_uci", f"--run_dir={run_dir}", "--num_samples=8", "--num_trials=2", *arguments)


def rows(run_dir):
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def checkpoints(run_dir):
    """Every array of every item of both checkpoints."""
    items = sorted((run_dir / "checkpoints").glob("*/*/*/_METADATA"))
    with ocp.StandardCheckpointer() as checkpointer:
        return {str(p.parent.relative_to(run_dir)): checkpointer.restore(p.parent) for p in items}


def assert_same_run(found, expected):
    """Bit for bit: all checkpointed arrays, and all metrics but the speed."""
    found, expected = checkpoints(found), checkpoints(expected)
    names = {re.sub(r"/\d+/", "/", name) for name in expected}
    assert names == {"checkpoints/best/model", "checkpoints/latest/model", "checkpoints/latest/train"}
    assert jax.tree.structure(found) == jax.tree.structure(expected)  # names, and therefore steps, included
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def metrics(run_dir):
    return [{k: v for k, v in row.items() if k != "steps_per_second"} for row in rows(run_dir)]


DIGITS = ["--config.dataset=digits", "--config.steps=6", "--config.validation_every=3", "--config.log_every=1"]
CSV = ["--config.dataset=own.csv", "--config.train_split=train", "--config.steps=80"]


@pytest.fixture(scope="module")
def trained(folder, table):
    """What the training runs that do not depend on each other print; side by side, they take half the time."""
    del table
    changes = {"undisturbed": [], "again": ["--config.data_memory_budget_gb=0"], "digits": DIGITS, "csv": CSV}
    processes = {name: train(folder, name, *arguments) for name, arguments in changes.items()}
    return {name: finish(process) for name, process in processes.items()}


@pytest.fixture(scope="module")
def undisturbed(folder, trained):
    assert f"run directory: {folder}/undisturbed" in trained["undisturbed"]
    return folder / "undisturbed"


@pytest.fixture(scope="module")
def evaluated(folder, trained):
    """What the evaluations of those runs print."""
    del trained
    changes = {"undisturbed": ["--num_instances=50", "--baselines", "--seed=4"]}
    changes["digits"] = ["--mask_generator=UniformMaskGenerator:bounds=0.0,0.2", "--num_instances=9"]
    changes["csv"] = ["--dataset=other.csv", "--split=all", "--baselines"]
    processes = {name: evaluate(folder, name, *arguments) for name, arguments in changes.items()}
    return {name: finish(process) for name, process in processes.items()}


@pytest.fixture(scope="module")
def table(folder):
    """The user's own table, with missing values: `own.csv`, and 30 of its rows, columns permuted, in `other.csv`."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3)) * [1.0, 10.0, 100.0] + [0.0, 50.0, -1000.0]
    values[rng.uniform(size=values.shape) < 0.2] = np.nan
    lines = [",".join("" if np.isnan(v) else repr(float(v)) for v in row) for row in values]
    (folder / "own.csv").write_text("\n".join(["height,width,depth", *lines]) + "\n")
    permuted = [",".join(reversed(line.split(","))) for line in ["height,width,depth", *lines[:30]]]
    (folder / "other.csv").write_text("\n".join(permuted) + "\n")


# Same numbers --------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(undisturbed):
    found = rows(undisturbed)
    assert [row["step"] for row in found] == list(range(20, 121, 20))
    assert found[-1]["val_loss"] < found[0]["val_loss"] - 1


def test_the_same_command_again_and_streaming_give_the_same_bits(folder, undisturbed):
    assert_same_run(folder / "again", undisturbed)
    assert metrics(folder / "again") == metrics(undisturbed)


def test_killed_at_any_moment_and_resumed(folder, undisturbed):
    run_dir = folder / "killed"
    moments = [
        lambda: (run_dir / "config.json").exists(),
        lambda: any((run_dir / "checkpoints").glob("*/*tmp*")),  # while a checkpoint is being written
        lambda: len(rows(run_dir)) >= 4,
    ]
    for reached in moments:
        process = train(folder, "killed")
        wait_until(reached, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(train(folder, "killed"))
    assert_same_run(run_dir, undisturbed)
    assert metrics(run_dir) == metrics(undisturbed)


def test_sigterm_saves_says_how_to_go_on_and_resuming_loses_nothing(folder, undisturbed):
    run_dir = folder / "terminated"
    process = train(folder, "terminated")
    wait_until(lambda: rows(run_dir), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    message = err.splitlines()[-1]
    assert message.startswith("error: interrupted: saved at step ") and f"--run_dir={run_dir}" in message
    step = int(re.search(r"step (\d+)", message)[1])
    assert step < 120 and runs.latest_step(run_dir) == step
    assert f"training from step {step} to 120" in finish(train(folder, "terminated"))
    assert_same_run(run_dir, undisturbed)


def test_two_processes_equal_two_devices(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ["--config.steps=20", "--config.validation_every=10"]
    several = ["--num_processes=2", f"--coordinator_address=localhost:{port}"]
    processes = [train(folder, "processes", *common, *several, f"--process_id={i}") for i in range(2)]
    command = ["--config=tiny.py", "--run_dir=devices", *common]
    one = start(folder, "train_pm_vae", *command, num_devices=2)
    outs = [finish(process) for process in (*processes, one)]
    assert "2 cpu devices, global batch 32" in outs[0] and "global batch 32" in outs[2]
    # Only the first process speaks and writes.
    assert "run directory: " in outs[0] and "run directory: " not in outs[1] and "0%" not in processes[1].err
    assert len(list((folder / "processes" / "tb").iterdir())) == 1
    for found, expected in zip(metrics(folder / "processes"), metrics(folder / "devices"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    found, expected = checkpoints(folder / "processes"), checkpoints(folder / "devices")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    # Sums over devices are taken in another order; Adam enlarges that where gradients are almost zero.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


# Evaluation ----------------------------------------------------------------------------------------------------------


def exact_conditional(x, b):
    """log p(x_u | x_o) of the mixture, example by example, with scipy's densities."""
    from scipy.special import logsumexp
    from scipy.stats import multivariate_normal

    weights, means, covariances = builtin._mixture_parameters()

    def log_prob(row, chosen):
        if not chosen.any():
            return 0.0
        terms = [
            np.log(w) + multivariate_normal.logpdf(row[chosen], m[chosen], c[np.ix_(chosen, chosen)])
            for w, m, c in zip(weights, means, covariances, strict=True)
        ]
        return logsumexp(terms)

    every = np.ones(8, bool)
    return np.array([log_prob(row, every) - log_prob(row, mask == 1) for row, mask in zip(x, b, strict=True)])


def test_evaluation_writes_its_results_and_the_exact_likelihood(undisturbed, evaluated):
    results = json.loads((undisturbed / "uci_results" / "results.json").read_text())
    assert set(results) == {"metrics", "num_examples", "seed", "flags", "versions", "seconds"}
    assert results["num_examples"] == 50 and results["seed"] == 4 and results["flags"]["num_samples"] == 8
    names = {"nrmse", "ac_ll_nats", "ac_ll_exact_nats", "log_p_x_nats"}
    names |= {"effective_sample_size_x", "effective_sample_size_xo"}
    assert set(results["metrics"]) == names | {"nrmse_mean", "nrmse_knn", "nrmse_iterative"}
    for name, values in results["metrics"].items():
        assert set(values) == {"mean", "std", "trials"} and len(values["trials"]) == 2
        np.testing.assert_allclose(values["mean"], np.mean(values["trials"]))
        np.testing.assert_allclose(values["std"], np.std(values["trials"]))
        assert name in evaluated["undisturbed"]
    for name, metric in (("nrmse", "nrmse"), ("ac_lls", "ac_ll_nats")):
        array = np.load(undisturbed / "uci_results" / f"{name}.npy", allow_pickle=False)
        np.testing.assert_array_equal(array, results["metrics"][metric]["trials"])

    x = data.load("mixture", "test").x[:50]
    for trial, found in enumerate(results["metrics"]["ac_ll_exact_nats"]["trials"]):
        key = jax.random.fold_in(jax.random.key(4), trial)
        mask_keys = [jax.random.split(jax.random.fold_in(key, i), 3)[0] for i in range(50)]
        b = np.stack([masking.BernoulliMaskGenerator()(k, (1, 8))[0] for k in mask_keys])
        np.testing.assert_allclose(found, exact_conditional(x, b).mean(), rtol=1e-5)
        # The model knows less than the truth, and importance sampling errs low.
        assert results["metrics"]["ac_ll_nats"]["trials"][trial] < found


def tensorboard(run_dir):
    """Tag -> steps of the events that were written."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    found = {}
    for path in sorted((run_dir / "tb").iterdir()):
        content = path.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            payload, content = content[12 : 12 + length], content[16 + length :]
            assert masked_crc32c(payload)  # readable, whatever the platform
            event = event_pb2.Event.FromString(payload)
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_digits_from_training_to_pictures(folder, trained, evaluated):
    run_dir = folder / "digits"
    assert "1 cpu device, global batch 16" in trained["digits"] and "training from step 0 to 6" in trained["digits"]
    events = tensorboard(run_dir)
    for name in ("loss", "elbo_nats", "kl_nats", "reconstruction_ll_nats", "matching_ll_nats"):
        assert events[f"train/{name}"] == [1, 2, 3, 4, 5, 6] and events[f"val/{name}"] == [3, 6]
    for name in ("gradient_norm", "learning_rate", "beta", "steps_per_second"):
        assert events[f"train/{name}"] == [1, 2, 3, 4, 5, 6]
    assert events["imputations"] == events["samples"] == [3, 6]

    results = json.loads((run_dir / "uci_results" / "results.json").read_text())
    assert results["flags"]["mask_generator"] == "UniformMaskGenerator:bounds=0.0,0.2"
    assert "ac_ll_exact_nats" not in results["metrics"]
    assert "digits/uci_results/imputations.png" in evaluated["digits"]
    picture = (run_dir / "uci_results" / "imputations.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 1000


# Building on another run, own data -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(folder, undisturbed):
    """A run on top of a copy of the undisturbed one, which is deleted afterwards; its own model keys are ignored."""
    shutil.copytree(undisturbed, folder / "base")
    before = {p: p.read_bytes() for p in (folder / "base").rglob("*") if p.is_file()}
    finish(train(folder, "pretrained", *PRETRAINED, "--config.steps=20"))
    assert {p: p.read_bytes() for p in (folder / "base").rglob("*") if p.is_file()} == before
    shutil.rmtree(folder / "base")
    return folder / "pretrained"


PRETRAINED = ["--config.pretrained_dir=base", "--config.validation_every=10", "--config.model.encoder.hidden_units=9"]


def test_a_pretrained_vae_is_taken_over_bit_for_bit_and_frozen(pretrained, undisturbed):
    weights = {name: runs.flat_weights(nnx.state(runs.load_model(name))) for name in (pretrained, undisturbed)}
    ours, base = weights[pretrained], weights[undisturbed]
    assert any(name.startswith("vae.") for name in ours) and ours.keys() == base.keys()
    for name, value in ours.items():
        assert np.array_equal(value, base[name]) == name.startswith("vae."), name
    (state,) = (v for k, v in checkpoints(pretrained).items() if k.endswith("latest/20/train"))
    largest = sum(np.size(v) for k, v in base.items() if not k.startswith("vae."))
    # Weights, their EMA and Adam's two moments of the partial posterior; a handful of counters.
    assert 4 * largest <= sum(np.size(leaf) for leaf in jax.tree.leaves(state)) < 4 * largest + 10


def test_a_run_on_a_pretrained_vae_describes_itself(pretrained, undisturbed):
    ours, base = (runs.read_description(run)["config"] for run in (pretrained, undisturbed))
    for key in ("latent_dim", "encoder", "posterior", "decoder", "likelihood"):
        assert ours["model"][key] == base["model"][key]
    assert ours["pretrained_dir"] == "base"


def test_a_pretrained_vae_of_other_data_is_refused(folder, undisturbed):
    np.save(folder / "nine.npy", np.random.default_rng(0).standard_normal((200, 9)))
    process = train(folder, "refused", f"--config.pretrained_dir={undisturbed}", "--config.dataset=nine.npy")
    err = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and not (folder / "refused").exists()
    assert err.strip().endswith("trained on data of shape (8,), but config.dataset has shape (9,)")


def test_a_run_on_a_pretrained_vae_resumes_without_it(folder, pretrained):
    finish(train(folder, shutil.copytree(pretrained, folder / "longer"), *PRETRAINED, "--config.steps=30"))
    longer, shorter = (runs.flat_weights(nnx.state(runs.load_model(p))) for p in (folder / "longer", pretrained))
    for name, value in longer.items():
        assert np.array_equal(value, shorter[name]) == name.startswith("vae."), name


@pytest.mark.usefixtures("evaluated")
def test_own_csv_with_missing_values(folder):
    found = rows(folder / "csv")
    assert found[-1]["val_loss"] < found[0]["val_loss"] and all(np.isfinite(list(row.values())).all() for row in found)

    description = runs.read_description(folder / "csv")
    assert description["input_shape"] == [3]
    columns = data.Columns.from_json(description["columns"])
    assert columns == data.load(str(folder / "own.csv"), "train").columns

    results = json.loads((folder / "csv" / "uci_results" / "results.json").read_text())
    assert results["num_examples"] == 30 and results["flags"]["dataset"] == "other.csv"
    # In the units of the run, imputing the mean errs by about one standard deviation, whatever the file.
    assert 0.5 < results["metrics"]["nrmse_mean"]["mean"] < 1.5
    assert all(np.isfinite(values["mean"]) for values in results["metrics"].values())


# Real images ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (MNIST / "mnist").is_dir(), reason="MNIST is not prepared")
@pytest.mark.parametrize("name", ["pm_vae_mnist", "pm_vae_mnist16"])
def test_a_few_steps_on_mnist_lower_the_loss(name, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(MNIST))
    config = importlib.import_module(f"configs.{name}").get_config()
    dataset = data.load(config.dataset, "test")
    family = train_pm_vae.FAMILY
    (phase,) = family.experiment(family.parse(config), dataset, dataset).phases
    x, available = data.decode(dataset.x[:8], dataset.max_value)
    graphdef, parameters, rest = nnx.split(phase.model, nnx.Param, ...)
    optimizer = optax.adam(config.optimizer.learning_rate)
    state = optimizer.init(parameters)

    @jax.jit
    @jax.value_and_grad
    def loss(parameters, key):
        model = nnx.merge(graphdef, parameters, rest, copy=True)
        rngs = nnx.Rngs(mask=key, sample=key, noise=key)
        return phase.loss(model, Batch(x, available, None, jnp.int32(0)), rngs)["loss"].mean()

    losses = []
    for step in range(8):
        value, gradient = loss(parameters, jax.random.key(step))
        losses.append(float(value))
        updates, state = optimizer.update(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    assert np.isfinite(losses).all() and np.mean(losses[-2:]) < losses[0] - 20
