"""Measures how fast a PM-VQVAE imputes with and without the sampler's cache, on untrained weights and random images.

    python benchmarks/imputation_speed.py --config configs/pm_vqvae_mnist.py [--batch_size 4] [--num_samples 10]

Prints imputations per second with the actual sampler and with one that recomputes the whole grid for every position.
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from benchmarks import synthetic
from posterior_matching import cli, data, masking
from posterior_matching.models.pixel_cnn import PixelCNN

_CONFIG = cli.config_flag("a config of a PM-VQVAE")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 4, "Number of images.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("num_samples", 10, "Imputations per image.", lower_bound=1)


def main() -> None:
    """Measures and prints."""
    config = _CONFIG.value
    rows = synthetic.dataset(synthetic.dataset_of(cli.config_name(), config), _BATCH_SIZE.value)
    model: Any = synthetic.experiment(cli.config_name(), config, rows).phases[-1].model
    x = data.decode(rows.x, rows.max_value)[0]
    b = jnp.ones((len(x), *masking.mask_shape(x.shape[1:]))).at[:, ::2].set(0.0)

    @nnx.jit
    def remembering(model, x, b):
        return model.impute(x, b, _SAMPLES.value, key=jax.random.key(0))

    @nnx.jit
    def anew(model, x, b):
        condition = jnp.tile(model.conditional_input(x, b), (_SAMPLES.value, 1))
        return model.vqvae.decode(sample_anew(model.pixel_cnn, condition, jax.random.key(0))).mean

    seconds = {name: time_call(fn, model, x, b) for name, fn in (("remembering", remembering), ("anew", anew))}
    count = _BATCH_SIZE.value * _SAMPLES.value
    print(f"device                   {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(
        f"config                   {cli.config_path()}, {_BATCH_SIZE.value} images, {_SAMPLES.value} imputations each"
    )
    print(f"imputations per second   {count / seconds['remembering']:.4g}")
    print(f"without the cache        {count / seconds['anew']:.4g}")
    print(f"ratio                    {seconds['anew'] / seconds['remembering']:.3g}")


def sample_anew(network: PixelCNN, condition: jax.Array, key: jax.Array) -> jax.Array:
    """Draws code grids `[B, H, W]` naively, computing all logits for every position."""
    height, width = network.grid

    def draw(codes, inputs):
        i, j, key = inputs
        code = jax.random.categorical(key, network.logits(codes, condition)[:, i, j])
        return codes.at[:, i, j].set(code), None

    positions = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"), -1).reshape(-1, 2)
    codes = jnp.zeros((len(condition), height, width), jnp.int32)
    return jax.lax.scan(draw, codes, (*positions.T, jax.random.split(key, height * width)))[0]


def time_call(fn, *arguments, repeats: int = 3) -> float:
    """Seconds of the fastest of `repeats` calls, after one that compiles."""
    jax.block_until_ready(fn(*arguments))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(fn(*arguments))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    cli.run(main)
