from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from undivided.ops import grouped_attention
from undivided.ops.grouped import Windows
from undivided.testing import compare_op, poison_surroundings

EXACT = {"rtol": 1e-12, "atol": 1e-12}
MAPS = {
    "a line": Windows((12,), (3,)),
    "a map": Windows((4, 6), (2, 3)),
    "one window": Windows((3, 5), (3, 5)),
    "windows of one token": Windows((2, 3), (1, 1)),
    "a volume": Windows((2, 4, 4), (2, 2, 1)),
}
every_map = pytest.mark.parametrize("groups", MAPS.values(), ids=MAPS)
shared_or_not = pytest.mark.parametrize("shared", [False, True], ids=["own queries", "shared query"])


def inputs(groups, shared=False, batch=2, heads=3, dim=8, value_dim=8, bias=True, dtype=torch.float64):
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    size = groups.group_size
    x = {
        "query": draw(batch, heads, size if shared else groups.num_tokens, dim),
        "key": draw(batch, heads, groups.num_tokens, dim),
        "value": draw(batch, heads, groups.num_tokens, value_dim),
    }
    return x | ({"bias": draw(heads, size, size)} if bias else {})


def call(groups, shared, backend="reference"):
    return lambda **x: grouped_attention(groups=groups, shared_query=shared, backend=backend, **x)


def places(groups):
    """The tokens of each window, `[num_groups, group_size]`, by division alone."""
    coordinates = torch.cartesian_prod(*(torch.arange(n) for n in groups.size)).reshape(groups.num_tokens, -1)
    window = coordinates // torch.tensor(groups.window_size)
    keys = [tuple(row) for row in window.tolist()]
    return torch.tensor([[t for t, key in enumerate(keys) if key == one] for one in sorted(set(keys))])


@every_map
@shared_or_not
def test_equals_a_loop_over_windows(groups, shared):
    x = inputs(groups, shared, value_dim=5)
    want = torch.empty(2, 3, groups.num_tokens, 5, dtype=torch.float64)
    for tokens in places(groups):
        query = x["query"] if shared else x["query"][:, :, tokens]
        logits = 8**-0.5 * query @ x["key"][:, :, tokens].transpose(-2, -1) + x["bias"]
        want[:, :, tokens] = logits.softmax(-1) @ x["value"][:, :, tokens]
    torch.testing.assert_close(call(groups, shared)(**x), want, **EXACT)


@every_map
@shared_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_sdpa_is_as_accurate_as_the_reference(groups, shared, dtype):
    x = inputs(groups, shared, value_dim=6)
    compare_op(call(groups, shared, "sdpa"), call(groups, shared), call(groups, shared), x, dtype)


@shared_or_not
def test_sdpa_without_a_bias(shared):
    groups = MAPS["a map"]
    x = inputs(groups, shared, bias=False)
    compare_op(call(groups, shared, "sdpa"), call(groups, shared), call(groups, shared), x, torch.float32)


def test_shared_queries_are_those_repeated_for_each_window():
    groups = MAPS["a map"]
    x = {name: tensor.requires_grad_() for name, tensor in inputs(groups, shared=True).items()}
    copied = groups.scatter(x["query"][:, None].expand(-1, groups.num_groups, -1, -1, -1))
    want = grouped_attention(copied, x["key"], x["value"], groups, bias=x["bias"], backend="reference")
    cotangent = torch.randn_like(want)
    gradients = torch.autograd.grad(want, list(x.values()), cotangent)
    for backend in ("sdpa", "reference"):
        out = call(groups, True, backend)(**x)
        torch.testing.assert_close(out, want, **EXACT)
        found = torch.autograd.grad(out, list(x.values()), cotangent)
        torch.testing.assert_close(found, gradients, **EXACT)


class AttentionCalls(TorchDispatchMode):
    """Notes the query that reaches torch's attention."""

    def __init__(self):
        super().__init__()
        self.queries = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_scaled_dot_product" in str(func):
            self.queries.append(args[0])
        return func(*args, **(kwargs or {}))


def test_shared_queries_are_not_copied_for_the_windows():
    groups = MAPS["a map"]
    x = inputs(groups, shared=True, dtype=torch.float32)
    with torch.no_grad(), AttentionCalls() as calls:
        call(groups, True, "sdpa")(**x)
    (query,) = calls.queries
    assert query.shape[1] == groups.num_groups
    assert query.stride(1) == 0
    assert query.untyped_storage().data_ptr() == x["query"].untyped_storage().data_ptr()


