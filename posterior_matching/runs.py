"""Run directories: what they hold, how they are made, resumed and loaded. The one home of the checkpoint format.

config.json     model, config, input shape, standardisation, versions; written before the first step
checkpoints/    latest/ and best/ (lowest validation loss), one Orbax checkpoint each, of two items (best/: only model):
                  model   weights ready for use (EMA where the config has EMA), a flat dict of arrays by path;
                          not there while the run is pretraining
                  train   everything else that continuing needs
tb/             TensorBoard events
metrics.jsonl   one JSON object per validation
parameters.txt  names, shapes and sizes of all parameters
"""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import weakref
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from posterior_matching import atomic, models, parallel
from posterior_matching.config import flatten, naming, plain
from posterior_matching.data import Standardisation
from posterior_matching.errors import UserError, nearest

Tree = TypeVar("Tree")

# A resumed run may differ in these: they change how long and how a run is watched, not what a step computes.
_FREE_ON_RESUME = ("steps", "log_every", "validation_every", "checkpoint_every", "data_memory_budget_gb")


class Run:
    """One training run on disk.

    Attributes:
        path: The run directory.
        step: Step of the latest checkpoint, 0 if there is none.
    """

    def __init__(self, path: pathlib.Path, description: dict[str, Any]):
        self.path = path
        self.step = latest_step(path)
        self._description = description

    def create(self) -> None:
        """Makes the directory and writes `config.json`; to be called before anything is saved.

        Raises:
            UserError: Another process is training this run.
        """
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            for name in ("latest", "best"):
                (self.path / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
            atomic.write_text(self.path / "config.json", json.dumps(self._description, indent=2) + "\n")
        parallel.wait_for_all_processes()
        self._managers = {name: _manager(self.path, name) for name in ("latest", "best")}
        for step in self._managers["best"].all_steps():
            if step > self.step:  # of a run killed before its latest checkpoint was written: it comes there again
                self._managers["best"].delete(step)

    def _lock(self) -> None:
        folder = os.open(self.path, os.O_RDONLY)
        self._unlock = weakref.finalize(self, os.close, folder)  # the lock goes with the file descriptor
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path} is being trained by another process: wait for it or choose another --run_dir"
            ) from None
        except OSError:
            pass  # a file system without locks

    def save(self, step: int, model: dict[str, np.ndarray] | None, train: Any, best: bool) -> None:
        """Writes a checkpoint in the background; the previous one is deleted once the new one is complete.

        Args:
            step: The step.
            model: Weights ready for use, `flat_weights`; None: there are none yet, the run is pretraining.
            train: A pytree of everything else that resuming needs.
            best: Whether this is the best checkpoint, too.
        """
        weights = {} if model is None else {"model": ocp.args.StandardSave(model)}
        if best:  # on disk before the latest one, which records the loss to beat, begins
            self._managers["best"].save(step, args=ocp.args.Composite(**weights), force=True)
            self._managers["best"].wait_until_finished()
        everything = ocp.args.Composite(**weights, train=ocp.args.StandardSave(_named_leaves(train)))
        self._managers["latest"].save(step, args=everything, force=True)
        self.step = step

    def restore(self, train: Tree) -> Tree:
        """Returns what `save` was given as `train` at the latest checkpoint.

        Args:
            train: A pytree of the same structure, shapes and dtypes.

        Raises:
            UserError: The checkpoint holds other arrays.
        """
        target = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in _named_leaves(train).items()}
        manager = self._managers["latest"]
        saved = manager.item_metadata(self.step)["train"]
        if "leaves" in saved:
            raise UserError(
                f"{self.path} was trained by version 0.1, whose training state cannot be resumed: its model can still "
                "be evaluated; to train on, choose another --run_dir"
            )
        shapes = ({name: tuple(a.shape) for name, a in arrays.items()} for arrays in (target, saved))
        if problem := _difference(*shapes):
            raise UserError(f"the latest checkpoint of {self.path} does not fit its config.json: {problem}")
        restored = manager.restore(self.step, args=ocp.args.Composite(train=ocp.args.StandardRestore(target)))["train"]
        return jax.tree.unflatten(jax.tree.structure(train), [np.asarray(restored[name]) for name in target])

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends one JSON object to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drops rows that a killed process wrote after its last checkpoint: they will be written again."""
        path = self.path / "metrics.jsonl"
        if path.exists() and jax.process_index() == 0:
            rows = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            atomic.write_text(path, "".join(row + "\n" for row in rows))

    @contextlib.contextmanager
    def finished_saving(self) -> Iterator[None]:
        """On leaving, however, waits until everything saved is on disk; then other processes may go on with the run."""
        try:
            yield
        finally:
            for manager in self._managers.values():
                manager.wait_until_finished()
            if jax.process_index() == 0:
                self._unlock()


def open_run(
    run_dir: str | None,
    model: str,
    config: Mapping[str, Any],
    input_shape: tuple[int, ...],
    standardisation: Standardisation | None = None,
) -> Run:
    """Opens a run directory, new or holding this run already; nothing is written before `Run.create`.

    Args:
        run_dir: The directory; None: `runs/<model>-<dataset>-<timestamp>`.
        model: Key of `models.MODELS`.
        config: The resolved config, with `dataset`.
        input_shape: Shape of one example.
        standardisation: Of the user's own data.

    Raises:
        UserError: The directory holds a run of another model or config, or something that is no run.
    """
    config = json.loads(json.dumps(config))  # as it will be read back: lists for tuples
    if run_dir is None:
        dataset = pathlib.Path(config["dataset"]).stem
        run_dir = f"runs/{model}-{dataset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path = pathlib.Path(run_dir).absolute()
    description = {
        "model": model,
        "config": config,
        "input_shape": list(input_shape),
        "standardisation": standardisation and standardisation.to_json(),
        "num_devices": jax.device_count(),
        "versions": versions(),
    }
    if (path / "config.json").exists():
        _check_same_run(path, read_description(path), description)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{run_dir} exists and is not a run directory: choose another --run_dir")
    return Run(path, description)


def latest_step(run_dir: str | os.PathLike, checkpoint: str = "latest") -> int:
    """Returns the step of a run's checkpoint, "latest" or "best"; 0 if there is none, or no such directory."""
    saved = (pathlib.Path(run_dir) / "checkpoints" / checkpoint).glob("*")
    return max((int(path.name) for path in saved if path.name.isdigit()), default=0)


