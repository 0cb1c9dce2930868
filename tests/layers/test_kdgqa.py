from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import tiny_config
from undivided.layers.head_maps import allocate_query_heads, head_counts
from undivided.layers.kdgqa import KDGQAttention, KeyDrivenGQA, key_norms
from undivided.layers.pgqa import PerturbedGQA
from undivided.layers.vision_gqa import VisionGQA
from undivided.spec import interpret

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS, GROUPS, TOKENS = 48, 12, 4, 11


def images(batch=3, spread=1.0):
    return spread * torch.randn(batch, TOKENS, WIDTH, dtype=torch.float64)


def layer_of(layer_class=KeyDrivenGQA, heads=HEADS, groups=GROUPS, **options):
    """A layer in float64 whose key heads differ in size."""
    layer = layer_class(WIDTH, heads, groups, **{"qkv_bias": True, **options}).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
        if layer.k_proj.out_features == groups * WIDTH // heads:
            scale = 0.5 + torch.rand(groups).repeat_interleave(WIDTH // heads)
            layer.k_proj.weight.mul_(scale[:, None])
    return layer


def by_groups(layer, x, counts):
    """The heads of a layer as runs of the given sizes, one attention a group."""
    query, key, value = layer.heads(x)
    outs = [
        F.softmax(layer.scale * part @ key[:, [g]].transpose(-2, -1), -1) @ value[:, [g]]
        for g, part in enumerate(query.split(counts, dim=1))
    ]
    return layer.proj(torch.cat(outs, 1).transpose(1, 2).flatten(2))


def test_each_image_is_split_by_the_norms_of_its_own_keys():
    layer, x = layer_of(), images()
    out = layer(x)
    allocations = layer.allocation(x)
    assert len({tuple(row) for row in allocations.tolist()}) > 1
    for index, counts in enumerate(allocations.tolist()):
        one = x[index : index + 1]
        norms = layer.heads(one)[1].square().sum((2, 3)).sqrt()[0]
        assert counts == head_counts(allocate_query_heads(norms, HEADS), GROUPS).tolist()
        torch.testing.assert_close(out[index : index + 1], by_groups(layer, one, counts), **EXACT)


def test_a_group_without_query_heads_is_not_read():
    layer, x = layer_of(), images(1)
    counts = layer.allocation(x)[0].tolist()
    out = layer(x)
    assert 0 in counts
    left_out = counts.index(0)
    width = WIDTH // HEADS
    with torch.no_grad():
        layer.v_proj.weight[left_out * width : (left_out + 1) * width] = 1e3
    torch.testing.assert_close(layer(x), out, **EXACT)


@pytest.mark.parametrize("rule", ["uniform", "kd", "dgqa_diff", "dgqa_ema"])
@pytest.mark.parametrize("training", [False, True])
def test_an_image_is_the_same_alone_and_in_a_batch(rule, training):
    layer = layer_of(rule=rule).train(training and not rule.startswith("dgqa"))
    x = images()
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]), **EXACT)


def test_the_release_sums_norms_over_the_batch():
    layer, x = layer_of(variant="released"), images()
    norms = key_norms(layer.heads(x)[1]).sum(0)
    counts = head_counts(allocate_query_heads(norms, HEADS), GROUPS).tolist()
    torch.testing.assert_close(layer(x), by_groups(layer, x, counts), **EXACT)
    # Made louder, the second image decides for the first.
    other = torch.cat([x[:1], 50 * torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)])
    assert not torch.allclose(layer(other)[:1], layer(x[:1]))


