"""Machines, as far as cost depends on them."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Hardware:
    """One machine.

    Attributes:
        name: what it is called.
        memory: bytes per device.
        flops: dense peak per device and second in half precision.
        flops_single: the same in float32.
        bandwidth: bytes per device and second, of its memory.
        devices: how many.
        utilisation: share of the peak that training reaches; 0.35 to 0.5 is usual for models of this size.
        bf16: whether it multiplies in bf16, so that a recipe's ``precision = "auto"`` takes it.
    """

    name: str
    memory: int
    flops: float
    flops_single: float
    bandwidth: float
    devices: int = 1
    utilisation: float = 0.4
    bf16: bool = True


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware("2-cpu-cores", 16 * GIB, 0.19e12, 0.19e12, 20e9, bf16=False),
        Hardware("rtx-4090", 24 * GIB, 165e12, 83e12, 1.0e12),
        Hardware("v100-32gb", 32 * GIB, 125e12, 15.7e12, 0.9e12, bf16=False),
        Hardware("16x-v100-32gb", 32 * GIB, 125e12, 15.7e12, 0.9e12, devices=16, bf16=False),
        Hardware("a100-80gb", 80 * GIB, 312e12, 19.5e12, 2.0e12),
        Hardware("8x-a100-80gb", 80 * GIB, 312e12, 19.5e12, 2.0e12, devices=8),
        Hardware("h100-80gb", 80 * GIB, 989e12, 67e12, 3.35e12),
        Hardware("8x-h100-80gb", 80 * GIB, 989e12, 67e12, 3.35e12, devices=8),
    )
}
"""Vendors' figures: dense half precision (fp16 on V100, else bf16) with float32 accumulation, and float32 without
TF32. The CPU: two cores that finish 32 float32 operations per clock of 3 GHz."""
