"""Tiny random models and a tokenizer, built in milliseconds, for tests that need a whole checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 256

_COMMON: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=0,
)
_LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    # Dense MLPs in every layer: the experts are not what these tests are about.
    first_k_dense_replace=99,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    n_group=1,
    topk_group=1,
)
_OWN: dict[str, dict[str, Any]] = {
    "llama": dict(num_key_value_heads=2),
    "qwen2": dict(num_key_value_heads=2),
    "mistral": dict(num_key_value_heads=2, head_dim=8, sliding_window=None),
    "gemma2": dict(num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    "deepseek_v2": dict(_LATENT),
    "deepseek_v3": dict(_LATENT),
}
MODEL_TYPES = tuple(_OWN)


def tiny_config(model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Config of a two-layer model of the given transformers type; keywords override its fields."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**{**_COMMON, **_OWN[model_type], **overrides})


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Random causal language model of the given transformers type, in eval mode.

    Every parameter is drawn afresh (norm weights near one, biases non-zero, the rest wide enough that
    attention is far from uniform): transformers' own initialisation leaves norms at one, biases at zero and
    logits nearly flat, which hides errors in exactly the parts that conversions fold.
    """
    from transformers import AutoModelForCausalLM

    # "sdpa", which transformers 5.17 takes for Gemma-2, leaves the cap of the logits out.
    eager = {"attn_implementation": "eager"} if model_type == "gemma2" else {}
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), **eager)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                # Not fan-in scaled for embeddings, whose rows are inputs rather than sums.
                parameter.copy_(noise * (1.0 if "embed" in name else 1.5 * parameter.shape[-1] ** -0.5))
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                # Gemma's norms multiply by one plus the weight.
                centre = 0.0 if model_type.startswith("gemma") else 1.0
                parameter.copy_(centre + 0.2 * noise)
    # Not model.to(dtype): as in a loaded checkpoint, the buffers (rotary frequencies) stay in float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """Random two-layer Llama: 4 query heads, 2 key/value heads, head_dim 8, vocabulary 256."""
    return tiny_model("llama", seed=seed, dtype=dtype, **overrides)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: one token a UTF-8 byte, lossless on any text; token 0 is the special one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte 0xFF, written as itself in this alphabet, never occurs in UTF-8: its place goes to the special
    # token.
    tokens = ["<|end|>", *sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"\xff"})]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


def tiny_text(num_characters: int = 2000, *, seed: int = 0) -> str:
    """English-looking text: random words of a small vocabulary, in sentences."""
    words = ["the", "of", "a", "key", "query", "value", "head", "layer", "reads", "attends", "to", "every"]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(words), (num_characters // 2,), generator=generator).tolist()
    text = " ".join(words[pick] + ("." if index % 11 == 10 else "") for index, pick in enumerate(picks))
    return text[:num_characters]
