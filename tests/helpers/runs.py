"""Run directories: how they are read and compared, and what it means to be refused."""

import contextlib
import json
import pathlib

import numpy as np
import pytest
from flax import nnx

from posterior_matching import models, runs
from posterior_matching.errors import UserError
from posterior_matching.training.log import TrainingLog


def rows(run_dir):
    """The rows of `metrics.jsonl`, without what the clock says; none if there is no such file."""
    path = pathlib.Path(run_dir) / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in row.items() if key != "steps_per_second"} for row in found]


def weights(model):
    """The arrays by path of a model, or of the model of a run."""
    model = model if isinstance(model, nnx.Module) else runs.load_model(model)
    return {name: np.asarray(value) for name, value in models.flat_weights(model).items()}


def untrained_run(folder, name, model, **config):
    """The directory of a run on digits: a model with the config `model` and random weights, as after one step."""
    splits = {"train_split": "train", "validation_split": "validation"}
    config = {"dataset": "digits", **splits, "evaluate_checkpoint": "latest", "model": model} | config
    run = runs.open_run(str(folder / "run"), name, config, {"input_shape": [8, 8, 1]})
    run.create()
    state = models.flat_weights(models.build(name, model, (8, 8, 1), nnx.Rngs(0)))
    with run.finished_saving():
        run.save(1, state, {"step": np.int32(1)}, {}, best=False)
    return run.path


def assert_same_runs(found, expected):
    """Both checkpoints and all metrics of two runs are equal bit for bit."""
    assert rows(found) == rows(expected)
    for name in ("best", "latest"):
        assert runs.latest_step(found, name) == runs.latest_step(expected, name)
        ours, theirs = (weights(runs.load_model(run, checkpoint=name)) for run in (found, expected))
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            np.testing.assert_array_equal(value, theirs[key], err_msg=key)


@contextlib.contextmanager
def crash_after(step):
    """Training crashes there once `step` is done."""
    add = TrainingLog.add

    def crash(log, now, *rest):
        if now > step:
            raise ZeroDivisionError
        add(log, now, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(TrainingLog, "add", crash)
        yield


def contents(folder):
    """Everything under a folder: the bytes of files, False for folders."""
    folder = pathlib.Path(folder)
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in folder.rglob("*")}


def refusal(call, *args, **kwargs):
    """The one line with which a call is refused."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert message.strip() and "\n" not in message
    return message
