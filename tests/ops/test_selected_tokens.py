from __future__ import annotations

import sys

import pytest
import torch

from tests.ops.test_selected import EXACT, HALF, call, inputs
from undivided.ops import dense_attention
from undivided.ops.block_map import block_mask
from undivided.ops.selected import (
    selected_attention,
    tokens,
    tokens_backward,
    tokens_forward,
    tokens_index,
    tokens_two_pass,
)
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

ORDERS = ("query_outer", "key_outer")
SHAPES = {
    "a list a head": dict(list_heads=4),
    "one list for a group": dict(list_heads=2),
    "a head a list": dict(list_heads=4, key_heads=4),
    "a group of five": dict(heads=5, key_heads=1, list_heads=1),
    "queries behind a cache": dict(queries=9, keys=37),
    "queries that see nothing": dict(queries=24, keys=10),
    "one query": dict(queries=1),
    "widths that are no powers of two": dict(head_dim=24, value_dim=40),
    "packed sequences": dict(queries=23, keys=23, cu_seqlens=[0, 3, 3, 20, 23]),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_order = pytest.mark.parametrize("order", ORDERS)


def token_inputs(**shape):
    return inputs(**({"query_block_size": 1, "list_heads": 2, "batch": 1, "queries": 21, "keys": 21} | shape))


def gradients(function, x):
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in x.items()}
    out, lse = function(**leaves)
    total = out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()
    return out, lse, *torch.autograd.grad(total, list(leaves.values()))


@every_shape
def test_kernels_with_keys_outside_are_as_accurate_as_eager(shape, device):
    x, options = token_inputs(**shape, device=device)
    reference = call("reference", options)
    compare_op(call("key_outer", options), reference, reference, x, HALF)


@pytest.mark.parametrize(
    "shape", ["a list a head", "a group of five", "queries behind a cache", "packed sequences"]
)
def test_kernels_with_tokens_outside_are_as_accurate_as_eager(shape, device):
    x, options = token_inputs(**(dict(queries=8, keys=21) | SHAPES[shape]), device=device)
    reference = call("reference", options)
    compare_op(call("query_outer", options), reference, reference, x, HALF)


@pytest.mark.parametrize("head_dim", [144, 192, 256])
@every_order
def test_wide_heads_are_as_accurate_as_eager(order, head_dim, device):
    x, options = token_inputs(
        queries=5, head_dim=head_dim, value_dim=head_dim - 16, heads=2, key_heads=1, list_heads=1
    )
    x = {name: tensor.to(device) for name, tensor in x.items()}
    options = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
    reference = call("reference", options)
    compare_op(call(order, options), reference, reference, x, HALF)


