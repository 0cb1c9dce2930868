"""Attention Editing: what the first stage is worth, and windows with a gate in the place of whole texts.

Only the paper's abstract is public: the stages and the two targets are its own; losses, sizes, gates and bars are ours.
Quality is SmolLM2-135M-Instruct's, on a GPU. Decoding has the shapes of Qwen3-8B with random weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._tiny_lm import tiny_lm
from undivided.claims._window_study import window_rows
from undivided.convert.attention_editing import convert_edit_gate_swa
from undivided.layers.gate_swa import GateSWAttention
from undivided.layers.gqa import GQAttention
from undivided.models.bases import attention_layers
from undivided.training.losses import feature_loss
from undivided.training.trainers import recorded_calls

_WINDOW, _EVERY = 1024, 6
_DECODE_BAR = 3.0


def gate(device: str) -> None:
    """A window that holds the text changes nothing, a shorter one is a mask, and the first stage has nothing to learn.

    In float64.
    """
    model = tiny_lm(None, num_key_value_heads=2).to(device, torch.float64).eval()
    ids = torch.randint(256, (2, 24), device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        own = model(ids).logits
        whole = convert_edit_gate_swa(model, window=24, full_every=0)[0]
        short = convert_edit_gate_swa(model, window=8, full_every=0)[0]
        places = torch.arange(24, device=device)
        seen = (places <= places[:, None]) & (places > places[:, None] - 8)
        masked = model(ids, attention_mask=seen[None, None].expand(2, 1, 24, 24)).logits
        with recorded_calls(attention_layers(model)) as calls:
            model(ids, use_cache=False)
        layers = zip(attention_layers(whole), calls, strict=True)
        error = torch.stack([feature_loss(layer(**call)[0], out) for layer, (call, out) in layers]).max()
    for what, found, wanted in (
        ("a window of the whole text", whole(ids).logits, own),
        ("a window of 8", short(ids).logits, masked),
    ):
        apart = (found - wanted).abs().max() / wanted.abs().max()
        if not apart < 1e-9:
            raise ValueError(f"logits of {what} differ by {apart:.1e} of the largest.")
    if not error < 1e-18:
        raise ValueError(f"the first stage of a copy has a loss of {error:.1e}.")


class MixedCache:
    """A full cache of whole layers and of windows, for one decoding step.

    Args:
        layers: the attention layers.
        batch, keys: sequences, and tokens of each.
    """

    layer_class_to_replicate = None

    def __init__(self, layers: list[nn.Module], batch: int, keys: int) -> None:
        from undivided.layers._own_cache import WindowCacheLayer

        self.keys = keys
        self.layers: list[Any] = []
        for layer in layers:
            weight = layer.k_proj.weight
            length = layer.window - 1 if isinstance(layer, GateSWAttention) else keys
            pair = [
                weight.new_empty(batch, layer.num_key_value_heads, length, layer.head_dim).normal_()
                for _ in range(2)
            ]
            if isinstance(layer, GateSWAttention):
                kept = WindowCacheLayer(layer.window, layer.sinks)
                kept.lazy_initialization(*pair)
                kept.keys, kept.values = pair
                kept.cumulative_length = keys - 1
                self.layers.append(kept)
            else:
                self.layers.append(pair)

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int) -> tuple[torch.Tensor, ...]:
        """Writes the last row of a whole layer, or lets a window move on, and returns what is seen."""
        layer = self.layers[layer_idx]
        if not isinstance(layer, list):
            before = layer.keys, layer.values
            layer.cumulative_length = self.keys - 1
            seen = layer.update(key, value)
            # Every step is the same one, and the next window's memory is free again.
            layer.keys, layer.values = before
            return seen
        for kept, new in zip(layer, (key, value), strict=True):
            kept[:, :, -1:].copy_(new)
        return tuple(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the tokens behind which a whole layer writes."""
        return self.keys


def decode_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields decode throughput of Qwen3-8B's shapes, windows in 5 of 6 layers, beside whole texts in all, on a GPU."""
    if device == "cpu":
        return
    for keys in (32768,) if quick else (8192, 32768):
        yield from _decode_rows(keys, 70 * 10**9)


