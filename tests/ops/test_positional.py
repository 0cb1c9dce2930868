from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from undivided.ops import gated_positional_attention
from undivided.ops.positional import axis_weights
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SIZES = [(5, 5), (7, 7), (14, 14), (3, 6), (1, 4), (4, 1), (1, 1)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def inputs(size, batch=2, heads=3, dim=8, value_dim=8):
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    tokens = size[0] * size[1]
    return {
        "query": draw(batch, heads, tokens, dim),
        "key": draw(batch, heads, tokens, dim),
        "value": draw(batch, heads, tokens, value_dim),
        "position_weight": 0.3 * draw(heads, 3),
        "gate": torch.rand(heads, dtype=torch.float64),
    }


def call(size, backend):
    return lambda **x: gated_positional_attention(size=size, backend=backend, **x)


def in_the_dtype_given(size):
    """Plain eager, over all pairs, without the wider type in between."""

    def attend(query, key, value, position_weight, gate):
        y, x = (part.to(query) for part in torch.meshgrid(*map(torch.arange, size), indexing="ij"))
        dy, dx = (place.flatten()[None] - place.flatten()[:, None] for place in (y, x))
        r = torch.stack((dx, dy, dx**2 + dy**2), -1)
        by_position = (r @ position_weight.T).permute(2, 0, 1).softmax(-1)
        by_content = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        gate = gate[:, None, None]
        return ((1 - gate) * by_content + gate * by_position) @ value

    return attend


def test_the_reference_is_the_formula_token_by_token():
    size, x = (2, 3), inputs((2, 3), value_dim=5)
    want = torch.zeros(2, 3, 6, 5, dtype=torch.float64)
    places = [(i, j) for i in range(2) for j in range(3)]
    for head in range(3):
        w, g = x["position_weight"][head], x["gate"][head]
        for i, (y, col) in enumerate(places):
            r = torch.tensor([[v - col, u - y, (v - col) ** 2 + (u - y) ** 2] for u, v in places]).double()
            by_position = (r @ w).softmax(0)
            for image in range(2):
                by_content = (x["key"][image, head] @ x["query"][image, head, i] / 8**0.5).softmax(0)
                row = (1 - g) * by_content + g * by_position
                want[image, head, i] = row @ x["value"][image, head]
    torch.testing.assert_close(call(size, "reference")(**x), want, **EXACT)


@every_size
def test_rows_times_columns_equal_the_direct_form(size):
    x = inputs(size, value_dim=5)
    torch.testing.assert_close(call(size, "sdpa")(**x), call(size, "reference")(**x), **EXACT)


@every_size
def test_weights_by_position_are_a_product_of_rows_and_columns(size):
    """Values that tell tokens apart, and positions alone: the output is the matrix of weights."""
    tokens = size[0] * size[1]
    x = inputs(size, batch=1) | {"gate": torch.ones(3, dtype=torch.float64)}
    x["value"] = torch.eye(tokens, dtype=torch.float64).expand(1, 3, -1, -1)
    rows, columns = axis_weights(x["position_weight"], size)
    product = torch.stack([torch.kron(a, b) for a, b in zip(rows, columns, strict=True)])
    torch.testing.assert_close(call(size, "reference")(**x)[0], product, **EXACT)
    torch.testing.assert_close(product.sum(-1), torch.ones(3, tokens, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(5, 5), (3, 6)], ids=str)
def test_outputs_and_gradients_are_as_accurate_as_the_direct_form(size, dtype):
    compare_op(
        call(size, "sdpa"),
        in_the_dtype_given(size),
        call(size, "reference"),
        inputs(size, value_dim=6),
        dtype,
    )


# Maps that one block of keys holds and that it does not, wide and high, down to one token.
@pytest.mark.parametrize("size", [(5, 5), (14, 14), (3, 20), (20, 3), (1, 4), (1, 1)], ids=str)
def test_the_kernel_is_as_accurate_as_the_direct_form(size, device):
    batch, heads = (2, 3) if size[0] * size[1] < 50 else (1, 2)
    x = {name: tensor.to(device) for name, tensor in inputs(size, batch, heads, 24, 16).items()}
    compare_op(call(size, "triton"), in_the_dtype_given(size), call(size, "reference"), x, HALF)


def test_the_kernel_in_float32(device):
    size = (3, 6)
    x = {name: tensor.to(device) for name, tensor in inputs(size, 1, 4).items()}
    compare_op(call(size, "triton"), in_the_dtype_given(size), call(size, "reference"), x, torch.float32)


def test_the_kernel_that_holds_no_map_whole_is_as_accurate(device):
    from undivided.ops.positional.triton import FORWARD, forward

    size = (14, 14)
    x = {name: tensor.to(device) for name, tensor in inputs(size, 1, 2).items()}

    def in_blocks(**x):
        return forward(**x, height=14, width=14, scale=8**-0.5, with_lse=False, tiling=FORWARD)[0]

    with torch.no_grad():
        compare_op(in_blocks, in_the_dtype_given(size), call(size, "reference"), x, HALF, grad_inputs=())


@pytest.mark.parametrize("strength", [0.0, 50.0])
def test_the_kernel_bears_weights_of_any_sharpness(strength, device):
    """As a layer starts, with the sharpest that an exact convolution needs; and none, where all places are alike."""
    size, x = (4, 3), {name: tensor.to(device) for name, tensor in inputs((4, 3), 1, 9).items()}
    taps = torch.tensor([[2.0 * dx, 2.0 * dy, -1.0] for dx in (-1, 0, 1) for dy in (-1, 0, 1)])
    x["position_weight"] = (strength * taps).double().to(device)
    compare_op(call(size, "triton"), in_the_dtype_given(size), call(size, "reference"), x, HALF)


def test_without_gradients_the_kernel_gives_the_same(device):
    x = {name: tensor.to(device, HALF) for name, tensor in inputs((5, 5)).items()}
    with_gradients = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    torch.testing.assert_close(call((5, 5), "triton")(**x), call((5, 5), "triton")(**with_gradients))


def test_a_layers_projections_need_no_copy(device):
    """Queries, keys and values as slices of one projection, and an output that the next one reads as it lies."""
    joined = torch.randn(2, 15, 3, 4, 8, device=device, dtype=HALF)
    query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
    weight, gate = torch.randn(4, 3, device=device), torch.rand(4, device=device)
    out = gated_positional_attention(query, key, value, weight, gate, (3, 5), backend="triton")
    assert out.transpose(1, 2).is_contiguous()
    copies = [tensor.contiguous() for tensor in (query, key, value)]
    torch.testing.assert_close(
        out, gated_positional_attention(*copies, weight, gate, (3, 5), backend="triton")
    )


def test_the_kernel_writes_all_of_fresh_buffers_and_reads_nothing_else(device):
    x = {name: tensor.to(device, HALF) for name, tensor in inputs((5, 7), dim=24, value_dim=24).items()}

    def run(tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = call((5, 7), "triton")(**leaves)
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    expected = run(x)
    with poisoned_empty():
        found = run({name: poison_surroundings(tensor) for name, tensor in x.items()})
    for ours, want in zip(found, expected, strict=True):
        assert torch.equal(ours, want)


def test_opcheck(device):
    x = {name: tensor.to(device, HALF) for name, tensor in inputs((3, 5)).items()}
    arguments = (*x.values(), 3, 5, 0.3)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.undivided.gated_positional_inference, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.undivided.gated_positional_forward, arguments, test_utils=tests)
    out, lse = torch.ops.undivided.gated_positional_forward(*arguments)
    arguments = (torch.randn_like(out), lse, *arguments)
    torch.library.opcheck(torch.ops.undivided.gated_positional_backward, arguments, test_utils=tests)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.positional import backward, triton as forward

weight, gate = torch.empty(9, 3), torch.empty(9)
joined = torch.empty(1, 196, 3, 9, 48, dtype=torch.bfloat16)
inputs = (*joined.permute(2, 0, 3, 1, 4).unbind(0), weight, gate, 14, 14, 0.1)
out, lse = forward.forward(*inputs)
forward.forward(*inputs, tiling=forward.FORWARD)
backward.backward(out, lse, *inputs)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {"_whole_kernel", "_forward_kernel", "_query_kernel", "_key_kernel"}
    for name, shared in lines:
        # Two programs fit on a multiprocessor.
        assert int(shared) <= 113 * 1024, name


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients_are_those_of_finite_differences(backend):
    x = {name: tensor.requires_grad_() for name, tensor in inputs((4, 4), 1, 2, 3, 3).items()}
    run = call((4, 4), backend)
    assert torch.autograd.gradcheck(
        lambda *tensors: run(**dict(zip(x, tensors, strict=True))), tuple(x.values()), fast_mode=True
    )


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operator makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_no_tensor_of_all_pairs_exists_forward_or_backward(backend):
    size, tokens = (12, 16), 192
    # Shapes alone, which opcheck holds against those of the kernels.
    with FakeTensorMode():
        x = {name: tensor.half().requires_grad_() for name, tensor in inputs(size, 2, 3, 4, 4).items()}
        with Largest() as largest:
            call(size, backend)(**x).sum().backward()
    # Queries, keys and values have 2 * 3 * 192 * 4 elements; the weights of one head alone have 192 * 192.
    assert (largest.elements < tokens**2) == (backend != "reference")


def test_component_0_belongs_to_columns_and_1_to_rows():
    """One bright column: a head that looks two to the right sees it two to the left, whatever the row."""
    size, heads = (4, 6), 1
    image = torch.zeros(4, 6, dtype=torch.float64)
    image[:, 3] = 1.0
    zero = torch.zeros(1, heads, 24, 2, dtype=torch.float64)
    for backend in ("sdpa", "reference"):
        out = gated_positional_attention(
            zero, zero, image.view(1, 1, 24, 1), 50.0 * torch.tensor([[4.0, 0.0, -1.0]]).double(),
            torch.ones(1).double(), size, backend=backend,
        ).view(4, 6)  # fmt: skip
        want = torch.zeros_like(image)
        want[:, 1] = 1.0
        torch.testing.assert_close(out, want)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_an_image_does_not_depend_on_its_batch_mates_nor_on_what_surrounds_it(backend):
    x = inputs((3, 5))
    together = call((3, 5), backend)(**{name: poison_surroundings(tensor) for name, tensor in x.items()})
    for index in range(2):
        one = {name: t[index : index + 1] if t.dim() == 4 else t for name, t in x.items()}
        torch.testing.assert_close(call((3, 5), backend)(**one)[0], together[index], **EXACT)


@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_one_graph_under_torch_compile(backend, device):
    x = {name: tensor.to(device, HALF).requires_grad_() for name, tensor in inputs((3, 5)).items()}
    run = torch.compile(call((3, 5), backend), backend="aot_eager", fullgraph=True)
    found, want = run(**x), call((3, 5), backend)(**x)
    torch.testing.assert_close(found, want)
    of = lambda out: torch.autograd.grad(out.float().square().sum(), list(x.values()))  # noqa: E731
    for ours, theirs in zip(of(found), of(want), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "text"),
    [
        ("key", torch.ones(2, 3, 15, 4), ValueError, r"key has shape \[2, 3, 15, 4\], but query \[2, 3, 15, 8\]"),
        ("value", torch.ones(2, 1, 15, 8), ValueError, r"must share \[batch, heads, tokens\] = \[2, 3, 15\]"),
        ("position_weight", torch.ones(3, 2), ValueError, r"shape \[3, 2\]; it must be \[heads, 3\] = \[3, 3\]"),
        ("gate", torch.ones(2), ValueError, r"gate has shape \[2\]; it must be \[heads\] = \[3\]"),
        ("gate", torch.ones(3).int(), TypeError, "gate has dtype torch.int32; use a floating-point dtype"),
        ("value", torch.ones(2, 3, 15, 8).half(), TypeError, "value has dtype torch.float16, but query has"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(name, tensor, error, text):
    x = {key: value.float() for key, value in inputs((3, 5)).items()}
    with pytest.raises(error, match=text):
        gated_positional_attention(**{**x, name: tensor}, size=(3, 5))


def test_a_map_or_a_backend_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"size=\(3, 4\) has 12 tokens, but query has 15"):
        call((3, 4), "auto")(**inputs((3, 5)))
    with pytest.raises(
        ValueError, match='backend=\'flex\' is not one of "auto", "triton", "sdpa", "reference"'
    ):
        call((3, 5), "flex")(**inputs((3, 5)))
    with pytest.raises(ValueError, match="query is float64; the width of the map is 130.*Able: .*reference"):
        call((1, 130), "triton")(**inputs((1, 130)))
    with pytest.raises(ValueError, match=r"the last axis of value is 144 \(at most 128\)"):
        call((2, 2), "triton")(**inputs((2, 2), value_dim=144))
