"""A conditional PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517) over grids of codes.

Two stacks of layers: the vertical one sees all rows above a position; the horizontal one sees the positions to its left
in its own row, and the vertical stack. So code (i, j) depends only on the codes before it in raster order.

The layers compute a `Region` of the grid: all of it in training, and one row (vertical stack) or one position
(horizontal stack) at a time in sampling. When sampling, a cache keeps the input of every convolution at earlier
positions, so a new code costs one position's work and a whole grid no more than one pass.
"""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from pydantic import Field

from posterior_matching.config import Blocks, Dropout, Scale, Width
from posterior_matching.errors import OptionError
from posterior_matching.models.networks import lecun_normal

# The input of every convolution at the positions computed so far, by the convolution's name, and under "embedding" the
# embedded codes drawn so far: [ABOVE + H, SIDE + W + SIDE, B, C] at the depth of the input, with zeros elsewhere.
# (Positions come first so that a region is contiguous.)
Cache = dict[str, jax.Array]
ABOVE, SIDE = 2, 1  # margins of zeros: no convolution looks further up or sideways


class Region(NamedTuple):
    """A rectangle of positions of the code grid."""

    row: jax.Array | int  # the first
    column: jax.Array | int  # the first
    height: int
    width: int

    def at(self, depth: int) -> "Region":
        """The region at a depth of the hierarchies, where the grid has been halved `depth` times (rounding up)."""
        return Region(self.row >> depth, self.column >> depth, -(-self.height // 2**depth), -(-self.width // 2**depth))


class Pass(NamedTuple):
    """What all layers of one pass over a region are given."""

    condition: jax.Array  # [B, conditional_dim]
    region: Region
    cache: Cache | None = None  # inputs of the convolutions at earlier positions; None: the region is the whole grid
    rngs: nnx.Rngs | None = None  # dropout stream, while training


def concat_elu(x: jax.Array) -> jax.Array:
    """ELU of x and of -x: `[..., C]` to `[..., 2 C]`."""
    return jax.nn.elu(jnp.concatenate([x, -x], axis=-1))


class CausalConv(nnx.Module):
    """A convolution that sees, from position (i, j), rows i + rows[0] to i + rows[1] and columns likewise.

    With stride 2, output (i, j) is at (2 i, 2 j) of the input. This uses XLA's own convolution, as
    `numerics.convolution` is for square, centred kernels and gains nothing at stride 1.

    Attributes:
        name: Key of its input in the cache, set by `PixelCNN`.
        depth: Depth of its input in the hierarchies.
        output_depth: Depth of its output in the hierarchies.
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        rows: tuple[int, int],
        columns: tuple[int, int],
        depth: int = 0,
        stride: int = 1,
        *,
        rngs: nnx.Rngs,
    ):
        size = (rows[1] - rows[0] + 1, columns[1] - columns[0] + 1)
        self.kernel = nnx.Param(lecun_normal(rngs.params(), (*size, features_in, features)))
        self.bias = nnx.Param(jnp.zeros(features))
        self.rows, self.columns, self.stride, self.name = rows, columns, stride, ""
        self.depth, self.output_depth = depth, depth + (stride > 1)

    def __call__(self, x: jax.Array, region: Region, cache: Cache | None = None) -> jax.Array:
        """Maps the input at a region, `[B, h, w, C]`, to `[B, ceil(h / stride), ceil(w / stride), features]`.

        It is also written into the cache, if there is one.
        """
        if cache is None:
            pads, layout = [(-low, high) for low, high in (self.rows, self.columns)], ("NHWC", "HWIO", "NHWC")
            y = lax.conv_general_dilated(x, self.kernel[...], (self.stride,) * 2, pads, dimension_numbers=layout)
            return y + self.bias[...]
        cache[self.name] = write(cache[self.name], x, region.at(self.depth))
        return self.read(cache[self.name], region)

    def read(self, cached: jax.Array, region: Region) -> jax.Array:
        """The output of a region, from an entry of the cache. It has few positions, so a matrix product is fastest."""
        out, (kernel_height, kernel_width, *_) = region.at(self.output_depth), self.kernel.shape
        top = out.row * self.stride + ABOVE + self.rows[0]
        left = out.column * self.stride + SIDE + self.columns[0]
        height, width = (out.height - 1) * self.stride + 1, (out.width - 1) * self.stride + 1
        size = (height + kernel_height - 1, width + kernel_width - 1, *cached.shape[2:])
        window = lax.dynamic_slice(cached, (top, left, 0, 0), size)
        taps = [
            window[i : i + height : self.stride, j : j + width : self.stride]
            for i, j in np.ndindex(kernel_height, kernel_width)
        ]
        x = jnp.moveaxis(jnp.concatenate(taps, axis=-1), 2, 0)  # [B, h, w, taps * C]
        return x @ self.kernel[...].reshape(-1, self.kernel.shape[-1]) + self.bias[...]


def write(cached: jax.Array, x: jax.Array, region: Region) -> jax.Array:
    """Writes the features x, `[B, h, w, C]`, of a region into an entry of the cache."""
    return lax.dynamic_update_slice(cached, jnp.moveaxis(x, 0, 2), (region.row + ABOVE, region.column + SIDE, 0, 0))


class UpsamplingLinear(nnx.Linear):
    """Doubles the grid: position (i, j) feeds the 2x2 positions from (2 i, 2 j) on.

    With `left` it also feeds the two positions to their left, as the vertical stack may, since it sees entire rows.
    """

    def __init__(self, features: int, depth: int, left: bool, *, rngs: nnx.Rngs):
        super().__init__(features, 2 * (2 + left) * features, rngs=rngs)
        self.depth, self.left = depth, left

    def upsample(self, x: jax.Array, region: Region) -> jax.Array:
        """Maps the features `[B, h, w, C]` of a region at `depth` to the region at `depth - 1`."""
        batch, height, width, features = x.shape
        fed = self(x).reshape(batch, height, width, 2, 2 + self.left, features)
        y = fed[..., -2:, :]
        if self.left:  # column 2 j - 1 is the second one fed by j - 1
            y = y.at[:, :, :-1, :, 1].add(fed[:, :, 1:, :, 0])
        y = y.swapaxes(2, 3).reshape(batch, 2 * height, 2 * width, features)
        coarse, fine = region.at(self.depth), region.at(self.depth - 1)
        return crop(y, Region(fine.row - 2 * coarse.row, fine.column - 2 * coarse.column, fine.height, fine.width))


def crop(x: jax.Array, region: Region) -> jax.Array:
    """The features of a region of `[B, h, w, C]`."""
    return lax.dynamic_slice(x, (0, region.row, region.column, 0), (len(x), region.height, region.width, x.shape[-1]))


class GatedResidual(nnx.Module):
    """The residual layer of both stacks: two convolutions and a gate.

    It also sees auxiliary features at the same positions: a skip connection, the other stack, or both.
    """

    def __init__(
        self,
        features: int,
        auxiliary_features: int,
        conditional_dim: int,
        dropout: float,
        rows: tuple[int, int],
        columns: tuple[int, int],
        depth: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.depth = depth
        self.first = CausalConv(2 * features, features, rows, columns, depth, rngs=rngs)
        self.second = CausalConv(2 * features, 2 * features, rows, columns, depth, rngs=rngs)
        # Of the auxiliary features; saved runs have its weights under this name.
        self.beside = nnx.Linear(2 * auxiliary_features, features, rngs=rngs) if auxiliary_features else None
        self.condition = nnx.Linear(conditional_dim, 2 * features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, auxiliary: Sequence[jax.Array], given: Pass) -> jax.Array:
        """Maps `[B, h, w, features]`, the input at the region, to the same shape."""
        condition, region, cache, rngs = given
        h = self.first(concat_elu(x), region, cache)
        if self.beside is not None:
            h = h + self.beside(concat_elu(jnp.concatenate(auxiliary, axis=-1)))
        h = self.dropout(concat_elu(h), deterministic=rngs is None, rngs=rngs)
        h = self.second(h, region, cache) + self.condition(condition)[:, None, None, :]
        value, gate = jnp.split(h, 2, axis=-1)
        return x + value * jax.nn.sigmoid(gate)


class Stack(nnx.Module):
    """One of the two stacks: `num_resnet` layers down every hierarchy, and as many up again with skip connections.

    `rows` and `columns` are those that its convolutions see, `vertical` says which stack it is; see `PixelCNN` for the
    rest. Each horizontal layer also sees the vertical one of the same number.
    """

    def __init__(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        vertical: bool,
        *,
        num_resnet: int,
        num_filters: int,
        num_hierarchies: int,
        dropout: float,
        conditional_dim: int,
        rngs: nnx.Rngs,
    ):
        f, bottom = num_filters, num_hierarchies - 1
        other = 0 if vertical else f

        def layers(count: int, auxiliary: int, depth: int) -> nnx.List:
            options = (f, auxiliary, conditional_dim, dropout, rows, columns, depth)
            return nnx.List(GatedResidual(*options, rngs=rngs) for _ in range(count))

        self.down = nnx.List(layers(num_resnet, other, depth) for depth in range(num_hierarchies))
        # Every hierarchy but the lowest has one more layer on the way up, for the skip from the hierarchy's input.
        self.up = nnx.List(layers(num_resnet + (depth < bottom), other + f, depth) for depth in range(num_hierarchies))
        self.shrink = nnx.List(CausalConv(f, f, rows, columns, depth, stride=2, rngs=rngs) for depth in range(bottom))
        self.grow = nnx.List(UpsamplingLinear(f, depth + 1, left=vertical, rngs=rngs) for depth in range(bottom))

    def __call__(
        self, h: jax.Array, given: Pass, vertical: Sequence[jax.Array] = ()
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Maps the input at the region, `[B, h, w, C]`, to its features, and the outputs of all layers.

        The horizontal stack is given the outputs of the `vertical` stack's layers, over entire rows.
        """
        outputs: list[jax.Array] = []
        vertical_outputs = iter(vertical)

        def layer(block: GatedResidual, h: jax.Array, *skip: jax.Array) -> jax.Array:
            in_this_row = given.region.at(block.depth)._replace(row=0)
            seen = [crop(next(vertical_outputs), in_this_row)] if vertical else []
            h = block(h, [*seen, *skip], given)
            outputs.append(h)
            return h

        skips = [h]
        for depth, blocks in enumerate(self.down):
            if depth:
                h = self.shrink[depth - 1](h, given.region, given.cache)
                skips.append(h)
            for block in blocks:
                h = layer(block, h)
                skips.append(h)
        skips.pop()  # the way up starts from it
        for depth in reversed(range(len(self.up))):
            for block in self.up[depth]:
                h = layer(block, h, skips.pop())
            if depth:
                h = self.grow[depth - 1].upsample(h, given.region)
        return h, outputs


class PixelCNN(nnx.Module):
    """p(codes | condition) = prod over positions, in raster order, of a categorical distribution over the codebook.

    Args:
        grid: Height and width of the code grid.
        codebook_size: K, number of codes.
        conditional_dim: Length of the conditional input.
        num_resnet: Layers on the way down, and as many on the way up, in every hierarchy.
        num_filters: Channels.
        num_hierarchies: Resolutions; each after the first halves the grid.
        dropout: Share of units dropped in every layer while training.
        embedding_std: Standard deviation of the initial embedding of codes; None: 1 / sqrt(num_filters). 0.88 is that
            of the published implementation, with which the first steps learn more slowly.
    """

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        codebook_size: int,
        conditional_dim: int,
        num_resnet: Annotated[Blocks, Field(ge=1)],
        num_filters: Width,
        num_hierarchies: Annotated[int, Field(ge=1, le=16)] = 1,
        dropout: Dropout = 0.5,
        embedding_std: Scale | None = None,
        rngs: nnx.Rngs,
    ):
        sizes = {"num_resnet": num_resnet, "num_filters": num_filters, "num_hierarchies": num_hierarchies}
        if 2 ** (num_hierarchies - 1) > min(grid):
            raise OptionError(
                "num_hierarchies",
                f"a code grid of {grid[0]}x{grid[1]} cannot be halved {num_hierarchies - 1} times: lower {{}}",
            )
        self.grid, f = grid, num_filters
        embedding_init = nnx.initializers.normal(f**-0.5 if embedding_std is None else embedding_std)
        self.embedding = nnx.Embed(codebook_size, f, embedding_init=embedding_init, rngs=rngs)
        # The first layers exclude the current position, so all later ones may include it.
        self.vertical_in = CausalConv(f, f, rows=(-2, -1), columns=(-1, 1), rngs=rngs)
        self.horizontal_in_above = CausalConv(f, f, rows=(-1, -1), columns=(-1, 1), rngs=rngs)
        self.horizontal_in_left = CausalConv(f, f, rows=(0, 0), columns=(-1, -1), rngs=rngs)
        options: dict[str, Any] = sizes | {"dropout": dropout, "conditional_dim": conditional_dim, "rngs": rngs}
        self.vertical = Stack(rows=(-1, 0), columns=(-1, 1), vertical=True, **options)
        self.horizontal = Stack(rows=(-1, 0), columns=(-1, 0), vertical=False, **options)
        self.out = nnx.Linear(f, codebook_size, rngs=rngs)
        for name, conv in self._convs().items():
            conv.name = name

    def logits(self, codes: jax.Array, condition: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `[B, H, W, K]` of every code given those before it, for int32 codes `[B, H, W]`; one pass."""
        embedded, everywhere = self.embedding(codes), Region(0, 0, *self.grid)
        given = Pass(condition, everywhere, rngs=rngs)
        _, vertical = self.vertical(self.vertical_in(embedded, everywhere), given)
        h = self.horizontal_in_above(embedded, everywhere) + self.horizontal_in_left(embedded, everywhere)
        h, _ = self.horizontal(h, given, vertical)
        return self.out(jax.nn.elu(h))

    def log_prob(self, codes: jax.Array, condition: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log p(codes | condition) in nats, `[B]`; the arguments of `logits`."""
        log_probs = jax.nn.log_softmax(self.logits(codes, condition, rngs))
        return jnp.take_along_axis(log_probs, codes[..., None], axis=-1).sum((1, 2, 3))  # over positions

    def sample(self, condition: jax.Array, key: jax.Array) -> jax.Array:
        """Draws codes, int32 `[B, H, W]`, given `condition: [B, conditional_dim]`, one position at a time."""
        height, width = self.grid

        def draw_row(cache: Cache, inputs: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
            row, keys = inputs
            cache, region = dict(cache), Region(row, 0, 1, width)
            h = self.vertical_in.read(cache["embedding"], region)
            _, vertical = self.vertical(h, Pass(condition, region, cache))

            def draw(cache: Cache, inputs: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
                column, key = inputs
                cache, region = dict(cache), Region(row, column, 1, 1)
                drawn = cache["embedding"]
                h = self.horizontal_in_above.read(drawn, region) + self.horizontal_in_left.read(drawn, region)
                h, _ = self.horizontal(h, Pass(condition, region, cache), vertical)
                codes = jax.random.categorical(key, self.out(jax.nn.elu(h)))  # [B, 1, 1]
                cache["embedding"] = write(drawn, self.embedding(codes), region)
                return cache, codes[:, 0, 0]

            return lax.scan(draw, cache, (jnp.arange(width), keys))

        keys = jax.random.split(key, (height, width))
        _, codes = lax.scan(draw_row, self.empty_cache(len(condition)), (jnp.arange(height), keys))  # [H, W, B]
        return jnp.moveaxis(codes, -1, 0)

    def empty_cache(self, batch: int) -> Cache:
        """The cache before the first position."""
        everywhere = Region(0, 0, *self.grid)

        def zeros(depth: int, features: int) -> jax.Array:
            _, _, height, width = everywhere.at(depth)
            return jnp.zeros((ABOVE + height, SIDE + width + SIDE, batch, features))

        stacks = {
            name: zeros(conv.depth, conv.kernel.shape[2])
            for name, conv in self._convs().items()
            if name.startswith(("vertical.", "horizontal."))  # the first convolutions read the embedding
        }
        return stacks | {"embedding": zeros(0, self.embedding.features)}

    def _convs(self) -> dict[str, CausalConv]:
        """All convolutions, by the path that names their weights."""
        modules = nnx.iter_modules(self)
        return {".".join(map(str, path)): module for path, module in modules if isinstance(module, CausalConv)}
