"""Imputation error and conditional likelihood of a PM-VAE (paper, UCI experiments), on any dataset.

    python eval_pm_vae_uci.py --run_dir runs/digits --num_samples 64 --num_trials 2 --baselines

Writes `uci_results/` in the run directory: `nrmse.npy` and `ac_lls.npy` (one value per trial), `results.json`, and for
images `imputations.png`.
"""

from posterior_matching import cli
from posterior_matching.evaluation import uci

if __name__ == "__main__":
    cli.evaluation_main(uci.evaluate, uci.Options)
