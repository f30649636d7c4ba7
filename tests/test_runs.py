"""Run directories: what they hold, resuming, refusing, loading."""

import json
import pickletools
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import train_pm_vae
from helpers.arrays import assert_same
from helpers.configs import small
from helpers.runs import contents, refusal, rows, weights
from posterior_matching import models, runs
from posterior_matching.config import plain
from posterior_matching.errors import UserError
from posterior_matching.training import loop

STEPS = 6


def make_config(**changes):
    """A PM-VAE of a few hundred parameters, as plain values."""
    return plain(small("pm_vae_mixture", **{"seed": 7, "log_every": 3, "evaluate_checkpoint": "latest"} | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that no test changes."""
    return train_pm_vae.train(make_config(), str(tmp_path_factory.mktemp("runs") / "finished"))


@pytest.fixture
def run_dir(finished, tmp_path):
    """A copy of the finished run, elsewhere."""
    return shutil.copytree(finished, tmp_path / "moved")


def describe(run_dir, **changes):
    """Changes the description of a run."""
    (run_dir / "config.json").write_text(json.dumps(runs.read_description(run_dir) | changes))


# Contents ------------------------------------------------------------------------------------------------------------


def test_config_json_says_everything(run_dir):
    description = json.loads((run_dir / "config.json").read_text())
    assert description["model"] == "pm_vae" and description["input_shape"] == [8]
    assert description["config"] == json.loads(json.dumps(make_config()))
    assert description["config"]["seed"] == 7 and description["num_devices"] == 4
    assert description["columns"] is None and description["fingerprint"] is None  # not the user's own table
    assert description["versions"]["jax"] == jax.__version__ and {"flax", "optax", "numpy"} <= set(
        description["versions"]
    )


def test_config_json_is_written_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.TrainingFeed, "get", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_pm_vae.train(make_config(), str(tmp_path / "run"))
    assert runs.read_description(tmp_path / "run", "pm_vae")["config"]["steps"] == STEPS


def test_the_logged_terms_fit_together(run_dir):
    """Here beta and the matching coefficient are 1."""
    found = rows(run_dir)
    assert [row["step"] for row in found] == [3, 6]
    for row in found:
        for part in ("train", "val"):
            elbo = row[f"{part}_reconstruction_ll_nats"] - row[f"{part}_kl_nats"]
            np.testing.assert_allclose(row[f"{part}_elbo_nats"], elbo, rtol=1e-4)
            np.testing.assert_allclose(row[f"{part}_loss"], -elbo - row[f"{part}_matching_ll_nats"], rtol=1e-4)


def test_nothing_in_a_run_is_a_pickle(run_dir):
    files = contents(run_dir)
    assert len(files) > 5
    for name, content in files.items():
        assert not name.endswith((".pkl", ".pickle"))
        if not content:
            continue
        assert b"numpy.core.multiarray" not in content and b"numpy._core.multiarray" not in content
        try:
            operations = [operation.name for operation, _, _ in pickletools.genops(content)]
        except Exception:
            continue  # no pickle
        assert operations[:1] != ["PROTO"], name


def test_parameters_txt_lists_all_parameters(run_dir):
    table = (run_dir / "parameters.txt").read_text()
    model = runs.load_model(run_dir)
    state = nnx.state(model, nnx.Param)
    assert all(name in table for name in models.flat_weights(model))
    assert f"{sum(leaf.size for leaf in jax.tree.leaves(state)):,}" in table


def test_the_default_run_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = runs.open_run(None, "pm_vae", make_config(dataset="some/where/wine.csv"), {"input_shape": [8]})
    assert run.path.parent == tmp_path / "runs" and run.path.name.startswith("pm_vae-wine-2")


# Resuming ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"optimizer__learning_rate": 0.5}, "config.optimizer.learning_rate: 0.001 -> 0.5"),
        ({"model__latent_dim": 3}, "config.model.latent_dim: 2 -> 3"),
        ({"seed": 8}, "config.seed: 7 -> 8"),
        ({"batch_size": 5}, "config.batch_size: 4 -> 5"),
        ({"ema_decay": 0.9}, "config.ema_decay: None -> 0.9"),
        ({"mask_generator": {"name": "UniformMaskGenerator"}}, "config.mask_generator.name"),
    ],
)
def test_resuming_with_another_config_is_refused(run_dir, changes, named):
    before = contents(run_dir)
    message = refusal(train_pm_vae.train, make_config(steps=12, **changes), str(run_dir))
    assert named in message and str(run_dir) in message and "--run_dir" in message
    assert "config.steps" not in message
    assert contents(run_dir) == before


def test_resuming_with_another_shape_model_or_device_count_is_refused(run_dir):
    message = refusal(runs.open_run, str(run_dir), "pm_vae", make_config(), {"input_shape": [9]})
    assert "input_shape: [8] -> [9]" in message
    message = refusal(runs.open_run, str(run_dir), "vqvae", make_config(), {"input_shape": [8]})
    assert "is a run of pm_vae, not of vqvae" in message
    describe(run_dir, num_devices=8)
    message = refusal(runs.open_run, str(run_dir), "pm_vae", make_config(), {"input_shape": [8]})
    assert "num_devices: 8 -> 4" in message


@pytest.mark.parametrize(
    "changes",
    [{"steps": 9}, {"log_every": 1}, {"validation_every": 2}, {"checkpoint_every": 2}, {"data_memory_budget_gb": 0.0}],
)
def test_resuming_accepts_what_changes_no_step(run_dir, changes):
    run = runs.open_run(str(run_dir), "pm_vae", make_config(**changes), {"input_shape": [8]})
    assert run.step == STEPS
    run.create()
    assert json.loads((run_dir / "config.json").read_text())["config"].items() >= changes.items()


def test_more_steps_continue_the_run_and_its_metrics(run_dir):
    metrics = run_dir / "metrics.jsonl"
    before = metrics.read_text()
    with open(metrics, "a") as file:  # what a killed process wrote after its last checkpoint
        file.write('{"step": 9, "val_loss": 1.0}\n{"step": 12, "val_lo')
    train_pm_vae.train(make_config(steps=12), str(run_dir))
    after = metrics.read_text()
    assert after.startswith(before)
    assert [json.loads(line)["step"] for line in after.splitlines()] == [3, 6, 9, 12]
    assert "train_loss" in json.loads(after.splitlines()[2])
    assert runs.open_run(str(run_dir), "pm_vae", make_config(), {"input_shape": [8]}).step == 12


def test_a_foreign_directory_is_refused_and_left_alone(tmp_path):
    foreign = tmp_path / "holiday"
    foreign.mkdir()
    (foreign / "photo.txt").write_text("sea")
    message = refusal(train_pm_vae.train, make_config(), str(foreign))
    assert str(foreign) in message and "choose another --run_dir" in message
    assert contents(foreign) == {"photo.txt": b"sea"}
    (tmp_path / "empty").mkdir()
    assert runs.open_run(str(tmp_path / "empty"), "pm_vae", make_config(), {"input_shape": [8]}).step == 0


PLACES = ["file/run", "file", "dangling", "loop", "n" * 300, "/".join(["n" * 200] * 25), "a\0b"]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place[:10])
def test_an_impossible_directory_is_refused_and_nothing_is_lost(place, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "at all")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    before = contents(tmp_path)
    refusal(train_pm_vae.train, make_config(), f"{tmp_path}/{place}")
    assert contents(tmp_path) == before


DAMAGED = ["", "{", "[]", "null", "{}", '"text"', '{"model": "pm_vae"}', "\x00\x01", '{"model": "pm_vae", "config": 3}']


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refusal(runs.load_model, tmp_path, "pm_vae")
    assert "config.json" in refusal(train_pm_vae.train, make_config(), str(tmp_path))
    assert contents(tmp_path) == {"config.json": text.encode()}


def checkpoint(run_dir, item):
    """The arrays by name of an item of the latest checkpoint."""
    path = run_dir / "checkpoints" / "latest" / str(STEPS) / item
    with ocp.StandardCheckpointer() as checkpointer:
        return {name: np.asarray(value) for name, value in checkpointer.restore(path).items()}


def test_the_arrays_of_a_checkpoint_have_names(run_dir):
    saved, model = checkpoint(run_dir, "train"), checkpoint(run_dir, "model")
    assert model.keys() == weights(run_dir).keys() and saved["state.step"] == STEPS and saved["best_loss"].shape == ()
    for name, value in model.items():  # without EMA, what is evaluated is what is trained
        np.testing.assert_array_equal(saved[f"state.trainable.{name}.value"], value)
    moments = {name.rpartition(".mu.")[2].removesuffix(".value") for name in saved if ".mu." in name}
    assert moments == model.keys() and sum(".opt_state." in name for name in saved) == 2 * len(model) + 1


def test_arrays_are_restored_by_name_not_by_position(tmp_path):
    run = runs.open_run(str(tmp_path / "run"), "pm_vae", make_config(), {"input_shape": [8]})
    run.create()
    with run.finished_saving():
        run.save(3, {"w": np.zeros(1)}, {"a": np.zeros(2), "b": np.ones(2)}, {"n": 1}, best=False)
    reordered = {"b": np.empty(2), "a": np.empty(2)}
    restored, record = run.restore(lambda _: reordered)
    assert_same(restored, {"b": np.ones(2), "a": np.zeros(2)})
    assert record == {"n": 1}
    message = refusal(run.restore, lambda _: {"a": np.empty(2), "c": np.empty(2)})
    assert "does not fit its config.json: b: absent -> (2,); c: (2,) -> absent" in message


def test_no_thread_waits_for_a_checkpoint_whose_folder_cannot_be_made(tmp_path):
    run = runs.open_run(str(tmp_path / "run"), "pm_vae", make_config(), {"input_shape": [8]})
    run.create()
    latest = tmp_path / "run" / "checkpoints" / "latest"
    shutil.rmtree(latest)
    latest.write_text("a file")
    with pytest.raises(UserError, match="cannot write"), run.finished_saving():
        run.save(3, {"w": np.zeros(1)}, {"a": np.zeros(2)}, {}, best=False)
    waiting = {"json_ch_save", "np_type_handler", "write_metadata_after_commits"}
    assert not waiting & {thread.name for thread in threading.enumerate()}


# Loading -------------------------------------------------------------------------------------------------------------


def test_a_moved_run_loads(finished, run_dir):
    model = runs.load_model(run_dir, "pm_vae")
    expected = weights(finished)
    assert_same(weights(model), expected)
    imputed = model.impute(np.zeros((2, 8), np.float32), np.ones((2, 8), np.float32), 3, key=jax.random.key(0))
    assert imputed.shape == (3, 2, 8)


def test_best_and_latest(run_dir):
    run = runs.open_run(str(run_dir), "pm_vae", make_config(), {"input_shape": [8]})
    before = weights(run_dir)
    run.create()
    with run.finished_saving():
        run.save(100, {k: v + 1 for k, v in before.items()}, {"any": np.ones(1)}, {}, best=False)
    for chosen, shift in ((None, 1), ("latest", 1), ("best", 0)):  # this config evaluates the latest
        loaded = weights(runs.load_model(run_dir, "pm_vae", chosen))
        assert_same(loaded, {k: v + shift for k, v in before.items()})
    describe(run_dir, config=runs.read_description(run_dir)["config"] | {"evaluate_checkpoint": "best"})
    assert_same(weights(run_dir), before)


def test_missing_runs_and_checkpoints(run_dir, tmp_path):
    assert "nowhere does not exist" in refusal(runs.load_model, tmp_path / "nowhere")
    assert "is not a run directory" in refusal(runs.load_model, tmp_path)
    assert "unknown checkpoint 'last'" in refusal(runs.load_model, run_dir, checkpoint="last")
    for step in (run_dir / "checkpoints" / "latest").iterdir():
        shutil.rmtree(step)
    assert "holds no latest checkpoint" in refusal(runs.load_model, run_dir, checkpoint="latest")
    shutil.rmtree(run_dir / "checkpoints")
    assert "holds no best checkpoint" in refusal(runs.load_model, run_dir, checkpoint="best")
    assert not (run_dir / "checkpoints").exists()  # reading makes no directories


def test_a_run_of_another_model(run_dir):
    describe(run_dir, model="vqvae")
    message = refusal(runs.load_model, run_dir, "pm_vae")
    assert "is a run of vqvae, not of pm_vae" in message
    describe(run_dir, model="of_tomorrow")
    assert "unknown model 'of_tomorrow'" in refusal(runs.load_model, run_dir)


def test_a_config_that_does_not_fit_the_checkpoint(run_dir):
    config = runs.read_description(run_dir)["config"]
    describe(run_dir, config=config | {"model": config["model"] | {"latent_dim": 3}})
    message = refusal(runs.load_model, run_dir)
    assert "latest checkpoint" in message and "does not fit its config.json" in message
    assert len(message) < 500  # not the whole model
    describe(run_dir, config=config, input_shape=[9])
    assert "does not fit its config.json" in refusal(runs.load_model, run_dir)
    describe(run_dir, config=config | {"model": config["model"] | {"laten_dim": 3}}, input_shape=[8])
    assert "config.model.laten_dim" in refusal(runs.load_model, run_dir)


# Damage --------------------------------------------------------------------------------------------------------------


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def files_of(run_dir, item):
    """The files of an item of the latest checkpoint, the largest first."""
    files = (run_dir / "checkpoints" / "latest" / str(STEPS) / item).rglob("*")
    return sorted((path for path in files if path.is_file()), key=lambda path: -path.stat().st_size)


def test_flipped_bytes_never_load_as_other_weights(run_dir):
    before, refused = weights(run_dir), 0
    for path in files_of(run_dir, "model"):
        size = path.stat().st_size
        for position in np.random.default_rng(0).integers(size, size=min(size, 3)):
            flip(path, position)
            try:
                assert_same(weights(run_dir), before)
            except UserError as error:
                assert "\n" not in str(error) and "latest checkpoint" in str(error)
                refused += 1
            flip(path, position)
    assert refused > 3
    assert_same(weights(run_dir), before)


def cut(path):
    path.write_bytes(path.read_bytes()[:10])


@pytest.mark.parametrize("damage", [cut, lambda path: flip(path, path.stat().st_size // 2), lambda path: path.unlink()])
@pytest.mark.parametrize("item", ["model", "train", "record"])
def test_a_damaged_latest_checkpoint_is_named_and_training_goes_on_from_the_one_before(run_dir, item, damage, caplog):
    assert [runs.latest_step(run_dir, name) for name in ("latest", "best")] == [6, 6]
    assert sorted(int(p.name) for p in (run_dir / "checkpoints" / "latest").iterdir()) == [3, 6]
    undisturbed = weights(run_dir)
    for path in files_of(run_dir, item):
        damage(path)
    if item == "model":
        assert "latest checkpoint" in refusal(runs.load_model, run_dir, checkpoint="latest")
        return  # resuming reads what trains
    train_pm_vae.train(make_config(), str(run_dir))
    assert f"{run_dir}/checkpoints/latest/6 is damaged" in caplog.text and "going on with that of step 3" in caplog.text
    assert_same(weights(run_dir), undisturbed)
    assert [row["step"] for row in rows(run_dir)] == [3, 6]


def test_a_linked_checkpoint_is_read_but_not_resumed(run_dir, tmp_path):
    before, path = weights(run_dir), run_dir / "checkpoints" / "latest" / str(STEPS)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert_same(weights(run_dir), before)
    message = refusal(train_pm_vae.train, make_config(steps=12), str(run_dir))
    assert f"latest/{STEPS} is a symbolic link" in message


def test_damaged_metrics_do_not_stop_a_resume(run_dir):
    with open(run_dir / "metrics.jsonl", "a", encoding="latin-1") as file:
        file.write("\n".join(["", "{", "7", '{"val_loss": 1.0}', '{"step": "six"}', "\x00\xff", "[]", '{"step":']))
    train_pm_vae.train(make_config(steps=9), str(run_dir))
    assert [row["step"] for row in rows(run_dir)] == [3, 6, 9]


def test_a_run_whose_latest_checkpoint_is_gone_is_refused_not_begun_again(run_dir):
    shutil.rmtree(run_dir / "checkpoints" / "latest")
    before = contents(run_dir)
    message = refusal(train_pm_vae.train, make_config(), str(run_dir))
    assert "its latest checkpoint is gone: put checkpoints/latest back, or choose another --run_dir" in message
    assert contents(run_dir) == before


@pytest.mark.process
def test_two_processes_do_not_train_the_same_run(tmp_path):
    holder = "import filelock, sys; lock = filelock.FileLock(sys.argv[1] + '/.lock'); lock.acquire(); "
    holder += "print('holds', flush=True); sys.stdin.read()"
    run_dir = tmp_path / "run"
    train_pm_vae.train(make_config(steps=3), str(run_dir))
    before = contents(run_dir)
    arguments = [sys.executable, "-c", holder, str(run_dir)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        with pytest.raises(UserError, match=f"{run_dir} is being trained by another process: wait for it or choose"):
            train_pm_vae.train(make_config(), str(run_dir))
        assert contents(run_dir) == before
        process.kill()
    train_pm_vae.train(make_config(), str(run_dir))
    assert runs.latest_step(run_dir) == STEPS
