from __future__ import annotations

import pytest
import torch

from tests.ops.whole_graphs import assert_compiles_whole, assert_host_never_waits
from undivided.ops import compressed_attention, dense_attention, select_compressed
from undivided.ops.block_map import block_mask, select_topk
from undivided.ops.compressed import choice, compressed_blocks, importance, visible_blocks
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SIZES = {"kernel_size": 4, "kernel_stride": 2}
SHAPES = {
    "a group of two": dict(),
    "a head a group": dict(key_heads=4),
    "a group of three": dict(heads=3, key_heads=1),
    "queries behind a cache": dict(queries=21),
    "blocks that do not overlap": dict(kernel_size=4, kernel_stride=4),
    "long overlaps": dict(kernel_size=8, kernel_stride=2, keys=61),
    "a block of one token": dict(kernel_size=1, kernel_stride=1, keys=37),
    "no block at all": dict(keys=3),
    "one query": dict(queries=1),
    "widths that are no powers of two": dict(head_dim=24, value_dim=40, keys=41),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(
    batch=1, heads=4, key_heads=2, queries=None, keys=70, kernel_size=4, kernel_stride=2, head_dim=16, value_dim=16,
    dtype=torch.float64, device=None,
):  # fmt: skip
    def draw(heads, length, width):
        return torch.randn(batch, heads, length, width, dtype=dtype).to(device)

    blocks = compressed_blocks(keys, kernel_size, kernel_stride)
    x = {
        "query": draw(heads, keys if queries is None else queries, head_dim),
        "key": draw(key_heads, blocks, head_dim),
        "value": draw(key_heads, blocks, value_dim),
    }
    return x, {"num_keys": keys, "kernel_size": kernel_size, "kernel_stride": kernel_stride}


def call(backend, options):
    return lambda **x: compressed_attention(**x, **options, backend=backend)


def lists_of(backend, x, options, block_size=8, topk=4, **more):
    lse = more.pop("lse", None)
    if lse is None:
        lse = call("reference", options)(**x)[1]
    return select_compressed(
        x["query"], x["key"], lse, **options, block_size=block_size, topk=topk, backend=backend, **more
    )


@pytest.fixture
def lists_by_sorting(monkeypatch):
    """The second kernel of the choice is tested beside block maps; interpreted, it takes most of the time here."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(
            choice.lists, "select", lambda scores, topk, width: (*select_topk(scores, topk), None)
        )


@every_shape
def test_is_dense_attention_under_the_staircase_and_zero_before_it(shape):
    x, options = inputs(**shape)
    out, lse = call("reference", options)(**x)
    num_keys, queries = options["num_keys"], x["query"].shape[2]
    position = torch.arange(num_keys - queries, num_keys)
    mask = visible_blocks(position, x["key"].shape[2], options["kernel_size"], options["kernel_stride"])
    blind = ~mask.any(-1)
    assert not out[:, :, blind].any() and (lse[:, :, blind] == float("-inf")).all()
    if not blind.all():
        x["query"] = x["query"][:, :, ~blind]
        expected = dense_attention(**x, attn_mask=mask[~blind], return_lse=True, backend="reference")
        for ours, theirs in zip((out, lse), expected, strict=True):
            torch.testing.assert_close(ours[:, :, ~blind], theirs, **EXACT)


@every_shape
def test_kernels_are_as_accurate_as_eager(shape, device):
    x, options = inputs(**shape, device=device)
    reference = call("reference", options)
    compare_op(call("triton", options), reference, reference, x, HALF)


def test_kernels_in_float32_are_as_accurate_as_eager(device):
    x, options = inputs(keys=41, device=device)
    reference = call("reference", options)
    compare_op(call("triton", options), reference, reference, x, torch.float32)


def test_gradients_of_the_reference_are_those_of_finite_differences():
    x, options = inputs(keys=9, head_dim=3, value_dim=2)
    leaves = [tensor.requires_grad_() for tensor in x.values()]

    def function(*tensors):
        out, lse = call("reference", options)(**dict(zip(x, tensors, strict=True)))
        return out, lse[:, :, 3:]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize(
    ("kernel", "stride", "block"), [(32, 16, 64), (8, 4, 16), (16, 4, 8), (4, 4, 4), (6, 2, 2)]
)
def test_importance_counts_the_strides_that_blocks_share(kernel, stride, block):
    length = 5 * block
    blocks = compressed_blocks(length, kernel, stride)
    weights = torch.rand(3, blocks, dtype=torch.float64)
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for i in range(blocks):
        for token in range(i * stride, i * stride + kernel):
            expected[:, token // block] += weights[:, i] / stride
    torch.testing.assert_close(importance(weights, 5, kernel, stride, block), expected, **EXACT)


def test_importance_has_the_weights_of_the_release():
    # One, two, two, two, one, from the compressed block before the selection block on.
    scores = importance(torch.eye(15), 4, 32, 16, 64)
    assert scores[3:8, 1].tolist() == [1, 2, 2, 2, 1]
    assert scores[[2, 8], 1].tolist() == [0, 0]


def test_a_query_sees_the_blocks_that_end_at_it_or_before():
    assert visible_blocks(torch.arange(7), 3, 4, 2).sum(-1).tolist() == [0, 0, 0, 1, 1, 2, 2]


def gradients(function, x):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    out, lse = function(**leaves)
    total = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
    return out, lse, *torch.autograd.grad(total, list(leaves.values()))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_first_tokens_have_zeros_and_no_gradient(backend, device):
    x, options = inputs(keys=20, dtype=torch.float32, device=device)
    out, lse, dquery, *_ = gradients(call(backend, options), x)
    assert not out[:, :, :3].any() and (lse[:, :, :3] == float("-inf")).all()
    assert not dquery[:, :, :3].any() and dquery[:, :, 5:].any()
    assert out[:, :, 3:].abs().amin() > 0


def test_everything_is_written_with_the_same_bits_and_nothing_around_is_read(device, lists_by_sorting):
    x, options = inputs(keys=41, dtype=HALF, device=device)
    expected = gradients(call("triton", options), x)
    strided = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    with poisoned_empty():
        found = gradients(call("triton", options), strided)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    with poisoned_empty():
        lists = lists_of("triton", strided, options, lse=expected[1])
    assert torch.equal(lists.index, lists_of("triton", x, options, lse=expected[1]).index)
    assert found[0].transpose(1, 2).is_contiguous()


CHOICES = {
    "a group of two": dict(),
    "a whole text": dict(keys=60, queries=60, batch=1),
    "a group of three": dict(heads=3, key_heads=1),
    "a head a group": dict(key_heads=4, heads=4),
    "one query": dict(queries=1),
    "blocks that do not overlap": dict(kernel_size=4, kernel_stride=4),
    "overlaps as long as a block": dict(kernel_size=10, kernel_stride=2),
    "a block of one stride": dict(kernel_size=8, kernel_stride=8),
    "fewer blocks than are wanted": dict(keys=19, queries=19),
    "no compressed block": dict(keys=3, queries=3),
}


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("shape", CHOICES.values(), ids=CHOICES)
def test_kernels_choose_as_the_reference_does(shape, dtype, device, lists_by_sorting):
    x, options = inputs(**({"keys": 150, "queries": 20, "batch": 2} | shape), device=device)
    x = {name: tensor.to(dtype) for name, tensor in x.items()}
    lse = call("reference", options)(**x)[1]
    ours, theirs = (lists_of(backend, x, options, lse=lse) for backend in ("triton", "reference"))
    assert torch.equal(ours.counts, theirs.counts)
    blocks = -(-options["num_keys"] // 8)
    masks = [block_mask(lists, blocks).cpu() for lists in (ours, theirs)]
    differ = (masks[0] != masks[1]).any(-1)
    # Only scores that rounding cannot tell apart may be chosen otherwise, and seldom.
    assert differ.float().mean() < 0.02
    scores = exact_scores(x, options, blocks)[differ]
    for row, mine, other in zip(scores, masks[0][differ], masks[1][differ], strict=True):
        torch.testing.assert_close(row[mine].sort().values, row[other].sort().values, rtol=1e-5, atol=0.0)


def exact_scores(x, options, blocks, block_size=8):
    query, key = (x[name].double().cpu() for name in ("query", "key"))
    groups = key.shape[1]
    position = torch.arange(options["num_keys"] - query.shape[2], options["num_keys"])
    seen = visible_blocks(position, key.shape[2], options["kernel_size"], options["kernel_stride"])
    logits = query.unflatten(1, (groups, -1)) @ key.mT[:, :, None] * query.shape[3] ** -0.5
    weights = logits.masked_fill(~seen, -1e9).softmax(-1).masked_fill(~seen, 0.0).sum(2)
    return importance(weights, blocks, options["kernel_size"], options["kernel_stride"], block_size)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_of_equal_scores_the_first_blocks_are_chosen(backend, device, lists_by_sorting):
    x, options = inputs(keys=150, queries=20, heads=2, key_heads=1, dtype=torch.float32, device=device)
    # All keys are one key: a block of tokens scores by how many compressed blocks it shares, the inner ones alike.
    x["key"] = x["key"][:, :, :1].expand_as(x["key"]).contiguous()
    index, counts = lists_of(backend, x, options, topk=6)
    assert (counts == 6).all()
    for row, position in ((0, 130), (7, 137), (19, 149)):
        own = position // 8
        # The first block and the two local ones are given; of the inner ones the first three.
        assert index[0, 0, row].tolist() == [0, 1, 2, 3, own - 1, own], row


def test_few_queries_at_a_time_change_nothing(device, monkeypatch, lists_by_sorting):
    x, options = inputs(keys=60, key_heads=4, dtype=torch.float32, device=device)
    expected = lists_of("triton", x, options)
    monkeypatch.setattr(choice, "SCORE_BYTES", 4 * 4 * 8 * 32)
    for ours, theirs in zip(lists_of("triton", x, options), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_given_blocks_are_listed_and_none_of_the_future(backend, device):
    x, options = inputs(keys=60, heads=2, dtype=torch.float32, device=device)
    lists = lists_of(backend, x, options, init_blocks=2, local_blocks=1)
    mask, own = block_mask(lists, 8).cpu(), torch.arange(60) // 8
    assert torch.equal(mask.sum(-1), (own + 1).clamp(max=4).expand(1, 2, 60))
    assert (
        mask[..., 0].all() and mask[:, :, 8:, 1].all() and not (mask & (torch.arange(8) > own[:, None])).any()
    )
    assert mask.gather(-1, own[None, None, :, None].expand(1, 2, -1, 1)).all()
    valid = torch.arange(4, device=device) < lists.counts[..., None]
    assert (lists.index[~valid] == -1).all() and ((lists.index.diff(dim=-1) > 0) | ~valid[..., 1:]).all()


def test_operators_pass_opcheck(device, lists_by_sorting):
    x, options = inputs(keys=20, dtype=HALF, device=device)
    settings = (*options.values(), 0.3)
    operators, tests = torch.ops.undivided, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.compressed_forward, (*x.values(), *settings), test_utils=tests)
    out, lse = operators.compressed_forward(*x.values(), *settings)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (torch.randn_like(out), dlse, out, *x.values(), lse, *settings)
        torch.library.opcheck(operators.compressed_backward, arguments, test_utils=tests)
    arguments = (x["query"], x["key"], lse, *options.values(), 8, 9, 1, 2, 0.3)
    torch.library.opcheck(operators.compressed_choice, arguments, test_utils=tests)


def assert_both_compile(backend, device):
    x, options = inputs(keys=30, dtype=torch.float32, device=device)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}

    def both(**x):
        out, lse = call(backend, options)(**x)
        lists = lists_of(backend, x, options, lse=lse)
        return out * (1 + lists.counts.sum())

    assert_compiles_whole(both, x)


def test_kernels_compile_into_one_graph(device, lists_by_sorting):
    assert_both_compile("triton", device)


def test_the_reference_compiles_into_one_graph():
    assert_both_compile("reference", "cpu")


@pytest.mark.gpu
def test_the_host_never_waits():
    x, options = inputs(keys=300, dtype=torch.bfloat16, device="cuda")
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}

    def both(**x):
        out, lse = call("triton", options)(**x)
        lists = lists_of("triton", x, options, lse=lse)
        return out * (1 + lists.index.sum())

    assert_host_never_waits(both, x)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.compressed import backward, choice, triton

for heads, dim in ((4, 128), (1, 256)):
    query = torch.empty(1, 4, 512, dim, dtype=torch.bfloat16)
    key, value = (torch.empty(1, heads, 31, dim, dtype=torch.bfloat16) for _ in range(2))
    sizes = (512, 32, 16)
    out, lse = triton.forward(query, key, value, *sizes, 0.1)
    choice.choose(query, key, lse, *sizes, 64, 16, 1, 2, 0.1)
    backward.backward(out, None, out, query, key, value, lse, *sizes, 0.1)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_forward_kernel", "_score_kernel", "_select_kernel", "_delta_kernel", "_query_kernel", "_key_kernel",
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_kernels_say_what_they_cannot_do():
    for shape, dtype, more, text in (
        (dict(), torch.float64, {}, r"query is float64 \(needs float32, float16 or bfloat16\)"),
        (dict(head_dim=264), HALF, {}, r"head_dim is 264 \(at most 256\)"),
        (dict(), HALF, {"scale": -1.0}, r"scale is -1.0 \(the kernels need a positive one\)"),
    ):
        x, options = inputs(keys=20, dtype=dtype, **shape)
        with pytest.raises(ValueError, match=text):
            compressed_attention(**x, **options, **more, backend="triton")
    for shape, block, text in (
        (dict(kernel_size=3, kernel_stride=3), 9, r"block_size / kernel_stride is 3 \(needs a power of two"),
        (dict(kernel_size=12), 8, r"kernel_size is 12 \(needs at most 10: a block and a stride\)"),
        (dict(heads=17, key_heads=1), 8, r"17 heads share a key head \(at most 16\)"),
    ):  # fmt: skip
        x, options = inputs(keys=30, dtype=HALF, **shape)
        with pytest.raises(ValueError, match=text):
            lists_of("triton", x, options, block_size=block)


def test_bad_input_is_named():
    x, options = inputs(keys=20)
    for change, text in (
        (dict(kernel_size=5), "kernel_stride=2 does not divide kernel_size=5; overlaps of blocks are counted in strid"),
        (dict(kernel_stride=0), "kernel_stride=0 must be at least 1."),
        (dict(kernel_size=0), "kernel_size=0 must be at least 1."),
        (dict(num_keys=19), "num_keys=19 is less than the 20 queries, which are the last tokens."),
        (dict(num_keys=30), r"key has 9 blocks, but num_keys=30 tokens hold 14 \(kernel_size=4, kernel_stride=2\)"),
        (dict(key=x["key"][:, :1, :, :8]), r"key \[1, 1, 9, 8\] must have the batch and head_dim of query"),
        (dict(value=x["value"][:, :, 1:]), r"key \[1, 2, 9, 16\] and value \[1, 2, 8, 16\] must share"),
        (dict(query=x["query"][0]), r"query has shape \[4, 20, 16\]; it needs 4 axes"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            compressed_attention(**(x | options | change))
    for change, text in (
        (dict(block_size=5), "kernel_stride=2 does not divide block_size=5; overlaps of blocks are counted in strides"),
        (dict(topk=0), "topk=0 must be at least 1."),
        (dict(topk=2), "topk=2 is less than init_blocks=1 plus local_blocks=2, which are always listed."),
        (dict(local_blocks=0), "local_blocks=0 must be at least 1."),
        (dict(init_blocks=-1), "init_blocks=-1 must be at least 0."),
        (dict(lse=torch.zeros(1, 4, 19)), r"lse has shape \[1, 4, 19\]; query needs \[1, 4, 20\]."),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            lists_of("reference", x, options, **change)
    with pytest.raises(
        TypeError, match="key has dtype torch.float32, but query has torch.float64; use one dtype"
    ):
        compressed_attention(**(x | options | {"key": x["key"].float()}))
