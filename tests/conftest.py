"""Four fake CPU devices and a cache of their own for all tests. The scripts that tests start have one device."""

import os
import subprocess
import tempfile

import pytest

# Most of the tests' time is XLA's compilation; without LLVM's optimisations it takes two thirds as long. The runs of
# test_end_to_end.py, killed, resumed and compared bit for bit, are compiled as for users.
os.environ["XLA_FLAGS_OF_SCRIPTS"] = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4 " + os.environ["XLA_FLAGS_OF_SCRIPTS"]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["POSTERIOR_MATCHING_CACHE"] = tempfile.mkdtemp(prefix="posterior_matching_tests_")


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="Write the recorded losses in tests/goldens anew.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Lets only tests that are marked `process` start one, so that `make test-fast` leaves all of them out."""

    def refuse(*_, **__):
        raise RuntimeError("this test starts a process: mark it with @pytest.mark.process")

    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("process"):
            patch.setattr(subprocess.Popen, "__init__", refuse)
        return (yield)


@pytest.fixture(scope="module")
def compilation_cache(tmp_path_factory):
    """Keeps what the tests of a module compile, for those that run the same programs again."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    changes = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla"))}
    changes |= {"jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in changes}
    for values in (changes, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is changes:
            yield
