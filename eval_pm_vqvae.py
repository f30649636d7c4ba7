"""PSNR, precision and recall of the imputations of a PM-VQVAE (paper, image inpainting).

    python eval_pm_vqvae.py --run_dir DIR [--dataset NAME] [--embedding pixels] [--baselines] [--num_trials 5]

Writes `imputation_results/` in the run directory; see `posterior_matching/imputation.py`.
"""

import functools

from absl import flags

from posterior_matching import cli
from posterior_matching.evaluation import imputation

flags.adopt_module_key_flags(imputation)

if __name__ == "__main__":
    cli.run(functools.partial(imputation.evaluate, "pm_vqvae"), exact=True)
