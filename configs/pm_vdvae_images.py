"""PM-VDVAE on square images of your own; the blocks adapt to their size.

python train_pm_vdvae.py --config configs/pm_vdvae_images.py --config.dataset=photos --config.images.size=32
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vdvae()
    common.for_images(config)
    config.model.encoder = config_dict.placeholder(str)  # None: set by the size
    config.model.decoder = config_dict.placeholder(str)
    config.model.width = 128
    config.steps = 100_000
    config.optimizer.warmup_steps = 100
    return config