def read_description(run_dir: str | os.PathLike, model: str | None = None) -> dict[str, Any]:
    """Returns `config.json` of a run.

    Args:
        run_dir: The run directory.
        model: The model it must be of (key of `models.MODELS`); None: any.

    Raises:
        UserError: No such directory, not a run directory, or a run of another model.
    """
    path = pathlib.Path(run_dir)
    if not path.is_dir():
        raise UserError(f"run directory {run_dir} does not exist")
    try:
        description = json.loads((path / "config.json").read_text())
        found, config = description["model"], description["config"]
        whole = {"dataset", "model", "evaluate_checkpoint"} <= config.keys() and {"input_shape"} <= description.keys()
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run directory: it has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path / 'config.json'} is damaged: it does not describe a run")
    if model is not None and found != model:
        raise UserError(f"{run_dir} is a run of {found}, not of {model}: pass the directory of a {model} run")
    if found not in models.MODELS:
        raise UserError(f"{run_dir} is a run of an unknown model '{found}': {nearest(str(found), models.MODELS)}")
    return description


def load_model(run_dir: str | os.PathLike, model: str | None = None, checkpoint: str | None = None) -> nnx.Module:
    """Returns the trained model of a run, ready to call.

    Args:
        run_dir: The run directory.
        model: The model it must be of (key of `models.MODELS`); None: any.
        checkpoint: "best" (lowest validation loss) or "latest"; None: what the run's `config.evaluate_checkpoint` says.

    Raises:
        UserError: As `read_description`; or there is no such checkpoint, or it does not fit the run's config.
    """
    description = read_description(run_dir, model)
    name = checkpoint or description["config"]["evaluate_checkpoint"]
    if name not in ("best", "latest"):
        raise UserError(f"unknown checkpoint '{name}': 'best' or 'latest'")
    step = latest_step(run_dir, name)
    if not step:
        raise UserError(f"{run_dir} holds no {name} checkpoint yet: train it longer (config.validation_every)")

    manager = _manager(pathlib.Path(run_dir).absolute(), name)
    if not (manager.directory / str(step) / "model").exists():
        raise UserError(f"{run_dir} is still pretraining, at step {step}: train it longer")

    def build() -> nnx.Module:
        shape = tuple(description["input_shape"])
        return models.build(description["model"], plain(description["config"]["model"]), shape, nnx.Rngs(0))

    with naming("config"):
        abstract = nnx.eval_shape(build)
    graphdef, state = nnx.split(abstract)
    target = flat_weights(state)
    shapes = {key: tuple(value.shape) for key, value in target.items()}
    try:
        saved = {key: tuple(value.shape) for key, value in manager.item_metadata(step)["model"].items()}
        if not (problem := _difference(shapes, saved)):
            arguments = ocp.args.Composite(model=ocp.args.StandardRestore(target))
            restored = manager.restore(step, args=arguments)["model"]
    except Exception as error:  # whatever Orbax raises for missing and cut files
        raise UserError(
            f"the {name} checkpoint of {run_dir} is damaged ({type(error).__name__}): try the other one"
        ) from error
    if problem:
        raise UserError(f"the {name} checkpoint of {run_dir} does not fit its config.json: {problem}")
    return nnx.merge(graphdef, unflatten_weights(state, {k: np.asarray(v) for k, v in restored.items()}))


