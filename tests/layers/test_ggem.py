"""Group generalised mean pooling: the mean it is, its precision and gradients, and its place in timm's models."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from undivided.layers.ggem import GGeMPool, ggem, replace_pool
from undivided.testing import assert_as_accurate, compare_op, poison_padding, poison_surroundings

B, N, C = 2, 13, 12
DISTINCT = torch.tensor([0.5, 1.0, 3.0, 8.0])


def tokens(*shape, dtype=torch.float32):
    """Positive, as far from zero as the definition needs."""
    return (torch.rand(shape or (B, N, C), dtype=torch.float64) + 0.1).to(dtype)


def direct(x, exponent, *, group_order="contiguous", eps=1e-6):
    """The definition, term by term."""
    groups, channels = exponent.numel(), x.shape[2]
    of = [c // (channels // groups) if group_order == "contiguous" else c % groups for c in range(channels)]
    power = torch.stack([exponent[group] for group in of]).to(x.dtype)
    return x.clamp(min=eps).pow(power).mean(1).pow(1 / power)


# -- which mean it is


def test_is_the_mean_at_exponent_one():
    x = tokens(dtype=torch.float64)
    torch.testing.assert_close(ggem(x, torch.ones(4)), x.mean(1), rtol=1e-12, atol=0)


def test_tends_to_the_maximum():
    x = tokens(2, 196, C, dtype=torch.float64)
    ratio = ggem(x, torch.full((1,), 200.0)) / x.amax(1)
    assert ratio.min() >= 196 ** (-1 / 200) and ratio.max() <= 1


def test_tends_to_the_geometric_mean():
    x = tokens(dtype=torch.float64)
    found = ggem(x, torch.tensor([1e-7], dtype=torch.float64))
    torch.testing.assert_close(found, x.log().mean(1).exp(), rtol=1e-6, atol=0)


def test_one_group_is_gem():
    x = tokens(dtype=torch.float64)
    norm = torch.linalg.vector_norm(x, ord=3, dim=1) / N ** (1 / 3)
    torch.testing.assert_close(GGeMPool.gem(C)(x), norm, rtol=1e-12, atol=0)


def test_equal_exponents_are_gem_whatever_the_groups():
    x = tokens(dtype=torch.float64)
    for groups in (2, 4, C):
        assert torch.equal(ggem(x, torch.full((groups,), 3.0)), ggem(x, torch.tensor([3.0])))


@pytest.mark.parametrize("group_order", ["contiguous", "strided"])
def test_each_channel_has_the_exponent_of_its_group(group_order):
    x = tokens(dtype=torch.float64)
    found = ggem(x, DISTINCT, group_order=group_order)
    torch.testing.assert_close(found, direct(x, DISTINCT, group_order=group_order), rtol=1e-12, atol=0)


def test_group_orders_are_one_another_with_channels_permuted():
    x = tokens(dtype=torch.float64)
    # Channel c of the strided order stands where the contiguous one has group c % G.
    order = torch.arange(C).reshape(C // 4, 4).T.flatten()
    strided = ggem(x, DISTINCT, group_order="strided")
    assert torch.equal(ggem(x[:, :, order], DISTINCT), strided[:, order])
    assert not torch.allclose(ggem(x, DISTINCT), strided)


def test_order_of_tokens_does_not_matter():
    x = tokens(dtype=torch.float64)
    torch.testing.assert_close(ggem(x[:, torch.randperm(N)], DISTINCT), ggem(x, DISTINCT), rtol=1e-12, atol=0)


def test_grows_with_the_exponent_between_minimum_and_maximum():
    x = tokens(dtype=torch.float64)
    means = [ggem(x, torch.tensor([p])) for p in (0.05, 0.5, 1.0, 3.0, 50.0)]
    bounds = [x.amin(1), *means, x.amax(1)]
    assert all((low <= high).all() for low, high in zip(bounds, bounds[1:], strict=False))


def test_is_homogeneous():
    x = tokens(dtype=torch.float64)
    torch.testing.assert_close(ggem(7.5 * x, DISTINCT), 7.5 * ggem(x, DISTINCT), rtol=1e-12, atol=0)


def test_images_do_not_see_each_other():
    x = tokens()
    assert torch.equal(ggem(x, DISTINCT)[1:], ggem(x[1:], DISTINCT))


def test_one_token_is_itself():
    x = tokens(B, 1, C)
    torch.testing.assert_close(ggem(x, DISTINCT), x[:, 0], rtol=0, atol=0)


# -- precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group_order", ["contiguous", "strided"])
def test_values_and_gradients_are_as_exact_as_the_formula(dtype, group_order):
    def fast(x, exponent):
        return ggem(x, exponent, group_order=group_order)

    def formula(x, exponent):
        # Everything in float32, and rounded once: the least that the type of x allows.
        inner = torch.promote_types(x.dtype, torch.float32)
        return direct(x.to(inner), exponent.to(inner), group_order=group_order).to(x.dtype)

    compare_op(fast, formula, formula, {"x": tokens(3, 50, C), "exponent": DISTINCT}, dtype)


@pytest.mark.parametrize("power", [0.5, 1.0, 3.0, 10.0, 50.0])
def test_bfloat16_stays_within_a_hundredth(power):
    x = tokens(2, 196, C, dtype=torch.bfloat16)
    exponent = torch.tensor([power])
    want = direct(x.double(), exponent.double())
    assert ((ggem(x, exponent).double() - want) / want).abs().max() < 0.01


@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_finite_where_the_plain_formula_is_not(dtype, size):
    x = (size * tokens(2, 196, C)).to(dtype)
    exponent = torch.tensor([50.0])
    found, plain = ggem(x, exponent), direct(x, exponent.to(dtype))
    assert found.isfinite().all() and (found > 0).all()
    if size != 1.0:
        assert plain.isinf().any() or (plain == 0).any()


def test_autocast_changes_nothing():
    pool, x = GGeMPool(C, 4), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        inside = pool(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, pool(x))


def test_a_channel_below_eps_gives_eps_and_no_gradient():
    x = tokens()
    x[:, :, 5] = -x[:, :, 5]
    x.requires_grad_()
    pool = GGeMPool(C, 4)
    out = pool(x)
    out.sum().backward()
    assert (out[:, 5] == torch.tensor(1e-6)).all()
    assert not x.grad[:, :, 5].any() and x.grad[:, :, :5].all()
    assert pool.exponent.grad.isfinite().all()


def test_gradients_are_those_of_the_definition_twice():
    x = tokens(2, 5, 4, dtype=torch.float64).requires_grad_()
    exponent = torch.tensor([0.7, 3.2], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True, True, True], [True, True, False, False, True]])
    assert torch.autograd.gradcheck(ggem, (x, exponent))
    assert torch.autograd.gradgradcheck(ggem, (x, exponent))
    assert torch.autograd.gradcheck(lambda x, p: ggem(x, p, group_order="strided", mask=mask), (x, exponent))


def test_gradient_of_the_exponent_is_the_closed_form():
    x, p = tokens(1, N, 1, dtype=torch.float64), torch.tensor([3.3], dtype=torch.float64, requires_grad=True)
    f = ggem(x, p)
    f.backward()
    powers = x[0, :, 0] ** p
    want = f * ((powers * x[0, :, 0].log()).sum() / (p * powers.sum()) - powers.mean().log() / p**2)
    torch.testing.assert_close(p.grad, want[0].detach(), rtol=1e-10, atol=0)


# -- masks


def test_masked_tokens_are_never_read():
    x = tokens(dtype=torch.float64)
    lengths = torch.tensor([N, 4])
    mask = torch.arange(N) < lengths[:, None]
    poisoned = poison_padding(x, mask[:, :, None]).requires_grad_()
    found = ggem(poisoned, DISTINCT, mask=mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(
            found[row], ggem(x[row : row + 1, :length], DISTINCT)[0], rtol=1e-12, atol=0
        )
    found.sum().backward()
    assert not poisoned.grad[~mask].any() and poisoned.grad[mask].all()


def test_a_row_without_tokens_gives_eps():
    x = tokens().requires_grad_()
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1] = False
    out = ggem(x, DISTINCT, mask=mask)
    out.sum().backward()
    assert (out[1] == torch.tensor(1e-6)).all()
    assert x.grad.isfinite().all() and not x.grad[1].any()


# -- cost


class Traffic(TorchDispatchMode):
    """Bytes of the large tensors that operators read and write."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.bytes = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if "detach" not in str(func):
            large = [t for t in (*args, out) if isinstance(t, torch.Tensor) and t.numel() == self.elements]
            self.bytes += sum(t.numel() * t.element_size() for t in large)
        return out


