from __future__ import annotations

import math

import pytest
import torch

from undivided.ops import dense_attention, differential_attention
from undivided.ops.differential import BACKENDS
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "small": dict(),
    "odd lengths": dict(queries=37, keys=37),
    "a prompt behind a cache": dict(queries=9, keys=70),
    "one query": dict(queries=1, keys=70),
    "one key": dict(queries=1, keys=1),
    "queries that see nothing": dict(queries=21, keys=5),
    "symmetric": dict(heads=2, noise_heads=2),
    "several signal keys a noise key": dict(heads=8, key_heads=4),
    "several noise heads a key": dict(heads=8, noise_heads=4, key_heads=1, noise_key_heads=1, value_heads=1),
    "widths that are no powers of two": dict(head_dim=24, value_dim=40),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(
    batch=2, heads=4, noise_heads=2, key_heads=2, noise_key_heads=2, value_heads=2, queries=7, keys=7, head_dim=16,
    value_dim=32, dtype=torch.float64, device=None,
):  # fmt: skip
    def draw(heads, length, width):
        return torch.randn(batch, heads, length, width, dtype=dtype).to(device)

    return {
        "query": draw(heads, queries, head_dim),
        "noise_query": draw(noise_heads, queries, head_dim),
        "key": draw(key_heads, keys, head_dim),
        "noise_key": draw(noise_key_heads, keys, head_dim),
        "value": draw(value_heads, keys, value_dim),
        # One a token and head: the gradient of a single number is one sum, whose rounding error is luck. Far from one,
        # where the first rows, which see few keys, would cancel and the norm would magnify their rounding errors.
        "lam": (0.2 + 0.4 * torch.rand(batch, heads, queries, dtype=dtype)).to(device),
        "norm_weight": (torch.rand(value_dim, dtype=dtype) + 0.5).to(device),
    }


def call(backend, **options):
    return lambda **x: differential_attention(**x, is_causal=True, out_scale=0.8, backend=backend, **options)


def by_loops(query, noise_query, key, noise_key, value, lam, norm_weight, b, head, n):
    """One output row of a Differential Transformer, by loops over keys: as many noise heads as signal heads."""
    width = value.shape[-1]
    mixed = torch.zeros(width, dtype=value.dtype)
    for sign, q, k in ((1.0, query, key), (-lam, noise_query, noise_key)):
        logits = [float(q[b, head, n] @ k[b, head, m]) / math.sqrt(q.shape[-1]) for m in range(n + 1)]
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        for m, weight in enumerate(weights):
            mixed += sign * weight / sum(weights) * value[b, head, m]
    mean_square = sum(float(x) ** 2 for x in mixed) / width
    return mixed / math.sqrt(mean_square + 1e-5) * norm_weight


def test_equals_the_differential_transformer_written_with_loops():
    x = inputs(heads=3, noise_heads=3, key_heads=3, noise_key_heads=3, value_heads=3)
    x["lam"] = 0.4
    out = differential_attention(**x, is_causal=True, backend="reference")
    for n in range(7):
        torch.testing.assert_close(out[1, 2, n], by_loops(**x, b=1, head=2, n=n), **EXACT)


