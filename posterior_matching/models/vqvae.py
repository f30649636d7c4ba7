"""The VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), and Posterior Matching over its discrete latents."""

import itertools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from pydantic import Field

from posterior_matching.config import Blocks, Config, Decay, NonNegative, Scale, Width, call
from posterior_matching.errors import OptionError, UserError
from posterior_matching.masking import checked, partial_input, partial_input_shape
from posterior_matching.models.distributions import ExplicitDistribution, SharedScaleGaussian
from posterior_matching.models.marginal_likelihood import log_prob_of_observed
from posterior_matching.models.networks import Conv, ConvTranspose, Shape
from posterior_matching.models.pixel_cnn import PixelCNN

Stride = Annotated[int, Field(ge=1, le=64)]
_EPSILON = 1e-5  # Laplace smoothing of the codes' average counts


class Body(NamedTuple):
    """The sizes that encoders and decoder share."""

    hidden_units: int  # channels, half as many next to the image
    residual_units: int  # channels inside the residual blocks
    residual_blocks: int
    strides: tuple[int, int]  # of the two 4x4 convolutions


class ResidualStack(nnx.Module):
    """Residual blocks `x + Conv1x1(ReLU(Conv3x3(ReLU(x))))`, and a ReLU at the end."""

    def __init__(self, body: Body, *, rngs: nnx.Rngs):
        features, units = body.hidden_units, body.residual_units

        def block() -> nnx.List:
            return nnx.List((Conv(features, units, 3, 1, "SAME", rngs=rngs), nnx.Linear(units, features, rngs=rngs)))

        self.blocks = nnx.List(block() for _ in range(body.residual_blocks))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, features]` to the same shape."""
        for conv3x3, conv1x1 in self.blocks:
            x = x + conv1x1(jax.nn.relu(conv3x3(jax.nn.relu(x))))
        return jax.nn.relu(x)


class GridFeatures(nnx.Module):
    """Images to a grid of features: two 4x4 convolutions, possibly strided, a 3x3 one, residual blocks.

    Raises:
        UserError: The data are not images, or the strides do not divide their size.
    """

    def __init__(self, input_shape: Shape, body: Body, *, rngs: nnx.Rngs):
        if len(input_shape) != 3:
            raise UserError(f"a VQ-VAE needs images (H, W, C), but the data have shape {tuple(input_shape)}")
        height, width, channels = input_shape
        features, strides, shrink = body.hidden_units, body.strides, math.prod(body.strides)
        if height % shrink or width % shrink:
            size = max(shrink, min(height, width) // shrink * shrink)
            found = f"images of {height}x{width} do not fit a code grid {shrink} times smaller"
            raise OptionError("strides", f"{{}}={strides}: {found}: set config.images.size={size} for your own images")
        widths = itertools.pairwise((channels, features // 2, features, features))
        layers = zip(widths, (4, 4, 3), (*strides, 1), strict=True)
        self.convs = nnx.List(Conv(*sizes, kernel, stride, "SAME", rngs=rngs) for sizes, kernel, stride in layers)
        self.residual = ResidualStack(body, rngs=rngs)
        self.output_shape = (height // shrink, width // shrink, features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, *output_shape]`."""
        for conv in self.convs:
            x = jax.nn.relu(conv(x))
        return self.residual(x)


class GridEncoder(GridFeatures):
    """Images to a grid of vectors: `GridFeatures` and a 1x1 convolution to `features` channels."""

    def __init__(self, input_shape: Shape, features: int, body: Body, *, rngs: nnx.Rngs):
        super().__init__(input_shape, body, rngs=rngs)
        self.out = nnx.Linear(body.hidden_units, features, rngs=rngs)
        self.output_shape = (*self.output_shape[:2], features)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, H, W, C]` to `[B, *output_shape]`."""
        return self.out(super().__call__(x))


