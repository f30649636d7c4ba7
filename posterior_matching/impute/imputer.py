"""Fills the holes of tables and images with a trained model, and scores any columns given any others."""

import functools
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from posterior_matching.models.marginal_likelihood import tempered_weights, weighted_mean
from posterior_matching.models.protocols import Imputes
from posterior_matching.models.vae_inference import LikelihoodMixin

ImputationMode = Literal["point", "draws"]
Unknown = Literal["error", "missing"]
NumImputations = Annotated[int, Field(ge=1, le=1000)]


class RowImputer:
    """A trained model that fills rows or images.

    The random numbers of a row depend only on the seed and the row's contents, and every batch has the same size. A row
    therefore gets the same imputations regardless of the rows around it. Equal rows get equal point estimates and
    independent draws.

    Args:
        model: The model.
        seed: Random seed of the imputations.
        batch_size: Rows at once.
        num_samples: Draws of z that a point estimate averages, and among which `draws` choose, see
            `vae_inference.ImputationMixin`.
    """

    def __init__(self, model: Imputes, *, seed: int = 0, batch_size: int = 128, num_samples: int = 256):
        self._graphdef, self._state = nnx.split(model)
        self._key, self._batch_size, self._num_samples = jax.random.key(seed), batch_size, num_samples

    def point(self, x: np.ndarray) -> np.ndarray:
        """Returns rows `[N, d]` with NaN filled by point estimates: means, and the most likely categories."""
        return next(self._filled(x, _point, (self._num_samples, 1)))

    def draws(self, x: np.ndarray, num_imputations: int, earlier: Counter[int] | None = None) -> Iterator[np.ndarray]:
        """Yields copies of rows `[N, d]` with NaN filled by draws of p(x_u | x_o), independent between rows.

        Copy i does not depend on the number of copies. For a table in chunks, `earlier` counts the rows of the chunks
        before by their content, and is updated.
        """
        return self._filled(x, _draws, (self._num_samples, num_imputations), Counter() if earlier is None else earlier)

    def image(self, x: np.ndarray, b: np.ndarray, copy: int | None = None) -> np.ndarray:
        """Returns images `[N, H, W, C]` in [0, 1] with the pixels where `b: [N, H, W, 1]` is 0 filled.

        Args:
            x: The images, in [0, 1]; unobserved pixels have no influence.
            b: The masks, float32.
            copy: Fill with draws, with others for each number; None: with point estimates, the weighted mean
                of `num_samples`, see `marginal_likelihood.tempered_weights`.
        """
        x = np.where(b == 1, x, np.float32(0))
        if copy is None:
            return self._over_batches(_mean_image, self._num_samples, self._key, x, b)
        return self._over_batches(_image_draw, 1, jax.random.fold_in(self._key, copy), x, b)

    def log_prob(self, x: np.ndarray, given: np.ndarray, of: np.ndarray, num_samples: int) -> np.ndarray:
        """Estimates log p(x_of | x_given) of rows by importance sampling, per standardised unit.

        Args:
            x: `[N, d]`, NaN where missing; missing values are neither scored nor conditioned on.
            given: `[d]` bool, the columns conditioned on.
            of: `[d]` bool, the columns scored, except where they are also given.
            num_samples: Draws of z for each of the two estimates.

        Returns:
            `[N]` float32, nats; 0 where nothing is scored.
        """
        available = ~np.isnan(x)
        masks = np.stack([available & of & ~given, available & given], axis=1).astype(np.float32)
        return self._over_batches(_log_prob, num_samples, self._key, x, masks)

    def info_gains(self, x: np.ndarray, num_samples: int) -> np.ndarray:
        """Estimates the expected information, in nats, that each hole of rows `[N, d]` holds about z; NaN elsewhere."""
        holes = np.isnan(x)
        gains = self._over_batches(_info_gains, num_samples, self._key, x, 1 - holes.astype(np.float32))
        return np.where(holes, gains, np.nan)

    def _filled(
        self, x: np.ndarray, fn: "_RowFunction", sizes: tuple[int, int], earlier: Counter[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Yields copies of the rows; `fn` returns all copies of a row, `[1, copies, d]`, given `(samples, copies)`."""
        holes = np.isnan(x)
        rows = holes.any(axis=1)
        incomplete = np.array(x[rows], np.float32)
        values = self._over_batches(fn, sizes, self._key, incomplete, 1 - holes[rows], earlier) if rows.any() else None
        for copy in range(sizes[1]):
            filled = np.array(x, np.float32)
            if values is not None:
                filled[rows] = np.where(holes[rows], values[:, copy], incomplete)
            yield filled

    def _over_batches(
        self,
        fn: "_RowFunction",
        num_samples: Any,
        key: jax.Array,
        x: np.ndarray,
        b: np.ndarray,
        earlier: Counter[int] | None = None,
    ) -> Any:
        b = np.asarray(b, np.float32)
        x = np.nan_to_num(np.asarray(x, np.float32)) + 0.0  # no -0.0, whose bytes differ
        hashes = np.array([zlib.crc32(m.tobytes(), zlib.crc32(r.tobytes())) for r, m in zip(x, b, strict=True)])
        if earlier is not None:
            hashes = np.array([_numbered(row, earlier) for row in hashes.tolist()])
        parts = []
        for start in range(0, len(x), self._batch_size):
            rows = slice(start, start + self._batch_size)
            size = len(x[rows])
            batch = [np.resize(a[rows], (self._batch_size, *a.shape[1:])) for a in (hashes.astype(np.uint32), x, b)]
            parts.append(np.asarray(_compiled(fn, self._graphdef, num_samples, self._state, key, *batch))[:size])
        return np.concatenate(parts)


def _numbered(row: int, earlier: Counter[int]) -> int:
    """Returns the hash of a row and of the number of equal rows before it; counts the row."""
    count, earlier[row] = earlier[row], earlier[row] + 1
    return zlib.crc32(count.to_bytes(8, "little"), row) if count else row


# model, key, row [1, d] without NaN, masks [1, ...], number (or numbers) of samples -> the row's result [1, ...]
_RowFunction = Callable[[Any, jax.Array, jax.Array, jax.Array, Any], jax.Array]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compiled(
    fn: "_RowFunction",
    graphdef: nnx.GraphDef,
    num_samples: Any,
    state: nnx.State,
    key: jax.Array,
    hashes: jax.Array,
    x: jax.Array,
    b: jax.Array,
) -> jax.Array:
    """Maps a function over rows, each with its own key. Models of one architecture share the compiled program."""
    model = nnx.merge(graphdef, state)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, hashes)
    return jax.vmap(lambda key, x, b: fn(model, key, x[None], b[None], num_samples)[0])(keys, x, b)


def _point(model: LikelihoodMixin, key: jax.Array, x: jax.Array, b: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    return model.point(x, b, sizes[0], key=key, weighted=True)[:, None]


def _draws(model: LikelihoodMixin, key: jax.Array, x: jax.Array, b: jax.Array, sizes: tuple[int, int]) -> jax.Array:
    samples, copies = sizes
    return jnp.moveaxis(model.draw(x, b, copies, key=key, candidates=samples), 0, 1)


def _image_draw(model: Imputes, key: jax.Array, x: jax.Array, b: jax.Array, _: int) -> jax.Array:
    return jnp.clip(model.impute(x, b, 1, key=key)[0], 0.0, 1.0)


def _mean_image(model: Imputes, key: jax.Array, x: jax.Array, b: jax.Array, num_samples: int) -> jax.Array:
    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:  # one at a time, to save memory
        imputations, log_weights = model.impute_and_weigh(x, b, 1, key=key)
        return jnp.clip(imputations[0], 0.0, 1.0), log_weights[0]

    imputations, log_weights = jax.lax.map(draw, jax.random.split(key, num_samples))
    return weighted_mean(imputations, tempered_weights(log_weights))


def _log_prob(model: LikelihoodMixin, key: jax.Array, x: jax.Array, masks: jax.Array, num_samples: int) -> jax.Array:
    of, given = masks[:, 0], masks[:, 1]
    return jnp.where(of.any(axis=-1), model.log_prob_of(x, of, given, num_samples, key=key), 0.0)


def _info_gains(model: LikelihoodMixin, key: jax.Array, x: jax.Array, b: jax.Array, num_samples: int) -> jax.Array:
    return model.expected_info_gains(x[0], b[0], num_samples, key=key)[None]
