"""The very deep VAE (Child 2020, arXiv 2011.10650), and Posterior Matching in every one of its blocks.

Latents z_1, ..., z_L, one per decoder block, are grids of vectors, from coarse to fine:

    p(x, z) = p(x | z) prod_l p(z_l | z_<l)
    q(z | x) = prod_l q(z_l | z_<l, x)
    q(z | x_o) = prod_l q(z_l | z_<l, x_o)

The first two are the VAE. The third, the partially observed posterior, has its own encoder and one more head in every
decoder block. They see the decoder's state but pass no gradient to it, so the VAE trains as it would alone.

Pixels are integers 0, ..., L - 1 (255 for 8 bits), not in [0, 1].
"""

import functools
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pydantic import Field

from posterior_matching.config import Positive, Steps, Width
from posterior_matching.errors import UserError
from posterior_matching.masking import checked, partial_input
from posterior_matching.models.distributions import (
    Distribution,
    ExplicitDistribution,
    diagonal_gaussian,
    diagonal_gaussian_sample,
    kl_divergence,
    sample_and_log_prob,
    tril_gaussian,
    tril_gaussian_parameters,
)
from posterior_matching.models.logistic_mixture import DiscretisedLogisticMixture, logistic_mixture_parameters
from posterior_matching.models.marginal_likelihood import (
    ConditionalLogProb,
    ImportanceEstimate,
    log_mean_weight,
    log_prob_of_observed,
)
from posterior_matching.models.networks import Conv, Shape
from posterior_matching.models.vdvae_layout import (
    DecoderLayer,
    EncoderLayer,
    default_blocks,
    encoder_resolutions,
    parse_decoder,
    parse_encoder,
    parse_widths,
)

_COMPUTE_TYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class BottleneckBlock(nnx.Module):
    """Four convolutions, GELU before each: 1x1 to the bottleneck's share of `width`, 3x3, 3x3, 1x1 to `features`.

    Resolutions up to 2 have 1x1 convolutions only. `scale` is that of the last initial kernel. Computed in
    `compute_dtype`; output in float32.
    """

    def __init__(
        self, features_in: int, width: int, features: int, resolution: int, options: "BlockOptions", scale: float = 1.0
    ):
        middle, inner, rngs = max(1, int(width * options.bottleneck)), 3 if resolution > 2 else 1, options.rngs
        sizes = ((features_in, middle, 1), (middle, middle, inner), (middle, middle, inner))
        self.convs = nnx.List(Conv(i, o, size, 1, "SAME", rngs=rngs) for i, o, size in sizes)
        self.convs.append(Conv(middle, features, 1, 1, "SAME", kernel_scale=scale, rngs=rngs))
        self.compute_dtype = options.compute_dtype

    @jax.jit  # traced once for all blocks of equal shapes
    def __call__(self, *inputs: jax.Array) -> jax.Array:
        """Maps `[B, R, R, features_in]`, or several arrays that have these channels together, to `[B, R, R, features]`.

        The first GELU is of each input by itself: XLA computes it once for all blocks with this input.
        """
        x = self.convs[0](*(jax.nn.gelu(part.astype(self.compute_dtype)) for part in inputs))
        for conv in self.convs[1:]:
            x = conv(jax.nn.gelu(x))
        return x.astype(jnp.float32)


class BlockOptions(NamedTuple):
    """The options shared by all blocks."""

    bottleneck: float
    compute_dtype: Any
    rematerialise: bool
    rngs: nnx.Rngs


class PyramidEncoder(nnx.Module):
    """Residual blocks and average pooling, from an image to one activation per resolution."""

    def __init__(self, channels: int, layers: list[EncoderLayer], widths: dict[int, int], options: BlockOptions):
        self.pools = tuple(layer.pool for layer in layers)
        self.widths = tuple(widths[layer.output_resolution] for layer in layers)  # after every block
        self.conv_in = Conv(channels, widths[layers[0].resolution], 3, 1, "SAME", rngs=options.rngs)
        self.blocks = nnx.List(
            BottleneckBlock(widths[r], widths[r], widths[r], r, options, len(layers) ** -0.5) for r, _ in layers
        )
        self.rematerialise = options.rematerialise

    def __call__(self, x: jax.Array) -> dict[int, jax.Array]:
        """Maps `[B, H, H, channels]` to `{R: [B, R, R, width of R]}`, the last activation at every resolution."""
        x = self.conv_in(x)
        activations = {x.shape[1]: x}
        for block, pool, width in zip(self.blocks, self.pools, self.widths, strict=True):
            x = x + _checkpointed(block, self.rematerialise)(x)
            x = _with_channels(_average_pool(x, pool), width)
            activations[x.shape[1]] = x
        return activations