def test_a_noise_head_serves_a_run_of_neighbouring_signal_heads():
    x = inputs(heads=6, noise_heads=3, key_heads=3, noise_key_heads=3, value_heads=3, queries=1, keys=2)
    x |= {"query": x["query"].zero_(), "norm_weight": None, "lam": 1.0}
    # Values 1 and 0: a noise head that sees key 0 alone gives 1, and the signal heads give 1/2.
    x["value"] = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 1, 2, 1).repeat(2, 3, 1, 1)
    x["noise_query"] = torch.tensor([0.0, 1e3, 0.0], dtype=torch.float64).view(1, 3, 1, 1).repeat(2, 1, 1, 16)
    x["noise_key"] = torch.tensor([1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 1).repeat(2, 3, 1, 16)
    for backend in ("reference", "sdpa"):
        out = differential_attention(**x, backend=backend)[0, :, 0, 0]
        torch.testing.assert_close(out, torch.tensor([0, 0, -0.5, -0.5, 0, 0], dtype=torch.float64), **EXACT)


def test_without_lam_it_is_normalised_attention():
    x = inputs() | {"lam": 0.0, "norm_weight": torch.ones(32, dtype=torch.float64)}
    plain = dense_attention(x["query"], x["key"], x["value"], is_causal=True, backend="reference")
    expected = torch.nn.functional.rms_norm(plain, (32,), eps=1e-5)
    torch.testing.assert_close(
        differential_attention(**x, is_causal=True, backend="reference"), expected, **EXACT
    )


def test_equal_maps_leave_one_minus_lam_and_the_norm_forgets_lam():
    x = inputs(heads=2, noise_heads=2)
    x |= {"noise_query": x["query"], "noise_key": x["key"], "lam": 0.4}
    plain = dense_attention(x["query"], x["key"], x["value"], backend="reference")
    out = differential_attention(**(x | {"norm_weight": None}), backend="reference")
    torch.testing.assert_close(out, 0.6 * plain, **EXACT)
    normalised = [
        differential_attention(**(x | {"lam": lam}), norm_eps=0.0, backend="reference") for lam in (0.4, -2.0)
    ]
    torch.testing.assert_close(*normalised, **EXACT)


def test_rows_of_the_mixed_map_sum_to_one_minus_lam():
    x = inputs() | {"norm_weight": None}
    x["value"] = torch.ones_like(x["value"])
    for lam in (0.4, 1.7, -0.3):
        out = differential_attention(**(x | {"lam": lam}), is_causal=True)
        torch.testing.assert_close(out, torch.full_like(out, 1 - lam), **EXACT)


def test_grouped_keys_equal_repeated_keys():
    x = inputs(heads=8, noise_heads=4, key_heads=2, noise_key_heads=2)
    repeated = {name: x[name].repeat_interleave(2, dim=1) for name in ("noise_key", "value")}
    repeated["key"] = x["key"].repeat_interleave(4, dim=1)
    for backend in ("reference", "sdpa"):
        torch.testing.assert_close(call(backend)(**(x | repeated)), call(backend)(**x), **EXACT)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sdpa_is_as_accurate_as_eager(shape, dtype):
    compare_op(call("sdpa"), call("reference"), call("reference"), inputs(**shape), dtype)


@every_shape
def test_fused_kernels_are_as_accurate_as_eager(shape, device):
    compare_op(call("triton"), call("reference"), call("reference"), inputs(**shape, device=device), HALF)


@pytest.mark.parametrize("name", ["odd lengths", "one query"])
def test_fused_kernels_in_float32(name, device):
    x = inputs(**SHAPES[name], device=device)
    compare_op(call("triton"), call("reference"), call("reference"), x, torch.float32)


@every_shape
def test_fused_kernels_without_gradients_are_as_accurate_as_eager(shape, device):
    x = inputs(**shape, device=device)
    with torch.no_grad():
        compare_op(call("triton"), call("reference"), call("reference"), x, HALF, grad_inputs=())


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("lam", ["a head", "a token", "a number"])
def test_lam_may_differ_by_head_and_by_token(lam, norm, device):
    x = inputs(device=device)
    x["lam"] = {"a head": torch.randn(4, 1), "a token": torch.randn(2, 4, 7), "a number": -1.5}[lam]
    if lam != "a number":
        x["lam"] = x["lam"].to(device, torch.float64)
    if not norm:
        x["norm_weight"] = None
    compare_op(call("triton"), call("reference"), call("reference"), x, torch.float32)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_maps_that_nearly_cancel_keep_their_digits(backend, device):
    x = inputs(heads=2, noise_heads=2, device=device)
    x["noise_query"] = x["query"] + 0.05 * torch.randn_like(x["query"])
    x["noise_key"] = x["key"].clone()
    x["lam"] = torch.full_like(x["lam"], 0.97)
    # The difference is taken in float32. In 16 bits it is the maps that are rounded, by every kernel on tensor cores.
    with torch.no_grad():
        compare_op(call(backend), call("reference"), call("reference"), x, torch.float32, grad_inputs=())


def test_not_causal(device):
    x = inputs(queries=5, keys=40, device=device)
    fused, plain = (
        lambda backend=backend, **x: differential_attention(**x, backend=backend)
        for backend in ("triton", "reference")
    )
    compare_op(fused, plain, plain, x, torch.float32)


@pytest.mark.parametrize("splits", [1, 2, 5, 40])
def test_a_split_cache_is_one_cache(splits, device):
    from undivided.ops.differential import autograd, decode

    x = inputs(queries=3, keys=150, dtype=torch.float32, device=device)
    lam, weight = x.pop("lam"), x.pop("norm_weight")
    assert autograd.few_rows(x["query"], x["noise_query"], x["value"])
    out = decode.attend(*x.values(), lam, weight, 1e-5, 0.8, True, 0.25, num_splits=splits)
    options = dict(norm_weight=weight, out_scale=0.8, is_causal=True, scale=0.25, backend="reference")
    torch.testing.assert_close(out, differential_attention(**x, lam=lam, **options))


def test_gradients_of_the_reference_pass_gradcheck():
    x = inputs(
        batch=1,
        heads=2,
        noise_heads=1,
        key_heads=1,
        noise_key_heads=1,
        value_heads=1,
        head_dim=4,
        value_dim=8,
    )

    def function(*tensors):
        return call("reference")(**dict(zip(x, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()])


@pytest.mark.parametrize("queries", [1, 37])
def test_strides_surroundings_and_batch_mates_do_not_matter(queries, device):
    x = inputs(queries=queries, keys=37, dtype=torch.float32, device=device)
    out = call("triton")(**x)
    strided = {name: poison_surroundings(x[name]) for name in x}
    torch.testing.assert_close(call("triton")(**(x | strided)), out)
    turned = {name: x[name].transpose(1, 2).contiguous().transpose(1, 2) for name in x if x[name].dim() == 4}
    torch.testing.assert_close(call("triton")(**(x | turned)), out)
    alone = {name: x[name][1:] for name in (*turned, "lam")}
    torch.testing.assert_close(call("triton")(**(x | alone)), out[1:])


@pytest.mark.parametrize("queries", [1, 37])
def test_everything_is_written(queries, device):
    x = inputs(queries=queries, keys=37, dtype=torch.float32, device=device)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    with poisoned_empty():
        with torch.no_grad():
            assert call("triton")(**x).isfinite().all()
        out = call("triton")(**leaves)
        for name, gradient in zip(x, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True):
            assert gradient.isfinite().all(), name


def test_gradients_have_the_same_bits_in_every_run(device):
    x = {
        name: tensor.requires_grad_()
        for name, tensor in inputs(queries=37, keys=37, dtype=torch.float32, device=device).items()
    }
    once, twice = (
        torch.autograd.grad(call("triton")(**x).square().sum(), list(x.values())) for _ in range(2)
    )
    for name, first, second in zip(x, once, twice, strict=True):
        assert torch.equal(first, second), name


def test_the_output_lies_as_an_output_projection_reads_it(device):
    out = call("triton")(**inputs(dtype=torch.float32, device=device))
    assert out.transpose(1, 2).is_contiguous()


def test_operators_pass_opcheck(device):
    from undivided.ops.differential import autograd  # noqa: F401

    x = inputs(dtype=torch.float32, device=device)
    options = (1e-5, 0.8, True, 0.25)
    tests = ("test_schema", "test_faketensor")
    arguments = (*x.values(), *options, "triton")
    torch.library.opcheck(torch.ops.undivided.differential_inference, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.undivided.differential_forward, arguments, test_utils=tests)
    out, *kept = torch.ops.undivided.differential_forward(*arguments)
    arguments = (torch.randn_like(out), *kept, *x.values(), *options)
    torch.library.opcheck(torch.ops.undivided.differential_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_compiles_into_one_graph(backend, device):
    x = {name: t.requires_grad_() for name, t in inputs(dtype=torch.float32, device=device).items()}
    eager = call(backend)(**x)
    torch._dynamo.reset()
    compiled = torch.compile(call(backend), fullgraph=True, backend="aot_eager")(**x)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(
        torch.autograd.grad(compiled.sum(), list(x.values())),
        torch.autograd.grad(eager.sum(), list(x.values())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.differential import backward, decode, triton as forward

dtype = torch.bfloat16
query, noise_query = torch.empty(1, 32, 512, 128, dtype=dtype), torch.empty(1, 8, 512, 128, dtype=dtype)
keys, value = torch.empty(1, 8, 512, 256, dtype=dtype), torch.empty(1, 8, 512, 256, dtype=dtype)
inputs = (query, noise_query, keys[..., :128], keys[..., 128:], value)
lam, weight = torch.ones(()).expand(1, 32, 512), torch.ones(256, dtype=dtype)
out, mixed, noise_out, lse, noise_lse = forward.forward(*inputs, lam, weight, 1e-5, 0.8, True, 0.1, with_mixed=True)
first = [tensor[:, :, :1] for tensor in (query, noise_query)]
decode.attend(*first, *inputs[2:], lam[..., :1], weight, 1e-5, 0.8, True, 0.1, num_splits=4)
back = forward.mix_backward(out, mixed, noise_out, lam, weight, 1e-5, 0.8)
backward.backward(*back[:4], *inputs, lse, noise_lse, True, 0.1)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_forward_kernel", "_attend_kernel", "_mix_kernel", "_mix_backward_kernel", "_query_kernel", "_key_kernel"
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_tilings_fit_smaller_devices():
    from undivided.ops._flash import forward_tiling
    from undivided.ops.differential.backward import key_tiling, query_tiling

    for choose in (forward_tiling, query_tiling, key_tiling):
        for widths in ((64, 128), (128, 256), (256, 256)):
            for element_size in (2, 4):
                hopper = choose(*widths, element_size, 227 * 1024)
                small = choose(*widths, element_size, 99 * 1024)
                kept = min(small.rows, small.keys) * sum(widths) * element_size
                assert kept <= 99 * 1024
                assert small.rows * small.keys <= hopper.rows * hopper.keys
    assert forward_tiling(128, 256, 2, 227 * 1024).num_stages == 3


def test_every_backend_but_the_reference_says_what_it_cannot_do():
    x = inputs()
    able = [backend.name for backend in BACKENDS if backend.name != "reference"]
    for backend in able:
        with pytest.raises(ValueError, match=f'backend "{backend}" cannot run this: .*Able: .*"reference"'):
            differential_attention(**x, softcap=2.0, backend=backend)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(attn_mask=torch.ones(7, 7, dtype=torch.bool)), "attn_mask is given"),
        (dict(window=3), "window is given"),
    ],
)
def test_fused_kernels_refuse_masks_other_than_causal(options, text):
    with pytest.raises(ValueError, match=text):
        call("triton", **options)(**inputs(dtype=torch.float32))


def test_a_mask_holds_for_both_maps():
    x = inputs()
    mask = torch.rand(2, 1, 7, 7) > 0.4
    mask[..., 0] = True
    out = call("sdpa", attn_mask=mask)(**x)
    torch.testing.assert_close(out, call("reference", attn_mask=mask)(**x), **EXACT)
    hidden = x | {name: x[name].clone() for name in ("key", "noise_key", "value")}
    seen = mask[0, 0, 5] & (torch.arange(7) <= 5)
    for name in ("key", "noise_key", "value"):
        hidden[name][0, :, ~seen] = 3.0
    torch.testing.assert_close(call("sdpa", attn_mask=mask)(**hidden)[0, :, 5], out[0, :, 5], **EXACT)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            dict(noise_query=torch.randn(2, 3, 7, 16)),
            "noise_query has 3 heads, which does not divide the 4 heads of query",
        ),
        (dict(key=torch.randn(2, 3, 7, 16)), "key has 3 heads, which does not divide the 4 heads of query"),
        (
            dict(noise_key=torch.randn(2, 4, 7, 16)),
            "noise_key has 4 heads, which does not divide the 2 heads of noise_query",
        ),
        (dict(value=torch.randn(2, 3, 7, 32)), "value has 3 heads, which does not divide the 2 heads of key"),
        (
            dict(noise_key=torch.randn(2, 2, 6, 16)),
            r"noise_key \[2, 2, 6, 16\] must have the batch and the length of key",
        ),
        (dict(key=torch.randn(2, 2, 7, 8)), "key has head_dim 8, but query has 16"),
        (dict(query=torch.randn(2, 7, 16)), r"query has shape \[2, 7, 16\]; it needs 4 axes"),
        (
            dict(value=torch.randn(2, 2, 7, 32).double()),
            "value has dtype torch.float64, but query has torch.float32",
        ),
        (dict(norm_weight=torch.ones(16)), r"norm_weight has shape \[16\]; it needs \[value_dim=32\]"),
        (
            dict(lam=torch.ones(3)),
            r"lam has shape \[3\]; it must broadcast to \[batch, signal heads, queries\] = \[2, 4, 7\]",
        ),
        (dict(window=3), "window=3 with is_causal=False"),
        (dict(attn_mask=torch.ones(2, 4, 7, 7, dtype=torch.bool)), r"it must broadcast to \[2, 1, 7, 7\]"),
        (dict(softcap=0.0), "softcap=0.0 must be positive"),
    ],
)
def test_bad_input_is_named(change, text):
    with pytest.raises((ValueError, TypeError), match=text):
        differential_attention(**(inputs(dtype=torch.float32) | change))
