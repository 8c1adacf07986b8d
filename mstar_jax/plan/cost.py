"""What a program costs on one device: it is compiled, not run."""

import dataclasses
import re
from typing import Any

import jax

from mstar_jax.plan import hlo, topology
from mstar_jax.profiling.flops import Chip


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one program on one device.

    Attributes:
      memory: bytes by kind: arguments, outputs, temporary, code; `shared` outputs alias arguments.
      work: FLOPs, bytes and collectives of one run, of decoding of one step; None if the compiler does not
        show the program.
      once: of decoding, what a run of any number of steps needs besides the steps.
      note: how it was compiled, if not with the default flags.
    """

    memory: dict[str, float]
    work: hlo.Work | None
    once: hlo.Work | None = None
    note: str = ""

    @property
    def peak(self) -> float:
        """Bytes that are needed at the same time."""
        return sum(self.memory.values()) - 2 * self.memory["shared"]


class TooLarge(Exception):
    """A program that does not fit into the memory of the device; the message says how much it needs."""


def compile_cost(call: Any, args: tuple[Any, ...], device: jax.Device, loop: bool = False) -> Cost:
    """Compiles a program and reads off its cost.

    Args:
      call: a jitted function.
      args: shapes with shardings.
      device: one of those that it is compiled for.
      loop: whether its work is that of a step of a loop without a fixed end.

    Raises:
      TooLarge: the compiler says that the program does not fit.
    """
    compiled, note = _compile(call.lower(*args), device)
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise ValueError(f"the {jax.default_backend()} backend does not report the memory of programs")
    memory = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "temporary": sizes.temp_size_in_bytes,
        "code": sizes.generated_code_size_in_bytes,
        "shared": sizes.alias_size_in_bytes,
    }
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:  # seen for TPU v5p: the compiler cannot parse its own output
        text = None
    if not text:
        return Cost(memory, None, note=note)
    work, once = hlo.step_of(text) if loop else (hlo.work(text), None)
    return Cost(memory, work, once, note)


def _compile(lowered: jax.stages.Lowered, device: jax.Device) -> tuple[jax.stages.Compiled, str]:
    try:
        return lowered.compile(), ""
    except jax.errors.JaxRuntimeError as error:
        if found := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", str(error)):
            raise TooLarge(f"needs {found[1]} of {found[2]}") from error
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLarge(str(error).splitlines()[0]) from error
        if not topology.is_absent_gpu(device):
            raise
    flags = ", ".join(f"{name}={value}" for name, value in topology.WITHOUT_TILES.items())
    return lowered.compile(compiler_options=topology.WITHOUT_TILES), flags


def peak_times(work: hlo.Work, chip: Chip) -> dict[str, float]:
    """Seconds that compute, memory and network take at their peak rates."""
    moved = sum(work.moved().values())
    found = {"compute": work.flops / chip.flops, "memory": work.bytes / chip.bandwidth}
    return found | {"network": moved / chip.network}
