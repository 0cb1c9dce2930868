from __future__ import annotations

import math

import pytest
import torch

from tests.ops.whole_graphs import assert_compiles_whole, assert_host_never_waits
from undivided.ops import dense_attention, routed_attention
from undivided.ops.routed import BACKENDS
from undivided.testing import compare_op, poison_padding, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "small": dict(),
    "longer than a tile": dict(batch=1, queries=150, keys=150),
    "a prompt behind a cache": dict(queries=9, keys=70),
    "one query": dict(queries=1, keys=70),
    "queries that see nothing": dict(queries=21, keys=5),
    "one key head": dict(key_heads=1),
    "widths that are no powers of two": dict(head_dim=24, value_dim=40),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(
    batch=2, heads=4, key_heads=2, queries=19, keys=19, head_dim=16, value_dim=16, dtype=torch.float64, device=None
):  # fmt: skip
    def draw(heads, length, width):
        return torch.randn(batch, heads, length, width, dtype=dtype).to(device)

    return {
        "query": draw(heads, queries, head_dim),
        "key": draw(key_heads, keys, head_dim),
        "value": draw(key_heads, keys, value_dim),
        "gates": (torch.rand(batch, heads, queries, dtype=dtype) + 0.5).to(device),
    }


def chosen(x, share=0.5):
    """A random choice, but that all tokens choose the first head and none the last."""
    selected = torch.rand(x["query"].shape[:3]) < share
    selected[:, 0], selected[:, -1] = True, False
    return selected.to(x["query"].device)


def call(backend, selected, is_causal=True, **options):
    return lambda **x: routed_attention(
        **x, selected=selected, is_causal=is_causal, backend=backend, **options
    )


