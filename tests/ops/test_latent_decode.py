from __future__ import annotations

import pytest
import torch

from undivided.ops import dense_attention, latent_attention
from undivided.testing import compare_op, poison_buffer, poison_tail


def inputs(
    batch=2, heads=4, latent_heads=1, queries=1, keys=13, latent_dim=16, rope_dim=8, dtype=torch.float64
):
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    return {
        "query_latent": draw(batch, heads, queries, latent_dim),
        "query_rope": draw(batch, heads, queries, rope_dim),
        "latent": draw(batch, latent_heads, keys, latent_dim),
        "rope_key": draw(batch, 1, keys, rope_dim),
    }


def call(backend, **options):
    return lambda **x: latent_attention(**x, scale=0.3, backend=backend, **options)


def as_dense(x, **options):
    """The same attention with keys [latent, rope] and values latent, formed and attended densely."""
    groups = x["latent"].shape[1]
    key = torch.cat([x["latent"], x["rope_key"].expand(-1, groups, -1, -1)], dim=-1)
    query = torch.cat([x["query_latent"], x["query_rope"]], dim=-1)
    return dense_attention(query, key, x["latent"], scale=0.3, is_causal=True, return_lse=True, **options)


@pytest.mark.parametrize(
    "shape", [dict(), dict(latent_heads=2, queries=3), dict(heads=6, latent_heads=3, queries=8)]
)
def test_reference_equals_dense_attention_over_formed_keys(shape):
    x = inputs(**shape)
    out, lse = latent_attention(**x, scale=0.3, return_lse=True, backend="reference")
    expected, expected_lse = as_dense(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [
        dict(),
        dict(latent_heads=2, queries=3),
        dict(keys=1),
        dict(queries=5, keys=7, latent_dim=24, rope_dim=4),
    ],
)
def test_sdpa_is_as_accurate_as_eager(shape, dtype):
    reference = call("reference")
    compare_op(call("sdpa"), reference, reference, inputs(**shape), dtype)


def test_reference_is_differentiable():
    x = inputs(batch=1, heads=2, queries=2, keys=3, latent_dim=3, rope_dim=2)
    function = lambda *tensors: latent_attention(*tensors, scale=0.3, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in x.values()])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("queries", [1, 3])
def test_nan_in_cache_tail_is_never_read(backend, queries):
    x = inputs(queries=queries, dtype=torch.float32)
    lengths = torch.tensor([13, 6], dtype=torch.int32)
    poisoned = x | {name: poison_tail(x[name], lengths) for name in ("latent", "rope_key")}
    out = call(backend, cache_seqlens=lengths)(**poisoned)
    short = {
        name: tensor[1:, :, :6] if name in ("latent", "rope_key") else tensor[1:]
        for name, tensor in x.items()
    }
    torch.testing.assert_close(out[1:], call(backend)(**short))
    torch.testing.assert_close(out[:1], call(backend)(**{name: t[:1] for name, t in x.items()}))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_an_empty_sequence_has_zero_output(backend):
    x = inputs(dtype=torch.float32)
    lengths = torch.tensor([13, 0], dtype=torch.int32)
    out = call(backend, cache_seqlens=lengths)(**x)
    assert torch.equal(out[1], torch.zeros_like(out[1])) and out[0].abs().min() > 0
    if backend == "reference":
        _, lse = call(backend, cache_seqlens=lengths, return_lse=True)(**x)
        assert (lse[1] == float("-inf")).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_pages_equal_the_contiguous_cache(backend):
    x = inputs(queries=2, keys=12, dtype=torch.float32)
    lengths = torch.tensor([12, 7], dtype=torch.int32)
    page_size, order = 4, torch.tensor([[5, 0, 3], [2, 6, 1]], dtype=torch.int32)
    pages = {name: poison_buffer(8, 1, page_size, x[name].shape[-1]) for name in ("latent", "rope_key")}
    for name, buffer in pages.items():
        rows = poison_tail(x[name], lengths)
        for b in range(2):
            for p in range(3):
                buffer[order[b, p], 0] = rows[b, 0, p * page_size : (p + 1) * page_size]
    paged = call(backend, cache_seqlens=lengths, block_table=order)(**(x | pages))
    torch.testing.assert_close(paged, call(backend, cache_seqlens=lengths)(**x))


def test_an_fp8_cache_is_scaled_by_row():
    x = inputs(dtype=torch.float32)
    scale = torch.rand(2, 13) + 0.5
    stored = {
        name: (x[name] / scale[:, None, :, None]).to(torch.float8_e4m3fn) for name in ("latent", "rope_key")
    }
    widened = {name: tensor.float() * scale[:, None, :, None] for name, tensor in stored.items()}
    out = call("reference", latent_scale=scale)(**(x | stored))
    torch.testing.assert_close(out, call("reference")(**(x | widened)))


def test_a_view_of_joined_rows_is_taken_as_it_is():
    x = inputs(dtype=torch.float32)
    rows = torch.cat([x["latent"], x["rope_key"]], dim=-1)
    views = {"latent": rows[..., :16], "rope_key": rows[..., 16:]}
    torch.testing.assert_close(call("auto")(**(x | views)), call("auto")(**x))


def test_without_a_rope_part():
    x = inputs() | {"query_rope": None, "rope_key": None}
    out = call("reference")(**x)
    expected = dense_attention(x["query_latent"], x["latent"], x["latent"], scale=0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [dict(), dict(softcap=2.0), dict(return_lse=True)])
def test_compiles_into_one_graph(options):
    x = inputs(queries=2, dtype=torch.float32)
    eager = call("auto", **options)(**x)
    compiled = torch.compile(call("auto", **options), fullgraph=True, backend="eager")(**x)
    torch.testing.assert_close(compiled, eager)