def test_uniform_is_grouped_query_attention_and_with_all_heads_multi_head_attention():
    x = images()
    for groups in (GROUPS, HEADS):
        layer = layer_of(groups=groups, rule="uniform")
        expected = by_groups(layer, x, [HEADS // groups] * groups)
        torch.testing.assert_close(layer(x), expected, **EXACT)
        plain = layer_of(VisionGQA, groups=groups)
        plain.load_state_dict(layer.state_dict(), strict=False)
        assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("rule", ["uniform", "kd", "dgqa_diff"])
def test_key_heads_need_not_divide_query_heads(rule):
    layer, x = layer_of(groups=5, rule=rule), images()
    assert layer(x).shape == x.shape
    assert layer.allocation(x).sum(-1).unique().tolist() == [HEADS]


# --- DGQA ---


def script(layer, x, modes):
    """Runs a layer over batches in the modes given; returns allocation and cache after each."""
    states = []
    for mode, batch in zip(modes, x, strict=True):
        layer.train(mode == "train")
        layer(batch)
        states.append((layer.allocation().tolist(), layer.cache.clone()))
    return states


def norms_of(layer, x):
    return key_norms(layer.heads(x)[1])


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("rule", ["dgqa_diff", "dgqa_ema"])
def test_the_release_step_by_step(rule, window):
    layer = layer_of(rule=rule, window=window, variant="released", generator=torch.Generator().manual_seed(1))
    modes = ["train"] * 5 + ["eval"] * 2 + ["train"] * 3 + ["eval"]
    x = [images(spread=0.5 + index) for index in range(len(modes))]
    states = script(layer, x, modes)
    cache, counts, step = torch.zeros(GROUPS).double(), [HEADS // GROUPS] * GROUPS, 0
    generator = torch.Generator().manual_seed(1)
    for mode, batch, (found, found_cache) in zip(modes, x, states, strict=True):
        s = norms_of(layer, batch).sum(0)
        allocated = allocate_query_heads(s, HEADS, rule, cache=cache, random_repair=True, generator=generator)
        if mode == "eval":
            cache, counts = s, head_counts(allocated, GROUPS).tolist()
        else:
            if step % window == 0:
                cache, counts = (cache + s) / window, head_counts(allocated, GROUPS).tolist()
            step += 1
        assert found == counts
        torch.testing.assert_close(found_cache, cache)


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("rule", ["dgqa_diff", "dgqa_ema"])
def test_by_default_evaluation_changes_nothing_and_the_cache_is_that_of_the_last_allocation(rule, window):
    layer = layer_of(rule=rule, window=window)
    modes = ["train", "eval", "train", "train", "train", "eval"]
    x = [images(spread=0.5 + index) for index in range(len(modes))]
    states = script(layer, x, modes)
    cache, counts, step = torch.zeros(GROUPS).double(), [HEADS // GROUPS] * GROUPS, 0
    for mode, batch, (found, found_cache) in zip(modes, x, states, strict=True):
        if mode == "train":
            if step % window == 0:
                s = norms_of(layer, batch).mean(0)
                counts = head_counts(allocate_query_heads(s, HEADS, rule, cache=cache), GROUPS).tolist()
                cache = s if rule == "dgqa_diff" else 0.9 * s + 0.1 * cache
            step += 1
        assert found == counts
        torch.testing.assert_close(found_cache, cache)


def test_in_training_the_forward_uses_the_map_it_has_just_made():
    layer, x = layer_of(rule="dgqa_ema").train(), images()
    assert layer.allocation().tolist() == [3] * 4
    out = layer(x)
    counts = layer.allocation().tolist()
    assert counts != [3] * 4
    torch.testing.assert_close(out, by_groups(layer, x, counts), **EXACT)


def test_two_forwards_before_one_backward_keep_their_maps():
    layer, x = layer_of(rule="dgqa_diff").train(), images()
    first, second = layer(x), layer(3 * images())
    (first.square().sum() + second.square().sum()).backward()
    assert layer.k_proj.weight.grad.isfinite().all()


def test_a_saved_layer_goes_on_where_it_was():
    layer = layer_of(rule="dgqa_diff", window=2)
    script(layer, [images() for _ in range(3)], ["train"] * 3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = layer_of(rule="dgqa_diff", window=2)
    other.load_state_dict(torch.load(file))
    x = [images() for _ in range(4)]
    modes = ["train", "eval", "train", "train"]
    for one, two in zip(script(layer, x, modes), script(other, x, modes), strict=True):
        assert one[0] == two[0] and torch.equal(one[1], two[1])
    assert set(layer.state_dict()) >= {"head_map", "cache", "steps"}


# --- frozen ---


@pytest.mark.parametrize("rule", ["kd", "dgqa_diff", "dgqa_ema"])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_frozen_it_is_a_static_map_in_any_mode_and_batch(rule, variant):
    layer, x = layer_of(rule=rule, variant=variant), images(5)
    layer.freeze(x)
    counts = layer.allocation().tolist()
    norms = norms_of(layer, x).mean(0)
    if variant == "paper":
        allocated = allocate_query_heads(norms, HEADS, rule, cache=torch.zeros(GROUPS))
        assert counts == head_counts(allocated, GROUPS).tolist()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for training in (True, False):
        layer.train(training)
        torch.testing.assert_close(layer(9 * x)[:1], by_groups(layer, 9 * x[:1], counts), **EXACT)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert "frozen=True" in repr(layer)


def test_freezing_without_data_keeps_the_trained_map():
    layer = layer_of(rule="dgqa_ema").train()
    layer(images())
    counts = layer.allocation().tolist()
    layer.freeze()
    layer(5 * images())
    assert layer.allocation().tolist() == counts


def test_a_frozen_layer_is_exported():
    layer, x = layer_of(), images()
    layer.freeze(x)
    program = torch.export.export(layer.eval(), (x,))
    torch.testing.assert_close(program.module()(x), layer(x), **EXACT)


# --- all layers ---

LAYERS = {
    "uniform": (KeyDrivenGQA, {"rule": "uniform"}),
    "kd": (KeyDrivenGQA, {"rule": "kd"}),
    "kd as released": (KeyDrivenGQA, {"rule": "kd", "variant": "released"}),
    "dgqa": (KeyDrivenGQA, {"rule": "dgqa_diff", "window": 2}),
    "perturbed": (PerturbedGQA, {}),
    "perturbed scores": (PerturbedGQA, {"target": "scores"}),
}
every_layer = pytest.mark.parametrize(("layer_class", "options"), LAYERS.values(), ids=LAYERS)


@every_layer
def test_takes_the_place_of_attention_in_timm(layer_class, options):
    from timm.models.vision_transformer import VisionTransformer

    attention = layer_class.with_options(num_key_value_heads=2, **options)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
    model = VisionTransformer(**sizes, attn_layer=attention)
    assert all(isinstance(block.attn, layer_class) for block in model.blocks)
    assert model.blocks[0].attn.k_proj.out_features == 8
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    normed = VisionTransformer(**sizes, attn_layer=attention, qk_norm=True)
    assert normed.eval()(torch.randn(2, 3, 8, 8)).isfinite().all()


@every_layer
def test_takes_tokens_with_their_size_and_a_mask(layer_class, options):
    layer, x = layer_of(layer_class, **options).eval(), images()
    generator = torch.Generator()
    if layer_class is PerturbedGQA:
        layer.generator = generator
    run = lambda *a, **o: (generator.manual_seed(0), layer(*a, **o))[1]  # noqa: E731
    assert torch.equal(run(x, size=(1, TOKENS)), run(x))
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(run(x, attn_mask=mask), run(x), **EXACT)
    mask[:, -1] = False
    assert not torch.allclose(run(x, attn_mask=mask), run(x))


@pytest.mark.parametrize(
    ("name", "training"), [("kd", False), ("dgqa", True), ("perturbed", True), ("perturbed scores", False)]
)
def test_compiles_into_one_graph(name, training):
    layer_class, options = LAYERS[name]
    layer, x = layer_of(layer_class, **options).train(training), images()
    eager, seed = copy.deepcopy(layer), 3
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        torch.manual_seed(seed)
        expected = eager(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(compiled(x), expected, **EXACT)


@pytest.mark.parametrize("name", ["uniform", "kd", "kd as released", "perturbed"])
@torch.no_grad()
def test_is_its_specification(name):
    layer_class, options = LAYERS[name]
    layer, x = layer_of(layer_class, **options).eval(), images()
    torch.manual_seed(5)
    inputs = layer.spec_inputs(x)
    assert set(inputs) >= set(layer.spec.inputs)
    out = layer.proj(interpret(layer.spec, inputs).out.transpose(1, 2).flatten(2))
    torch.manual_seed(5)
    torch.testing.assert_close(layer(x), out, rtol=1e-6, atol=1e-6)


def test_norms_of_half_precision_keys_do_not_overflow():
    key = torch.full((1, 2, 300, 64), 30.0, dtype=torch.float16)
    torch.testing.assert_close(key_norms(key), torch.full((1, 2), 30 * (300 * 64) ** 0.5))


# --- PGQA ---


def perturbed(**options):
    layer = layer_of(PerturbedGQA, generator=torch.Generator().manual_seed(2), **options)
    plain = layer_of(VisionGQA)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


def noise_of(layer, plain, x):
    """What was subtracted from the heads' outputs, `[B, H, N D]`."""
    heads = layer.heads(x)
    return (plain.attend(*heads, None) - layer.attend(*heads, None)).flatten(2)


def test_the_noise_has_the_mean_and_deviation_of_the_output_it_is_taken_from():
    layer, plain = perturbed()
    x = images()
    noise, out = noise_of(layer, plain, x), plain.attend(*plain.heads(x), None).flatten(2)
    torch.testing.assert_close(noise.mean(-1), out.mean(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(noise.std(-1), out.std(-1), rtol=1e-5, atol=1e-6)


def test_images_of_a_batch_share_their_noise_up_to_its_scale_and_groups_do_not():
    layer, plain = perturbed()
    noise = noise_of(layer, plain, images())
    shape = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
    torch.testing.assert_close(shape[0], shape[2], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(shape[0, 0], shape[0, 3])


def test_the_noise_is_uniform_without_its_diagonal():
    layer, _ = perturbed()
    rows = layer.noise(2000, 4).flatten(1)
    assert rows.shape == (HEADS, 8000)
    # Standardised, a uniform number lies within the root of 3; (row - mean) / std of a zero is the lowest there is.
    assert float(rows.abs().max()) < 1.05 * 3**0.5
    group = HEADS // GROUPS
    for head in range(HEADS):
        assert rows[head].argmin() == head % group


def test_a_generator_repeats_the_noise_in_training_and_evaluation():
    layer, plain = perturbed()
    x = images()
    results = []
    for training in (False, True, False):
        layer.generator.manual_seed(7)
        results.append(layer.train(training)(x))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.allclose(layer(x), results[0])
    assert not torch.allclose(plain(x), results[0])


def test_noise_on_scores_is_as_large_as_the_scores_of_its_row():
    layer, plain = perturbed(target="scores")
    query, key, _ = layer.heads(images())
    bias = layer._noisy(query, key, None)
    scores = layer.scale * query @ key.repeat_interleave(HEADS // GROUPS, 1).transpose(-2, -1)
    torch.testing.assert_close(bias.std(-1), scores.std(-1), rtol=1e-5, atol=1e-6)
    ratio = bias / scores.std(-1, keepdim=True)
    torch.testing.assert_close(ratio[0], ratio[1], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match='target="scores" has no specification'):
        layer.spec  # noqa: B018


# --- errors ---


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KeyDrivenGQA(48, 12, 13), "num_key_value_heads=13 must be from 1 to num_heads=12"),
        (lambda: KeyDrivenGQA(50, 12, 4), "num_heads=12 does not divide dim=50; give attn_head_dim"),
        (lambda: KeyDrivenGQA(48, 12, 4, rule="largest"), "rule='largest' is not one of 'uniform', 'kd'"),
        (lambda: KeyDrivenGQA(48, 12, 4, variant="v2"), "variant='v2' is not one of 'paper', 'released'"),
        (lambda: KeyDrivenGQA(48, 12, 4, window=0), "window=0 must be at least 1 step"),
        (lambda: KeyDrivenGQA(48, 12, 4, beta=1.5), "beta=1.5 must be from 0 to 1"),
        (lambda: KeyDrivenGQA(48, 12, 4, attn_drop=0.1), "attn_drop=0.1 is not supported"),
        (lambda: KeyDrivenGQA(48, 12, 4, scale_norm=True), "scale_norm=True .* is not computed here"),
        (lambda: PerturbedGQA(48, 12, 4, target="keys"), "target='keys' is not one of 'output', 'scores'"),
        (lambda: PerturbedGQA(48, 12, 5), "num_key_value_heads=5 does not divide num_heads=12"),
        (lambda: layer_of()(images(), is_causal=True), "is_causal=True: KeyDrivenGQA reads all tokens"),
    ],
)
def test_what_does_not_fit_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- decoders ---


def decoder(**options):
    return KDGQAttention.from_config(tiny_config("llama"), 0, **options)


def test_a_decoder_reads_the_heads_of_its_map():
    layer = decoder(head_map=[1, 1, 0, 1]).double()
    query, key, value = (torch.randn(2, heads, 7, 8, dtype=torch.float64) for heads in (4, 2, 2))
    out = layer.attend(query, key, value, None)
    index = torch.tensor([1, 1, 0, 1])
    expected = F.scaled_dot_product_attention(query, key[:, index], value[:, index], is_causal=True)
    torch.testing.assert_close(out, expected, **EXACT)
    assert decoder().head_map.tolist() == [0, 0, 1, 1]


def test_a_decoder_refuses_to_choose_its_map_while_it_runs():
    with pytest.raises(
        ValueError, match="rule='kd' would choose the head map .* neither causal nor can be cached"
    ):
        decoder(rule="kd")
    message = r"head_map=\[0, 2, 1, 0\] must hold 4 numbers from 0 to 1"
    with pytest.raises(ValueError, match=message):
        decoder(head_map=[0, 2, 1, 0])
    with pytest.raises(ValueError, match=r"head_map=\[0\] must hold 4 numbers"):
        decoder(head_map=[0])
