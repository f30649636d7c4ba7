"""PM-VQVAE on scikit-learn's 8x8 digits.

python train_pm_vqvae.py --config configs/pm_vqvae_digits.py --config.vqvae_dir=RUN
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vqvae(num_resnet=2, num_filters=48, conditional_dim=128)
    config.dataset = "digits"
    config.mask_generator = {"name": "MNISTMaskGenerator", "dim": 8}
    config.model.pixel_cnn.dropout = 0.1
    config.noise_std = 0.08
    config.batch_size = 32
    config.steps = 7000
    config.validation_every = 1000
    config.ema_decay = 0.998
    config.optimizer.update({"learning_rate": 2e-3, "decay_rate": 0.9, "transition_steps": 400})
    return config
