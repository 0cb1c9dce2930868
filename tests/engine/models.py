"""Tiny models of every kind that the engine decodes, and what transformers writes with them."""

from __future__ import annotations

from typing import Any

import torch

from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_model
from undivided.convert.tpla import convert_tpla, mla_to_gla
from undivided.convert.transmla import convert_transmla
from undivided.models.causal_lm import UndividedForCausalLM

KINDS = ("llama", "mla", "tpla", "tpla, exact prompts", "gla", "hybrid", "deepseek_v3 as tpla", "gemma2")


def model_of(kind: str, **overrides: Any) -> Any:
    calibration = torch.randint(1, VOCAB_SIZE, (2, 32), generator=torch.Generator().manual_seed(1))
    if kind == "deepseek_v3 as tpla":
        return convert_tpla(tiny_model("deepseek_v3", **overrides), calibration=calibration)[0]
    if kind == "gemma2":
        return tiny_model("gemma2", sliding_window=128, **overrides)
    source = tiny_llama(**overrides)
    if kind == "llama":
        return source
    mla, _ = convert_transmla(source, calibration, latent_dim=16, rope_dim=4)
    if kind == "mla":
        return mla
    if kind == "gla":
        return mla_to_gla(mla, 2)
    if kind == "hybrid":
        host = UndividedForCausalLM.from_native(source)
        host.set_attention(1, mla.attention_layers()[1])
        return host
    return convert_tpla(mla, calibration=calibration, prefill="exact" if "exact" in kind else "sliced")[0]


def random_prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def transformers_tokens(model: Any, prompt: list[int], max_new_tokens: int, **options: Any) -> list[int]:
    """Greedy tokens by transformers' generate, one prompt alone."""
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0,
            **options,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()
