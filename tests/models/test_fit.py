from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from undivided.layers.fit import chunk_causal_mask
from undivided.models.fit import FITAutoregressive, FITDenoiser, FITEncoder, FITState, attention_multiply_adds

SIZES = dict(
    num_tokens=12, num_groups=3, latents_per_group=2, dim=8, latent_dim=16, num_heads=2, latent_heads=4
)
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def lively(model, scale=0.3):
    """Draws all parameters at random, so that no branch is hidden by a zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def encoder(layers="(1)2(1)", **options):
    return lively(FITEncoder(layers, **{**SIZES, "in_dim": 5, **options}))


def autoregressive(layers="(1)1(1)1(1)", groups=3, **options):
    sizes = {**SIZES, "num_tokens": 4 * groups, "num_groups": groups}
    return lively(FITAutoregressive(11, layers, **{**sizes, **options}))


def denoiser(layers="(1)1(1)", **options):
    return FITDenoiser(layers, **{**SIZES, "in_dim": 5, **options})


def plain_attention(layer, x, source, mask=None):
    """Attention head by head, query by query."""
    q, k, v = layer.q(x), layer.k(source), layer.v(source)
    width = q.shape[-1] // layer.num_heads
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(layer.num_heads):
            part = slice(h * width, (h + 1) * width)
            for n in range(x.shape[1]):
                seen = range(source.shape[1]) if mask is None else mask[n].nonzero().flatten().tolist()
                logits = torch.stack([q[b, n, part] @ k[b, m, part] for m in seen]) / math.sqrt(width)
                out[b, n, part] = sum(w * v[b, m, part] for w, m in zip(logits.softmax(0), seen, strict=True))
    return layer.proj(out)


def plain_layer(layer, x, mask=None):
    y = layer.norm1(x)
    x = x + plain_attention(layer.attn, y, y, mask)
    return x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(x))))


def plain_cross(layer, x, source):
    return x + plain_attention(layer.attn, layer.norm(x), layer.source_norm(source))


def plain_encoder(model, x, mask=None):
    """The encoder as loops over groups and layers."""
    x = model.stem_norm(model.stem(x)) + model.position
    batch, groups = x.shape[:2]
    z = model.latent_position.expand(batch, -1, -1, -1)
    for block in model.blocks:
        parts = []
        for group in range(groups):
            part = x[:, group]
            for layer in block.local:
                part = plain_layer(layer, part)
            parts.append(part)
        x = torch.stack(parts, 1)
        if block.read is None:
            continue
        z = torch.stack([plain_cross(block.read, z[:, t], x[:, t]) for t in range(groups)], 1)
        flat = z.flatten(1, 2)
        for layer in block.global_layers:
            flat = plain_layer(layer, flat, mask)
        z = flat.view_as(z)
        if block.write is not None:
            x = torch.stack([plain_cross(block.write, x[:, t], z[:, t]) for t in range(groups)], 1)
    return model.norm(x), model.latent_norm(z)


@pytest.mark.parametrize("layers", ["(1)2(1)", "(1)1(1)1"])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_the_encoder_equals_loops_in_float64(layers, mask):
    model = encoder(layers, mask=mask).double()
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    want = plain_encoder(model, x, chunk_causal_mask(3, 2) if mask else None)
    torch.testing.assert_close(model(x), want, rtol=1e-10, atol=1e-10)


def test_one_group_is_a_loop_too():
    model = encoder("(1)1(1)", num_groups=1).double()
    x = torch.randn(1, 1, 12, 5, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain_encoder(model, x), rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_finite_differences():
    model = encoder(
        "(1)1(1)", num_tokens=4, num_groups=2, latents_per_group=1, dim=4, latent_dim=8, in_dim=3
    ).double()
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: model(y), x)


def test_without_reads_and_writes_groups_are_rows_of_a_batch():
    model = encoder()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.read, block.write):
                if layer is not None:
                    layer.attn.proj.weight.zero_()
                    layer.attn.proj.bias.zero_()
    alone = encoder(num_tokens=4, num_groups=1)
    alone.load_state_dict(
        model.state_dict() | {"latent_position": torch.zeros_like(alone.latent_position)}, strict=True
    )
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(model(x)[0], alone(x.view(6, 1, 4, 5))[0].view(2, 3, 4, 8), **CLOSE)


def test_groups_can_change_places_only_together_with_their_latents():
    model, x, order = encoder(), torch.randn(2, 3, 4, 5), [2, 0, 1]
    before = model(x)
    alone = model(x[:, order])
    assert not torch.allclose(alone[0], before[0][:, order], **CLOSE)
    with torch.no_grad():
        model.latent_position.copy_(model.latent_position[order].clone())
    for found, want in zip(model(x[:, order]), before, strict=True):
        torch.testing.assert_close(found, want[:, order], **CLOSE)


def test_further_tokens_stand_before_their_group():
    model = encoder(extra_dim=6)
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 1, 6)
    tokens, latents = model(x, y)
    assert tokens.shape == (2, 3, 5, 8) and latents.shape == (2, 3, 2, 16)
    assert not torch.allclose(tokens[:, :, 1:], model(x)[0], **CLOSE)
    with pytest.raises(ValueError, match="y is given, but extra_dim is None"):
        encoder()(x, y)


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_steps_with_caches_equal_the_whole_sequence(groups):
    model = autoregressive(groups=groups).eval()
    ids = torch.randint(11, (2, groups, 4))
    state, found = FITState(), []
    for token in ids.flatten(1).unbind(1):
        found.append(model.step(token, state))
    torch.testing.assert_close(torch.stack(found, 1).view(2, groups, 4, 11), model(ids), **CLOSE)
    with pytest.raises(ValueError, match=f"the sequence has {4 * groups} tokens, as many as the model takes"):
        model.step(ids[:, 0, 0], state)


def test_a_token_changes_no_logits_before_it():
    model = autoregressive().eval()
    ids = torch.randint(11, (1, 3, 4))
    before = model(ids).flatten(1, 2)
    for place in range(12):
        other = ids.clone().view(1, 12)
        other[0, place] = (other[0, place] + 1) % 11
        after = model(other.view(1, 3, 4)).flatten(1, 2)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.allclose(after[:, place], before[:, place], **CLOSE)
        if place == 0:
            assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-4


def test_without_the_shift_the_future_would_leak():
    """The test above can fail: tokens that read their own group's latents see what comes after them."""
    model = autoregressive().eval()
    ids = torch.randint(11, (1, 3, 4))
    other = ids.clone()
    other[0, 0, 3] = (other[0, 0, 3] + 1) % 11
    outputs = []
    for tokens in (ids, other):
        x, z = F.embedding(tokens, model.embedding) + model.position, model.latents(1)
        block = model.blocks[0]
        x = block.local[0](x[:, 0], is_causal=True)
        outputs.append(block.write(x, block.read(z[:, 0], x)))
    assert not torch.equal(outputs[0][:, 0], outputs[1][:, 0])


