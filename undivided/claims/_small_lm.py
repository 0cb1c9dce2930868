"""A small language model with DeepSeek's attention and a vocabulary of its own, for claims about MLA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 2048


def train_tokenizer(text: str, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of the text; the same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def latent_lm(seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """Returns an untrained DeepSeek-V3 model with dense MLPs: 4 layers of width 256, 4 heads, latent of 128.

    Args:
        seed: of the weights.
        sizes: fields of the config to set otherwise.
    """
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    layers = sizes.get("num_hidden_layers", 4)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": sizes.get("num_attention_heads", 4),
        "q_lora_rank": None,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        # The experts are not what is studied: every MLP is dense.
        "first_k_dense_replace": layers,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(DeepseekV3Config(**{**fields, **sizes}))
