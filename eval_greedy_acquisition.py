"""Acquires features greedily for each example and measures how the imputation of the remaining ones improves.

    python eval_greedy_acquisition.py --run_dir runs/lookahead_digits --num_steps 21 --num_instances 200

Writes `trajectories/` in the run directory: `<policy>.npz` with the arrays of `acquisition.Trajectory`, `[N, T, ...]`,
and the data `x`; and `results.json`. The same command resumes an interrupted evaluation.
"""

from posterior_matching import cli
from posterior_matching.evaluation import acquisition

if __name__ == "__main__":
    cli.evaluation_main(acquisition.evaluate, acquisition.Options)
