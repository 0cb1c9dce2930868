"""Gaussian gates: the kernels and the one Gaussian against the product of densities, and what must hold of it."""

from __future__ import annotations

import pytest
import torch

from undivided.ops.gaussian import gaussian_gate, gaussian_weights, split
from undivided.testing import compare_op, poisoned_empty

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def inputs(shape=(2, 3, 70, 5), gaussians=4, device="cpu"):
    def draw(*size):
        return torch.randn(*size, dtype=torch.float64, device=device)

    return {
        "x": draw(*shape),
        "offset": 0.3 * draw(shape[1], gaussians),
        "width": 1 + draw(shape[1], gaussians).square(),
    }


def gate(backend):
    return lambda x, offset, width: gaussian_gate(x, offset, width, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "composed"])
@pytest.mark.parametrize("shape", [(2, 3, 70, 5), (16, 8, 2, 1), (1, 2, 64, 33), (3, 1, 129, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_as_accurate_as_eager(backend, shape, dtype, device):
    with poisoned_empty():
        compare_op(gate(backend), gate("reference"), gate("reference"), inputs(shape, device=device), dtype)


@pytest.mark.parametrize("most", [64, 2])
def test_parts_of_a_long_axis_are_as_accurate_as_eager(most, device, monkeypatch):
    monkeypatch.setattr(split, "_PART", 64)
    monkeypatch.setattr(split, "_MOST", most)
    for shape, dtype in (((2, 3, 257, 7), torch.float32), ((1, 2, 300, 70), torch.float16)):
        x = inputs(shape, device=device)
        x["x"] = 2 * x["x"] + 1
        with poisoned_empty():
            compare_op(gate("triton"), gate("reference"), gate("reference"), x, dtype)


def test_gradients_of_the_reference_are_those_of_differences():
    x = inputs((1, 2, 5, 2), gaussians=2)
    assert torch.autograd.gradcheck(gate("reference"), tuple(t.requires_grad_() for t in x.values()))
    assert torch.autograd.gradcheck(gate("composed"), tuple(x.values()))


def test_weights_sum_to_one_and_gate():
    x = inputs()
    weights = gaussian_weights(**x)
    torch.testing.assert_close(weights.sum(2), torch.ones_like(weights[:, :, 0]))
    torch.testing.assert_close(gaussian_gate(**x), x["x"] * weights, **EXACT)


def test_equal_densities_are_one_that_is_narrower():
    x = inputs(gaussians=1)
    many = {name: t.expand(-1, 9) for name, t in x.items() if name != "x"}
    one = gaussian_weights(x["x"], x["offset"], x["width"] / 3)
    torch.testing.assert_close(gaussian_weights(x["x"], **many), one, **EXACT)


def test_a_product_is_one_density_of_the_mean_weighed_by_precision():
    x = inputs()
    precision = x["width"].square().reciprocal()
    width = precision.sum(1, keepdim=True).rsqrt()
    offset = (precision * x["offset"]).sum(1, keepdim=True) / precision.sum(1, keepdim=True)
    torch.testing.assert_close(gaussian_weights(x["x"], offset, width), gaussian_weights(**x), **EXACT)


def test_shifts_and_scales():
    x = inputs()
    base = gaussian_weights(**x, eps=0.0)
    torch.testing.assert_close(gaussian_weights(x["x"] + 7, x["offset"], x["width"], eps=0.0), base)
    torch.testing.assert_close(gaussian_weights(3 * x["x"], 3 * x["offset"], x["width"], eps=0.0), base)
    with torch.no_grad():
        wide = gaussian_gate(x["x"], x["offset"], 1e6 * x["width"])
    torch.testing.assert_close(wide, x["x"] / 70, rtol=1e-6, atol=1e-8)


def test_narrow_densities_do_not_vanish_in_half_precision(device):
    x = torch.randn(1, 1, 40, 3, device=device).half()
    offset, width = torch.full((1, 1), 3.0, device=device), torch.full((1, 1), 0.02, device=device)
    for backend in ("triton", "composed", "reference"):
        out = gaussian_gate(x, offset.half(), width.half(), backend=backend)
        assert out.isfinite().all() and out.abs().sum() > 0, backend


def test_is_registered_and_compiles():
    x = {name: t.float() for name, t in inputs((1, 2, 9, 3)).items()}
    from undivided.ops.gaussian.composed import product

    precision, moment = product(x["offset"], x["width"])
    arguments = (x["x"], precision, moment, 1e-8)
    torch.library.opcheck(torch.ops.undivided.gaussian_forward, arguments)
    out, saved = torch.ops.undivided.gaussian_forward(*arguments)
    torch.library.opcheck(
        torch.ops.undivided.gaussian_backward, (out, x["x"], precision, moment, saved, 1e-8)
    )
    compiled = torch.compile(gate("auto"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**x), gate("auto")(**x))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.randn(2, 3, 4)}, r"x \[2, 3, 4\] must be \[outer, heads, length, inner\]"),
        ({"x": torch.randn(1, 3, 1, 2)}, "has length 1; the variance of one value is not defined"),
        ({"offset": torch.randn(3, 2)}, r"must both be \[3, gaussians\]"),
        ({"x": torch.ones(1, 3, 4, 2, dtype=torch.int64)}, "x has dtype torch.int64; it must be floating"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    with pytest.raises((ValueError, TypeError), match=text):
        gaussian_gate(**(inputs((1, 3, 8, 2)) | change))
