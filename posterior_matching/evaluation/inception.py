"""The Inception network of the Fréchet Inception Distance (Heusel et al. 2017, arXiv 1706.08500).

It is Inception v3 (Szegedy et al. 2016, arXiv 1512.00567) as of 2015-12-05, whose pooling differs in places from later
versions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class ConvNorm(nnx.Module):
    """A convolution without bias, batch normalisation with stored statistics, ReLU; `padding` in rows and columns."""

    def __init__(self, features_in: int, features: int, size: tuple[int, int], stride: int, padding: tuple[int, int]):
        self.kernel = nnx.Param(jnp.zeros((*size, features_in, features)))
        self.scale, self.bias = nnx.Param(jnp.ones(features)), nnx.Param(jnp.zeros(features))
        self.mean, self.var = nnx.Param(jnp.zeros(features)), nnx.Param(jnp.ones(features))
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', features]`."""
        pads, layout = [(p, p) for p in self.padding], ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, self.kernel[...], (self.stride,) * 2, pads, dimension_numbers=layout)
        x = (x - self.mean[...]) * (self.scale[...] * lax.rsqrt(self.var[...] + 1e-3)) + self.bias[...]
        return jax.nn.relu(x)


class InceptionBlock(nnx.Module):
    """Parallel branches with concatenated outputs.

    A branch is a list of steps: `(name, features, rows, columns)` is a convolution that keeps the size, or, with a
    stride as fifth entry, one without padding; "mean" and "max" pool 3x3 at stride one, "max/2" at stride two; a list
    of branches applies them in parallel.
    """

    def __init__(self, features_in: int, *branches: list[Any]):
        self.convs: nnx.Dict = nnx.Dict()
        self.branches = branches

        def build(features: int, step: Any) -> int:
            if isinstance(step, str):
                return features
            if not isinstance(step[0], str):
                return sum(functools.reduce(build, branch, features) for branch in step)
            name, features_out, *size, stride = step if len(step) == 5 else (*step, None)
            padding = (0, 0) if stride else (size[0] // 2, size[1] // 2)
            self.convs[name] = ConvNorm(features, features_out, (size[0], size[1]), stride or 1, padding)
            return features_out

        self.features = build(features_in, branches)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', features]`."""

        def apply(x: jax.Array, step: Any) -> jax.Array:
            if isinstance(step, str):
                return _POOLS[step](x)
            if isinstance(step[0], str):
                return self.convs[step[0]](x)
            return jnp.concatenate([functools.reduce(apply, branch, x) for branch in step], axis=-1)

        return apply(x, self.branches)


def _pool(x: jax.Array, initial: float, reduce: Any, stride: int, padding: str) -> jax.Array:
    return lax.reduce_window(x, initial, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)


_POOLS = {
    # The mean over the 3x3 positions inside the image: padding does not count.
    "mean": lambda x: _pool(x, 0.0, lax.add, 1, "SAME") / _pool(jnp.ones_like(x), 0.0, lax.add, 1, "SAME"),
    "max": lambda x: _pool(x, -jnp.inf, lax.max, 1, "SAME"),
    "max/2": lambda x: _pool(x, -jnp.inf, lax.max, 2, "VALID"),
}


def _convs(name: str, *steps: tuple[int, ...]) -> list[Any]:
    """Convolutions name_1, name_2, ... of (features, rows, columns) and perhaps a stride."""
    return [(f"{name}_{number}", *step) for number, step in enumerate(steps, start=1)]


def _block_a(pool_features: int) -> list[list[Any]]:
    return [
        [("branch1x1", 64, 1, 1)],
        _convs("branch5x5", (48, 1, 1), (64, 5, 5)),
        _convs("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3)),
        ["mean", ("branch_pool", pool_features, 1, 1)],
    ]


def _block_b() -> list[list[Any]]:
    return [
        [("branch3x3", 384, 3, 3, 2)],
        _convs("branch3x3dbl", (64, 1, 1), (96, 3, 3), (96, 3, 3, 2)),
        ["max/2"],
    ]


def _block_c(n: int) -> list[list[Any]]:
    return [
        [("branch1x1", 192, 1, 1)],
        _convs("branch7x7", (n, 1, 1), (n, 1, 7), (192, 7, 1)),
        _convs("branch7x7dbl", (n, 1, 1), (n, 7, 1), (n, 1, 7), (n, 7, 1), (192, 1, 7)),
        ["mean", ("branch_pool", 192, 1, 1)],
    ]


def _block_d() -> list[list[Any]]:
    return [
        _convs("branch3x3", (192, 1, 1), (320, 3, 3, 2)),
        _convs("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3, 2)),
        ["max/2"],
    ]


def _block_e(pool: str) -> list[list[Any]]:
    def both(name: str) -> list[list[Any]]:
        return [[(f"{name}a", 384, 1, 3)], [(f"{name}b", 384, 3, 1)]]

    return [
        [("branch1x1", 320, 1, 1)],
        [*_convs("branch3x3", (384, 1, 1)), both("branch3x3_2")],
        [*_convs("branch3x3dbl", (448, 1, 1), (384, 3, 3)), both("branch3x3dbl_3")],
        [pool, ("branch_pool", 192, 1, 1)],
    ]


_STEM = [
    ("Conv2d_1a_3x3", 32, 3, 3, 2),
    ("Conv2d_2a_3x3", 32, 3, 3, 1),
    ("Conv2d_2b_3x3", 64, 3, 3),
    "max/2",
    ("Conv2d_3b_1x1", 80, 1, 1),
    ("Conv2d_4a_3x3", 192, 3, 3, 1),
    "max/2",
]
_BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _block_b(),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _block_d(),
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}


_NORM_PARAMETERS = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}  # PyTorch's names


class Inception(nnx.Module):
    """The network up to its last pooling, `pool3`; layers are named as in torchvision, to load its weights."""

    def __init__(self) -> None:
        self.stem = InceptionBlock(3, _STEM)
        self.blocks: nnx.Dict = nnx.Dict()
        features = self.stem.features
        for name, branches in _BLOCKS.items():
            self.blocks[name] = InceptionBlock(features, *branches)
            features = self.blocks[name].features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[B, H, W, C]` in [0, 1], C = 1 or 3, to `[B, 2048]`."""
        x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
        x = jax.image.resize(x, (len(x), 299, 299, 3), "bilinear", antialias=False)
        x = self.stem(2 * x - 1)
        for block in self.blocks.values():
            x = block(x)
        return x.mean((1, 2))  # over positions

    def load(self, weights: dict[str, np.ndarray]) -> "Inception":
        """Sets the weights from arrays named and laid out as in torchvision, and returns the network."""
        layers = dict(self.stem.convs.items())
        layers |= {f"{b}.{name}": c for b, block in self.blocks.items() for name, c in block.convs.items()}
        for name, layer in layers.items():
            layer.kernel[...] = jnp.asarray(weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0))  # OIHW -> HWIO
            for parameter, published in _NORM_PARAMETERS.items():
                getattr(layer, parameter)[...] = jnp.asarray(weights[f"{name}.bn.{published}"])
        return self
