from __future__ import annotations

import pytest
import torch

from undivided.layers.rala import axial_rotary
from undivided.ops import linear_attention
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
OPTIONS = {
    "RALA": dict(key_weight="context", rotate=True, local=True, modulation=True),
    "plain": dict(),
    "weights alone": dict(key_weight="context"),
    "without a denominator": dict(normalize=False, feature_map="identity", local=True),
    "softplus, rotated": dict(feature_map="softplus", rotate=True, modulation=True),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def case(
    rotate=False, local=False, modulation=False, batch=2, heads=2, size=(5, 15), dim=16, value_dim=24, device=None,
    dtype=torch.float64, **options,
):  # fmt: skip
    """Returns tensors by name, and a function of a backend that attends with the options."""
    tokens = size[0] * size[1]
    widths = {"query": dim, "key": dim, "value": value_dim}
    widths |= {name: value_dim for name, given in (("local", local), ("modulation", modulation)) if given}
    x = {
        name: torch.randn(batch, tokens, heads, width, dtype=dtype).to(device).transpose(1, 2)
        for name, width in widths.items()
    }
    if rotate:
        options["cos"], options["sin"] = axial_rotary(size, dim, device, torch.float64)
    return x, lambda backend: lambda **given: linear_attention(**given, **options, backend=backend)


@every_option
def test_as_accurate_as_the_definition(options, device):
    x, attend = case(**options, device=device)
    compare_op(attend("triton"), attend("reference"), attend("reference"), x, HALF)


def test_float32_is_as_accurate_as_the_definition(device):
    x, attend = case(**OPTIONS["RALA"], device=device)
    compare_op(attend("triton"), attend("reference"), attend("reference"), x, torch.float32)


@pytest.mark.parametrize(
    "sizes", [dict(size=(1, 1)), dict(size=(1, 70), dim=20, value_dim=56), dict(size=(8, 16))]
)
def test_any_number_of_tokens_and_any_width(sizes, device):
    x, attend = case(**OPTIONS["RALA"], **sizes, batch=1, device=device)
    compare_op(attend("triton"), attend("reference"), attend("reference"), x, torch.float32, grad_inputs=())


def test_queries_may_be_more_or_fewer_than_keys(device):
    x, attend = case(key_weight="context", dtype=torch.float32, device=device)
    for chosen in (x["query"][:, :, :3], x["query"].repeat(1, 1, 2, 1)):
        other = x | {"query": chosen}
        torch.testing.assert_close(
            attend("triton")(**other), attend("composed")(**other), rtol=1e-5, atol=1e-5
        )


def test_shares_of_the_keys_do_not_matter(device):
    from undivided.ops.linear.triton import forward

    x, attend = case(
        batch=1, heads=1, size=(1, 150), key_weight="context", dtype=torch.float32, device=device
    )
    # Weights that differ by e ** 30, so that every share has another maximum.
    x["key"] = x["key"] + 4 * torch.arange(150, device=device)[:, None] / 150
    want = attend("composed")(**x)
    for programs in (1, 2, 64):
        found = forward(
            *x.values(), "elu1", True, 0.25, None, None, None, None, True, 1e-6, programs=programs, tile=32
        )
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_shares_of_the_tokens_do_not_matter_to_gradients(device):
    from undivided.ops.linear.backward import backward

    x, attend = case(**OPTIONS["RALA"], batch=1, heads=1, size=(10, 9), dtype=torch.float32, device=device)
    dout = torch.randn_like(x["value"])
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    want = torch.autograd.grad(attend("composed")(**leaves), list(leaves.values()), dout)
    tables = axial_rotary((10, 9), 16, device)
    for programs in (1, 2, 64):
        found = backward(dout, *x.values(), *tables, "elu1", True, 0.25, True, 1e-6, programs=programs)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_very_negative_features_still_have_a_mean(device):
    x, attend = case(dtype=torch.float32, device=device)
    x["key"] = x["key"] - 40
    out = linear_attention(**x, eps=0.0, backend="triton")
    torch.testing.assert_close(out, linear_attention(**x, eps=0.0, backend="composed"), rtol=1e-4, atol=1e-4)


def gradients(attend, x, dout):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    out = attend("triton")(**leaves)
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), dout)