def flat_weights(state: nnx.State) -> dict[str, Any]:
    """Flattens a model state to arrays by path: `{"vae.encoder.linear_in.kernel": [d, h], ...}`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}


def unflatten_weights(state: nnx.State, weights: Mapping[str, Any]) -> nnx.State:
    """Returns `state` with the arrays of `flat_weights` put back."""
    flat = [
        (path, leaf.replace(jax.numpy.asarray(weights[".".join(map(str, path))])))
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.from_flat_state(flat)


def _named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Flattens a pytree of arrays to arrays by path: `{"trainable.vae.encoder.linear_in.kernel": [d, h], ...}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def versions() -> dict[str, str]:
    """Versions of what numbers depend on."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpyro", "numpy")}


def _manager(path: pathlib.Path, name: str) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=1, create=False)
    handlers = {item: ocp.StandardCheckpointHandler() for item in ("model", "train")}
    return ocp.CheckpointManager(path / "checkpoints" / name, options=options, item_handlers=handlers)


def _check_same_run(path: pathlib.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved["model"] != now["model"]:
        raise UserError(f"{path} is a run of {saved['model']}, not of {now['model']}: choose another --run_dir")
    before, after = (
        flatten({"config": run["config"]}) | {key: run[key] for key in ("input_shape", "num_devices")}
        for run in (saved, now)
    )
    free = {f"config.{key}" for key in _FREE_ON_RESUME}
    if problem := _difference(*({k: v for k, v in c.items() if k not in free} for c in (before, after))):
        raise UserError(f"{path} holds a run that differs ({problem}): use its values, or choose another --run_dir")


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """Names what differs between two flat dicts, in one line; empty if nothing does."""
    missing = object()
    parts = []
    for key in sorted(expected.keys() | found.keys()):
        old, new = expected.get(key, missing), found.get(key, missing)
        if old != new:
            parts.append(f"{key}: {'absent' if old is missing else old} -> {'absent' if new is missing else new}")
    return "; ".join(parts)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut short by a kill
        return float("inf")
