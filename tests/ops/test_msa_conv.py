from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from undivided.ops import msa_conv_attention
from undivided.ops.msa_conv import BORDERS
from undivided.ops.msa_conv._border import inside, offsets
from undivided.ops.msa_conv.triton import visited
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-11, "atol": 1e-11}
KERNELS = [(1, 1), (3, 3), (5, 1), (7, 7)]


def inputs(size=(6, 5), batch=2, heads=2, dim=4, value_dim=None, dtype=torch.float64, device="cpu"):
    def draw(width):
        return torch.randn(batch, heads, *size, width, dtype=dtype, device=device)

    return {"query": draw(dim), "key": draw(dim), "value": draw(value_dim or dim)}


def call(kernel_size, dilation=1, border="zero", backend="reference", **options):
    return lambda **x: msa_conv_attention(
        **x, kernel_size=kernel_size, dilation=dilation, border=border, backend=backend, **options
    )


def unfolded(query, key, value, kernel_size, dilation):
    """The authors' formula: columns of the map, zeros beyond it, a softmax over the taps."""
    batch, heads, height, width, dim = query.shape
    padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel_size, dilation, strict=True))

    def columns(x):
        x = x.movedim(-1, 2).flatten(0, 1)
        return F.unfold(x, kernel_size, dilation, padding).view(batch * heads, x.shape[1], -1, height * width)

    q = query.movedim(-1, 2).reshape(batch * heads, dim, 1, height * width)
    weights = (dim**-0.5 * (q * columns(key)).sum(1, keepdim=True)).softmax(2)
    out = (weights * columns(value)).sum(2).view(batch, heads, -1, height, width)
    return out.movedim(2, -1)


@pytest.mark.parametrize("kernel_size", KERNELS)
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("size", [(5, 8), (2, 3)])
def test_equals_the_unfold_formula_with_its_gradients(kernel_size, dilation, size):
    x = {name: tensor.requires_grad_() for name, tensor in inputs(size, value_dim=3).items()}
    found = call(kernel_size, dilation)(**x)
    want = unfolded(**x, kernel_size=kernel_size, dilation=(dilation, dilation))
    torch.testing.assert_close(found, want, **EXACT)
    cotangent = torch.randn_like(found)
    gradients = (torch.autograd.grad(out, list(x.values()), cotangent) for out in (found, want))
    torch.testing.assert_close(*gradients, **EXACT)


def test_gradients_are_those_of_finite_differences():
    x = {name: tensor.requires_grad_() for name, tensor in inputs((3, 4), batch=1, heads=1, dim=2).items()}
    for border in BORDERS:
        assert torch.autograd.gradcheck(
            lambda *t, border=border: call(3, border=border, return_lse=True)(**dict(zip(x, t, strict=True))),
            tuple(x.values()),
        )


TRITON = {
    "a map": ((5, 6), 3, 1, "zero", 16, 16),
    "a dilated map with other widths": ((5, 4), (5, 3), (2, 3), "zero", 12, 20),
    "a kernel larger than the map": ((4, 3), 7, 1, "zero", 8, 8),
    "cut windows": ((5, 6), (3, 5), 1, "mask", 16, 16),
    "both sides": ((3, 4), (3, 5), (2, 1), "circular", 16, 16),
    "a channel a head": ((6, 4), 3, 1, "zero", 1, 1),
    "a channel a head, dilated, a kernel larger than the map": ((5, 3), (5, 7), (2, 1), "zero", 1, 1),
    "a channel a head, cut windows": ((5, 6), (3, 5), 1, "mask", 1, 1),
    "a channel a head, both sides": ((3, 4), (3, 5), (2, 1), "circular", 1, 1),
    "a channel of queries and two of values": ((4, 3), 3, 1, "zero", 1, 2),
    "one token": ((1, 1), 3, 1, "zero", 16, 16),
}


