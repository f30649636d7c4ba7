"""The models, and the registry of those that can be trained."""

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
