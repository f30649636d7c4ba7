"""The models, and the registry of those that can be trained."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from posterior_matching.config import Config, call
from posterior_matching.models.lookahead import LookaheadPosterior
from posterior_matching.models.networks import Shape
from posterior_matching.models.vade import VADE, PosteriorMatchingVADE
from posterior_matching.models.vae import PosteriorMatchingVAE
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE
from posterior_matching.models.vqvae import VQVAE, PosteriorMatchingVQVAE

MODELS: dict[str, type[nnx.Module]] = {
    "pm_vae": PosteriorMatchingVAE,
    "vqvae": VQVAE,
    "pm_vqvae": PosteriorMatchingVQVAE,
    "vade": VADE,
    "pm_vade": PosteriorMatchingVADE,
    "lookahead": LookaheadPosterior,
    "pm_vdvae": PosteriorMatchingVDVAE,
}


def build(name: str, config: Config, input_shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
    """Builds a model with new weights.

    Args:
        name: Key of `MODELS`.
        config: The arguments of the class, a run's `config.model`.
        input_shape: Shape of one example, `(d,)` or `(H, W, C)`.
        rngs: Source of initial weights.

    Raises:
        OptionError: A key is unknown, missing or out of range, or the parts do not match each other or the data.
    """
    return call(MODELS[name], config, "model", input_shape=tuple(input_shape), rngs=rngs)


def flat_weights(model: nnx.Module, kind: nnx.filterlib.Filter = ...) -> dict[str, Any]:
    """Returns a model's arrays of a kind by path: `{"vae.encoder.linear_in.kernel": [d, h], ...}`."""
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, kind))}


def with_weights(model: nnx.Module, weights: Mapping[str, Any]) -> Any:
    """Returns the model with the arrays of `flat_weights` in it."""
    graphdef, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    filled = [(path, leaf.replace(jnp.asarray(weights[".".join(map(str, path))]))) for path, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))