@pytest.mark.parametrize("problem", TRITON.values(), ids=TRITON)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_triton_is_as_accurate_as_the_reference(problem, dtype, device):
    size, kernel_size, dilation, border, dim, value_dim = problem
    # Channels of three blocks, where heads are channels.
    heads = 6 if dim == value_dim == 1 else 2
    x = inputs(size, batch=1, heads=heads, dim=dim, value_dim=value_dim, device=device)
    slow = call(kernel_size, dilation, border, return_lse=True)
    compare_op(call(kernel_size, dilation, border, "triton", return_lse=True), slow, slow, x, dtype)


def test_triton_reads_views_only_where_they_are_and_writes_all_of_its_output(device):
    x = {name: poison_surroundings(t.float()) for name, t in inputs((5, 4), dim=16, device=device).items()}
    with poisoned_empty():
        found = call(3, backend="triton", return_lse=True)(**x)
    torch.testing.assert_close(found, call(3, return_lse=True)(**x))


def test_one_sample_does_not_depend_on_another(device):
    x = inputs((5, 4), dim=16, dtype=torch.float32, device=device)
    together = call(3, backend="triton")(**x)
    x["key"][0] = torch.nan
    assert torch.equal(call(3, backend="triton")(**x)[1], together[1])


def test_the_gradient_of_the_log_sum_alone_arrives(device):
    x = {n: t.requires_grad_() for n, t in inputs((5, 4), dim=16, dtype=torch.float32, device=device).items()}
    found, want = (call(3, backend=backend, return_lse=True)(**x)[1] for backend in ("triton", "reference"))
    g = torch.randn_like(found)
    gradients = (torch.autograd.grad(lse, [x["query"], x["key"]], g) for lse in (found, want))
    torch.testing.assert_close(*gradients)


def test_the_operators_are_registered_and_compile_into_one_graph(device):
    x = inputs((5, 4), dim=16, dtype=torch.float32, device=device)
    options = ([3, 3], [1, 1], "zero", 0.25)
    torch.library.opcheck(torch.ops.undivided.msa_conv_forward.default, (*x.values(), *options))
    out, lse = torch.ops.undivided.msa_conv_forward(*x.values(), *options)
    torch.library.opcheck(
        torch.ops.undivided.msa_conv_backward.default, (out, lse, out, lse, *x.values(), *options)
    )
    torch._dynamo.reset()
    compiled = torch.compile(call(3, backend="triton"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x), call(3, backend="triton")(**x))


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.msa_conv import backward, depthwise, triton

x = torch.empty(1, 4, 40, 40, 80, dtype=torch.bfloat16)
out, lse = triton.forward(x, x, x, (7, 7), (2, 2), "zero", 0.1)
backward.backward(out, lse, out, lse, x, x, x, (7, 7), (2, 2), "zero", 0.1)
x = torch.empty(1, 192, 40, 40, 1, dtype=torch.bfloat16)
out, lse = depthwise.forward(x, x, x, (7, 7), (1, 1), "zero", 0.1)
depthwise.backward(out, lse, out, lse, x, x, x, (7, 7), (1, 1), "zero", 0.1)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    tiled = {"_forward_kernel", "_query_kernel", "_key_kernel"}
    assert {name for name, _ in lines} == tiled | {"_depthwise_forward", "_depthwise_backward"}
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_a_kernel_of_one_tap_returns_the_values():
    x = inputs()
    for border in BORDERS:
        torch.testing.assert_close(call(1, border=border)(**x), x["value"])


def test_queries_of_zeros_give_the_mean_of_the_padded_window():
    x = inputs() | {"query": torch.zeros(2, 2, 6, 5, 4, dtype=torch.float64)}
    maps = x["value"].movedim(-1, 2).flatten(0, 1)
    want = (
        F.avg_pool2d(maps, 3, stride=1, padding=1, count_include_pad=True).view(2, 2, 4, 6, 5).movedim(2, -1)
    )
    torch.testing.assert_close(call(3)(**x), want)


