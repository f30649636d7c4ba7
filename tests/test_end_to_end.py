"""Training and evaluation as users start them: processes, signals, files."""

import functools
import json
import re
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from helpers.configs import SMALL
from helpers.runs import rows
from helpers.scripts import finish, free_port, start, write_config
from posterior_matching import data, mask_generators, runs
from posterior_matching.evaluation import uci

pytestmark = pytest.mark.process

CONFIG = SMALL["pm_vae_mixture"] | {"train_split": "test", "batch_size": 16, "ema_decay": 0.9, "steps": 120}
CONFIG |= {"validation_every": 20, "log_every": 10, "checkpoint_every": 30, "optimizer.learning_rate": 0.01}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end_to_end")
    write_config(folder / "tiny.py", "pm_vae_mixture", CONFIG)
    return folder


def train(folder, run_dir, *arguments, **options):
    """Starts training; what is compared bit for bit is compiled as for users."""
    options["as_for_users"] = run_dir in ("undisturbed", "again", "killed", "terminated")
    return start("train_pm_vae", "--config=tiny.py", f"--run_dir={run_dir}", *arguments, cwd=folder, **options)


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


DIGITS = ["--config.dataset=digits", "--config.steps=6", "--config.validation_every=3", "--config.log_every=1"]


@pytest.fixture(scope="module")
def trained(folder):
    """What the training runs that do not depend on each other print."""
    changes = {"undisturbed": [], "again": ["--config.data_memory_budget_gb=0"], "digits": DIGITS}
    processes = {name: train(folder, name, *arguments) for name, arguments in changes.items()}
    return {name: finish(process)[0] for name, process in processes.items()}


@pytest.fixture(scope="module")
def undisturbed(folder, trained):
    assert f"run directory: {folder}/undisturbed" in trained["undisturbed"]
    return folder / "undisturbed"


# Same numbers --------------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(undisturbed):
    found = rows(undisturbed)
    assert [row["step"] for row in found] == list(range(20, 121, 20))
    assert found[-1]["val_loss"] < found[0]["val_loss"] - 0.5


def test_the_same_command_again_and_streaming_give_the_same_bits(folder, undisturbed):
    assert_same_run(folder / "again", undisturbed)
    assert rows(folder / "again") == rows(undisturbed)


def test_killed_at_any_moment_and_resumed(folder, undisturbed):
    run_dir = folder / "killed"
    moments = [
        lambda: (run_dir / "config.json").exists(),
        lambda: any((run_dir / "checkpoints").glob("*/*tmp*")),  # while a checkpoint is being written
    ]
    for reached in moments:
        process = train(folder, "killed")
        wait_until(reached, process)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(train(folder, "killed"))
    assert_same_run(run_dir, undisturbed)
    assert rows(run_dir) == rows(undisturbed)


def test_sigterm_saves_says_how_to_go_on_and_resuming_loses_nothing(folder, undisturbed):
    run_dir = folder / "terminated"
    process = train(folder, "terminated")
    wait_until(lambda: rows(run_dir), process)
    process.send_signal(signal.SIGTERM)
    message = finish(process, status=1)[1].splitlines()[-1]
    assert message.startswith("error: interrupted: saved at step ") and f"--run_dir={run_dir}" in message
    step = int(re.search(r"step (\d+)", message)[1])
    assert step < 120 and runs.latest_step(run_dir) == step
    assert f"training from step {step} to 120" in finish(train(folder, "terminated"))[0]
    assert_same_run(run_dir, undisturbed)


