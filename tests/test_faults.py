"""Run directories that cannot be made or written. `benchmarks/faults.py` tries this and more, for longer.

The short forms of its other parts: kills and processes in test_end_to_end.py, flips and files in test_runs.py, options
in test_config.py.
"""

import random

import pytest

from benchmarks import faults


@pytest.mark.process
def test_an_impossible_or_full_disk_is_refused_in_one_line_and_nothing_is_lost(tmp_path):
    outcomes = list(faults.disks(tmp_path, 1, random.Random(0)))
    assert len(outcomes) >= 9 and not [outcome for outcome in outcomes if outcome[1]]