def test_constant_values_stay_with_a_mask_and_shrink_at_a_border_of_zeros():
    x = inputs() | {"value": torch.full((2, 2, 6, 5, 4), 3.0, dtype=torch.float64)}
    torch.testing.assert_close(call(3, border="mask")(**x), x["value"])
    found = call(3)(**x)
    torch.testing.assert_close(found[:, :, 1:-1, 1:-1], x["value"][:, :, 1:-1, 1:-1])
    assert (found[:, :, 0] < 3).all()


def test_zeros_beyond_the_map_are_a_correction_of_the_masked_window():
    x = inputs()
    zero, zero_lse = call((3, 5), 2, return_lse=True)(**x)
    mask, lse = call((3, 5), 2, "mask", return_lse=True)(**x)
    beyond = 15 - sum(inside((6, 5), offset, "cpu").double() for offset in offsets((3, 5), (2, 2)))
    torch.testing.assert_close(zero, mask * (lse.exp() / (lse.exp() + beyond))[..., None])
    torch.testing.assert_close(zero_lse, (lse.exp() + beyond).log())


def test_a_masked_window_over_the_whole_map_is_global_attention():
    x = inputs((4, 5))
    want = F.scaled_dot_product_attention(*(t.flatten(2, 3) for t in x.values())).unflatten(2, (4, 5))
    torch.testing.assert_close(call((7, 9), border="mask")(**x), want)


@pytest.mark.parametrize("border", BORDERS)
def test_a_map_that_moves_moves_its_output(border):
    x = inputs((9, 8))
    moved = {name: tensor.roll((2, 1), (2, 3)) for name, tensor in x.items()}
    found, want = call(3, border=border)(**moved), call(3, border=border)(**x).roll((2, 1), (2, 3))
    if border == "circular":
        torch.testing.assert_close(found, want)
    torch.testing.assert_close(found[:, :, 3:-1, 2:-1], want[:, :, 3:-1, 2:-1])


def test_a_dilated_map_is_maps_of_every_other_token():
    x = inputs((6, 8))
    found = call(3, 2)(**x)
    for row in range(2):
        for column in range(2):
            part = {name: tensor[:, :, row::2, column::2] for name, tensor in x.items()}
            torch.testing.assert_close(call(3)(**part), found[:, :, row::2, column::2])


def test_visited_tiles_cover_what_a_tile_of_queries_sees():
    for rows, kernel, count in (((8, 8), (7, 7), 64), ((4, 8), (1, 5), 32), ((8, 8), (3, 3), 16)):
        edges = visited(rows, kernel, count)
        assert edges[0] * edges[1] == count
    assert visited((8, 8), (7, 7), 64) == (4, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4 must be odd: an even kernel has no centre"),
        ({"kernel_size": (3, 2)}, r"kernel_size=\(3, 2\) must be odd"),
        ({"kernel_size": 0}, "kernel_size=0 must be a number of at least 1, or two"),
        ({"kernel_size": 3, "dilation": 0}, "dilation=0 must be a number of at least 1, or two"),
        ({"kernel_size": 3, "border": "wrap"}, "border='wrap' is not one of 'zero', 'mask', 'circular'"),
        ({"kernel_size": 3, "backend": "triton"}, 'backend "triton" cannot run this: .*float64'),
        ({"kernel_size": 3, "backend": "unfold"}, "backend='unfold' is not one of"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        msa_conv_attention(**inputs(), **options)


def test_tensors_that_do_not_fit_are_refused():
    x = inputs()
    with pytest.raises(ValueError, match=r"key has shape \[2, 2, 6, 5, 3\], but query has"):
        call(3)(**x | {"key": x["key"][..., :3]})
    with pytest.raises(ValueError, match=r"value has shape \[2, 2, 5, 5, 4\]; all but its last axis"):
        call(3)(**x | {"value": x["value"][:, :, :5]})
    with pytest.raises(ValueError, match="query has shape .* it needs 5 axes"):
        call(3)(**{name: tensor.flatten(2, 3) for name, tensor in x.items()})
    with pytest.raises(TypeError, match="value has dtype torch.float32, but query has torch.float64"):
        call(3)(**x | {"value": x["value"].float()})
