from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from undivided.ops import convolved_heads
from undivided.ops.conv import BACKENDS, history_of
from undivided.testing import assert_as_accurate, compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-11, "atol": 1e-11}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "two convolutions": dict(),
    "grouped queries": dict(heads=4, groups=2, length=9),
    "half of the dims rotated": dict(pairs=8, heads=2),
    "longer kernels": dict(kernels=(3, 2), length=5),
    "the grouped convolution alone": dict(kernels=(None, 3)),
    "no convolution": dict(kernels=()),
    "kernels of one token": dict(kernels=(1, 1)),
    "one token behind a state": dict(length=1, rows=2),
    "a state shorter than the kernels": dict(length=3, rows=1),
    "no mean, no temperature, no positions": dict(temperature=False, pairs=0, qk_mean=False),
    "no norm": dict(qk_norm=False, temperature=False),
    "values": dict(heads=2, groups=2, value_shift=True),
    "values behind a state": dict(heads=2, length=3, rows=2, value_shift=True),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
# One sum that cancels, the gradient of a temperature has a rounding error of luck: it has a test of its own.
NO_GRADIENT = ("cos", "sin", "temperature")


def inputs(
    heads=1, groups=1, head_dim=32, length=7, batch=1, kernels=(2, 2), pairs=16, rows=0, temperature=True,
    value_shift=False, dtype=torch.float64, device=None, **options,
):  # fmt: skip
    draw = lambda *shape: torch.randn(*shape, dtype=dtype).to(device)  # noqa: E731
    channels = (heads + groups) * head_dim
    values = groups * head_dim if value_shift else 0
    x = {"latents": draw(batch, rows + length, channels + values)}
    for name, width, size in zip(("depthwise", "grouped"), (1, head_dim), kernels, strict=False):
        if size is not None:
            x[f"{name}_weight"] = draw(channels, width, size) / math.sqrt(width * size)
            x[f"{name}_bias"] = 0.3 * draw(channels)
    if temperature:
        x["temperature"] = draw(groups).exp()
    if pairs:
        angles = draw(1, length, pairs)
        x |= {"cos": angles.cos(), "sin": angles.sin()}
    return x


def call(
    backend="reference", heads=1, groups=1, rows=0, qk_mean=True, qk_norm=True, value_shift=False, **sizes
):
    return lambda **x: convolved_heads(
        num_heads=heads, num_key_value_heads=groups, prefix=rows, qk_mean=qk_mean, qk_norm=qk_norm,
        value_shift=value_shift, backend=backend, **x,
    )  # fmt: skip


