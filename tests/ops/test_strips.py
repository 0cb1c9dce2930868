"""Attention by strips: its kernels against the formula, in both memory formats."""

from __future__ import annotations

import pytest
import torch

from undivided.ops import strip_attention
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

FORMATS = {"nchw": torch.contiguous_format, "channels last": torch.channels_last}
CASES = {
    "depthwise": dict(shape=(2, 8, 5, 7), conv_groups=8, norm_groups=2),
    "mixed channels, circular, residual": dict(
        shape=(1, 8, 5, 4), conv_groups=2, norm_groups=4, taps=3, is_circular=True, residual=True
    ),
    "one row": dict(shape=(2, 8, 1, 6), conv_groups=8, norm_groups=2),
    "several tiles": dict(shape=(1, 70, 8, 12), conv_groups=70, norm_groups=2),
    "many channels a group": dict(shape=(1, 128, 4, 3), conv_groups=128, norm_groups=2),
    "higher than a tile": dict(shape=(1, 2, 70, 66), conv_groups=2, norm_groups=1),
}


def case(
    shape, conv_groups, norm_groups, taps=5, is_circular=False, residual=False, layout=None, device=None
):
    """The tensors, and a call of a backend with the options."""
    channels = shape[1]
    tensors = {"x": torch.randn(shape, dtype=torch.float64)}
    for which in ("rows", "columns"):
        tensors[f"{which}_conv"] = 0.3 * torch.randn(
            channels, channels // conv_groups, taps, dtype=torch.float64
        )
        tensors[f"{which}_norm"] = torch.rand(channels, dtype=torch.float64) + 0.5
        tensors[f"{which}_bias"] = torch.randn(channels, dtype=torch.float64)

    def call(backend):
        def run(x, **weights):
            own = [
                tuple(weights[f"{which}_{name}"] for name in ("conv", "norm", "bias"))
                for which in ("rows", "columns")
            ]
            return strip_attention(
                x if layout is None else x.contiguous(memory_format=layout), *own, conv_groups=conv_groups,
                norm_groups=norm_groups, is_circular=is_circular, residual=residual, backend=backend,
            )  # fmt: skip

        return run

    return {name: tensor.to(device) for name, tensor in tensors.items()}, call


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_are_as_accurate_as_the_formula(options, layout, dtype, device):
    x, call = case(**options, layout=layout, device=device)
    compare_op(call("triton"), call("reference"), call("reference"), x, dtype)


@pytest.mark.parametrize("largest", [64, 16], ids=["normed by a kernel", "normed by torch"])
def test_a_norm_too_large_for_one_program_takes_a_launch_a_step(largest, device, monkeypatch):
    from undivided.ops.strips import triton

    x, call = case(**CASES["depthwise"], device=device)
    monkeypatch.setattr(triton, "_LARGEST_FUSED", 16)
    monkeypatch.setattr(triton, "_LARGEST_GROUP", largest)
    compare_op(call("triton"), call("reference"), call("reference"), x, torch.float32)


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS)
def test_the_output_has_the_memory_format_of_the_map(layout, device):
    x, call = case(**CASES["several tiles"], layout=layout, device=device)
    x = {name: tensor.half() for name, tensor in x.items()}
    assert call("triton")(**x).is_contiguous(memory_format=layout)


def test_maps_that_lie_anyhow_are_read_in_place(device):
    x, call = case(**CASES["depthwise"], device=device)
    x = {name: tensor.float() for name, tensor in x.items()}
    want = call("triton")(**x)
    for view in (
        x["x"].repeat(1, 1, 1, 2)[..., :7],
        x["x"].mT.contiguous().mT,
        x["x"].transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not view.is_contiguous()
        torch.testing.assert_close(call("triton")(**x | {"x": view}), want)


def test_a_gradient_that_lies_otherwise_than_the_map(device):
    x, call = case(**CASES["depthwise"], layout=torch.channels_last, device=device)
    leaves = [tensor.float().requires_grad_() for tensor in x.values()]
    of = lambda backend, reduce: torch.autograd.grad(  # noqa: E731
        reduce(call(backend)(**dict(zip(x, leaves, strict=True)))), leaves
    )
    for reduce in (torch.sum, lambda out: (out.contiguous() * torch.arange(7.0, device=out.device)).sum()):
        for ours, want in zip(of("triton", reduce), of("composed", reduce), strict=True):
            torch.testing.assert_close(ours, want)


def test_the_kernels_write_all_of_fresh_buffers_and_read_nothing_else(device):
    x, call = case(**CASES["several tiles"], device=device)
    x = {name: tensor.float() for name, tensor in x.items()}

    def run(tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = call("triton")(**leaves)
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    expected = run(x)
    with poisoned_empty():
        found = run({name: poison_surroundings(tensor) for name, tensor in x.items()})
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, want)


def test_autocast_around_the_backward_pass_changes_nothing(device):
    x, call = case(**CASES["depthwise"], device=device)
    leaves = [tensor.float().requires_grad_() for tensor in x.values()]
    found = []
    for enabled in (True, False):
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=enabled):
            out = call("triton")(**dict(zip(x, leaves, strict=True)))
            found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, want in zip(*found, strict=True):
        torch.testing.assert_close(ours, want)


