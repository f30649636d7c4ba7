"""PM-VaDE on the images of the run of `vade_images`: the clusters of images with holes.

python train_pm_vade.py --config configs/pm_vade_images.py --config.vade_dir=RUN
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vade()
    config.model = {
        "partial_encoder": None,  # the VaDE encoder's, with its own weights
        "partial_posterior": common.autoregressive_gmm(residual_blocks=2),
    }
    common.for_images(config)
    config.batch_size = config_dict.placeholder(int)  # None: set by the number of images
    config.steps = 20_000
    config.optimizer.transition_steps = 2000
    return config
