from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.ops.whole_graphs import assert_compiles_whole
from undivided.ops import block_classes, linear_attention, selected_attention, sparse_linear_attention
from undivided.ops.block_map import pool_blocks, token_blocks
from undivided.ops.sparse_linear import class_counts, lists_of
from undivided.testing import assert_as_accurate, compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-11, "atol": 1e-11}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
BLOCKS = {"query_block_size": 16, "block_size": 16}


def inputs(
    batch=1, heads=2, length=90, head_dim=16, value_dim=16, project=True, dtype=torch.float64, device=None
):  # fmt: skip
    x = {
        name: torch.randn(batch, heads, length, width, dtype=dtype).to(device)
        for name, width in (("query", head_dim), ("key", head_dim), ("value", value_dim))
    }
    if project:
        x["weight"] = (torch.randn(value_dim, value_dim, dtype=dtype) / 4).to(device)
        x["bias"] = torch.randn(value_dim, dtype=dtype).to(device)
    return x


def classes_of(x, topk=0.3, bottomk=0.2, blocks=BLOCKS):
    return block_classes(x["query"], x["key"], topk=topk, bottomk=bottomk, **blocks)


def call(backend, classes=None, **options):
    options = {**BLOCKS, **options}
    return lambda **x: sparse_linear_attention(**x, classes=classes, backend=backend, **options)


def token_mask(classes, length, blocks=BLOCKS):
    rows = token_blocks(length, blocks["query_block_size"], classes.device)
    columns = token_blocks(length, blocks["block_size"], classes.device)
    return classes[:, :, rows][..., columns]


