"""RCMHA and its relatives: against each other, causality, distances, memory, streaming, and the authors' tables."""

from __future__ import annotations

import pytest
import torch

from undivided.layers.rcmha import VARIANTS, RelativeConvAttention
from undivided.models.transformer_xl import TransformerXL
from undivided.ops import relative_attention
from undivided.testing import compare_op

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def layer(variant="rcmha", **options):
    made = RelativeConvAttention(16, 4, variant=variant, max_distance=40, **options).double()
    for name, parameter in made.named_parameters():
        if "distance" in name or "content" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def same_weights(target, source):
    own = target.state_dict()
    target.load_state_dict({name: source.state_dict()[name] for name in own})
    return target


def run(module, x):
    return module(x)[0]


def still(module):
    """A convolution that changes nothing, and no distances, where there are any."""
    with torch.no_grad():
        for convolution in module.convolutions:
            convolution.weight.zero_()[:, -1] = 1
            convolution.bias.zero_()
    return module


def without_distances(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "distance" in name or "content" in name:
                parameter.zero_()
    return module


def test_parts_that_do_nothing_leave_the_simpler_form():
    x, full = torch.randn(2, 9, 16, dtype=torch.float64), layer()
    plain = still(full)
    torch.testing.assert_close(run(plain, x), run(same_weights(layer("rmha"), plain), x), **EXACT)
    bare = without_distances(layer())
    torch.testing.assert_close(run(bare, x), run(same_weights(layer("mdha"), bare), x), **EXACT)
    nothing = without_distances(still(layer()))
    simple = same_weights(layer("mha"), nothing)
    torch.testing.assert_close(run(nothing, x), run(simple, x), **EXACT)
    query, key, value = (
        p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (simple.q_proj, simple.k_proj, simple.v_proj)
    )
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(run(simple, x), simple.o_proj(out.transpose(1, 2).flatten(2)), **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
def test_later_tokens_change_nothing(variant):
    module, x = layer(variant), torch.randn(1, 9, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 6:] = torch.randn(1, 3, 16, dtype=torch.float64)
    torch.testing.assert_close(run(module, x)[:, :6], run(module, other)[:, :6], **EXACT)


def scores_of_distances(size, queries, keys, heads=2, width=4):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return {
        "query": draw(1, heads, queries, width), "key": draw(1, heads, keys, width),
        "value": draw(1, heads, keys, width), "content_bias": draw(heads, width),
        "distance_vectors": draw(size, heads, width), "distance_bias": draw(size, heads),
    }  # fmt: skip


@pytest.mark.parametrize(("queries", "before"), [(1, 0), (2, 3), (5, 0), (4, 9)])
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_scores_are_those_of_the_loops(queries, before, backend):
    x = scores_of_distances(20, queries, queries + before)
    expected = torch.zeros(1, 2, queries, 4, dtype=torch.float64)
    for h in range(2):
        for i in range(queries):
            place = before + i
            row = torch.stack([
                0.5 * ((x["query"][0, h, i] + x["content_bias"][h]) @ x["key"][0, h, j]
                       + x["query"][0, h, i] @ x["distance_vectors"][place - j, h] + x["distance_bias"][place - j, h])
                for j in range(place + 1)
            ])  # fmt: skip
            expected[0, h, i] = row.softmax(0) @ x["value"][0, h, : place + 1]
    torch.testing.assert_close(relative_attention(**x, backend=backend), expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_a_window_of_a_text_is_the_same_wherever_it_stands(backend):
    """Only distances count: with what surrounds it hidden, a window's outputs do not depend on its place."""
    window = scores_of_distances(20, 5, 5)
    alone = relative_attention(**window, backend=backend)
    for before, behind in ((1, 0), (4, 7), (11, 3)):
        size = before + 5 + behind
        x = scores_of_distances(20, size, size) | {name: window[name] for name in list(window)[3:]}
        seen = torch.zeros(size, size, dtype=torch.bool)
        seen[:, before : before + 5] = True
        for name in ("query", "key", "value"):
            x[name][:, :, before : before + 5] = window[name]
        found = relative_attention(**x, attn_mask=seen, backend=backend)
        torch.testing.assert_close(found[:, :, before : before + 5], alone, **EXACT)


def test_blocks_are_as_accurate_as_the_whole_and_have_its_gradients(monkeypatch):
    from undivided.ops.relative import blocked

    monkeypatch.setattr(blocked, "_BLOCK", 4)
    run_with = lambda backend: lambda **x: relative_attention(**x, backend=backend)  # noqa: E731
    for dtype in (torch.float32, torch.float16):
        compare_op(
            run_with("blocked"), run_with("reference"), run_with("reference"), scores_of_distances(30, 11, 14), dtype,
            factor=3.0,
        )  # fmt: skip


def test_masks_and_grouped_heads():
    x = scores_of_distances(30, 6, 9, heads=4)
    grouped = x | {name: x[name][:, :2] for name in ("key", "value")}
    copies = x | {name: x[name][:, :2].repeat_interleave(2, 1) for name in ("key", "value")}
    mask = torch.rand(1, 1, 6, 9) < 0.6
    mask[..., 2, :] = False
    for backend in ("reference", "blocked"):
        found = relative_attention(**grouped, attn_mask=mask, backend=backend)
        torch.testing.assert_close(found, relative_attention(**copies, attn_mask=mask), **EXACT)
        assert not found[:, :, 2].any()
        bias = torch.zeros(1, 1, 6, 9, dtype=torch.float64).masked_fill(~mask, float("-inf"))
        torch.testing.assert_close(
            relative_attention(**grouped, attn_mask=bias, backend=backend), found, **EXACT
        )


def test_segments_with_a_halo_are_one_pass_and_without_one_are_not():
    model = TransformerXL(
        11, hidden_size=16, num_heads=4, feedforward_size=8, num_layers=2, memory_length=32, max_distance=40
    )
    for name, parameter in model.named_parameters():
        if "distance" in name:
            torch.nn.init.normal_(parameter)
    model, ids = model.double(), torch.randint(11, (2, 13))
    whole = model(ids)[0]
    for halo in (True, False):
        for each in model.layers:
            each.halo = halo
        memory, parts = None, []
        for piece in ids.split([5, 1, 4, 3], dim=1):
            logits, memory = model(piece, memory)
            parts.append(logits)
        found = torch.cat(parts, dim=1)
        assert torch.allclose(found, whole, rtol=1e-10, atol=1e-10) == halo
        torch.testing.assert_close(found[:, :5], whole[:, :5])


def test_what_the_memory_has_forgotten_changes_nothing():
    model = TransformerXL(
        11, hidden_size=16, num_heads=4, feedforward_size=8, num_layers=1, memory_length=4, max_distance=40
    ).double()
    ids = torch.randint(11, (1, 6))
    _, memory = model(ids)
    assert [m.shape for m in memory] == [(1, 4, 16)] and not memory[0].requires_grad
    other = torch.cat([(ids[:, :2] + 1) % 11, ids[:, 2:]], dim=1)
    last = torch.randint(11, (1, 3))
    torch.testing.assert_close(model(last, model(other)[1])[0], model(last, memory)[0], **EXACT)


def test_parameters_are_counted():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    for heads in (4, 8):
        made = RelativeConvAttention(128, heads)
        width = 128 // heads
        assert count(made.convolutions) == 3 * (3 * width + width)
        # A row for distance 0 to 4096; the authors' have 8192, and the other half is never read.
        assert made.distance_vectors.numel() + made.distance_bias.numel() == 4097 * heads * (width + 1)


def test_tables_of_the_authors_are_read_by_distance():
    module = RelativeConvAttention(8, 2, max_distance=8)
    state = {
        "query.0.linear.weight": module.q_proj.weight, "key.0.linear.weight": module.k_proj.weight,
        "value.0.linear.weight": module.v_proj.weight, "value.0.linear.bias": module.v_proj.bias,
        "output.weight": module.o_proj.weight, "output.bias": module.o_proj.bias,
        "query_pos_bias": module.content_bias, "key_pos_embeddings": torch.randn(16, 2, 4),
        "key_pos_bias": torch.randn(16, 2),
    }  # fmt: skip
    for index, name in enumerate(("query", "key", "value")):
        state[f"{name}.1.conv.weight"] = module.convolutions[index].weight[:, None]
        state[f"{name}.1.conv.bias"] = module.convolutions[index].bias
    other = RelativeConvAttention(8, 2, max_distance=8)
    other.load_official(state)
    for distance in (0, 3, 8):
        assert torch.equal(other.distance_vectors[distance], state["key_pos_embeddings"][8 - distance])
        assert torch.equal(other.distance_bias[distance], state["key_pos_bias"][8 - distance])
    del state["output.bias"]
    with pytest.raises(ValueError, match=r"missing \['o_proj.bias'\]"):
        other.load_official(state)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: RelativeConvAttention(10, 4), "num_attention_heads=4 does not divide hidden_size=10"),
        (lambda: RelativeConvAttention(16, 4, 3), "num_key_value_heads=3 does not divide"),
        (
            lambda: RelativeConvAttention(16, 4, kernel_size=0),
            "kernel_size=0 and max_distance=4096 must be at least 1",
        ),
        (lambda: RelativeConvAttention(16, 4, variant="conv"), "variant='conv' is not one of 'mha', 'mdha'"),
        (lambda: RelativeConvAttention(16, 4, softcap=3.0), "softcap=3.0 is not part of relative attention"),
        (
            lambda: layer()(torch.randn(1, 50, 16).double()),
            "a key lies 49 back, and there are vectors for distances up to 40",
        ),
        (
            lambda: layer().with_memory(torch.randn(2, 3, 16).double(), torch.randn(1, 4, 16).double()),
            r"memory \[1, 4, 16\] must have the batch",
        ),
        (lambda: TransformerXL(9, variant="mha"), "absolute positions repeat in every segment; use 0"),
    ],
)
def test_what_does_not_fit_is_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()
