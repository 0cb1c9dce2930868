from __future__ import annotations

import math

import pytest
import torch

from undivided.ops import dense_attention
from undivided.ops.dense import BACKENDS
from undivided.testing import compare_op, poison_padding, poison_surroundings


def inputs(batch=2, heads=4, key_heads=2, queries=7, keys=7, head_dim=16, value_dim=16, dtype=torch.float64):
    return {
        "query": torch.randn(batch, heads, queries, head_dim, dtype=dtype),
        "key": torch.randn(batch, key_heads, keys, head_dim, dtype=dtype),
        "value": torch.randn(batch, key_heads, keys, value_dim, dtype=dtype),
    }


def call(backend, **options):
    return lambda query, key, value: dense_attention(query, key, value, backend=backend, **options)


def by_hand(query, key, value, row, column, seen):
    """One output row, by loops over keys."""
    group = query.shape[1] // key.shape[1]
    q, keys, values = query[0, row, column], key[0, row // group], value[0, row // group]
    logits = [float(q @ keys[m]) / math.sqrt(len(q)) for m in seen]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    out = sum(w * values[m] for w, m in zip(weights, seen, strict=True)) / sum(weights)
    return out, top + math.log(sum(weights))


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 6), (3, 6)])
def test_reference_equals_the_definition_written_with_loops(queries, keys):
    x = inputs(queries=queries, keys=keys)
    out, lse = dense_attention(**x, is_causal=True, window=4, return_lse=True, backend="reference")
    for n in range(queries):
        last = n + keys - queries
        expected, expected_lse = by_hand(**x, row=3, column=n, seen=range(max(0, last - 3), last + 1))
        torch.testing.assert_close(out[0, 3, n], expected, rtol=1e-12, atol=1e-12)
        assert abs(float(lse[0, 3, n]) - expected_lse) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (dict(), dict()),
        (dict(), dict(is_causal=True)),
        (dict(queries=3, keys=11), dict(is_causal=True)),
        (dict(queries=1, keys=9, value_dim=8), dict(is_causal=True)),
        (dict(queries=9, keys=9), dict(is_causal=True, window=3)),
        (dict(key_heads=1, value_dim=24), dict(scale=0.7)),
        (dict(queries=33, keys=33, head_dim=24, value_dim=24), dict(is_causal=True)),
    ],
)
def test_sdpa_is_as_accurate_as_eager(shape, options, dtype):
    reference = call("reference", **options)
    compare_op(call("sdpa", **options), reference, reference, inputs(**shape), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [(7, 7, 3), (200, 200, 20), (130, 333, 70), (150, 100, 33), (1, 50, 8), (64, 129, 64), (65, 66, 1)],
)
def test_blocks_of_a_window_are_as_accurate_as_eager_with_its_mask(queries, keys, window, dtype, device):
    x = {name: t.to(device) for name, t in inputs(queries=queries, keys=keys, value_dim=8).items()}
    local = call("local", is_causal=True, window=window)
    reference = call("reference", is_causal=True, window=window)
    compare_op(local, reference, reference, x, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("queries", "keys", "window", "head_dim"),
    [(7, 7, 3, 16), (300, 300, 128, 16), (130, 333, 70, 64), (1, 500, 8, 128), (65, 66, 1, 40)],
)
def test_flash_kernels_in_a_window_are_as_accurate_as_eager_with_its_mask(queries, keys, window, head_dim):
    sizes = {"queries": queries, "keys": keys, "head_dim": head_dim, "value_dim": head_dim}
    x = {name: t.cuda() for name, t in inputs(**sizes).items()}
    flash = call("flash", is_causal=True, window=window)
    reference = call("reference", is_causal=True, window=window)
    compare_op(flash, reference, reference, x, torch.bfloat16)


