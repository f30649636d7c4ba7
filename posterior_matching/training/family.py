"""The front door: a training script declares its family of models, and `Family.train` does the rest.

    FAMILY = Family(name="pm_vqvae", base=Base("vqvae"), options=Options, loss=loss, pictures=pictures)

CONTRIBUTING.md shows how to add one.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from posterior_matching import config as configs
from posterior_matching import models, parallel, runs
from posterior_matching.data import (
    DataOptions,
    Dataset,
    ImageOptions,
    Source,
    Table,
    TableOptions,
    TableSchema,
    decode,
    open_source,
)
from posterior_matching.errors import OptionError, UserError
from posterior_matching.masking import mask_shape
from posterior_matching.training.batching import default_batch_size
from posterior_matching.training.corruption import CorruptionOptions
from posterior_matching.training.experiment import Batch, Experiment, Metrics, Phase, TrainingOptions
from posterior_matching.training.loop import fit
from posterior_matching.training.pretrained import Base, Pretrained, load_pretrained

FamilyLoss = Callable[[Any, Batch, nnx.Rngs, Any], Metrics]
Pictures = Callable[[Any, jax.Array, Any], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The group `config.model`: the arguments of the model's class."""

    model: configs.Config


class Parsed(NamedTuple):
    """A config, parsed and checked."""

    config: dict[str, Any]
    options: Any  # of the family
    training: TrainingOptions
    data: DataOptions
    base_dir: str | None

    def on_data_of(self, base: Mapping[str, Any]) -> "Parsed":
        """Returns the config with the dataset of the base run, read as there unless it says how; or with its own."""
        if self.data.dataset is not None:
            return self
        changes = {"dataset": base["config"]["dataset"]}
        for key, default in (("table", TableOptions()), ("images", ImageOptions())):
            if base["config"].get(key) and getattr(self.data, key) == default:
                changes[key] = base["config"][key]
        config = configs.plain(self.config | changes)
        return self._replace(config=config, data=DataOptions.of_run({"config": config}))


