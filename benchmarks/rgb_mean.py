"""Compares the mean of our RGB mixtures of logistics, and the published one, with the mean of samples.

    python benchmarks/rgb_mean.py [--num_samples 10000]

Prints root mean squared errors per channel, in levels of 0..255, over mixtures of 10 components with random parameters
and over mixtures fitted to the pixels of random 16x16 patches of scikit-learn's photographs.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from sklearn.datasets import load_sample_images

from posterior_matching import cli
from posterior_matching.models.logistic_mixture import DiscretisedLogisticMixture, logistic_mixture_parameters

_SAMPLES = flags.DEFINE_integer("num_samples", 10_000, "Samples per mixture.", lower_bound=2)

MIXTURES, COMPONENTS, LEVELS = 50, 10, 256


def random_parameters() -> jax.Array:
    """Standard normal parameters, `[MIXTURES, P]`: wide components, many of them beyond the edges."""
    return jax.random.normal(jax.random.key(0), (MIXTURES, logistic_mixture_parameters(3, COMPONENTS)))


def fitted_parameters(steps: int = 200) -> jax.Array:
    """Maximum-likelihood parameters, `[MIXTURES, P]`, of patches of photographs."""
    rng = np.random.default_rng(0)
    image = np.concatenate(load_sample_images().images)  # [height, width, 3]
    corners = rng.integers(0, np.array(image.shape[:2]) - 16, (MIXTURES, 2))
    x = jnp.float32(np.stack([image[i : i + 16, j : j + 16].reshape(-1, 3) for i, j in corners], axis=1))
    initial = random_parameters().reshape(MIXTURES, COMPONENTS, -1)
    initial = initial.at[..., 4:7].add(-2.0).reshape(MIXTURES, -1)  # narrower

    def loss(parameters: jax.Array) -> jax.Array:
        return -DiscretisedLogisticMixture(parameters, 3, LEVELS).log_prob(x).mean(0).sum()

    adam = optax.adam(0.05)

    @jax.jit
    def step(parameters: jax.Array, state: optax.OptState) -> tuple[jax.Array, optax.OptState]:
        updates, state = adam.update(jax.grad(loss)(parameters), state)
        return optax.apply_updates(parameters, updates), state

    parameters, state = initial, adam.init(initial)
    for _ in range(steps):
        parameters, state = step(parameters, state)
    return parameters


def published_mean(parameters: jax.Array) -> jax.Array:
    """The published mean, `[..., 3]`: the channels of one logistic, whose parameters are averages over components."""
    logits, loc, _, shift = jnp.split(parameters.reshape(*parameters.shape[:-1], -1, 10), [1, 4, 7], axis=-1)
    weight = jax.nn.softmax(logits, axis=-2)
    loc, shift = (weight * loc).sum(-2), (weight * shift).sum(-2)
    red = jnp.clip(loc[..., 0], -1.0, 1.0)
    green = jnp.clip(loc[..., 1] + shift[..., 0] * red, -1.0, 1.0)
    blue = jnp.clip(loc[..., 2] + shift[..., 1] * red + shift[..., 2] * green, -1.0, 1.0)
    return jnp.round((jnp.stack([red, green, blue], axis=-1) + 1.0) / 2.0 * (LEVELS - 1))


def main() -> None:
    """Samples and prints."""
    for name, parameters in (("random", random_parameters()), ("fitted", fitted_parameters())):
        p = DiscretisedLogisticMixture(parameters, 3, LEVELS)
        draws = jax.jit(lambda keys, p=p: jax.lax.map(p.sample, keys))(
            jax.random.split(jax.random.key(1), _SAMPLES.value)
        )
        expected, error = draws.mean(0), draws.std(0) / _SAMPLES.value**0.5
        print(f"{name}: standard error of the sample means {float(error.mean()):.2f}")
        for which, mean in (("ours", p.mean), ("published", published_mean(parameters))):
            rms = jnp.sqrt(jnp.square(mean - expected).mean(0))
            print(f"  {which:10} red {rms[0]:6.2f}  green {rms[1]:6.2f}  blue {rms[2]:6.2f}")


if __name__ == "__main__":
    cli.run(main)
