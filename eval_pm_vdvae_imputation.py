"""PSNR, precision and recall of the imputations of a PM-VDVAE (paper, image inpainting).

    python eval_pm_vdvae_imputation.py --run_dir DIR [--dataset NAME] [--embedding pixels] [--baselines]

Writes `imputation_results/` in the run directory; see `posterior_matching/imputation.py`.
"""

import functools

import jax
from absl import flags

from posterior_matching import cli
from posterior_matching.evaluation import imputation
from posterior_matching.models.vdvae import PosteriorMatchingVDVAE

flags.adopt_module_key_flags(imputation)


def impute(model: PosteriorMatchingVDVAE, x: jax.Array, b: jax.Array, num_samples: int, key: jax.Array) -> jax.Array:
    """Imputations `[S, B, H, W, C]` in [0, 1] of images in [0, 1]."""
    return model.from_levels(model.impute(model.to_levels(x), b, num_samples, key=key))


if __name__ == "__main__":
    cli.run(functools.partial(imputation.evaluate, "pm_vdvae", impute), exact=True)