@pytest.mark.parametrize(
    "shape", ["a list a head", "a group of five", "queries that see nothing", "packed sequences"]
)
def test_two_passes_give_the_same_and_its_gradients(shape, device):
    x, options = token_inputs(**SHAPES[shape], device=device)
    single = _float32(x)
    for ours, theirs in zip(
        *(call(order, options)(**single) for order in ("two_pass", "key_outer")), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # A maximum taken from another head of the group would overflow here.
    x["query"][:, -1] *= 30
    reference = call("reference", options)
    compare_op(call("two_pass", options), reference, reference, x, HALF)


@every_order
def test_kernels_without_causality_in_float32(order, device):
    x, options = token_inputs(queries=8, device=device)
    reference = call("reference", options, False)
    compare_op(call(order, options, False), reference, reference, x, torch.float32)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_block_sizes(block_size, device):
    x, options = token_inputs(queries=150, keys=150, block_size=block_size, topk=1, device=device)
    if not torch.cuda.is_available():
        # The interpreter is slow: the last queries see the most.
        x["query"] = x["query"][:, :, -12:]
        options |= {"index": options["index"][:, :, -12:], "counts": options["counts"][:, :, -12:]}
    reference = call("reference", options)
    compare_op(call("key_outer", options), reference, reference, x, HALF)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_is_dense_attention_under_the_mask_of_the_lists(heads, packed):
    cu_seqlens = [0, 13, 21] if packed else None
    x, options = token_inputs(heads=heads, key_heads=1, list_heads=1, cu_seqlens=cu_seqlens)
    visible = block_mask((options["index"], options["counts"]), 4 if packed else 2)
    owner = torch.arange(21) // 16
    if packed:
        owner = torch.tensor([0] * 13 + [1] * 8)
        # Blocks are cut inside each sequence; here each sequence is one, and two numbers are left over.
        assert not visible[..., 2:].any()
    mask = visible[..., owner] & (torch.arange(21) <= torch.arange(21)[:, None])
    seen = mask.any(-1)[0, 0]
    out, _ = call("reference", options)(**x)
    expected = dense_attention(
        **(x | {"query": x["query"][:, :, seen]}), attn_mask=mask[:, :, seen], backend="sdpa"
    )
    torch.testing.assert_close(out[:, :, seen], expected, **EXACT)
    assert not out[:, :, ~seen].any()


@every_order
def test_with_all_blocks_it_is_full_causal_attention(order, device):
    x, options = token_inputs(dtype=torch.float32, device=device)
    options["index"] = torch.arange(2, device=device).int().expand(1, 2, 21, 2)
    options["counts"] = torch.full((1, 2, 21), 2, device=device).int()
    expected = dense_attention(**x, is_causal=True, backend="reference")
    torch.testing.assert_close(call(order, options)(**x)[0], expected, rtol=1e-5, atol=1e-5)


def test_both_orders_agree_to_rounding(device):
    x, options = token_inputs(queries=8, dtype=torch.float32, device=device)
    for ours, theirs in zip(*(gradients(call(order, options), x) for order in ORDERS), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# The kernel with tokens outside masks after the exponential: it may be infinite where it does not count.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@every_order
def test_a_head_with_very_large_logits_is_finite_and_exact(order, device):
    x, options = token_inputs(queries=8, device=device)
    # A maximum taken from another head of the group would overflow here.
    x["query"][:, 1] *= 100
    reference = call("reference", options)
    compare_op(call(order, options), reference, reference, x, HALF)
    assert all(part.isfinite().all() for part in gradients(call(order, options), _float32(x))[2:])


def _float32(x):
    return {name: tensor.float() for name, tensor in x.items()}


@pytest.mark.parametrize("order", ["key_outer"])
def test_everything_is_written_with_the_same_bits_in_every_run(order, device):
    x, options = token_inputs(dtype=HALF, device=device)
    with poisoned_empty():
        runs = [gradients(call(order, options, False), x) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)
    assert runs[0][0].transpose(1, 2).is_contiguous()


@every_order
def test_empty_lists_have_zeros_and_no_gradient(order, device):
    x, options = token_inputs(queries=8, dtype=HALF, device=device)
    options["counts"][0, 1] = 0
    out, lse, dquery, *others = gradients(call(order, options), x)
    assert not out[0, 2:].any() and (lse[0, 2:] == float("-inf")).all() and not dquery[0, 2:].any()
    for gradient in others:
        assert gradient.isfinite().all() and not gradient[0, 1].any()


@pytest.mark.parametrize("order", ["key_outer"])
def test_what_stands_behind_the_lists_and_around_the_tensors_is_not_read(order, device):
    x, options = token_inputs(dtype=HALF, device=device)
    expected = gradients(call(order, options), x)
    valid = torch.arange(options["index"].shape[3], device=device) < options["counts"][..., None]
    options["index"] = options["index"].where(valid, 2**30)
    strided = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    for ours, theirs in zip(gradients(call(order, options), strided), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("heads_at_a_time", [1, 3, 4])
def test_a_small_buffer_changes_nothing(heads_at_a_time, device, monkeypatch):
    x, options = token_inputs(heads=8, dtype=HALF, device=device)
    expected = gradients(call("key_outer", options), x)
    slots = options["index"].shape[2] * options["index"].shape[3]
    monkeypatch.setattr(tokens_forward, "BUFFER_BYTES", heads_at_a_time * slots * 16 * 2)
    for ours, theirs in zip(gradients(call("key_outer", options), x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_a_pass_gives_its_buffers_back_before_the_next(device, monkeypatch):
    x, options = token_inputs(heads=8, dtype=HALF, device=device)
    slots = options["index"].shape[2] * options["index"].shape[3]
    monkeypatch.setattr(tokens_forward, "BUFFER_BYTES", 2 * slots * 16 * 2)
    held = []

    def watched(passes):
        def run(*sizes):
            for part in passes(*sizes):
                local = sys._getframe(1).f_locals
                held.append([name for name in ("partial", "partial_lse", "tops", "dkeys") if name in local])
                yield part

        return run

    for module in (tokens_forward, tokens_backward, tokens_two_pass):
        monkeypatch.setattr(module, "passes", watched(module.passes))
    for order in ("key_outer", "two_pass"):
        gradients(call(order, options), x)
    assert held == [[]] * 16


def test_passes_cover_every_head_once_and_fit_the_buffer():
    for lists, group, heads in ((4, 8, 3), (4, 8, 8), (3, 6, 4), (5, 2, 7), (2, 1, 1)):
        buffer = tokens_forward.BUFFER_BYTES
        found = []
        for first, some, member, members in tokens_forward.passes(lists, group, buffer // heads):
            assert some * members <= heads
            found += [(n, m) for n in range(first, first + some) for m in range(member, member + members)]
        assert sorted(found) == [(n, m) for n in range(lists) for m in range(group)]


def test_segments_of_few_rows_change_nothing(device, monkeypatch):
    # More than 64 rows a block.
    x, options = token_inputs(heads=8, key_heads=1, list_heads=1, dtype=HALF, device=device)
    expected = gradients(call("key_outer", options), x)
    monkeypatch.setattr(tokens_backward, "segment_rows", lambda *sizes: 64)
    monkeypatch.setattr(tokens_forward, "_SEGMENT_ROWS", 64)
    for ours, theirs in zip(gradients(call("key_outer", options), x), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("chunk", [None, 32])
def test_the_index_has_every_entry_once_with_tokens_ascending(chunk, device):
    _, options = token_inputs(queries=21, keys=70, device=device)
    index, counts = options["index"], options["counts"]
    counts[0, 0, :7] = 0
    index[0, 1] = index[0, 1].where(
        index[0, 1] != 2, 3
    )  # Block 2 has no token; 3 may stand twice, and is cut off.
    counts[0, 1] = counts[0, 1].clamp(max=1)
    offsets, entries = tokens_index.invert(index, counts, 5, chunk)
    width = tokens_index.list_width(index.shape[3])
    for head in range(2):
        found = []
        for block in range(5):
            part = entries[0, head, offsets[0, head, block] : offsets[0, head, block + 1]].tolist()
            assert part == sorted(part)
            found += [(entry // width, entry % width, block) for entry in part]
        expected = [
            (token, rank, int(index[0, head, token, rank]))
            for token in range(21)
            for rank in range(int(counts[0, head, token]))
        ]
        assert sorted(found) == expected
        assert offsets[0, head, -1] == counts[0, head].sum()


def test_the_order_of_the_tokens_of_a_block_does_not_matter(device):
    x, options = token_inputs(dtype=HALF, device=device)
    lists, settings = (options["index"], options["counts"]), (16, 0.21, True, None)
    operators = torch.ops.undivided
    offsets, entries = operators.selected_tokens_invert(*lists, 2)
    shuffled = entries.clone()
    for head in range(2):
        for block in range(2):
            part = slice(*offsets[0, head, block : block + 2].tolist())
            own = entries[0, head, part]
            shuffled[0, head, part] = own[torch.randperm(len(own))]
    assert not torch.equal(shuffled, entries)
    found = []
    for order in (entries, shuffled):
        inverse = (offsets, order)
        out, lse = operators.selected_tokens_forward(*x.values(), *lists, *inverse, *settings)
        two = operators.selected_tokens_two_pass(*x.values(), *lists, *inverse, *settings)
        arguments = (out, None, out, *x.values(), *lists, *inverse, lse, *settings)
        dquery, *sums = operators.selected_tokens_backward(*arguments, True)
        found.append(((out, lse, *two, dquery), sums))
    for ours, theirs in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(ours, theirs)
    # The gradients of keys and values are sums over the tokens.
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


def test_segments_cover_the_rows_of_every_block():
    offsets = torch.tensor([[0, 5, 5, 12], [0, 0, 0, 0]], dtype=torch.int32)
    table, ends = tokens_index.segments(offsets, members=2, rows=4, most_entries=12)
    assert ends.tolist() == [[0, 3, 3, 7], [0, 0, 0, 0]]
    assert table[0, :7].tolist() == [[0, 0], [0, 4], [0, 8], [2, 0], [2, 4], [2, 8], [2, 12]]
    assert (table[0, 7:, 0] == 3).all() and (table[1, :, 0] == 3).all() and table.shape[1] == 9


@pytest.mark.parametrize("order", ["key_outer"])
def test_operators_pass_opcheck_and_compile_into_one_graph(order, device):
    x, options = token_inputs(dtype=HALF, device=device)
    lists, settings = (options["index"], options["counts"]), (16, 0.21, True, None)
    tests = ("test_schema", "test_faketensor")
    operators = torch.ops.undivided
    torch.library.opcheck(operators.selected_tokens_invert, (*lists, 2), test_utils=tests)
    inverse = operators.selected_tokens_invert(*lists, 2)
    given = inverse if order == "key_outer" else (None, None)
    torch.library.opcheck(
        operators.selected_tokens_forward, (*x.values(), *lists, *given, *settings), test_utils=tests
    )
    out, lse = operators.selected_tokens_forward(*x.values(), *lists, *given, *settings)
    torch.library.opcheck(
        operators.selected_tokens_two_pass, (*x.values(), *lists, *inverse, *settings), test_utils=tests
    )
    arguments = (torch.randn_like(out), None, out, *x.values(), *lists, *inverse, lse, *settings)
    torch.library.opcheck(
        operators.selected_tokens_backward, (*arguments, order == "key_outer"), test_utils=tests
    )
    function = call(order, options)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x), gradients(function, x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_order_follows_the_heads_of_a_list_and_the_number_of_queries():
    def keys_outside(heads, lists, queries):
        return tokens.keys_outside(torch.empty(1, heads, queries, 8), torch.empty(1, lists, queries, 4))

    assert keys_outside(8, 8, 4096) and keys_outside(32, 4, 4096)
    assert not keys_outside(32, 2, 4096) and not keys_outside(8, 8, 1)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.selected import tokens_backward, tokens_forward, tokens_index, tokens_two_pass

for heads, dim, size in ((2, 128, 64), (2, 256, 64)):
    query, key, value = (torch.empty(1, n, 512, dim, dtype=torch.bfloat16) for n in (8, heads, heads))
    index, counts = torch.zeros(1, heads, 512, 16, dtype=torch.int32), torch.ones(1, heads, 512, dtype=torch.int32)
    offsets, entries = tokens_index.invert(index, counts, 512 // size, chunk=2048)
    lists, settings = (index, counts, offsets, entries), (size, 0.1, True, None)
    out, lse = tokens_forward.forward(query, key, value, *lists, *settings)
    tokens_two_pass.forward(query, key, value, *lists, *settings)
    tokens_forward.forward(query, key, value, index, counts, None, None, *settings)
    for by_keys in (True, False):
        tokens_backward.backward(out, lse, query, key, value, *lists, lse, *settings, by_keys)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_count_kernel", "_place_kernel", "_partial_kernel", "_merge_kernel", "_token_kernel",
        "_partial_gradient_kernel", "_sum_kernel", "_token_gradient_kernel", "_meeting_kernel", "_reduce_kernel",
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_kernels_say_what_they_cannot_do():
    x, options = token_inputs(block_size=8)
    with pytest.raises(
        ValueError, match=r'"key_outer" cannot run this: block_size is 8 \(needs 16, 32, 64 or 128\)'
    ):
        call("key_outer", options)(**x)
    x, options = inputs(query_block_size=16)
    with pytest.raises(ValueError, match=r"query_block_size is 16 \(these kernels have a list a token: 1\)"):
        call("query_outer", options)(**x)
    x, options = token_inputs(heads=65, key_heads=1, list_heads=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"65 heads share a list \(at most 64\)"):
        call("query_outer", options)(**x)
    for shape, dtype, text in (
        (dict(block_size=128, head_dim=192), HALF, r"block_size is 128 \(at most 64 where a head is wider than 128\)"),
        (dict(value_dim=144), torch.float32, r"query is float32 \(float16 or bfloat16 where a head is wider"),
        (dict(head_dim=264), HALF, r"the last axis of query is 264 \(at most 256\)"),
    ):  # fmt: skip
        x, options = token_inputs(**shape, dtype=dtype)
        with pytest.raises(ValueError, match=text):
            call("key_outer", options)(**x)
    x, options = token_inputs(heads=65, key_heads=1, list_heads=1, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"scale is -1.0 \(the kernels need a positive one\)"):
        selected_attention(**x, **options, scale=-1.0, backend="key_outer")
