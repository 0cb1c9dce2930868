from __future__ import annotations

import pytest
import torch

from undivided.ops import gated_scan
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "less than a chunk": dict(batch=1, length=37),
    "chunks and a rest": dict(batch=1, heads=1, length=130),
    "whole chunks": dict(batch=1, heads=1, length=128),
    "one token": dict(length=1),
    "from the start alone": dict(batch=1, length=70, both=False),
    "widths that are no powers of two": dict(batch=1, heads=1, length=66, head_dim=24, value_dim=40),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(
    batch=2, heads=2, length=37, head_dim=16, value_dim=16, gate=-0.2, both=True, dtype=torch.float64, device=None
):  # fmt: skip
    """Gates are drawn between `gate` and 0.01 of it."""

    def draw(width):
        return torch.randn(batch, length, heads, width, dtype=dtype).to(device).transpose(1, 2)

    def gates():
        drawn = gate * (0.01 + 0.99 * torch.rand(batch, length, heads, head_dim, dtype=dtype))
        return drawn.to(device).transpose(1, 2)

    x = {"query": draw(head_dim), "key": draw(head_dim), "value": draw(value_dim), "log_gate": gates()}
    return x | {"reverse_log_gate": gates()} if both else x


def call(backend, **options):
    return lambda **x: gated_scan(**x, backend=backend, **options)


def compare(x, dtype):
    """Against the eager form; in float32 gradients of gates, differences of a chunk's sums, are rounded more."""
    functions = call("triton"), call("chunked"), call("chunked")
    if dtype == torch.float32:
        compare_op(*functions, x, dtype, [name for name in x if "gate" not in name])
    compare_op(*functions, x, dtype, factor=16.0 if dtype == torch.float32 else 2.0)


def gradients(x, dout=None):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    out = call("triton")(**leaves)
    loss = out.float().square().sum() if dout is None else (out * dout).sum()
    return out.detach(), *torch.autograd.grad(loss, list(leaves.values()))


@every_shape
def test_as_accurate_as_eager_products(shape, device):
    compare(inputs(**shape, device=device), HALF)


def test_float32_is_as_accurate_as_eager_products(device):
    compare(inputs(**SHAPES["chunks and a rest"], device=device), torch.float32)


@pytest.mark.parametrize("gate", [-1e-4, -0.5, -5.0, -60.0])
def test_gates_of_any_strength_are_as_accurate(gate, device):
    compare(inputs(batch=1, heads=1, length=24, gate=gate, device=device), torch.float32)


def test_strong_and_weak_gates_side_by_side(device):
    x = inputs(batch=1, heads=1, length=70, gate=-1.0, device=device)
    strength = torch.tensor([1e-4, 0.04, 5.0, 60.0], dtype=torch.float64, device=device).repeat(4)
    # The second of two chunks alone is strong, in one direction.
    x["log_gate"] = x["log_gate"] * strength
    x["log_gate"][:, :, :64] *= 1e-3
    x["reverse_log_gate"] = x["reverse_log_gate"] * 0.04
    compare(x, torch.float32)


def test_products_and_recurrence_agree_at_their_border(device):
    # Half a chunk forgets by 2 ** -20: a little less takes one way through the kernels, a little more the other.
    border = -20 * torch.log(torch.tensor(2.0)).item() / 32
    x = inputs(batch=1, heads=1, length=64, dtype=torch.float32, device=device)
    found = []
    for factor in (1 - 1e-6, 1 + 1e-6):
        gates = torch.full_like(x["log_gate"], factor * border)
        found.append(gradients(x | {"log_gate": gates, "reverse_log_gate": gates}))
    for less, more in zip(*found, strict=True):
        torch.testing.assert_close(less, more, rtol=1e-4, atol=1e-4)


def test_a_gate_that_forgets_everything_leaves_the_token_itself(device):
    x = inputs(batch=1, heads=1, dtype=torch.float32, device=device)
    never = torch.full_like(x["log_gate"], -float("inf"))
    x |= {"log_gate": never, "reverse_log_gate": never}
    own = (x["query"] * x["key"]).sum(-1, keepdim=True) * x["value"]
    torch.testing.assert_close(call("triton", scale=1.0)(**x), own)
    for gradient in gradients(x):
        assert gradient.isfinite().all()


def test_one_direction_is_causal(device):
    x = inputs(batch=1, heads=1, length=130, both=False, dtype=torch.float32, device=device)
    changed = {name: tensor.clone() for name, tensor in x.items()}
    for tensor in changed.values():
        tensor[:, :, 70:] = -1.0
    torch.testing.assert_close(call("triton")(**x)[:, :, :70], call("triton")(**changed)[:, :, :70])


