"""Models built on a trained one, which is copied, frozen, and described in the new run's config.

The new run directory is self-contained: it can be resumed, loaded and moved without the base run.
"""

import dataclasses
import os
from typing import Any, NamedTuple

from flax import nnx

from posterior_matching import runs
from posterior_matching.config import plain
from posterior_matching.errors import UserError


@dataclasses.dataclass(frozen=True)
class Base:
    """A family's declaration of the trained model that it is built on.

    Attributes:
        model: Key of `models.MODELS` of the trained run.
        dir_key: Config key of that run's directory; default: `<model>_dir`.
        part: Attribute of the new model that is pretrained; default: the whole trained model, as attribute `<model>`.
            Any other name is an attribute of both models.
        config_keys: Keys of the trained run's `config.model` that describe the part and go into the new `config.model`,
            in place of its own;
            default: all of them, as its group `<part>`.
        required: Whether the family needs a base; if not, it can also be trained from scratch.
    """

    model: str
    dir_key: str = ""
    part: str = ""
    config_keys: tuple[str, ...] = ()
    required: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "dir_key", self.dir_key or f"{self.model}_dir")
        object.__setattr__(self, "part", self.part or self.model)

    def options(self) -> type:
        """Returns a dataclass with a single option, the base's run directory."""
        return dataclasses.make_dataclass("BaseOptions", [(self.dir_key, str | None)], frozen=True)

    def trainable(self) -> Any:
        """Returns the NNX filter of the parameters that train: all except the part's."""
        return nnx.All(nnx.Param, nnx.Not(nnx.PathContains(self.part)))


class Pretrained(NamedTuple):
    """A trained part, loaded from its run."""

    base: Base
    part: nnx.Module
    config: dict[str, Any]  # its keys of config.model
    description: dict[str, Any]  # `config.json` of the run

    def check_shape(self, input_shape: tuple[int, ...]) -> None:
        """Raises UserError if the part was trained on data of another shape."""
        expected = tuple(self.description["input_shape"])
        if tuple(input_shape) != expected:
            raise UserError(
                f"the {self.base.model} run was trained on data of shape {expected}, "
                f"but config.dataset has shape {tuple(input_shape)}"
            )


def load_pretrained(
    base: Base, base_dir: str | None, family: str, run_dir: str | os.PathLike[str] | None
) -> Pretrained | None:
    """Loads the part to build on from its run, or from the new run if that is being resumed.

    Args:
        base: What the family is built on.
        base_dir: Run directory of the base.
        family: The new run's model, a key of `models.MODELS`.
        run_dir: Run directory of the new model.

    Returns:
        The part; None if there is no base and none is needed.

    Raises:
        UserError: `base_dir` is missing, or see `runs.load_model`.
    """
    if base_dir is None and not base.required:
        return None
    if run_dir is not None and runs.latest_step(run_dir):
        description = runs.read_description(run_dir, family)
        model, holder = runs.load_model(run_dir, checkpoint="latest"), family
    elif base_dir is None:
        raise UserError(f"missing key 'config.{base.dir_key}': the run directory of a {base.model} run")
    else:
        description = runs.read_description(base_dir, base.model)
        model, holder = runs.load_model(base_dir, base.model), base.model
    config = plain(description["config"]["model"])
    if base.config_keys:
        part, config = getattr(model, base.part), {key: config[key] for key in base.config_keys if key in config}
    elif holder == family:
        part, config = getattr(model, base.part), {base.part: config[base.part]}
    else:
        part, config = model, {base.part: config}
    return Pretrained(base, part, config, description)
