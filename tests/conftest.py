"""Every test runs on the CPU with eight fake devices, set here before anything imports jax; those of an
accelerator (`pytest -m accelerator`) run on what there is.

The tests are many programs that run for moments: optimizing them less saves more than it costs. Many are the
same program made again, by a second call of the code under test; JAX's cache hands them out for as long as
the process lasts.
"""

import os
import tempfile

import pytest


def pytest_xdist_auto_num_workers(config):
    """As many processes as there are cores, at most four: each takes about 2 GB of memory."""
    return 0 if config.option.markexpr == "accelerator" else min(os.cpu_count() or 1, 4)


def pytest_configure(config):
    if config.option.markexpr == "accelerator":
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # commands would fill the user's
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    ).strip()


@pytest.fixture(scope="session", autouse=True)
def compiled(request):
    """A folder of compiled programs that this process has for itself and leaves empty: nothing is read that
    another run or worker wrote, and the processes that tests start, whose environment says off, do not see
    it. What JAX_COMPILATION_CACHE_DIR names is used instead."""
    import jax  # not before the settings above
    from jax.experimental.compilation_cache import compilation_cache

    if request.config.option.markexpr == "accelerator" or jax.config.jax_compilation_cache_dir:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()  # what compiled while tests were collected settled that there is none
        yield