@pytest.mark.parametrize(("dtype", "moved"), [(torch.float32, 32), (torch.bfloat16, 38)], ids=str)
def test_bytes_are_those_of_the_docstring(dtype, moved):
    x = tokens(2, 64, 64, dtype=dtype)
    with Traffic(x.numel()) as traffic:
        ggem(x, DISTINCT)
    assert traffic.bytes == moved * x.numel()
    assert f"{moved} " in ggem.__doc__


def test_compiles_into_one_graph():
    pool = GGeMPool(C, 4, num_prefix_tokens=1)
    x = tokens()
    assert torch.equal(torch.compile(pool, backend="eager", fullgraph=True)(x), pool(x))


# -- the module


def test_prefix_tokens_are_not_pooled():
    x = tokens()
    pool = GGeMPool(C, 4, num_prefix_tokens=3)
    mask = torch.arange(N).expand(B, N) < 9
    assert torch.equal(pool(x), GGeMPool(C, 4)(x[:, 3:]))
    torch.testing.assert_close(pool(x, mask), GGeMPool(C, 4)(x[:, 3:9]))


def test_maps_are_pooled_like_their_tokens_in_any_memory_format():
    x = tokens(B, 3, 5, C).permute(0, 3, 1, 2)
    pool = GGeMPool(C, 4, num_prefix_tokens=1)
    want = GGeMPool(C, 4)(x.flatten(2).transpose(1, 2))
    for one in (x, x.contiguous(), poison_surroundings(x)):
        torch.testing.assert_close(pool(one), want)
    torch.testing.assert_close(GGeMPool(C, 4, keepdim=True)(x), want[:, :, None, None])


