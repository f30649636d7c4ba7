"""The Inception network of the Fréchet Inception Distance (Heusel et al. 2017, arXiv 1706.08500).

It is Inception v3 (Szegedy et al. 2016, arXiv 1512.00567) as of 2015-12-05, whose pooling differs in places from later
versions.
"""

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

    A branch is a list of steps: `(name, features, (rows, columns))` is a convolution that keeps the size, or, with a
    stride as fourth entry, one without padding; "mean" and "max" pool 3x3 at stride one, "max/2" at stride two; a list
    of steps in place of one applies them in parallel.
    """

    def __init__(self, features_in: int, *branches: list[Any]):
        self.convs: nnx.Dict = nnx.Dict()
        self.features, self.branches = 0, branches

        def build(step: Any, features: int) -> int:
            if isinstance(step, str):
                return features
            if isinstance(step, list):
                return sum(build(part, features) for part in step)
            name, features_out, size, *stride = step
            padding = (0, 0) if stride else tuple(n // 2 for n in size)
            self.convs[name] = ConvNorm(features, features_out, size, stride[0] if stride else 1, padding)
            return features_out

        for branch in branches:
            features = features_in
            for step in branch:
                features = build(step, features)
            self.features += features

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, H', W', features]`."""

        def apply(step: Any, x: jax.Array) -> jax.Array:
            if isinstance(step, list):
                return jnp.concatenate([apply(part, x) for part in step], axis=-1)
            return _POOLS[step](x) if isinstance(step, str) else self.convs[step[0]](x)

        outputs = []
        for branch in self.branches:
            y = x
            for step in branch:
                y = apply(step, y)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=-1)


def _pool(x: jax.Array, initial: float, reduce: Any, stride: int, padding: str) -> jax.Array:
    return lax.reduce_window(x, initial, reduce, (1, 3, 3, 1), (1, stride, stride, 1), padding)


_POOLS = {
    # The mean over the 3x3 positions inside the image: padding does not count.
    "mean": lambda x: _pool(x, 0.0, lax.add, 1, "SAME") / _pool(jnp.ones_like(x), 0.0, lax.add, 1, "SAME"),
    "max": lambda x: _pool(x, -jnp.inf, lax.max, 1, "SAME"),
    "max/2": lambda x: _pool(x, -jnp.inf, lax.max, 2, "VALID"),
}


def _block_a(pool_features: int) -> list[list[Any]]:
    return [
        [("branch1x1", 64, (1, 1))],
        [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3))],
        ["mean", ("branch_pool", pool_features, (1, 1))],
    ]


def _block_b() -> list[list[Any]]:
    return [
        [("branch3x3", 384, (3, 3), 2)],
        [("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3), 2)],
        ["max/2"],
    ]


def _block_c(n: int) -> list[list[Any]]:
    return [
        [("branch1x1", 192, (1, 1))],
        [("branch7x7_1", n, (1, 1)), ("branch7x7_2", n, (1, 7)), ("branch7x7_3", 192, (7, 1))],
        [
            ("branch7x7dbl_1", n, (1, 1)),
            ("branch7x7dbl_2", n, (7, 1)),
            ("branch7x7dbl_3", n, (1, 7)),
            ("branch7x7dbl_4", n, (7, 1)),
            ("branch7x7dbl_5", 192, (1, 7)),
        ],
        ["mean", ("branch_pool", 192, (1, 1))],
    ]


def _block_d() -> list[list[Any]]:
    return [
        [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), 2)],
        [
            ("branch7x7x3_1", 192, (1, 1)),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, (3, 3), 2),
        ],
        ["max/2"],
    ]


def _block_e(pool: str) -> list[list[Any]]:
    return [
        [("branch1x1", 320, (1, 1))],
        [("branch3x3_1", 384, (1, 1)), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
        [
            ("branch3x3dbl_1", 448, (1, 1)),
            ("branch3x3dbl_2", 384, (3, 3)),
            [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
        ],
        [pool, ("branch_pool", 192, (1, 1))],
    ]


_STEM = [
    ("Conv2d_1a_3x3", 32, (3, 3), 2),
    ("Conv2d_2a_3x3", 32, (3, 3), 1),
    ("Conv2d_2b_3x3", 64, (3, 3)),
    "max/2",
    ("Conv2d_3b_1x1", 80, (1, 1)),
    ("Conv2d_4a_3x3", 192, (3, 3), 1),
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
