"""GAAM: heads of classification on frozen features, and the gate's kernel beside plain PyTorch.

Quality is that of the paper's heads on all layers of a frozen encoder, at the smallest scale: digits through a small
vision transformer, passages of speeches through SmolLM2, and synthetic layers whose gain and offset drift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional as F

from undivided.claims._gaam_quality import drift, importance, quality, text
from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.layers.gaam import GaussianAdaptiveAttention
from undivided.ops.gaussian import gaussian_gate
from undivided.testing import compare_op


def gate(device: str) -> None:
    """Raises unless the gate's fast forms, forward and backward, are as accurate as the densities one by one."""
    dtypes = (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,)
    # The last is cut in parts.
    for shape in ((2, 3, 257, 40), (4, 1, 96, 1), (1, 2, 3000, 72))[: 3 if device == "cuda" else 2]:
        inputs = {
            "x": torch.randn(*shape, device=device, dtype=torch.float64),
            "offset": 0.3 * torch.randn(shape[1], 5, device=device, dtype=torch.float64),
            "width": 1 + torch.rand(shape[1], 5, device=device, dtype=torch.float64),
        }
        for dtype in dtypes:
            for backend in ("triton", "composed") if device == "cuda" else ("composed",):
                compare_op(_gated(backend), _gated("reference"), _gated("reference"), inputs, dtype)


def _gated(backend: str) -> Callable[..., torch.Tensor]:
    return lambda x, offset, width: gaussian_gate(x, offset, width, backend=backend)


def speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the gate beside the densities one by one and beside dot-product attention, on a GPU."""
    if device == "cpu":
        return
    for batch, length, width in ((32, 4096, 1024), (4, 32768, 1024))[: 1 if quick else 2]:
        x = torch.randn(batch, length, width, device=device, dtype=torch.bfloat16)
        layer = GaussianAdaptiveAttention(1, 1, 5).to(device)
        rows, own = x[:, None], (layer.offset, layer.width)
        heads = x.unflatten(-1, (8, -1)).transpose(1, 2)
        with torch.no_grad():
            calls = {
                "ours": partial(gaussian_gate, rows, *own, backend="triton"),
                "eager, density by density": partial(gaussian_gate, rows, *own, backend="reference"),
                "scaled_dot_product_attention, 8 heads": partial(
                    F.scaled_dot_product_attention, heads, heads, heads
                ),
            }
            times = time_rivals(calls, device, method="graph", seconds=0.05)
        ours = times.pop("ours").median
        fraction = measured_ceilings(device).fraction(ours, bytes_moved=2 * x.numel() * x.element_size())
        bars = {"eager, density by density": 5.0}
        if length == 32768:
            bars["scaled_dot_product_attention, 8 heads"] = 50.0
        for name, timing in times.items():
            yield measured(
                f"gate of 5 densities, against {name}", f"batch {batch}, {length} tokens of {width}, bf16", ours, "ms",
                better="lower", baseline_name=name, baseline=timing.median, required=bars.get(name),
                fraction_of_ceiling=fraction,
            )  # fmt: skip


_PARTS: dict[str, Measure] = {
    "quality": quality,
    "speed": speed,
    "text": text,
    "drift": drift,
    "importance": importance,
}
CLAIM = Claim(
    slug="gaam",
    source="arXiv 2401.11143, abstract and experiments",
    paper=(
        "CIFAR-100 with frozen BEiT-Large features: MHA 61.7, with batch normalisation 66.1, GQDAAM 80.1, DAAM of 8 "
        "heads 80.3, of one head 80.6.",
        "IEMOCAP with WavLM-Large: MHA 62.3, DAAM of 8 heads 67.4. AG News with Llama-2-13B: 94.6 both.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cpu", "cuda"),
)
