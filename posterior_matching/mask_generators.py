"""Where masks come from.

A generator is an immutable set of options. `generator(key, shape)` draws masks of the static shape
[batch, *mask_shape(event_shape)], independent per example, with pure JAX operations: it runs under jit, scan and pmap.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import PlainValidator

from posterior_matching.config import Config, build, naming, read_options
from posterior_matching.errors import OptionError, UserError, nearest
from posterior_matching.masking import mask_shape

MASK_GENERATORS: dict[str, type["MaskGenerator"]] = {}

Shape = tuple[int, ...]
Generator = TypeVar("Generator", bound="MaskGenerator")
Integers = jax.Array | int  # int32 [batch], or one for all
Rules = Iterator[tuple[bool, str]]  # whether a condition on the options holds, and the remedy if not


@dataclass_transform(frozen_default=True)
def register(cls: type["Generator"]) -> type["Generator"]:
    """Makes a generator a frozen dataclass, and registers it under its name for configs and `--mask_generator`."""
    MASK_GENERATORS[cls.__name__] = dataclass(frozen=True)(cls)
    return cls


class MaskGenerator:
    """Base class of all generators. Subclasses are frozen dataclasses whose fields are their config options."""

    images_only: ClassVar[bool] = True

    def __call__(self, key: jax.Array, shape: Shape) -> jax.Array:
        """Draws checked masks, float32 0 or 1, of shape [batch, H, W, 1] for images or [batch, d] for features."""
        shape = tuple(shape)
        if mask_shape(shape[1:]) != shape[1:]:
            raise ValueError(f"masks have one channel, so their shape cannot be {shape}: see mask_shape")
        self.check(shape[1:])
        return self.draw(key, shape).astype(jnp.float32)

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        """Draws masks of a shape that fits: bool, True = observed."""
        raise NotImplementedError

    def rules(self, event_shape: Shape) -> Rules:
        """Yields the conditions on the options for data of this shape."""
        raise NotImplementedError

    def check(self, event_shape: Shape) -> None:
        """Raises a UserError with the remedy if the options do not fit the shape of one example or of its mask."""
        rank = "it is for images [H, W, C]; use BernoulliMaskGenerator or UniformMaskGenerator"
        wrong_rank = self.images_only and len(event_shape) != 3
        for holds, remedy in [(False, rank)] if wrong_rank else self.rules(event_shape):
            if not holds:
                raise UserError(f"{self} does not fit data of shape {tuple(event_shape)}: {remedy}")


@register
class BernoulliMaskGenerator(MaskGenerator):
    """Observes each entry with probability `p`, in [0, 1]."""

    images_only: ClassVar[bool] = False
    p: float = 0.5

    def rules(self, event_shape: Shape) -> Rules:  # noqa: ARG002
        yield 0 <= self.p <= 1, "p must lie in [0, 1]"

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        return jax.random.bernoulli(key, self.p, shape)


@register
class UniformMaskGenerator(MaskGenerator):
    """Observes a uniformly random subset of q of the d entries, q itself uniform.

    q is one of {0, ..., d - 1} or, with `bounds` = (l, h), 0 <= l < h <= 1, of {int(l * d), ..., int(h * d) - 1}.
    """

    images_only: ClassVar[bool] = False
    bounds: tuple[float, float] | None = None

    def _range(self, event_shape: Shape) -> tuple[int, int]:
        d = math.prod(mask_shape(event_shape))
        return (0, d) if self.bounds is None else (int(self.bounds[0] * d), int(self.bounds[1] * d))

    def rules(self, event_shape: Shape) -> Rules:
        valid = self.bounds is None or (len(self.bounds) == 2 and 0 <= self.bounds[0] < self.bounds[1] <= 1)
        yield valid, "bounds must be (l, h) with 0 <= l < h <= 1"
        low, high = self._range(event_shape)
        yield low < high, "the bounds allow no number of observed entries, widen them"

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        q_key, order_key = jax.random.split(key)
        q = jax.random.randint(q_key, (shape[0], 1), *self._range(shape[1:]))
        # Sorting random numbers gives a uniformly random permutation pi; {i : pi_i < q} is a uniform subset of size q.
        noise = jax.random.bits(order_key, (shape[0], math.prod(shape[1:])), jnp.uint32)
        return (jnp.argsort(noise, axis=1, stable=False) < q).reshape(shape)


@register
class ImageBernoulliMaskGenerator(BernoulliMaskGenerator):
    """Observes each pixel, all its channels together, with probability `p`, in [0, 1]."""

    images_only: ClassVar[bool] = True
    p: float = 0.2


def _place_rectangle(key: jax.Array, shape: Shape, height: Integers, width: Integers) -> jax.Array:
    """Leaves a `height` x `width` rectangle at a uniform position inside the image unobserved."""
    y_key, x_key = jax.random.split(key)
    y = jax.random.randint(y_key, shape[:1], 0, shape[1] - height + 1)
    x = jax.random.randint(x_key, shape[:1], 0, shape[2] - width + 1)
    return _outside_rectangle(shape, y, x, y + height, x + width)


def _outside_rectangle(shape: Shape, y1: Integers, x1: Integers, y2: Integers, x2: Integers) -> jax.Array:
    """Returns masks [batch, H, W, 1] that are False in [y1:y2, x1:x2] only."""

    def within(start: Integers, stop: Integers, length: int) -> jax.Array:
        start, stop = (jnp.broadcast_to(value, shape[:1])[:, None] for value in (start, stop))
        position = jnp.arange(length)[None, :]
        return (start <= position) & (position < stop)

    return ~(within(y1, y2, shape[1])[:, :, None] & within(x1, x2, shape[2])[:, None, :])[..., None]


@register
class FixedRectangleMaskGenerator(MaskGenerator):
    """Leaves the rectangle [y1:y2, x1:x2] unobserved, the same for every example."""

    y1: int
    x1: int
    y2: int
    x2: int

    def rules(self, event_shape: Shape) -> Rules:
        fits = 0 <= self.y1 < self.y2 <= event_shape[0] and 0 <= self.x1 < self.x2 <= event_shape[1]
        yield fits, "the rectangle [y1:y2, x1:x2] must be non-empty and inside the image"

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:  # noqa: ARG002 (nothing is random)
        return _outside_rectangle(shape, self.y1, self.x1, self.y2, self.x2)


@register
class SquareMaskGenerator(MaskGenerator):
    """Leaves a `size` x `size` square at a uniform position inside the image unobserved."""

    size: int

    def rules(self, event_shape: Shape) -> Rules:
        largest = min(event_shape[:2])
        yield 1 <= self.size <= largest, f"size must lie in 1..{largest}"

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        return _place_rectangle(key, shape, self.size, self.size)


@register
class RectangleMaskGenerator(MaskGenerator):
    """Leaves a random rectangle unobserved whose share of the image lies in [min_prop, max_prop].

    Its two opposite corners are uniform pixels, both part of the rectangle, redrawn until the share fits.
    """

    min_prop: float = 0.3
    max_prop: float = 1.0

    def _sizes(self, event_shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the heights and widths that fit, and their probabilities.

        Of the L^2 ordered pairs of pixels on an axis, L span 1 pixel and 2 (L - l + 1) span l > 1 pixels, equally
        many at each position. Redrawing until the share fits therefore gives a categorical distribution over the sizes
        that fit, and then a uniform position.
        """
        height, width = (np.arange(1, length + 1) for length in event_shape[:2])
        pairs = [np.where(size == 1, len(size), 2 * (len(size) - size + 1)) for size in (height, width)]
        share = np.outer(height, width) / (len(height) * len(width))
        fits = (self.min_prop <= share) & (share <= self.max_prop)
        rows, columns = np.nonzero(fits)
        weights = np.outer(*pairs)[fits]
        return height[rows], width[columns], weights / max(weights.sum(), 1)

    def rules(self, event_shape: Shape) -> Rules:
        heights, *_ = self._sizes(event_shape)
        yield len(heights) > 0, "no rectangle has a share in [min_prop, max_prop], widen the interval"

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        size_key, position_key = jax.random.split(key)
        height, width, p = self._sizes(shape[1:])
        size = jax.random.choice(size_key, len(p), shape[:1], p=jnp.asarray(p, jnp.float32))
        return _place_rectangle(position_key, shape, jnp.asarray(height)[size], jnp.asarray(width)[size])