class DecoderBlock(nnx.Module):
    """One latent grid z `[B, R, R, e]`: its prior and both posteriors given the state x, and the state after it."""

    def __init__(self, layer: DecoderLayer, width: int, latent_dim: int, num_blocks: int, options: BlockOptions):
        r, e = layer.resolution, latent_dim
        self.resolution, self.lower_resolution = layer
        self.width, self.latent_dim = width, latent_dim
        self.posterior_head = BottleneckBlock(2 * width, width, 2 * e, r, options)
        self.prior_head = BottleneckBlock(width, width, 2 * e + width, r, options, 0.0)
        self.partial_posterior_head = BottleneckBlock(2 * width, width, tril_gaussian_parameters(e), r, options)
        self.project = Conv(e, width, 1, 1, "SAME", kernel_scale=num_blocks**-0.5, rngs=options.rngs)
        self.resnet = BottleneckBlock(width, width, width, r, options, num_blocks**-0.5)

    def prior(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Parameters of p(z_l | z_<l), a diagonal Gaussian at each of `[B, R, R]`, and a residual for the state."""
        # Materialised, so that the gradients of the two parts are joined once.
        parameters, residual = jnp.split(self.prior_head(x), [2 * self.latent_dim], axis=-1)
        return parameters, residual

    def posterior(self, x: jax.Array, encoded: dict[int, jax.Array]) -> jax.Array:
        """Parameters of q(z_l | z_<l, x), a diagonal Gaussian."""
        return self.posterior_head(x, encoded[self.resolution])

    def partial_posterior(self, x: jax.Array, encoded: dict[int, jax.Array]) -> jax.Array:
        """Parameters of q(z_l | z_<l, x_o), a full-covariance Gaussian. No gradient flows into the state."""
        return self.partial_posterior_head(jax.lax.stop_gradient(x), encoded[self.resolution])

    def advance(self, x: jax.Array, residual: jax.Array, z: jax.Array) -> jax.Array:
        """The state after the block."""
        x = x + residual + self.project(z)
        return x + self.resnet(x)


# At a decoder block: (block, key or noise, state) -> (residual from the prior, z, terms to collect).
Step = Callable[[DecoderBlock, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]
# (block, state, encoded) -> q(z_l | z_<l, ...)
Posterior = Callable[[DecoderBlock, jax.Array, dict[int, jax.Array]], Distribution]


class VDVAETerms(NamedTuple):
    """What training optimises, per example and in nats; all `[B]`."""

    reconstruction_ll: jax.Array  # log p(x | z), one z ~ q(z | x)
    kl: jax.Array  # KL(q(z_l | z_<l, x) || p(z_l | z_<l)), summed over blocks
    pm_kl: jax.Array  # KL(q(z_l | z_<l, x) || q(z_l | z_<l, x_o)), summed over blocks

    def elbo(self) -> jax.Array:
        """Evidence lower bound on log p(x)."""
        return self.reconstruction_ll - self.kl

    def loss(self) -> jax.Array:
        """Negative ELBO plus the Posterior Matching loss, here in closed form (paper, section 4.4)."""
        return -self.elbo() + self.pm_kl


class PosteriorMatchingVDVAE(nnx.Module):
    """A very deep VAE of images that models every conditional p(x_u | x_o).

    Args:
        input_shape: `(H, H, C)`, with 1 or 3 channels.
        encoder: Blocks of both encoders, for example "28x6,28d2,14x4": `RxN` is N blocks at resolution R, `RdK` one
            block followed by K-fold average pooling; None: `vdvae_layout.default_blocks`.
        decoder: Blocks of the decoder, for example "14x4,28m14,28x6": `RmK` is one block whose input adds the state of
            resolution K, upsampled; None: `vdvae_layout.default_blocks`.
        latent_dim: e, channels of every latent grid.
        width: Channels of the state.
        bottleneck: Channels inside the blocks, as a share of the width.
        custom_widths: Widths of individual resolutions that differ from `width`, such as "14:128,7:256".
        no_bias_above: States of resolutions up to this start at a learned bias, others at zero.
        num_components: Components of the discretised mixture of logistics p(x | z).
        num_levels: The number of values that a pixel can have: x is in 0..num_levels - 1.
        rematerialise: Recompute activations inside blocks in the backward pass, to save memory.
        compute_dtype: "float32" or "bfloat16", for the convolutions in the blocks; everything else is float32.
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        encoder: str | None = None,
        decoder: str | None = None,
        latent_dim: Width,
        width: Width,
        bottleneck: Annotated[Positive, Field(le=16)] = 0.25,
        custom_widths: str = "",
        no_bias_above: Steps = 64,
        num_components: Width = 10,
        num_levels: Annotated[Width, Field(ge=2)] = 256,
        rematerialise: bool = False,
        compute_dtype: Literal["float32", "bfloat16"] = "float32",
        rngs: nnx.Rngs,
    ):
        if len(input_shape) != 3 or input_shape[0] != input_shape[1] or input_shape[2] not in (1, 3):
            raise UserError(
                f"a VDVAE needs square images of 1 or 3 channels, but the data have shape {tuple(input_shape)}"
            )
        self.input_shape = tuple(input_shape)
        size, _, self.channels = input_shape
        by_default = default_blocks(size)
        encoder_layers = parse_encoder(by_default[0] if encoder is None else encoder, size)
        resolutions = encoder_resolutions(encoder_layers)
        decoder_layers = parse_decoder(by_default[1] if decoder is None else decoder, size, resolutions)
        widths = parse_widths(custom_widths, width, resolutions)
        self.latent_dim, self.num_levels, self.rematerialise = latent_dim, num_levels, rematerialise
        block_rngs = nnx.Rngs(params=rngs.params())
        block_rngs.params()  # the first key has never been used; thus a seed keeps its weights
        options = BlockOptions(bottleneck, _COMPUTE_TYPES[compute_dtype], rematerialise, block_rngs)
        self.encoder = PyramidEncoder(self.channels, encoder_layers, widths, options)
        self.partial_encoder = PyramidEncoder(self.channels + 1, encoder_layers, widths, options)
        self.blocks = nnx.List(
            DecoderBlock(layer, widths[layer.resolution], latent_dim, len(decoder_layers), options)
            for layer in decoder_layers
        )
        learned = {layer.resolution for layer in decoder_layers if layer.resolution <= no_bias_above}
        self.biases = nnx.Dict({str(r): nnx.Param(jnp.zeros((r, r, widths[r]))) for r in learned})
        self.gain = nnx.Param(jnp.ones(widths[size]))
        self.bias = nnx.Param(jnp.zeros(widths[size]))
        outputs = logistic_mixture_parameters(self.channels, num_components)
        self.conv_out = Conv(widths[size], outputs, 1, 1, "SAME", rngs=rngs)

    def to_levels(self, x: jax.Array) -> jax.Array:
        """Maps images in [0, 1] to integers 0..num_levels - 1, which all other methods take and return."""
        return jnp.round(x * (self.num_levels - 1))

    def from_levels(self, x: jax.Array) -> jax.Array:
        """The inverse of `to_levels`."""
        return x / (self.num_levels - 1)

    def terms(self, x: jax.Array, b: jax.Array, key: jax.Array) -> VDVAETerms:
        """The terms of the training objective, for integers `x: [B, H, W, C]` and masks `b: [B, H, W, 1]`."""
        encoded, partially_encoded = self._encode(x), self._encode_observed(x, b)

        def step(
            block: DecoderBlock, noise: jax.Array, state: jax.Array
        ) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
            prior, residual = block.prior(state)
            posterior = block.posterior(state, encoded)
            matched = block.partial_posterior(state, partially_encoded)
            z = diagonal_gaussian_sample(posterior, noise)
            return residual, z, (prior, posterior, matched)

        sizes = [len(x) * block.resolution**2 * self.latent_dim for block in self.blocks]
        noise = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])  # one draw for all blocks
        p, collected = self._decode(step, noise, len(x))
        # All positions of all blocks in one array, `[B, positions, ...]`: one computation instead of one per block.
        prior, posterior, matched = (
            jnp.concatenate([a.reshape(len(x), -1, a.shape[-1]) for a in parts], axis=1)
            for parts in zip(*collected, strict=True)
        )
        q, matched = diagonal_gaussian(posterior), tril_gaussian(matched, self.latent_dim)
        return VDVAETerms(
            reconstruction_ll=log_prob_of_observed(p, x, jnp.ones_like(b)),
            kl=kl_divergence(q, diagonal_gaussian(prior)).sum(1),
            pm_kl=kl_divergence(jax.lax.stop_gradient(q), matched).sum(1),
        )

    def sample(self, num_samples: int, *, key: jax.Array, mean: bool = False) -> jax.Array:
        """Draws x ~ p(x | z) (or its mean if `mean`) for z ~ p(z); `[num_samples, H, W, C]`."""

        def step(block: DecoderBlock, key: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array, None]:
            prior, residual = block.prior(state)
            return residual, diagonal_gaussian(prior).sample(key), None

        key_z, key_x = jax.random.split(key)
        p, _ = self._decode(step, jax.random.split(key_z, len(self.blocks)), num_samples)
        return p.mean if mean else p.sample(key_x)

    def reconstruct(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Mean of p(x | z) for z ~ q(z | x); `[B, H, W, C]` like `x`."""
        return self._decode_draw(self._posterior, self._encode(x), key, len(x))[0].mean

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Draws imputations: means of p(x | z) for z ~ q(z | x_o), integers; see `protocols.Imputes`."""
        return self.impute_and_weigh(x, b, num_samples, key=key)[0]

    def impute_and_weigh(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Like `impute`; also returns log p(x_o, z) - log q(z | x_o) of each draw, `[num_samples, B]`."""
        x, b = checked(x, b, self.input_shape)
        encoded = self._encode_observed(x, b)

        def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            p, log_ratio = self._decode_draw(self._partial_posterior, encoded, key, len(x))
            return p.mean, log_prob_of_observed(p, x, b) + log_ratio

        means, log_weights = jax.lax.map(draw, jax.random.split(key, num_samples))
        return jnp.where(b == 1, x, means), log_weights

    def is_log_prob(
        self,
        x: jax.Array,
        b: jax.Array,
        num_samples: int,
        *,
        key: jax.Array,
        available: jax.Array | None = None,
        chunk_size: int = 16,
    ) -> ConditionalLogProb:
        """Importance-samples log p(x) with the posteriors as proposals, log p(x_o) with the partially observed ones.

        A weight is p(x_o | z) prod_l p(z_l | z_<l) / q(z_l | z_<l, ...) over all blocks. Pixels that are not available
        (None: all are) are never scored. At most `chunk_size` of the `num_samples` of each estimate are held at once.
        """
        x, b = checked(x, b, self.input_shape)
        available = jnp.ones_like(b) if available is None else jnp.asarray(available)
        b = b * available

        def estimate(
            posterior: Posterior, encoded: dict[int, jax.Array], mask: jax.Array, key: jax.Array
        ) -> ImportanceEstimate:
            def log_weights(key: jax.Array, chunk_size: int) -> jax.Array:
                repeated, x_s, mask_s = jax.tree.map(lambda a: _repeat(a, chunk_size), (encoded, x, mask))
                p, log_ratio = self._decode_draw(posterior, repeated, key, len(x_s))
                return (log_prob_of_observed(p, x_s, mask_s) + log_ratio).reshape(chunk_size, len(x))

            return log_mean_weight(log_weights, key, num_samples, chunk_size)

        key_x, key_xo = jax.random.split(key)
        return ConditionalLogProb.of(
            estimate(self._posterior, self._encode(x), available, key_x),
            estimate(self._partial_posterior, self._encode_observed(x, b), b, key_xo),
        )

    def _encode(self, x: jax.Array) -> dict[int, jax.Array]:
        return self.encoder(2.0 * x / (self.num_levels - 1) - 1.0)

    def _encode_observed(self, x: jax.Array, b: jax.Array) -> dict[int, jax.Array]:
        return self.partial_encoder(partial_input(2.0 * x / (self.num_levels - 1) - 1.0, b))

    def _posterior(self, block: DecoderBlock, state: jax.Array, encoded: dict[int, jax.Array]) -> ExplicitDistribution:
        return diagonal_gaussian(block.posterior(state, encoded))

    def _partial_posterior(
        self, block: DecoderBlock, state: jax.Array, encoded: dict[int, jax.Array]
    ) -> ExplicitDistribution:
        return tril_gaussian(block.partial_posterior(state, encoded), self.latent_dim)

    def _decode(
        self, step: Step, randomness: Iterable[jax.Array], batch: int
    ) -> tuple[DiscretisedLogisticMixture, list[Any]]:
        """Runs all blocks, each with its randomness; returns p(x | z) and what `step` collected at each."""

        def run_block(block: DecoderBlock, randomness: jax.Array, state: jax.Array) -> tuple[jax.Array, Any]:
            residual, z, collected = step(block, randomness, state)
            return block.advance(state, residual, z), collected

        states: dict[int, jax.Array] = {}
        collected = []
        for block, of_block in zip(self.blocks, randomness, strict=True):
            state = states[block.resolution] if block.resolution in states else self._initial_state(block, batch)
            if block.lower_resolution is not None:
                lower = _with_channels(states[block.lower_resolution], block.width)
                state = state + upsample(lower, block.resolution)
            run = _checkpointed(functools.partial(run_block, block), self.rematerialise)
            states[block.resolution], terms = run(of_block, state)
            collected.append(terms)
        parameters = self.conv_out(states[self.input_shape[0]] * self.gain[...] + self.bias[...])
        return DiscretisedLogisticMixture(parameters, self.channels, self.num_levels), collected

    def _decode_draw(
        self, posterior: Posterior, encoded: dict[int, jax.Array], key: jax.Array, batch: int
    ) -> tuple[DiscretisedLogisticMixture, jax.Array]:
        """p(x | z) for z from a posterior, and log p(z) - log q(z), `[B]`."""

        def step(block: DecoderBlock, key: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            prior, residual = block.prior(state)
            z, log_q = sample_and_log_prob(posterior(block, state, encoded), key)
            log_prior = diagonal_gaussian(prior).log_prob(z)
            return residual, z, (log_prior - log_q).sum((1, 2))  # over positions

        p, log_ratios = self._decode(step, jax.random.split(key, len(self.blocks)), batch)
        return p, sum(log_ratios[1:], log_ratios[0])  # over blocks

    def _initial_state(self, block: DecoderBlock, batch: int) -> jax.Array:
        name, shape = str(block.resolution), (block.resolution, block.resolution, block.width)
        bias = self.biases[name][...] if name in self.biases else jnp.zeros(shape)
        return jnp.broadcast_to(bias, (batch, *shape))


class UnitRange(nnx.Module):
    """A PM-VDVAE that imputes images in [0, 1] instead of integer pixel values."""

    def __init__(self, vdvae: PosteriorMatchingVDVAE):
        self.vdvae = vdvae

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """See `protocols.Imputes`."""
        return self.impute_and_weigh(x, b, num_samples, key=key)[0]

    def impute_and_weigh(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """See `protocols.Imputes`."""
        imputations, log_weights = self.vdvae.impute_and_weigh(self.vdvae.to_levels(x), b, num_samples, key=key)
        return self.vdvae.from_levels(imputations), log_weights


def _checkpointed(fn: Callable[..., Any], rematerialise: bool) -> Callable[..., Any]:
    return jax.checkpoint(fn) if rematerialise else fn


def _average_pool(x: jax.Array, k: int) -> jax.Array:
    """Means over k x k windows of `[B, H, W, C]`; rows and columns that do not fill a window are dropped."""
    if k == 1:
        return x
    n, height, width, channels = x.shape
    x = x[:, : height // k * k, : width // k * k]
    return x.reshape(n, height // k, k, width // k, k, channels).mean((2, 4))


def upsample(x: jax.Array, size: int) -> jax.Array:
    """Nearest-neighbour upsampling: pixel i of `size` is pixel floor(i * small / size) of `[B, small, small, C]`."""
    factor, rest = divmod(size, x.shape[1])
    if rest == 0:  # the gradient is a sum; that of indexing is a scatter, which is slow on CPUs
        return x.repeat(factor, 1).repeat(factor, 2)
    index = jnp.arange(size) * x.shape[1] // size
    return x[:, index][:, :, index]


def _with_channels(x: jax.Array, channels: int) -> jax.Array:
    """Drops channels of `[B, H, W, C]`, or appends zeros, where adjacent resolutions differ in width."""
    x = x[..., :channels]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, channels - x.shape[-1])))


def _repeat(a: jax.Array, times: int) -> jax.Array:
    """`[B, ...]` -> `[times * B, ...]`."""
    return jnp.broadcast_to(a, (times, *a.shape)).reshape(-1, *a.shape[1:])
