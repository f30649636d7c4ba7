"""The measurement of how time and memory grow."""

import json

import numpy as np
import pytest

from benchmarks import scale
from helpers.scripts import run_script


def test_the_exponent_is_that_of_a_power_law_between_the_largest_values():
    values = [10, 20, 80]
    assert scale.exponent(values, [5.0, 3.0 * 20**1.7, 3.0 * 80**1.7]) == pytest.approx(1.7)
    points = {"rows": {n: {"seconds": 1e-6 * n, "start_seconds": 2.0, "gigabytes": 0.5} for n in (1000, 2000)}}
    assert scale.table(points).splitlines()[2:] == [
        "| rows | 1,000 | 0.001 |  | 2.0 | 0.50 |",
        "| rows | 2,000 | 0.002 | 1.00 | 2.0 | 0.50 |",
    ]


@pytest.mark.process
def test_points_are_measured_once_and_in_processes_of_their_own(tmp_path):
    arguments = ["--folder", str(tmp_path), "--only=devices", "--most=1", "--seconds=0"]
    out, _ = run_script("benchmarks/scale", *arguments)
    found = json.loads((tmp_path / "devices_1.json").read_text())
    assert np.isfinite(found["seconds"]) and found["gigabytes"] > 0.1
    assert f"| devices | 1 | {found['seconds']:.3g} |" in out
    assert (tmp_path / "scale.png").stat().st_size > 1000
    (tmp_path / "devices_1.json").write_text(json.dumps({"seconds": 1e6, "gigabytes": 3.0}))
    again, _ = run_script("benchmarks/scale", *arguments)
    assert "| devices | 1 | 1e+06 |" in again
    _, err = run_script("benchmarks/scale", "--only=device", status=1)
    assert err == "error: --only: unknown 'device': did you mean 'devices'?\n"