def _cubic_weights(start: jax.Array, length: int, cells: int, size: int) -> jax.Array:
    """Weights of bicubic interpolation (Keys, a = -1/2) in a window of `cells` values resized to `size` pixels.

    Pixels and cells have their centres at half integers, and at the borders weights are normalised over the existing
    cells, as in PIL and `jax.image.resize`. `start`, int [batch], is the first of the window's `length` pixels.

    Returns:
        float32 [batch, length, k]: column j is for the cell floor((start + 1/2) * cells / size - 1/2) - 1 + j.
    """
    pixel = (start[:, None] + jnp.arange(length)[None, :]).astype(jnp.float32)
    centre = (pixel + 0.5) * (cells / size) - 0.5
    k = math.ceil((length - 1) * cells / size) + 4
    cell = jnp.floor(centre[:, :1]) - 1 + jnp.arange(k, dtype=jnp.float32)[None, :]
    t = jnp.abs(centre[:, :, None] - cell[:, None, :])
    weights = jnp.where(t < 1, (1.5 * t - 2.5) * t**2 + 1, jnp.where(t < 2, ((2.5 - 0.5 * t) * t - 4) * t + 2, 0))
    weights = jnp.where(((cell >= 0) & (cell < cells))[:, None, :], weights, 0)
    return weights / weights.sum(axis=2, keepdims=True)


