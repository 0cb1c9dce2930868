from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import DynamicCache

from tests.tiny import tiny_config, tiny_model
from undivided.convert import attach, convert_core_context
from undivided.layers._core_cache import CoreContextCacheLayer
from undivided.layers.core_context import CoreContextAttention
from undivided.layers.gqa import GQAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.evaluation import cache_bytes
from undivided.ops.core_context import visible_cores
from undivided.spec import interpret

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEAD_DIM = 24, 8
OPTIONS = [
    {},
    {"core_heads": "kv"},
    {"pooling": "mean"},
    {"pooling": "max"},
    {"rope": "pre"},
    {"rope": "pre", "pooling": "mean", "core_logit_bias": 0.7},
    {"rope": "pre", "core_heads": "kv"},
    {"core_logit_bias": math.log(4)},
    {"softcap": 2.0},
    {"window": 6, "group_size": 5},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


def build(heads=4, groups=2, dtype=torch.float64, **options) -> CoreContextAttention:
    layer = CoreContextAttention(
        WIDTH, heads, groups, HEAD_DIM, **({"group_size": 4, "window": 10} | options)
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer.to(dtype).eval()


def tables(length, dtype=torch.float64):
    pairs = HEAD_DIM // 2
    angles = torch.outer(torch.arange(length).double(), 100.0 ** -(torch.arange(pairs) / pairs))
    angles = angles.repeat(1, 2)[None]
    # Scaled, as the tables of some base models are.
    return 1.1 * angles.cos().to(dtype), 1.1 * angles.sin().to(dtype)


def in_pieces(layer, x, cos_sin, pieces, cache):
    outputs, at = [], 0
    for size in pieces:
        here = slice(at, at + size)
        outputs.append(layer(x[:, here], tuple(t[:, here] for t in cos_sin), past_key_values=cache)[0])
        at += size
    return torch.cat(outputs, dim=1)


@every_option
@pytest.mark.parametrize("pieces", [[1] * 41, [30, *[1] * 11], [7, 19, 2, 13], [41], [9, 1, 1, 30]], ids=str)
@torch.no_grad()
def test_any_pieces_behind_a_cache_are_one_text(options, pieces):
    layer, x, cos_sin = build(**options), torch.randn(2, 41, WIDTH, dtype=torch.float64), tables(41)
    found = in_pieces(layer, x, cos_sin, pieces, DynamicCache())
    torch.testing.assert_close(found, layer(x, cos_sin)[0], **EXACT)


@torch.no_grad()
def test_the_cache_keeps_what_the_formula_says():
    for options, core_heads in (({}, 4), ({"core_heads": "kv"}, 2), ({"pooling": "mean"}, 2)):
        layer, cos_sin = build(**options), tables(60)
        x, cache = torch.randn(1, 60, WIDTH, dtype=torch.float64), DynamicCache()
        for token in range(60):
            here = slice(token, token + 1)
            layer(x[:, here], tuple(t[:, here] for t in cos_sin), past_key_values=cache)
            kept, seen = cache.layers[0], token + 1
            cores = visible_cores(seen, 4, 10)
            assert kept.get_seq_length() == seen
            assert kept.keys.shape == kept.values.shape == (1, 2, seen - 4 * cores, HEAD_DIM)
            assert kept.keys.shape[2] < 10 + 4
            if cores:
                assert kept.core_keys.shape == kept.core_values.shape == (1, core_heads, cores, HEAD_DIM)
            waiting = (seen // 4 - cores) * 4 * core_heads if options.get("pooling") is None else 0
            numbers = 2 * HEAD_DIM * (2 * (seen - 4 * cores) + core_heads * cores)
            assert cache_bytes(cache) == 8 * numbers + 8 * waiting


def test_a_prompt_leaves_no_more_memory_than_is_kept():
    layer, cache = build(), DynamicCache()
    layer(torch.randn(1, 50, WIDTH, dtype=torch.float64), tables(50), past_key_values=cache)
    for tensor in (cache.layers[0].keys, cache.layers[0].values):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@torch.no_grad()
def test_up_to_the_window_it_is_grouped_query_attention():
    layer = build()
    plain = GQAttention(WIDTH, 4, 2, HEAD_DIM).double()
    plain.load_state_dict(layer.state_dict())
    x, cos_sin = torch.randn(2, 10, WIDTH, dtype=torch.float64), tables(10)
    assert torch.equal(layer(x, cos_sin)[0], plain(x, cos_sin)[0])
    x, cos_sin = torch.randn(2, 11 + 3, WIDTH, dtype=torch.float64), tables(14)
    assert not torch.allclose(layer(x, cos_sin)[0], plain(x, cos_sin)[0])


@torch.no_grad()
def test_pooled_before_the_rotation_equal_tokens_are_one_key():
    """Keys of equal tokens differ by their rotation alone; turned to the last one's place they are that one."""
    layer, x, cos_sin = build(rope="pre"), torch.randn(1, 1, WIDTH, dtype=torch.float64), tables(8)
    query, key, value = layer.heads(x.expand(1, 8, WIDTH), cos_sin)
    core_key, core_value = layer._cores(query, key, value, tuple(t[..., :4] for t in cos_sin), 2)
    torch.testing.assert_close(core_key, key[:, :, 3::4].repeat_interleave(2, dim=1), **EXACT)
    torch.testing.assert_close(core_value, value[:, :, 3::4].repeat_interleave(2, dim=1), **EXACT)
    after = build()
    after.load_state_dict(layer.state_dict())
    assert not torch.allclose(after._cores(query, key, value, None, 2)[0], core_key)


@pytest.mark.parametrize("options", [options for options in OPTIONS if "softcap" not in options], ids=str)
@torch.no_grad()
def test_is_its_specification(options):
    layer, x, cos_sin = build(**options), torch.randn(2, 33, WIDTH, dtype=torch.float64), tables(33)
    inputs = layer.spec_inputs(x, cos_sin)
    assert set(inputs) == set(layer.spec.inputs)
    heads = interpret(layer.spec, inputs).out
    torch.testing.assert_close(layer.o_proj(heads.transpose(1, 2).flatten(2)), layer(x, cos_sin)[0], **EXACT)


@pytest.mark.parametrize(
    "options", [{}, {"rope": "pre"}, {"core_logit_bias": 0.5}, {"core_heads": "kv"}], ids=str
)
@torch.no_grad()
def test_padded_texts_are_what_they_are_alone_also_behind_a_cache(options):
    layer, lengths, width = build(**options), [31, 24, 40], 40
    x = torch.randn(3, width, WIDTH, dtype=torch.float64)
    padding = torch.tensor([width - length for length in lengths])
    column, row = torch.arange(width), torch.arange(width)[:, None]
    mask = ((column <= row) & (column >= padding[:, None, None]))[:, None]
    positions = (column - padding[:, None]).clamp(min=0)
    cos_sin = tuple(t[0][positions] for t in tables(width))
    whole = layer(x, cos_sin, attention_mask=mask)[0]
    cache, parts = DynamicCache(), []
    for start, stop in ((0, 20), (20, 33), *((n, n + 1) for n in range(33, 40))):
        here = slice(start, stop)
        parts.append(
            layer(
                x[:, here], tuple(t[:, here] for t in cos_sin), attention_mask=mask[:, :, here, :stop],
                past_key_values=cache,
            )[0]
        )  # fmt: skip
    for index, length in enumerate(lengths):
        alone = layer(x[index : index + 1, -length:], tables(length))[0][0]
        torch.testing.assert_close(whole[index, -length:], alone, **EXACT)
        torch.testing.assert_close(torch.cat(parts, dim=1)[index, -length:], alone, **EXACT)


def test_a_cache_can_be_reordered_repeated_and_reset():
    layer, x, cos_sin = build(), torch.randn(3, 30, WIDTH, dtype=torch.float64), tables(30)
    order = torch.tensor([2, 0, 0])
    cache = DynamicCache()
    with torch.no_grad():
        in_pieces(layer, x, cos_sin, [22], cache)
        cache.reorder_cache(order)
        x = torch.cat([x[order, :22], x[:, 22:]], dim=1)
        late = tuple(t[:, 22:] for t in cos_sin)
        found = layer(x[:, 22:], late, past_key_values=cache)[0]
        torch.testing.assert_close(found, layer(x, cos_sin)[0][:, 22:], **EXACT)
        cache.reset()
        assert cache.get_seq_length() == 0
        found = in_pieces(layer, x, cos_sin, [22, 8], cache)
        torch.testing.assert_close(found, layer(x, cos_sin)[0], **EXACT)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        assert cache.layers[0].core_keys.shape[0] == 2
    with pytest.raises(ValueError, match="a cache of core tokens cannot be shortened"):
        cache.crop(-3)


def test_caches_of_another_attention_are_refused():
    cache = DynamicCache()
    GQAttention(WIDTH, 4, 2, HEAD_DIM).double()(
        torch.randn(1, 3, WIDTH, dtype=torch.float64), tables(3), past_key_values=cache
    )
    with pytest.raises(ValueError, match="layer 0 of the cache holds keys of another attention"):
        build()(torch.randn(1, 1, WIDTH, dtype=torch.float64), tables(1), past_key_values=cache)


def test_masks_of_other_kinds_are_refused():
    layer, x = build(), torch.randn(1, 12, WIDTH, dtype=torch.float64)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    packed = causal.clone()
    packed[6:, :6] = False
    right = causal.clone()
    right[:, 10:] = False
    for mask in (packed, right, causal & ~causal.tril(-5)):
        with pytest.raises(ValueError, match="attention_mask is not that of one causal text a row"):
            layer(x, tables(12), attention_mask=mask[None, None])
    cache = DynamicCache()
    layer(x, tables(12), past_key_values=cache)
    late = torch.ones(1, 1, 1, 13, dtype=torch.bool)
    late[..., :2] = False
    with pytest.raises(ValueError, match="hides the first tokens of a cache that was filled without padding"):
        layer(x[:, :1], tables(1), attention_mask=late, past_key_values=cache)


def test_bad_options_are_named():
    for change, message in (
        ({"group_size": 0}, "group_size=0 must be at least 1."),
        ({"window": 0}, "window=0 must be at least 1: a query sees itself."),
        ({"pooling": "sum"}, "pooling='sum' is not one of 'cca', 'mean', 'max'."),
        ({"core_heads": "all"}, "core_heads='all' is not one of 'query', 'kv'."),
        ({"rope": "none"}, "rope='none' is not one of 'post', 'pre'."),
    ):
        with pytest.raises(ValueError) as error:
            build(**change)
        assert str(error.value) == message
    with pytest.warns(UserWarning, match="window=3 is less than group_size=4."):
        build(window=3)


@torch.no_grad()
def test_a_converted_model_generates_as_it_reads():
    model = tiny_model("llama", dtype=torch.float64)
    host, report = convert_core_context(model, group_size=4, window=8, evaluate=lambda m: 1.0)
    assert report.perplexity == {"original": 1.0, "core_context": 1.0}
    # Two layers, four heads of eight, keys and values in float64, every fourth token.
    assert report.cache_bytes_per_token_per_rank == 2 * 2 * 4 * 8 * 8 // 4
    ids = torch.randint(1, 256, (1, 30))
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = host.generate(ids, **greedy)
    assert torch.equal(written[0, 30:], host(written).logits[0, 29:-1].argmax(-1))
    assert torch.equal(model(ids[:, :8]).logits, host(ids[:, :8]).logits)
    cache = host(ids, use_cache=True).past_key_values
    assert all(isinstance(layer, CoreContextCacheLayer) for layer in cache.layers)


def test_attention_alone_learns_through_peft():
    peft = pytest.importorskip("peft")
    model = attach(tiny_model("llama"), "core_context", group_size=4, window=8)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    tuned = peft.get_peft_model(model, config)
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name and "self_attn" in name for name in trained)
    ids = torch.randint(256, (2, 40))
    optimiser = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = tuned.merge_and_unload()
    assert type(merged.attention_layers()[0]) is CoreContextAttention


def test_pooling_alone_decides_what_a_far_token_adds():
    """A far value moves the output by its weight in the group times the core token's weight, and by no more."""
    layer, x, cos_sin = build(), torch.randn(1, 41, WIDTH, dtype=torch.float64), tables(41)
    query, key, value = layer.heads(x, cos_sin)
    value = value.detach().requires_grad_()
    out = layer._whole(query, key, value, None)
    (gradient,) = torch.autograd.grad(out[0, :, -1].sum(), value)
    # All weights of the last query together are one, core tokens' shares included.
    assert gradient[0].sum(dim=(0, 1)) == pytest.approx([4.0] * HEAD_DIM, abs=1e-9)
    for first, second in itertools.pairwise(range(0, 28, 4)):
        assert gradient[0, :, first:second].abs().min() > 0


def test_a_host_with_a_growing_context_keeps_its_config():
    entry = {"mechanism": "core_context", "group_size": 2, "window": 4}
    from undivided.models.configuration import UndividedConfig

    model = UndividedForCausalLM(UndividedConfig(base_config=tiny_config("mistral"), attention=[entry, None]))
    ids = torch.randint(1, 256, (1, 12))
    output = model(ids, use_cache=True)
    assert output.past_key_values.get_seq_length() == 12
    assert type(output.past_key_values.layers[1]).__name__ == "DynamicLayer"
