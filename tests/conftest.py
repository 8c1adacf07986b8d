"""Every test runs on the CPU with eight fake devices, set here before anything imports jax; those of an
accelerator (`pytest -m accelerator`) run on what there is.

The tests are many programs that run for moments: optimizing them less saves more than it costs.
"""

import os


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
