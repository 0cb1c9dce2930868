"""The generalised mean: its kernels against the formula."""

from __future__ import annotations

import pytest
import torch

from undivided.ops import generalised_mean
from undivided.testing import compare_op, poison_surroundings, poisoned_empty


def inputs(tokens=13, channels=12, batch=2, device=None):
    x = torch.rand(batch, tokens, channels, dtype=torch.float64) + 0.1
    return {"x": x.to(device), "power": (4 * torch.rand(channels, dtype=torch.float64) + 0.5).to(device)}


def call(backend, **options):
    return lambda **x: generalised_mean(**x, backend=backend, **options)


def test_the_reference_is_the_formula_entry_by_entry():
    x = inputs(3, 2, 1)
    x["x"][0, 1, 0] = -4.0
    found = generalised_mean(**x, eps=0.2, backend="reference")
    for channel in range(2):
        p = float(x["power"][channel])
        entries = [max(float(entry), 0.2) ** p for entry in x["x"][0, :, channel]]
        assert float(found[0, channel]) == pytest.approx((sum(entries) / 3) ** (1 / p), rel=1e-12)


@pytest.mark.parametrize("backend", ["triton", "composed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(13, 12), (196, 70), (1, 5)], ids=str)
def test_is_as_accurate_as_the_formula(backend, dtype, shape, device):
    compare_op(call(backend), call("reference"), call("reference"), inputs(*shape, device=device), dtype)


@pytest.mark.parametrize("backend", ["triton", "composed"])
def test_tokens_behind_a_prefix_and_maps_are_read_in_place(backend, device):
    x = inputs(9, 16, device=device)["x"].float()
    power = torch.full((16,), 2.5, device=device)
    for view in (x[:, 1:], x.mT.contiguous().mT, x[:, :, ::2]):
        own = power[: view.shape[2]]
        torch.testing.assert_close(
            generalised_mean(view, own, backend=backend),
            generalised_mean(view.contiguous(), own, backend=backend),
        )


@pytest.mark.parametrize("backend", ["triton", "composed"])
def test_large_exponents_neither_overflow_nor_vanish(backend, device):
    """The formula gives inf or zero here."""
    for scale in (1e-3, 40.0):
        x = (scale * (torch.rand(2, 196, 8, device=device) + 0.1)).to(torch.float16)
        found = generalised_mean(x, torch.full((8,), 50.0, device=device), backend=backend)
        assert ((found <= x.amax(1) * 1.001) & (found >= 0.85 * x.amax(1))).all()


@pytest.mark.parametrize("backend", ["triton", "composed"])
def test_what_is_not_above_eps_has_no_gradient(backend, device):
    x = inputs(device=device)["x"].float()
    x[:, :, 0], x[:, 3, 1] = -1.0, -1.0
    x.requires_grad_()
    power = torch.full((12,), 3.0, device=device, requires_grad=True)
    out = generalised_mean(x, power, backend=backend)
    dx, dpower = torch.autograd.grad(out.sum(), (x, power))
    torch.testing.assert_close(out[:, 0], torch.full_like(out[:, 0], 1e-6))
    assert not dx[:, :, 0].any() and not dx[:, 3, 1].any() and dx[:, :3, 1].all()
    assert dpower.isfinite().all()


def test_the_kernel_writes_all_of_fresh_buffers_and_reads_nothing_else(device):
    x = {name: tensor.to(device, torch.float32) for name, tensor in inputs(70, 70).items()}

    def run(tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = call("triton")(**leaves)
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    expected = run(x)
    with poisoned_empty():
        found = run({name: poison_surroundings(tensor) for name, tensor in x.items()})
    for ours, want in zip(found, expected, strict=True):
        assert torch.equal(ours, want)


def test_masked_tokens_do_not_count():
    x = inputs()
    mask = torch.rand(2, 13) < 0.5
    mask[0, 0], mask[1] = True, False
    want = generalised_mean(x["x"][:1, mask[0]], x["power"], backend="reference")
    for backend in ("reference", "composed"):
        found = generalised_mean(**x, mask=mask, backend=backend)
        torch.testing.assert_close(found[:1], want)
        torch.testing.assert_close(found[1], torch.full_like(found[1], 1e-6))


def test_opcheck_and_one_graph(device):
    x = {name: tensor.to(device, torch.float32) for name, tensor in inputs().items()}
    tests = ("test_schema", "test_faketensor")
    arguments = (*x.values(), 1e-6)
    torch.library.opcheck(torch.ops.undivided.generalised_mean_inference, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.undivided.generalised_mean_forward, arguments, test_utils=tests)
    out, log_out = torch.ops.undivided.generalised_mean_forward(*arguments)
    arguments = (torch.randn_like(out), *x.values(), log_out, 1e-6)
    torch.library.opcheck(torch.ops.undivided.generalised_mean_backward, arguments, test_utils=tests)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    compiled = torch.compile(call("triton"), backend="aot_eager", fullgraph=True)(**leaves)
    eager = call("triton")(**leaves)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(
        *(torch.autograd.grad(o.sum(), list(leaves.values())) for o in (compiled, eager)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.pooling import triton

x, power = torch.empty(1, 197, 768, dtype=torch.bfloat16)[:, 1:], torch.empty(768)
out, log_out = triton.forward(x, power, 1e-6)
triton.backward(out, x, power, log_out, 1e-6)
"""


def test_every_kernel_compiles_for_hopper(run_python):
    names = [line.split()[0] for line in run_python(COMPILES).stdout.splitlines()]
    assert names == ["_forward_kernel", "_backward_kernel"]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(x=torch.ones(2, 3, 4).int()), TypeError, "x is of torch.int32; it must be of a floating type"),
        (dict(x=torch.ones(2, 4)), ValueError, r"x has shape \[2, 4\]; it needs 3 axes"),
        (dict(x=torch.ones(2, 0, 4)), ValueError, "x has no tokens"),
        (dict(power=torch.ones(2)), ValueError, r"power has shape \[2\]; it must be \[channels\] = \[4\]"),
        (dict(eps=0.0), ValueError, "eps=0.0 must be positive"),
        (dict(mask=torch.ones(2, 3)), TypeError, "mask is of torch.float32; it must be boolean"),
        (dict(mask=torch.ones(2, 4).bool()), ValueError, r"mask has shape \[2, 4\]; it must be \[2, 3\]"),
        (
            dict(backend="triton", mask=torch.ones(2, 3).bool()),
            ValueError,
            "cannot run this: .*mask is given",
        ),
    ],
)
def test_bad_input_is_named(change, error, text):
    x = {"x": torch.ones(2, 3, 4), "power": torch.ones(4)}
    with pytest.raises(error, match=text):
        generalised_mean(**(x | change))
