"""Models that are built on a trained one: it is copied, frozen, and described in the new run's own config.

The new model has the base as an attribute and as a key of `config.model`, both named after the base's model:
`model.vqvae` and `config.model.vqvae`. So its run directory is complete: it resumes, loads and moves without the base.
"""

import os
from typing import Any, NamedTuple

from flax import nnx
from ml_collections import ConfigDict

from posterior_matching import runs
from posterior_matching.data import Columns, Dataset, load_for_training
from posterior_matching.errors import UserError


class Base(NamedTuple):
    """A trained model to build on."""

    name: str  # key of `runs.MODELS`
    model: nnx.Module
    config: dict[str, Any]  # its config.model
    dataset: str  # what it was trained on
    input_shape: tuple[int, ...]
    standardisation: Columns | None = None

    def trainable(self) -> Any:
        """NNX filter of the parameters that train: all but the base's."""
        return nnx.All(nnx.Param, nnx.Not(nnx.PathContains(self.name)))


def load_base(base_dir: str | None, name: str, run_dir: str | os.PathLike | None, key: str | None = None) -> Base:
    """Loads the model to build on, from its run or, if the new run is being resumed, from that.

    Args:
        base_dir: Run directory of the base.
        name: The model it must be of, a key of `runs.MODELS`.
        run_dir: Run directory of the new model.
        key: Config key of `base_dir`, for messages; None: `<name>_dir`.

    Raises:
        UserError: `base_dir` is missing, or see `runs.load_model`.
    """
    if run_dir is not None and runs.latest_step(run_dir):
        description = runs.read_description(run_dir)
        model, config = runs.load_model(run_dir, checkpoint="latest"), description["config"]["model"]
        if description["model"] != name:
            if name not in config:
                raise UserError(f"{run_dir} is a run of {description['model']}: choose another --run_dir")
            model, config = getattr(model, name), config[name]
    elif base_dir is None:
        raise UserError(f"missing key 'config.{key or name + '_dir'}': the run directory of a {name} run")
    else:
        description = runs.read_description(base_dir, name)
        model, config = runs.load_model(base_dir, name), description["config"]["model"]
    saved = description["standardisation"]
    return Base(
        name=name,
        model=model,
        config=config,
        dataset=description["config"]["dataset"],
        input_shape=tuple(description["input_shape"]),
        standardisation=Columns.from_json(saved) if saved else None,
    )


def load_datasets(base: Base, config: ConfigDict) -> tuple[Dataset, Dataset]:
    """Loads the training and the validation part, in the base's units; `config.dataset` defaults to the base's.

    Raises:
        UserError: See `data.load`.
    """
    if config.dataset is None:
        config.dataset = base.dataset
    return load_for_training(config, base.standardisation)


def build_on(base: Base, model: str, config: ConfigDict, input_shape: tuple[int, ...], seed: int) -> nnx.Module:
    """Builds a new model around the base, and puts the base's config into `config.model`.

    Args:
        base: The base.
        model: Key of `runs.MODELS`.
        config: The new run's config; `config.model` has the options of the new parts.
        input_shape: Shape of one example of the new run's data.
        seed: Of the new parts' initial weights.

    Raises:
        UserError: The base was trained on data of another shape; or the options are wrong.
    """
    check_shape(base, input_shape)
    with config.unlocked():
        config.model[base.name] = ConfigDict(base.config)
    new = runs.MODELS[model].from_config(config.model, input_shape, nnx.Rngs(seed))
    setattr(new, base.name, base.model)
    return new


def check_shape(base: Base, input_shape: tuple[int, ...]) -> None:
    """Raises UserError if the base was trained on data of another shape."""
    if tuple(input_shape) != base.input_shape:
        raise UserError(
            f"the {base.name} run was trained on data of shape {base.input_shape}, "
            f"config.dataset has shape {tuple(input_shape)}"
        )
