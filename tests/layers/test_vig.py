from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from undivided.layers._vision import to_map, to_tokens
from undivided.layers.vig import BidirectionalGatedLinearAttention
from undivided.ops import gated_scan

EXACT = {"rtol": 1e-10, "atol": 1e-11}
WIDTH, HEADS, SIZE = 12, 3, (3, 5)
every_activation = pytest.mark.parametrize("conv_act", [False, True])


def layer_of(**options):
    """A layer in float64 whose weights and decays are large."""
    layer = BidirectionalGatedLinearAttention(WIDTH, HEADS, **{"gate_normalizer": 2.0, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 1.0)
    return layer


def draw(size=SIZE, batch=2):
    return torch.randn(batch, size[0] * size[1], WIDTH, dtype=torch.float64)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def by_loops(layer, x, size):
    """Both scans token by token, everything else by its formula."""
    shifted = F.pad(to_map(x, size), (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
    local = torch.einsum("bchwij,cij->bhwc", shifted, layer.conv.weight[:, 0]).flatten(1, 2)
    if layer.conv_act:
        local = local * torch.sigmoid(local)
    key_dim = layer.qkv.weight.shape[0] // 2 - WIDTH // 2
    query, key, value = (local @ layer.qkv.weight.T).split([key_dim, key_dim, WIDTH], -1)
    decays = torch.sigmoid(local @ layer.decay_down.weight.T @ layer.decay_up.weight.T + layer.decay_up.bias)
    decays = decays ** (1 / layer.gate_normalizer)
    out = torch.zeros_like(x)
    for image in range(x.shape[0]):
        for head in range(HEADS):
            k_lanes = slice(head * key_dim // HEADS, (head + 1) * key_dim // HEADS)
            v_lanes = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            for direction, order in ((0, range(x.shape[1])), (1, reversed(range(x.shape[1])))):
                decay = decays[image, :, direction * key_dim : (direction + 1) * key_dim][:, k_lanes]
                state = torch.zeros(key_dim // HEADS, WIDTH // HEADS, dtype=x.dtype)
                for t in order:
                    state = decay[t, :, None] * state + torch.outer(
                        key[image, t, k_lanes], value[image, t, v_lanes]
                    )
                    out[image, t, v_lanes] += (
                        query[image, t, k_lanes] @ state / 2 * (key_dim // HEADS) ** -0.5
                    )
    gate = torch.sigmoid(local @ layer.gate.weight.T + layer.gate.bias)
    heads = lambda x: x.unflatten(-1, (HEADS, -1))  # noqa: E731
    scanned = rms(heads(out), layer.scan_norm.weight).flatten(2)
    mixed = gate * scanned + (1 - gate) * rms(heads(local), layer.local_norm.weight).flatten(2)
    if layer.out_act:
        mixed = mixed * torch.sigmoid(mixed)
    return mixed @ layer.proj.weight.T


@every_activation
@pytest.mark.parametrize("out_act", [False, True])
@pytest.mark.parametrize("expand_k", [0.5, 1.0])
def test_equals_the_loop_of_the_formula(conv_act, out_act, expand_k):
    layer, x = layer_of(conv_act=conv_act, out_act=out_act, expand_k=expand_k), draw()
    torch.testing.assert_close(layer(x, SIZE), by_loops(layer, x, SIZE), **EXACT)


def with_gate(layer, open_):
    """The layer with its gate for the scans wide open, or shut."""
    with torch.no_grad():
        layer.gate.weight.zero_()
        layer.gate.bias.fill_(100.0 if open_ else -100.0)
    return layer


@every_activation
def test_with_the_gate_shut_it_is_a_normalised_convolution(conv_act):
    layer, x = with_gate(layer_of(conv_act=conv_act), open_=False), draw()
    conv = layer.conv(to_map(x, SIZE))
    local = to_tokens(F.silu(conv) if conv_act else conv)[0].unflatten(-1, (HEADS, -1))
    want = layer.proj(rms(local, layer.local_norm.weight).flatten(2))
    torch.testing.assert_close(layer(x, SIZE), want, **EXACT)


def test_with_the_gate_open_it_is_gated_linear_attention():
    layer, x = with_gate(layer_of(), open_=True), draw()
    with torch.no_grad():
        layer.decay_up.weight.zero_()
        layer.decay_up.bias.fill_(100.0)
    # Nothing decays: all tokens count once, and the own one twice.
    query, key, value, *_ = layer.heads(layer.local(x, SIZE))
    scanned = query @ (key.transpose(-2, -1) @ value) + (query * key).sum(-1, keepdim=True) * value
    scanned = scanned * layer.scale / 2
    want = layer.proj(rms(scanned.transpose(1, 2), layer.scan_norm.weight).flatten(2))
    torch.testing.assert_close(layer(x, SIZE), want, **EXACT)


@every_activation
def test_turning_the_map_the_convolution_and_the_decays_turns_the_output(conv_act):
    layer, other = layer_of(conv_act=conv_act), layer_of(conv_act=conv_act)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        other.conv.weight.copy_(layer.conv.weight.flip(2, 3))
        for ours, theirs in zip(other.decay_up.parameters(), layer.decay_up.parameters(), strict=True):
            ours.copy_(theirs.roll(theirs.shape[0] // 2, 0))
    x = draw()
    torch.testing.assert_close(other(x.flip(1), SIZE).flip(1), layer(x, SIZE), **EXACT)


@pytest.mark.parametrize(("open_", "share"), [(True, 1.0), (False, 9 / 56)])
def test_scans_reach_the_whole_map_and_the_convolution_its_neighbours(open_, share):
    layer, size = with_gate(layer_of(), open_), (7, 8)
    x = draw(size, batch=1).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x, size)[0, 27].sum(), x)
    assert (gradient[0].abs().amax(-1) > 1e-20).double().mean().item() == pytest.approx(share)


def test_an_image_does_not_depend_on_its_batch_mates():
    layer, x = layer_of(), draw(batch=4)
    together = layer(x, SIZE)
    for index in range(4):
        torch.testing.assert_close(layer(x[index : index + 1], SIZE)[0], together[index], **EXACT)


def test_gradients_are_those_of_finite_differences():
    layer = layer_of(conv_act=True, out_act=True)
    assert torch.autograd.gradcheck(lambda x: layer(x, (2, 2)), draw((2, 2), batch=1).requires_grad_())


# -- variants


def test_training_and_evaluation_agree():
    layer, x = layer_of(), draw()
    assert torch.equal(layer.train()(x, SIZE), layer.eval()(x, SIZE))


def test_the_released_code_halves_the_scans_when_it_evaluates():
    paper, released, x = layer_of(), layer_of(variant="released"), draw()
    with torch.no_grad():
        # Small enough for the eps of the norm to be seen.
        paper.qkv.weight.mul_(0.05)
    released.load_state_dict(paper.state_dict())
    assert torch.equal(released.train()(x, SIZE), paper(x, SIZE))
    local = paper.local(x, SIZE)
    query, key, value, forward, reverse = paper.heads(local)
    scanned = gated_scan(query, key, value, forward, reverse_log_gate=reverse)
    torch.testing.assert_close(released.eval()(x, SIZE), paper.mix(local, scanned / 2), **EXACT)
    assert (released(x, SIZE) - paper(x, SIZE)).abs().max() > 1e-3
    released.scan_norm.eps = paper.scan_norm.eps = 0.0
    torch.testing.assert_close(released(x, SIZE), paper(x, SIZE), **EXACT)


# -- how it starts


def test_weights_start_as_the_authors_start_them():
    layer = BidirectionalGatedLinearAttention(96, 3)
    fan = {
        "qkv": 96 + 192,
        "decay_down": 96 + 16,
        "decay_up": 16 + 96,
        "gate": 192,
        "proj": 192,
        "conv": 9 + 9 * 96,
    }
    for name, total in fan.items():
        module = layer.get_submodule(name)
        bound = 2**-2.5 * math.sqrt(6 / total)
        assert module.weight.abs().max() <= bound and module.weight.abs().max() > 0.95 * bound, name
        assert module.bias is None or not module.bias.any(), name
    assert [name for name, module in layer.named_children() if getattr(module, "bias", None) is not None] == [
        "decay_up", "gate"
    ]  # fmt: skip


def test_decays_start_near_one_and_are_of_full_precision():
    layer = BidirectionalGatedLinearAttention(96, 3)
    with torch.autocast("cpu", torch.bfloat16):
        *_, forward, reverse = layer.heads(layer.local(torch.randn(2, 16, 96)))
    for gate in (forward, reverse):
        assert gate.dtype == torch.float32 and gate.shape == (2, 3, 16, 16)
        torch.testing.assert_close(gate, torch.full_like(gate, math.log(0.5) / 16), rtol=0.1, atol=0)
    assert not torch.equal(forward, reverse)


# -- in timm's blocks


def test_stands_in_the_place_of_timms_attention():
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    attention = BidirectionalGatedLinearAttention.with_options(conv_act=True)
    model = timm_vit.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=3, class_token=False,
        global_pool="avg", attn_layer=attention, qkv_bias=True,
    )  # fmt: skip
    assert isinstance(model.blocks[0].attn, BidirectionalGatedLinearAttention)
    assert model.blocks[0].attn.conv_act and model.blocks[0].attn.qkv.bias is not None
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3)


# -- refusals


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(num_heads=5), "num_heads=5 does not divide dim=12"),
        (dict(num_heads=4), "num_heads=4 does not divide the width 6 of keys, expand_k=0.5 of dim=12"),
        (dict(expand_k=0.01), "does not divide the width 0 of keys"),
        (dict(gate_normalizer=0), "gate_normalizer=0 must be positive"),
        (dict(variant="official"), "variant='official' must be one of 'paper', 'released'"),
        (
            dict(attn_drop=0.1),
            "attn_drop=0.1 is not computed by BidirectionalGatedLinearAttention; leave it off",
        ),
    ],
)
def test_options_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        BidirectionalGatedLinearAttention(WIDTH, **{"num_heads": 3, **options})


def test_tokens_that_are_no_map_are_named():
    layer = BidirectionalGatedLinearAttention(WIDTH, 3)
    with pytest.raises(ValueError, match=r"size=\(4, 4\) has 16 tokens, but x has 17; .*class token"):
        layer(torch.randn(1, 17, WIDTH), (4, 4))
    with pytest.raises(
        ValueError, match="is_causal=True was given, but BidirectionalGatedLinearAttention takes no"
    ):
        layer(torch.randn(1, 16, WIDTH), is_causal=True)
