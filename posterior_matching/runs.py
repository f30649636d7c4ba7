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
from typing import Any, TypeVar

import filelock
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from posterior_matching import atomic, models, parallel
from posterior_matching.config import flatten, naming, plain
from posterior_matching.errors import OptionError, UserError, nearest

Tree = TypeVar("Tree")

# A resumed run may differ in these: they change the length of a run and how it is monitored, not what a step computes.
_FREE_ON_RESUME = ("steps", "patience", "log_every", "validation_every", "checkpoint_every", "data_memory_budget_gb")

_KEPT = {"latest": 2, "best": 1}  # the second latest, in case the latest is damaged
# Arrays of earlier versions that no model has any more, and what they were.
_REMOVED = {"partial_encoder.out.kernel": "a 1x1 convolution after the PM-VQVAE's partial encoder"}
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
            UserError: Another process is training this run, or has trained it since it was opened; or the directory
                cannot be written.
        """
        if jax.process_index() == 0:
            with writing(self.path):
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
        step = latest_step(self.path)
        if self.step and not step:
            raise self._nothing_intact()
        self.step = step

    def _nothing_intact(self) -> UserError:
        return UserError(f"{self.path} holds no intact checkpoint: choose another --run_dir or delete it")

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
        for step in self._managers["best"].all_steps():
            if step > self.step:
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
        """Writes a checkpoint in the background; older ones are deleted once the new one is complete.

        Args:
            step: The step.
            model: Weights ready for use, `flat_weights`; None: there are none yet, since the run is pretraining.
            train: A pytree of everything else needed to resume.
            record: JSON values needed to resume.
            best: Whether this is also the best checkpoint.

        Raises:
            UserError: This checkpoint, or the previous one in the background, cannot be written.
        """
        with writing(self.path):
            weights = {} if model is None else {"model": model}
            if best:  # on disk before the latest one, which records the loss to beat, is begun
                self._managers["best"].save(step, args=_arguments(weights, {}), force=True)
                self._managers["best"].wait_until_finished()
            arguments = _arguments(weights | {"train": _named_leaves(train)}, record)
            self._managers["latest"].save(step, args=arguments, force=True)
        self.step = step

    def restore(self, structure: Callable[[int], Tree]) -> tuple[Tree, dict[str, Any]]:
        """Returns the `train` and `record` that were saved in the latest intact checkpoint.

        A damaged checkpoint is set aside with a warning, and the one before it is used.

        Args:
            structure: Maps a step to a pytree with the structure, shapes and dtypes of `train` at that step.

        Raises:
            UserError: No checkpoint is intact, or its arrays do not match.
        """
        while self.step:
            folder = self.path / "checkpoints" / "latest" / str(self.step)
            try:
                if "leaves" in _saved_arrays(folder, "train"):
                    raise UserError(
                        f"{self.path} was trained by version 0.1, whose training state cannot be resumed: its model "
                        "can still be evaluated; to continue training, choose another --run_dir"
                    )
                train = structure(self.step)
                arrays = _restore(folder, "train", _named_leaves(train))
                record = _record(folder).get("record", {})
                return jax.tree.unflatten(jax.tree.structure(train), list(arrays.values())), record
            except UserError:
                raise
            except _DoesNotFitError as error:
                raise UserError(f"the latest checkpoint of {self.path} does not fit its config.json: {error}") from None
            except Exception as error:  # whatever Orbax raises for missing and truncated files
                self._set_aside(folder, error)
                self._managers["latest"].reload()
                self.step = latest_step(self.path)
                self._forget_later_best()
        raise self._nothing_intact()

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Appends one JSON object to `metrics.jsonl`."""
        with writing(self.path), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drops rows after `step`, which will be written again, and damaged lines."""
        path = self.path / "metrics.jsonl"
        if path.exists() and jax.process_index() == 0:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            atomic.write_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= step))

    @contextlib.contextmanager
    def finished_saving(self) -> Iterator[None]:
        """When the block ends, waits until everything is on disk, then lets other processes resume the run."""
        try:
            with writing(self.path):
                yield
        finally:
            with writing(self.path):
                for manager in self._managers.values():
                    manager.wait_until_finished()
            self._lock.release()


def open_run(
    run_dir: str | None,
    model: str,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
) -> Run:
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
    description = {
        "model": model,
        "config": config,
        **data,
        "num_devices": jax.device_count(),
        "versions": versions(),
    }
    with writing(path):
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
    with _reading(run_dir):
        saved = (pathlib.Path(run_dir) / "checkpoints" / checkpoint).glob("*")
        return max((int(path.name) for path in saved if path.name.isdigit()), default=0)


def read_description(run_dir: str | os.PathLike[str], model: str | None = None) -> dict[str, Any]:
    """Returns `config.json` of a run.

    Args:
        run_dir: The run directory.
        model: The required model (key of `models.MODELS`); None: any.

    Raises:
        UserError: It does not exist, is not a run directory, or holds a run of another model.
    """
    path = pathlib.Path(run_dir)
    with _reading(run_dir):
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
    if found == "pm_vae":
        config.setdefault("elbo_samples", 1)  # absent in runs from before there was a choice
    return description


def load_model(run_dir: str | os.PathLike[str], model: str | None = None, checkpoint: str | None = None) -> Any:
    """Returns the trained model of a run, ready to call. The run may still be training.

    Args:
        run_dir: The run directory.
        model: The required model (key of `models.MODELS`); None: any.
        checkpoint: "best" (lowest validation loss) or "latest"; None: the run's `config.evaluate_checkpoint`.

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
        weights = _read_weights(pathlib.Path(run_dir).absolute(), name, flat_weights(nnx.state(abstract)))
    except _DoesNotFitError as error:
        raise UserError(f"the {name} checkpoint of {run_dir} does not fit its config.json: {error}") from None
    return with_weights(abstract, weights)


