"""Accelerators, by their vendor's datasheet.

The numbers are nominal: NVIDIA's datasheets and architecture white papers, dense (no structured sparsity),
with fp32 accumulation, one direction of the link between accelerators. A kernel reaches less; on an H100, a
copy moves about 3.0 of 3.35 TB/s and a large bf16 matmul about 0.7 to 0.8 of 989 TFLOPS. Gigabytes are 10**9
bytes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

ITEMSIZE = {"fp8": 1, "fp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Device:
    """What the roofline needs to know of one accelerator.

    Args:
        name: how it is called here.
        memory_gb: memory, 10**9 bytes.
        bandwidth_tb: memory bandwidth, 10**12 bytes a second.
        tflops: dense matmul rate, 10**12 FLOPs a second, by dtype. fp32 is without TF32. A device without fp8
            units has no "fp8": its values are widened when read and multiplied at the bf16 rate.
        link_gb: bandwidth between accelerators of one host, one direction, 10**9 bytes a second; None: not
            counted.
    """

    name: str
    memory_gb: float
    bandwidth_tb: float
    tflops: Mapping[str, float]
    link_gb: float | None = None

    def flops_per_second(self, dtype: str) -> float:
        """Dense matmul rate for a dtype, FLOPs a second."""
        return 1e12 * self.tflops.get(dtype, self.tflops["bf16"])

    @property
    def bytes_per_second(self) -> float:
        """Memory bandwidth, bytes a second."""
        return 1e12 * self.bandwidth_tb


def _rates(fp32: float, half: float, fp8: float | None = None) -> dict[str, float]:
    rates = {"fp32": fp32, "fp16": half, "bf16": half}
    return rates if fp8 is None else rates | {"fp8": fp8}


DEVICES = {
    device.name: device
    for device in (
        Device("a100-80gb", 80, 2.039, _rates(19.5, 312), link_gb=300),  # SXM4
        Device("h100", 80, 3.35, _rates(67, 989, 1979), link_gb=450),  # SXM5
        Device("h800", 80, 3.35, _rates(67, 989, 1979), link_gb=200),  # SXM5, H100 with fewer links
        Device("h200", 141, 4.8, _rates(67, 989, 1979), link_gb=450),  # SXM5
        Device("h20", 96, 4.0, _rates(44, 148, 296), link_gb=450),
        Device("b200", 180, 8.0, _rates(80, 2250, 4500), link_gb=900),  # HGX, 1,000 W
        Device("rtx4090", 24, 1.008, _rates(82.6, 165.2, 330.3), link_gb=32),  # link: PCIe 4.0 x16
    )
}


def get_device(
    name: str,
    *,
    memory_gb: float | None = None,
    bandwidth_tb: float | None = None,
    tflops: float | None = None,
    link_gb: float | None = None,
) -> Device:
    """Find a device by name, or describe one; what is given replaces the figures of a known device.

    Args:
        name: a key of `DEVICES`, in any case, or "custom", which the other arguments describe.
        memory_gb: memory, 10**9 bytes.
        bandwidth_tb: memory bandwidth, 10**12 bytes a second (for instance a measured one).
        tflops: dense matmul rate, 10**12 FLOPs a second, taken for every dtype.
        link_gb: bandwidth to the other ranks, one direction, 10**9 bytes a second.

    Returns:
        The device.

    Raises:
        ValueError: for an unknown name, a "custom" without memory, bandwidth and rate, or a number not above
            0.
    """
    given = {"memory_gb": memory_gb, "bandwidth_tb": bandwidth_tb, "tflops": tflops, "link_gb": link_gb}
    for argument, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{argument} is {value}; it must be above 0 and finite.")
    rates = None if tflops is None else dict.fromkeys(ITEMSIZE, tflops)
    key = name.lower()
    if key == "custom":
        if memory_gb is None or bandwidth_tb is None or rates is None:
            missing = [
                argument for argument in ("memory_gb", "bandwidth_tb", "tflops") if given[argument] is None
            ]
            raise ValueError(
                f'device "custom" needs memory_gb, bandwidth_tb and tflops; missing: {", ".join(missing)}.'
            )
        return Device("custom", memory_gb, bandwidth_tb, rates, link_gb)
    if key not in DEVICES:
        close = difflib.get_close_matches(key, DEVICES, n=1)
        meant = f' Did you mean "{close[0]}"?' if close else ""
        raise ValueError(f'device "{name}" is not known.{meant} Known: {", ".join(DEVICES)}, custom.')
    known = DEVICES[key]
    return Device(
        name=key,
        memory_gb=memory_gb or known.memory_gb,
        bandwidth_tb=bandwidth_tb or known.bandwidth_tb,
        tflops=rates or known.tflops,
        link_gb=link_gb or known.link_gb,
    )