def test_equals_loops_over_tokens_heads_and_keys():
    x = inputs(batch=1, queries=5, keys=7, head_dim=4, value_dim=3)
    selected = chosen(x)
    out = call("reference", selected)(**x)
    for head in range(4):
        for n in range(5):
            expected = torch.zeros(3, dtype=torch.float64)
            if selected[0, head, n]:
                logits = [float(x["query"][0, head, n] @ x["key"][0, head // 2, m]) / 2 for m in range(n + 3)]
                total = sum(math.exp(logit) for logit in logits)
                for m, logit in enumerate(logits):
                    expected += math.exp(logit) / total * x["value"][0, head // 2, m]
                expected *= x["gates"][0, head, n]
            torch.testing.assert_close(out[0, head, n], expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_with_all_heads_it_is_dense_attention(backend):
    x = inputs()
    x.pop("gates")
    everything = torch.ones(4, 1, dtype=torch.bool)
    expected = dense_attention(**x, is_causal=True, backend=backend)
    torch.testing.assert_close(call(backend, everything)(**x), expected, **EXACT)


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masking_is_as_accurate_as_eager(shape, dtype):
    x = inputs(**shape)
    selected = chosen(x)
    compare_op(call("sdpa", selected), call("reference", selected), call("reference", selected), x, dtype)


@every_shape
def test_skipping_is_as_accurate_as_eager(shape, device):
    x = inputs(**shape, device=device)
    selected = chosen(x)
    reference = call("reference", selected)
    compare_op(call("triton", selected), reference, reference, x, HALF)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_skipping_in_float32(gated, is_causal, device):
    x = inputs(queries=21, keys=5, device=device)
    selected = chosen(x)
    if not gated:
        x.pop("gates")
    reference = call("reference", selected, is_causal)
    compare_op(call("triton", selected, is_causal), reference, reference, x, torch.float32)


def test_without_gradients_it_is_the_same(device):
    x = inputs(dtype=HALF, device=device)
    selected = chosen(x)
    expected = call("triton", selected)(**{name: t.clone().requires_grad_() for name, t in x.items()})
    torch.testing.assert_close(call("triton", selected)(**x), expected)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_tokens_or_none_choose_every_head(share, device):
    x = inputs(queries=37, keys=37, device=device)
    selected = torch.full((2, 4, 37), bool(share), device=device)
    reference = call("reference", selected)
    compare_op(call("triton", selected), reference, reference, x, HALF)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_pairs_not_selected_give_zeros_and_have_no_gradient(backend, device):
    x = {name: t.requires_grad_() for name, t in inputs(dtype=HALF, device=device).items()}
    selected = chosen(x)
    out = call(backend, selected)(**x)
    assert torch.equal(out[~selected], torch.zeros_like(out[~selected]))
    dquery, dgates = torch.autograd.grad(out.square().sum(), [x["query"], x["gates"]])
    assert torch.equal(dquery[~selected], torch.zeros_like(dquery[~selected]))
    assert torch.equal(dgates[~selected], torch.zeros_like(dgates[~selected]))
    assert (dgates[selected] != 0).all()


def test_the_gradient_of_a_gate_of_zero_is_that_of_its_head(device):
    x = inputs(device=device)
    x["gates"][:, :, ::3] = 0.0
    selected = chosen(x)
    reference = call("reference", selected)
    compare_op(call("triton", selected), reference, reference, x, torch.float32)


def test_lists_are_a_permutation_with_the_selected_first_and_in_order(device):
    from undivided.ops.routed.triton import RANK_STEP, build_lists

    # Longer than one block of the kernel, and with strides as a router hands them over.
    selected = (torch.rand(2, 1100, 3, device=device) < 0.4).transpose(1, 2)
    selected[0, 1] = False
    index, count, rank = build_lists(selected)
    for b in range(2):
        for h in range(3):
            expected = selected[b, h].nonzero().flatten().int()
            assert count[b, h] == len(expected)
            assert torch.equal(index[b, h, : len(expected)], expected)
            assert torch.equal(index[b, h].sort().values, torch.arange(1100, device=device).int())
    before = selected.int().cumsum(-1) - selected.int()
    assert torch.equal(rank, before[..., ::RANK_STEP].int())


def test_gradients_of_the_reference_pass_gradcheck():
    x = inputs(batch=1, heads=2, key_heads=1, queries=5, keys=5, head_dim=4, value_dim=3)
    selected = chosen(x)

    def function(*tensors):
        return call("reference", selected)(**dict(zip(x, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()])


def test_strides_surroundings_and_batch_mates_do_not_matter(device):
    x = inputs(queries=37, keys=37, dtype=HALF, device=device)
    selected = chosen(x)
    out = call("triton", selected)(**x)
    strided = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    torch.testing.assert_close(call("triton", poison_surroundings(selected))(**strided), out)
    turned = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in x.items()}
    torch.testing.assert_close(call("triton", selected)(**turned), out)
    alone = {name: tensor[1:] for name, tensor in x.items()}
    torch.testing.assert_close(call("triton", selected[1:])(**alone), out[1:])


def test_what_is_not_selected_is_not_read(device):
    x = inputs(queries=37, keys=37, dtype=HALF, device=device)
    selected = chosen(x)
    dout = torch.randn(2, 4, 37, 16, device=device)

    def run(x, dout):
        leaves = [tensor.detach().requires_grad_() for tensor in x.values()]
        out = call("triton", selected)(**dict(zip(x, leaves, strict=True)))
        return out, *torch.autograd.grad(out, leaves, dout)

    poisoned = x | {
        "query": poison_padding(x["query"], selected[..., None]),
        "gates": poison_padding(x["gates"], selected),
    }
    for fine, other in zip(
        run(x, dout), run(poisoned, poison_padding(dout, selected[..., None])), strict=True
    ):
        assert torch.equal(fine, other)


def test_everything_is_written(device):
    x = inputs(queries=37, keys=37, dtype=HALF, device=device)
    selected = chosen(x)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    with poisoned_empty():
        with torch.no_grad():
            assert call("triton", selected)(**x).isfinite().all()
        out = call("triton", selected)(**leaves)
        for name, gradient in zip(x, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True):
            assert gradient.isfinite().all(), name


def test_gradients_have_the_same_bits_in_every_run(device):
    x = {
        name: tensor.requires_grad_()
        for name, tensor in inputs(queries=37, keys=37, dtype=HALF, device=device).items()
    }
    function = call("triton", chosen(x))
    once, twice = (torch.autograd.grad(function(**x).square().sum(), list(x.values())) for _ in range(2))
    for name, first, second in zip(x, once, twice, strict=True):
        assert torch.equal(first, second), name


def test_the_output_lies_as_an_output_projection_reads_it(device):
    x = inputs(dtype=HALF, device=device)
    assert call("triton", chosen(x))(**x).transpose(1, 2).is_contiguous()


def test_operators_pass_opcheck(device):
    from undivided.ops.routed import autograd, triton

    assert autograd.RANK_STEP == triton.RANK_STEP
    x = inputs(dtype=HALF, device=device)
    heads = (x["query"], x["key"], x["value"])
    tests = ("test_schema", "test_faketensor")
    for gates in (x["gates"], None):
        arguments = (*heads, chosen(x), gates, True, 0.25)
        torch.library.opcheck(torch.ops.undivided.routed_inference, arguments, test_utils=tests)
        torch.library.opcheck(torch.ops.undivided.routed_forward, arguments, test_utils=tests)
        out, unscaled, *lists = torch.ops.undivided.routed_forward(*arguments)
        arguments = (
            torch.randn_like(out), out if gates is None else unscaled, *lists, *heads, gates, True, 0.25
        )  # fmt: skip
        torch.library.opcheck(torch.ops.undivided.routed_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_compiles_into_one_graph(backend, device):
    x = {name: t.requires_grad_() for name, t in inputs(dtype=HALF, device=device).items()}
    function = call(backend, chosen(x))
    assert_compiles_whole(function, x)


@pytest.mark.gpu
def test_the_host_never_waits():
    x = {
        name: tensor.requires_grad_() for name, tensor in inputs(dtype=torch.bfloat16, device="cuda").items()
    }
    assert_host_never_waits(call("triton", chosen(x)), x)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.routed import backward, triton as forward

for width in (64, 128):
    query, key, value = (torch.empty(1, heads, 512, width, dtype=torch.bfloat16) for heads in (8, 2, 2))
    selected, gates = torch.ones(1, 8, 512, dtype=torch.bool), torch.ones(1, 8, 512)
    out, unscaled, *lists = forward.forward(query, key, value, selected, gates, True, 0.1)
    backward.backward(out, unscaled, *lists, query, key, value, gates, True, 0.1)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_list_kernel", "_forward_kernel", "_query_kernel", "_key_kernel"
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_tilings_fit_smaller_devices():
    from undivided.ops._flash import forward_tiling
    from undivided.ops.routed.backward import key_tiling, query_tiling

    for choose in (forward_tiling, query_tiling, key_tiling):
        for width in (64, 128, 256):
            for element_size in (2, 4):
                hopper = choose(width, width, element_size, 227 * 1024)
                small = choose(width, width, element_size, 99 * 1024)
                assert min(small.rows, small.keys) * 2 * width * element_size <= 99 * 1024
                assert small.rows * small.keys <= hopper.rows * hopper.keys


def test_every_backend_but_the_reference_says_what_it_cannot_do():
    x = inputs(keys=0)
    for backend in BACKENDS:
        if backend.name != "reference":
            with pytest.raises(
                ValueError, match=f'backend "{backend.name}" cannot run this: .*Able: "reference"'
            ):
                call(backend.name, chosen(x))(**x)
    assert torch.equal(call("auto", chosen(x))(**x), torch.zeros(2, 4, 19, 16, dtype=torch.float64))


def test_kernels_refuse_masks_other_than_causal():
    x = inputs(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"attn_mask is given \(the kernels know is_causal only\)"):
        call("triton", chosen(x), attn_mask=torch.ones(19, 19, dtype=torch.bool))(**x)
    with pytest.raises(ValueError, match="scale is -1.0"):
        call("triton", chosen(x), scale=-1.0)(**x)


def test_a_mask_and_a_cap_hold_beside_the_choice():
    x = inputs()
    selected, mask = chosen(x), torch.rand(2, 1, 19, 19) > 0.4
    masked = call("sdpa", selected, attn_mask=mask)(**x)
    torch.testing.assert_close(masked, call("reference", selected, attn_mask=mask)(**x), **EXACT)
    dense = dense_attention(
        x["query"], x["key"], x["value"], attn_mask=mask, is_causal=True, softcap=2.0, backend="reference"
    )
    expected = dense * (x["gates"] * selected)[..., None]
    capped = call("reference", selected, attn_mask=mask, softcap=2.0)(**x)
    torch.testing.assert_close(capped, expected, **EXACT)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(selected=torch.ones(2, 4, 19)), "selected has dtype torch.float32; it must be torch.bool"),
        (
            dict(selected=torch.ones(2, 3, 19, dtype=torch.bool)),
            r"selected has shape \[2, 3, 19\]; it must broadcast to \[batch, heads, queries\] = \[2, 4, 19\]",
        ),
        (dict(gates=torch.ones(5)), r"gates has shape \[5\]; it must broadcast to"),
        (dict(gates=torch.ones(19, dtype=torch.int64)), "gates has dtype torch.int64"),
        (
            dict(key=torch.randn(2, 3, 19, 16), value=torch.randn(2, 3, 19, 16)),
            "key has 3 heads, which does not divide",
        ),
        (dict(key=torch.randn(2, 2, 19, 8)), "key has head_dim 8, but query has 16"),
        (dict(value=torch.randn(2, 2, 18, 16)), r"value \[2, 2, 18, 16\] must share"),
        (dict(query=torch.randn(2, 19, 16)), r"query has shape \[2, 19, 16\]; it needs 4 axes"),
        (dict(softcap=0.0), "softcap=0.0 must be positive"),
    ],
)
def test_bad_input_is_named(change, text):
    x = inputs(dtype=torch.float32)
    with pytest.raises((ValueError, TypeError), match=text):
        routed_attention(**(x | {"selected": chosen(x)} | change))
