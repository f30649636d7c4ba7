"""The output of an evaluation: `results.json`, arrays and a picture, and the finished parts of an interrupted one."""

import contextlib
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from flax import nnx

from posterior_matching import runs
from posterior_matching.atomic import replacing, write_text
from posterior_matching.errors import UserError
from posterior_matching.evaluation.metrics import finite_mean
from posterior_matching.evaluation.pictures import imputation_grid, save_png
from posterior_matching.mask_generators import MaskGenerator
from posterior_matching.masking import mask_shape

Arrays = dict[str, np.ndarray]
Item = TypeVar("Item")


class ImputesImages(Protocol):
    """A model that imputes images in [0, 1]."""

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Returns `[num_samples, B, H, W, C]` for images `x: [B, H, W, C]` and masks `b: [B, H, W, 1]`."""
        ...


class Results:
    """The trials of an evaluation, and the folder they are written to.

    Args:
        folder: Created at once, so that an evaluation cannot run for hours and then fail to write.
        num_examples: How many examples were evaluated.
        arguments: The evaluation's arguments by name, including `seed`; saved as `flags`.

    Raises:
        UserError: The folder cannot be created.
    """

    def __init__(self, folder: pathlib.Path, num_examples: int, arguments: Mapping[str, Any]):
        self.folder, self.num_examples = folder, num_examples
        self._arguments = dict(arguments)
        self._trials: dict[str, list[float]] = {}
        self._left_out: dict[str, int] = {}
        self._start = time.perf_counter()
        with _one_line(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, **metrics: float) -> None:
        """Adds one trial of each metric; names carry their units."""
        for name, value in metrics.items():
            self._trials.setdefault(name, []).append(float(value))

    def add_mean(self, **values: np.ndarray) -> None:
        """Adds one trial of each metric, the mean of its finite values; `write` warns how many were left out."""
        for name, array in values.items():
            mean, left_out = finite_mean(array)
            self.add(**{name: mean})
            self._left_out[name] = self._left_out.get(name, 0) + left_out

    def trials(self, name: str) -> np.ndarray:
        """Returns the trials of a metric."""
        return np.array(self._trials[name])

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Every metric's `mean` and `std` over trials, and the `trials` themselves."""
        return {
            name: {"mean": float(np.mean(trials)), "std": float(np.std(trials)), "trials": list(trials)}
            for name, trials in self._trials.items()
        }

    def __str__(self) -> str:
        width = max(map(len, self._trials), default=0)
        return "\n".join(
            f"{name:{width}}  {values['mean']:.4f} ± {values['std']:.4f}  ({len(values['trials'])} trial"
            f"{'s' * (len(values['trials']) > 1)})"
            for name, values in self.metrics.items()
        )

    def write(self, **arrays: np.ndarray | None) -> None:
        """Prints all metrics, and writes `results.json` and one `<name>.npy` per array, all of them or none.

        An array of None removes the file of an earlier evaluation.

        Raises:
            UserError: They cannot be written.
        """
        description = {
            "metrics": self.metrics,
            "num_examples": self.num_examples,
            "seed": self._arguments["seed"],
            "flags": self._arguments,
            "versions": runs.versions(),
            "seconds": round(time.perf_counter() - self._start, 1),
        }
        with _one_line(self.folder), contextlib.ExitStack() as files:
            # The stack moves the files to their names once all are written, results.json last.
            summary = files.enter_context(replacing(self.folder / "results.json"))
            summary.write_text(json.dumps(description, indent=2, default=str) + "\n", encoding="utf-8")
            for name, array in arrays.items():
                if array is not None:
                    with open(files.enter_context(replacing(self.folder / f"{name}.npy")), "wb") as file:
                        np.save(file, array, allow_pickle=False)
        with _one_line(self.folder):
            for name, array in arrays.items():
                if array is None:
                    (self.folder / f"{name}.npy").unlink(missing_ok=True)
        print(self)
        for name, count in self._left_out.items():
            if count:
                print(f"warning: {count} infinite or NaN values were left out of the mean of {name}")
        print(f"{self.num_examples} examples; written to {self.folder}")

    def draw_imputations(self, model: ImputesImages, x: np.ndarray, masks: MaskGenerator) -> None:
        """Draws `imputations.png`, after `write`: original, observed part and six imputations of each image.

        Args:
            model: The model.
            x: Images `[B, H, W, C]` in [0, 1]; the first ten are drawn.
            masks: The generator of the masks.

        Raises:
            UserError: It cannot be written.
        """
        x = x[:10]
        key_mask, key_impute = jax.random.split(jax.random.key(self._arguments["seed"]))
        b = masks(key_mask, (len(x), *mask_shape(x.shape[1:])))
        imputations = nnx.jit(lambda model, x, b: model.impute(x, b, 6, key=key_impute))(model, x, b)
        path = self.folder / "imputations.png"
        with _one_line(path):
            save_png(path, imputation_grid(x, b, imputations))
        print(f"original, observed part, six imputations: {path}")