def test_turning_the_sequence_and_exchanging_the_gates_turns_the_output(device):
    x = inputs(batch=1, heads=1, length=90, dtype=torch.float32, device=device)
    query, key, value, reverse, forward = (
        x[name].flip(2) for name in ("query", "key", "value", "reverse_log_gate", "log_gate")
    )
    other = gated_scan(query, key, value, reverse, reverse_log_gate=forward, backend="triton")
    torch.testing.assert_close(other.flip(2), call("triton")(**x), rtol=1e-5, atol=1e-5)


def test_strides_surroundings_and_batch_mates_do_not_matter(device):
    x = inputs(heads=1, length=40, dtype=HALF, device=device)
    dout = torch.randn_like(x["value"])
    found = gradients(x, dout)
    strided = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    alone = {name: tensor[1:] for name, tensor in x.items()}
    by_head = {name: tensor.contiguous() for name, tensor in x.items()}
    for others, mine in (
        (gradients(strided, poison_surroundings(dout)), found),
        (gradients(by_head, dout), found),
        (gradients(alone, dout[1:]), [tensor[1:] for tensor in found]),
    ):
        for other, own in zip(others, mine, strict=True):
            assert torch.equal(other, own)


def test_everything_is_written_and_has_the_same_bits_in_every_run(device):
    x = inputs(batch=1, heads=1, length=70, dtype=HALF, device=device)
    with poisoned_empty():
        once = gradients(x)
    for first, second in zip(once, gradients(x), strict=True):
        assert first.isfinite().all() and torch.equal(first, second)


def test_the_output_lies_as_an_output_projection_reads_it(device):
    assert call("triton")(**inputs(dtype=HALF, device=device)).transpose(1, 2).is_contiguous()


def test_operators_pass_opcheck(device):
    x = inputs(dtype=HALF, device=device)
    tests = ("test_schema", "test_faketensor")
    for reverse in (x["reverse_log_gate"], None):
        arguments = (x["query"], x["key"], x["value"], x["log_gate"], reverse, 0.25)
        torch.library.opcheck(torch.ops.undivided.gated_scan_forward, arguments, test_utils=tests)
        dout = torch.randn_like(x["value"])
        torch.library.opcheck(torch.ops.undivided.gated_scan_backward, (dout, *arguments), test_utils=tests)


def test_compiles_into_one_graph(device):
    x = {name: t.requires_grad_() for name, t in inputs(dtype=HALF, device=device).items()}
    eager = call("triton")(**x)
    torch._dynamo.reset()
    compiled = torch.compile(call("triton"), fullgraph=True, backend="aot_eager")(**x)
    torch.testing.assert_close(compiled, eager)
    found, want = (torch.autograd.grad(out.sum(), list(x.values())) for out in (compiled, eager))
    torch.testing.assert_close(found, want)


@pytest.mark.gpu
def test_the_host_never_waits():
    x = inputs(length=130, dtype=torch.bfloat16, device="cuda")
    gradients(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(x)
    graph.replay()
    for ours, theirs in zip(found, gradients(x), strict=True):
        assert torch.equal(ours, theirs)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.scan import backward, triton as forward

query, key, value = (torch.empty(1, 3, 256, width, dtype=torch.bfloat16) for width in (32, 32, 64))
gates = [torch.empty(1, 3, 256, 32) for _ in range(2)]
forward.forward(query, key, value, *gates, 0.1)
backward.backward(value, query, key, value, *gates, 0.1)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {"_state_kernel", "_out_kernel", "_gradient_kernel"}
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(initial_state=torch.zeros(2, 2, 16, 16), reverse_log_gate=None), "initial_state is given"),
        (dict(return_state=True, reverse_log_gate=None), "return_state is given"),
        (dict(query=torch.zeros(2, 2, 37, 72), key=torch.zeros(2, 2, 37, 72), log_gate=torch.zeros(2, 2, 37, 72),
              reverse_log_gate=None), r"the last axis of query is 72 \(at most 64\)"),
        (dict(log_gate=torch.zeros(2, 2, 37, 16, dtype=torch.float64)), "log_gate is float64"),
    ],
)  # fmt: skip
def test_the_kernels_say_what_they_cannot_do(change, text):
    with pytest.raises(
        ValueError, match=f'backend "triton" cannot run this: .*{text}.*Able: "chunked", "reference"'
    ):
        call("triton")(**(inputs(dtype=torch.float32) | change))