def test_strides_surroundings_and_batch_mates_do_not_matter(device):
    x, attend = case(**OPTIONS["RALA"], dtype=HALF, device=device)
    dout = torch.randn_like(x["value"])
    found = gradients(attend, x, dout)
    strided = gradients(attend, {n: poison_surroundings(t) for n, t in x.items()}, poison_surroundings(dout))
    alone = gradients(attend, {n: t[1:] for n, t in x.items()}, dout[1:])
    assert torch.equal(strided[0], found[0]) and torch.equal(alone[0], found[0][1:])
    for others, mine in ((strided, found), (alone, [tensor[1:] for tensor in found])):
        for other, own in zip(others, mine, strict=True):
            torch.testing.assert_close(other, own)


def test_everything_is_written_and_has_the_same_bits_in_every_run(device):
    x, attend = case(**OPTIONS["RALA"], dtype=HALF, device=device)
    with poisoned_empty():
        once = attend("triton")(**x)
    assert once.isfinite().all() and torch.equal(once, attend("triton")(**x))
    assert once.transpose(1, 2).is_contiguous()


def test_operators_pass_opcheck(device):
    x, _ = case(**OPTIONS["RALA"], dtype=HALF, device=device)
    cos, sin = axial_rotary((5, 15), 16, device)
    tests = ("test_schema", "test_faketensor")
    for local, tables in ((x["local"], (cos, sin)), (None, (None, None))):
        arguments = (
            x["query"],
            x["key"],
            x["value"],
            local,
            x["modulation"],
            *tables,
            "elu1",
            True,
            0.25,
            True,
            1e-6,
        )
        torch.library.opcheck(torch.ops.undivided.linear_attention_forward, arguments, test_utils=tests)
        dout = torch.randn_like(x["value"])
        arguments = (dout, *arguments)
        torch.library.opcheck(torch.ops.undivided.linear_attention_backward, arguments, test_utils=tests)


def test_compiles_into_one_graph(device):
    x, attend = case(**OPTIONS["RALA"], dtype=HALF, device=device)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    torch._dynamo.reset()
    compiled = torch.compile(attend("triton"), fullgraph=True, backend="aot_eager")(**leaves)
    eager = attend("triton")(**leaves)
    torch.testing.assert_close(compiled, eager)
    found, want = (torch.autograd.grad(out.sum(), list(leaves.values())) for out in (compiled, eager))
    torch.testing.assert_close(found, want)


@pytest.mark.gpu
def test_the_host_never_waits():
    x, attend = case(**OPTIONS["RALA"], dtype=torch.bfloat16, device="cuda")
    want = attend("triton")(**x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend("triton")(**x)
    graph.replay()
    assert torch.equal(found, want)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.linear import backward, triton

x = [torch.empty(1, 2, 256, 96, dtype=torch.bfloat16) for _ in range(6)]
tables = [torch.empty(256, 48) for _ in range(2)]
triton.forward(*x[:3], "elu1", True, 0.1, *tables, *x[3:5], True, 1e-6)
backward.backward(x[5], *x[:5], *tables, "elu1", True, 0.1, True, 1e-6)
# Narrow heads, without rotation, local term and modulation.
query, key = (torch.empty(1, 2, 75, 16, dtype=torch.bfloat16) for _ in range(2))
value, dout = (torch.empty(1, 2, 75, 24, dtype=torch.bfloat16) for _ in range(2))
for weights in (False, True):
    tensors = (query, key, value, None, None, None, None)
    backward.backward(dout, *tensors, "elu1", weights, 0.1, True, 1e-6)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    forward = {"_mean_kernel", "_buffer_kernel", "_sum_kernel", "_out_kernel"}
    backward = {"_buffer_gradient_kernel", "_key_gradient_kernel", "_query_gradient_kernel"}
    assert {name for name, _ in lines} == forward | backward
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(key_weight=torch.ones(75)), "key_weight is a tensor"),
        (dict(token_mask=torch.ones(2, 75, dtype=torch.bool)), "token_mask is given"),
        (dict(value=torch.zeros(2, 2, 75, 72)), r"the last axis of value is 72 \(at most 64\)"),
        (
            dict(query=torch.zeros(2, 2, 75, 15), key=torch.zeros(2, 2, 75, 15)),
            r"head_dim is 15 \(the kernels need",
        ),
    ],
)
def test_the_kernels_say_what_they_cannot_do(change, text):
    x, _ = case(dtype=torch.float32)
    with pytest.raises(ValueError, match=f'backend "triton" cannot run this: .*{text}.*Able: "composed"'):
        linear_attention(**(x | change), backend="triton")


@pytest.mark.gpu
def test_many_tokens_do_not_overflow_half_precision():
    x, attend = case(**OPTIONS["RALA"], batch=1, heads=1, size=(256, 256), dtype=torch.float64, device="cuda")
    compare_op(attend("triton"), attend("composed"), attend("composed"), x, torch.float16)