def test_equals_the_formulas_with_sums_by_block():
    x = inputs(length=45)
    classes = classes_of(x)
    out = call("reference", classes)(**x)
    query, key, value = (x[name][0, 1] for name in ("query", "key", "value"))
    for row in range(3):
        rows = slice(16 * row, min(16 * row + 16, 45))
        critical, sums, norm = [], 0, 0
        for block in range(3):
            columns = slice(16 * block, min(16 * block + 16, 45))
            if classes[0, 1, row, block] == 1:
                critical.append(columns)
            elif classes[0, 1, row, block] == 0:
                features = key[columns].softmax(-1)
                sums, norm = sums + features.T @ value[columns], norm + features.sum(0)
        keys, values = (torch.cat([t[c] for c in critical]) for t in (key, value))
        expected = (query[rows] @ keys.T / 4).softmax(-1) @ values + x["bias"]
        if torch.is_tensor(norm):
            features = query[rows].softmax(-1)
            expected = expected + (features @ sums) / (features @ norm)[:, None] @ x["weight"].T
        torch.testing.assert_close(out[0, 1, rows], expected, **EXACT)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_with_all_blocks_critical_it_is_dense_attention_and_its_gradients(backend, device):
    dtype = torch.float32 if backend == "triton" else torch.float64
    x = inputs(heads=1, length=45, project=False, dtype=dtype, device=device)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out, linear = call(backend, topk=1.0, bottomk=0.0)(**x)
    expected = F.scaled_dot_product_attention(*x.values())
    torch.testing.assert_close(out, expected)
    assert not linear.any()
    dout = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad([out, linear], list(x.values()), [dout, dout]),
        torch.autograd.grad(expected, list(x.values()), dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("feature_map", ["elu1", "relu"])
def test_with_no_critical_block_and_all_in_scope_it_is_linear_attention(feature_map):
    x = inputs(project=False)
    classes = torch.full((1, 2, 6, 6), -1, dtype=torch.int8)
    sparse, linear, lse = call(
        "reference", classes, linear_scope="all", feature_map=feature_map, return_lse=True
    )(**x)
    assert not sparse.any() and (lse == float("-inf")).all()
    torch.testing.assert_close(linear, linear_attention(**x, feature_map=feature_map, eps=0.0), **EXACT)


CASES = {
    "the paper": dict(),
    "two parts, two images": dict(shape=dict(batch=2, project=False, head_dim=24, value_dim=40, length=45)),
    "wider rows, noncritical, elu1": dict(
        query_block_size=32, linear_scope="noncritical", feature_map="elu1"
    ),
    "all, relu": dict(linear_scope="all", feature_map="relu"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernels_are_as_accurate_as_eager(case, device):
    case = dict(case)
    x = inputs(**case.pop("shape", {}), device=device)
    blocks = {**BLOCKS, **{k: v for k, v in case.items() if k in BLOCKS}}
    classes = classes_of(x, blocks=blocks)
    reference = call("reference", classes, return_lse=True, **case)
    # float32 in one case: its kernels are the same but for the type.
    dtype = torch.float32 if case.get("linear_scope") == "all" else HALF
    compare_op(call("triton", classes, return_lse=True, **case), reference, reference, x, dtype)


@pytest.mark.parametrize("project", [False, True])
def test_additional_keys_are_in_the_softmax_of_every_query(project):
    x = inputs(batch=2, project=project)
    text = {name: torch.randn(2, 2, 7, 16, dtype=torch.float64) for name in ("key", "value")}
    classes = classes_of(x)
    logits = x["query"] @ torch.cat([x["key"], text["key"]], 2).transpose(-2, -1) / 4
    seen = torch.cat([token_mask(classes == 1, 90), torch.ones(2, 2, 90, 7, dtype=torch.bool)], 3)
    logits = logits.masked_fill(~seen, float("-inf"))
    sparse = logits.softmax(-1) @ torch.cat([x["value"], text["value"]], 2)
    heads = {name: x[name] for name in ("query", "key", "value")}
    linear = call("reference", classes)(**heads)[1]
    out, *rest, lse = call(
        "reference", classes, additional_key=text["key"], additional_value=text["value"], return_lse=True
    )(**x)
    torch.testing.assert_close(lse, logits.logsumexp(-1), **EXACT)
    if project:
        torch.testing.assert_close(out, sparse + linear @ x["weight"].T + x["bias"], **EXACT)
    else:
        torch.testing.assert_close((out, rest[0]), (sparse, linear), **EXACT)


def test_with_additional_keys_kernels_are_as_accurate_as_eager(device):
    x = inputs(heads=1, length=45, device=device)
    x |= {
        f"additional_{name}": torch.randn(1, 1, 7, 16, dtype=torch.float64, device=device)
        for name in ("key", "value")
    }
    classes = classes_of(x)
    reference = call("reference", classes)
    compare_op(call("triton", classes), reference, reference, x, HALF)


def test_kernels_choose_the_map_of_block_classes(device):
    x = inputs(dtype=HALF, device=device)
    options = {"topk": 0.3, "bottomk": 0.2}
    torch.testing.assert_close(call("triton", **options)(**x), call("triton", classes_of(x, **options))(**x))


@pytest.mark.parametrize("feature_map", ["softmax", "elu1"])
def test_gradients_of_the_reference_pass_gradcheck(feature_map):
    x = inputs(heads=1, length=45, head_dim=4, value_dim=4)
    blocks = {"query_block_size": 8, "block_size": 8}
    classes = classes_of(x, blocks=blocks)

    def function(*tensors):
        return call("reference", classes, feature_map=feature_map, **blocks)(
            **dict(zip(x, tensors, strict=True))
        )

    assert torch.autograd.gradcheck(
        function, [tensor.requires_grad_() for tensor in x.values()], fast_mode=True
    )


def test_counts_by_row_and_disjoint_classes():
    assert class_counts(512, 0.05, 0.10) == (25, 51)
    # The release takes no block here and divides by zero.
    assert class_counts(8, 0.05, 0.10) == (1, 0)
    assert class_counts(10, 0.6, 0.4) == (6, 4) and class_counts(1, 0.05, 0.5) == (1, 0)
    x = inputs()
    classes = classes_of(x, 0.34, 0.4)
    assert (classes == 1).sum(-1).unique().tolist() == [2] and (classes == -1).sum(-1).unique().tolist() == [
        2
    ]
    scores = pool_blocks(x["query"], 16) @ pool_blocks(x["key"], 16).transpose(-2, -1)
    best, middle, least = (
        scores.masked_fill(classes != kind, torch.inf if kind > -1 else -torch.inf) for kind in (1, 0, -1)
    )
    assert (best.amin(-1) >= scores.masked_fill(classes != 0, -torch.inf).amax(-1)).all()
    assert (middle.amin(-1) >= least.amax(-1)).all()


def test_centred_keys_leave_the_map_as_it_is():
    x = inputs(length=160)
    centred = x | {"key": x["key"] - x["key"].mean(2, keepdim=True)}
    assert torch.equal(classes_of(x), classes_of(centred))


def test_row_lists_describe_the_map():
    classes = classes_of(inputs())
    index, counts = lists_of(classes)
    for row in range(6):
        listed = index[0, 1, row, : counts[0, 1, row]].tolist()
        assert listed == (classes[0, 1, row] == 1).nonzero().flatten().tolist()


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_without_a_projection_it_is_sparse_attention_exactly(backend, device):
    x = inputs(dtype=HALF, device=device)
    x["weight"], x["bias"] = torch.zeros_like(x["weight"]), torch.zeros_like(x["bias"])
    classes = classes_of(x)
    index, counts = lists_of(classes)
    heads = [x[name] for name in ("query", "key", "value")]
    expected, _ = selected_attention(*heads, index, counts, **BLOCKS, backend=backend)
    assert torch.equal(call(backend, classes)(**x), expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_at_first_the_projection_alone_learns_from_the_linear_branch(backend, device):
    x = inputs(heads=1, length=45, dtype=HALF, device=device)
    x["weight"], x["bias"] = torch.zeros_like(x["weight"]), torch.zeros_like(x["bias"])
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    classes = classes_of(x)
    out = call(backend, classes)(**x)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, list(x.values()), dout)
    assert gradients[3].any() and gradients[4].any()
    heads = [x[name] for name in ("query", "key", "value")]
    sparse, _ = selected_attention(*heads, *lists_of(classes), **BLOCKS, backend=backend)
    for ours, theirs in zip(gradients[:3], torch.autograd.grad(sparse, heads, dout), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_linear_part_averages_values(backend, device):
    x = inputs(project=False, dtype=HALF, device=device)
    x["value"] = torch.randn(16, device=device, dtype=HALF).expand(1, 2, 90, 16)
    _, linear = call(backend, topk=0.2)(**x)
    torch.testing.assert_close(linear, x["value"])


def test_permuted_blocks_permute_the_output():
    x = inputs(length=96, project=False)
    order = torch.randperm(6)
    shuffled = {n: t.unflatten(2, (6, 16))[:, :, order].flatten(2, 3) for n, t in x.items()}
    for before, after in zip(
        call("reference", topk=0.3)(**x), call("reference", topk=0.3)(**shuffled), strict=True
    ):
        torch.testing.assert_close(after, before.unflatten(2, (6, 16))[:, :, order].flatten(2, 3), **EXACT)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_rows_without_blocks_give_zeros_and_have_no_gradient(backend, device):
    x = inputs(project=False, dtype=HALF, device=device)
    classes = classes_of(x)
    classes[0, 0, 1] = torch.where(classes[0, 0, 1] == 0, -1, classes[0, 0, 1])
    classes[0, 1, 2] = -1
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    sparse, linear = call(backend, classes)(**x)
    assert not linear[0, 0, 16:32].any() and not sparse[0, 1, 32:48].any() and not linear[0, 1, 32:48].any()
    gradients = torch.autograd.grad(sparse.square().sum() + linear.square().sum(), list(x.values()))
    assert not gradients[0][0, 1, 32:48].any()
    for gradient in gradients:
        assert gradient.isfinite().all()


def test_sums_over_rows_are_sums_of_blocks_to_rounding(device):
    from undivided.ops.sparse_linear.classes import share_map
    from undivided.ops.sparse_linear.triton import sums_of

    x = inputs(dtype=torch.float32, device=device)
    classes = classes_of(x)
    query_means, key_means, sums = sums_of(x["query"], x["key"], x["value"], None, 16, 16, "softmax", True)
    torch.testing.assert_close(query_means, pool_blocks(x["query"], 16))
    torch.testing.assert_close(key_means, pool_blocks(x["key"], 16))
    features = F.pad(x["key"].softmax(-1), (0, 0, 0, 6)).unflatten(2, (6, 16))
    values = F.pad(x["value"], (0, 0, 0, 6)).unflatten(2, (6, 16))
    products = features.transpose(-2, -1) @ values
    features[:, :, 5, 10:] = 0
    torch.testing.assert_close(sums[..., :256], products.flatten(3))
    torch.testing.assert_close(sums[..., 256:], features.sum(3))
    unit = 2.0 ** -math.ceil(math.log2(6))
    direct = torch.einsum("bhij,bhjn->bhin", (classes == 0).float(), sums)
    torch.testing.assert_close(
        share_map(classes, "marginal", torch.float32) @ sums / unit, direct, rtol=1e-5, atol=0
    )


def test_strides_and_surroundings_do_not_matter_and_everything_is_written(device):
    x = inputs(batch=2, heads=1, length=45, dtype=HALF, device=device)
    classes = classes_of(x)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    runs = []
    with poisoned_empty():
        for given in (x, {name: poison_surroundings(t) if t.dim() == 4 else t for name, t in x.items()}):
            leaves = [tensor.detach().requires_grad_() for tensor in given.values()]
            out = call("triton", classes)(**dict(zip(x, leaves, strict=True)))
            runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all() and torch.equal(first, second)
    assert runs[0][0].transpose(1, 2).is_contiguous()
    alone = {name: t[1:] if t.dim() == 4 else t for name, t in x.items()}
    torch.testing.assert_close(call("triton", classes[1:])(**alone), runs[0][0][1:])


def test_without_gradients_values_are_projected_first_and_it_is_as_accurate(device):
    x = inputs(dtype=HALF, device=device)
    classes = classes_of(x)
    eager, wide = call("reference", classes), {name: tensor.double() for name, tensor in x.items()}
    with poisoned_empty(), torch.no_grad():
        fast = call("triton", classes)(**x)
    assert fast.transpose(1, 2).is_contiguous()
    assert_as_accurate(fast, eager(**x), eager(**wide))


def test_operators_pass_opcheck(device):
    x = inputs(heads=1, length=20, dtype=HALF, device=device)
    tests = ("test_schema", "test_faketensor")
    settings = ("softmax", 16, 16, "marginal", 0.25)
    forward = torch.ops.undivided.sparse_linear_forward
    heads = [x[name] for name in ("query", "key", "value")]
    for classes in (None, classes_of(x)):
        torch.library.opcheck(forward, (*x.values(), classes, 1, 1, *settings, False), test_utils=tests)
    _, sparse, linear, *kept = forward(*heads, None, None, None, 1, 1, *settings, True)
    torch.library.opcheck(
        torch.ops.undivided.sparse_linear_backward,
        (
            torch.randn_like(sparse),
            torch.randn_like(linear),
            None,
            sparse,
            *kept,
            *heads,
            *settings[:3],
            0.25,
        ),
        test_utils=tests,
    )


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend, device):
    x = inputs(heads=1, length=45, dtype=HALF, device=device)
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    function = call(backend, topk=0.3)
    assert_compiles_whole(function, x)


@pytest.mark.gpu
def test_the_host_never_waits():
    x = inputs(length=600, head_dim=64, value_dim=64, dtype=torch.bfloat16, device="cuda")
    x = {name: tensor.requires_grad_() for name, tensor in x.items()}
    function = call("triton", topk=0.3, query_block_size=64, block_size=64)
    function(**x).sum().backward()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**x)
        gradients = torch.autograd.grad(out.sum(), list(x.values()))
    graph.replay()
    expected = function(**x)
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), list(x.values())), strict=True):
        torch.testing.assert_close(ours, theirs)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.sparse_linear import backward, triton