class GridDecoder(nnx.Module):
    """The mirror image of `GridEncoder`: a grid of vectors to `[B, H, W, channels]`."""

    def __init__(self, features: int, channels: int, body: Body, *, rngs: nnx.Rngs):
        width = body.hidden_units
        self.conv = Conv(features, width, 3, 1, "SAME", rngs=rngs)
        self.residual = ResidualStack(body, rngs=rngs)
        self.grow = ConvTranspose(width, width // 2, 4, body.strides[1], "SAME", rngs=rngs)
        self.out = ConvTranspose(width // 2, channels, 4, body.strides[0], "SAME", rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, h, w, features]` to `[B, H, W, channels]`."""
        return self.out(jax.nn.relu(self.grow(self.residual(self.conv(x)))))


class Average(nnx.Variable):
    """One of the moving averages behind a codebook: state, not a parameter."""


class Quantized(NamedTuple):
    """The quantiser's output for `z: [B, h, w, e]`."""

    z: jax.Array  # [B, h, w, e], codebook vectors; the gradient passes straight through to the input
    indices: jax.Array  # [B, h, w] int32
    loss: jax.Array  # [B], mean squared distances, weighted


class VectorQuantizer(nnx.Module):
    """Maps each vector to the nearest of `codebook_size` codebook vectors, with a straight-through gradient.

    By default the codebook tracks the encoder by exponential moving averages (that paper's appendix A.1), one step per
    call of `update`, and has no gradient. Otherwise it is a parameter, trained by the codebook loss.

    `commitment_cost` weighs the squared distance that keeps the encoder close to the codebook.
    """

    def __init__(
        self,
        codebook_size: int,
        embedding_dim: int,
        commitment_cost: float = 0.25,
        use_ema: bool = True,
        decay: float = 0.99,
        *,
        rngs: nnx.Rngs,
    ):
        bound = math.sqrt(3 / embedding_dim)  # variance 1 / e
        initial = jax.random.uniform(rngs.params(), (codebook_size, embedding_dim), minval=-bound, maxval=bound)
        self.codebook = Average(initial) if use_ema else nnx.Param(initial)
        if use_ema:
            self.count_average = Average(jnp.zeros(codebook_size))
            self.sum_average = Average(jnp.zeros((codebook_size, embedding_dim)))
            self.num_updates = Average(jnp.zeros((), jnp.int32))
        self.commitment_cost, self.use_ema, self.decay = commitment_cost, use_ema, decay

    def __call__(self, z: jax.Array) -> Quantized:
        """Quantises `z: [B, h, w, e]`."""
        indices = self.nearest(z)
        quantized = self.lookup(indices)
        grid = (1, 2, 3)  # positions and dimensions
        loss = self.commitment_cost * jnp.square(jax.lax.stop_gradient(quantized) - z).mean(grid)
        if not self.use_ema:
            loss = loss + jnp.square(quantized - jax.lax.stop_gradient(z)).mean(grid)
        return Quantized(z + jax.lax.stop_gradient(quantized - z), indices, loss)

    def nearest(self, z: jax.Array) -> jax.Array:
        """Indices, int32 `[...]`, of the codebook vectors nearest to `z: [..., e]` (squared Euclidean distance)."""
        codebook = self.codebook[...]
        # |z - c|^2 = |z|^2 - 2 z c + |c|^2, and |z|^2 is the same for all c.
        distances = jnp.square(codebook).sum(-1) - 2 * z.reshape(-1, z.shape[-1]) @ codebook.T
        return jnp.argmin(distances, axis=-1).reshape(z.shape[:-1])

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Codebook vectors `[..., e]` of `indices: [...]`."""
        return self.codebook[...][indices]

    def update(self, z: jax.Array, indices: jax.Array, axis_name: str | None = None) -> None:
        """Moves the codebook towards the vectors assigned to it; call this once per training step.

        Averages are divided by `1 - decay^t` to correct for their start at zero. A code that was never chosen keeps its
        initial value (the formula would move it to zero). Statistics of the encoder's outputs z, `[B, h, w, e]`, and
        their `indices` are summed over the devices of `axis_name`; None: this device only.
        """
        if not self.use_ema:
            return
        z = jax.lax.stop_gradient(z).reshape(-1, z.shape[-1])
        chosen = jax.nn.one_hot(indices.reshape(-1), len(self.codebook[...]))  # [B h w, K]
        counts, sums = chosen.sum(0), chosen.T @ z
        if axis_name is not None:
            counts, sums = jax.lax.psum((counts, sums), axis_name)

        self.num_updates[...] += 1
        self.count_average[...] = self.decay * self.count_average[...] + (1 - self.decay) * counts
        self.sum_average[...] = self.decay * self.sum_average[...] + (1 - self.decay) * sums
        unbiased = 1 - self.decay ** self.num_updates[...].astype(jnp.float32)
        sizes, sums = self.count_average[...] / unbiased, self.sum_average[...] / unbiased
        total = sizes.sum()
        smoothed = (sizes + _EPSILON) / (total + len(sizes) * _EPSILON) * total
        self.codebook[...] = jnp.where(sizes[:, None] > 0, sums / smoothed[:, None], self.codebook[...])


class VQVAETerms(NamedTuple):
    """What training optimises, per example, and the chosen codes."""

    reconstruction_ll: jax.Array  # [B], log p(x | q) in nats
    quantizer_loss: jax.Array  # [B], commitment (and codebook) loss
    indices: jax.Array  # [B, h, w]

    def loss(self) -> jax.Array:
        """`[B]`: negative log-likelihood plus quantiser loss."""
        return -self.reconstruction_ll + self.quantizer_loss


class VQVAE(nnx.Module):
    """An autoencoder whose latent is a grid of indices into a codebook; p(x | q) is Gaussian with one learned scale.

    The options are those of `Body`, whose strides must divide the size of the images, of `VectorQuantizer`, and
    `kernel_scale`, a factor on all initial kernels. 0.88 is that of the published implementation, which does not
    rescale its truncated normal distribution to the standard deviation 1 / sqrt(fan_in).
    """

    def __init__(
        self,
        *,
        input_shape: Shape,
        hidden_units: Annotated[Width, Field(ge=2)],
        residual_units: Width,
        residual_blocks: Blocks,
        codebook_size: Width,
        embedding_dim: Width,
        commitment_cost: NonNegative = 0.25,
        use_ema: bool = True,
        decay: Decay = 0.99,
        strides: tuple[Stride, Stride] = (2, 2),
        kernel_scale: Scale = 1.0,
        rngs: nnx.Rngs,
    ):
        self.body = Body(hidden_units, residual_units, residual_blocks, strides)
        self.encoder = GridEncoder(input_shape, embedding_dim, self.body, rngs=rngs)
        self.quantizer = VectorQuantizer(codebook_size, embedding_dim, commitment_cost, use_ema, decay, rngs=rngs)
        self.decoder = GridDecoder(embedding_dim, input_shape[-1], self.body, rngs=rngs)
        self.likelihood_head = SharedScaleGaussian(input_shape, input_shape)
        self.codebook_size = codebook_size
        for _, module in nnx.iter_modules(self):
            if hasattr(module, "kernel"):
                module.kernel[...] *= kernel_scale

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the code grid."""
        return self.encoder.output_shape[:2]

    def indices(self, x: jax.Array) -> jax.Array:
        """The latent code of images `[B, H, W, C]` in [0, 1]: indices `[B, h, w]`."""
        return self.quantizer.nearest(self.encoder(x))

    def decode(self, indices: jax.Array) -> ExplicitDistribution:
        """p(x | q) for codes `[B, h, w]`: independent Normals, batch shape `[B, H, W, C]`."""
        return self.likelihood_head(self.decoder(self.quantizer.lookup(indices)))

    def reconstruct(self, x: jax.Array) -> jax.Array:
        """Images `[B, H, W, C]` through the code and back, clipped to [0, 1]."""
        return jnp.clip(self.decode(self.indices(x)).mean, 0.0, 1.0)

    def terms(self, x: jax.Array, *, update_codebook: bool = False, axis_name: str | None = None) -> VQVAETerms:
        """The terms of the training objective for images in [0, 1]; in training, also updates the codebook."""
        z = self.encoder(x)
        quantized = self.quantizer(z)
        p = self.likelihood_head(self.decoder(quantized.z))
        if update_codebook:
            self.quantizer.update(z, quantized.indices, axis_name)
        everything = jnp.ones((*x.shape[:-1], 1))
        return VQVAETerms(log_prob_of_observed(p, x, everything), quantized.loss, quantized.indices)


class PosteriorMatchingVQVAE(nnx.Module):
    """A VQ-VAE that models p(x_u | x_o): q(z | x_o) is a PixelCNN over code grids, conditioned on the observed pixels.

    Args:
        input_shape: `(H, W, C)`.
        vqvae: The options of `VQVAE`. The partial encoder, which sees `[x * b, b]`, is built like its encoder, but with
            a linear layer instead of the 1x1 convolution.
        conditional_dim: Length of the PixelCNN's conditional input.
        pixel_cnn: The options of `PixelCNN`.
        rngs: Source of initial weights.
    """

    def __init__(self, *, input_shape: Shape, vqvae: Config, conditional_dim: Width, pixel_cnn: Config, rngs: nnx.Rngs):
        self.input_shape = input_shape
        self.vqvae: VQVAE = call(VQVAE, vqvae, "vqvae", input_shape=input_shape, rngs=rngs)
        self.partial_encoder = GridFeatures(partial_input_shape(input_shape), self.vqvae.body, rngs=rngs)
        self.condition = nnx.Linear(math.prod(self.partial_encoder.output_shape), conditional_dim, rngs=rngs)
        sizes = {"grid": self.vqvae.grid, "codebook_size": self.vqvae.codebook_size, "conditional_dim": conditional_dim}
        self.pixel_cnn: PixelCNN = call(PixelCNN, pixel_cnn, "pixel_cnn", **sizes, rngs=rngs)

    def conditional_input(self, x: jax.Array, b: jax.Array) -> jax.Array:
        """The PixelCNN's conditional input, from the observed pixels of `x: [B, H, W, C]`: `[B, conditional_dim]`."""
        features = self.partial_encoder(partial_input(x, b))
        return self.condition(features.reshape(len(x), -1))

    def matching_ll(self, x: jax.Array, b: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """log q(z | x_o) in nats, `[B]`, at the code z of x: its mean is the Posterior Matching objective."""
        return self.pixel_cnn.log_prob(self.vqvae.indices(x), self.conditional_input(x, b), rngs)

    def impute(self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array) -> jax.Array:
        """Draws imputations: decoder means for z ~ q(z | x_o), clipped to [0, 1]; see `protocols.Imputes`."""
        return self.impute_and_weigh(x, b, num_samples, key=key)[0]

    def impute_and_weigh(
        self, x: jax.Array, b: jax.Array, num_samples: int, *, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Like `impute`; also returns log p(x_o, z) - log q(z | x_o) of each draw, `[num_samples, B]`.

        A VQ-VAE has no prior p(z). The PixelCNN's distribution given that nothing is observed takes its place.
        """
        x, b = checked(x, b, self.input_shape)
        conditions = (self.conditional_input(x, b), self.conditional_input(x, jnp.zeros_like(b)))
        given_xo, given_nothing, xs, bs = (jnp.tile(a, (num_samples, *[1] * (a.ndim - 1))) for a in (*conditions, x, b))
        codes = self.pixel_cnn.sample(given_xo, key)  # [S B, h, w]
        p = self.vqvae.decode(codes)
        log_prior, log_q = (self.pixel_cnn.log_prob(codes, condition) for condition in (given_nothing, given_xo))
        log_weights = log_prob_of_observed(p, xs, bs) + log_prior - log_q
        imputations = jnp.where(b == 1, x, jnp.clip(p.mean, 0.0, 1.0).reshape(num_samples, *x.shape))
        return imputations, log_weights.reshape(num_samples, -1)
