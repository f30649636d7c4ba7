"""PM-VQVAE on MNIST (paper, image inpainting).

python train_pm_vqvae.py --config configs/pm_vqvae_mnist.py --config.vqvae_dir=RUN
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vqvae(num_resnet=8)
    config.dataset = "mnist"
    config.mask_generator = {"name": "MNISTMaskGenerator", "dim": 28}
    config.batch_size = 32
    config.steps = 120_000
    config.validation_every = 1000
    return config
