"""Attention with distances: kernels against float64, gradients of all tables, memory, lengths, layouts and refusals."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.ops.whole_graphs import assert_compiles_whole, assert_host_never_waits
from undivided.ops import relative_attention
from undivided.ops._flash import Tiling
from undivided.ops.relative.triton import by_distance, by_key
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "one tile": dict(queries=17, keys=17),
    "several tiles": dict(batch=1, heads=1, queries=150, keys=150),
    "behind a memory": dict(queries=9, keys=80),
    "a memory that is no multiple of a tile": dict(batch=1, heads=1, queries=70, keys=101),
    "one query": dict(queries=1, keys=70),
    "one key": dict(queries=1, keys=1),
    "grouped heads": dict(heads=4, key_heads=2, queries=20, keys=33),
    "a width that is no power of two": dict(head_dim=24, queries=20, keys=33),
    "a longer table": dict(queries=9, keys=12, distances=40),
}


def inputs(
    batch=2, heads=2, key_heads=None, queries=7, keys=7, head_dim=16, distances=None, device="cpu"
):  # fmt: skip
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device)

    key_heads, distances = key_heads or heads, distances or keys
    return {
        "query": draw(batch, heads, queries, head_dim), "key": draw(batch, key_heads, keys, head_dim),
        "value": draw(batch, key_heads, keys, head_dim), "content_bias": draw(heads, head_dim),
        "distance_vectors": draw(distances, heads, head_dim), "distance_bias": draw(distances, heads),
    }  # fmt: skip


def call(backend, **options):
    return lambda **x: relative_attention(**x, backend=backend, **options)


def by_shift(query, key, value, content_bias, distance_vectors, distance_bias):
    """Transformer-XL's own form, in the dtype given: all products with distances, then the shift by a column."""
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    # Column p is distance K - 1 - p of the last query.
    vectors, biases = distance_vectors[:num_keys].flip(0), distance_bias[:num_keys].flip(0)
    products = torch.einsum("bhqd,phd->bhqp", query, vectors) + biases.T[:, None]
    padded = torch.nn.functional.pad(products, (1, 0)).reshape(batch, heads, num_keys + 1, num_queries)
    shifted = padded[:, :, 1:].reshape(batch, heads, num_queries, num_keys)
    scores = head_dim**-0.5 * ((query + content_bias[:, None]) @ key.mT + shifted)
    later = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).triu(
        num_keys - num_queries + 1
    )
    scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("shape", [(5, 5), (4, 13), (1, 6)], ids=str)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_the_shift_by_a_column_gives_the_same(shape, backend):
    x = inputs(queries=shape[0], keys=shape[1])
    torch.testing.assert_close(call(backend)(**x), by_shift(**x), **EXACT)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_kernels_are_as_accurate_as_eager(shape, device):
    reference = call("reference", return_lse=True)
    compare_op(call("triton", return_lse=True), reference, reference, inputs(**shape, device=device), HALF)


@pytest.mark.parametrize("shape", [(17, 17), (5, 36)], ids=str)
def test_the_kernels_in_float32(shape, device):
    reference = call("reference", return_lse=True)
    x = inputs(queries=shape[0], keys=shape[1], device=device)
    # A logit is rounded once more on its way to base 2, and float32 shows it.
    compare_op(call("triton", return_lse=True), reference, reference, x, torch.float32, factor=3.0)