def test_the_first_group_reads_zeros():
    model = autoregressive("(0)1(0)").eval()
    ids = torch.randint(11, (1, 3, 4))
    x = (F.embedding(ids, model.embedding) + model.position)[:, 0]
    write = model.blocks[0].write
    # Zeros are normalised to the norm's bias: all rows are equal and so are the weights.
    row = write.attn.proj(write.attn.v(write.source_norm.bias))
    torch.testing.assert_close(model(ids)[:, 0], model.logits(x + row), **CLOSE)


def test_the_loss_is_that_of_the_sequence_one_place_later():
    model = autoregressive().eval()
    ids = torch.randint(11, (2, 3, 4))
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.int64), ids.flatten(1)[:, :-1]], 1).view_as(ids)
    want = -model(shifted).log_softmax(-1).gather(-1, ids[..., None]).mean()
    torch.testing.assert_close(model.loss(ids), want)


def test_generation_continues_a_prompt_as_the_whole_model_would():
    model = autoregressive().eval()
    prompt = torch.randint(11, (2, 5))
    found = model.generate(prompt=prompt, temperature=0).flatten(1)
    assert torch.equal(found[:, :5], prompt)
    shifted = torch.cat([torch.zeros(2, 1, dtype=torch.int64), found[:, :-1]], 1)
    assert torch.equal(model(shifted.view(2, 3, 4)).argmax(-1).flatten(1)[:, 5:], found[:, 5:])
    draw = lambda: model.generate(3, generator=torch.Generator().manual_seed(1))  # noqa: E731
    assert torch.equal(draw(), draw()) and draw().shape == (3, 3, 4)


def test_earlier_latents_do_nothing_at_first_and_something_later():
    model = denoiser().eval()
    x, time, z = torch.randn(2, 3, 4, 5), torch.rand(2), torch.randn(2, 3, 2, 16)
    assert torch.equal(model(x, time)[0], model(x, time, z_prev=z)[0])
    lively(model)
    assert not torch.allclose(model(x, time)[0], model(x, time, z_prev=z)[0])


