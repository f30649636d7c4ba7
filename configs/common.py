"""Every config key with its meaning, and the values that experiments of one family share.

Hyperparameters follow the paper's appendix; docs/differences.md lists where we depart from the published code.
"""

from ml_collections import ConfigDict, config_dict


def training() -> ConfigDict:
    """The keys of every training script."""
    config = ConfigDict()
    config.seed = 0
    config.dataset = config_dict.placeholder(str)  # a name (README, "Data") or the path of a data file
    config.table = table()
    config.images = images()
    config.train_split = "train"
    config.validation_split = "validation"
    config.batch_size = 512  # per device
    config.steps = 200_000
    config.validation_every = 1000  # steps
    config.log_every = 100  # steps
    config.patience = config_dict.placeholder(int)  # validations in a row without a lower loss; None: train all steps
    config.checkpoint_every = config_dict.placeholder(int)  # steps; None: at validations only
    config.evaluate_checkpoint = "latest"  # or "best": lowest validation loss
    config.ema_decay = config_dict.placeholder(float)  # of the weights used in validation; None: no averaging
    config.skip_nonfinite_updates = False  # True: skip and count them; False: stop with an error
    config.data_memory_budget_gb = 8.0  # per device; larger datasets stream from the host
    config.optimizer = optimizer()
    return config


def table() -> ConfigDict:
    """The keys of `data.TableOptions`: what a file of your own does not say by itself; None: detected."""
    return ConfigDict(
        {
            "separator": config_dict.placeholder(str),
            "header": config_dict.placeholder(bool),
            "encoding": config_dict.placeholder(str),
            "decimal": config_dict.placeholder(str),
            "thousands": "",
            "missing_values": (),
            "usual_missing": True,
            "drop": (),
            "categorical": (),
            "real": (),
            "log": (),
            "quantile": (),
        }
    )


def images() -> ConfigDict:
    """The keys of `data.ImageOptions`: how to use images of your own; None: as they are."""
    return ConfigDict(
        {
            "size": config_dict.placeholder(int),  # resize to size x size pixels
            "crop": config_dict.placeholder(tuple),  # (top, left, height, width), before resizing
            "channels": config_dict.placeholder(int),  # 1 or 3
            "range": config_dict.placeholder(tuple),  # the values that mean black and white
            "channels_first": config_dict.placeholder(bool),  # whether arrays are [N, C, H, W]
        }
    )


def optimizer() -> ConfigDict:
    """The keys of `training.OptimizerOptions`."""
    return ConfigDict(
        {
            "learning_rate": 1e-3,
            "decay_rate": 0.9,
            "transition_steps": 5000,
            "staircase": False,
            "warmup_steps": 0,
            "weight_decay": 0.0,
            "clip_norm": config_dict.placeholder(float),
            "eps": 1e-8,
        }
    )


def pm_vae() -> ConfigDict:
    """The keys of a PM-VAE config; `config.model` holds the options of `models.vae.PosteriorMatchingVAE`."""
    config = training()
    config.noise_std = 0.0  # Gaussian noise on the training data
    config.mask_generator = ConfigDict({"name": "BernoulliMaskGenerator", "p": 0.5})
    config.matching_coef = 1.0
    config.matching_ll_stop_gradients = False  # True: the matching term does not train the VAE
    config.elbo_samples = 1  # z per example; more tighten the bound on log p(x) (importance-weighted autoencoder)
    config.pretrained_dir = config_dict.placeholder(str)  # a PM-VAE run whose VAE is copied and frozen
    config.beta = ConfigDict({"name": "constant", "value": 1.0})
    return config


def lookahead() -> ConfigDict:
    """The keys of a lookahead config; `config.model` holds the options of `models.lookahead.LookaheadPosterior`."""
    config = training()
    config.pm_vae_dir = config_dict.placeholder(str)  # the PM-VAE run to build on; frozen
    config.mask_generator = ConfigDict({"name": "UniformMaskGenerator", "bounds": (0.0, 0.2)})
    config.model_samples = 64  # imputations per example and step
    config.lookahead_subsample = 16  # features per step, the same for the whole batch
    config.target = "marginal"  # as published; or "conditional", see `LookaheadPosterior.log_prob_of_samples`
    config.model = ConfigDict({"lookahead_encoder": None})  # a network config; None: the PM-VAE encoder's
    return config