@every_map
@pytest.mark.parametrize("axis", [1, 2])
def test_scatter_undoes_gather(groups, axis):
    x = torch.randn(2, 3, groups.num_tokens, 4)
    windows = groups.gather(x, group_axis=axis)
    assert windows.shape[axis] == groups.num_groups
    assert windows.shape[3] == groups.group_size
    by_hand = x[:, :, places(groups)]
    assert torch.equal(windows, by_hand if axis == 2 else by_hand.transpose(1, 2))
    assert torch.equal(groups.scatter(windows, group_axis=axis), x)


@shared_or_not
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients_are_those_of_finite_differences(shared, backend):
    groups = Windows((2, 4), (2, 2))
    x = inputs(groups, shared, batch=1, heads=2, dim=2, value_dim=2)
    function = lambda *tensors: call(groups, shared, backend)(**dict(zip(x, tensors, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()])


@shared_or_not
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_reads_views_and_nothing_beside_them(shared, backend):
    groups = MAPS["a map"]
    x = inputs(groups, shared, dtype=torch.float32)
    views = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    assert torch.equal(call(groups, shared, backend)(**views), call(groups, shared, backend)(**x))


@shared_or_not
def test_an_image_does_not_depend_on_its_batch_mates(shared):
    groups = MAPS["a map"]
    x = inputs(groups, shared, batch=4)
    together = call(groups, shared, "sdpa")(**x)
    for index in range(4):
        alone = {name: t if name == "bias" else t[index : index + 1] for name, t in x.items()}
        torch.testing.assert_close(
            call(groups, shared, "sdpa")(**alone)[0], together[index], rtol=1e-14, atol=1e-14
        )


@shared_or_not
@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_a_batch_of_no_images_has_no_outputs(shared, backend):
    groups = MAPS["a map"]
    assert call(groups, shared, backend)(**inputs(groups, shared, batch=0)).shape == (0, 3, 24, 8)


@shared_or_not
def test_one_graph_under_torch_compile(shared):
    groups = MAPS["a map"]
    x = inputs(groups, shared, dtype=torch.float32)
    compiled = torch.compile(call(groups, shared, "auto"), backend="eager", fullgraph=True)
    assert torch.equal(compiled(**x), call(groups, shared, "auto")(**x))


@pytest.mark.parametrize(
    ("size", "window", "text"),
    [
        (
            (8, 30),
            (4, 7),
            r"window_size\[1\] is 7, which does not divide the 30 positions of axis 1; pad it to 35",
        ),
        ((8, 8), (4, 0), r"window_size\[1\] is 0; it must be at least 1"),
        ((8, 8), (4,), r"size=\(8, 8\) and window_size=\(4,\) must have the same one to three axes"),
    ],
)
def test_windows_that_do_not_fit_are_named(size, window, text):
    with pytest.raises(ValueError, match=text):
        Windows(size, window)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            dict(query=torch.randn(2, 3, 6, 8)),
            "query has 6 tokens with shared_query=False, but groups has 24",
        ),
        (dict(shared_query=True), "query has 24 tokens with shared_query=True, but a group has 6"),
        (dict(key=torch.randn(2, 3, 20, 8)), "key has 20 tokens, but groups has 24"),
        (dict(key=torch.randn(2, 1, 24, 8)), r"must share \[batch, heads\]"),
        (dict(key=torch.randn(2, 3, 24, 4)), "key has head_dim 4, but query has 8"),
        (dict(bias=torch.zeros(3, 24, 24)), r"bias has shape \[3, 24, 24\]; it must be .* = \[3, 6, 6\]"),
        (dict(bias=torch.zeros(3, 6, 6, dtype=torch.bool)), "bias has dtype torch.bool"),
        (dict(backend="triton"), 'backend=\'triton\' is not one of "auto", "sdpa", "reference"'),
    ],
)
def test_bad_input_is_named(change, text):
    groups = MAPS["a map"]
    arguments = inputs(groups, dtype=torch.float32) | {"groups": groups} | change
    with pytest.raises((ValueError, TypeError), match=text):
        grouped_attention(**arguments)
