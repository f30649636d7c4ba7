"""Opens a run for evaluation and maps functions over its examples, each exactly once, whatever the batch size."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from posterior_matching import data, mask_generators, masking, parallel, runs
from posterior_matching.config import Count, Seed, option
from posterior_matching.data.dataset import padded_batches
from posterior_matching.errors import UserError
from posterior_matching.evaluation.results import Arrays, PartialResults

Model = TypeVar("Model", bound=nnx.Module)
# (model, key, x [*input_shape], available mask) -> results by name, for one example
ExampleFn = Callable[[Model, jax.Array, jax.Array, jax.Array], Mapping[str, jax.Array]]

Checkpoint = Literal["best", "latest"]


WEIGHTED = "Weigh the draws of a point estimate by p(x_o, z) / q(z | x_o); in the paper they are not weighted."


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of every evaluation; the flags of the evaluation scripts are made from them."""

    run_dir: str | os.PathLike[str] = option(dataclasses.MISSING, "Evaluate the run in this directory (required).")
    dataset: str | None = option(
        None, "Evaluate on this dataset, a name or the path of a file; by default the one the run was trained on."
    )
    split: str = option("test", "Evaluate on this split of the dataset; 'all' takes every row of your own file.")
    checkpoint: Checkpoint | None = option(
        None,
        "Load this checkpoint, 'best' or 'latest'; by default the one set by the run's config.evaluate_checkpoint.",
    )
    num_instances: Count | None = option(
        None, "Evaluate only this many examples, from the start of the split; by default all."
    )
    batch_size: Count = option(
        32, "Process this many examples at once on each device; the results do not depend on it."
    )
    seed: Seed = option(0, "Seed all masks, samples and clusterings with this number.")

    def open_run(self, model: str | None = None, at_most: int | None = None) -> "Evaluation":
        """See `open_run`."""
        return open_run(
            self.run_dir,
            model,
            dataset=self.dataset,
            split=self.split,
            checkpoint=self.checkpoint,
            num_instances=self.num_instances,
            at_most=at_most,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedOptions(EvaluationOptions):
    """The options of evaluations that draw masks, in several trials."""

    mask_generator: str | mask_generators.MaskGenerator = option(
        "config",
        "Draw masks from this generator, given with its options as in UniformMaskGenerator:bounds=0.0,0.2 or "
        "SquareMaskGenerator:size=4; 'config' uses the generator the run was trained with.",
    )
    num_trials: Count = option(5, "Repeat the evaluation this many times, with new masks and samples.")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A run opened for evaluation, see `open_run`.

    Attributes:
        path: The run directory.
        description: Its `config.json`.
        checkpoint: The checkpoint to load, "best" or "latest".
        source: The data to evaluate on, in the units of the run.
        dataset: The examples of their split.
    """

    path: pathlib.Path
    description: dict[str, Any]
    checkpoint: str
    source: data.Source
    dataset: data.Dataset

    @functools.cached_property
    def model(self) -> Any:
        """The trained model, of the class that the description names; loaded on first use, see `runs.load_model`."""
        return runs.load_model(self.path, self.description["model"], self.checkpoint)

    @functools.cached_property
    def x(self) -> np.ndarray:
        """The examples as the model sees them, `[N, *input_shape]`; missing values are zeros."""
        return np.asarray(data.decode(self.dataset.x, self.dataset.max_value)[0])

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of the mask of one example."""
        return masking.mask_shape(self.dataset.input_shape)

    def masks(self, mask_generator: str | mask_generators.MaskGenerator) -> mask_generators.MaskGenerator:
        """Returns a mask generator that fits the data.

        Args:
            mask_generator: The generator, its specification (`mask_generators.mask_generator_from_spec`), or "config"
                for the one that the run was trained with.

        Raises:
            UserError: The specification is wrong, or the generator does not fit the data.
        """
        if mask_generator == "config":
            mask_generator = mask_generators.build_mask_generator(self.description["config"]["mask_generator"])
        elif isinstance(mask_generator, str):
            mask_generator = mask_generators.mask_generator_from_spec(mask_generator)
        mask_generator.check(self.mask_shape)
        return mask_generator

    def settings(self, **options: Any) -> dict[str, Any]:
        """Returns everything that a batch's results depend on: checkpoint, data, devices and the `options`."""
        return {
            "step": runs.latest_step(self.path, self.checkpoint),
            "dataset": self.dataset.name,
            "split": self.dataset.split,
            "num_instances": len(self.dataset),
            "num_devices": jax.local_device_count(),
            **options,
        }

    def training_rows(self) -> np.ndarray:
        """Returns the run's training rows, `[N, d]`, in its units, NaN = missing; baselines are fitted to them."""
        options = data.DataOptions.of_run(self.description)
        train = data.open_source(options, self.description).split(options.train_split)
        x, available = (np.asarray(a) for a in data.decode(train.x, train.max_value))
        return np.where(available == 1, x, np.nan).reshape(len(x), -1)


def open_run(
    run_dir: str | os.PathLike,
    model: str | None = None,
    *,
    dataset: str | None = None,
    split: str = "test",
    checkpoint: str | None = None,
    num_instances: int | None = None,
    at_most: int | None = None,
) -> Evaluation:
    """Opens a run for evaluation.

    Args:
        run_dir: The run directory.
        model: The required model of the run; None: any.
        dataset: The dataset to evaluate on; None: the one the run was trained on.
        split: Its split.
        checkpoint: "best" or "latest"; None: the one named in the run's config.
        num_instances: Evaluate only this many examples, from the first; None: all of them, or the first `at_most`.
        at_most: See `num_instances`.

    Raises:
        UserError: It is not such a run, or the data do not match it; see `runs.read_description` and `load_examples`.
    """
    description = runs.read_description(run_dir, model)
    source, examples = load_examples(description, dataset, split, num_instances, at_most)
    checkpoint = checkpoint or description["config"]["evaluate_checkpoint"]
    return Evaluation(pathlib.Path(run_dir), description, checkpoint, source, examples)


def load_examples(
    description: Mapping[str, Any],
    dataset: str | None,
    split: str,
    num_instances: int | None,
    at_most: int | None = None,
) -> tuple[data.Source, data.Dataset]:
    """Returns the data to evaluate a run on, in its units, and their examples; see `open_run`.

    Raises:
        UserError: The data differ in shape from the run's training data, or there are fewer examples than
            `num_instances`.
    """
    options = data.DataOptions.of_run(description)
    options = dataclasses.replace(options, dataset=dataset or options.dataset)
    if options.dataset is None:
        raise UserError("the run was trained on a table in memory: pass --dataset, and --split=all for every row of it")
    source = data.open_source(options, description)
    examples, expected = source.split(split), tuple(description["input_shape"])
    if examples.input_shape != expected:
        raise UserError(
            f"dataset {source.name} has examples of shape {examples.input_shape}, but the run was trained on {expected}"
        )
    if num_instances is None:
        num_instances = min(len(examples), at_most or len(examples))
    if not 1 <= num_instances <= len(examples):
        raise UserError(
            f"num_instances={num_instances}: the {split} split of {source.name} has {len(examples)} examples"
        )
    return source, first_examples(examples, num_instances)


def first_examples(dataset: data.Dataset, count: int) -> data.Dataset:
    """The first `count` examples, or all if there are fewer."""
    label = None if dataset.label is None else dataset.label[:count]
    return dataclasses.replace(dataset, x=dataset.x[:count], label=label)


class ExampleMap:
    """Maps a function of one example over a dataset, in batches, on all local devices.

    Every example has its own random key, a function of the base key and its row, so results do not depend on the
    batches.

    Args:
        fn: `fn(model, key, x, available) -> {name: array}` for one example, `x: [*input_shape]` and its `available`
            mask; must be traceable.
        model: The model.
        dataset: The examples.
        batch_size: Examples at once on each device.
    """

    def __init__(self, fn: ExampleFn[Model], model: Model, dataset: data.Dataset, batch_size: int):
        graphdef, state = nnx.split(model)
        self._state = parallel.replicate(state)
        self._dataset = dataset
        self._indices, self._weights = padded_batches(len(dataset), batch_size * jax.local_device_count())

        def run_batch(state: nnx.State, key: jax.Array, rows: jax.Array, indices: jax.Array) -> Mapping[str, jax.Array]:
            model = nnx.merge(graphdef, state)
            x, available = data.decode(rows, dataset.max_value)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, indices)
            return jax.vmap(lambda *example: fn(model, *example))(keys, x, available)

        self._run_batch = parallel.pmap(run_batch, in_axes=(0, None, 0, 0))

    def __call__(self, key: jax.Array, description: str = "", parts: PartialResults | None = None) -> Arrays:
        """Returns the results of all examples in order, `{name: [N, ...]}`.

        Args:
            key: The base key.
            description: The description on the progress bar.
            parts: Where the results of finished batches are kept, so that an interrupted evaluation can resume.

        Raises:
            UserError: It was interrupted, and `parts` keeps the finished batches.
        """
        batches = list(enumerate(zip(self._indices, self._weights, strict=True)))
        results = []
        try:
            with tqdm(batches, description, unit="batch", leave=False, disable=None) as bar:
                for number, (indices, weights) in bar:
                    compute = functools.partial(self._compute, key, indices, weights)
                    results.append(parts.get(f"{number:05}", compute) if parts else compute())
        except KeyboardInterrupt:
            if parts is None:
                raise
            raise UserError(f"interrupted: run the same command again to resume from {parts.folder}") from None
        return {name: np.concatenate([batch[name] for batch in results]) for name in results[0]}

    def _compute(self, key: jax.Array, indices: np.ndarray, weights: np.ndarray) -> Arrays:
        indices = indices.reshape(jax.local_device_count(), -1)
        results = self._run_batch(self._state, key, self._dataset.x[indices], indices)
        return {k: np.asarray(v).reshape(-1, *v.shape[2:])[weights > 0] for k, v in results.items()}
