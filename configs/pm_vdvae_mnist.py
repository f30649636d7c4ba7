"""PM-VDVAE on MNIST (paper, section 5.3), for 8 accelerators with 16 images each.

python train_pm_vdvae.py --config configs/pm_vdvae_mnist.py
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vdvae()
    config.dataset = "mnist"
    config.mask_generator = {"name": "MNISTMaskGenerator", "dim": 28}
    return config