class PartialResults:
    """Parts of a long evaluation, one `.npz` each, kept so that an interrupted evaluation can resume.

    Every part stores the settings it was computed with. It is recomputed if it is damaged or its settings differ.
    Several processes may work in the same folder.

    Args:
        folder: Where they are kept; created when there is something to keep.
        settings: Everything that the parts depend on, JSON values by name.
    """

    def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any], prefix: str = ""):
        self.folder, self._settings, self._prefix = folder, dict(settings), prefix

    @classmethod
    def open(cls, folder: pathlib.Path, settings: Mapping[str, Any]) -> "PartialResults":
        """Opens a folder, new or left by an earlier evaluation, and writes `settings.json` there.

        Raises:
            UserError: It holds parts with other settings, or cannot be written.
        """
        path = folder / "settings.json"
        saved = _read_settings(path)
        changed = [f"{k}: {saved.get(k)} -> {v}" for k, v in settings.items() if saved.get(k) != v] if saved else []
        if changed:
            raise UserError(
                f"{folder} holds an evaluation that differs ({'; '.join(changed)}): use its values, or delete it"
            )
        with _one_line(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(dict(settings), indent=2) + "\n")
        return cls(folder, settings)

    def within(self, name: str) -> "PartialResults":
        """Returns the parts in a subfolder of this one."""
        return PartialResults(self.folder / name, self._settings, f"{self._prefix}{name}/")

    def get(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """Returns the arrays of a part: those kept earlier, or the result of `compute`, which is then kept.

        Raises:
            UserError: The part cannot be written.
        """
        path = self.folder / f"{name}.npz"
        stamp = json.dumps(self._settings | {"part": self._prefix + name}, sort_keys=True)
        kept = load_npz(path)
        if kept is not None and str(kept.pop("settings", None)) == stamp:
            return kept
        arrays = compute()
        # If another process has just finished the same evaluation, the folder is gone and nothing needs keeping.
        with _one_line(path), contextlib.suppress(FileNotFoundError):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_npz(path, arrays | {"settings": np.array(stamp)})
        return arrays

    def remove(self) -> None:
        """Removes the folder, when the evaluation is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)


def save_npz(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays to a compressed `.npz`, atomically."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_npz(path: pathlib.Path) -> Arrays | None:
    """Reads all arrays of a `.npz`; None if it does not exist or is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return None if archive.zip.testzip() else dict(archive)
    except Exception:  # whatever NumPy and zipfile raise for files that are truncated, empty or no archives
        return None


def _read_settings(path: pathlib.Path) -> dict[str, Any] | None:
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return saved if isinstance(saved, dict) else None


@contextlib.contextmanager
def _one_line(path: str | os.PathLike) -> Iterator[None]:
    """Turns file system errors into a one-line UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def with_log(items: Sequence[Item], name: str) -> Iterator[Item]:
    """Yields the items; if stderr is not a terminal, prints a line after each: "trial 2 of 5: 12 s"."""
    for number, item in enumerate(items, start=1):
        start = time.perf_counter()
        yield item
        if not sys.stderr.isatty():
            seconds = time.perf_counter() - start
            print(f"{name} {number} of {len(items)}: {seconds:.3g} s", file=sys.stderr, flush=True)
