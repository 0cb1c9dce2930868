from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tests.tiny import MODEL_TYPES, tiny_llama, tiny_model, tiny_text, tiny_tokenizer
from undivided.models.bases import cache_argument
from undivided.models.evaluation import (
    cache_bytes,
    cache_bytes_per_token,
    compare,
    decode_perplexity,
    generate_text,
    perplexity,
    token_agreement,
)
from undivided.testing import assert_as_accurate

TOKENIZER = tiny_tokenizer()
TEXT = tiny_text(300)
EPS = torch.finfo(torch.float64).eps


def token_nlls(model, text: str, block: int) -> torch.Tensor:
    """Negative log-likelihoods of the predicted tokens, from plain cross entropy, in the model's own type."""
    ids = torch.tensor(TOKENIZER(text).input_ids)
    parts = []
    with torch.no_grad():
        for piece in ids.split(block):
            logits = model(piece[None]).logits[0]
            parts.append(F.cross_entropy(logits[:-1], piece[1:], reduction="none"))
    return torch.cat(parts)


def as_float32(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


def mean(nlls: torch.Tensor) -> torch.Tensor:
    return nlls.mean(dim=0, keepdim=True)


def same(value: float, expected: float) -> bool:
    """Equal but for the order of a float64 sum."""
    return abs(value - expected) <= 64 * EPS * abs(expected)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_perplexity_is_the_mean_over_the_predicted_tokens_of_all_blocks(model_type: str) -> None:
    result = perplexity(tiny_model(model_type), TOKENIZER, TEXT, block=64)
    eager = token_nlls(tiny_model(model_type), TEXT, block=64)
    exact = token_nlls(tiny_model(model_type, dtype=torch.float64), TEXT, block=64)
    # 300 bytes: four blocks of 64 and one of 44, which counts too.
    assert result.tokens == len(eager) == 4 * 63 + 43
    assert_as_accurate(as_float32(result.nll), mean(eager), mean(exact))
    assert same(result.perplexity, math.exp(result.nll))


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = tiny_llama(dtype=torch.float64)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert same(perplexity(model, TOKENIZER, TEXT).perplexity, 256)


def test_a_model_of_bytes_that_repeat_has_perplexity_one() -> None:
    model = tiny_llama(dtype=torch.float64)
    a = TOKENIZER("a").input_ids[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        # Every position votes for "a", whatever the direction of its hidden state.
        hidden = model.model(torch.full((1, 32), a)).last_hidden_state[0]
        model.lm_head.weight[a] = 1e3 * hidden.mean(0)
    result = perplexity(model, TOKENIZER, "a" * 32)
    assert result.perplexity == 1
    assert result.tokens == 31


def test_blocks_do_not_see_each_other() -> None:
    model = tiny_llama(dtype=torch.float64)
    both = perplexity(model, TOKENIZER, TEXT[:128], block=64)
    first = perplexity(model, TOKENIZER, TEXT[:64], block=64)
    second = perplexity(model, TOKENIZER, TEXT[64:128], block=64)
    assert same(both.nll, (first.nll + second.nll) / 2)


def test_long_blocks_are_not_lost_between_the_slices_of_rows() -> None:
    model = tiny_llama(dtype=torch.float64, max_position_embeddings=700)
    text = tiny_text(700)
    assert same(perplexity(model, TOKENIZER, text).nll, token_nlls(model, text, 700).mean().item())


def test_half_precision_logits_are_summed_in_float32() -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    ids = torch.tensor([TOKENIZER(TEXT[:256]).input_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    expected = F.cross_entropy(logits.double(), ids[0, 1:])
    eager = F.cross_entropy(logits.float(), ids[0, 1:])
    assert_as_accurate(as_float32(perplexity(model, TOKENIZER, TEXT[:256]).nll), eager[None], expected[None])


def test_max_tokens_takes_the_beginning() -> None:
    model = tiny_llama()
    assert perplexity(model, TOKENIZER, TEXT, max_tokens=100) == perplexity(model, TOKENIZER, TEXT[:100])


def test_the_models_mode_and_its_gradients_are_left_alone() -> None:
    model = tiny_llama(attention_dropout=0.5)
    expected = perplexity(model, TOKENIZER, TEXT)
    model.train()
    assert perplexity(model, TOKENIZER, TEXT) == expected
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_goes_through_every_block() -> None:
    seen: list[tuple[str, int]] = []

    def progress(items, description):
        for item in items:
            seen.append((description, item.shape[1]))
            yield item

    perplexity(tiny_llama(), TOKENIZER, TEXT, block=128, progress=progress)
    assert seen == [("perplexity", 128), ("perplexity", 128), ("perplexity", 44)]


def test_block_beyond_the_context_is_refused() -> None:
    with pytest.raises(ValueError, match=r"block=512 exceeds the model's context; use at most 256"):
        perplexity(tiny_llama(), TOKENIZER, TEXT, block=512)
    with pytest.raises(ValueError, match=r"max_tokens=512 exceeds the model's context; use at most 256"):
        decode_perplexity(tiny_llama(), TOKENIZER, TEXT, max_tokens=512)


@pytest.mark.parametrize("measure", [perplexity, decode_perplexity])
def test_logits_that_are_not_finite_are_an_error(measure) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(ValueError, match=r"the model's logits are not finite"):
        measure(model, TOKENIZER, TEXT)


# 44 tokens are predicted: one at a time, in even steps, in steps with a remainder, at once.
@pytest.mark.parametrize("step", [1, 11, 10, 100])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_decoding_through_the_cache_gives_the_same_perplexity(model_type: str, step: int) -> None:
    result = decode_perplexity(tiny_model(model_type), TOKENIZER, TEXT, prefix=20, step=step, max_tokens=64)
    # Tokens 20 to 63 are predicted at positions 19 to 62.
    eager = token_nlls(tiny_model(model_type), TEXT[:64], block=64)[19:]
    exact = token_nlls(tiny_model(model_type, dtype=torch.float64), TEXT[:64], block=64)[19:]
    assert result.tokens == len(exact) == 44
    assert_as_accurate(as_float32(result.nll), mean(eager), mean(exact))


@pytest.mark.parametrize("step", [1, 8])
def test_decoding_has_only_the_cache_to_look_back(step: int) -> None:
    model = tiny_llama(dtype=torch.float64)
    honest = decode_perplexity(model, TOKENIZER, TEXT, step=step, max_tokens=64)

    def forget(module, arguments, keywords):
        if keywords.get(cache_argument()) is not None:
            for layer in keywords[cache_argument()].layers:
                layer.values.zero_()

    handle = model.register_forward_pre_hook(forget, with_kwargs=True)
    forgetful = decode_perplexity(model, TOKENIZER, TEXT, step=step, max_tokens=64)
    handle.remove()
    assert honest.tokens == forgetful.tokens == 32
    assert not same(honest.nll, forgetful.nll)


def test_prefix_that_leaves_nothing_is_refused() -> None:
    for prefix in (0, 64):
        with pytest.raises(ValueError, match=rf"prefix={prefix} does not split 64 tokens; use 1 to 63"):
            decode_perplexity(tiny_llama(), TOKENIZER, TEXT, prefix=prefix, max_tokens=64)
    with pytest.raises(ValueError, match=r"step=0 is too small; use at least 1"):
        decode_perplexity(tiny_llama(), TOKENIZER, TEXT, step=0)


def test_comparison_with_itself_finds_nothing() -> None:
    model = tiny_llama()
    result = compare(model, model, TOKENIZER, TEXT, block=64)
    assert (result.kl, result.agreement) == (0.0, 1.0)
    assert result.model == result.reference == perplexity(model, TOKENIZER, TEXT, block=64)


def test_comparison_is_the_kl_from_reference_to_model() -> None:
    model, reference = tiny_llama(seed=1), tiny_llama(seed=2)

    def both(dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        kl, equal = [], []
        for ids in torch.tensor(TOKENIZER(TEXT).input_ids).split(64):
            with torch.no_grad():
                q = tiny_llama(seed=1, dtype=dtype)(ids[None]).logits[0, :-1].log_softmax(-1)
                p = tiny_llama(seed=2, dtype=dtype)(ids[None]).logits[0, :-1].log_softmax(-1)
            kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
            equal.append(p.argmax(-1) == q.argmax(-1))
        return mean(torch.cat(kl)), torch.cat(equal).double().mean().item()

    result = compare(model, reference, TOKENIZER, TEXT, block=64)
    (eager, _), (exact, agreement) = both(torch.float32), both(torch.float64)
    assert_as_accurate(as_float32(result.kl), eager, exact)
    assert result.agreement == agreement
    assert result.tokens == 4 * 63 + 43
    assert result.model == perplexity(model, TOKENIZER, TEXT, block=64)
    assert result.reference == perplexity(reference, TOKENIZER, TEXT, block=64)
    # KL is not symmetric: the order of the arguments matters.
    assert compare(reference, model, TOKENIZER, TEXT, block=64).kl != result.kl


def test_comparison_of_vocabularies_that_differ_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model has 300 words, reference 256: not one vocabulary"):
        compare(tiny_llama(vocab_size=300), tiny_llama(), TOKENIZER, TEXT)


def test_comparison_takes_the_shorter_context() -> None:
    short, long = tiny_llama(max_position_embeddings=64), tiny_llama()
    assert compare(long, short, TOKENIZER, TEXT).tokens == 4 * 63 + 43


def test_generated_text_is_the_greedy_continuation_alone() -> None:
    model = tiny_llama()
    # A checkpoint whose own settings would sample.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    ids = TOKENIZER("The key", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert 0 not in ids, "the end came early; take another seed"
    assert generate_text(model, TOKENIZER, "The key", max_new_tokens=12) == TOKENIZER.decode(ids[0, 7:])


def test_agreement_with_itself_is_whole() -> None:
    model = tiny_llama()
    assert token_agreement(model, model, TOKENIZER, ["The key", "Every head"], max_new_tokens=16) == 1.0


def test_agreement_counts_positions_of_the_references_continuation() -> None:
    reference = tiny_llama()
    ids = TOKENIZER("The key", return_tensors="pt").input_ids
    with torch.no_grad():
        for _ in range(16):
            ids = torch.cat([ids, reference(ids).logits[:, -1:].argmax(-1)], dim=1)
    model = tiny_llama(seed=3)
    with torch.no_grad():
        chosen = model(ids).logits[0, 6:-1].argmax(-1)
    expected = (chosen == ids[0, 7:]).double().mean().item()
    assert token_agreement(model, reference, TOKENIZER, ["The key"], max_new_tokens=16) == expected
    # A model whose words are all one place off never agrees.
    shifted = tiny_llama()
    with torch.no_grad():
        shifted.lm_head.weight.copy_(shifted.lm_head.weight.roll(1, dims=0))
    assert token_agreement(shifted, reference, TOKENIZER, ["The key"], max_new_tokens=16) == 0.0
    with pytest.raises(ValueError, match=r"prompts is empty"):
        token_agreement(model, reference, TOKENIZER, [])


def test_cache_bytes_are_those_of_keys_and_values() -> None:
    ids = torch.arange(20)[None]
    # layers x (keys, values) x key/value heads x tokens x head_dim x bytes
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = tiny_llama(dtype=dtype)(ids, use_cache=True).past_key_values
        assert cache_bytes(cache) == 2 * 2 * 2 * 20 * 8 * size
    # layers x (latent, rope part) x tokens x bytes
    cache = tiny_model("deepseek_v3")(ids, use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * (16 + 4) * 20 * 4
    # One layer of two keeps only the 7 tokens before the next; its window's length, a scalar, counts nothing.
    cache = tiny_model("gemma2")(ids, use_cache=True).past_key_values
    assert cache_bytes(cache) == 2 * 2 * (20 + 7) * 16 * 4


def test_cache_bytes_of_quantised_states_count() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8), 0)
    cache.layers[0].keys = cache.layers[0].keys.to(torch.int8)
    cache.layers[0].scales = [torch.ones(1, 2, 10, 1)]
    assert cache_bytes(cache) == 2 * 10 * 8 * (1 + 4) + 2 * 10 * 4


def test_cache_bytes_of_an_empty_cache_are_none() -> None:
    from transformers import DynamicCache

    assert cache_bytes(DynamicCache()) == 0
    assert cache_bytes(DynamicCache(config=tiny_llama().config)) == 0


def test_one_tensor_that_serves_twice_is_counted_once() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    rows = torch.randn(1, 1, 10, 16)
    cache.update(rows, rows, 0)
    assert cache_bytes(cache) == 2 * 10 * 16 * 4
    cache.layers[0].values = cache.layers[0].keys
    assert cache_bytes(cache) == 10 * 16 * 4


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", 2 * 2 * 2 * 8 * 4),
        ("mistral", 2 * 2 * 2 * 8 * 4),
        ("deepseek_v2", 2 * (16 + 4) * 4),
        # One layer of two has a window of 8 tokens, which does not grow.
        ("gemma2", 1 * 2 * 2 * 16 * 4),
    ],
)
def test_cache_bytes_per_token_is_how_much_it_grows(model_type: str, expected: int) -> None:
    assert cache_bytes_per_token(tiny_model(model_type)) == expected


def test_cache_bytes_per_token_stays_within_a_short_context() -> None:
    model = tiny_llama(max_position_embeddings=32)
    lengths: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: lengths.append(arguments[0].shape[1]))
    assert cache_bytes_per_token(model) == 2 * 2 * 2 * 8 * 4
    assert lengths == [16, 32]