def by_loops(x, heads, groups, head, token):
    """One head of one token, by loops over taps and channels; latents before the first are zero."""
    latents = x["latents"][0]
    width = latents.shape[1] // (heads + groups)
    channel = lambda h: slice(h * width, (h + 1) * width)  # noqa: E731
    row = lambda t: latents[t] if t >= 0 else torch.zeros_like(latents[0])  # noqa: E731

    def first(t):
        weight = x["depthwise_weight"][:, 0]
        taps = weight.shape[1]
        return x["depthwise_bias"] + sum(weight[:, i] * row(t - (taps - 1 - i)) for i in range(taps))

    weight = x["grouped_weight"][channel(head)]
    taps = weight.shape[2]
    out = x["grouped_bias"][channel(head)].clone()
    for i in range(taps):
        out += weight[..., i] @ first(token - (taps - 1 - i))[channel(head)]
    now, share = latents[token], heads // groups
    mean = lambda h: (now[channel(h)] + now[channel(heads + h // share)]) / 2  # noqa: E731
    if head < heads:
        out += mean(head)
    else:
        out += sum(mean((head - heads) * share + i) for i in range(share)) / share
    out *= math.sqrt(width) / math.sqrt(float(out @ out))
    if head >= heads:
        out *= x["temperature"][head - heads]
    pairs = x["cos"].shape[2]
    a, b = out[:pairs].clone(), out[pairs : 2 * pairs].clone()
    c, s = x["cos"][0, token], x["sin"][0, token]
    out[:pairs], out[pairs : 2 * pairs] = a * c - b * s, b * c + a * s
    return out


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_every_head_of_every_token_is_what_loops_give(backend):
    sizes = dict(heads=4, groups=2)
    x = inputs(head_dim=6, length=5, kernels=(3, 2), pairs=2, **sizes)
    query, key = call(backend, **sizes)(**x)
    for token in range(5):
        for head in range(6):
            found = query[0, head, token] if head < 4 else key[0, head - 4, token]
            torch.testing.assert_close(found, by_loops(x, 4, 2, head, token), **EXACT)


@every_shape
def test_merged_convolutions_are_both_in_a_row(shape):
    x = inputs(batch=2, **shape)
    for ours, exact in zip(call("composed", **shape)(**x), call(**shape)(**x), strict=True):
        torch.testing.assert_close(ours, exact, **EXACT)


def test_torchs_convolutions_give_the_same():
    x = inputs(head_dim=6, kernels=(3, 2), pairs=0, temperature=False)
    # Once, before both: the second convolution sees the first one's bias before the first token, not zeros.
    padded = F.pad(x["latents"].mT, (3, 0))
    first = F.conv1d(padded, x["depthwise_weight"], x["depthwise_bias"], groups=12)
    second = F.conv1d(first, x["grouped_weight"], x["grouped_bias"], groups=2)
    found = torch.cat(call(qk_mean=False, qk_norm=False)(**x), dim=1)
    torch.testing.assert_close(found, second.unflatten(1, (2, 6)).mT, **EXACT)


def test_half_of_the_values_are_moved_to_the_next_token():
    sizes = dict(heads=2, groups=2, value_shift=True)
    x = inputs(head_dim=4, pairs=0, **sizes)
    plain = x["latents"][..., -8:].unflatten(-1, (2, 4)).transpose(1, 2)
    value = call(**sizes)(**x)[2]
    assert torch.equal(value[:, 0], plain[:, 0])
    assert torch.equal(value[:, 1, 1:], plain[:, 1, :-1])
    assert (value[:, 1, 0] == 0).all()


@pytest.mark.parametrize("kernels", [(2,), (3,), ()])
@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_the_second_convolution_may_be_left_out(kernels, backend):
    x = inputs(head_dim=4, kernels=kernels, pairs=1)
    query, key = call(backend)(**x)
    identity = torch.eye(4, dtype=torch.float64).repeat(2, 1)[..., None]
    x |= {"grouped_weight": identity, "grouped_bias": torch.zeros(8, dtype=torch.float64)}
    for ours, exact in zip((query, key), call(backend)(**x), strict=True):
        torch.testing.assert_close(ours, exact, **EXACT)


@every_shape
def test_kernels_are_as_accurate_as_torch(shape, device):
    x = inputs(dtype=torch.float32, device=device, **shape)
    gradients = [name for name in x if name not in NO_GRADIENT]
    compare_op(call("triton", **shape), call("composed", **shape), call(**shape), x, HALF, gradients)


def test_many_blocks_and_batch_rows_are_as_accurate(device):
    sizes = dict(heads=2, groups=1)
    x = inputs(length=150, batch=2, dtype=torch.float32, device=device, **sizes)
    gradients = [name for name in x if name not in NO_GRADIENT]
    compare_op(call("triton", **sizes), call("composed", **sizes), call(**sizes), x, HALF, gradients)


def test_the_gradient_of_the_temperature_is_that_of_the_norm_it_sets(device):
    x = inputs(groups=2, heads=4, length=9, dtype=torch.float32, device=device)
    x = {name: tensor.to(HALF) for name, tensor in x.items()}
    tau = x.pop("temperature").requires_grad_()
    found = []
    for backend in ("triton", "composed"):
        key = call(backend, heads=4, groups=2)(**x, temperature=tau)[1].float()
        found += torch.autograd.grad(key.square().sum() / 2, tau)
    assert_as_accurate(*found, 32 * 9 * tau.detach().double())


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_gradients_are_those_of_finite_differences(backend):
    x = inputs(heads=2, groups=1, head_dim=8, length=5, pairs=2)
    names = [name for name in x if name not in ("cos", "sin")]
    function = call(backend, heads=2, groups=1)
    assert torch.autograd.gradcheck(
        lambda *tensors: function(**(x | dict(zip(names, tensors, strict=True)))),
        [x[name].requires_grad_() for name in names],
        fast_mode=True,
    )


def document_by_document(backend, starts, **options):
    def run(**x):
        parts = [
            call(backend, **options)(**(x | {name: x[name][:, a:b] for name in ("latents", "cos", "sin")}))
            for a, b in pairwise(starts)
        ]
        return tuple(torch.cat(heads, dim=2) for heads in zip(*parts, strict=True))

    return run


def test_packed_documents_do_not_see_each_other(device):
    starts, options = (0, 4, 5, 7, 13), {"value_shift": True}
    x = inputs(length=13, dtype=torch.float32, device=device, **options)
    history = history_of(torch.tensor(starts, device=device), 13)
    assert history[0].tolist() == [0, 1, 2, 3, 0, 0, 1, 0, 1, 2, 3, 4, 5]
    exact = document_by_document("reference", starts, **options)
    double = {name: tensor.double() for name, tensor in x.items()}
    for backend in ("reference", "composed"):
        found = call(backend, **options)(**double, history=history)
        for ours, theirs in zip(found, exact(**double), strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
    gradients = [name for name in x if name not in NO_GRADIENT]
    compare_op(
        lambda **x: call("triton", **options)(**x, history=history),
        document_by_document("composed", starts, **options), exact, x, HALF, gradients,
    )  # fmt: skip


PIECES = [("reference", [1] * 7), ("reference", [2, 1, 4]), ("composed", [1, 6]), ("triton", [1, 6])]


@pytest.mark.parametrize(("backend", "pieces"), PIECES)
def test_a_sequence_in_pieces_is_one_sequence(backend, pieces, device):
    x = inputs(length=7, value_shift=True)
    x = {
        name: tensor.to(device, HALF if backend == "triton" else torch.float64) for name, tensor in x.items()
    }
    expected, found, at = call(backend, value_shift=True)(**x), [], 0
    for size in pieces:
        rows, here = min(at, 2), slice(at, at + size)
        piece = x | {
            "latents": x["latents"][:, at - rows : at + size],
            "cos": x["cos"][:, here],
            "sin": x["sin"][:, here],
        }
        found.append(call(backend, rows=rows, value_shift=True)(**piece))
        at += size
    for whole, parts in zip(expected, zip(*found, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=2), whole)


def test_a_later_token_reaches_no_earlier_one():
    x = inputs(length=6)
    x["latents"].requires_grad_()
    for heads in call()(**x):
        for token in range(6):
            (gradient,) = torch.autograd.grad(heads[0, 0, token].sum(), x["latents"], retain_graph=True)
            reached = gradient[0].abs().sum(-1) > 0
            assert reached.tolist() == [token - 2 <= n <= token for n in range(6)]


def test_norms_are_the_root_of_head_dim_times_temperature_and_bound_the_scores():
    sizes = dict(heads=4, groups=2)
    x = inputs(head_dim=16, pairs=4, **sizes)
    query, key = call(**sizes)(**x)
    torch.testing.assert_close(query.norm(dim=-1), torch.full_like(query[..., 0], 4.0))
    torch.testing.assert_close(key.norm(dim=-1), 4 * x["temperature"][:, None].expand(1, 2, 7))
    scores = query @ key.repeat_interleave(2, dim=1).mT / 4
    assert (scores.abs() <= 4 * x["temperature"].repeat_interleave(2)[:, None, None] + 1e-9).all()


def test_without_convolved_parts_heads_are_the_means_alone():
    x = inputs(head_dim=4, pairs=0, temperature=False)
    for name in ("depthwise", "grouped"):
        x[f"{name}_weight"] = torch.zeros_like(x[f"{name}_weight"])
        x[f"{name}_bias"] = torch.zeros_like(x[f"{name}_bias"])
    query, key = call(qk_norm=False)(**x)
    mean = x["latents"].unflatten(-1, (2, 4)).mean(2)[:, None]
    torch.testing.assert_close(query, mean)
    torch.testing.assert_close(key, mean)


@pytest.mark.parametrize("backend", ["reference", "composed", "triton"])
def test_rows_of_zeros_stay_zeros_and_have_finite_gradients(backend, device):
    dtype = HALF if backend == "triton" else torch.float32
    x = inputs(kernels=(), dtype=torch.float32, device=device)
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    x["latents"][:, 3] = 0.0
    x["latents"].requires_grad_()
    query, key = call(backend)(**x)
    assert (query[:, :, 3] == 0).all()
    assert (key[:, :, 3] == 0).all()
    (gradient,) = torch.autograd.grad(query.float().sum() + key.float().sum(), x["latents"])
    assert gradient.isfinite().all()


def test_strides_surroundings_and_batch_mates_do_not_matter(device):
    x = inputs(batch=2, dtype=HALF, device=device)
    expected = call("triton")(**x)
    surrounded = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    turned = x | {"latents": x["latents"].mT.contiguous().mT}
    for other in (surrounded, turned):
        for ours, theirs in zip(call("triton")(**other), expected, strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(call("triton")(**(x | {"latents": x["latents"][1:]})), expected, strict=True):
        assert torch.equal(ours, theirs[1:])


def test_everything_is_written_and_gradients_have_the_same_bits_in_every_run(device):
    sizes = dict(length=70, rows=2, value_shift=True)
    x = inputs(dtype=HALF, device=device, **sizes)
    leaves = [x[name].requires_grad_() for name in x if name not in ("cos", "sin")]
    runs = []
    for _ in range(2):
        with poisoned_empty():
            heads = call("triton", **sizes)(**x)
            assert all(one.isfinite().all() for one in heads)
            runs.append(torch.autograd.grad(sum(one.float().square().sum() for one in heads), leaves))
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


def test_heads_lie_as_attention_and_projections_read_them(device):
    for heads in call("triton", value_shift=True)(**inputs(dtype=HALF, device=device, value_shift=True)):
        assert heads.transpose(1, 2).is_contiguous()


def test_operators_pass_opcheck(device):
    from undivided.ops.conv import autograd  # noqa: F401

    x = inputs(dtype=HALF, device=device, value_shift=True)
    names = ("latents", "depthwise_weight", "depthwise_bias", "grouped_weight", "grouped_bias")
    tables = (x["temperature"].float(), x["cos"], x["sin"])
    arguments = (*(x[name] for name in names), *tables, None, 0, 1, 1, True, True, True)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.undivided.convolved_heads_forward, arguments, test_utils=tests)
    gradients = [torch.randn_like(heads) for heads in torch.ops.undivided.convolved_heads_forward(*arguments)]
    arguments = (*gradients, *arguments)
    torch.library.opcheck(torch.ops.undivided.convolved_heads_backward, arguments, test_utils=tests)


@pytest.mark.parametrize("backend", ["triton", "composed"])
def test_compiles_into_one_graph(backend, device):
    x = {name: t.requires_grad_() for name, t in inputs(length=3, dtype=HALF, device=device).items()}
    leaves = [x[name] for name in x if name not in ("cos", "sin")]
    torch._dynamo.reset()
    compiled = torch.compile(call(backend), fullgraph=True, backend="aot_eager")(**x)
    eager = call(backend)(**x)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs)
    of = lambda heads: torch.autograd.grad(heads[0].float().sum() + heads[1].float().sum(), leaves)  # noqa: E731
    for ours, theirs in zip(of(compiled), of(eager), strict=True):
        torch.testing.assert_close(ours, theirs)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.conv import backward, triton as forward

def empty(*shape): return torch.empty(*shape, dtype=torch.bfloat16)

for length, head_dim, heads, groups in ((512, 128, 8, 2), (1, 128, 8, 2)):
    channels = (heads + groups) * head_dim
    arguments = (
        empty(1, length, channels + groups * head_dim), empty(channels, 1, 2), empty(channels),
        empty(channels, head_dim, 2), empty(channels), torch.empty(groups), *(empty(1, length, head_dim // 4),) * 2,
        None, 0, heads, groups, True, True, True,
    )
    outputs = forward.forward(*arguments)
    if length > 1:
        backward.backward(*outputs, *arguments)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_merge_kernel", "_forward_kernel", "_heads_kernel", "_latents_kernel", "_matrices_kernel", "_split_kernel"
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


@pytest.mark.parametrize(
    ("change", "backend", "text"),
    [
        (dict(head_dim=24, pairs=4), "triton", "head_dim is 24"),
        (dict(kernels=(2,)), "triton", "depthwise_weight is given without grouped_weight"),
    ],
)
def test_a_backend_says_what_it_cannot_do(change, backend, text):
    history = change.pop("history", None)
    with pytest.raises(
        ValueError, match=f'backend "{backend}" cannot run this: .*{text}.*Able: .*"reference"'
    ):
        call(backend)(**inputs(dtype=torch.float32, **change), history=history)


def test_the_backends_are_listed():
    assert [backend.name for backend in BACKENDS] == ["triton", "composed", "reference"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(latents=torch.randn(7, 64)), r"latents has shape \[7, 64\]; it needs 3 axes"),
        (dict(latents=torch.randn(1, 7, 63)), "latents has 63 channels, which 2 heads do not divide"),
        (dict(depthwise_bias=None), "depthwise_weight and depthwise_bias must be given together"),
        (
            dict(grouped_weight=torch.randn(64, 16, 2)),
            r"grouped_weight has shape \[64, 16, 2\]; it needs \[64, 32, kernel_size\]",
        ),
        (dict(grouped_bias=torch.randn(32)), r"grouped_bias has shape \[32\]; it needs \[64\]"),
        (dict(temperature=torch.ones(3)), r"temperature has shape \[3\]; it needs \[1\]"),
        (dict(sin=None), "cos and sin must be given together"),
        (dict(cos=torch.ones(1, 7, 17)), "pairs <= head_dim / 2 = 16"),
        (dict(cos=torch.ones(1, 7, 3)), r"cos has shape \[1, 7, 3\], but sin has \[1, 7, 16\]"),
        (dict(prefix=3), "prefix=3 must be 0 to 2: the rows that are looked back, of 7 rows"),
        (
            dict(grouped_bias=torch.randn(64).double()),
            "grouped_bias has dtype torch.float64, but latents has torch.float32",
        ),
        (dict(history=torch.zeros(1, 7)), "history has dtype torch.float32; it needs integers"),
        (
            dict(history=torch.zeros(1, 6, dtype=torch.long)),
            r"history has shape \[1, 6\]; it needs \[1 or 1, 7\]",
        ),
    ],
)
def test_bad_input_is_named(change, text):
    with pytest.raises((ValueError, TypeError), match=text):
        convolved_heads(num_heads=1, num_key_value_heads=1, **(inputs(dtype=torch.float32) | change))


def test_an_odd_width_of_the_values_is_named():
    with pytest.raises(ValueError, match="value_shift halves the values, but 1 heads of 3 are odd"):
        convolved_heads(torch.randn(1, 2, 9), 1, 1, value_shift=True)


def test_key_heads_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="num_key_value_heads=2 does not divide num_heads=3"):
        convolved_heads(torch.randn(1, 3, 20), 3, 2)