def _decode_rows(keys: int, memory: int) -> Iterator[Row]:
    from undivided.claims._stack import Shape, Stack, release, rotary, static_throughput

    sizes = {"intermediate_size": 12288, "vocab_size": 151936}
    heads = (4096, 32, 8, 128)

    def windowed(index: int) -> nn.Module:
        if (index + 1) % _EVERY == 0:
            return GQAttention(*heads, layer_idx=index)
        return GateSWAttention(*heads, window=_WINDOW, layer_idx=index)

    whole = Shape("Qwen3-8B", 36, 4096, lambda index: GQAttention(*heads, layer_idx=index), **sizes)
    base, kernel = static_throughput(whole, keys, memory, "cuda")
    release()
    stack = Stack(Shape("Qwen3-8B in windows", 36, 4096, windowed, **sizes), "cuda")
    row = 2 * 2 * heads[2] * heads[3]
    windows = sum(isinstance(layer, GateSWAttention) for layer in stack.attentions)
    sequence = row * ((len(stack.attentions) - windows) * keys + windows * _WINDOW)
    # What a step makes beside the cache: one layer's next window, logits, and what attention splits and merges.
    spare = 4 * 10**9
    most = (memory - stack.weight_bytes - spare) // sequence
    rates = {}
    for batch in sorted({base.batch, most}):
        cache = MixedCache(list(stack.attentions), batch, keys)
        x = torch.randint(sizes["vocab_size"], (batch, 1), device="cuda")
        tables = rotary(heads[3], 1, "cuda")
        rates[batch] = 1e3 * batch / _milliseconds(stack, (x, tables, cache))
        del cache
        release()
    where = (
        f"Qwen3-8B shapes, random weights, window of {_WINDOW} in 5 of 6 layers, {keys} keys, "
        f"{memory / 1e9:.0f} GB, bfloat16"
    )
    for what, batch, bar in (
        ("largest batch", most, _DECODE_BAR if keys >= 32768 else None),
        ("equal batch", base.batch, None),
    ):
        yield measured(
            f"decode throughput, windows and gate, {what}", f"{where}, batches {batch} and {base.batch}", rates[batch],
            "tokens/s", better="higher", baseline_name=f"whole texts in all layers, torch {kernel}",
            baseline=base.tokens_per_second, required=bar,
        )  # fmt: skip
    del stack
    release()


@torch.no_grad()
def _milliseconds(stack: nn.Module, arguments: tuple[Any, ...]) -> float:
    from undivided.claims._timing import time_rivals

    return time_rivals({"step": lambda: stack(*arguments)}, "cuda", method="graph", seconds=0.5)[
        "step"
    ].median


def _stages(latent_dim: int) -> Measure:
    """Latent attention from new weights and from TransMLA, with and without the first stage, on a GPU."""

    def part(device: str, quick: bool) -> Iterator[Row]:
        if device == "cpu":
            return
        from undivided.claims._smollm_study import COLD, COLD_STAGED, TRANSMLA, TRANSMLA_STAGED, demo_study
        from undivided.claims._smollm_table import COUNTS, Table

        names = (COLD, COLD_STAGED, TRANSMLA, TRANSMLA_STAGED)
        table = Table(
            demo_study(device), latent_dim, names, counts=(1_000_000, 1_500_000) if quick else COUNTS
        )
        yield from table.rows()
        yield from table.stage_rows()

    return part


_PARTS: dict[str, Measure] = {
    "windows": window_rows,
    "decode": decode_rows,
    "stages_128": _stages(128),
    "stages_64": _stages(64),
}
CLAIM = Claim(
    slug="attention_editing",
    source="arXiv 2604.05688, abstract",
    paper=(
        "Qwen3-8B and Qwen3-30B-A3B, converted to MLA and to gated hybrid sliding-window attention, stay competitive, "
        "with large gains in efficiency; the public abstract has no figures.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