def test_time_and_condition_reach_every_token():
    model = lively(denoiser(condition_dim=7)).eval()
    x, time, condition = torch.randn(1, 3, 4, 5), torch.rand(1), torch.randn(1, 2, 7)
    out = model(x, time, condition)[0]
    assert out.shape == x.shape
    for other in (model(x, 1 - time, condition)[0], model(x, time, -condition)[0]):
        assert ((other - out).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("options", [{"self_attention": False}, {"cross_mlp": True}, {"source_norm": False}])
def test_the_options_of_a_denoiser_change_what_it_computes(options):
    plain, other = denoiser(), denoiser(**options)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(plain) != count(other)
    loss = lively(other).loss(torch.randn(2, 3, 4, 5), generator=torch.Generator().manual_seed(0))
    loss.backward()
    assert [n for n, p in other.named_parameters() if p.grad is None] == []


def test_sampling_starts_from_noise_and_carries_latents():
    model = lively(denoiser(), 0.05).eval()
    noise = torch.randn(1, 3, 4, 5)
    assert model.sample(noise, 3).isfinite().all()
    seen = []
    model.blocks[0].read.register_forward_hook(lambda module, given, out: seen.append(given[0].clone()))
    model.sample(noise, 2)
    assert not torch.equal(seen[0], seen[1])
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        model.sample(noise, 0)


def test_recomputing_changes_no_gradient():
    model, x = encoder(), torch.randn(2, 3, 4, 5)

    def gradients(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(part.square().sum() for part in model(x)).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), **CLOSE)


def test_kept_activations_are_linear_in_the_number_of_tokens():
    def kept(tokens, groups):
        model = encoder(num_tokens=tokens, num_groups=groups)
        total = [0]

        def pack(tensor):
            total[0] += tensor.numel()
            return tensor

        weights = sum(p.numel() for p in model.parameters())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(1, groups, tokens // groups, 5))
        return total[0] - weights

    small, large = kept(64, 16), kept(128, 32)
    # The masks and maps of attention are not kept; what is left grows as the tokens do.
    assert 1.7 < large / small < 2.3


def test_multiply_adds_of_the_layers_are_counted():
    with torch.device("meta"):
        model = FITEncoder("(2)4(2)4(2)", 160_000, 400, 16, 256, 768, in_dim=16)
    found = dict(attention_multiply_adds(model))
    assert found["local"] == 6 * 2 * 160_000 * 400 * 256
    assert found["global"] == 8 * 2 * 6400**2 * 768
    assert found["cross"] == 4 * 2 * 160_000 * 16 * 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 5}, "num_groups=5 does not divide num_tokens=12"),
        ({"num_heads": 3}, "num_heads=3 does not divide dim=8"),
        ({"latent_heads": 5}, "latent_heads=5 does not divide latent_dim=16"),
        ({"dim": 12, "num_heads": 6, "latent_heads": 8}, None),
        ({"dim": 9, "num_heads": 9, "latent_heads": 4},
         r"min\(num_heads, latent_heads\)=4 does not divide min\(dim, latent_dim\)=9"),
        ({"mask": "diagonal"}, "mask='diagonal' must be \"causal\" or None"),
        ({"positions": "rotary"}, "positions='rotary' is not one of 'learned', 'sines', 'sines_2d'"),
        ({"num_tokens": 9, "positions": "sines_2d"}, '"sines_2d" needs a square group, but one has 3 tokens'),
        ({"latents_per_group": 0}, "latents_per_group=0 must be positive"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(options, message):
    if message is None:
        assert encoder(**options)
        return
    with pytest.raises(ValueError, match=message):
        encoder(**options)


def test_other_wrong_input_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \[2, 3, 5, 5\]; it needs 4 axes"):
        encoder()(torch.zeros(2, 3, 5, 5))
    with pytest.raises(
        ValueError, match=r'layers="\(1\)1" ends with global layers, which no token of an autoregr'
    ):
        autoregressive("(1)1")
    with pytest.raises(ValueError, match="condition is None, but the model was built with condition_dim"):
        denoiser(condition_dim=3)(torch.zeros(2, 3, 4, 5), torch.zeros(2))
    with pytest.raises(
        ValueError, match="z_prev is given, but the model was built with self_conditioning=False"
    ):
        denoiser(self_conditioning=False)(
            torch.zeros(1, 3, 4, 5), torch.zeros(1), z_prev=torch.zeros(1, 3, 2, 16)
        )
    with pytest.raises(ValueError, match="self_conditioned=2 must be from 0 to 1"):
        denoiser().loss(torch.zeros(1, 3, 4, 5), self_conditioned=2)
    with pytest.raises(ValueError, match="temperature=-1 must be 0 or more"):
        autoregressive().generate(temperature=-1)
    with pytest.raises(ValueError, match="prompt has 13 tokens, but a sequence has 12"):
        autoregressive().generate(prompt=torch.zeros(1, 13, dtype=torch.int64))
    with pytest.raises(ValueError, match="latent_dim=12 must be a multiple of 8"):
        denoiser(latent_dim=12)
