from __future__ import annotations

import pytest
import torch

from undivided.ops import dense_attention
from undivided.ops.block_map import block_mask, num_blocks, same_sequence, select_topk, token_blocks
from undivided.ops.selected import selected_attention
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "small": dict(),
    "ragged blocks, wider rows": dict(batch=1, query_block_size=32, queries=70, keys=70),
    "queries behind a cache": dict(batch=1, queries=20, keys=70),
    "queries that see nothing": dict(batch=1, queries=50, keys=20),
    "one list for a group": dict(batch=1, list_heads=2),
    "one query": dict(batch=1, queries=1, keys=37),
    "widths that are no powers of two": dict(batch=1, head_dim=24, value_dim=40),
    "packed sequences": dict(batch=1, queries=45, keys=45, cu_seqlens=[0, 13, 13, 30, 45]),
    "packed, wider rows": dict(batch=1, queries=70, keys=70, query_block_size=32, cu_seqlens=[0, 40, 70]),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(
    batch=2, heads=4, key_heads=2, queries=37, keys=37, head_dim=16, value_dim=16, query_block_size=16, block_size=16,
    list_heads=4, topk=2, cu_seqlens=None, dtype=torch.float64, device=None,
):  # fmt: skip
    def draw(heads, length, width):
        return torch.randn(batch, heads, length, width, dtype=dtype).to(device)

    x = {
        "query": draw(heads, queries, head_dim),
        "key": draw(key_heads, keys, head_dim),
        "value": draw(key_heads, keys, value_dim),
    }
    packed = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    rows, blocks = num_blocks(queries, query_block_size, packed), num_blocks(keys, block_size, packed)
    scores = torch.randn(batch, list_heads, rows, blocks)
    allowed = None
    if packed is not None:
        allowed = same_sequence(queries, query_block_size, block_size, scores.device, packed)
    # Ragged: some rows have one block more.
    index, counts = select_topk(
        scores, torch.randint(1, topk + 2, (batch, list_heads, rows)), allowed=allowed
    )
    options = {
        "index": index.to(device),
        "counts": counts.to(device),
        "query_block_size": query_block_size,
        "block_size": block_size,
        "cu_seqlens": None if packed is None else packed.to(device),
    }
    return x, options


def call(backend, options, is_causal=True):
    return lambda **x: selected_attention(**x, **options, is_causal=is_causal, backend=backend)


