"""Tables of mixed columns: their encoding for networks, and the likelihood head over them.

`cardinalities` has one entry per column: 0 for a real column, K >= 1 for a categorical one with K values; () stands for
real columns only. In `x: [..., d]` a category is given by its index, a missing value by 0. The *features* of a row,
`[..., width]`, are its columns in order: real values unchanged, categories one-hot.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpyro import distributions as dist
from pydantic import Field
from scipy.special import ndtri

from posterior_matching.config import Count
from posterior_matching.errors import OptionError
from posterior_matching.masking import mask_shape, partial_input
from posterior_matching.models.networks import Shape

Cardinalities = tuple[Annotated[int, Field(ge=0)], ...]

# In standard deviations of a column. Otherwise a column of repeated values, or one determined by the others, would have
# an unbounded likelihood and outweigh all other columns.
MIN_SCALE = 1e-3
_SPREAD_WIDTH = 2.5  # initial standard deviation of Gaussians that start spread out, times their number
_UNCHECKED = {"validate_args": False}


def features_shape(input_shape: Shape, cardinalities: Cardinalities) -> Shape:
    """Returns the shape of one example's features: `(width,)`, or `input_shape` if all are real."""
    return (sum(max(k, 1) for k in cardinalities),) if any(cardinalities) else tuple(input_shape)


def column_features(x: jax.Array, cardinalities: Cardinalities) -> jax.Array:
    """Returns the features `[..., width]` of rows `x: [..., d]`; `x` itself if all columns are real."""
    if not any(cardinalities):
        return x
    column, category = _layout(cardinalities)
    return jnp.where(is_real(cardinalities)[column], x[..., column], x[..., column] == category)


def is_real(cardinalities: Cardinalities) -> np.ndarray:
    """Returns which columns are real, bool `[d]`; for () a single True, which stands for all."""
    return np.array(cardinalities or (0,)) == 0


def column_partial_input_shape(input_shape: Shape, cardinalities: Cardinalities) -> Shape:
    """Returns the shape of one example of `column_partial_input`."""
    *axes, channels = features_shape(input_shape, cardinalities)
    return (*axes, channels + mask_shape(input_shape)[-1])


def column_partial_input(x: jax.Array, b: jax.Array, cardinalities: Cardinalities) -> jax.Array:
    """Returns the input of conditional models, `[..., width + d]`: the observed features, 0 elsewhere, and the mask."""
    if not any(cardinalities):
        return partial_input(x, b)
    column, _ = _layout(cardinalities)
    return jnp.concatenate([jnp.where(b[..., column] == 1, column_features(x, cardinalities), 0.0), b], axis=-1)


def column_values(features: jax.Array, cardinalities: Cardinalities) -> jax.Array:
    """Returns rows `[..., d]` from features `[..., width]`, or from their means, with the most probable categories."""
    if not any(cardinalities):
        return features
    rows = []
    for k, (_, positions) in _groups(cardinalities).items():
        part = features[..., positions]
        rows.append(part.reshape(*part.shape[:-1], -1, k).argmax(-1).astype(part.dtype) if k else part)
    return _in_order(rows, [columns for columns, _ in _groups(cardinalities).values()])


def _layout(cardinalities: Cardinalities) -> tuple[np.ndarray, np.ndarray]:
    """The column that each feature belongs to, and the category that it encodes; both `[width]`."""
    sizes = [max(k, 1) for k in cardinalities]
    return np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])


def _groups(cardinalities: Cardinalities) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """By cardinality, the columns `[n]` and the positions of their features, so that equal columns are batched."""
    of_column, of_feature = np.array(cardinalities), np.array(cardinalities)[_layout(cardinalities)[0]]
    return {int(k): (np.flatnonzero(of_column == k), np.flatnonzero(of_feature == k)) for k in np.unique(of_column)}


def _in_order(parts: Sequence[jax.Array], indices: Sequence[np.ndarray]) -> jax.Array:
    """Puts entry j of the last axis of part i at position `indices[i][j]`."""
    return jnp.concatenate(parts, axis=-1)[..., np.argsort(np.concatenate(indices))]