def test_tables_of_float32_have_gradients_of_float32(device):
    """As under autocast; the sums over pairs are not rounded to the precision of the products."""
    x = inputs(queries=20, keys=33, device=device)
    tables = {name: x[name].float().requires_grad_() for name in list(x)[3:]}
    half = {name: x[name].to(HALF).requires_grad_() for name in list(x)[:3]}
    out = call("triton")(**half, **tables)
    assert out.dtype == HALF
    found = torch.autograd.grad(out.float().square().sum(), list(tables.values()))
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in {**half, **tables}.items()}
    want = torch.autograd.grad(call("reference")(**exact).square().sum(), [exact[name] for name in tables])
    for ours, theirs in zip(found, want, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()


@pytest.mark.parametrize("rows", [16, 64])
def test_every_size_of_tile_gives_the_same(rows, device):
    from undivided.ops.relative import backward, triton

    x = {name: tensor.to(device, HALF) for name, tensor in inputs(1, 1, queries=20, keys=50).items()}
    tiling = Tiling(rows, rows, 4, 1)
    out, lse = triton.forward(*x.values(), 0.25, tiling=tiling)
    want = triton.forward(*x.values(), 0.25, tiling=Tiling(32, 32, 4, 1))
    torch.testing.assert_close((out, lse), want, rtol=0.02, atol=0.01)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found, want = (
        backward.backward(dout, dlse, out, lse, *x.values(), 0.25, tilings=(each,) * 3)
        for each in (tiling, Tiling(32, 32, 4, 1))
    )
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


@triton.jit
def _shift(band, tile, back, BLOCK: tl.constexpr, KEYS_FIRST: tl.constexpr):
    row, wide = tl.arange(0, BLOCK)[:, None], tl.arange(0, 2 * BLOCK)
    if KEYS_FIRST:
        place = wide[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    else:
        place = row * (2 * BLOCK) + wide[None, :]
    given = tl.load(band + place)
    shifted = by_key(given, BLOCK, KEYS_FIRST)
    tl.store(tile + row * BLOCK + tl.arange(0, BLOCK)[None, :], shifted)
    if not KEYS_FIRST:
        tl.store(back + place, by_distance(shifted, given, BLOCK))


def test_a_band_is_shifted_row_by_row_and_back(device):
    size = 32
    band = torch.randn(size, 2 * size, device=device)
    a, c, e = (torch.arange(n, device=device) for n in (size, size, 2 * size))
    want = band.gather(1, a[:, None] - c + size)
    found, back = torch.empty_like(want), torch.empty_like(band)
    _shift[1,](band, found, back, size, False, num_warps=4)
    assert torch.equal(found, want)
    inside = (e > a[:, None]) & (e <= a[:, None] + size)
    assert torch.equal(back, band * inside)
    _shift[1,](band.T.contiguous(), found, back, size, True, num_warps=4)
    assert torch.equal(found, want.T)


def test_the_kernels_write_all_of_fresh_buffers_and_read_nothing_else(device):
    x = {
        name: tensor.to(device, HALF)
        for name, tensor in inputs(1, 2, 1, queries=20, keys=33, head_dim=24).items()
    }

    def run(tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        out = call("triton")(**leaves)
        return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    expected = run(x)
    with poisoned_empty():
        found = run({name: poison_surroundings(tensor) for name, tensor in x.items()})
    for ours, want in zip(found, expected, strict=True):
        assert torch.equal(ours, want)


def test_a_layers_projections_need_no_copy_and_the_next_none(device):
    joined = torch.randn(2, 20, 3, 4, 16, device=device, dtype=HALF)
    query, key, value = joined.permute(2, 0, 3, 1, 4).unbind(0)
    tables = {name: t.to(device, HALF) for name, t in list(inputs(heads=4, keys=20).items())[3:]}
    out = relative_attention(query, key, value, **tables, backend="triton")
    assert out.transpose(1, 2).is_contiguous()
    copies = [tensor.contiguous() for tensor in (query, key, value)]
    torch.testing.assert_close(out, relative_attention(*copies, **tables, backend="triton"))


def test_a_text_does_not_depend_on_its_batch_mates_and_no_query_on_later_keys(device):
    x = {name: tensor.to(device, HALF) for name, tensor in inputs(queries=20, keys=33).items()}
    together = call("triton")(**x)
    alone = {name: tensor[1:] if tensor.dim() == 4 else tensor for name, tensor in x.items()}
    assert torch.equal(call("triton")(**alone), together[1:])
    later = {name: x[name].clone() for name in ("key", "value")}
    for tensor in later.values():
        tensor[:, :, 23:] = torch.randn_like(tensor[:, :, 23:])
    assert torch.equal(call("triton")(**{**x, **later})[:, :, :10], together[:, :, :10])


def test_without_queries_keys_have_no_gradient(device):
    x = {name: t.to(device, HALF).requires_grad_() for name, t in inputs(queries=0, keys=5).items()}
    out, lse = call("triton", return_lse=True)(**x)
    assert out.shape == (2, 2, 0, 16)
    assert lse.shape == (2, 2, 0)
    for gradient in torch.autograd.grad(out.sum() + lse.sum(), list(x.values())):
        assert not gradient.any()


def test_opcheck(device):
    x = {name: tensor.to(device, HALF) for name, tensor in inputs(queries=9, keys=20).items()}
    arguments = (*x.values(), 0.25)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.undivided.relative_forward, arguments, test_utils=tests)
    out, lse = torch.ops.undivided.relative_forward(*arguments)
    arguments = (torch.randn_like(out), torch.randn_like(lse), out, lse, *arguments)
    torch.library.opcheck(torch.ops.undivided.relative_backward, arguments, test_utils=tests)


def test_one_graph_under_torch_compile(device):
    x = {
        name: tensor.to(device, HALF).requires_grad_()
        for name, tensor in inputs(queries=9, keys=20, distances=24).items()
    }
    assert_compiles_whole(call("triton"), x)


# PyTorch 2.11 sees the nodes of the captured graph, which its outputs keep alive, when gradients are taken again.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@pytest.mark.gpu
def test_the_host_never_waits(device):
    x = {
        name: tensor.to(device, HALF).requires_grad_() for name, tensor in inputs(queries=70, keys=90).items()
    }
    assert_host_never_waits(call("triton"), x)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.relative import backward, triton as forward

for dtype, width in ((torch.bfloat16, 64), (torch.float32, 16)):
    query, key, value = torch.empty(1, 96, 3, 2, width, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)
    inputs = query, key, value, torch.empty(2, width), torch.empty(96, 2, width), torch.empty(96, 2), 0.1
    out, lse = forward.forward(*inputs)
    backward.backward(out, lse, out, lse, *inputs)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    names = ["_content_kernel", "_forward_kernel", "_content_kernel", "_query_kernel", "_key_kernel"]
    names.append("_distance_kernel")
    assert [name for name, _ in lines] == 2 * names
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


@pytest.mark.parametrize("backend", ["triton", "blocked", "reference"])
def test_no_tensor_of_all_pairs_exists_forward_or_backward(backend, device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    from tests.ops.test_positional import Largest

    # Shapes alone, which opcheck holds against those of the kernels.
    with FakeTensorMode():
        x = {
            name: tensor.half().requires_grad_()
            for name, tensor in inputs(2, queries=1024, keys=1536, head_dim=4, device=device).items()
        }
        with Largest() as largest:
            call(backend)(**x).sum().backward()
    # Of one head of one text there are 1024 * 1536.
    assert (largest.elements < 1024 * 1536) == (backend != "reference")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"attn_mask": torch.ones(7, 7, dtype=torch.bool)}, "attn_mask is given"),
        ({"scale": -1.0}, r"scale is -1.0 \(the kernels need a positive one\)"),
        ({"query": torch.ones(2, 2, 7, 144), "key": torch.ones(2, 2, 7, 144), "value": torch.ones(2, 2, 7, 144),
          "content_bias": torch.ones(2, 144), "distance_vectors": torch.ones(7, 2, 144)},
         r"head_dim is 144 \(at most 128\)"),
        ({}, "query is float64"),
    ],
)  # fmt: skip
def test_what_the_kernels_cannot_run_is_named(change, text, device):
    x = {**inputs(), **change}
    x = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in x.items()}
    if change:
        floating = lambda t: isinstance(t, torch.Tensor) and t.is_floating_point()  # noqa: E731
        x = {name: t.float() if floating(t) else t for name, t in x.items()}
    with pytest.raises(ValueError, match=text) as error:
        relative_attention(**x, backend="triton")
    assert '"blocked", "reference"' in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor", "error", "text"),
    [
        ("key", torch.ones(2, 2, 7, 8), ValueError, r"key \[2, 2, 7, 8\] and value .* must be \[2, a divisor of 2"),
        ("query", torch.ones(2, 2, 9, 16), ValueError, "there are 9 queries and 7 keys"),
        ("content_bias", torch.ones(2, 8), ValueError, r"content_bias is \[2, 8\]; it must be \[2, 16\]"),
        ("distance_bias", torch.ones(7), ValueError, r"distance_bias is \[7\]; it must be \[7, 2\]"),
        ("value", torch.ones(2, 2, 7, 16).half(), TypeError, "value has dtype torch.float16, but query has"),
    ],
)  # fmt: skip
def test_a_tensor_that_does_not_fit_is_named(name, tensor, error, text):
    x = {key: value.float() for key, value in inputs().items()}
    with pytest.raises(error, match=text):
        relative_attention(**{**x, name: tensor})
