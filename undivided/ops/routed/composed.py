"""Routed attention composed of dense attention: all heads for all tokens, then a mask. It saves no time."""

from __future__ import annotations

import torch

from undivided.ops.dense import dense_attention, flex, sdpa


def sdpa_reasons(selected, gates, **arguments) -> list[str]:
    return sdpa.reasons(**arguments, window=None, return_lse=False)


def flex_reasons(selected, gates, **arguments) -> list[str]:
    return flex.reasons(**arguments, window=None, return_lse=False)


def attend_sdpa(selected, gates, **arguments):
    return _masked(dense_attention(**arguments, backend="sdpa"), selected, gates)


def attend_flex(selected, gates, **arguments):
    return _masked(dense_attention(**arguments, backend="flex"), selected, gates)


def _masked(out: torch.Tensor, selected: torch.Tensor, gates: torch.Tensor | None) -> torch.Tensor:
    if gates is not None:
        out = (out * gates[..., None]).to(out.dtype)
    return out.masked_fill(~selected[..., None], 0.0)
