from __future__ import annotations

import pytest
import torch

from tests.layers.latents import positions
from tests.tiny import VOCAB_SIZE, tiny_config, tiny_model
from undivided.layers.dma import DynamicMaskAttention, only_padding
from undivided.layers.gqa import GQAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig
from undivided.ops import dense_attention, dynamic_mask_attention
from undivided.ops.dynamic_mask.reference import kept_keys
from undivided.spec import interpret

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS, KEY_HEADS, DIM, LENGTH, KEEP = 32, 4, 2, 8, 21, 6
VARIANTS = {
    "paper": {},
    "linear": {"score_form": "linear"},
    "released": {"variant": "released"},
    "normalised": {"qk_norm": True, "score_bias": True},
}


def layer_of(keep=KEEP, **options) -> DynamicMaskAttention:
    """A layer in float64 whose logits and biases are far from flat."""
    layer = DynamicMaskAttention(WIDTH, HEADS, KEY_HEADS, DIM, keep_window_size=keep, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
    return layer.double()


def hidden_states(length: int = LENGTH) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


def tables(length: int = LENGTH):
    return positions(length, DIM // 2)


def model_of(**options) -> UndividedForCausalLM:
    entry = {"mechanism": "dma", "keep_window_size": KEEP, **options}
    host = UndividedForCausalLM(UndividedConfig(base_config=tiny_config("llama"), attention=[entry] * 2))
    with torch.no_grad():
        for parameter in host.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(1.5 * torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return host.double().eval()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_is_its_formula_key_by_key(options):
    layer, x = layer_of(**options), hidden_states()
    query, key, value = layer.heads(x, tables())
    if options.get("qk_norm"):
        # A rotation changes no norm: each head has the norm of its weight times a unit vector's.
        raw = layer.q_proj(x).unflatten(-1, (HEADS, DIM))
        unit = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.q_norm.weight
        torch.testing.assert_close(query.norm(dim=-1), unit.norm(dim=-1).transpose(1, 2), **EXACT)
    side_by_side = value.transpose(1, 2).reshape(2, LENGTH, KEY_HEADS * DIM)
    raw = side_by_side @ layer.dt_proj.weight.T
    if options.get("score_bias"):
        raw = raw + layer.dt_proj.bias
    linear = (layer.A * torch.log1p(raw.exp())).transpose(1, 2)
    bias = linear.exp() if layer.score_form == "exp" else linear
    assert layer.score_form == ("linear" if options and "qk_norm" not in options else "exp")
    torch.testing.assert_close(layer.key_bias(value), bias, **EXACT)
    kept = kept_keys(bias, LENGTH, KEEP, None, True, "global" if layer.variant == "released" else "per_row")
    mask = bias[:, :, None].masked_fill(~kept, -torch.inf).repeat_interleave(2, dim=1)
    out = dense_attention(query, key, value, attn_mask=mask, backend="reference")
    expected = layer.o_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, tables())[0], expected, **EXACT)


@pytest.mark.parametrize("options", [{}, {"keep": 40}, {"score_form": "linear"}, {"qk_norm": True}])
def test_is_what_its_specification_says(options):
    layer, x = layer_of(**options), hidden_states()
    out = interpret(layer.spec, layer.spec_inputs(x, tables())).out
    torch.testing.assert_close(
        layer(x, tables())[0], layer.o_proj(out.transpose(1, 2).flatten(2)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("keep", [1, 6, 100])
def test_at_the_start_it_is_a_sliding_window_and_plain_attention_within_it(keep):
    layer = layer_of(keep)
    layer.reset_scores()
    plain = GQAttention(WIDTH, HEADS, KEY_HEADS, DIM).double()
    plain.load_state_dict({name: layer.state_dict()[name] for name in plain.state_dict()})
    x = hidden_states()
    query, key, value = plain.heads(x, tables())
    windowed = dense_attention(query, key, value, is_causal=True, window=keep)
    out = layer(x, tables())[0]
    torch.testing.assert_close(out, layer.o_proj(windowed.transpose(1, 2).flatten(2)), **EXACT)
    if keep >= LENGTH:
        torch.testing.assert_close(out, plain(x, tables())[0], **EXACT)


@pytest.mark.parametrize("dead", [False, True])
def test_a_gradient_reaches_a_from_the_start_but_not_past_two_zeros(dead):
    layer = layer_of()
    layer.reset_scores()
    if dead:
        torch.nn.init.zeros_(layer.dt_proj.weight)
    layer(hidden_states(), tables())[0].square().sum().backward()
    # With W_dt zero all biases move together, which a softmax does not see; with A zero W_dt gets nothing yet.
    assert (layer.A.grad.abs().max() < 1e-12) == dead
    assert layer.dt_proj.weight.grad.abs().max() == 0


def test_values_get_a_gradient_through_the_bias_too():
    layer, x = layer_of(), hidden_states()
    query, key, value = layer.heads(x, tables())
    attend = lambda v, b: dynamic_mask_attention(query, key, v, b, KEEP)  # noqa: E731
    both = torch.autograd.functional.vjp(lambda v: attend(v, layer.key_bias(v)).sum(), value)[1]
    direct = torch.autograd.functional.vjp(lambda v: attend(v, layer.key_bias(value)).sum(), value)[1]
    through_bias = torch.autograd.functional.vjp(lambda v: attend(value, layer.key_bias(v)).sum(), value)[1]
    torch.testing.assert_close(both, direct + through_bias, **EXACT)
    assert through_bias.abs().max() > 1e-3


def test_gradients_are_those_of_finite_differences():
    layer, x = layer_of(3), hidden_states(7)
    weights = (layer.A, layer.dt_proj.weight, layer.v_proj.weight, layer.q_proj.weight)
    names = ("A", "dt_proj.weight", "v_proj.weight", "q_proj.weight")

    def forward(*values):
        found = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, tables(7)))
        return found[0]

    leaves = [weight.detach().clone().requires_grad_() for weight in weights]
    assert torch.autograd.gradcheck(forward, leaves, fast_mode=True)


# Eager attention of Doge gives NaN for padding in float64: the lowest number plus a negative product is -inf.
@pytest.mark.parametrize(("implementation", "padding"), [("eager", 0), ("sdpa", 0), ("sdpa", 4)])
def test_equals_the_attention_of_doge_with_its_weights(implementation, padding):
    from transformers.models.doge.configuration_doge import DogeConfig
    from transformers.models.doge.modeling_doge import DogeForCausalLM

    sizes = dict(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=DIM)
    config = DogeConfig(
        vocab_size=VOCAB_SIZE, intermediate_size=48, num_hidden_layers=2, keep_window_size=KEEP,
        attn_implementation=implementation, max_position_embeddings=64, **sizes,
    )  # fmt: skip
    model = DogeForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    # No token twice: equal tokens have equal biases in the first layer, and which of them transformers keeps is open.
    ids = torch.stack([torch.randperm(VOCAB_SIZE)[:LENGTH] for _ in range(2)])
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    arguments = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    expected = model(ids, **arguments).logits
    for layer_idx, decoder_layer in enumerate(model.model.layers):
        ours = DynamicMaskAttention(
            **sizes, keep_window_size=KEEP, qk_norm=True, layer_idx=layer_idx
        ).double()
        ours.load_official(model.state_dict(), f"model.layers.{layer_idx}.self_attn.")
        # The norms of transformers compute in float32.
        ours.q_norm, ours.k_norm = decoder_layer.self_attn.q_norm, decoder_layer.self_attn.k_norm
        decoder_layer.self_attn = ours
    found = model(ids, **arguments).logits
    # Eager attention of transformers takes its softmax in float32.
    close = 1e-5 if implementation == "eager" else 1e-9
    torch.testing.assert_close(found[:, padding:], expected[:, padding:], rtol=close, atol=close)


@pytest.mark.parametrize("keep_all", [False, True])
def test_generation_is_that_without_a_cache_far_beyond_the_window(keep_all):
    model = model_of(keep_all=keep_all)
    ids = torch.randint(VOCAB_SIZE, (2, 9))
    options = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, use_cache=False, **options)
    assert torch.equal(model.generate(ids, **options), expected)


