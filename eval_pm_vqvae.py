"""PSNR, precision and recall of the imputations of a PM-VQVAE (paper, image inpainting).

    python eval_pm_vqvae.py --run_dir runs/pm_vqvae --embedding pixels --baselines

Writes `imputation_results/` in the run directory: `psnrs.npy` [trials], `prd_data.npy` [trials, 2 (precision,
recall), 1001], `f_scores.npy` [trials, 2 (F_1/8, F_8)], `results.json` and `imputations.png`.
"""

from posterior_matching import cli
from posterior_matching.evaluation import inpainting

if __name__ == "__main__":
    cli.evaluation_main(inpainting.evaluate, inpainting.Options)
