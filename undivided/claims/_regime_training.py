"""What another link or anchor costs in quality: byte-level models whose attention is a specification, trained alike.

The models are Llamas whose attention is run from its specification through transformers' attention registry. Column and
plan anchors are left out: what they do at one receiver depends on later ones, so a language model would read its
answers. A specification that differs from softmax by a gauge alone, a field of the receivers, must train alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from undivided.claims._harness import Row, measured
from undivided.claims._tiny_lm import bits_per_byte, mean_and_deviation, tiny_lm, train
from undivided.spec import (
    AttentionSpec,
    Carrier,
    Causal,
    Chart,
    Dot,
    Elu1,
    Entmax,
    Evidence,
    Softplus,
    Support,
    TopK,
    ZeroIncrement,
    attend,
)

_CAUSAL = AttentionSpec(Carrier((Causal(),), empty_row=ZeroIncrement()))
SOFTMAX, FIELD = "softmax", "softmax with a field of the receivers"
SPECS: dict[str, AttentionSpec] = {
    SOFTMAX: _CAUSAL,
    FIELD: replace(_CAUSAL, evidence=Evidence(Chart((Dot(), Dot("receiver", "one", scale=1.0))))),
    "link softplus": replace(_CAUSAL, evidence=Evidence(link=Softplus())),
    "link elu + 1": replace(_CAUSAL, evidence=Evidence(link=Elu1())),
    "anchor entmax 1.5": replace(_CAUSAL, probe=Support(), anchor=Entmax(1.5)),
    "anchor top 32": replace(_CAUSAL, probe=Support(), anchor=TopK(32)),
}
_SIZES: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "head_dim": 32}
_STEPS, _BATCH, _LENGTH, _SEEDS = {"cuda": 300, "cpu": 40}, 16, 128, (0, 1, 2)
_NAME = "undivided_specification"


def run_by(model: nn.Module, spec: AttentionSpec) -> None:
    """Lets all layers of a language model attend as a specification says; padding is not known to it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        tensors = {"receiver": 3 * query[..., :1], "one": torch.ones_like(key[..., :1])}
        return attend(spec, query, key, value, tensors=tensors).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(_NAME)


def training_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields bits a byte of each specification, beside softmax."""
    from undivided.data import demo_texts

    texts = demo_texts()
    steps = 20 if quick else _STEPS[device]
    seeds = _SEEDS[: 1 if quick else None]
    shape = (
        f"{_SIZES['num_hidden_layers']} layers, width {_SIZES['hidden_size']}, 4 heads, {steps} steps of "
        f"{_BATCH} x {_LENGTH} bytes, {len(seeds)} seeds"
    )
    baseline: float | None = None
    for name, spec in SPECS.items():
        found = []
        for seed in seeds:
            model = tiny_lm(None, seed, **_SIZES).to(device)
            run_by(model, spec)
            train(model, texts.calibration, steps=steps, batch_size=_BATCH, length=_LENGTH, seed=seed)
            found.append(
                bits_per_byte(model, texts.heldout["2024-Biden-1"], length=_LENGTH, most_bytes=16384)
            )
        mean, deviation = mean_and_deviation(found)
        yield measured(
            f"bits a byte of a tiny model, {name}", shape, mean, "bits/byte", better="lower", deviation=deviation,
            baseline_name=None if baseline is None else SOFTMAX, baseline=baseline,
        )  # fmt: skip
        baseline = mean if baseline is None else baseline
