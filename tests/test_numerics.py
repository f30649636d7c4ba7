"""Code that only speed asks for gives what the plain computation gives."""

import platform
import sys

import pytest

from helpers.configs import ROOT
from helpers.scripts import finish, spawn

pytestmark = pytest.mark.usefixtures("strict_dtypes")


TWICE = """
import resource
import numpy as np
from posterior_matching.numerics.memory import keep_freed_memory

keep_freed_memory()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**31 + 2**28, np.int8)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.process
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep what they like")
def test_freed_memory_is_kept_also_beyond_two_gigabytes():
    """Page faults of allocating it once, and again."""
    first, again = map(int, finish(spawn([sys.executable, "-c", TWICE], ROOT))[0].split())
    assert again < first / 10
