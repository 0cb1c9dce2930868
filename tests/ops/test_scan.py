from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from undivided.ops import gated_scan
from undivided.ops.scan.chunked import CHUNK
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-11, "atol": 1e-12}
NEVER = -float("inf")
# Those of any dtype; the kernels have their own file.
every_backend = pytest.mark.parametrize("backend", ["chunked", "reference"])


def inputs(batch=2, heads=3, length=37, head_dim=8, value_dim=5, gate=-0.5, both=True, dtype=torch.float64):
    """Gates are drawn between `gate` and 0.01 of it."""
    draw = lambda width: torch.randn(batch, heads, length, width, dtype=dtype)  # noqa: E731
    gates = lambda: gate * (0.01 + 0.99 * torch.rand(batch, heads, length, head_dim, dtype=dtype))  # noqa: E731
    x = {"query": draw(head_dim), "key": draw(head_dim), "value": draw(value_dim), "log_gate": gates()}
    return x | {"reverse_log_gate": gates()} if both else x


def call(backend, **options):
    return lambda **x: gated_scan(**x, backend=backend, **options)


def by_pairs(query, key, value, log_gate, scale):
    """`out_i = scale * sum_(j <= i) q_i . (exp(g_(j+1) + ... + g_i) * k_j) v_j`, one pair at a time."""
    out = torch.zeros_like(value)
    for i in range(query.shape[2]):
        for j in range(i + 1):
            decay = log_gate[:, :, j + 1 : i + 1].sum(2).exp()
            weight = (query[:, :, i] * decay * key[:, :, j]).sum(-1, keepdim=True)
            out[:, :, i] += scale * weight * value[:, :, j]
    return out


def turned(*tensors):
    return [tensor.flip(2) for tensor in tensors]


# -- what it computes


@every_backend
@pytest.mark.parametrize("length", [1, 9])
def test_equals_the_sum_over_pairs_of_tokens(backend, length):
    x = inputs(length=length)
    forwards = [x[name] for name in ("query", "key", "value", "log_gate")]
    backwards = turned(x["query"], x["key"], x["value"], x["reverse_log_gate"])
    start, end = by_pairs(*forwards, 8**-0.5), by_pairs(*backwards, 8**-0.5).flip(2)
    torch.testing.assert_close(call(backend)(**x), (start + end) / 2, **EXACT)
    torch.testing.assert_close(gated_scan(*forwards, backend=backend), start, **EXACT)


@every_backend
def test_without_decay_a_token_counts_itself_twice_and_all_others_once(backend):
    x = inputs(gate=-0.0)
    query, key, value = x["query"], x["key"], x["value"]
    everything = key.transpose(-2, -1) @ value
    own = (query * key).sum(-1, keepdim=True) * value
    torch.testing.assert_close(call(backend, scale=0.3)(**x), 0.15 * (query @ everything + own), **EXACT)


@every_backend
def test_a_gate_that_forgets_everything_leaves_the_token_itself(backend):
    x = inputs()
    forgetting = {name: torch.full_like(x[name], NEVER) for name in ("log_gate", "reverse_log_gate")}
    leaves = {name: tensor.requires_grad_() for name, tensor in (x | forgetting).items()}
    out = call(backend, scale=1.0)(**leaves)
    torch.testing.assert_close(out, (x["query"] * x["key"]).sum(-1, keepdim=True) * x["value"], **EXACT)
    for name, gradient in zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True):
        assert gradient.isfinite().all(), name


@every_backend
def test_turning_the_sequence_and_exchanging_the_gates_turns_the_output(backend):
    x = inputs()
    query, key, value, reverse, forward = turned(
        *(x[name] for name in ("query", "key", "value", "reverse_log_gate", "log_gate"))
    )
    other = gated_scan(query, key, value, reverse, reverse_log_gate=forward, backend=backend)
    torch.testing.assert_close(other.flip(2), call(backend)(**x), **EXACT)


