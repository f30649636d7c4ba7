"""A conditional PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517) over grids of codes.

Two stacks of layers run side by side: the vertical one sees all rows above a position, the horizontal one the positions
to its left in its own row, and the vertical stack. So code (i, j) depends on the codes before it in raster order only.

The stacks are written once, for any *view* of the grid. `_WholeGrid` is all positions at once, for training.
`_OneRow` and `_OnePosition` are for sampling: they remember what a layer has seen at earlier positions, so that a new
code costs one position's work and a whole grid no more than one pass.
"""

import math
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from pydantic import Field

from posterior_matching.config import Blocks, Dropout, Units
from posterior_matching.errors import OptionError

_ABOVE, _LEFT = 2, 1  # margins of what sampling remembers: no layer looks further up, or further to a side
_kernel_init = nnx.initializers.lecun_normal()


def concat_elu(x: jax.Array) -> jax.Array:
    """ELU of x and of -x, side by side: `[..., C]` to `[..., 2 C]`."""
    return jax.nn.elu(jnp.concatenate([x, -x], axis=-1))


class CausalConv(nnx.Module):
    """A convolution that sees, from position (i, j), rows i + rows[0] to i + rows[1] and columns likewise.

    With stride 2, output (i, j) stands at (2 i, 2 j) of the input.
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        rows: tuple[int, int],
        columns: tuple[int, int],
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        size = (rows[1] - rows[0] + 1, columns[1] - columns[0] + 1)
        self.kernel = nnx.Param(_kernel_init(rngs.params(), (*size, features_in, features)))
        self.bias = nnx.Param(jnp.zeros(features))
        self.rows, self.columns, self.stride = rows, columns, stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), features]`."""
        pads = [(-low, high) for low, high in (self.rows, self.columns)]
        layout = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, self.kernel[...], (self.stride,) * 2, pads, dimension_numbers=layout)
        return y + self.bias[...]

    def at(self, window: list[jax.Array]) -> jax.Array:
        """The output where the input, over the kernel's window in raster order, is the given list of `[..., C]`."""
        kernel = self.kernel[...].reshape(-1, self.kernel.shape[-1])
        return jnp.concatenate(window, axis=-1) @ kernel + self.bias[...]


