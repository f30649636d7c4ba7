"""Four fake CPU devices and a cache of their own for all tests, also for the scripts that tests start."""

import os
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["POSTERIOR_MATCHING_CACHE"] = tempfile.mkdtemp(prefix="posterior_matching_tests_")
