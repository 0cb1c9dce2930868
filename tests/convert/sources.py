"""The models that the tests of conversions start from, in full float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tests.tiny import VOCAB_SIZE, tiny_model
from undivided.convert._host import host_sharing_weights
from undivided.layers.gqa import GQAttention

# Head width 8 but for Gemma's 16; two key heads unless it says otherwise.
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with bias": ("llama", {"attention_bias": True}),
    "llama, one head a key": ("llama", {"num_key_value_heads": 4}),
    "llama, one key head": ("llama", {"num_key_value_heads": 1}),
    "llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2": ("qwen2", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0}),
}
# What two orders of the same sums differ by in float64, and two different functions exceed by far.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def source_model(name: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A tiny model in float64 throughout: the norms of transformers compute in float32, and would round."""
    model_type, options = SOURCES[name]
    model = tiny_model(model_type, dtype=torch.float64, **options, **overrides)
    for module in list(model.modules()):
        for child_name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, child_name, _in_float64(child))
    return model


def _in_float64(norm: nn.Module) -> nn.Module:
    exact = nn.RMSNorm(len(norm.weight), eps=getattr(norm, "variance_epsilon", None) or norm.eps)
    offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0
    exact.weight = nn.Parameter(norm.weight.detach() + offset)
    return exact


def logits(source: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The logits of a source in float64, also where transformers takes the softmax in float32 (soft caps)."""
    if source.config.model_type != "gemma2":
        return source(input_ids).logits
    host = host_sharing_weights(source)
    for index, attention in enumerate(host.attention_layers()):
        layer = GQAttention.from_config(source.config, index)
        layer.load_state_dict(attention.state_dict())
        host.set_attention(index, layer)
    return host(input_ids).logits


def tokens(samples: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCAB_SIZE, (samples, length), generator=generator)