@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (3, 9), (1, 9)])
def test_flash_kernels_get_packed_sequences_and_the_window(queries, keys, monkeypatch):
    from undivided.ops.dense import flash

    def one_by_one(query, key, value, starts, key_starts, most, most_keys, *, scale, window_size, **options):
        assert (most, most_keys, window_size, starts.dtype) == (queries, keys, (2, 0), torch.int32)
        outs = []
        for i in range(len(starts) - 1):
            rows, columns = slice(starts[i], starts[i + 1]), slice(key_starts[i], key_starts[i + 1])
            q, k, v = (x.transpose(0, 1)[None] for x in (query[rows], key[columns], value[columns]))
            out = dense_attention(q, k, v, is_causal=True, window=3, scale=scale, backend="reference")
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    monkeypatch.setattr(flash, "varlen_attn", one_by_one)
    x = inputs(queries=queries, keys=keys) | {"scale": 0.7}
    out = flash.attend(**x, attn_mask=None, is_causal=True, window=3, softcap=None, return_lse=False)
    expected = dense_attention(**x, is_causal=True, window=3, backend="reference")
    torch.testing.assert_close(out, expected)


def test_flash_kernels_say_what_they_cannot_run(monkeypatch):
    from undivided.ops.dense import flash

    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='backend "flash" cannot run this: there is no CUDA device'):
            dense_attention(**inputs(), is_causal=True, window=3, backend="flash")
    monkeypatch.setattr(flash, "availability", list)
    x = inputs(queries=9, head_dim=12, value_dim=20)
    mask = torch.ones(9, 7, dtype=torch.bool)
    found = flash.reasons(
        **x, attn_mask=mask, is_causal=True, window=None, scale=1.0, softcap=2.0, return_lse=True
    )
    assert found == [
        "query is on cpu",
        "window is None (without one scaled_dot_product_attention has the same kernels)",
        "attn_mask is given",
        "softcap is given",
        "return_lse is True",
        "query is torch.float64 (needs float16 or bfloat16)",
        "head_dim is 12 and value_dim 20 (needs the same, a multiple of 8 up to 256)",
        "there are more queries than keys",
    ]


def test_a_window_is_taken_in_blocks_unless_it_reaches_all_keys_or_something_else_is_asked_for():
    x = inputs()
    for options, reason in (
        ({}, "window is None"),
        ({"is_causal": True, "window": 7}, "window is None"),
        ({"is_causal": True, "window": 3, "return_lse": True}, "return_lse is True"),
        ({"is_causal": True, "window": 3, "softcap": 2.0}, "softcap is 2.0"),
        (
            {"is_causal": True, "window": 3, "attn_mask": torch.ones(7, 7, dtype=torch.bool)},
            "attn_mask is given",
        ),
    ):
        with pytest.raises(ValueError, match=f'backend "local" cannot run this: {reason}'):
            dense_attention(**x, **options, backend="local")
        out = dense_attention(**x, **options)
        torch.testing.assert_close(out, dense_attention(**x, **options, backend="reference"))


def test_a_step_of_decoding_reads_the_window_and_not_the_cache_before_it():
    x = inputs(queries=2, keys=40)
    keep = torch.arange(40)[:, None] >= 40 - 2 - 3
    poisoned = {name: poison_padding(t, keep) if name != "query" else t for name, t in x.items()}
    local = call("local", is_causal=True, window=3)
    torch.testing.assert_close(local(**poisoned), local(**x))


@pytest.mark.parametrize("window", [None, 40])
def test_one_query_behind_a_cache_gets_no_mask(window, monkeypatch):
    x, masks = inputs(queries=1, keys=40), []
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda *y, **options: masks.append((options["attn_mask"], options["is_causal"])) or plain(*y, **options),
    )  # fmt: skip
    out = dense_attention(**x, is_causal=True, window=window, backend="sdpa")
    assert masks == [(None, False)]
    torch.testing.assert_close(out, dense_attention(**x, backend="reference"))


