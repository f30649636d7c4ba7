"""VaDE on images of your own, of any size: images in clusters; subfolders are the labels that score them.

python train_vade.py --config configs/vade_images.py --config.dataset=photos --config.images.size=32
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config() -> ConfigDict:
    config = common.vade()
    config.model = {
        "latent_dim": 10,
        "num_clusters": 10,
        "encoder": common.conv_network("ConvEncoder"),
        "posterior": {"name": "DiagonalGaussian"},
        "decoder": common.conv_network("ConvDecoder"),
        "likelihood": {"name": "SharedScaleGaussian"},
    }
    common.for_images(config)
    config.batch_size = config_dict.placeholder(int)  # None: set by the number of images
    config.pretraining.steps = 10_000
    config.pretraining.optimizer.decay_rate = 1.0
    config.steps = config.pretraining.steps + 20_000
    config.optimizer.transition_steps = 2000
    return config
