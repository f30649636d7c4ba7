"""Evaluation over whole datasets: every example once, whatever the batch size, and the results folder."""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from flax import nnx

from posterior_matching import atomic, data, parallel, runs
from posterior_matching.data.batches import padded_batches
from posterior_matching.errors import UserError
from posterior_matching.progress import progress_bar

ExampleFn = Callable[[nnx.Module, jax.Array, jax.Array, jax.Array], dict[str, jax.Array]]


def load_dataset(
    description: Mapping[str, Any], name: str | None, split: str, num_instances: int | None
) -> data.Dataset:
    """Loads the data to evaluate a run on, in the units that the run was trained in.

    Args:
        description: The run's `config.json`.
        name: Dataset; None: the one the run was trained on.
        split: Its split.
        num_instances: Evaluate only this many examples, the first ones; None: all.

    Raises:
        UserError: The data do not have the shape the run was trained on, or there are fewer examples than asked for.
    """
    name = name or description["config"]["dataset"]
    dataset = data.load(name, split, columns=runs.saved_columns(description))
    expected = tuple(description["input_shape"])
    if dataset.input_shape != expected:
        raise UserError(
            f"dataset {name} has examples of shape {dataset.input_shape}, the run was trained on {expected}"
        )
    if num_instances is None:
        return dataset
    if not 1 <= num_instances <= len(dataset):
        raise UserError(f"--num_instances={num_instances}: the {split} split of {name} has {len(dataset)} examples")
    label = None if dataset.label is None else dataset.label[:num_instances]
    return dataclasses.replace(dataset, x=dataset.x[:num_instances], label=label)


def training_rows(description: Mapping[str, Any]) -> np.ndarray:
    """The rows a run was trained on, `[N, d]`, NaN = missing, in the units of the model: what baselines learn from."""
    train = load_dataset(description, None, description["config"]["train_split"], None)
    x, available = (np.asarray(a) for a in data.decode(train.x, train.max_value))
    return rows(np.where(available == 1, x, np.nan))


def rows(x: np.ndarray) -> np.ndarray:
    """Flattens every example: `[N, ...]` -> `[N, d]`."""
    return x.reshape(len(x), -1)


class ExampleMap:
    """Maps a function of one example over a dataset, in batches, on all local devices.

    Every example has a random key of its own, a function of the base key and its row, so that results do not depend on
    how examples fall into batches.

    Args:
        fn: `fn(model, key, x, available) -> {name: array}` for one example, `x: [*input_shape]` and its `available`
            mask; must be traceable.
        model: The model.
        dataset: The examples.
        batch_size: Examples at once on each device.
    """

    def __init__(self, fn: ExampleFn, model: nnx.Module, dataset: data.Dataset, batch_size: int):
        graphdef, state = nnx.split(model)
        self._state = parallel.replicate(state)
        self._dataset = dataset
        self._indices, self._weights = padded_batches(len(dataset), batch_size * jax.local_device_count())

        def run_batch(state, key, rows, indices):
            model = nnx.merge(graphdef, state)
            x, available = data.decode(rows, dataset.max_value)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
            return jax.vmap(lambda *example: fn(model, *example))(keys, x, available)

        self._run_batch = parallel.pmap(run_batch, in_axes=(0, None, 0, 0))

    def __call__(
        self, key: jax.Array, description: str = "", keep_in: pathlib.Path | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the results of all examples in order, `{name: [N, ...]}`.

        Args:
            key: The base key.
            description: Of the progress bar.
            keep_in: An existing folder for the results of each batch. Those that an interrupted call left there are
                read instead of computed; the caller sees to it that they are of the same function, data and batch size.
        """
        parts = []
        batches = list(enumerate(zip(self._indices, self._weights, strict=True)))
        for number, (indices, weights) in progress_bar(batches, description, unit="batch", leave=False):
            path = keep_in and keep_in / f"{number:05}.npz"
            if path and path.exists():
                parts.append(load_npz(path))
                continue
            indices = indices.reshape(jax.local_device_count(), -1)
            results = self._run_batch(self._state, key, self._dataset.x[indices], indices)
            real = weights > 0
            parts.append({k: np.asarray(v).reshape(-1, *v.shape[2:])[real] for k, v in results.items()})
            if path:
                save_npz(path, parts[-1])
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def save_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a compressed `.npz`, which is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    os.replace(temporary, path)


def load_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads all arrays of a `.npz`."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def open_parts(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Makes a folder for the parts of a long evaluation, or checks one that an earlier evaluation left.

    Args:
        folder: The folder.
        settings: Everything that the parts depend on, JSON values by name.

    Raises:
        UserError: The parts in it are of other settings.
    """
    path = folder / "settings.json"
    if path.exists():
        saved = json.loads(path.read_text())
        changed = [
            f"{name}: {saved.get(name)} -> {value}" for name, value in settings.items() if saved.get(name) != value
        ]
        if changed:
            raise UserError(
                f"{folder} holds an evaluation that differs ({'; '.join(changed)}): use its values, or delete it"
            )
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, json.dumps(dict(settings), indent=2) + "\n")


class Results:
    """Collects trials and writes `results.json`, the same for every evaluation script."""

    def __init__(self, folder: pathlib.Path, num_examples: int, seed: int):
        self.folder = folder
        self._num_examples, self._seed = num_examples, seed
        self._trials: dict[str, list[float]] = {}
        self._start = time.perf_counter()

    def add(self, **metrics: float) -> None:
        """Adds one trial of each metric; names carry their units."""
        for name, value in metrics.items():
            self._trials.setdefault(name, []).append(float(value))

    def trials(self, name: str) -> np.ndarray:
        """Returns the trials of a metric."""
        return np.array(self._trials[name])

    def write(self, **arrays: np.ndarray) -> None:
        """Prints mean and standard deviation over trials, writes `results.json` and `<name>.npy` for every array."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(self.folder / f"{name}.npy", array, allow_pickle=False)
        metrics = {
            name: {"mean": float(np.mean(trials)), "std": float(np.std(trials)), "trials": trials}
            for name, trials in self._trials.items()
        }
        description = {
            "metrics": metrics,
            "num_examples": self._num_examples,
            "seed": self._seed,
            "flags": {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])},
            "versions": runs.versions(),
            "seconds": round(time.perf_counter() - self._start, 1),
        }
        (self.folder / "results.json").write_text(json.dumps(description, indent=2) + "\n")
        width = max(map(len, metrics))
        for name, values in metrics.items():
            print(f"{name:{width}}  {values['mean']:.4f} ± {values['std']:.4f}  ({len(values['trials'])} trials)")
        print(f"{self._num_examples} examples; written to {self.folder}")