class GatedResidual(nnx.Module):
    """The residual layer of both stacks: two convolutions, a gate, the other stack and the condition on the way."""

    def __init__(
        self,
        features: int,
        features_beside: int,
        conditional_dim: int,
        dropout: float,
        rows: tuple[int, int],
        columns: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        self.first = CausalConv(2 * features, features, rows, columns, rngs=rngs)
        self.second = CausalConv(2 * features, 2 * features, rows, columns, rngs=rngs)
        self.beside = nnx.Linear(2 * features_beside, features, rngs=rngs) if features_beside else None
        self.condition = nnx.Linear(conditional_dim, 2 * features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x, beside, condition, view, level, rngs):
        h = view.conv(self.first, concat_elu(x), level)
        if beside:
            h = h + self.beside(concat_elu(jnp.concatenate(beside, axis=-1)))
        h = self.dropout(concat_elu(h), deterministic=rngs is None, rngs=rngs)
        h = view.conv(self.second, h, level) + view.spread(self.condition(condition))
        value, gate = jnp.split(h, 2, axis=-1)
        return x + value * jax.nn.sigmoid(gate)


class Stack(nnx.Module):
    """One of the two stacks: `num_resnet` layers down every hierarchy, and as many up again with skip connections.

    Args:
        rows: What its convolutions see.
        columns: What its convolutions see.
        sees_other: Whether every layer also sees the other stack, at the same position.
        options: `num_resnet`, `num_filters`, `num_hierarchies`, `dropout`, `conditional_dim`.
        rngs: Source of initial weights.
    """

    def __init__(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        sees_other: bool,
        *,
        num_resnet: int,
        num_filters: int,
        num_hierarchies: int,
        dropout: float,
        conditional_dim: int,
        rngs: nnx.Rngs,
    ):
        f, other = num_filters, num_filters if sees_other else 0

        def layers(count: int, features_beside: int) -> nnx.List:
            shared = (conditional_dim, dropout, rows, columns)
            return nnx.List(GatedResidual(f, features_beside, *shared, rngs=rngs) for _ in range(count))

        bottom = num_hierarchies - 1
        self.down = nnx.List(layers(num_resnet, other) for _ in range(num_hierarchies))
        # Above the lowest hierarchy there is one more to go up: the skip of the layer that entered the hierarchy.
        self.up = nnx.List(layers(num_resnet + (level < bottom), other + f) for level in range(num_hierarchies))
        self.shrink = nnx.List(CausalConv(f, f, rows, columns, stride=2, rngs=rngs) for _ in range(bottom))
        self.grow = nnx.List(nnx.Linear(f, 4 * f, rngs=rngs) for _ in range(bottom))  # to the 2x2 positions below

    def __call__(
        self, h: jax.Array, other: list[jax.Array] | None, condition: jax.Array, view: Any, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Returns the features, and the output of every layer, for the other stack to see (`other`)."""
        remaining = None if other is None else iter(other)
        outputs = []

        def layer(block: GatedResidual, h: jax.Array, skip: list[jax.Array], level: int) -> jax.Array:
            beside = skip if remaining is None else [view.other(next(remaining), level), *skip]
            outputs.append(block(h, beside, condition, view, level, rngs))
            return outputs[-1]

        skips = [h]
        for level, blocks in enumerate(self.down):
            if level:
                h = view.conv(self.shrink[level - 1], h, level - 1)
                skips.append(h)
            for block in blocks:
                h = layer(block, h, [], level)
                skips.append(h)
        skips.pop()
        for level in reversed(range(len(self.up))):
            for block in self.up[level]:
                h = layer(block, h, [skips.pop()], level)
            if level:
                h = view.grow(self.grow[level - 1](h), level - 1)
        return h, outputs


class PixelCNN(nnx.Module):
    """p(codes | condition) = prod over positions, in raster order, of a categorical distribution over the codebook.

    Args:
        grid: Height and width of the code grid.
        codebook_size: K, number of codes.
        conditional_dim: Length of the conditional input.
        num_resnet: Layers down, and up again, in every hierarchy.
        num_filters: Channels.
        num_hierarchies: Resolutions; each below the first halves the grid.
        dropout: Share of units dropped in every layer while training.
        rngs: Source of initial weights.

    Raises:
        UserError: A size is below one, or the grid is too small for so many hierarchies.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        codebook_size: int,
        conditional_dim: int,
        num_resnet: Annotated[Blocks, Field(ge=1)],
        num_filters: Units,
        num_hierarchies: Annotated[int, Field(ge=1, le=16)] = 1,
        dropout: Dropout = 0.5,
        rngs: nnx.Rngs,
    ):
        sizes = {"num_resnet": num_resnet, "num_filters": num_filters, "num_hierarchies": num_hierarchies}
        if 2 ** (num_hierarchies - 1) > min(grid):
            raise OptionError(
                "num_hierarchies",
                f"a code grid of {grid[0]}x{grid[1]} cannot be halved {num_hierarchies - 1} times: lower {{}}",
            )
        self.grid, f = tuple(grid), num_filters
        self.embedding = nnx.Embed(codebook_size, f, rngs=rngs)
        # The first layers leave the current position out, so everything behind them may include it.
        self.vertical_in = CausalConv(f, f, rows=(-2, -1), columns=(-1, 1), rngs=rngs)
        self.horizontal_in_above = CausalConv(f, f, rows=(-1, -1), columns=(-1, 1), rngs=rngs)
        self.horizontal_in_left = CausalConv(f, f, rows=(0, 0), columns=(-1, -1), rngs=rngs)
        options = sizes | {"dropout": dropout, "conditional_dim": conditional_dim, "rngs": rngs}
        self.vertical = Stack(rows=(-1, 0), columns=(-1, 1), sees_other=False, **options)
        self.horizontal = Stack(rows=(-1, 0), columns=(-1, 0), sees_other=True, **options)
        self.out = nnx.Linear(f, codebook_size, rngs=rngs)

    def logits(self, codes: jax.Array, condition: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `[B, H, W, K]` of every code given those before it; one pass.

        Args:
            codes: `[B, H, W]`, int32.
            condition: `[B, conditional_dim]`.
            rngs: Dropout stream, while training.
        """
        view, embedded = _WholeGrid(self.grid), self.embedding(codes)
        _, beside = self._vertical_pass(embedded, condition, view, rngs)
        return self._horizontal_pass(embedded, beside, condition, view, rngs)

    def log_prob(self, codes: jax.Array, condition: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log p(codes | condition) in nats, `[B]`; arguments as those of `logits`."""
        log_probs = jax.nn.log_softmax(self.logits(codes, condition, rngs))
        return jnp.take_along_axis(log_probs, codes[..., None], axis=-1).sum((1, 2, 3))  # over positions

    def sample(self, condition: jax.Array, key: jax.Array) -> jax.Array:
        """Draws codes, int32 `[B, H, W]`, given `condition: [B, conditional_dim]`; one position after the other."""
        height, width = self.grid

        def row(i, embedded, memory=None):
            view = _OneRow(self.grid, i, memory)
            _, beside = self._vertical_pass(embedded, condition, view)
            return beside, view.memory

        def position(i, j, embedded, beside, memory=None):
            view = _OnePosition(self.grid, i, j, memory)
            return self._horizontal_pass(embedded, beside, condition, view), view.memory

        def draw_row(carry, inputs):
            i, keys = inputs
            embedded, row_memory, position_memory = carry
            beside, row_memory = row(i, embedded, row_memory)

            def draw(carry, inputs):
                j, key = inputs
                embedded, position_memory = carry
                logits, position_memory = position(i, j, embedded, beside, position_memory)
                codes = jax.random.categorical(key, logits)  # [B]
                embedded = embedded.at[i + _ABOVE, j + _LEFT].set(self.embedding(codes))
                return (embedded, position_memory), codes

            (embedded, position_memory), codes = lax.scan(draw, (embedded, position_memory), (jnp.arange(width), keys))
            return (embedded, row_memory, position_memory), codes

        features = self.embedding.embedding.shape[-1]
        embedded = jnp.zeros((height + _ABOVE, width + 2 * _LEFT, len(condition), features))
        beside, row_memory = jax.eval_shape(row, 0, embedded)
        _, position_memory = jax.eval_shape(position, 0, 0, embedded, beside)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (row_memory, position_memory))
        inputs = (jnp.arange(height), jax.random.split(key, (height, width)))
        _, codes = lax.scan(draw_row, (embedded, *zeros), inputs)  # [H, W, B]
        return jnp.moveaxis(codes, -1, 0)

    def _vertical_pass(self, embedded, condition, view, rngs=None):
        h = view.read(self.vertical_in, embedded, level=0)
        return self.vertical(h, None, condition, view, rngs)

    def _horizontal_pass(self, embedded, beside, condition, view, rngs=None):
        h = view.read(self.horizontal_in_above, embedded, level=0) + view.read(
            self.horizontal_in_left, embedded, level=0
        )
        h, _ = self.horizontal(h, beside, condition, view, rngs)
        return self.out(jax.nn.elu(h))


class _WholeGrid:
    """All positions at once: features are `[B, H, W, C]`; level l of the hierarchies has `ceil(H / 2^l)` rows."""

    def __init__(self, grid: tuple[int, int]):
        self._grid = grid

    def conv(self, conv: CausalConv, x: jax.Array, level: int) -> jax.Array:
        """Applies a convolution whose input stands at `level`."""
        return self.read(conv, x, level)

    def read(self, conv: CausalConv, x: jax.Array, level: int) -> jax.Array:  # noqa: ARG002 (the same at all levels)
        """Applies a convolution to what is there already."""
        return conv(x)

    def spread(self, condition: jax.Array) -> jax.Array:
        """Gives `[B, C]` the axes of the positions."""
        return condition[:, None, None, :]

    def other(self, features: jax.Array, level: int) -> jax.Array:  # noqa: ARG002 (the same at all levels)
        """The features of the other stack that belong to the positions in view."""
        return features

    def grow(self, y: jax.Array, level: int) -> jax.Array:
        """Spreads `[B, h, w, 4 C]` over the 2x2 positions below each: `[B, H, W, C]` of `level`."""
        n, h, w, _ = y.shape
        y = y.reshape(n, h, w, 2, 2, -1).swapaxes(2, 3).reshape(n, 2 * h, 2 * w, -1)
        height, width = _size(self._grid, level)
        return y[:, :height, :width]


class _OneRow:
    """Row i (at level l: row i // 2^l), for sampling: features are `[W, B, C]`.

    `memory` holds what every convolution, in the order of their calls, has seen so far: `[H, W, B, C]` with margins of
    zeros. None begins with nothing seen.
    """

    def __init__(self, grid: tuple[int, int], i: Any, memory: list[jax.Array] | None):
        self._grid, self._i, self._before, self.memory = grid, i, memory and iter(memory), []

    def conv(self, conv: CausalConv, x: jax.Array, level: int) -> jax.Array:
        row = (self._i >> level) + _ABOVE
        seen = self._remembered(x.shape[-2:], level)
        self.memory.append(lax.dynamic_update_slice(seen, x[None], (row, _LEFT, 0, 0)))
        return self.read(conv, self.memory[-1], level)

    def read(self, conv: CausalConv, seen: jax.Array, level: int) -> jax.Array:
        above, width = _first(self._i, level, conv.rows[0], conv.stride) + _ABOVE, _size(self._grid, level)[1]
        rows = lax.dynamic_slice_in_dim(seen, above, conv.rows[1] - conv.rows[0] + 1)
        starts = range(_LEFT + conv.columns[0], _LEFT + conv.columns[1] + 1)
        return conv.at([row[start : start + width : conv.stride] for row in rows for start in starts])

    def spread(self, condition: jax.Array) -> jax.Array:
        return condition

    def grow(self, y: jax.Array, level: int) -> jax.Array:
        w, n, _ = y.shape
        y = y.reshape(w, n, 2, 2, -1)  # the last three: row, column, C
        y = lax.dynamic_index_in_dim(y, (self._i >> level) & 1, axis=2, keepdims=False)  # [w, B, 2, C]
        return y.swapaxes(1, 2).reshape(2 * w, n, -1)[: _size(self._grid, level)[1]]

    def _remembered(self, shape: tuple[int, int], level: int) -> jax.Array:
        height, width = _size(self._grid, level)
        return jnp.zeros((height + _ABOVE, width + 2 * _LEFT, *shape)) if self._before is None else next(self._before)


class _OnePosition(_OneRow):
    """Position (i, j), for sampling: features are `[B, C]`."""

    def __init__(self, grid: tuple[int, int], i: Any, j: Any, memory: list[jax.Array] | None):
        super().__init__(grid, i, memory)
        self._j = j

    def conv(self, conv: CausalConv, x: jax.Array, level: int) -> jax.Array:
        at = ((self._i >> level) + _ABOVE, (self._j >> level) + _LEFT)
        seen = self._remembered(x.shape, level)
        self.memory.append(lax.dynamic_update_slice(seen, x[None, None], (*at, 0, 0)))
        return self.read(conv, self.memory[-1], level)

    def read(self, conv: CausalConv, seen: jax.Array, level: int) -> jax.Array:
        above = _first(self._i, level, conv.rows[0], conv.stride) + _ABOVE
        left = _first(self._j, level, conv.columns[0], conv.stride) + _LEFT
        size = conv.kernel.shape[:2]
        window = lax.dynamic_slice(seen, (above, left, 0, 0), (*size, *seen.shape[2:]))
        return conv.at(list(window.reshape(math.prod(size), *seen.shape[2:])))

    def other(self, features: jax.Array, level: int) -> jax.Array:
        return lax.dynamic_index_in_dim(features, self._j >> level, keepdims=False)

    def grow(self, y: jax.Array, level: int) -> jax.Array:
        which = 2 * ((self._i >> level) & 1) + ((self._j >> level) & 1)
        return lax.dynamic_index_in_dim(y.reshape(len(y), 4, -1), which, axis=1, keepdims=False)


def _size(grid: tuple[int, int], level: int) -> tuple[int, int]:
    """Rows and columns of a level."""
    return -(-grid[0] // 2**level), -(-grid[1] // 2**level)


def _first(index: Any, level: int, offset: int, stride: int) -> Any:
    """First row (or column) that a convolution at row (or column) `index` of the grid sees of its input's level."""
    return (index >> level) // stride * stride + offset
