"""Network bodies, which map arrays to features. The heads in `distributions.py` map the features to distributions.

Kernels are initialised from a truncated normal with standard deviation 1 / sqrt(fan_in), biases with zeros.
"""

import functools
import math
from collections.abc import Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from posterior_matching.config import Blocks, Dropout, Width
from posterior_matching.errors import OptionError, UserError
from posterior_matching.numerics.convolution import conv, conv_transpose

Shape = tuple[int, ...]
lecun_normal = nnx.initializers.lecun_normal()
# (filters, kernel size, stride) of each layer.
ConvLayers = Annotated[
    Sequence[tuple[Width, Annotated[int, Field(ge=1, le=256)], Annotated[int, Field(ge=1, le=64)]]], Field(min_length=1)
]

_SMALLEST_SIDE = 8  # of the last feature map of networks that adapt to the image


class Network(nnx.Module):
    """Base class. `rngs` is passed only in training: without it, dropout is off."""

    output_shape: Shape

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Maps `[B, *input_shape]` to `[B, *output_shape]`."""
        return self.after_first(self.first(x), rngs)

    def first(self, x: jax.Array) -> jax.Array:
        """The first layer, which is affine."""
        raise NotImplementedError

    def after_first(self, h: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """The remaining layers."""
        raise NotImplementedError


class ResidualMLP(Network):
    """Pre-activation residual blocks of two linear layers each, `hidden_units` wide, from a flattened input.

    `layer_norm` normalises after every linear layer, without scale or offset; `dropout` is inside each block.
    """

    def __init__(
        self,
        input_shape: Shape,
        residual_blocks: Blocks = 2,
        hidden_units: Width = 256,
        layer_norm: bool = False,
        dropout: Dropout = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        self.output_shape = (hidden_units,)
        self.linear_in = nnx.Linear(math.prod(input_shape), hidden_units, rngs=rngs)
        self.blocks = nnx.List(
            nnx.List(nnx.Linear(hidden_units, hidden_units, rngs=rngs) for _ in range(2))
            for _ in range(residual_blocks)
        )
        self.dropout = nnx.Dropout(dropout)
        self.layer_norm = layer_norm

    def first(self, x: jax.Array) -> jax.Array:
        return self.linear_in(x.reshape(x.shape[0], -1))

    def after_first(self, h: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        h = self._norm(h)
        for first, second in self.blocks:
            residual = self._norm(first(jax.nn.relu(h)))
            residual = self.dropout(jax.nn.relu(residual), deterministic=rngs is None, rngs=rngs)
            h = h + self._norm(second(residual))
        return jax.nn.relu(h)

    def _norm(self, h: jax.Array) -> jax.Array:
        return jax.nn.standardize(h, axis=-1) if self.layer_norm else h


class Conv(nnx.Module):
    """A convolution with bias, computed in the precision of its input; see `convolution.conv`.

    The kernel is `[size, size, features_in, features]`, the padding "SAME" or "VALID".
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        size: int,
        stride: int,
        padding: str,
        *,
        kernel_scale: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_scale * lecun_normal(rngs.params(), (size, size, features_in, features)))
        self.bias = nnx.Param(jnp.zeros(features))
        self.stride, self.padding = stride, padding

    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Convolves `[B, H, W, features_in]`, or arrays that have these channels together, without joining them."""
        kernel, bias = (parameter[...].astype(inputs[0].dtype) for parameter in (self.kernel, self.bias))
        kernels = jnp.split(kernel, np.cumsum([x.shape[-1] for x in inputs])[:-1], axis=2)
        parts = (conv(x, part, self.stride, self.padding) for x, part in zip(inputs, kernels, strict=True))
        out = functools.reduce(jnp.add, parts)
        return out + jnp.broadcast_to(bias, out.shape)  # in one operation; its gradient, too, is one sum


class ConvTranspose(nnx.Module):
    """A transposed convolution with bias; see `convolution.conv_transpose`."""

    def __init__(self, features_in: int, features: int, size: int, stride: int, padding: str, *, rngs: nnx.Rngs):
        kernel = lecun_normal(rngs.params(), (size, size, features_in, features))
        self.kernel = nnx.Param(kernel.swapaxes(2, 3))  # `conv_transpose` takes [K, K, out, in]; fan_in counts `in`
        self.bias = nnx.Param(jnp.zeros(features))
        self.stride, self.padding = stride, padding

    def __call__(self, x: jax.Array) -> jax.Array:
        return conv_transpose(x, self.kernel[...], self.stride, self.padding) + self.bias[...]


class ConvEncoder(Network):
    """Convolutions, each followed by a leaky ReLU; padding SAME, the last layer VALID.

    Without `conv_layers`, they halve the image until its sides are at most 8 pixels long, with 32, 64, 128, 256, 256,
    ... filters.
    """

    def __init__(self, input_shape: Shape, conv_layers: ConvLayers | None = None, *, rngs: nnx.Rngs):
        _require_image(input_shape, "ConvEncoder")
        height, width, channels = input_shape
        if conv_layers is None:
            widths, halved = _pyramid(height, width)
            conv_layers = ((widths[0], 3, 1), *((filters, 4, 2) for filters in widths[1:]), (256, min(halved), 1))
        layers = []
        for i, (filters, size, stride) in enumerate(conv_layers):
            last = i == len(conv_layers) - 1
            if last and size > min(height, width):
                raise OptionError(
                    "conv_layers",
                    f"{{}}: the last layer's kernel ({size}x{size}) exceeds its {height}x{width} input; adapt them to "
                    f"images of shape {input_shape}",
                )
            trim = size - 1 if last else 0
            height, width = (math.ceil((n - trim) / stride) for n in (height, width))
            layers.append(Conv(channels, filters, size, stride, "VALID" if last else "SAME", rngs=rngs))
            channels = filters
        self.layers = nnx.List(layers)
        self.output_shape = (height, width, channels)

    def first(self, x: jax.Array) -> jax.Array:
        return self.layers[0](x)

    def after_first(self, h: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:  # noqa: ARG002 (no dropout here)
        for layer in self.layers[1:]:
            h = layer(jax.nn.leaky_relu(h))
        return jax.nn.leaky_relu(h)


class ConvDecoder(Network):
    """Transposed convolutions from one position, leaky ReLU between them; the first layer VALID, the rest SAME.

    Without `conv_layers`, they are the reverse of what ConvEncoder has by default. `activate_output` adds a leaky ReLU
    after the last layer, as the published implementation does. It shrinks negative Bernoulli logits a hundredfold, so
    by default the output is linear.
    """

    def __init__(
        self,
        input_shape: Shape,
        conv_layers: ConvLayers | None = None,
        activate_output: bool = False,
        *,
        data_shape: Shape = (),
        rngs: nnx.Rngs,
    ):
        (channels,) = input_shape
        crop = None
        if conv_layers is None:
            _require_image(data_shape, "ConvDecoder")
            *crop, data_channels = data_shape
            widths, halved = _pyramid(*crop)
            grown = ((filters, 4, 2) for filters in widths[-2::-1])
            conv_layers = ((widths[-1], max(halved), 1), *grown, (data_channels, 3, 1))
        layers, position = [], 1
        for i, (filters, size, stride) in enumerate(conv_layers):
            layers.append(ConvTranspose(channels, filters, size, stride, "SAME" if i else "VALID", rngs=rngs))
            position = position * stride if i else size
            channels = filters
        self.layers = nnx.List(layers)
        self.activate_output = activate_output
        self.crop = (position, position) if crop is None else tuple(crop)
        self.output_shape = (*self.crop, channels)

    def first(self, x: jax.Array) -> jax.Array:
        return self.layers[0](x[:, None, None, :])

    def after_first(self, h: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:  # noqa: ARG002 (no dropout here)
        for layer in self.layers[1:]:
            h = layer(jax.nn.leaky_relu(h))
        h = h[:, : self.crop[0], : self.crop[1]]
        return jax.nn.leaky_relu(h) if self.activate_output else h


def _pyramid(height: int, width: int) -> tuple[list[int], tuple[int, int]]:
    """Returns the filters of every resolution from the image's to the last, and the size of the last."""
    halvings = max(0, math.ceil(math.log2(max(height, width) / _SMALLEST_SIDE)))
    filters = [min(32 * 2**i, 256) for i in range(halvings + 1)]
    return filters, (math.ceil(height / 2**halvings), math.ceil(width / 2**halvings))


def _require_image(shape: Shape, name: str) -> None:
    if len(shape) != 3:
        raise UserError(f"{name} needs images (H, W, C), but the data have shape {shape}; use ResidualMLP")


NETWORKS = {"ResidualMLP": ResidualMLP, "ConvEncoder": ConvEncoder, "ConvDecoder": ConvDecoder}