query, key, value = (torch.zeros(1, 2, 500, 128, dtype=torch.bfloat16) for _ in range(3))
classes = torch.zeros(1, 2, 8, 8, dtype=torch.int8)
weight = torch.zeros(128, 128)
options = (classes, 1, 1, "softmax", 64, 64, "marginal", 0.1)
triton.forward(query, key, value, weight, weight[0], *options, False)
_, sparse, linear, *kept = triton.forward(query, key, value, weight, weight[0], *options, True)
triton.sums_of(query, key, value, weight.bfloat16(), 64, 64, "softmax", True)
backward.backward(sparse, linear, None, sparse, *kept, query, key, value, "softmax", 64, 64, 0.1)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_sums_kernel", "_forward_kernel", "_delta_kernel", "_query_kernel", "_key_kernel"
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_kernels_say_what_they_cannot_do():
    x = inputs(dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r'"triton" cannot run this: block_size is 64 for float32 \(at most 32\)'
    ):
        call("triton", block_size=64)(**x)
    with pytest.raises(ValueError, match=r"query_block_size is 24 \(needs 16, 32, 64 or 128\)"):
        call("triton", query_block_size=24)(**x)


def test_bad_input_is_named():
    x = inputs()
    short = {"key": x["key"][:, :, :50], "value": x["value"][:, :, :50]}
    for change, message in (
        ({"topk": 0.0}, r"topk=0.0 must be in \(0, 1\]: the share of critical blocks"),
        ({"topk": 1.5}, r"topk=1.5 must be in \(0, 1\]"),
        ({"bottomk": -0.1}, "bottomk=-0.1 with topk=0.05; bottomk is at least 0 and both together at most 1"),
        ({"topk": 0.6, "bottomk": 0.5}, "bottomk=0.5 with topk=0.6"),
        (
            {"key": x["key"][:, :1], "value": x["value"][:, :1]},
            "the map is of self-attention without shared heads",
        ),
        (short, r"query \[1, 2, 90, 16\] and key \[1, 2, 50, 16\] must have one shape"),
        ({"value": short["value"]}, r"value \[1, 2, 50, 16\] must have the tokens of key"),
        ({"feature_map": "hedgehog"}, "feature_map='hedgehog' is not one of softmax, elu1, relu"),
        ({"linear_scope": "none"}, "linear_scope='none' is not one of marginal, noncritical, all"),
        ({"weight": None}, "bias is given without weight"),
        ({"weight": x["weight"][:3]}, r"weight has shape \[3, 16\]; value_dim=16 needs \[16, 16\]"),
        (
            {"classes": torch.zeros(1, 2, 5, 6, dtype=torch.int8)},
            r"blocks of these sizes need \[1, 2, 6, 6\]",
        ),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            sparse_linear_attention(**{**x, **BLOCKS, **change})
    with pytest.raises(ValueError, match="additional_value is None, but the other is given; give both"):
        sparse_linear_attention(**x, **BLOCKS, additional_key=x["key"])
    with pytest.raises(TypeError, match="classes has dtype torch.int64; use int8 with 1, 0 and -1"):
        sparse_linear_attention(**x, **BLOCKS, classes=torch.zeros(1, 2, 6, 6).long())
    with pytest.raises(TypeError, match="is_causal"):
        sparse_linear_attention(**x, is_causal=True)
