"""Causal attention of many queries behind a cache: two calls of cuDNN in place of one with a mask."""

from __future__ import annotations

import pytest
import torch

from undivided.ops import dense_attention
from undivided.ops.dense import sdpa
from undivided.testing import compare_op


def inputs(queries, keys, heads=2, key_heads=2, device="cpu"):
    shapes = {"query": (heads, queries, 24), "key": (key_heads, keys, 24), "value": (key_heads, keys, 16)}
    return {name: torch.randn(2, *shape, device=device) for name, shape in shapes.items()}


def by_reference(query, key, value):
    return dense_attention(query, key, value, is_causal=True, backend="reference")


def stand_in(query, key, value, scale, is_causal):
    """What cuDNN returns: its log-sum-exp has a last axis of one."""
    out, lse = dense_attention(
        query, key, value, scale=scale, is_causal=is_causal, return_lse=True, backend="reference"
    )
    return out, lse[..., None]


@pytest.mark.parametrize(("queries", "keys"), [(7, 8), (5, 21), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_keys_before_and_among_the_queries_make_the_whole(queries, keys, dtype, monkeypatch):
    monkeypatch.setattr(sdpa, "_cudnn", stand_in)
    compare_op(
        lambda query, key, value: sdpa._in_two_calls(query, key, value, 24**-0.5),
        by_reference,
        by_reference,
        inputs(queries, keys),
        dtype,
        grad_inputs=(),
    )


def test_on_a_cpu_there_is_one_call():
    x = inputs(sdpa._MANY_QUERIES, sdpa._MANY_QUERIES + 1)
    assert not sdpa._pays_in_two_calls(**x)


@pytest.mark.gpu
@pytest.mark.parametrize("few", [False, True])
def test_on_hopper_many_queries_take_two_calls_and_few_one(few, device, monkeypatch):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    calls, cudnn = [], sdpa._cudnn
    monkeypatch.setattr(sdpa, "_cudnn", lambda *given, **options: calls.append(1) or cudnn(*given, **options))
    queries = sdpa._MANY_QUERIES - 1 if few else sdpa._MANY_QUERIES + 5
    with torch.no_grad():
        compare_op(
            lambda query, key, value: dense_attention(query, key, value, is_causal=True, backend="sdpa"),
            by_reference,
            by_reference,
            inputs(queries, 900, device=device),
            torch.bfloat16,
            grad_inputs=(),
        )
    assert len(calls) == (0 if few else 2)


@pytest.mark.gpu
def test_gradients_take_the_call_that_has_them(device):
    compare_op(
        lambda query, key, value: dense_attention(query, key, value, is_causal=True, backend="sdpa"),
        by_reference,
        by_reference,
        inputs(sdpa._MANY_QUERIES, 300, device=device),
        torch.bfloat16,
    )