def reached(backend, x, at):
    """Tokens whose output changes with everything of the token `at`."""
    other = {name: tensor.clone() for name, tensor in x.items()}
    for name, tensor in other.items():
        tensor[:, :, at] = -1.0 if "gate" in name else 1.0
    change = (call(backend)(**x) - call(backend)(**other)).abs().amax((0, 1, 3)) > 0
    return change.nonzero().flatten().tolist()


@every_backend
def test_one_direction_is_causal_and_two_reach_everything(backend):
    one, two = inputs(gate=-0.1, both=False), inputs(gate=-0.1)
    assert reached(backend, one, 20) == list(range(20, 37))
    assert reached(backend, two, 20) == list(range(37))
    # The scan from the end alone: twice both, less the one from the start.
    two["log_gate"] = torch.full_like(two["log_gate"], NEVER)
    changed = {name: tensor.clone() for name, tensor in two.items()}
    for name in ("query", "key", "value", "reverse_log_gate"):
        changed[name][:, :, :20] = -1.0
    torch.testing.assert_close(
        call(backend)(**two)[:, :, 20:], call(backend)(**changed)[:, :, 20:], rtol=0, atol=0
    )


# -- chunks against the recurrence


@pytest.mark.parametrize("gate", [-1e-4, -0.04, -5.0, -60.0])
@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_chunks_equal_the_recurrence(length, gate):
    x = inputs(length=length, gate=gate)
    torch.testing.assert_close(call("chunked")(**x), call("reference")(**x), **EXACT)


