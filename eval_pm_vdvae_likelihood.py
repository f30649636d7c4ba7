"""Importance-sampled likelihoods of a PM-VDVAE: log p(x), log p(x_o), and hence log p(x_u | x_o) (paper, section 5.3).

    python eval_pm_vdvae_likelihood.py --run_dir runs/pm_vdvae --num_samples 200 --num_trials 1

Writes `likelihood_results/` in the run directory: `x_lls.npy` and `xo_lls.npy` (log p(x) and log p(x_o) in nats,
[trials, N]), `bpd.npy` (bits per dimension, [trials]) and `results.json`. It can take hours; the same command resumes
an interrupted evaluation from `likelihood_results/parts/`.
"""

from posterior_matching import cli
from posterior_matching.evaluation import likelihood

if __name__ == "__main__":
    cli.evaluation_main(likelihood.evaluate, likelihood.Options)
