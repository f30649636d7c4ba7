"""PM-VAE on images of your own, of any size; the networks adapt to it.

python train_pm_vae.py --config configs/pm_vae_images.py --config.dataset=photos --config.images.size=32
"""

from ml_collections import ConfigDict, config_dict

from configs import common


def get_config() -> ConfigDict:
    config = common.pm_vae()
    config.model = {
        "latent_dim": 64,
        "encoder": common.conv_network("ConvEncoder"),
        "posterior": {"name": "TriLGaussian"},
        "decoder": common.conv_network("ConvDecoder"),
        "likelihood": {"name": "SharedScaleGaussian"},
        "partial_encoder": common.conv_network("ConvEncoder"),
        "partial_posterior": common.autoregressive_gmm(residual_blocks=2),
    }
    common.for_images(config)
    config.matching_ll_stop_gradients = True
    config.batch_size = config_dict.placeholder(int)  # None: set by the number of images
    config.steps = 50_000
    return config