@register
class RandomPatternMaskGenerator(MaskGenerator):
    """Leaves random blobs unobserved: windows, at uniform positions, of a large smooth random pattern.

    The pattern is uniform noise of `resolution * max_size` cells a side, resized bicubically to `max_size` pixels a
    side, unobserved below `density`. A window is redrawn until its unobserved share is within 0.05 of `density`.

    Every window has its own pattern, of which only the few cells under the window are drawn. Each example has the same
    distribution as a window of a whole pattern, but examples are independent, unlike windows of one pattern.
    """

    max_size: int = 10000
    resolution: float = 0.06
    density: float = 0.25

    def rules(self, event_shape: Shape) -> Rules:
        side = max(event_shape[:2])
        valid = self.max_size >= side and 1 <= self._cells <= self.max_size and 0 <= self.density <= 1
        yield valid, f"max_size must be at least {side}, resolution in [1 / max_size, 1] and density in [0, 1]"
        # Redrawing must end. It does not if, say, the pattern is so fine that all windows have the same, wrong share.
        fits = self._any_accepted(*event_shape[:2])
        yield fits, "none of 128 windows has an unobserved share within 0.05 of density, change density or resolution"

    @functools.lru_cache  # noqa: B019 (generators are few and small)
    def _any_accepted(self, height: int, width: int) -> bool:
        with jax.ensure_compile_time_eval():  # `check` may run while jit traces.
            windows = jax.jit(self._windows, static_argnums=(1, 2, 3))(jax.random.key(0), 128, height, width)
            return bool(self._accepted(windows).any())

    def _accepted(self, observed: jax.Array) -> jax.Array:
        return jnp.abs(1 - observed.mean(axis=(1, 2)) - self.density) <= 0.05

    @property
    def _cells(self) -> int:
        return int(self.resolution * self.max_size)

    def _windows(self, key: jax.Array, batch: int, height: int, width: int) -> jax.Array:
        """Draws windows regardless of their share: bool [batch, height, width], True = observed."""
        corner_key, noise_key = jax.random.split(key)
        ends = jnp.array([[self.max_size - height + 1], [self.max_size - width + 1]])
        y, x = jax.random.randint(corner_key, (2, batch), 0, ends)
        rows = _cubic_weights(y, height, self._cells, self.max_size)
        columns = _cubic_weights(x, width, self._cells, self.max_size)
        noise = jax.random.uniform(noise_key, (batch, rows.shape[2], columns.shape[2]), jnp.float32)
        # Full precision: by default accelerators round the factors to 8 or 11 bits.
        return jnp.einsum("bhi,bij,bwj->bhw", rows, noise, columns, precision="highest") >= self.density

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        def redraw(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            key, observed = state
            key, window_key = jax.random.split(key)
            keep = self._accepted(observed)[:, None, None]
            return key, jnp.where(keep, observed, self._windows(window_key, *shape[:3]))

        key, window_key = jax.random.split(key)
        state = (key, self._windows(window_key, *shape[:3]))
        _, observed = jax.lax.while_loop(lambda state: ~self._accepted(state[1]).all(), redraw, state)
        return observed[..., None]


@register
class MixtureMaskGenerator(MaskGenerator):
    """Picks one of `generators` per example, with probabilities proportional to `weights` (non-negative)."""

    images_only: ClassVar[bool] = False  # decided by its parts
    generators: tuple[MaskGenerator, ...]
    weights: tuple[float, ...]

    def rules(self, event_shape: Shape) -> Rules:
        valid = len(self.weights) == len(self.generators) and all(0 <= weight < math.inf for weight in self.weights)
        yield valid and sum(self.weights) > 0, "weights must be non-negative, one per generator, with a positive sum"
        for generator in self.generators:
            generator.check(event_shape)

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        pick_key, *keys = jax.random.split(key, len(self.generators) + 1)
        pick = jax.random.categorical(pick_key, jnp.log(jnp.asarray(self.weights, jnp.float32)), shape=shape[:1])
        masks = jnp.stack([generator.draw(key, shape) for generator, key in zip(self.generators, keys, strict=True)])
        return masks[pick, jnp.arange(shape[0])]


class SquareImageMixture(MaskGenerator):
    """Base class of the mixtures for square images of side `dim`, which is an option or a constant."""

    dim: int = 64

    def mixture(self) -> MixtureMaskGenerator:
        """Returns the mixture that this generator draws from."""
        raise NotImplementedError

    def rules(self, event_shape: Shape) -> Rules:
        remedy = "set dim" if fields(cast(Any, self)) else "resize them"
        square = tuple(event_shape[:2]) == (self.dim, self.dim)
        yield square, f"it is for images of {self.dim}x{self.dim} pixels; {remedy} or use another generator"
        self.mixture().check(event_shape)

    def draw(self, key: jax.Array, shape: Shape) -> jax.Array:
        return self.mixture().draw(key, shape)


def _rectangles(*corners: tuple[int, int, int, int]) -> tuple[FixedRectangleMaskGenerator, ...]:
    return tuple(FixedRectangleMaskGenerator(*c) for c in corners)


def _halves(dim: int) -> tuple[FixedRectangleMaskGenerator, ...]:
    """Returns generators that leave the left, top, right and bottom half unobserved."""
    half = dim // 2
    return _rectangles((0, 0, dim, half), (0, 0, half, dim), (0, half, dim, dim), (half, 0, dim, dim))


@register
class MNISTMaskGenerator(SquareImageMixture):
    """Random pixels (weight 2), the four halves (1 each), squares of half the side (2) and rectangles (2)."""

    dim: int = 28
    pixels: ClassVar = ImageBernoulliMaskGenerator(0.5)
    rectangles: ClassVar = RectangleMaskGenerator(0.3, 1.0)

    def mixture(self) -> MixtureMaskGenerator:
        generators = (self.pixels, *_halves(self.dim), SquareMaskGenerator(self.dim // 2), self.rectangles)
        return MixtureMaskGenerator(generators, (2, 1, 1, 1, 1, 2, 2))


@register
class OmniglotMaskGenerator(MNISTMaskGenerator):
    """As `MNISTMaskGenerator`, with rectangles of 10% to 60% of the image."""

    rectangles: ClassVar = RectangleMaskGenerator(0.1, 0.6)


@register
class Cifar10MaskGenerator(MNISTMaskGenerator):
    """As `MNISTMaskGenerator`, with 30% of the pixels observed and rectangles of 10% to 50% of the image."""

    dim: int = 32
    pixels: ClassVar = ImageBernoulliMaskGenerator(0.3)
    rectangles: ClassVar = RectangleMaskGenerator(0.1, 0.5)


@register
class GCFMaskGenerator(SquareImageMixture):
    """Six fixed parts of 64x64 faces, equally likely (Generative Face Completion, Li et al. 2017)."""

    def mixture(self) -> MixtureMaskGenerator:
        large = _rectangles((26, 17, 58, 36), (26, 29, 58, 48))
        small = _rectangles((26, 15, 37, 50), (26, 15, 37, 34), (26, 31, 37, 50), (43, 20, 62, 44))
        return MixtureMaskGenerator(large + small, (1,) * 6)


@register
class SIIDGMMaskGenerator(SquareImageMixture):
    """Patterns, random pixels, the centre and halves of 64x64 images (Semantic Image Inpainting, Yeh et al. 2017)."""

    def mixture(self) -> MixtureMaskGenerator:
        centre = FixedRectangleMaskGenerator(16, 16, 48, 48)
        generators = (RandomPatternMaskGenerator(), ImageBernoulliMaskGenerator(0.2), centre, *_halves(64))
        return MixtureMaskGenerator(generators, (2, 2, 2, 1, 1, 1, 1))


@register
class CelebAMaskGenerator(SquareImageMixture):
    """`SIIDGMMaskGenerator` (weight 1), `GCFMaskGenerator` (1) and rectangles (2), for 64x64 images."""

    def mixture(self) -> MixtureMaskGenerator:
        generators = (SIIDGMMaskGenerator(), GCFMaskGenerator(), RectangleMaskGenerator(0.3, 1.0))
        return MixtureMaskGenerator(generators, (1, 1, 2))


def build_mask_generator(config: Config, where: str = "") -> MaskGenerator:
    """Builds a generator from a config such as {"name": "BernoulliMaskGenerator", "p": 0.5}.

    The `generators` of a MixtureMaskGenerator are such configs, too. Wrong options raise an OptionError, in whose
    message they are called `where`.
    """
    # Lists become tuples, since generators must be hashable under jit.
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in dict(config).items()}
    if "generators" in options:
        parts = enumerate(options["generators"])
        with naming(where):
            options["generators"] = tuple(build_mask_generator(part, f"generators[{i}]") for i, part in parts)
    return build(MASK_GENERATORS, options, where)


MaskOption = Annotated[MaskGenerator, PlainValidator(build_mask_generator)]


def mask_generator_from_spec(spec: str) -> MaskGenerator:
    """Builds a generator from its name and options, as on a command line: `UniformMaskGenerator:bounds=0.0,0.2`.

    Values are Python literals; a tuple needs no parentheses. What is wrong raises a UserError.
    """
    name, _, text = spec.partition(":")
    if name not in MASK_GENERATORS:
        raise OptionError("mask_generator", f"unknown {{}} '{name}': {nearest(name, MASK_GENERATORS)}")
    try:
        options = {"name": name} | read_options(text, "mask_generator")
        return build_mask_generator(options, "mask_generator")
    except UserError as error:
        taken = ", ".join(field.name for field in fields(cast(Any, MASK_GENERATORS[name]))) or "no options"
        raise UserError(f"{error} ({name} takes {taken})") from None