@pytest.mark.parametrize("kind", ["boolean", "bias"])
def test_masks_and_biases_are_added_to_causality(kind):
    x = inputs(queries=6, keys=6)
    mask = torch.rand(2, 1, 6, 6) > 0.4
    mask[..., 0] = True
    if kind == "bias":
        mask = torch.randn(2, 4, 6, 6).masked_fill(~mask, float("-inf"))
    reference, sdpa = (call(name, attn_mask=mask, is_causal=True) for name in ("reference", "sdpa"))
    compare_op(sdpa, reference, reference, x, torch.float32)
    future = mask.clone()
    future[..., 0, 1] = True if kind == "boolean" else 50.0
    out = dense_attention(**x, attn_mask=future, is_causal=True)
    torch.testing.assert_close(out[:, :, 0], x["value"][:, :, 0].repeat_interleave(2, dim=1))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_query_that_sees_nothing_has_zero_output_and_zero_gradient(backend):
    x = {name: tensor.requires_grad_() for name, tensor in inputs(queries=4, keys=4).items()}
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[2] = False
    out = dense_attention(**x, attn_mask=mask, backend=backend)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    for gradient in torch.autograd.grad(out.square().sum(), list(x.values())):
        assert gradient.isfinite().all()
    if backend == "reference":
        _, lse = dense_attention(**x, attn_mask=mask, return_lse=True)
        assert (lse[:, :, 2] == float("-inf")).all() and lse[:, :, 0].isfinite().all()


def test_lse_and_its_gradient_pass_gradcheck():
    x = inputs(batch=1, heads=2, key_heads=1, queries=3, keys=4, head_dim=3, value_dim=2)
    function = lambda q, k, v: dense_attention(q, k, v, is_causal=True, softcap=2.0, return_lse=True)  # noqa: E731
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in x.values()])


def test_softcap_bounds_the_logits():
    x = inputs()
    x["query"] = x["query"] * 1e3
    _, lse = dense_attention(**x, softcap=2.0, return_lse=True)
    assert float(lse.max()) <= 2.0 + math.log(7) + 1e-12


@pytest.mark.parametrize("backend", [b.name for b in BACKENDS if "cpu" in b.automatic])
def test_strides_batch_mates_and_masked_nan_do_not_matter(backend):
    x = inputs(dtype=torch.float32)
    options = {"is_causal": True, "window": 3 if backend == "local" else None, "backend": backend}
    out = dense_attention(**x, **options)
    strided = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    torch.testing.assert_close(dense_attention(**strided, **options), out)
    alone = {name: tensor[1:] for name, tensor in x.items()}
    torch.testing.assert_close(dense_attention(**alone, **options), out[1:])


def test_causal_output_does_not_read_nan_of_the_future_in_logits():
    x = inputs()
    keep = torch.ones(1, 1, 7, 1, dtype=torch.bool)
    keep[..., -1, :] = False
    x["key"] = poison_padding(x["key"], keep)
    out = dense_attention(**x, is_causal=True, backend="reference")
    assert out[:, :, :-1].isfinite().all()


@pytest.mark.parametrize("options", [dict(), dict(is_causal=True), dict(softcap=3.0), dict(return_lse=True)])
def test_compiles_into_one_graph(options):
    x = inputs(dtype=torch.float32)
    eager = dense_attention(**x, **options)
    compiled = torch.compile(dense_attention, fullgraph=True, backend="eager")(**x, **options)
    torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize(
    "options", [dict(), dict(is_causal=True, window=20), dict(softcap=3.0), dict(mask=True)]
)
def test_flex_is_as_accurate_as_eager(options, device):
    x = {name: t.to(device) for name, t in inputs(queries=40, keys=50, dtype=torch.float32).items()}
    options = dict(options)
    if options.pop("mask", False):
        options["attn_mask"] = torch.rand(2, 1, 40, 50, device=device) > 0.3
    # On the CPU FlexAttention has neither a log-sum-exp nor a backward; both are tested on a GPU.
    on_gpu = device.type == "cuda"
    reference, flex = (call(name, return_lse=on_gpu, **options) for name in ("reference", "flex"))
    with torch.set_grad_enabled(on_gpu):
        compare_op(flex, reference, reference, x, torch.float32, grad_inputs=None if on_gpu else ())


def test_flex_on_the_cpu_says_that_it_has_no_backward():
    x = {name: tensor.requires_grad_() for name, tensor in inputs(dtype=torch.float32).items()}
    if torch.cuda.is_available():
        pytest.skip("on CUDA it has one")
    with pytest.raises(ValueError, match="query is on cpu and needs a gradient"):
        dense_attention(**x, backend="flex")