def cache_after(model, ids, **arguments):
    output = model(ids, use_cache=True, **arguments)
    return output.past_key_values, output.logits


def test_the_cache_never_holds_more_than_the_window():
    from transformers import DynamicCache

    model = model_of()
    ids = torch.randint(VOCAB_SIZE, (2, 40))
    whole = model(ids, use_cache=False).logits
    cache, steps = DynamicCache(), []
    # A prompt, a step, more tokens at once, steps: the order of positions is lost and found again.
    for part in ids.split([3, 1, 9, 1, 1, 12, 1, 1, 1, 10], dim=1):
        cache, logits = cache_after(model, part, past_key_values=cache)
        steps.append(logits)
        for layer in cache.layers:
            assert layer.keys.shape == layer.values.shape == (2, 2, min(KEEP, layer.get_seq_length()), 8)
            assert layer.bias.shape == layer.positions.shape == layer.keys.shape[:3]
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, **EXACT)


def test_equal_biases_are_dropped_from_the_cache_oldest_first():
    model = model_of()
    for layer in model.attention_layers():
        torch.nn.init.zeros_(layer.A)
    ids = torch.randint(VOCAB_SIZE, (1, 20))
    cache, _ = cache_after(model, ids[:, :9])
    for token in ids[:, 9:].split(1, dim=1):
        cache, logits = cache_after(model, token, past_key_values=cache)
    assert cache.layers[0].positions.sort(dim=-1).values[0, 0].tolist() == list(range(14, 20))
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits[:, -1:], **EXACT)