class ColumnsLikelihood(nnx.Module):
    """Features -> independent columns: a Gaussian or a mixture of Gaussians for real ones, a softmax for categories.

    Args:
        features_shape: Shape of the decoder's output for one example; flattened.
        data_shape: `(d,)`.
        num_components: Gaussians per real column. With 1 the features give the mean, and the scale is a parameter,
            initially 1; with more they give weights, means and scales.
        shared_scales: Whether the scales of several Gaussians are parameters, too, initially 1 or, if spread, less.
            Scales that depend on z can collapse the posterior where values repeat, see docs/notes.md.
        spread: Whether several Gaussians start at quantiles of N(0, 1). Otherwise they start alike and part slowly.
        cardinalities: See above.
        rngs: Source of initial weights.
    """

    def __init__(
        self,
        features_shape: Shape,
        data_shape: Shape,
        num_components: Count = 1,
        *,
        shared_scales: bool = False,
        spread: bool = False,
        cardinalities: Cardinalities = (),
        rngs: nnx.Rngs,
    ):
        if len(data_shape) != 1:
            raise OptionError("name", f"{{}} Columns is for tables, but the data have shape {tuple(data_shape)}")
        if spread and num_components == 1:
            raise OptionError("spread", "is for several Gaussians per column: set num_components above 1")
        self.cardinalities = cardinalities or (0,) * data_shape[0]
        self.num_components, self.shared_scales = num_components, shared_scales
        num_real = self.cardinalities.count(0)
        per_real = 1 if num_components == 1 else (2 if shared_scales else 3) * num_components
        self.sizes = tuple(len(columns) * (k or per_real) for k, (columns, _) in _groups(self.cardinalities).items())
        self.linear = nnx.Linear(math.prod(features_shape), sum(self.sizes), rngs=rngs)
        if num_real and spread:  # real columns come first
            biases = _spread(num_components, num_real, shared_scales)
            self.linear.bias = nnx.Param(jnp.zeros(sum(self.sizes)).at[: biases.size].set(biases))
        if num_real and (num_components == 1 or shared_scales):
            shape = (num_real,) if num_components == 1 else (num_real, num_components)
            initial = math.log(_SPREAD_WIDTH / num_components) if spread else 0.0
            self.log_scale = nnx.Param(jnp.full(shape, initial))

    def __call__(self, features: jax.Array) -> "IndependentColumns":
        """Maps features `[B, ...]` to a distribution over rows, batch shape `[B, d]`."""
        parameters = self.linear(features.reshape(len(features), -1))
        parts = jnp.split(parameters, np.cumsum(self.sizes)[:-1], axis=-1)
        groups = zip(_groups(self.cardinalities).items(), parts, strict=True)
        return IndependentColumns(
            self.cardinalities,
            {k: self._marginals(k, part.reshape(len(part), len(columns), -1)) for (k, (columns, _)), part in groups},
        )

    def _marginals(self, cardinality: int, parameters: jax.Array) -> dist.Distribution:
        """The distribution of one group's columns, batch shape `[B, n]`, from their parameters `[B, n, ...]`."""
        if cardinality:
            return dist.Categorical(logits=parameters, **_UNCHECKED)
        if self.num_components == 1:
            return dist.Normal(parameters[..., 0], jnp.exp(self.log_scale[...]) + MIN_SCALE, **_UNCHECKED)
        if self.shared_scales:
            logits, loc = jnp.split(parameters, 2, axis=-1)
            scale = jnp.broadcast_to(jnp.exp(self.log_scale[...]), loc.shape)
        else:
            logits, loc, scale = jnp.split(parameters, 3, axis=-1)
            scale = jax.nn.softplus(scale)
        components = dist.Normal(loc, scale + MIN_SCALE, **_UNCHECKED)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits, **_UNCHECKED), components, **_UNCHECKED)


def _spread(num_components: int, num_columns: int, shared_scales: bool) -> np.ndarray:
    """Biases of equal weights, means at quantiles of N(0, 1) and, unless they are shared, close scales.

    Returns `[num_columns * 3 * num_components]`, or twice instead of three times as many if they are.
    """
    means = ndtri((np.arange(num_components) + 0.5) / num_components)
    scales = np.full(num_components, np.log(np.expm1(_SPREAD_WIDTH / num_components)))  # the inverse of softplus
    of_column = [np.zeros(num_components), means, *([] if shared_scales else [scales])]
    return np.tile(np.concatenate(of_column), num_columns)


class IndependentColumns:
    """p(x | z) over rows `x: [..., B, d]`, one independent entry per column; returned by `ColumnsLikelihood`.

    Each of `marginals` is a distribution with batch shape `[B, n]` over the n columns that have its cardinality.
    """

    def __init__(self, cardinalities: Cardinalities, marginals: Mapping[int, dist.Distribution]):
        self._cardinalities, self._marginals = cardinalities, marginals
        groups = _groups(cardinalities)
        self._columns = [groups[k][0] for k in marginals]
        self._features = [groups[k][1] for k in marginals]

    def log_prob(self, x: jax.Array) -> jax.Array:
        """Log-densities of real columns and log-probabilities of categories in nats, `[..., B, d]`."""
        values = zip(self._marginals.items(), self._columns, strict=True)
        parts = [p.log_prob(x[..., i].astype(jnp.int32) if k else x[..., i]) for (k, p), i in values]
        return _in_order(parts, self._columns)

    def sample(self, key: jax.Array, sample_shape: Sequence[int] = ()) -> jax.Array:
        """Draws rows, `[*sample_shape, B, d]`."""
        keys = jax.random.split(key, len(self._marginals))
        draws = zip(self._marginals.values(), keys, strict=True)
        return _in_order([p.sample(key, tuple(sample_shape)).astype(jnp.float32) for p, key in draws], self._columns)

    @property
    def mean_features(self) -> jax.Array:
        """E[features], `[B, width]`: the means of real columns, the probabilities of categories."""
        parts = [p.probs.reshape(len(p.probs), -1) if k else p.mean for k, p in self._marginals.items()]
        return _in_order(parts, self._features)

    @property
    def mean(self) -> jax.Array:
        """The point estimate, `[B, d]`: the means of real columns, the most probable categories."""
        return column_values(self.mean_features, self._cardinalities)
