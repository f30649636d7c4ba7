"""Four fake CPU devices and a cache of their own for all tests. The scripts that tests start have one device."""

import gc
import importlib.metadata
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

# Most of the tests' time is XLA's compilation. It takes half as long without LLVM's optimisations, with the older
# emitters of fusions and in one part. The runs of test_end_to_end.py, killed, resumed and compared bit for bit, are
# compiled as for users.
os.environ["XLA_FLAGS_OF_SCRIPTS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later versions end at a flag that they do not know
    os.environ["XLA_FLAGS_OF_SCRIPTS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 " + os.environ["XLA_FLAGS_OF_SCRIPTS"]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # scikit-learn's threads would wait for each other while the other worker computes
gc.set_threshold(100_000)  # tracing makes many objects that live long; looking for garbage less often saves a fifteenth
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit these
    os.environ["POSTERIOR_MATCHING_CACHE"] = tempfile.mkdtemp(prefix="posterior_matching_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["POSTERIOR_MATCHING_CACHE"] + "/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="Write the recorded losses in tests/goldens.")


def pytest_runtest_teardown():
    """Drops compiled programs, which have memory maps of their own, before Linux allows the process no more."""
    maps, limit = pathlib.Path("/proc/self/maps"), pathlib.Path("/proc/sys/vm/max_map_count")
    if "jax" in sys.modules and limit.exists() and maps.read_bytes().count(b"\n") > int(limit.read_text()) / 2:
        sys.modules["jax"].clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Lets only tests that are marked `process` start one, so that `make test-fast` leaves all of them out."""

    def refuse(*_, **__):
        raise RuntimeError("this test starts a process: mark it with @pytest.mark.process")

    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("process"):
            patch.setattr(subprocess.Popen, "__init__", refuse)
        return (yield)


@pytest.fixture(params=["own", "shared"])
def cases(request):
    """The folder of the files that once were read wrongly: our own small ones, and those of the users."""
    from helpers.configs import DATA, SHARED

    folder = (DATA if request.param == "own" else SHARED) / "cases"
    if not folder.is_dir():
        pytest.skip("the shared data are not here")
    return folder


@pytest.fixture
def strict_dtypes():
    """Lets no operation promote types implicitly. Optax and NumPyro's Bernoulli do, so not all tests can use it."""
    import jax

    with jax.numpy_dtype_promotion("strict"):
        yield