def test_padding_takes_no_place_in_the_cache():
    model = model_of()
    ids, padding = torch.randint(VOCAB_SIZE, (2, 30)), 5
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = None
    for first, last in ((0, 12), (12, 13), (13, 20), *((n, n + 1) for n in range(20, 30))):
        cache, logits = cache_after(
            model, ids[:, first:last], attention_mask=mask[:, :last], position_ids=places[:, first:last],
            past_key_values=cache,
        )  # fmt: skip
    torch.testing.assert_close(logits[:1], model(ids[:1, padding:]).logits[:, -1:], **EXACT)
    torch.testing.assert_close(logits[1:], model(ids[1:]).logits[:, -1:], **EXACT)
    assert (cache.layers[0].positions[0] >= padding).all()


def test_a_cache_without_dropped_keys_can_be_rolled_back():
    ids = torch.randint(VOCAB_SIZE, (1, 5))
    model = model_of()
    cache, _ = cache_after(model, ids)
    cache.crop(-2)
    _, logits = cache_after(model, ids[:, 3:], past_key_values=cache)
    torch.testing.assert_close(logits, model(ids).logits[:, 3:], **EXACT)
    cache, _ = cache_after(model, ids.repeat(1, 3))
    with pytest.raises(
        ValueError, match="has dropped keys and cannot be rolled back; build the layers with keep_all"
    ):
        cache.crop(-1)
    with pytest.raises(ValueError, match="only dynamic mask attention fills it"):
        cache.layers[0].update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))


