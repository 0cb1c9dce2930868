from __future__ import annotations

import pytest
import torch

from undivided.ops import dense_attention, merge_attention


def qkv(keys=11):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return draw(2, 4, 3, 8), draw(2, 4, keys, 8), draw(2, 4, keys, 6)


def attend(query, key, value, **options):
    return dense_attention(query, key, value, return_lse=True, **options)


@pytest.mark.parametrize("cuts", [[5], [1, 10], [3, 4, 9]])
def test_merging_parts_equals_attention_over_all_keys(cuts):
    query, key, value = qkv()
    parts = [
        attend(query, k, v)
        for k, v in zip(key.tensor_split(cuts, dim=2), value.tensor_split(cuts, dim=2), strict=True)
    ]
    out, lse = merge_attention(*zip(*parts, strict=True))
    whole, whole_lse = attend(query, key, value)
    torch.testing.assert_close(out, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-12, atol=1e-12)


def test_gradients_through_the_merge_equal_those_of_the_whole():
    query, key, value = (x.requires_grad_() for x in qkv())

    def split(q, k, v):
        return merge_attention(
            *zip(attend(q, k[:, :, :4], v[:, :, :4]), attend(q, k[:, :, 4:], v[:, :, 4:]), strict=True)
        )

    weights = torch.randn(2, 4, 3, 6, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    loss = lambda pair: sum((w * x).sum() for w, x in zip(weights, pair, strict=True))  # noqa: E731
    ours = torch.autograd.grad(loss(split(query, key, value)), (query, key, value))
    theirs = torch.autograd.grad(loss(attend(query, key, value)), (query, key, value))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_an_empty_part_counts_for_nothing_even_if_it_holds_nan():
    query, key, value = qkv()
    out, lse = attend(query, key, value)
    empty = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    merged, merged_lse = merge_attention([out, empty[0]], [lse, empty[1]])
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse)
    nothing, nothing_lse = merge_attention([empty[0], empty[0]], [empty[1], empty[1]])
    assert torch.equal(nothing, torch.zeros_like(out)) and (nothing_lse == float("-inf")).all()


def test_an_empty_part_has_a_zero_gradient():
    out, lse = (x.detach().requires_grad_() for x in attend(*qkv()))
    empty = torch.full_like(lse, float("-inf")).requires_grad_()
    merged, _ = merge_attention([out, out.detach()], [lse, empty])
    gradients = torch.autograd.grad(merged.sum(), (out, lse, empty))
    assert all(g.isfinite().all() for g in gradients) and torch.equal(gradients[0], torch.ones_like(out))


def test_low_precision_parts_are_summed_wide():
    out = torch.full((1, 1, 1, 4), 1.0, dtype=torch.bfloat16)
    lse = torch.zeros(1, 1, 1)
    merged, _ = merge_attention([out] * 257, [lse] * 257)
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, out)


def test_compiles_into_one_graph():
    pair = attend(*qkv())
    compiled = torch.compile(merge_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled([pair[0]] * 2, [pair[1]] * 2), merge_attention([pair[0]] * 2, [pair[1]] * 2)
    )


def test_unequal_parts_are_named():
    out, lse = attend(*qkv())
    with pytest.raises(ValueError, match="outs has 0 parts and lses has 0"):
        merge_attention([], [])
    with pytest.raises(ValueError, match=r"lses\[1\] \[2, 4, 2\]"):
        merge_attention([out, out], [lse, lse[..., :2]])
