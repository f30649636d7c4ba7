"""VaDE on scikit-learn's 8x8 digits, about 1 minute on 2 CPU cores.

    python train_vade.py --config configs/vade_digits.py

A plain autoencoder of the 1,257 images clusters no better than k-means. Distorting its inputs but not its targets makes
the latents forget slant, size and position, which raises the accuracy.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.vade()
    network = common.residual_mlp(residual_blocks=1)
    config.dataset = "digits"
    config.model = {
        "latent_dim": 10,
        "num_clusters": 10,
        "encoder": network,
        "posterior": {"name": "DiagonalGaussian"},
        "decoder": network.copy_and_resolve_references(),
        "likelihood": {"name": "IdentityGaussian"},
    }
    config.noise_std = 0.1
    config.distortion_std = 0.2
    config.ema_decay = 0.995
    config.batch_size = 128
    config.pretraining.steps = 1500
    config.pretraining.optimizer.learning_rate = 2e-3
    config.pretraining.optimizer.decay_rate = 1.0
    config.pretraining.optimizer.weight_decay = 1e-3
    config.steps = config.pretraining.steps + 1000
    config.validation_every = 500
    config.optimizer.learning_rate = 1e-3
    config.optimizer.decay_rate = 0.1
    config.optimizer.transition_steps = 1000
    config.optimizer.weight_decay = 1e-3
    return config