def test_equals_loops_over_rows_and_their_lists():
    x, options = inputs(queries=21, keys=37)
    out, lse = call("reference", options)(**x)
    owner = token_blocks(37, 16, torch.device("cpu"))
    for b, h, n in ((0, 0, 0), (1, 3, 20), (0, 2, 15)):
        row = n // 16
        listed = options["index"][b, h, row, : options["counts"][b, h, row]].tolist()
        seen = [m for m in range(37) if owner[m] in listed and m <= n + 16]
        if not seen:
            assert not out[b, h, n].any() and lse[b, h, n] == float("-inf")
            continue
        logits = x["key"][b, h // 2, seen] @ x["query"][b, h, n] / 4
        torch.testing.assert_close(out[b, h, n], logits.softmax(0) @ x["value"][b, h // 2, seen], **EXACT)
        torch.testing.assert_close(lse[b, h, n], logits.logsumexp(0), **EXACT)


@pytest.mark.parametrize("is_causal", [True, False])
def test_with_all_blocks_it_is_dense_attention(is_causal):
    x, options = inputs(topk=3)
    options["index"] = torch.arange(3).int().expand(2, 4, 3, 3)
    options["counts"] = torch.full((2, 4, 3), 3).int()
    expected = dense_attention(**x, is_causal=is_causal, backend="reference")
    torch.testing.assert_close(call("reference", options, is_causal)(**x)[0], expected, **EXACT)


def test_packed_sequences_are_as_each_alone():
    x, options = inputs(batch=1, queries=45, keys=45, cu_seqlens=[0, 13, 13, 30, 45])
    everything = select_topk(
        torch.zeros(1, 4, *block_mask((options["index"], options["counts"]), 6).shape[2:]), 9,
        allowed=same_sequence(45, 16, 16, torch.device("cpu"), options["cu_seqlens"]),
    )  # fmt: skip
    options["index"], options["counts"] = everything
    out, _ = call("reference", options)(**x)
    for first, last in ((0, 13), (13, 30), (30, 45)):
        alone = {name: tensor[:, :, first:last] for name, tensor in x.items()}
        expected = dense_attention(**alone, is_causal=True, backend="reference")
        torch.testing.assert_close(out[:, :, first:last], expected, **EXACT)


@every_shape
def test_kernels_are_as_accurate_as_eager(shape, device):
    x, options = inputs(**shape, device=device)
    reference = call("reference", options)
    compare_op(call("triton", options), reference, reference, x, HALF)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_kernels_without_an_order(dtype, device):
    x, options = inputs(device=device)
    reference = call("reference", options, False)
    compare_op(call("triton", options, False), reference, reference, x, dtype)


def test_gradients_of_the_reference_pass_gradcheck():
    x, options = inputs(batch=1, heads=2, key_heads=1, list_heads=1, queries=9, keys=9, head_dim=3, value_dim=2,
                        query_block_size=4, block_size=4, topk=1)  # fmt: skip

    def function(*tensors):
        return call("reference", options, False)(**dict(zip(x, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, [tensor.requires_grad_() for tensor in x.values()])


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_empty_rows_have_zeros_and_no_gradient(backend, device):
    x, options = inputs(dtype=HALF, device=device)
    options["counts"][0, 1] = 0
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out, lse = call(backend, options)(**x)
    assert not out[0, 1].any() and (lse[0, 1] == float("-inf")).all()
    gradients = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), list(x.values()))
    assert not gradients[0][0, 1].any()
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_what_stands_behind_the_lists_is_not_read(device):
    x, options = inputs(dtype=HALF, device=device)
    out, _ = call("triton", options)(**x)
    index = options["index"]
    valid = torch.arange(index.shape[3], device=device) < options["counts"][..., None]
    options["index"] = index.where(valid, 2**30)
    torch.testing.assert_close(call("triton", options)(**x)[0], out)


def test_strides_surroundings_and_batch_mates_do_not_matter(device):
    x, options = inputs(dtype=HALF, device=device)
    out, _ = call("triton", options)(**x)
    strided = {name: poison_surroundings(tensor) for name, tensor in x.items()}
    torch.testing.assert_close(call("triton", options)(**strided)[0], out)
    alone = {name: tensor[1:] for name, tensor in x.items()}
    options |= {"index": options["index"][1:], "counts": options["counts"][1:]}
    torch.testing.assert_close(call("triton", options)(**alone)[0], out[1:])


def test_everything_is_written_with_the_same_bits_in_every_run(device):
    x, options = inputs(batch=1, list_heads=2, dtype=HALF, device=device)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    runs = []
    with poisoned_empty():
        for _ in range(2):
            out, lse = call("triton", options, False)(**x)
            runs.append((out, lse, *torch.autograd.grad(out.square().sum(), list(x.values()))))
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)
    assert runs[0][0].transpose(1, 2).is_contiguous()


def test_operators_pass_opcheck(device):
    x, options = inputs(batch=1, heads=2, key_heads=1, list_heads=1, dtype=HALF, device=device)
    lists = (options["index"], options["counts"])
    settings = (16, 16, 0.25, True, None)
    tests = ("test_schema", "test_faketensor")
    forward = torch.ops.undivided.selected_blocks_forward
    torch.library.opcheck(forward, (*x.values(), *lists, *settings), test_utils=tests)
    out, lse = forward(*x.values(), *lists, *settings)
    torch.library.opcheck(
        torch.ops.undivided.selected_blocks_backward,
        (torch.randn_like(out), None, out, *x.values(), *lists, lse, *settings),
        test_utils=tests,
    )


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend, device):
    x, options = inputs(batch=1, heads=2, key_heads=1, list_heads=1, dtype=HALF, device=device)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    function = call(backend, options)
    eager, _ = function(**x)
    torch._dynamo.reset()
    compiled, _ = torch.compile(function, fullgraph=True, backend="aot_eager")(**x)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(
        torch.autograd.grad(compiled.sum(), list(x.values())),
        torch.autograd.grad(eager.sum(), list(x.values())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.selected import blocks_backward, blocks_forward

query, key, value = (torch.empty(1, heads, 500, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
index, counts = torch.zeros(1, 2, 8, 2, dtype=torch.int32), torch.ones(1, 2, 8, dtype=torch.int32)
settings = (64, 64, 0.1, True, None)
out, lse = blocks_forward.forward(query, key, value, index, counts, *settings)
delta = blocks_backward.deltas(out, out, lse)
blocks_backward.backward(out, delta, query, key, value, index, counts, lse, *settings)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {"_forward_kernel", "_delta_kernel", "_query_kernel", "_key_kernel"}
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_kernels_say_what_they_cannot_do():
    x, options = inputs(query_block_size=8)
    with pytest.raises(
        ValueError, match=r'backend "triton" cannot run this: query_block_size is 8 \(needs 16, 32'
    ):
        call("triton", options)(**x)
    x, options = inputs()
    with pytest.raises(ValueError, match='backend "triton" cannot run this: query is float64'):
        call("triton", options)(**x)


def test_bad_input_is_named():
    x, options = inputs()
    for change, message in (
        ({"query_block_size": 0}, "query_block_size=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"block_size": 64}, "index lists block [12], but there are 1 key blocks"),
        ({"query_block_size": 64}, r"37 queries in blocks of 64 need \[2, 2 or 4, 1, max_blocks\]"),
        ({"counts": options["counts"][:1]}, r"counts has shape \[1, 4, 3\]; index needs \[2, 4, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 37])}, "packed sequences have batch 1 and as many queries as keys"),
        ({"cu_seqlens": torch.tensor([0.0, 37.0])}, r"it needs \[sequences \+ 1\] integers"),
        ({"backend": "cuda"}, "backend='cuda' is not one of"),
    ):
        with pytest.raises(ValueError, match=message):
            selected_attention(**x, **(options | change))
    with pytest.raises(ValueError, match="a number of heads that divides its"):
        selected_attention(**(x | {"query": x["query"][:, :3]}), **options)
