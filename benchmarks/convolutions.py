"""Measures single convolutions and their gradients, beside a large matrix product: the bound of a convolutional step.

    python benchmarks/convolutions.py --pixels 28 --pixels 14 --pixels 7 --width 192 --middle 48

For square images of each size, prints in GFLOP/s the 3x3 convolution of a bottleneck block of `models/vdvae.py` and the
1x1 convolution before it, from `width` to `middle` channels: forward, and the gradients with respect to the input and
to the kernel.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
from absl import flags

from benchmarks import timing
from posterior_matching import cli
from posterior_matching.numerics.convolution import conv

_PIXELS = flags.DEFINE_multi_integer("pixels", [28, 14, 7], "Height of the images; may be repeated.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", 16, "Images at once.", lower_bound=1)
_WIDTH = flags.DEFINE_integer("width", 192, "Channels between blocks.", lower_bound=1)
_MIDDLE = flags.DEFINE_integer("middle", 48, "Channels within a block.", lower_bound=1)


def rates(batch: int, pixels: int, size: int, features_in: int, features_out: int) -> dict[str, float]:
    """Floating-point operations per second of a convolution at stride one and of its two gradients."""
    x = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, features_in))
    y = jax.random.normal(jax.random.key(1), (batch, pixels, pixels, features_out))
    kernel = jax.random.normal(jax.random.key(2), (size, size, features_in, features_out))
    forward = jax.jit(lambda x, kernel: conv(x, kernel, 1, "SAME"))
    input_gradient = jax.jit(lambda kernel, y: jax.vjp(lambda x: conv(x, kernel, 1, "SAME"), x)[1](y)[0])
    kernel_gradient = jax.jit(lambda x, y: jax.vjp(lambda kernel: conv(x, kernel, 1, "SAME"), kernel)[1](y)[0])
    flops = 2 * kernel.size * batch * pixels**2
    return {
        "forward": flops / timing.fastest(forward, x, kernel, repeats=20),
        "input gradient": flops / timing.fastest(input_gradient, kernel, y, repeats=20),
        "kernel gradient": flops / timing.fastest(kernel_gradient, x, y, repeats=20),
    }


def main() -> None:
    """Prints the rates."""
    print(f"large matrix product {timing.matrix_product_flops_per_second() / 1e9:8.0f} GFLOP/s")
    for pixels in _PIXELS.value:
        shapes = {"3x3": (3, _MIDDLE.value, _MIDDLE.value), "1x1": (1, _WIDTH.value, _MIDDLE.value)}
        for name, shape in shapes.items():
            found = rates(_BATCH.value, pixels, *shape)
            cells = "  ".join(f"{what} {rate / 1e9:5.0f}" for what, rate in found.items())
            print(f"{pixels:4} pixels, {name}  {cells}", flush=True)


if __name__ == "__main__":
    cli.run(main)