def vade() -> ConfigDict:
    """The keys of a VaDE config; `config.model` holds the options of `models.vade.VADE`."""
    config = training()
    config.noise_std = 0.0  # Gaussian noise on the encoder's training input, not on the reconstruction target
    config.distortion_std = 0.0  # random affine distortion of the same images, see `corruption.distort`
    config.restarts = 1  # networks to pretrain; the one with the best ELBO is trained further
    config.pretraining = ConfigDict(
        {
            "steps": 70_000,  # of config.steps
            "optimizer": optimizer(),
            "mixture_inits": 10,  # fits of the mixture; the one of highest likelihood is kept
            "mixture_iterations": 300,
        }
    )
    return config


def pm_vade() -> ConfigDict:
    """The keys of a PM-VaDE config; `config.model.vade` comes from the VaDE run."""
    config = training()
    config.vade_dir = config_dict.placeholder(str)  # the VaDE run to build on; frozen
    config.noise_std = 0.0  # Gaussian noise on the training data
    config.distortion_std = 0.0  # random affine distortion of the training images, see `corruption.distort`
    config.mask_generator = ConfigDict({"name": "UniformMaskGenerator"})
    return config


def residual_mlp(residual_blocks: int, layer_norm: bool = False, dropout: float = 0.0) -> ConfigDict:
    """A ResidualMLP of 256 units."""
    return ConfigDict(
        {
            "name": "ResidualMLP",
            "residual_blocks": residual_blocks,
            "hidden_units": 256,
            "layer_norm": layer_norm,
            "dropout": dropout,
        }
    )


def autoregressive_gmm(residual_blocks: int, hidden_units: int = 256) -> ConfigDict:
    """An AutoregressiveGMM of 10 components."""
    return ConfigDict(
        {
            "name": "AutoregressiveGMM",
            "num_components": 10,
            "residual_blocks": residual_blocks,
            "hidden_units": hidden_units,
        }
    )


def pm_vae_tabular(
    latent_dim: int, encoder_blocks: int = 2, decoder_blocks: int = 2, layer_norm: bool = False, dropout: float = 0.0
) -> ConfigDict:
    """Settings shared by the experiments on tables."""
    config = pm_vae()
    config.noise_std = 0.001
    config.matching_ll_stop_gradients = True
    config.optimizer.weight_decay = 1e-5
    encoder = residual_mlp(encoder_blocks, layer_norm, dropout)
    config.model = ConfigDict(
        {
            "latent_dim": latent_dim,
            "encoder": encoder,
            "posterior": {"name": "TriLGaussian"},
            "decoder": residual_mlp(decoder_blocks, layer_norm, dropout),
            "likelihood": {"name": "IdentityGaussian"},
            "partial_encoder": encoder.copy_and_resolve_references(),
            "partial_posterior": autoregressive_gmm(residual_blocks=3),
        }
    )
    return config


def cyclic_beta(period: int, delay: int) -> ConfigDict:
    """KL weight: 0 before `delay`, then cycles of `period` with a linear rise to 1 over the first half."""
    return ConfigDict({"name": "cyclic", "low": 0.0, "high": 1.0, "period": period, "delay": delay})


def pm_vae_image(
    latent_dim: int,
    encoder_layers: tuple[tuple[int, int, int], ...],
    decoder_layers: tuple[tuple[int, int, int], ...],
    partial_posterior: ConfigDict,
) -> ConfigDict:
    """Settings shared by the image experiments; layers are (filters, kernel size, stride)."""
    config = pm_vae()
    config.evaluate_checkpoint = "best"
    encoder = ConfigDict({"name": "ConvEncoder", "conv_layers": encoder_layers})
    config.model = ConfigDict(
        {
            "latent_dim": latent_dim,
            "encoder": encoder,
            "posterior": {"name": "TriLGaussian"},
            "decoder": {"name": "ConvDecoder", "conv_layers": decoder_layers, "activate_output": False},
            "likelihood": {"name": "Bernoulli"},
            "partial_encoder": encoder.copy_and_resolve_references(),
            "partial_posterior": partial_posterior,
        }
    )
    return config


def conv_network(name: str) -> ConfigDict:
    """A ConvEncoder or ConvDecoder whose layers follow from the size of the images."""
    return ConfigDict({"name": name, "conv_layers": config_dict.placeholder(tuple)})


