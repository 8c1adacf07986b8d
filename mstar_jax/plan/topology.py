"""Devices that need not be present: of a TPU slice (libtpu), of a host with GPUs (XLA's CUDA plugin)."""

import contextlib
import os
import re
from collections.abc import Iterator
from unittest import mock

import jax
from jax._src.cudnn import fused_attention_stablehlo
from jax.experimental import topologies

# Without a TPU, libtpu must not query the metadata server or lock the device; a type and a host name end its
# search for both.
COMPILE_ONLY = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# What XLA has to know of a GPU: compute capability; of a core its threads, FP32 units and shared memory (of
# one, and of a block that asks for more); cores, memory in bytes and bytes per second, L2 cache, clock, name.
HOPPER = (9, 0, 2048, 128, 233472, 232448)
AMPERE = (8, 0, 2048, 64, 167936, 166912)
GEFORCE = (8, 6, 1536, 128, 102400, 101376)
GPUS = {
    "h100": (*HOPPER, 132, 84942979072, 3352320000000, 52428800, 1.98, "NVIDIA H100 80GB HBM3"),
    "h200": (*HOPPER, 132, 151397597184, 4800000000000, 52428800, 1.98, "NVIDIA H200 141GB HBM3e"),
    "a100": (*AMPERE, 108, 85100068864, 2039040000000, 41943040, 1.41, "NVIDIA A100-SXM4-80GB"),
    "rtx3090": (*GEFORCE, 82, 25447170048, 936192000000, 6291456, 1.695, "NVIDIA GeForce RTX 3090"),
    "rtx3070": (*GEFORCE, 46, 8361738240, 448064000000, 4194304, 1.725, "NVIDIA GeForce RTX 3070"),
}
CUDNN = 91000  # the version that programs are compiled for
# Without a device, tiles for Triton's products cannot be tried; for some products of the train step XLA's own
# guess finds none and fails. cuBLAS, the choice for most of them on a device, needs no tiles.
WITHOUT_TILES: dict[str, bool | str] = {"xla_gpu_enable_triton_gemm": False}


def devices_of(topology: str) -> list[jax.Device]:
    """The devices of a TPU topology (v5e:4x4) or of a host with GPUs (h100:8).

    Raises:
      ValueError: the compiler for them is not installed, or does not know the topology.
    """
    name, _, count = topology.partition(":")
    if name.lower() in GPUS:
        return _gpus(topology, name.lower(), count)
    for variable, value in COMPILE_ONLY.items():
        os.environ.setdefault(variable, value)
    try:
        found = list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # a compiler for another machine may raise anything
        first = str(error).splitlines()[0]
        known = ", ".join(f"{gpu}:8" for gpu in GPUS)
        raise ValueError(
            f"--topology={topology}: {first}; expected a TPU slice like v5e:4x4 or v5p:2x2x4, with libtpu of "
            f"jax's version (pip install 'mstar_jax[plan-tpu]'), or one of {known}"
        ) from error
    if any(getattr(device, "core_on_chip", 0) for device in found):
        raise ValueError(f"--topology={topology}: chips of two devices each, as of TPU v4, cannot be planned")
    return found


def _gpus(topology: str, name: str, count: str) -> list[jax.Device]:
    if not re.fullmatch("[1-8]", count):
        raise ValueError(f"--topology={topology}: expected the GPUs of one host, at most 8, e.g. {name}:8")
    shape = f"1 x 1 x {count}"  # slices, hosts, devices of a host
    try:
        found = topologies.get_topology_desc("", "cuda", topology=shape, target_config=target(name))
    except Exception as error:
        hint = "XLA's plugin for CUDA 12 is not installed: pip install 'mstar_jax[plan-gpu]'"
        raise ValueError(f"--topology={topology}: {str(error).splitlines()[0]}; {hint}") from error
    return list(found.devices)


def target(name: str) -> str:
    """A GPU as XLA's GpuTargetConfigProto, as text; the numbers are those of its `target_config/specs` or, of
    the GeForces, of NVIDIA's description of GA102 and GA104."""
    major, minor, threads, units, shared, most, cores, memory, bandwidth, cache, clock, title = GPUS[name]
    feature = "ACCELERATED_FEATURES" if major == 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {cores} fpus_per_core: {units} clock_rate_ghz: {clock}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {most}
  device_memory_size: {memory} memory_bandwidth: {bandwidth} l2_cache_size: {cache}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {feature} }}
  device_vendor: "NVIDIA Corporation" name: "{title}" device_address_bits: 64 pcie_bandwidth: 34359738368
  driver_version: "13.0.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0" cub_version: "3.1.2" device_interconnect_info {{ active_links: 18 }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{title}"
"""


def is_absent_gpu(device: jax.Device) -> bool:
    """Whether a device is a GPU that programs are compiled for, but that is not here."""
    return device.device_kind.startswith("NVIDIA") and device.client is not jax.devices()[0].client


@contextlib.contextmanager
def without_driver(device: jax.Device) -> Iterator[None]:
    """Lowers attention to cuDNN where there is no driver to ask for its version."""
    if not is_absent_gpu(device):
        yield
        return
    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", lambda: CUDNN):
        yield