def test_exponents_stop_at_their_floor():
    pool = GGeMPool(C, 4, min_exponent=0.5)
    with torch.no_grad():
        pool.exponent.copy_(torch.tensor([-2.0, 0.0, 0.5, 3.0]))
    x = tokens()
    assert pool.floored == 2
    assert torch.equal(pool(x), ggem(x, torch.tensor([0.5, 0.5, 0.5, 3.0])))
    pool(x).sum().backward()
    assert pool.exponent.grad[:2].tolist() == [0, 0] and pool.exponent.grad[3] != 0


def test_dead_fraction_counts_entries_that_have_no_gradient():
    x = torch.randn(4, 50, C)
    pool = GGeMPool(C, 4, num_prefix_tokens=1)
    x.requires_grad_()
    pool(x).sum().backward()
    assert pool.dead_fraction(x) == pytest.approx((x.grad[:, 1:] == 0).float().mean().item())
    assert 0.4 < pool.dead_fraction(x) < 0.6


def test_fixed_exponents_are_saved_but_not_trained(tmp_path):
    from safetensors.torch import load_model, save_model

    pool, other = GGeMPool(C, 4, DISTINCT.tolist(), learnable=False), GGeMPool(C, 4, learnable=False)
    assert not list(pool.parameters())
    save_model(pool, str(tmp_path / "pool.safetensors"))
    load_model(other, str(tmp_path / "pool.safetensors"))
    assert other.exponent.tolist() == DISTINCT.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GGeMPool(10, 4), "num_groups=4 does not divide dim=10."),
        (lambda: GGeMPool(C, 4, [3.0, 3.0]), "exponent has 2 entries, but num_groups is 4."),
        (lambda: GGeMPool(C, 4, 0.0), "exponent has 0.0; it must be min_exponent=0.05 or more."),
        (lambda: GGeMPool(C, 4, min_exponent=0.0), "min_exponent=0.0 must be positive."),
        (lambda: GGeMPool(C, 4, eps=0.0), "eps=0.0 must be positive."),
        (lambda: GGeMPool(C, 4, num_prefix_tokens=-1), "num_prefix_tokens=-1 must be 0 or more."),
        (
            lambda: GGeMPool(C, 4, group_order="rows"),
            "group_order='rows' is not one of 'contiguous', 'strided'.",
        ),
        (
            lambda: GGeMPool(C, 4, num_prefix_tokens=2)(tokens(B, 2, C)),
            "x has 2 tokens, of which num_prefix_tokens=2 are no patches; nothing is left to pool.",
        ),
        (lambda: GGeMPool(C, 4)(tokens(B, N, 8)), "x has 8 channels, but dim=12."),
        (
            lambda: GGeMPool(C, 4)(tokens(B, C)),
            "x has shape [2, 12]; it must be tokens [batch, tokens, 12] or a map [batch, 12, height, width].",
        ),
        (lambda: ggem(tokens(B, C), DISTINCT), "x has shape [2, 12]; it needs 3 axes, [batch, tokens, channels]."),
        (lambda: ggem(tokens(B, 0, C), DISTINCT), "x has no tokens; a mean needs one at least."),
        (
            lambda: ggem(tokens(), torch.ones(5)),
            "exponent has shape [5]; it must be [groups] with groups that divide the 12 channels of x.",
        ),
        (lambda: ggem(tokens(), DISTINCT, eps=-1.0), "eps=-1.0 must be positive."),
        (
            lambda: ggem(tokens(), DISTINCT, mask=torch.ones(B, 3, dtype=torch.bool)),
            "mask has shape [2, 3]; it must be [2, 13], as x has it.",
        ),
    ],
)  # fmt: skip
def test_refuses(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_refuses_types():
    with pytest.raises(TypeError, match="x is of torch.int64; it must be of a floating type."):
        ggem(torch.ones(B, N, C, dtype=torch.int64), DISTINCT)
    with pytest.raises(TypeError, match="mask is of torch.float32; it must be boolean"):
        ggem(tokens(), DISTINCT, mask=torch.ones(B, N))


# -- in timm's models (written for timm 1.0.29 to 1.0.31: VisionTransformer.pool calls attn_pool; global_pool modules)

timm = pytest.importorskip("timm")
SMALL = dict(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=4, num_classes=5)


def vit(name="vit_tiny_patch16_224", **options):
    return timm.create_model(name, **{**SMALL, **options}).eval()


def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("start", ["token", "avg"])
@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_a_vision_transformer_pools_its_patches_by_it(norm, start, reg_tokens):
    model = vit(global_pool=start, reg_tokens=reg_tokens)
    blocks, last = [], model.norm if start == "token" else model.fc_norm
    model.blocks.register_forward_hook(lambda module, inputs, output: blocks.append(output))
    pool = replace_pool(model, norm=norm)
    with torch.no_grad():
        pool.exponent.copy_(DISTINCT)
        found = model(images())
        patches = blocks[0][:, 1 + reg_tokens :]
        assert patches.shape[1] == 16
        if norm == "post":
            want = model.head(last(ggem(patches, DISTINCT)))
        else:
            want = model.head(ggem(last(patches), DISTINCT))
    torch.testing.assert_close(found, want)


def test_groups_are_the_heads_unless_given():
    assert replace_pool(vit()).num_groups == 4
    assert replace_pool(vit(global_pool="map")).num_groups == 4
    assert replace_pool(vit(), num_groups=24).num_groups == 24


def test_it_is_part_of_the_model():
    model = vit(num_classes=3).train()
    pool = replace_pool(model)
    assert pool.training and pool is model.attn_pool
    model(images()).square().sum().backward()
    assert pool.exponent.grad.abs().min() > 0
    model.reset_classifier(7)
    assert model(images()).shape == (2, 7) and model.attn_pool is pool
    assert "attn_pool.exponent" in model.state_dict()
    model.reset_classifier(7, "avg")
    assert model(images()).shape == (2, 7) and model.attn_pool is None


def test_timm_does_not_decay_the_exponents():
    from timm.optim import param_groups_weight_decay

    model = vit()
    pool = replace_pool(model)
    undecayed, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert undecayed["weight_decay"] == 0.0
    assert any(parameter is pool.exponent for parameter in undecayed["params"])
    assert not any(parameter is pool.exponent for parameter in decayed["params"])
    assert {name for name, _ in pool.named_parameters()} == set(pool.undecayed)


def test_eva_which_hands_over_its_prefix_too():
    model = timm.create_model(
        "eva02_tiny_patch14_224", img_size=28, embed_dim=32, depth=2, num_heads=4, num_classes=5
    ).eval()
    pool = replace_pool(model)
    assert pool.num_prefix_tokens == model.num_prefix_tokens == 1
    x = torch.randn(1, 5, 32).abs()
    with torch.no_grad():
        assert torch.equal(model.pool(x), ggem(x[:, 1:], pool.exponent))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", dict(num_classes=5)),
        ("convnext_atto", dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 16), num_classes=5)),
    ],
)
def test_a_cnn_pools_its_last_map_by_it(name, options):
    model = timm.create_model(name, **options).eval()
    x = images()
    with torch.no_grad():
        last = model.forward_features(x)
        mean = model.forward_head(last, pre_logits=True)
        pool = replace_pool(model, num_groups=4, exponent=1.0)
        assert list(mean.shape) == [2, model.num_features]
        # At exponent 1, of what is above zero: the model's own pooling of it.
        found = model.forward_head(last.clamp(min=1e-3), pre_logits=True)
        own = timm.create_model(name, **options).eval()
        own.load_state_dict({k: v for k, v in model.state_dict().items() if "exponent" not in k})
        want = own.forward_head(last.clamp(min=1e-3), pre_logits=True)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    assert model(x).shape == (2, 5) and any(module is pool for module in model.modules())


