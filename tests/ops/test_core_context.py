from __future__ import annotations

import math

import pytest
import torch

from undivided.ops import core_context_attention, dense_attention, merge_attention, pool_core_tokens
from undivided.ops.core_context._groups import visible, visible_cores
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "a window that is no multiple of the group": dict(length=70, window=21, group_size=4),
    "a group that is no power of two": dict(length=70, window=20, group_size=7),
    "just longer than the window": dict(length=33, window=32, group_size=1),
    "one group out of sight": dict(length=25, window=20, group_size=5),
    "shared keys": dict(heads=4, key_heads=1, length=45, window=16, group_size=8),
    "a core token a key head": dict(heads=4, core_heads=2, length=36, window=9, group_size=3),
    "widths that are no powers of two": dict(length=40, window=7, group_size=3, head_dim=24, value_dim=40),
    "shorter than the window": dict(length=9, window=10, group_size=4),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(
    heads=2, key_heads=2, core_heads=None, length=40, head_dim=16, value_dim=16, batch=2, device=None, **_
):  # fmt: skip
    draw = lambda count, width: torch.randn(batch, count, length, width, dtype=torch.float64).to(device)  # noqa: E731
    return {
        "query": draw(heads, head_dim),
        "key": draw(key_heads, head_dim),
        "value": draw(key_heads, value_dim),
    }


def whole(backend, group_size=4, window=10, core_heads=None, **options):
    """Pooling and attention of whole texts as one function."""
    options = {
        name: value for name, value in options.items() if name in ("core_logit_bias", "softcap", "return_lse")
    }

    def run(query, key, value):
        last = query[:, :, group_size - 1 :: group_size]
        if core_heads is not None:
            last = last.unflatten(1, (core_heads, -1)).mean(dim=2)
        pooled = pool_core_tokens(
            last, key, value, group_size, backend="triton" if backend == "triton" else "reference"
        )
        return core_context_attention(
            query, key, value, *pooled, group_size=group_size, window=window, backend=backend, **options
        )

    return run


