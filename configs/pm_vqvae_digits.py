"""PM-VQVAE on scikit-learn's 8x8 digits.

python train_pm_vqvae.py --config configs/pm_vqvae_digits.py --config.vqvae_dir=RUN
"""

from configs import common


def get_config():
    config = common.pm_vqvae(num_resnet=2, num_filters=48, conditional_dim=128)
    config.dataset = "digits"
    config.mask_generator = {"name": "MNISTMaskGenerator", "dim": 8}
    config.model.pixel_cnn.dropout = 0.3
    config.noise_std = 0.08
    config.batch_size = 64
    config.steps = 4000
    config.validation_every = 500
    config.ema_decay = 0.995
    config.optimizer.update({"learning_rate": 1e-3, "decay_rate": 0.9, "transition_steps": 300})
    return config
