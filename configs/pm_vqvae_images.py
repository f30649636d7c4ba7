"""PM-VQVAE on the images of the run of `vqvae_images`.

python train_pm_vqvae.py --config configs/pm_vqvae_images.py --config.vqvae_dir=RUN
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vqvae(num_resnet=8)
    common.for_images(config)
    config.batch_size = 32
    config.steps = 100_000
    return config
