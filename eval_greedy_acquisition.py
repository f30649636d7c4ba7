"""Acquires features greedily for each example and measures how the imputation of the remaining ones improves.

    python eval_greedy_acquisition.py --run_dir runs/lookahead_digits --num_steps 21 --num_instances 200

Writes `trajectories/` in the run directory: `<policy>.npz` with the arrays of `acquisition.Trajectory`, `[N, T, ...]`,
and the data `x`; and `results.json`. The same command resumes an interrupted evaluation.
"""

from posterior_matching import cli
from posterior_matching.evaluation import acquisition

if __name__ == "__main__":
    cli.evaluation_main(
        acquisition.evaluate,
        run_dir="Evaluate the run in this directory, made by train_lookahead_posterior.py (required).",
        num_instances="Evaluate only this many examples, from the start of the split; by default "
        f"{acquisition.MOST_INSTANCES}, or all if there are fewer.",
        num_samples="Draw this many imputations of each example at each step.",
        batch_size="Process this many examples at once on each device; the results do not depend on it, but an "
        "interruption loses the current batch.",
    )
