"""Attention without masks: an implementation for transformers whose masks are built for padded batches alone.

A base model with windows builds a mask of `length x length` for its layers, which exchanged layers that count positions
themselves do not need. Only public interfaces are used: `AttentionInterface.register` and
`AttentionMaskInterface.register`. Written for transformers 5.17 to 5.24.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "undivided"


def unless_needed(
    *args: Any, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **kwargs: Any
) -> torch.Tensor | None:
    """Returns the mask of "sdpa" for padded and for packed texts, and None for all others, windows or not."""
    if allow_is_causal_skip and (attention_mask is None or bool(attention_mask.all())):
        return None
    return sdpa_mask(
        *args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **kwargs
    )


def leave_out_masks(model: Any) -> None:
    """Lets a host, all of whose layers count positions themselves, build masks only where they say something."""
    AttentionInterface.register(IMPLEMENTATION, sdpa_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, unless_needed)
    model.set_attn_implementation(IMPLEMENTATION)
