from __future__ import annotations

import pytest
import torch

from undivided.ops import OPS, dense_attention, latent_attention


def qkv(**overrides):
    sizes = dict(batch=1, heads=4, key_heads=2, queries=3, keys=5, dim=8) | overrides
    shape = lambda heads, length: (sizes["batch"], heads, length, sizes["dim"])  # noqa: E731
    return (
        torch.randn(shape(sizes["heads"], sizes["queries"])),
        torch.randn(shape(sizes["key_heads"], sizes["keys"])),
        torch.randn(shape(sizes["key_heads"], sizes["keys"])),
    )


def test_every_op_has_a_reference_that_refuses_nothing():
    for name, backends in OPS.items():
        assert any(b.name == "reference" and b.reasons() == [] for b in backends), name


def test_an_explicit_backend_is_refused_with_its_reasons_and_the_able_ones():
    with pytest.raises(ValueError) as error:
        dense_attention(*qkv(), return_lse=True, backend="sdpa")
    text = str(error.value)
    assert 'backend "sdpa" cannot run this: return_lse is True' in text
    assert '"reference"' in text.split("Able:")[1]
    assert "query [1, 4, 3, 8] float32 on cpu" in text


def test_an_unknown_backend_lists_those_that_exist():
    with pytest.raises(
        ValueError,
        match='backend=\'fast\' is not one of "auto", "triton", "flash", "local", "sdpa", "flex", "ref',
    ):
        dense_attention(*qkv(), backend="fast")


def test_auto_takes_the_reference_where_nothing_faster_is_able():
    query, key, value = qkv()
    out, lse = dense_attention(query, key, value, return_lse=True)
    assert torch.equal(out, dense_attention(query, key, value, backend="reference"))
    assert lse.shape == query.shape[:-1]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            dict(key=torch.randn(1, 3, 5, 8)),
            "key has 3 heads, which does not divide the 4 heads of query|must share",
        ),
        (dict(key=torch.randn(1, 2, 5, 6)), "key has head_dim 6, but query has 8"),
        (dict(query=torch.randn(4, 3, 8)), r"query has shape \[4, 3, 8\]; it needs 4 axes"),
        (dict(query=torch.ones(1, 4, 3, 8, dtype=torch.int32)), "query has dtype torch.int32"),
        (
            dict(value=torch.randn(1, 2, 5, 8, dtype=torch.float64)),
            "value has dtype torch.float64, but query has",
        ),
        (
            dict(attn_mask=torch.ones(3, 4, dtype=torch.bool)),
            r"attn_mask has shape \[3, 4\]; it must broadcast to",
        ),
        (dict(attn_mask=torch.ones(3, 5, dtype=torch.int32)), "attn_mask has dtype torch.int32"),
        (dict(window=3), "window=3 with is_causal=False"),
        (dict(softcap=-1.0), "softcap=-1.0 must be positive"),
    ],
)
def test_bad_input_of_dense_attention_is_named(change, text):
    query, key, value = qkv()
    arguments = dict(query=query, key=key, value=value) | change
    with pytest.raises((ValueError, TypeError), match=text):
        dense_attention(**arguments)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(query_rope=None), "query_rope is None, but rope_key is given"),
        (dict(latent=torch.randn(2, 3, 7, 8)), "latent has 3 heads, which does not divide the 4 heads"),
        (dict(latent=torch.randn(2, 1, 7, 6)), "latent has latent_dim 6, but query_latent has 8"),
        (dict(rope_key=torch.randn(2, 1, 6, 4)), r"rope_key has shape \[2, 1, 6, 4\]"),
        (
            dict(cache_seqlens=torch.ones(3, dtype=torch.int32)),
            r"cache_seqlens has shape \[3\]; it needs \[batch=2\]",
        ),
        (dict(num_splits=0), "num_splits=0 must be at least 1"),
        (dict(latent_scale=torch.ones(2, 7)), "it is for float8_e4m3fn caches"),
        (dict(block_table=torch.zeros(3, 2, dtype=torch.int32)), r"block_table has shape \[3, 2\]"),
    ],
)
def test_bad_input_of_latent_attention_is_named(change, text):
    arguments = dict(
        query_latent=torch.randn(2, 4, 1, 8), query_rope=torch.randn(2, 4, 1, 4), latent=torch.randn(2, 1, 7, 8),
        rope_key=torch.randn(2, 1, 7, 4), scale=0.3,
    )  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=text):
        latent_attention(**(arguments | change))
