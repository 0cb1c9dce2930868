"""A window with sinks, the baseline of claims about long contexts: StreamingLLM, while a prompt is read."""

from __future__ import annotations

from typing import Any

import torch

from undivided.layers.gqa import GQAttention
from undivided.ops import dense_attention


class SinkWindowAttention(GQAttention):
    """Grouped-query attention to the first `sinks` tokens and to the last `window` ones, the query's own included.

    Positions are those of the text, which is no longer than the model's context. Whole texts without padding, no cache.

    Source: StreamingLLM (arXiv 2309.17453), section 3.2.
    """

    def limit(self, window: int, sinks: int = 4) -> SinkWindowAttention:
        """Sets the window and the number of sinks."""
        self.window, self.sinks = window, sinks
        return self

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the outputs of the heads."""
        if mask is not None or query.shape[2] != key.shape[2]:
            raise ValueError("the baseline reads whole texts without padding and without a cache.")
        row = torch.arange(key.shape[2], device=key.device)[:, None]
        column = torch.arange(key.shape[2], device=key.device)
        seen = (column <= row) & ((column > row - self.window) | (column < self.sinks))
        # Fused kernels with a mask take as many key heads as query heads.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        out: Any = dense_attention(
            query, key, value, attn_mask=seen, scale=self.scale, softcap=self.softcap, backend="sdpa"
        )
        return out


def with_sink_window(model: Any, window: int, sinks: int = 4) -> Any:
    """Returns a host that shares the model's weights, with this attention in every layer."""
    import undivided

    host = undivided.attach(model, "gqa")
    for index, source in enumerate(host.attention_layers()):
        with torch.device("meta"):
            layer = SinkWindowAttention.from_config(host.config.base_config, index).limit(window, sinks)
        layer.load_state_dict(dict(source.named_parameters()), assign=True)
        host.set_attention(index, layer)
    return host
