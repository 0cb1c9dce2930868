"""Whether kernels of Triton can run here: what every operator with such kernels asks."""

from __future__ import annotations

import torch

# None of these changes within a process, and torch.compile could not look into them. They return words and truth
# values: torch.compile of torch 2.11 cannot compare a constant tuple.


@torch.compiler.assume_constant_result
def interprets() -> bool:
    """Whether Triton interprets kernels, on the CPU, instead of compiling them."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@torch.compiler.assume_constant_result
def capability(index: int | None) -> str:
    """The compute capability of a CUDA device, such as "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability(index)))


@torch.compiler.assume_constant_result
def has_capability(index: int | None, major: int, minor: int) -> bool:
    """Whether a CUDA device has at least this compute capability."""
    return torch.cuda.get_device_capability(index) >= (major, minor)


@torch.compiler.assume_constant_result
def is_hopper(index: int | None) -> bool:
    """Whether a CUDA device is of compute capability 9.0, for which there are kernels of their own."""
    return torch.cuda.get_device_capability(index) == (9, 0)


@torch.compiler.assume_constant_result
def availability() -> list[str]:
    """Sentences that say why no kernel of Triton can run on this machine; empty when some can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return ["triton is not installed"]
    if not torch.cuda.is_available() and not interprets():
        return ["there is no CUDA device"]
    return []


@torch.compiler.assume_constant_result
def hopper_availability() -> list[str]:
    """Sentences that say why kernels for Hopper cannot run on this machine; empty when they can."""
    found = availability()
    if not found and not torch.cuda.is_available():
        return ["there is no CUDA device"]
    if not found and not is_hopper(None):
        return [f"the compute capability is {capability(None)} (needs 9.0)"]
    return found
