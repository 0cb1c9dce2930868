"""Attention without masks: an implementation for transformers whose masks are built for padded batches alone.

A base model with windows builds a mask of `length x length` for its layers, which exchanged layers that count positions
themselves do not need. Only public interfaces are used: `AttentionInterface.register` and
`AttentionMaskInterface.register`. Written for transformers 5.17 to 5.24.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "undivided"
UNPADDED = "undivided-unpadded"


def unless_needed(
    *args: Any, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> torch.Tensor | None:
    """Returns the mask of "sdpa" for padded and for packed texts, and None for all others, windows or not."""
    if allow_is_causal_skip and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(
        *args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )


@contextmanager
def without_masks(*models: Any) -> Iterator[None]:
    """Within the context, models build no mask at all: for whole texts, neither padded nor packed nor behind a cache.

    Models that do not attend through transformers' interface are left as they are.

    While a CUDA graph is captured, transformers cannot look whether a batch is packed, and builds a mask of `length x
    length` for it: every replay would attend with it, and no kernel for causal attention could run.
    """
    # Without an entry in AttentionMaskInterface there is no mask.
    AttentionInterface.register(UNPADDED, sdpa_attention_forward)
    chosen = [model for model in models if getattr(model, "_supports_attention_backend", False)]
    before = [model.config._attn_implementation for model in chosen]
    try:
        for model in chosen:
            model.set_attn_implementation(UNPADDED)
        yield
    finally:
        for model, implementation in zip(chosen, before, strict=True):
            model.set_attn_implementation(implementation)


def leave_out_masks(model: Any) -> None:
    """Lets a host, all of whose layers count positions themselves, build masks only where they say something."""
    AttentionInterface.register(IMPLEMENTATION, sdpa_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, unless_needed)
    model.set_attn_implementation(IMPLEMENTATION)
