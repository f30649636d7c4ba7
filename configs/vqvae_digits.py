"""VQ-VAE on scikit-learn's 8x8 digits, the base of `pm_vqvae_digits`.

python train_vqvae.py --config configs/vqvae_digits.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.vqvae(hidden_units=64, residual_units=32, codebook_size=16, embedding_dim=16)
    config.dataset = "digits"
    config.model.strides = (2, 1)  # a 4x4 code grid; a 2x2 grid has too few codes
    config.model.kernel_scale = 1.0
    config.noise_std = 0.05  # like EMA, against overfitting the 1,257 images
    config.ema_decay = 0.995
    config.batch_size = 64
    config.steps = 4000
    config.validation_every = 500
    config.optimizer.update({"learning_rate": 2e-3, "decay_rate": 0.9, "transition_steps": 300})
    return config