def test_two_processes_equal_two_devices(folder):
    common = ["--config.steps=20", "--config.validation_every=10"]
    several = ["--num_processes=2", f"--coordinator_address=localhost:{free_port()}"]
    processes = [train(folder, "processes", *common, *several, f"--process_id={i}") for i in range(2)]
    one = train(folder, "devices", *common, num_devices=2)
    (first, _), (second, err), (whole, _) = (finish(process) for process in (*processes, one))
    assert "2 cpu devices, global batch 32" in first and "global batch 32" in whole
    # Only the first process speaks and writes.
    assert "run directory: " in first and "run directory: " not in second and "0%" not in err
    assert len(list((folder / "processes" / "tb").iterdir())) == 1
    for found, expected in zip(rows(folder / "processes"), rows(folder / "devices"), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    found, expected = checkpoints(folder / "processes"), checkpoints(folder / "devices")
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    # Sums over devices are taken in another order; Adam enlarges that where gradients are almost zero.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), found, expected)


def together(folder, name, *differing):
    """Two processes of one run, each with its own arguments."""
    several = ["--config.steps=100000", "--num_processes=2", f"--coordinator_address=localhost:{free_port()}"]
    return [train(folder, name, *several, f"--process_id={i}", *own) for i, own in enumerate(differing)]


def test_processes_with_other_configs_end_with_one_line_each(folder):
    for process in together(folder, "unlike", [], ["--config.log_every=3"]):
        (line,) = [line for line in finish(process, status=1)[1].splitlines() if "[Gloo]" not in line]
        assert line.startswith("error: config.log_every is 10 in process 0, but 3 in process 1: ")
    assert not (folder / "unlike").exists()


def test_if_a_process_fails_it_says_why_and_the_other_ends(folder):
    other, failed = together(folder, "failed", [], ["--config.train_split=tost"])
    assert finish(failed, status=1)[1].startswith("error: dataset 'mixture' has no split 'tost'")
    other.communicate(timeout=100)
    assert other.returncode not in (0, None) and not (folder / "failed").exists()


@pytest.mark.parametrize("killed", [0, 1])
def test_if_a_process_is_killed_the_other_ends_and_the_same_commands_resume(folder, killed):
    run_dir = folder / f"deserted {killed}"
    pair = together(folder, run_dir.name, [], [])
    wait_until(lambda: rows(run_dir), pair[0])
    pair[killed].kill()
    pair[killed].communicate()
    _, err = pair[1 - killed].communicate(timeout=100)
    assert pair[1 - killed].returncode not in (0, None) and "Traceback" not in err
    step = runs.latest_step(run_dir)
    again = together(folder, run_dir.name, *[[f"--config.steps={step + 10}"]] * 2)
    printed = [finish(process)[0] for process in again]
    assert f"training from step {step} to {step + 10}" in printed[0]


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_evaluation_writes_its_results_and_the_exact_likelihood(undisturbed):
    uci.evaluate(undisturbed, num_instances=50, num_samples=8, num_trials=2, baselines=True, seed=4)
    metrics = json.loads((undisturbed / "uci_results" / "results.json").read_text())["metrics"]
    assert metrics.keys() >= {"nrmse", "nrmse_mean", "nrmse_knn", "nrmse_iterative", "ac_ll_nats", "ac_ll_exact_nats"}
    for name, metric in (("nrmse", "nrmse"), ("ac_lls", "ac_ll_nats")):
        array = np.load(undisturbed / "uci_results" / f"{name}.npy", allow_pickle=False)
        np.testing.assert_array_equal(array, metrics[metric]["trials"])

    x = data.load("mixture", "test").x[:50]
    for trial, found in enumerate(metrics["ac_ll_exact_nats"]["trials"]):
        key = jax.random.fold_in(jax.random.key(4), trial)
        mask_keys = [jax.random.split(jax.random.fold_in(key, i), 3)[0] for i in range(50)]
        b = np.stack([mask_generators.BernoulliMaskGenerator()(k, (1, 8))[0] for k in mask_keys])
        exact = data.mixture_log_prob(x, np.ones_like(x)) - data.mixture_log_prob(x, b)
        np.testing.assert_allclose(found, exact.mean(), rtol=1e-5)
        # The model knows less than the truth, and importance sampling errs low.
        assert metrics["ac_ll_nats"]["trials"][trial] < found


def tensorboard(run_dir):
    """Tag -> steps of the events that were written."""
    found = {}
    for path in sorted((run_dir / "tb").iterdir()):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_digits_from_training_to_pictures(folder, trained):
    run_dir = folder / "digits"
    assert "1 cpu device, global batch 16" in trained["digits"] and "training from step 0 to 6" in trained["digits"]
    events = tensorboard(run_dir)
    for name in ("loss", "elbo_nats", "kl_nats", "reconstruction_ll_nats", "matching_ll_nats"):
        assert events[f"train/{name}"] == [1, 2, 3, 4, 5, 6] and events[f"val/{name}"] == [3, 6]
    for name in ("gradient_norm", "learning_rate", "beta", "steps_per_second"):
        assert events[f"train/{name}"] == [1, 2, 3, 4, 5, 6]
    assert events["imputations"] == events["samples"] == [3, 6]

    masks = "UniformMaskGenerator:bounds=0.0,0.2"
    uci.evaluate(run_dir, mask_generator=masks, num_instances=9, num_samples=8, num_trials=2)
    results = json.loads((run_dir / "uci_results" / "results.json").read_text())
    assert results["flags"]["mask_generator"] == masks and "ac_ll_exact_nats" not in results["metrics"]
    picture = (run_dir / "uci_results" / "imputations.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 1000