def for_images(config: ConfigDict) -> None:
    """Settings shared by the configs for images of your own: masks of any size, averaged weights, best checkpoint."""
    if "mask_generator" in config:
        config.mask_generator = {
            "name": "MixtureMaskGenerator",
            "generators": (
                {"name": "ImageBernoulliMaskGenerator", "p": 0.3},
                {"name": "RectangleMaskGenerator", "min_prop": 0.1, "max_prop": 0.6},
            ),
            "weights": (1.0, 2.0),
        }
    config.ema_decay = 0.999
    config.evaluate_checkpoint = "best"
    config.validation_every = 1000


def pm_vdvae() -> ConfigDict:
    """The keys of a PM-VDVAE config; `config.model` holds the options of `models.vdvae.PosteriorMatchingVDVAE`."""
    config = training()
    config.mask_generator = ConfigDict({"name": "BernoulliMaskGenerator", "p": 0.5})
    config.batch_size = 16
    config.steps = 500_000
    config.validation_every = 5000
    config.evaluate_checkpoint = "best"
    config.ema_decay = 0.999
    config.skip_nonfinite_updates = True
    config.optimizer.learning_rate = 1.5e-4
    config.optimizer.decay_rate = 1.0
    config.optimizer.clip_norm = 200.0
    config.model = ConfigDict(
        {
            "encoder": "28x6,28d2,14x4,14d2,7x2,7d2,3x2,3d2,1x2",
            "decoder": "1x2,3m1,3x2,7m3,7x2,14m7,14x4,28m14,28x6",
            "latent_dim": 16,
            "width": 192,
            "bottleneck": 0.25,
            "custom_widths": "",  # widths by resolution where they differ, "14:128,7:256"
            "no_bias_above": 64,
            "num_components": 10,
            "num_levels": 256,  # values that a pixel can take
            "rematerialise": False,  # True: less memory for a quarter more operations
            "compute_dtype": "float32",  # or bfloat16
        }
    )
    return config


def vqvae(hidden_units: int, residual_units: int, codebook_size: int, embedding_dim: int = 64) -> ConfigDict:
    """The keys of a VQ-VAE config; `config.model` holds the options of `models.vqvae.VQVAE`."""
    config = training()
    config.evaluate_checkpoint = "best"
    config.optimizer.update({"learning_rate": 3e-4, "decay_rate": 1.0, "transition_steps": 1})
    config.noise_std = 0.0  # Gaussian noise on the training images
    config.distortion_std = 0.0  # random affine distortion of the same images, see `corruption.distort`
    config.model = ConfigDict(
        {
            "hidden_units": hidden_units,
            "residual_units": residual_units,
            "residual_blocks": 2,
            "codebook_size": codebook_size,
            "embedding_dim": embedding_dim,
            "commitment_cost": 0.25,
            "use_ema": True,  # False: train the codebook with its own loss
            "decay": 0.99,  # of the moving averages that the codebook follows
            "strides": (2, 2),  # their product is the ratio of image size to code-grid size
            "kernel_scale": 0.88,  # initial standard deviation of kernels, times sqrt(fan_in); as published
        }
    )
    return config


def pm_vqvae(num_resnet: int, num_filters: int = 128, conditional_dim: int = 512) -> ConfigDict:
    """The keys of a PM-VQVAE config; `config.model.vqvae` comes from the VQ-VAE run."""
    config = training()
    config.vqvae_dir = config_dict.placeholder(str)  # the VQ-VAE run to build on; frozen
    config.evaluate_checkpoint = "best"
    config.optimizer.update({"learning_rate": 3e-4, "decay_rate": 0.999995, "transition_steps": 1})
    config.noise_std = 0.0  # Gaussian noise on the training images
    config.distortion_std = 0.0  # random affine distortion of the same images, see `corruption.distort`
    config.mask_generator = ConfigDict({"name": "BernoulliMaskGenerator", "p": 0.5})
    config.model = ConfigDict(
        {
            "conditional_dim": conditional_dim,  # size of the PixelCNN's condition, the encoded observed pixels
            "pixel_cnn": {
                "num_resnet": num_resnet,
                "num_filters": num_filters,
                "num_hierarchies": 1,
                "dropout": 0.5,
                # of the initial embedding of codes; None: 1 / sqrt(num_filters); 0.88 as published
                "embedding_std": config_dict.placeholder(float),
            },
        }
    )
    return config
