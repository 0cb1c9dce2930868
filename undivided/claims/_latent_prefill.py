"""The prompt's side of latent attention: keys and values are formed, of widths 192 and 128, and attended densely.

One rank of DeepSeek-V3 on two, MLA (64 heads). The operator's own choice is timed beside each of torch's kernels that
takes the shapes: cuDNN and the memory-efficient kernel with the mask that each needs, and FlexAttention with a block
mask. Behind a cache the causal mask is aligned bottom right.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from undivided.claims._harness import Row, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.ops import dense_attention
from undivided.testing import assert_as_accurate

_KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "the memory-efficient kernel": SDPBackend.EFFICIENT_ATTENTION,
}
_CHECKED = 256


@dataclass(frozen=True)
class Prompt:
    """New tokens of one sequence behind those in its cache.

    Args:
        queries: new tokens.
        keys: all tokens.
        heads: of the rank.
        key_dim, value_dim: of a head, formed from the latent.
    """

    queries: int
    keys: int
    heads: int = 64
    key_dim: int = 192
    value_dim: int = 128

    def __str__(self) -> str:
        before = f" behind {self.keys - self.queries} cached" if self.keys > self.queries else ""
        return f"{self.heads} heads, keys of {self.key_dim}, values of {self.value_dim}, {self.queries} tokens{before}"

    def inputs(self, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random queries, keys and values."""
        sizes = ((self.queries, self.key_dim), (self.keys, self.key_dim), (self.keys, self.value_dim))
        query, key, value = (torch.randn(1, self.heads, *size, device=device, dtype=dtype) for size in sizes)
        return query, key, value

    def flops(self) -> int:
        """Of the pairs that the mask leaves."""
        pairs = self.queries * (2 * self.keys - self.queries + 1) // 2
        return 2 * self.heads * pairs * (self.key_dim + self.value_dim)


PROMPTS = (
    Prompt(1024, 1024),
    Prompt(4096, 4096),
    Prompt(16384, 16384),
    Prompt(1024, 16384),
    Prompt(4096, 16384),
)


def prefill_rows(device: str, quick: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[Row]:
    """Yields the chosen kernel beside each of torch's, and its rate."""
    for prompt in PROMPTS[:1] if quick else PROMPTS:
        yield from prompt_rows(prompt, device, dtype)


def prompt_rows(prompt: Prompt, device: str, dtype: torch.dtype) -> Iterator[Row]:
    """Yields the rows of one prompt, after a check of every rival against float64."""
    inputs = prompt.inputs(device, dtype)
    rivals = _rivals(prompt, inputs, device)
    for name, attend in rivals.items():
        gate(prompt, inputs, attend, name)
    times = {
        name: timing.median
        for name, timing in time_rivals(rivals, device, method="auto", seconds=0.2).items()
    }
    what, shape = "prefill attention", f"{prompt}, {str(dtype).removeprefix('torch.')}"
    chosen = times.pop("chosen")
    for name, time in times.items():
        yield measured(
            f"{what}, against {name}", shape, chosen, "ms", better="lower", baseline_name=name, baseline=time
        )
    yield measured(
        f"rate of {what}", shape, prompt.flops() / chosen / 1e9, "TFLOPS", better="higher",
        fraction_of_ceiling=measured_ceilings(device).fraction(chosen, flops=prompt.flops()),
    )  # fmt: skip


def gate(
    prompt: Prompt,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    attend: Callable[[], torch.Tensor],
    name: str,
) -> None:
    """Raises an AssertionError unless the last queries of the first head are as accurate as eager, against float64."""
    query, key, value = (x[:, :1] for x in inputs)
    query = query[:, :, -_CHECKED:]
    out = attend()[:, :1, -_CHECKED:]
    eager, exact = (
        dense_attention(*(x.to(wide) for x in (query, key, value)), is_causal=True, backend="reference")
        for wide in (query.dtype, torch.float64)
    )
    assert_as_accurate(out, eager, exact, 2.0, f"{name}, {prompt}")


def _rivals(
    prompt: Prompt, inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor], device: str
) -> dict[str, Callable[[], torch.Tensor]]:
    rivals: dict[str, Callable[[], torch.Tensor]] = {
        "chosen": lambda: dense_attention(*inputs, is_causal=True),
    }
    if device != "cuda":
        return rivals
    square = prompt.queries == prompt.keys
    mask = None
    if not square:
        mask = torch.ones(prompt.queries, prompt.keys, dtype=torch.bool, device=device)
        mask = mask.tril(prompt.keys - prompt.queries)

    def within(kernel: SDPBackend) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(*inputs, attn_mask=mask, is_causal=square)

        return run

    for name, kernel in _KERNELS.items():
        if _takes(within(kernel)):
            rivals[name] = within(kernel)
    rivals["FlexAttention"] = lambda: dense_attention(*inputs, is_causal=True, backend="flex")
    return rivals


def _takes(attend: Callable[[], torch.Tensor]) -> bool:
    """Whether torch has such a kernel for these shapes; it says so by an error and a warning a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attend()
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            return False
    return True
