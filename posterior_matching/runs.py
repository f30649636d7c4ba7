"""Run directories: their contents, and how they are created, resumed and loaded. Defines the checkpoint format.

config.json     model, config, input shape, columns, versions; written before the first step
checkpoints/    latest/ (the last two) and best/ (lowest validation loss): Orbax checkpoints, named by step, of items
                  model   weights ready for use (EMA if the config has it), a flat dict of arrays by path;
                          absent while the run is pretraining
                  train   everything else needed to resume, arrays by path (latest/ only)
                  record  JSON: checksums of all arrays, and metrics not logged yet
tb/             TensorBoard events
metrics.jsonl   one JSON object per validation
parameters.txt  names, shapes and sizes of all parameters
"""

import contextlib
import datetime
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from posterior_matching import atomic, models, parallel
from posterior_matching.config import flatten, naming, plain
from posterior_matching.errors import OptionError, UserError, nearest

# A resumed run may differ in these: they change the length of a run and how it is monitored, not what a step computes.
_FREE_ON_RESUME = ("steps", "patience", "log_every", "validation_every", "checkpoint_every", "data_memory_budget_gb")

_KEPT = {"latest": 2, "best": 1}  # the second latest, in case the latest is damaged
_PATIENCE_SECONDS = 10.0  # for how long to retry when a run in progress replaces the checkpoint


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
        self._lock = filelock.FileLock(path / ".lock")
        self._managers: dict[str, ocp.CheckpointManager] = {}

    def create(self) -> None:
        """Creates the directory and writes `config.json`; call this before saving anything.

        Raises:
            UserError: Another process has trained this run since it was opened; or the directory cannot be written.
        """
        if jax.process_index() == 0:
            with atomic.writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._acquire_lock()
                self._check_checkpoints()
                for name in _KEPT:
                    (self.path / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
                atomic.write_text(self.path / "config.json", json.dumps(self._description, indent=2) + "\n")
        parallel.wait_for_all_processes()
        self._managers = {name: _manager(self.path, name) for name in _KEPT}
        self._forget_later_best()

    def _check_checkpoints(self) -> None:
        """Refuses or sets aside the checkpoints with which Orbax would stop."""
        for path in self.path.glob("checkpoints/*/*/_CHECKPOINT_METADATA"):
            if path.parent.is_symlink():  # which Orbax cannot delete when a later checkpoint replaces it
                raise UserError(f"{path.parent} is a symbolic link: put the checkpoint itself in its place")
            try:
                dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:  # Orbax would not list the others either
                self._set_aside(path.parent, error)
        if self.step and not latest_step(self.path):
            raise UserError(f"{self.path} holds no intact checkpoint: choose another --run_dir or delete it")
        self.step = latest_step(self.path)

    def _set_aside(self, folder: pathlib.Path, error: Exception) -> None:
        """Moves a damaged checkpoint out of the way, with a warning."""
        if jax.process_count() > 1:
            raise UserError(f"the checkpoint {folder} is damaged ({_reason(error)}): delete it") from error
        shutil.move(folder, folder.parents[1] / f"damaged-{folder.parent.name}-{folder.name}")
        older = latest_step(self.path, folder.parent.name)
        remains = f"going on with that of step {older}" if older else "there is no older one"
        logging.warning("the checkpoint %s is damaged (%s): %s", folder, _reason(error), remains)

    def _forget_later_best(self) -> None:
        """Deletes a best checkpoint beyond the latest one: a run that was killed or damaged will get there again."""
        for step in [step for step in self._managers["best"].all_steps() if step > self.step]:
            self._managers["best"].delete(step)

    def _acquire_lock(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"{self.path} is being trained by another process: wait for it or choose another --run_dir"
            ) from None
        except NotImplementedError:  # a file system without locks
            pass
        if latest_step(self.path) != self.step:
            raise UserError(f"{self.path} has just been trained by another process: start again to resume it")

    def save(
        self, step: int, model: dict[str, np.ndarray] | None, train: Any, record: Mapping[str, Any], best: bool
    ) -> None:
        """Writes a checkpoint in the background; older ones are deleted once it is complete.

        Args:
            step: The step.
            model: Weights ready for use, `models.flat_weights`; None: the run is pretraining.
            train: A pytree of everything else needed to resume.
            record: JSON values needed to resume.
            best: Whether this is also the best checkpoint.

        Raises:
            UserError: This checkpoint, or the one before it, cannot be written.
        """
        with atomic.writing(self.path):
            weights = {} if model is None else {"model": model}
            if best:  # on disk before the latest one, which records the loss to beat, is begun
                self._managers["best"].save(step, args=_arguments(weights, {}), force=True)
                self._managers["best"].wait_until_finished()
            arguments = _arguments(weights | {"train": _named_leaves(train)}, record)
            self._managers["latest"].save(step, args=arguments, force=True)
        self.step = step

    def restore(self, structure: Callable[[int], Any]) -> tuple[Any, dict[str, Any]]:
        """Returns `train` and `record` of the latest intact checkpoint; damaged ones are set aside with a warning.

        Args:
            structure: Maps a step to a pytree with the structure, shapes and dtypes of `train` at that step.

        Raises:
            UserError: No checkpoint is intact, or its arrays do not match.
        """
        while self.step:
            folder = self.path / "checkpoints" / "latest" / str(self.step)
            try:
                train = structure(self.step)
                arrays = _restore(folder, "train", _named_leaves(train))
                return jax.tree.unflatten(jax.tree.structure(train), arrays.values()), _record(folder)["record"]
            except UserError:
                raise
            except _DoesNotFitError as error:
                raise UserError(f"the latest checkpoint of {self.path} does not fit its config.json: {error}") from None
            except Exception as error:  # whatever Orbax raises for missing and truncated files
                self._set_aside(folder, error)
                self._managers["latest"].reload()
                self.step = latest_step(self.path)
                self._forget_later_best()
        raise UserError(f"{self.path} holds no intact checkpoint: choose another --run_dir or delete it")

    @contextlib.contextmanager
    def finished_saving(self) -> Iterator[None]:
        """When the block ends, waits until everything is on disk, then lets other processes resume the run."""
        try:
            with atomic.writing(self.path):
                yield
        finally:
            with atomic.writing(self.path):
                for manager in self._managers.values():
                    manager.wait_until_finished()
            self._lock.release()


def open_run(run_dir: str | None, model: str, config: Mapping[str, Any], data: Mapping[str, Any]) -> Run:
    """Opens a run directory, either new or already holding this run; nothing is written before `Run.create`.

    Args:
        run_dir: The directory; None: `runs/<model>-<dataset>-<timestamp>`.
        model: Key of `models.MODELS`.
        config: The resolved config, with `dataset`.
        data: What to keep of the data, with `input_shape`; see `data.Source.to_json`.

    Raises:
        UserError: The directory holds a run of another model or config, a run without its checkpoints, or something
            other than a run.
    """
    config = json.loads(json.dumps(config))  # as it will be read back: lists for tuples
    if run_dir is None:
        dataset = pathlib.Path(config["dataset"]).stem
        run_dir = f"runs/{model}-{dataset}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    path = pathlib.Path(run_dir).absolute()
    description = {"model": model, "config": config, **data}
    description |= {"num_devices": jax.device_count(), "versions": versions()}
    with atomic.writing(path):
        if (path / "config.json").exists():
            _check_same_run(path, read_description(path), description)
            unfinished = any((path / "checkpoints" / "latest").glob("*"))  # of a run stopped while writing its first
            if latest_step(path, "best") and not latest_step(path) and not unfinished:
                raise UserError(
                    f"{run_dir} has been trained, but its latest checkpoint is gone: put checkpoints/latest back, or "
                    "choose another --run_dir"
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{run_dir} exists and is not a run directory: choose another --run_dir")
    return Run(path, description)


def latest_step(run_dir: str | os.PathLike[str], checkpoint: str = "latest") -> int:
    """Returns the step of a run's checkpoint, "latest" or "best"; 0 if there is none, or no such directory."""
    with atomic.reading(run_dir):
        saved = (pathlib.Path(run_dir) / "checkpoints" / checkpoint).glob("*")
        return max((int(path.name) for path in saved if path.name.isdigit()), default=0)


def read_description(run_dir: str | os.PathLike[str], model: str | None = None) -> dict[str, Any]:
    """Returns `config.json` of a run of `model`, a key of `models.MODELS`; None: of any model.

    Raises:
        UserError: It does not exist, is not a run directory, or holds a run of another model.
    """
    path = pathlib.Path(run_dir)
    with atomic.reading(run_dir):
        if not path.is_dir():
            raise UserError(f"run directory {run_dir} does not exist")
    try:
        description = json.loads((path / "config.json").read_text(encoding="utf-8"))
        found, config, shape = description["model"], description["config"], description["input_shape"]
        damaged = (
            not {"dataset", "model", "evaluate_checkpoint"} <= config.keys()
            or not isinstance(found, str)
            or not all(isinstance(size, int) and 0 < size < 1_000_000 for size in shape)
            or config["evaluate_checkpoint"] not in ("best", "latest")
        )
    except FileNotFoundError:
        raise UserError(f"{run_dir} is not a run directory: it has no config.json") from None
    except (ValueError, KeyError, TypeError, AttributeError, IsADirectoryError):
        damaged = True
    if damaged:
        raise UserError(f"{path / 'config.json'} is damaged: it does not describe a run")
    if model is not None and found != model:
        raise UserError(f"{run_dir} is a run of {found}, not of {model}: pass the directory of a {model} run")
    if found not in models.MODELS:
        raise UserError(f"{run_dir} is a run of an unknown model '{found}': {nearest(found, models.MODELS)}")
    return description


def load_model(run_dir: str | os.PathLike[str], model: str | None = None, checkpoint: str | None = None) -> Any:
    """Returns the trained model of a run, ready to call. The run may still be training.

    Args:
        run_dir: The run directory.
        model: See `read_description`.
        checkpoint: "best" (lowest validation loss) or "latest"; None: `config.evaluate_checkpoint`.

    Raises:
        UserError: See `read_description`; or the checkpoint is missing, damaged, or does not match the run's config.
    """
    description = read_description(run_dir, model)
    name = checkpoint or description["config"]["evaluate_checkpoint"]
    if name not in _KEPT:
        raise UserError(f"unknown checkpoint '{name}': 'best' or 'latest'")

    try:
        with naming("config"):
            abstract = abstract_model(description)
    except OptionError as error:
        raise UserError(f"{pathlib.Path(run_dir) / 'config.json'} is damaged: {error}") from None
    try:
        weights = _read_weights(pathlib.Path(run_dir).absolute(), name, models.flat_weights(abstract))
    except _DoesNotFitError as error:
        raise UserError(f"the {name} checkpoint of {run_dir} does not fit its config.json: {error}") from None
    return models.with_weights(abstract, weights)


def abstract_model(description: Mapping[str, Any]) -> nnx.Module:
    """Returns the model that a `config.json` describes, with shapes for weights; raises OptionError if it cannot."""
    shape, options = tuple(description["input_shape"]), plain(description["config"]["model"])
    return nnx.eval_shape(lambda: models.build(description["model"], options, shape, nnx.Rngs(0)))


def _read_weights(path: pathlib.Path, name: str, target: dict[str, Any]) -> dict[str, np.ndarray]:
    """Reads a checkpoint's model; tries again if a run in progress has replaced the checkpoint."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        step = latest_step(path, name)
        if not step:
            raise UserError(f"{path} holds no {name} checkpoint yet: train it longer (config.validation_every)")
        folder = path / "checkpoints" / name / str(step)
        try:
            if not (folder / "model").exists() and latest_step(path, name) == step:
                raise UserError(f"{path} is still pretraining, at step {step}: train it longer")
            return _restore(folder, "model", target)
        except (UserError, _DoesNotFitError):
            raise
        except Exception as error:  # whatever Orbax raises for missing and truncated files
            if latest_step(path, name) == step or time.monotonic() > deadline:
                other = "latest" if name == "best" else "best"
                raise UserError(
                    f"the {name} checkpoint of {path}, step {step}, is damaged ({_reason(error)}): try the {other} "
                    "one, or resume the run, which falls back to the previous checkpoint"
                ) from error


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpyro", "numpy")}


# Checkpoints ---------------------------------------------------------------------------------------------------------


class _DoesNotFitError(Exception):
    """The arrays of a checkpoint do not match those asked for."""


def _manager(path: pathlib.Path, name: str) -> ocp.CheckpointManager:
    _silence_orbax()
    # If a folder cannot be made in the background, Orbax's threads wait 300 s for it, and so does the process's end.
    foreground = ocp.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT[name], create=False, async_options=foreground)
    handlers = {item: ocp.StandardCheckpointHandler() for item in ("model", "train")}
    handlers |= {"record": ocp.JsonCheckpointHandler()}
    return ocp.CheckpointManager(path / "checkpoints" / name, options=options, item_handlers=handlers)


def _arguments(items: dict[str, dict[str, np.ndarray]], record: Mapping[str, Any]) -> ocp.args.Composite:
    checksums = {item: {name: _checksum(a) for name, a in arrays.items()} for item, arrays in items.items()}
    return ocp.args.Composite(
        **{item: ocp.args.StandardSave(arrays) for item, arrays in items.items()},
        record=ocp.args.JsonSave({"checksums": checksums, "record": dict(record)}),
    )


def _restore(folder: pathlib.Path, item: str, target: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the arrays of a checkpoint's item, in the order of `target`, after comparing shapes and checksums."""
    _silence_orbax()
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in target.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(folder / item)
        if not metadata.item_metadata:
            raise ValueError(f"{item} is gone")
        shapes, saved = ({k: tuple(a.shape) for k, a in arrays.items()} for arrays in (target, metadata.item_metadata))
        if problem := _difference(shapes, saved):
            raise _DoesNotFitError(problem)
        restored = checkpointer.restore(folder / item, abstract)
    arrays = {name: np.asarray(restored[name]) for name in target}
    checksums = _record(folder)["checksums"][item]
    if wrong := [name for name, array in arrays.items() if checksums[name] != _checksum(array)]:
        raise ValueError(f"wrong checksum of {wrong[0]}")
    return arrays


def _record(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "record" / "metadata").read_text(encoding="utf-8"))


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")


def _named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Flattens a pytree of arrays to arrays by path: `{"trainable.vae.encoder.linear_in.kernel": [d, h], ...}`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


def _reason(error: Exception) -> str:
    """Describes what is wrong with a damaged checkpoint, in a few words."""
    return str(error).partition("\n")[0][:80] if isinstance(error, ValueError) else type(error).__name__


@functools.cache
def _silence_orbax() -> None:
    """Suppresses the stack traces that Orbax's threads print for errors that it also raises."""
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):  # a read or write in progress when another failed
            report(unraisable)

    sys.unraisablehook = report_others
    logging.getLogger("asyncio").addFilter(lambda record: "exception was never retrieved" not in record.getMessage())
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


# Descriptions --------------------------------------------------------------------------------------------------------


def _check_same_run(path: pathlib.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved["model"] != now["model"]:
        raise UserError(f"{path} is a run of {saved['model']}, not of {now['model']}: choose another --run_dir")
    keys, free = ("config", "input_shape", "num_devices"), {f"config.{key}" for key in _FREE_ON_RESUME}
    flat = (flatten({key: run.get(key) for key in keys}) for run in (saved, now))
    if problem := _difference(*({k: v for k, v in run.items() if k not in free} for run in flat)):
        raise UserError(f"{path} holds a run that differs ({problem}): use its values, or choose another --run_dir")


def _difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Lists the differences between two flat dicts in one line; empty if there are none."""
    keys = sorted(expected.keys() | found.keys())
    pairs = [(key, expected.get(key, "absent"), found.get(key, "absent")) for key in keys]
    parts = [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]
    return "; ".join(parts[:5] + ([f"and {len(parts) - 5} more"] if len(parts) > 5 else []))