def test_one_graph_under_torch_compile(device):
    x, call = case(**CASES["depthwise"], device=device)
    leaves = {name: tensor.float().requires_grad_() for name, tensor in x.items()}
    compiled = torch.compile(call("triton"), backend="aot_eager", fullgraph=True)(**leaves)
    eager = call("triton")(**leaves)
    torch.testing.assert_close(compiled, eager)
    found, want = (
        torch.autograd.grad(out.square().sum(), list(leaves.values())) for out in (compiled, eager)
    )
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_opcheck(device):
    x, _ = case(**CASES["depthwise"], device=device)
    x = {name: tensor.float() for name, tensor in x.items()}
    ops, tests = torch.ops.undivided, ("test_schema", "test_faketensor")

    def check(op, *arguments):
        torch.library.opcheck(op, arguments, test_utils=tests)
        return op(*arguments)

    strips = check(ops.strip_means, x["x"])
    weights = [x[f"rows_{name}"] for name in ("conv", "norm", "bias")]
    gates = [check(ops.strip_gate, strip, *weights, 8, 2, 1e-5, False, torch.float32) for strip in strips]
    out = check(ops.strip_products, x["x"], *gates, False)
    check(ops.strip_gate_gradients, out, x["x"], *gates)
    check(ops.strip_map_gradient, out, *gates, *strips, True, x["x"])


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.strips import triton

x = torch.empty(1, 256, 14, 14, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
rows, columns = triton.strip_means(x)
weights = torch.empty(256, 8, 7), torch.empty(256), torch.empty(256)
gate = triton.strip_gate(rows, *weights, 32, 16, 1e-5, False, torch.bfloat16)
triton.products(x, gate, gate, False)
triton.gate_gradients(x, x, gate, gate)
triton.map_gradient(x, gate, gate, rows, columns, False, x)
"""


def test_every_kernel_compiles_for_hopper(run_python):
    names = {line.split()[0] for line in run_python(COMPILES).stdout.splitlines()}
    assert names == {"_sum_kernel", "_gate_kernel", "_product_kernel"}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (dict(x=torch.ones(4, 5, 6)), ValueError, r"x has shape \[4, 5, 6\]; it needs 4 axes"),
        (dict(conv_groups=3), ValueError, "conv_groups=3 does not divide the 4 channels of x"),
        (dict(norm_groups=0), ValueError, "norm_groups=0 does not divide"),
        (dict(x=torch.ones(1, 4, 5, 6).int()), TypeError, "a tensor of x and weights is of torch.int32"),
        (
            dict(weights=(torch.ones(4, 1, 4), torch.ones(4), torch.ones(4))),
            ValueError,
            r"weights\[0\] has shape \[4, 1, 4\]; it must be \[4, 1, taps\] with odd taps",
        ),
        (
            dict(column_weights=(torch.ones(4, 1, 3), torch.ones(4), torch.ones(3))),
            ValueError,
            r"column_weights\[2\] has shape \[3\]; it must be \[4\]",
        ),
        (dict(weights=(torch.ones(4, 1, 3),)), ValueError, "weights has 1 tensors; it needs 3"),
        (
            dict(weights=(torch.ones(4, 1, 13), torch.ones(4), torch.ones(4)), is_circular=True),
            ValueError,
            "a strip has 5 positions; with is_circular it needs 6",
        ),
        (
            dict(x=torch.ones(1, 4, 5, 6).double(), backend="triton"),
            ValueError,
            'backend "triton" cannot run this: .*x is float64.*Able: "composed", "reference"',
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(change, error, text):
    weights = (torch.ones(4, 1, 3), torch.ones(4), torch.ones(4))
    arguments = {"x": torch.ones(1, 4, 5, 6), "weights": weights, "conv_groups": 4, "norm_groups": 2} | change
    with pytest.raises(error, match=text):
        strip_attention(**arguments)