def test_a_backbone_of_this_library_takes_it():
    import undivided.models.vision  # noqa: F401

    model = timm.create_model(
        "undivided_gcvit_tiny", img_size=64, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), num_classes=5
    ).eval()  # fmt: skip
    pool = replace_pool(model)
    assert pool.num_groups == 4
    assert "head.global_pool.exponent" in model.no_weight_decay()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = model.head.fc(ggem(model.forward_features(x).flatten(2).transpose(1, 2), pool.exponent))
    torch.testing.assert_close(model(x), want)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace_pool(vit(), norm="middle"), 'norm=\'middle\' must be "post" or "pre".'),
        (
            lambda: replace_pool(timm.create_model("resnet10t")),
            "num_groups is needed: ResNet has no attention whose heads could be counted.",
        ),
        (
            lambda: replace_pool(nn.Sequential(nn.Linear(2, 2)), 1),
            "Sequential has neither attn_pool nor a module global_pool to replace.",
        ),
        (
            lambda: replace_pool(timm.create_model("resnet10t", global_pool="catavgmax"), 4),
            "global_pool of ResNet makes [1024] of 512 channels; it must pool each to one number.",
        ),
        (
            lambda: replace_pool(
                timm.create_model("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1, 1, 1))
            ),
            "SwinTransformer pools maps [batch, height, width, channels]; only NCHW can.",
        ),
        (
            lambda: replace_pool(vit("deit_tiny_distilled_patch16_224")),
            "VisionTransformerDistilled reads other tokens than those of attn_pool; it has a head of its own.",
        ),
    ],
)
def test_refuses_models(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_float32_of_a_whole_model_is_as_exact_as_with_the_formula():
    model = vit()
    pool = replace_pool(model)
    x = torch.randn(2, 17, 24)
    with torch.no_grad():
        found = model.forward_head(x)
        patches = x[:, 1:]
        plain = model.head(model.fc_norm(direct(patches, pool.exponent)))
        exact = model.double().forward_head(x.double())
    assert_as_accurate(found, plain, exact)