def abstract_model(description: Mapping[str, Any]) -> nnx.Module:
    """Returns the model that a `config.json` describes, with shapes for weights.

    Raises:
        OptionError: Its `config.model` does not describe such a model.
    """
    shape, options = tuple(description["input_shape"]), plain(description["config"]["model"])
    return nnx.eval_shape(lambda: models.build(description["model"], options, shape, nnx.Rngs(0)))


def with_weights(model: nnx.Module, weights: Mapping[str, Any]) -> Any:
    """Returns the model with the arrays of `flat_weights` in it."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, unflatten_weights(state, weights))


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
    """Returns the arrays of a checkpoint's item, in the order of `target`, after comparing shapes and checksums.

    Raises:
        UserError: They are those of an earlier version of the model.
        _DoesNotFitError: They have other names or shapes.
        Exception: What Orbax raises for missing and truncated files.
    """
    shapes = {name: tuple(array.shape) for name, array in target.items()}
    saved = {name: tuple(array.shape) for name, array in _saved_arrays(folder, item).items()}
    if not saved:
        raise ValueError(f"{item} is gone")
    if removed := [what for name, what in _REMOVED.items() if name in saved.keys() - shapes.keys()]:
        raise UserError(
            f"{folder.parents[2]} was trained by an earlier version, with {removed[0]} that has been removed: train it "
            "again with another --run_dir, or check out the version that it was trained with"
        )
    if problem := _difference(shapes, saved):
        raise _DoesNotFitError(problem)
    abstract = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in target.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(folder / item, abstract)
    arrays = {name: np.asarray(restored[name]) for name in target}
    checksums = _record(folder).get("checksums", {}).get(item)
    for name, array in arrays.items():
        if checksums is not None and checksums.get(name) != _checksum(array):
            raise ValueError(f"wrong checksum of {name}")
    return arrays


def _saved_arrays(folder: pathlib.Path, item: str) -> Mapping[str, Any]:
    _silence_orbax()
    with ocp.StandardCheckpointer() as checkpointer:
        found: Any = checkpointer.metadata(folder / item)
    return found.item_metadata or {}


def _record(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the record of a checkpoint, empty for one of version 0.1."""
    if not (folder / "record").exists():
        return {}
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


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns errors about impossible paths into a one-line UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        shown = repr(str(path)) if len(str(path)) < 100 else repr(f"{str(path)[:100]}...")
        raise UserError(f"cannot read the run directory {shown} ({reason}): choose another --run_dir") from error


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns file system errors into a one-line UserError that names the run directory."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):  # Orbax wraps what its threads raise
            cause = cause.__cause__ or cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else _known_reason(error)
        if reason is None:
            raise
        full = reason in ("No space left on device", "Disk quota exceeded")
        remedy = "make space, then the same command resumes" if full else "choose another --run_dir"
        raise UserError(f"cannot write the run directory {path} ({reason}): {remedy}") from error


_REASONS = ("No space left on device", "Read-only file system", "Permission denied", "Disk quota exceeded", "null byte")


def _known_reason(error: Exception) -> str | None:
    """The file system error in a message from a library's C++ code; None if there is none."""
    for reason in _REASONS:
        if reason in str(error):
            return reason
    return None


# Descriptions --------------------------------------------------------------------------------------------------------


def _check_same_run(path: pathlib.Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    if saved["model"] != now["model"]:
        raise UserError(f"{path} is a run of {saved['model']}, not of {now['model']}: choose another --run_dir")
    before, after = (
        flatten({"config": run["config"]}) | {key: run.get(key) for key in ("input_shape", "num_devices")}
        for run in (saved, now)
    )
    free = {f"config.{key}" for key in _FREE_ON_RESUME}
    if problem := _difference(*({k: v for k, v in c.items() if k not in free} for c in (before, after))):
        raise UserError(f"{path} holds a run that differs ({problem}): use its values, or choose another --run_dir")


def _difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Lists the differences between two flat dicts in one line; empty if there are none."""
    missing = object()
    parts = []
    for key in sorted(expected.keys() | found.keys()):
        old, new = expected.get(key, missing), found.get(key, missing)
        if old != new:
            parts.append(f"{key}: {'absent' if old is missing else old} -> {'absent' if new is missing else new}")
    return "; ".join(parts[:5] + ([f"and {len(parts) - 5} more"] if len(parts) > 5 else []))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line truncated by a kill, or damaged
        return float("inf")