def by_loops(query, key, value, row, group_size, window):
    """The output of one token of one head, counted from zero, by loops over groups and tokens."""
    scale, i = 1 / math.sqrt(query.shape[-1]), row + 1
    cores = max(0, (i - window) // group_size)
    keys, values = [], []
    for m in range(cores):
        members = range(m * group_size, (m + 1) * group_size)
        weights = [math.exp(scale * float(query[members[-1]] @ key[j])) for j in members]
        keys.append(sum(w / sum(weights) * key[j] for w, j in zip(weights, members, strict=True)))
        values.append(sum(w / sum(weights) * value[j] for w, j in zip(weights, members, strict=True)))
    for j in range(cores * group_size, i):
        keys.append(key[j])
        values.append(value[j])
    weights = [math.exp(scale * float(query[row] @ k)) for k in keys]
    return sum(w / sum(weights) * v for w, v in zip(weights, values, strict=True))


@pytest.mark.parametrize(("group_size", "window"), [(4, 10), (3, 2), (1, 5)])
def test_equals_the_definition_written_with_loops(group_size, window):
    x = inputs(length=23)
    out = whole("reference", group_size, window)(**x)
    for row in (0, 5, 9, 10, 13, 14, 22):
        expected = by_loops(*(tensor[1, 1] for tensor in x.values()), row, group_size, window)
        torch.testing.assert_close(out[1, 1, row], expected, **EXACT)


@pytest.mark.parametrize(("group_size", "window"), [(1, 1), (4, 10), (16, 64), (7, 3), (5, 200)])
def test_every_token_is_seen_once(group_size, window):
    length = 200
    cores = visible_cores(length, group_size, window)
    seen = visible(length, length, cores, length, group_size, window, torch.device("cpu"))
    by_cores = seen[:, :cores].repeat_interleave(group_size, dim=1)
    times = seen[:, cores:].int()
    times[:, : by_cores.shape[1]] += by_cores
    assert torch.equal(times, torch.ones(length, length, dtype=torch.int32).tril())
    single = seen[:, cores:].sum(dim=1)[window:]
    assert ((single >= window) & (single < window + group_size)).all()


@every_shape
def test_sdpa_in_blocks_is_as_accurate_as_eager(shape):
    compare_op(
        whole("sdpa", **shape),
        whole("reference", **shape),
        whole("reference", **shape),
        inputs(**shape),
        torch.float32,
    )


@every_shape
def test_fused_kernels_are_as_accurate_as_eager(shape, device):
    x = inputs(**shape, batch=1, device=device)
    compare_op(whole("triton", **shape), whole("reference", **shape), whole("reference", **shape), x, HALF)


@pytest.mark.parametrize(
    "options", [{"core_logit_bias": math.log(4)}, {"return_lse": True}], ids=["bias", "lse"]
)
def test_fused_kernels_with_options(options, device):
    shape = {"length": 45, "group_size": 4, "window": 10} | options
    x = inputs(**shape, batch=1, device=device)
    compare_op(
        whole("triton", **shape), whole("reference", **shape), whole("reference", **shape), x, torch.float32
    )


def test_a_bias_of_log_g_counts_a_core_token_as_g_equal_tokens():
    x = inputs(length=40)
    x["key"] = x["key"][:, :, ::4].repeat_interleave(4, dim=2)
    x["value"] = x["value"][:, :, ::4].repeat_interleave(4, dim=2)
    out = whole("reference", 4, 8, core_logit_bias=math.log(4))(**x)
    torch.testing.assert_close(out, dense_attention(**x, is_causal=True, backend="reference"), **EXACT)


def test_up_to_the_window_it_is_causal_attention():
    x = inputs(length=16)
    for backend in ("reference", "sdpa"):
        out = whole(backend, 4, 16)(**x)
        torch.testing.assert_close(out, dense_attention(**x, is_causal=True, backend="reference"), **EXACT)


@pytest.mark.parametrize("window", [1, 6, 30])
def test_groups_of_one_are_causal_attention(window):
    x = inputs(length=40)
    out = whole("reference", 1, window)(**x)
    torch.testing.assert_close(out, dense_attention(**x, is_causal=True, backend="reference"), **EXACT)


def test_a_group_of_one_key_is_that_key_and_equal_values_stay_what_they_are():
    x = inputs(length=20)
    x["key"][:, :, 4:8] = x["key"][:, :, 4:5]
    core_key, _ = pool_core_tokens(x["query"][:, :, 3::4], x["key"], x["value"], 4)
    torch.testing.assert_close(core_key[:, :, 1], x["key"][:, :, 4], **EXACT)
    x["value"] = x["value"][:, :, :1].expand(-1, -1, 20, -1)
    torch.testing.assert_close(whole("reference")(**x), x["value"], **EXACT)


def test_equals_two_attentions_merged():
    x = inputs(length=37)
    core_key, core_value = pool_core_tokens(x["query"][:, :, 3::4], x["key"], x["value"], 4)
    seen = visible(37, 37, 9, 37, 4, 10, torch.device("cpu"))
    parts = [
        dense_attention(x["query"], key, value, attn_mask=mask, return_lse=True, backend="reference")
        for key, value, mask in (
            (core_key, core_value, seen[:, :9]),
            (x["key"], x["value"], seen[:, 9:]),
        )
    ]
    merged = merge_attention(*zip(*parts, strict=True))
    found = whole("reference", return_lse=True)(**x)
    for ours, expected in zip(found, merged, strict=True):
        torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_token_changes_no_row_before_it(backend):
    x = inputs(length=40)
    out = whole(backend)(**x)
    for token in (3, 12, 25):
        other = {name: tensor.clone() for name, tensor in x.items()}
        for tensor in other.values():
            tensor[:, :, token] += 1
        changed = (whole(backend)(**other) != out).any(dim=3).any(dim=1).any(dim=0)
        assert not changed[:token].any()
        assert changed[token:].all()


@pytest.mark.parametrize("backend", ["reference", "sdpa", "triton"])
def test_queries_behind_a_shortened_cache(backend, device):
    x = inputs(length=50, device=device)
    x = {
        name: tensor.to(torch.float32 if backend == "triton" else torch.float64) for name, tensor in x.items()
    }
    expected = whole("reference")(**x)
    for count in (1, 7):
        dropped = 4 * visible_cores(50 - count + 1, 4, 10)
        pooled = pool_core_tokens(x["query"][:, :, 3::4], x["key"], x["value"], 4)
        out = core_context_attention(
            x["query"][:, :, -count:], x["key"][:, :, dropped:], x["value"][:, :, dropped:], *pooled, group_size=4,
            window=10, num_tokens=50, backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(out, expected[:, :, -count:], rtol=1e-5, atol=1e-5)


def test_what_is_not_seen_is_not_read(device):
    x = {name: tensor.float() for name, tensor in inputs(length=50, device=device).items()}
    core_key, core_value = pool_core_tokens(x["query"][:, :, 3::4], x["key"], x["value"], 4)
    # 10 of 12 groups are out of the window of the last token.
    expected = whole("triton")(**x)
    for tensor in (core_key, core_value):
        tensor[:, :, 10:] = torch.nan
    with poisoned_empty():
        out = core_context_attention(
            *(poison_surroundings(tensor) for tensor in (*x.values(), core_key, core_value)), group_size=4, window=10,
            backend="triton",
        )  # fmt: skip
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_other_poolings(pooling):
    x = inputs(length=18)
    core_key, core_value = pool_core_tokens(None, x["key"], x["value"], 4, pooling=pooling)
    assert core_key.shape == (2, 2, 4, 16)
    reduce = {"mean": torch.mean, "max": torch.amax}[pooling]
    for found, rows in ((core_key, x["key"]), (core_value, x["value"])):
        torch.testing.assert_close(found[:, :, 2], reduce(rows[:, :, 8:12], dim=2), **EXACT)


def test_gradients_flow_through_the_pooling():
    x = [tensor.requires_grad_() for tensor in inputs(batch=1, length=8, head_dim=3, value_dim=2).values()]
    pool = lambda query, key, value: pool_core_tokens(query[:, :, 3::4], key, value, 4)  # noqa: E731
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradcheck(lambda *x: whole("reference", 2, 3)(*x), x)


@pytest.mark.gpu
def test_long_texts_in_half_precision_stay_finite():
    x = {
        name: t.bfloat16().requires_grad_()
        for name, t in inputs(length=32768, batch=1, device="cuda").items()
    }
    out = whole("triton", 16, 1024)(**x)
    gradients = torch.autograd.grad(out.float().square().sum(), list(x.values()))
    assert all(tensor.isfinite().all() for tensor in (out, *gradients))


def test_the_operators_are_sound(device):
    x = [tensor.float().requires_grad_() for tensor in inputs(length=24, device=device).values()]
    last = x[0][:, :, 3::4].detach().clone().requires_grad_()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.undivided.core_pool_forward, (last, *x[1:], 4, 0.25), test_utils=checks)
    pooled = torch.ops.undivided.core_pool_forward(last, *x[1:], 4, 0.25)
    torch.library.opcheck(
        torch.ops.undivided.core_context_forward, (*x, *pooled, 24, 4, 10, 0.25, 0.0), test_utils=checks
    )


def test_compiles_into_one_graph(device):
    x = {name: tensor.float() for name, tensor in inputs(length=24, device=device).items()}
    torch._dynamo.reset()
    compiled = torch.compile(whole("triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x), whole("triton")(**x))


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.core_context import backward, triton

query, key = torch.empty(1, 8, 512, 128, dtype=torch.bfloat16), torch.empty(1, 2, 512, 128, dtype=torch.bfloat16)
last = query[:, :, 15::16]
pooled = triton.pool(last, key, key, 16, 0.1)
out, lse = triton.forward(query, key, key, *pooled, 512, 16, 128, 0.1, 0.0)
backward.backward(out, lse, query, key, key, *pooled, lse, 512, 16, 128, 0.1, 0.0)
backward.pool_backward(*pooled, last, key, key, 16, 0.1)

# One process for three operators: it takes longer to start than to compile.
from undivided.ops.gathered import triton

for head_dim, window, softcap in ((64, None, None), (256, 4096, 50.0)):
    query, key = (torch.empty(1, heads, 512, head_dim, dtype=torch.bfloat16) for heads in (8, 2))
    lists, counts = torch.zeros(1, 1, 4, 256, dtype=torch.int32), torch.zeros(1, 1, 4, dtype=torch.int32)
    triton.forward(query, key, key, lists, counts, 128, True, window, 0.1, softcap)
    # A step of decoding.
    triton.forward(query[:, :, :1], key, key, lists[:, :, :1], counts[:, :, :1], 1, True, None, 0.1, softcap)

from undivided.ops.gaussian import triton

scale = torch.ones(2)
for length in (257, 4097):
    x = torch.empty(2, 2, length, 72, dtype=torch.bfloat16)
    out, saved = triton.forward(x, scale, scale, 1e-8)
    triton.backward(out, x, scale, scale, saved, 1e-8)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert [name for name, _ in lines].count("_forward_kernel") == 6
    assert {name for name, _ in lines} == {
        "_pool_kernel", "_forward_kernel", "_query_kernel", "_key_kernel", "_pool_backward_kernel", "_backward_kernel",
        "_moments_kernel", "_sums_kernel", "_gate_kernel",
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 0}, "group_size=0 must be at least 1."),
        ({"window": 0}, "window=0 must be at least 1: a query sees itself."),
        ({"num_tokens": 10}, "num_tokens=10 is less than the 40 queries or the 40 keys."),
        ({"window": 2}, "core_key has 7 core tokens, but the last of 40 tokens sees 9 (group_size=4, window=2)."),
        ({"num_tokens": 44, "window": 16}, "key has 40 keys, but the first of 40 queries sees the last 44"),
        ({"softcap": -1.0}, "softcap=-1.0 must be positive; leave it None for no cap."),
        ({"backend": "sdpa", "softcap": 3.0}, 'backend "sdpa" cannot run this: softcap is 3.0'),
    ],
)  # fmt: skip
def test_errors_name_what_is_wrong(change, message):
    x = inputs(length=40)
    pooled = pool_core_tokens(x["query"][:, :, 3:28:4], x["key"], x["value"], 4)
    with pytest.raises(ValueError) as error:
        core_context_attention(*x.values(), *pooled, **({"group_size": 4, "window": 12} | change))
    assert message in str(error.value)


def test_errors_of_the_pooling():
    x = inputs(length=10)
    with pytest.raises(ValueError, match="pooling='sum' is not one of 'cca', 'mean', 'max'."):
        pool_core_tokens(None, x["key"], x["value"], 4, pooling="sum")
    with pytest.raises(ValueError, match='pooling="cca" with query=None: "cca" alone needs one.'):
        pool_core_tokens(None, x["key"], x["value"], 4)
    with pytest.raises(ValueError, match="query has 10 groups of group_size=4, more than the 10 keys hold."):
        pool_core_tokens(x["query"], x["key"], x["value"], 4)
    with pytest.raises(ValueError, match='backend "triton" cannot run this: pooling is "mean"'):
        pool_core_tokens(None, x["key"], x["value"], 4, pooling="mean", backend="triton")
