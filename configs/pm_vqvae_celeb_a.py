"""PM-VQVAE on CelebA at 64x64 (paper, image inpainting).

python train_pm_vqvae.py --config configs/pm_vqvae_celeb_a.py --config.vqvae_dir=RUN
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vqvae(num_resnet=12)
    config.dataset = "celeb_a"
    config.mask_generator = {"name": "CelebAMaskGenerator"}
    config.batch_size = 32
    config.steps = 150_000
    config.validation_every = 2000
    return config
