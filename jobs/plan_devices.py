"""Devices that a plan can be made for: peak rates without sparsity, memory, and links, from the makers' data sheets."""

import os
from dataclasses import dataclass

from library.errors import InputError

GIB = 2**30
USABLE = 0.92  # of the memory: the rest is the driver's context and fragments


@dataclass(frozen=True)
class Device:
    """What a worker computes on.

    fp32, bf16   operations per second at the peak; bf16 is that of matrix units
    memory       bytes
    node         workers that share a machine
    inside       bytes per second that a worker sends to others in its machine
    outside      bytes per second that a worker sends to other machines
    """

    name: str
    fp32: float
    bf16: float
    memory: float
    node: int
    inside: float
    outside: float

    def peak(self, precision: str) -> float:
        """Operations per second in a precision."""
        return self.bf16 if precision == "bf16" else self.fp32

    def link(self, workers: int) -> float:
        """Bytes per second of the slowest link of a ring over the workers."""
        return self.inside if workers <= self.node else self.outside


DEVICES = {
    device.name: device
    for device in (
        Device("t4", 8.1e12, 8.1e12, 15 * GIB, 4, 16e9, 6e9),  # no bf16 units
        Device("l4", 30.3e12, 121e12, 22 * GIB, 8, 32e9, 12e9),
        Device("a10g", 31.2e12, 70e12, 22 * GIB, 8, 32e9, 12e9),
        Device("a100-40", 19.5e12, 312e12, 39 * GIB, 8, 300e9, 25e9),
        Device("a100", 19.5e12, 312e12, 79 * GIB, 8, 300e9, 25e9),
        Device("h100", 67e12, 989e12, 79 * GIB, 8, 450e9, 50e9),
        Device("h200", 67e12, 989e12, 140 * GIB, 8, 450e9, 50e9),
        Device("b200", 75e12, 2250e12, 179 * GIB, 8, 900e9, 50e9),
    )
}


def device(name: str | None, *, cpus: float) -> Device:
    """A GPU by name, or for None the CPU cores of a worker on a machine like this one.

    A core is taken for one with two 256-bit multiply-add units at 3 GHz, which has no faster bf16; workers on one
    machine share its memory. Raises InputError that lists the GPUs.
    """
    if name is None:
        rate = 96e9 * cpus
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        node = max(1, int((os.cpu_count() or 1) // cpus))
        return Device("cpu", rate, rate, memory / node, node, 8e9, 1.25e9)
    if name not in DEVICES:
        raise InputError(f"--gpu {name}: there is no data on it; there are {', '.join(DEVICES)}")
    return DEVICES[name]