class Setup(NamedTuple):
    """The inputs from which the phases of a run are built."""

    options: Any  # of the family
    training: TrainingOptions
    train_set: Dataset
    validation_set: Dataset
    build: Callable[[], Any]  # a model with new initial weights

    def bind(self, loss: FamilyLoss) -> "BoundLoss":
        """Returns a loss with the family's options filled in."""
        return BoundLoss(loss, self.options)


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models and how it trains.

    Attributes:
        name: Key of `models.MODELS`.
        options: A dataclass of the config keys specific to this family; `DataOptions`, `ModelOptions` and
            `TrainingOptions` are common to all. Its `mask_generator` and its `CorruptionOptions`, if any, are checked
            against the data.
        loss: `loss(model, batch, rngs, options) -> {"loss": [B], "<term>_<unit>": [B] or scalar}`; see `Batch`.
        base: The trained model that this one is built on.
        pictures: `pictures(model, x, b)` of the first validation images `x: [8, H, W, C]` and masks `b` (None for a
            family without a mask generator): `{name: [H, W, C] in [0, 1]}` for TensorBoard.
        check: `check(options, model, train_set)` raises OptionError if they do not fit together.
        summarise: Maps the means over the validation data to what is logged. Metrics may be per-example arrays,
            `[B, ...]`, that only have a meaning in aggregate, such as code usage or cluster-label contingency.
        phases: The phases of a run, if it has more than the one phase with `loss`.
    """

    name: str
    options: type
    loss: FamilyLoss
    base: Base | None = None
    pictures: Pictures | None = None
    check: Callable[[Any, Any, Dataset], None] | None = None
    summarise: Callable[[dict[str, np.ndarray], int], dict[str, Any]] | None = None
    phases: Callable[[Setup], Sequence[Phase]] | None = None

    def train(self, config: Any, run_dir: str | None = None, table: Table | None = None) -> str:
        """Trains, or resumes training, and returns the run directory.

        Args:
            config: A ConfigDict or nested dicts; it is not modified. The run saves the resolved config.
            run_dir: Run directory; resumed if it holds this run. None: a new one under `runs/`.
            table: The rows of `config.dataset`, if they are in memory.

        Raises:
            UserError: The config, data, base or run directory is invalid, or they do not match; or the user's own data
                have changed since the run began.
        """
        parsed = self.parse(config)
        pretrained = load_pretrained(self.base, parsed.base_dir, self.name, run_dir) if self.base else None
        if pretrained:
            parsed = parsed.on_data_of(pretrained.description)
        saved = runs.read_description(run_dir) if run_dir and runs.latest_step(run_dir) else None
        options = parsed.data if table is None else dataclasses.replace(parsed.data, dataset=table)
        options.check()
        source = open_source(options, saved or (pretrained and pretrained.description))
        if saved and saved.get("fingerprint") != source.fingerprint:
            raise UserError(
                f"'{source.name}' has changed since {run_dir} was begun: restore the old file, or choose another "
                "--run_dir"
            )
        experiment = self.experiment(parsed, source, pretrained)
        parallel.check_agreement(
            configs.flatten({"config": experiment.config}) | {"the fingerprint of the data": source.fingerprint}
        )
        run = runs.open_run(run_dir, self.name, experiment.config, source.to_json())
        fit(experiment, run)
        return str(run.path)

    def parse(self, config: Any) -> Parsed:
        """Parses a config and checks every key.

        Raises:
            OptionError: A key is unknown, missing, of the wrong type or out of range.
        """
        plain = configs.plain(config)
        groups = [self.options, TrainingOptions, DataOptions, ModelOptions]
        if self.base is None:
            options, training, data, _ = configs.parse(plain, *groups)
            return Parsed(plain, options, training, data, base_dir=None)
        options, training, data, _, base = configs.parse(plain, *groups, self.base.options())
        return Parsed(plain, options, training, data, getattr(base, self.base.dir_key))

    def experiment(self, parsed: Parsed, source: Source, pretrained: Pretrained | None = None) -> Experiment:
        """Builds the experiment, on the pretrained part if there is one.

        Raises:
            UserError: The options, the data and the pretrained part are incompatible.
        """
        train_set, validation_set = (source.split(s) for s in (parsed.data.train_split, parsed.data.validation_split))
        shape, options, config, training = train_set.input_shape, parsed.options, parsed.config, parsed.training
        if training.batch_size is None:
            batch_size = default_batch_size(len(train_set) // jax.device_count())
            config, training = config | {"batch_size": batch_size}, dataclasses.replace(training, batch_size=batch_size)
        generator = getattr(options, "mask_generator", None)
        if generator:
            generator.check(mask_shape(shape))
        if pretrained:
            pretrained.check_shape(shape)
            own = {key: value for key, value in config["model"].items() if key not in pretrained.base.config_keys}
            config = config | {"model": own | pretrained.config}
        else:
            config = config | {"model": self._resolved(config["model"], source, train_set)}
        rngs = nnx.Rngs(training.seed)

        def build() -> nnx.Module:
            model = models.build(self.name, config["model"], shape, rngs)
            if pretrained:
                setattr(model, pretrained.base.part, pretrained.part)
            return model

        setup = Setup(options, training, train_set, validation_set, build)
        trainable = pretrained.base.trainable() if pretrained else nnx.Param
        with configs.naming("config"):
            if isinstance(options, CorruptionOptions):
                options.check(shape)
            phases = self.phases(setup) if self.phases else [self._only_phase(setup, trainable)]
            if (others := sum(phase.steps or 0 for phase in phases[:-1])) >= training.steps:
                raise OptionError("steps", f"must exceed the {others} steps of the phases before the last")
            if self.check:
                self.check(options, phases[-1].model, train_set)
        return Experiment(
            config=config,
            options=training,
            phases=phases,
            train_set=train_set,
            validation_set=validation_set,
            pictures=_first_pictures(self.pictures, generator, validation_set) if len(shape) == 3 else None,
            summarise=self.summarise,
        )

    def _resolved(self, model: configs.Config, source: Source, train_set: Dataset) -> dict[str, Any]:
        """Adds what column-aware models need to know about the data: column kinds, and whether values are missing."""
        resolved, known = dict(model), inspect.signature(models.MODELS[self.name].__init__).parameters
        if "cardinalities" in known and isinstance(source.schema, TableSchema) and any(source.schema.cardinalities):
            resolved["cardinalities"] = source.schema.cardinalities
        if "availability" in known and resolved.get("availability", False) is None:
            resolved["availability"] = bool(np.isnan(train_set.x).any())
        return resolved

    def _only_phase(self, setup: Setup, trainable: Any) -> Phase:
        return Phase(setup.build(), setup.bind(self.loss), None, setup.training.optimizer, trainable)


@dataclasses.dataclass(frozen=True)
class BoundLoss:
    """What `Setup.bind` returns. The options come from the config, which `step.Program` compares in their place."""

    loss: FamilyLoss
    options: Any = dataclasses.field(compare=False)

    def __call__(self, model: Any, batch: Batch, rngs: nnx.Rngs) -> Metrics:
        """The loss and its terms, see `experiment`."""
        return self.loss(model, batch, rngs, self.options)


def _first_pictures(
    pictures: Pictures | None, generator: Any, dataset: Dataset
) -> Callable[[Any], dict[str, np.ndarray]] | None:
    """Binds `pictures` to the first validation images, with the same masks every time."""
    if pictures is None:
        return None

    def draw(model: Any) -> dict[str, np.ndarray]:
        x, available = decode(dataset.x[:8], dataset.max_value)
        masks = jax.jit(lambda key: generator(key, available.shape))(jax.random.key(0)) if generator else None
        return pictures(model, x, masks)

    return draw