@pytest.mark.parametrize("gate", [-1e-4, -0.04, -5.0, -60.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chunks_are_as_accurate_as_the_recurrence(gate, dtype):
    x = inputs(batch=1, heads=2, length=197 if dtype == torch.float32 else 37, gate=gate)
    compare_op(call("chunked"), call("reference"), call("reference"), x, dtype)


def test_gates_of_all_strengths_side_by_side_in_a_long_sequence():
    x = inputs(batch=1, heads=1, length=4095, head_dim=4, both=False)
    x["log_gate"] = torch.tensor([-1e-4, -0.04, -5.0, -60.0], dtype=torch.float64).expand_as(x["query"])
    x["log_gate"] = x["log_gate"] * torch.rand_like(x["query"])
    compare_op(call("chunked"), call("reference"), call("reference"), x, torch.float32, grad_inputs=())


@every_backend
@pytest.mark.parametrize("both", [True, False])
def test_gradients_are_those_of_finite_differences(backend, both):
    x = inputs(batch=1, heads=1, length=5, head_dim=3, value_dim=2, both=both)

    def function(*tensors):
        return call(backend)(**dict(zip(x, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()])


def test_the_cost_is_linear_in_the_length():
    def cost(length):
        with FlopCounterMode(display=False) as counter:
            call("chunked")(**inputs(batch=1, length=length))
        return counter.get_total_flops()

    assert cost(16 * CHUNK) == 4 * cost(4 * CHUNK) > 0


# -- in pieces


@every_backend
@pytest.mark.parametrize("pieces", [[1] * 7, [20, 17], [CHUNK, 5], [0, 37]])
def test_a_sequence_in_pieces_is_the_sequence(backend, pieces):
    x = inputs(length=sum(pieces), both=False)
    want, last = call(backend, return_state=True)(**x)
    outputs, state = [], None
    for piece in zip(*(tensor.split(pieces, 2) for tensor in x.values()), strict=True):
        out, state = gated_scan(*piece, initial_state=state, return_state=True, backend=backend)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 2), want, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


@every_backend
def test_a_state_has_gradients_and_full_precision(backend):
    x = inputs(length=40, both=False, dtype=torch.float16)
    start = torch.randn(2, 3, 8, 5, requires_grad=True)
    out, state = call(backend, initial_state=start, return_state=True)(**x)
    assert out.dtype == torch.float16 and state.dtype == torch.float32
    (gradient,) = torch.autograd.grad(state.sum(), start)
    want = x["log_gate"].float().sum(2).exp()[..., None].expand_as(start)
    torch.testing.assert_close(gradient, want)


# -- memory


def test_strides_surroundings_and_batch_mates_do_not_matter():
    x = inputs()
    out = call("chunked")(**x)
    torch.testing.assert_close(
        call("chunked")(**{n: poison_surroundings(t) for n, t in x.items()}), out, **EXACT
    )
    strided = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in x.items()}
    torch.testing.assert_close(call("chunked")(**strided), out, **EXACT)
    torch.testing.assert_close(call("chunked")(**{n: t[1:] for n, t in x.items()}), out[1:], **EXACT)
    with poisoned_empty():
        assert call("chunked")(**x).isfinite().all()


@every_backend
def test_an_empty_sequence_has_an_empty_output_and_keeps_the_state(backend):
    state = torch.randn(2, 3, 8, 5, dtype=torch.float64)
    x = inputs(length=0, both=False)
    out, last = call(backend, initial_state=state, return_state=True)(**x)
    assert out.shape == (2, 3, 0, 5) and torch.equal(last, state)
    assert call(backend)(**inputs(length=0)).shape == (2, 3, 0, 5)


def test_autocast_does_not_round_the_sums():
    x = inputs(dtype=torch.float32)
    want = call("chunked")(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call("chunked")(**x), want)


def test_compiles_into_one_graph():
    x = {name: tensor.requires_grad_() for name, tensor in inputs(dtype=torch.float32).items()}
    torch._dynamo.reset()
    compiled = torch.compile(call("chunked"), fullgraph=True, backend="aot_eager")(**x)
    eager = call("chunked")(**x)
    torch.testing.assert_close(compiled, eager)
    found, want = (torch.autograd.grad(out.square().sum(), list(x.values())) for out in (compiled, eager))
    torch.testing.assert_close(found, want)


# -- refusals


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            dict(log_gate=torch.full((2, 3, 37, 8), 0.5)),
            "log_gate has 0.5; logarithms of decays must be zero or neg",
        ),
        (dict(reverse_log_gate=torch.ones(2, 3, 37, 8)), "reverse_log_gate has 1; logarithms of decays"),
        (dict(log_gate=torch.zeros(2, 3, 37, 8, dtype=torch.int64)), "log_gate has dtype torch.int64"),
        (
            dict(log_gate=torch.zeros(2, 3, 37, 4)),
            r"log_gate has shape \[2, 3, 37, 4\]; .* query, \[2, 3, 37, 8\]",
        ),
        (dict(key=torch.randn(2, 1, 37, 8)), r"key has shape \[2, 1, 37, 8\]; it must be that of query"),
        (dict(value=torch.randn(2, 3, 36, 5)), r"value \[2, 3, 36, 5\] must share \[batch, heads, length\]"),
        (dict(value=torch.randn(2, 3, 37)), r"value has shape \[2, 3, 37\]; it needs 4 axes"),
        (
            dict(value=torch.randn(2, 3, 37, 5).half()),
            "value has dtype torch.float16, but query has torch.float32",
        ),
        (
            dict(initial_state=torch.zeros(2, 3, 8, 5)),
            "initial_state goes with one direction; with reverse_log_gate",
        ),
        (dict(return_state=True), "return_state=True goes with one direction"),
        (
            dict(initial_state=torch.zeros(2, 3, 5, 8), reverse_log_gate=None),
            r"initial_state has shape \[2, 3, 5, 8\]; it must be .* = \[2, 3, 8, 5\]",
        ),
        (
            dict(initial_state=torch.zeros(2, 3, 8, 5).long(), reverse_log_gate=None),
            "initial_state has dtype torch.int64",
        ),
        (dict(backend="flex"), 'backend=\'flex\' is not one of "auto", "triton", "chunked", "reference"'),
    ],
)
def test_bad_input_is_named(change, text):
    with pytest.raises((ValueError, TypeError), match=text):
        gated_scan(**(inputs(dtype=torch.float32) | change))