def test_a_cache_can_be_emptied_repeated_and_selected():
    model = model_of()
    ids = torch.randint(VOCAB_SIZE, (2, 12))
    cache, _ = cache_after(model, ids)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    token = torch.randint(VOCAB_SIZE, (2, 1))
    _, logits = cache_after(model, token, past_key_values=cache)
    expected = model(torch.cat([ids.flip(0), token], dim=1)).logits[:, -1:]
    torch.testing.assert_close(logits, expected, **EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0
    _, logits = cache_after(model, ids, past_key_values=cache)
    torch.testing.assert_close(logits, model(ids).logits, **EXACT)


def test_documents_packed_into_one_row_do_not_see_each_other():
    model = model_of()
    ids = torch.randint(VOCAB_SIZE, (1, 24))
    places = torch.cat([torch.arange(10), torch.arange(14)])[None]
    mask = (torch.arange(24) >= 10).int()
    mask = (mask[:, None] == mask[None]) & torch.ones(24, 24).tril().bool()
    packed = model(ids, attention_mask=mask[None, None], position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed[:, 10:], model(ids[:, 10:]).logits, **EXACT)
    torch.testing.assert_close(packed[:, :10], model(ids[:, :10]).logits, **EXACT)


@pytest.mark.gpu
def test_padding_is_told_from_other_masks():
    causal = torch.ones(1, 1, 9, 9, device="cuda").tril().bool()
    hidden = torch.zeros(2, 1, 9, dtype=torch.bool, device="cuda")
    hidden[0, :, :3] = True
    assert torch.equal(only_padding(causal & ~hidden[:, :, None]), hidden)
    assert only_padding(causal & (torch.arange(9, device="cuda") != 4)[:, None]) is None
    packed = causal.clone()
    packed[..., 5:, :5] = False
    assert only_padding(packed) is None
    assert only_padding(packed.cpu()) is None


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("keep", [7, 64])
def test_a_trained_model_keeps_its_function_within_the_window(base, keep):
    from undivided.convert import convert_dma

    source = tiny_model(base, dtype=torch.float64)
    model, report = convert_dma(source, keep_window_size=keep)
    ids = torch.randint(VOCAB_SIZE, (2, 20))
    expected, found = source(ids).logits, model(ids).logits
    torch.testing.assert_close(found[:, :keep], expected[:, :keep], rtol=1e-6, atol=1e-6)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6) == (keep >= 20)
    layer, native = model.attention_layers()[1], source.get_decoder().layers[1].self_attn
    assert layer.q_proj.weight is native.q_proj.weight
    assert not layer.A.any() and layer.dt_proj.weight.any()
    assert model.config.attention[0] == {"mechanism": "dma", "keep_window_size": keep, "score_form": "exp"}
    assert (report.method, report.cache_bytes_per_token_per_rank) == ("dma", 2 * (2 * 16 * 8 + 12 * 2))
    again, _ = convert_dma(source, keep_window_size=keep)
    assert torch.equal(again.attention_layers()[1].dt_proj.weight, layer.dt_proj.weight)


BAD = {
    "no window": ({"keep_window_size": 0}, ValueError, "keep_window_size=0 must be at least 1: a query keeps a key."),
    "no integer": ({"keep_window_size": 8.0}, TypeError, "keep_window_size=8.0 must be an integer."),
    "a variant": ({"variant": "doge"}, ValueError, "variant='doge' is not one of 'paper', 'released'."),
    "a form": ({"score_form": "softplus"}, ValueError, "score_form='softplus' is not one of 'exp', 'linear'."),
    "a cap": ({"softcap": 30.0}, ValueError, "softcap=30.0: dynamic mask attention does not cap its logits"),
    "heads": ({"num_key_value_heads": 3}, ValueError, "num_key_value_heads=3 does not divide num_attention_heads=4"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_bad_options_are_named(change, error, text):
    options = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8} | change
    with pytest.raises(error, match=text):
        DynamicMaskAttention(**options)


def test_weights_of_doge_need_its_norms_and_its_shapes():
    layer = DynamicMaskAttention(WIDTH, HEADS, KEY_HEADS, DIM)
    with pytest.raises(
        ValueError, match="Doge normalises queries and keys; build the layer with qk_norm=True."
    ):
        layer.load_official({})
    layer = DynamicMaskAttention(WIDTH, HEADS, KEY_HEADS, DIM, qk_norm=True)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["dt_proj.weight"] = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match="size mismatch for dt_proj.weight"):
        layer.load_official(state)
