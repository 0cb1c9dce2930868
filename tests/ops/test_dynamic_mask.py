from __future__ import annotations

import math

import pytest
import torch

from tests.ops.whole_graphs import assert_compiles_whole, assert_host_never_waits
from undivided.ops import dense_attention, dynamic_mask_attention
from undivided.ops.dynamic_mask._rank import best_keys, key_order
from undivided.ops.dynamic_mask.reference import kept_keys
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "a window within a tile": dict(length=70, keep=9, batch=1),
    "equal biases": dict(length=70, keep=40, ties=True, heads=2, key_heads=1),
    "a constant bias": dict(length=70, keep=33, ties=None, heads=2, key_heads=1),
    "one key": dict(length=40, keep=1),
    "no key is dropped": dict(length=40, keep=100, heads=2, key_heads=1),
    "widths that are no powers of two": dict(
        length=45, keep=9, head_dim=24, value_dim=40, heads=2, key_heads=1
    ),
    "one token": dict(length=1, keep=3),
    "a window of many blocks": dict(length=140, keep=100, batch=1, heads=2, key_heads=1),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def inputs(
    batch=2, heads=4, key_heads=2, length=20, queries=None, keep=6, head_dim=16, value_dim=16, ties=False,
    dtype=torch.float64, device=None,
):  # fmt: skip
    def draw(heads, length, *width):
        return torch.randn(batch, heads, length, *width, dtype=dtype).to(device)

    bias = draw(key_heads, length)
    if ties is not False:
        bias = bias.mul(1.5).round() if ties else torch.zeros_like(bias)
    return {
        "query": draw(heads, length if queries is None else queries, head_dim),
        "key": draw(key_heads, length, head_dim),
        "value": draw(key_heads, length, value_dim),
        "key_bias": bias,
    }


def call(backend, keep, **options):
    return lambda **x: dynamic_mask_attention(**x, keep_window_size=keep, backend=backend, **options)


def brute_force_kept(bias, keep):
    """Of a bias of one head: for each query the best of its prefix, of equal ones the latest."""
    found = torch.zeros(len(bias), len(bias), dtype=torch.bool)
    for t in range(len(bias)):
        ranked = sorted(range(t + 1), key=lambda j: (-float(bias[j]), -j))
        found[t, ranked[:keep]] = True
    return found


@pytest.mark.parametrize("ties", [False, True, None])
@pytest.mark.parametrize("keep", [1, 4, 11, 30])
def test_each_query_keeps_the_best_of_its_prefix(keep, ties):
    bias = inputs(ties=ties)["key_bias"]
    kept = kept_keys(bias, 20, keep, None, True, "per_row")
    for batch in range(2):
        for head in range(2):
            assert torch.equal(kept[batch, head], brute_force_kept(bias[batch, head], keep))


def test_equals_loops_over_heads_queries_and_keys():
    x = inputs(batch=1, length=7, head_dim=4, value_dim=3)
    out = call("reference", 3)(**x)
    for head in range(4):
        bias = x["key_bias"][0, head // 2]
        kept = brute_force_kept(bias, 3)
        for n in range(7):
            keys = [m for m in range(n + 1) if kept[n, m]]
            logits = [float(x["query"][0, head, n] @ x["key"][0, head // 2, m] / 2 + bias[m]) for m in keys]
            total = sum(map(math.exp, logits))
            expected = sum(
                math.exp(logit) / total * x["value"][0, head // 2, m]
                for m, logit in zip(keys, logits, strict=True)
            )
            torch.testing.assert_close(out[0, head, n], expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_where_nothing_is_dropped_it_is_attention_with_an_additive_bias(backend):
    x = inputs()
    bias = x["key_bias"].repeat_interleave(2, dim=1)[:, :, None]
    mask = bias.expand(-1, -1, 20, -1).masked_fill(~torch.ones(20, 20).tril().bool(), float("-inf"))
    expected = dense_attention(x["query"], x["key"], x["value"], attn_mask=mask, backend="reference")
    torch.testing.assert_close(call(backend, 20)(**x), expected, **EXACT)


def test_a_constant_bias_is_a_sliding_window():
    x = inputs() | {"key_bias": torch.ones(2, 2, 20, dtype=torch.float64)}
    heads = [x[name] for name in ("query", "key", "value")]
    torch.testing.assert_close(
        call("reference", 6)(**x), dense_attention(*heads, is_causal=True, window=6), **EXACT
    )
    torch.testing.assert_close(call("reference", 20)(**x), dense_attention(*heads, is_causal=True), **EXACT)


@pytest.mark.parametrize("selection", ["per_row", "global"])
def test_a_later_token_moves_an_earlier_row_only_if_the_selection_is_global(selection):
    x = inputs()
    later = {name: tensor.clone() for name, tensor in x.items()}
    later["key_bias"][:, :, -1] += 50
    before, after = (call("reference", 6, selection=selection)(**y)[:, :, :-1] for y in (x, later))
    assert torch.equal(before, after) == (selection == "per_row")


def test_a_global_selection_may_leave_early_rows_without_keys():
    x = inputs() | {"key_bias": torch.arange(20, dtype=torch.float64).expand(2, 2, -1)}
    out = call("reference", 6, selection="global")(**x)
    assert torch.equal(out[:, :, :14], torch.zeros_like(out[:, :, :14]))
    assert (out[:, :, 14:] != 0).all()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_relu_keeps_every_key_of_a_positive_bias_however_many(backend):
    x = inputs()
    # The first query keeps itself, so that none is left without a key.
    x["key_bias"][..., 0] = 1.0
    hidden = x | {"key_bias": x["key_bias"].masked_fill(x["key_bias"] <= 0, float("-inf"))}
    expected = call("reference", 20)(**hidden)
    torch.testing.assert_close(call(backend, 1, selection="relu")(**x), expected, **EXACT)
    nothing = x | {"key_bias": -x["key_bias"].abs()}
    assert not call("reference", 6, selection="relu")(**nothing).any()


def test_kernels_of_relu_are_as_accurate_as_eager(device):
    x = inputs(length=70, ties=True, batch=1, device=device)
    reference = call("reference", 1, selection="relu")
    compare_op(call("triton", 1, selection="relu"), reference, reference, x, torch.float32)
    last = {name: tensor[:, :, -1:] if name == "query" else tensor for name, tensor in x.items()}
    with torch.no_grad():
        compare_op(
            call("triton", 1, selection="relu"), reference, reference, last, torch.float32, grad_inputs=()
        )


def test_blocks_stay_or_go_as_a_whole_by_the_majority_of_what_is_seen():
    bias = inputs(length=22)["key_bias"]
    single = kept_keys(bias, 22, 7, None, True, "per_row")
    kept = kept_keys(bias, 22, 7, None, True, "per_row", block_smooth=4)
    for b, h, n in ((0, 0, 3), (0, 1, 9), (1, 0, 17), (1, 1, 21)):
        expected = []
        for first in range(0, n + 1, 4):
            seen = list(range(first, min(first + 4, n + 1)))
            if 2 * sum(bool(single[b, h, n, m]) for m in seen) > len(seen):
                expected += seen
        assert kept[b, h, n].nonzero().flatten().tolist() == expected
    assert torch.equal(kept_keys(bias, 22, 7, None, True, "per_row", block_smooth=1), single)
    x = inputs(length=22)
    mask = x["key_bias"][:, :, None].masked_fill(
        ~kept_keys(x["key_bias"], 22, 7, None, True, "per_row", 4), -torch.inf
    )
    dense = dense_attention(
        x["query"], x["key"], x["value"], attn_mask=mask.repeat_interleave(2, 1), backend="reference"
    )
    torch.testing.assert_close(call("reference", 7, block_smooth=4)(**x), dense, **EXACT)


@pytest.mark.parametrize("selection", ["per_row", "global", "relu"])
def test_gradients_are_those_of_finite_differences(selection):
    x = inputs(batch=1, length=6, head_dim=3, value_dim=2)
    function = call("reference", 3, selection=selection)
    leaves = [tensor.requires_grad_() for tensor in x.values()]
    assert torch.autograd.gradcheck(lambda *y: function(**dict(zip(x, y, strict=True))), leaves)


def test_the_gradient_of_a_bias_is_that_of_its_logits_summed_over_queries_and_heads(device):
    x = {name: tensor.float() for name, tensor in inputs(device=device).items()}
    logits_bias = torch.zeros(2, 4, 20, 20, device=device, requires_grad=True)
    kept = kept_keys(x["key_bias"], 20, 6, None, True, "per_row").repeat_interleave(2, dim=1)
    mask = (logits_bias + x["key_bias"].repeat_interleave(2, dim=1)[:, :, None]).masked_fill(
        ~kept, -torch.inf
    )
    dense = dense_attention(x["query"], x["key"], x["value"], attn_mask=mask, backend="reference")
    x["key_bias"].requires_grad_()
    out = call("triton", 6)(**x)
    cotangent = torch.randn_like(out)
    (expected,) = torch.autograd.grad(dense, logits_bias, cotangent)
    (found,) = torch.autograd.grad(out, x["key_bias"], cotangent)
    torch.testing.assert_close(found, expected.sum(2).unflatten(1, (2, 2)).sum(2), rtol=1e-5, atol=1e-5)


@every_shape
def test_kernels_in_float32_are_as_accurate_as_eager(shape, device):
    keep = shape["keep"]
    x = inputs(**shape, device=device)
    compare_op(call("triton", keep), call("reference", keep), call("reference", keep), x, torch.float32)


@pytest.mark.parametrize(("length", "keep", "ties"), [(150, 50, False), (290, 140, True), (150, 200, False)])
def test_kernels_in_half_precision_are_as_accurate_as_eager(length, keep, ties, device):
    x = inputs(batch=1, heads=2, key_heads=1, length=length, ties=ties, device=device)
    compare_op(call("triton", keep), call("reference", keep), call("reference", keep), x, HALF)


@pytest.mark.parametrize("queries", [1, 37, 70])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_a_prompt_behind_a_cache_is_the_end_of_the_whole(queries, dtype, device):
    x = inputs(length=100, queries=queries, keep=20, ties=True, device=device)
    reference = call("reference", 20)
    with torch.no_grad():
        compare_op(call("triton", 20), reference, reference, x, dtype, grad_inputs=())


def test_decoding_equals_prefill_row_by_row(device):
    x = inputs(length=33, keep=7, ties=True, dtype=torch.float32, device=device)
    whole = call("triton", 7)(**x)
    for length in (1, 2, 7, 8, 9, 20, 33):
        part = {name: tensor[:, :, :length] for name, tensor in x.items()}
        part["query"] = part["query"][:, :, -1:]
        torch.testing.assert_close(call("triton", 7)(**part), whole[:, :, length - 1 : length])


@pytest.mark.parametrize("num_splits", [1, 5])
def test_decoding_in_parts_equals_decoding_at_once(num_splits, device):
    from undivided.ops.dynamic_mask import decode

    x = inputs(length=90, queries=1, dtype=torch.float32, device=device)
    for keep in (50, 90):
        out = decode.attend(*x.values(), keep, 0.25, num_splits)
        torch.testing.assert_close(out, call("reference", keep, scale=0.25)(**x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_bias_of_minus_infinity_is_padding(backend, device):
    x = inputs(length=40, keep=5, dtype=torch.float32, device=device)
    x["key_bias"][0, :, :9] = float("-inf")
    x["key_bias"][1] = float("-inf")
    alone = {name: tensor[:1, :, 9:] for name, tensor in x.items()}
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out = call(backend, 5)(**leaves)
    torch.testing.assert_close(out[:1, :, 9:], call(backend, 5)(**alone))
    assert not out[0, :, :9].any() and not out[1].any()
    for name, gradient in zip(x, torch.autograd.grad(out.square().sum(), list(leaves.values())), strict=True):
        assert gradient.isfinite().all(), name
        assert not gradient[1].any() and not gradient[0, :, :9].any(), name
        assert gradient[0, :, 9:].any(), name


def test_hidden_keys_take_no_place_among_the_kept():
    x = inputs()
    hidden = torch.zeros(2, 1, 1, 20, dtype=torch.bool)
    hidden[0, :, :, 3:8] = True
    as_padding = x | {"key_bias": x["key_bias"].masked_fill(hidden[:, :, 0], float("-inf"))}
    expected = call("reference", 6)(**as_padding)
    torch.testing.assert_close(call("reference", 6, attn_mask=~hidden)(**x), expected, **EXACT)


@pytest.mark.parametrize(
    ("length", "keep", "ties"), [(100, 9, False), (100, 40, True), (75, 33, None), (40, 64, False)]
)
def test_a_list_holds_all_that_its_queries_attend_and_no_more(length, keep, ties, device):
    from undivided.ops.dynamic_mask import lists

    tile = 32
    bias = inputs(length=length, ties=ties)["key_bias"].float().to(device)
    lists_of, death = (tensor.cpu() for tensor in lists.select(bias, length, keep, tile))
    kept = kept_keys(bias, length, keep, None, True, "per_row").cpu()
    for index in range(kept.shape[0] * 2):
        rows, own_death, own_lists = (
            kept.flatten(0, 1)[index],
            death.flatten(0, 1)[index],
            lists_of.flatten(0, 1)[index],
        )
        for number, first in enumerate(range(0, length, tile)):
            # What any of the queries attends is at most the window and the queries but the first.
            union = set(rows[first : first + tile].any(0).nonzero().flatten().tolist())
            assert len(union) <= keep + tile - 1
            listed = own_lists[number, : min(keep, first)].tolist()
            assert len(set(listed)) == len(listed)
            assert union <= set(listed) | set(range(first, first + tile))
            if first:
                assert set(rows[first - 1].nonzero().flatten().tolist()) == set(listed)
        # A key is attended by an unbroken run of queries.
        t = torch.arange(length)
        runs = (t[None] <= t[:, None]) & (t[:, None] < own_death[None])
        assert torch.equal(runs, rows)


@pytest.mark.parametrize("ties", [False, True, None])
def test_comparing_all_keys_ranks_them_as_sorting_does(ties, device):
    from undivided.ops.dynamic_mask import lists

    bias = inputs(length=150, ties=ties)["key_bias"].float().to(device)
    bias[0, 0, 20:90] = float("-inf")
    for compared, ordered in zip(lists._ranked(bias, 70), lists._ranked(bias, 70, most_pairs=0), strict=True):
        assert torch.equal(compared, ordered)


def test_neighbours_in_the_order_of_the_backward_are_attended_by_nearly_the_same_queries(device):
    from undivided.ops.dynamic_mask.backward import RUN, lifetime_order

    # Births 0 .. 8; keys 1 and 5 are attended by no query.
    death = torch.tensor([[[9, 1, 9, 4, 7, 5, 9, 8, 9]]], device=device)
    assert lifetime_order(death, 9)[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    length, keep = 8 * RUN, 2 * RUN
    bias = torch.randn(1, 1, length)
    life = kept_keys(bias, length, keep, None, True, "per_row")[0, 0].sum(0).to(device)
    birth = torch.arange(length, device=device)
    order = lifetime_order((birth + life).int()[None, None], length)[0, 0].long()
    assert torch.equal(order.sort().values, birth)

    def passed(order):
        groups = [group[life[group] > 0] for group in order.split(64)]
        spans = [(birth + life)[group].max() - birth[group].min() for group in groups if len(group)]
        return 64 * int(sum(spans))

    assert passed(order) < 1.6 * int(life.sum()) < 0.75 * passed(birth)


def test_the_best_keys_are_the_first_of_the_order():
    bias = torch.randn(3, 2, 50).round()
    bias[0, 0, :5], bias[0, 0, 5:9] = -0.0, 0.0
    bias[1, 0, :9] = float("-inf")
    for keep in (1, 7, 50):
        expected = key_order(bias)[..., :keep].sort(dim=-1).values
        assert torch.equal(best_keys(bias, keep).sort(dim=-1).values.long(), expected)


def test_nothing_outside_the_tensors_is_read_and_everything_inside_is_written(device):
    x = inputs(length=45, keep=9, batch=1, heads=2, key_heads=1, dtype=torch.float32, device=device)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in x.items()}
    expected = call("triton", 9)(**leaves)
    gradients = torch.autograd.grad(expected.sum(), list(leaves.values()))
    views = {name: poison_surroundings(tensor).requires_grad_() for name, tensor in x.items()}
    with poisoned_empty():
        out = call("triton", 9)(**views)
        found = torch.autograd.grad(out.sum(), list(views.values()))
        one = dict(views, query=views["query"][:, :, -1:])
        with torch.no_grad():
            last = call("triton", 9)(**one)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(last, expected[:, :, -1:])
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_sequence_is_the_same_alone_and_twice(device):
    x = inputs(length=45, dtype=torch.float32, device=device)
    together = call("triton", 9)(**x)
    assert torch.equal(call("triton", 9)(**{n: t[1:] for n, t in x.items()}), together[1:])
    assert torch.equal(call("triton", 9)(**x), together)


def test_operators_pass_opcheck(device):
    from undivided.ops.dynamic_mask import autograd, triton

    x = inputs(dtype=HALF, length=40, device=device)
    x["key_bias"] = x["key_bias"].float()
    tests = ("test_schema", "test_faketensor")
    ops = torch.ops.undivided
    tile = triton.tile_size(2)
    assert tile == autograd.TILES[2] and triton.tile_size(4) == autograd.TILES[4]
    arguments = (x["key_bias"], 40, 9, tile)
    torch.library.opcheck(ops.dynamic_mask_select, arguments, test_utils=tests)
    chosen = ops.dynamic_mask_select(*arguments)
    arguments = (*x.values(), *chosen, 0.25)
    torch.library.opcheck(ops.dynamic_mask_forward, arguments, test_utils=tests)
    out, lse = ops.dynamic_mask_forward(*arguments)
    torch.library.opcheck(
        ops.dynamic_mask_backward, (torch.randn_like(out), out, lse, *arguments), test_utils=tests
    )
    one = (x["query"][:, :, :1], *list(x.values())[1:], 9, 0.25)
    torch.library.opcheck(ops.dynamic_mask_decode, one, test_utils=tests)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_compiles_into_one_graph(backend, device):
    x = {
        name: t.requires_grad_()
        for name, t in inputs(batch=1, heads=2, key_heads=1, dtype=torch.float32, device=device).items()
    }
    function = call(backend, 6)
    assert_compiles_whole(function, x)


@pytest.mark.gpu
def test_the_host_never_waits():
    x = {
        name: tensor.requires_grad_()
        for name, tensor in inputs(dtype=torch.bfloat16, length=300, device="cuda").items()
    }
    assert_host_never_waits(call("triton", 50), x)


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.dynamic_mask import backward, decode, lists, triton as forward

for width in (128,):
    query, key, value = (torch.empty(1, heads, 512, width, dtype=torch.bfloat16) for heads in (8, 2, 2))
    bias = torch.zeros(1, 2, 512)
    kept, death = lists.select(bias, 512, 100, forward.tile_size(2))
    out, lse = forward.forward(query, key, value, bias, kept, death, 0.1)
    backward.backward(out, out, lse, query, key, value, bias, kept, death, 0.1)
    decode.attend(query[:, :, :1], key, value, bias, 100, 0.1)
"""


def test_every_kernel_compiles_for_hopper_and_fits_its_shared_memory(run_python):
    lines = [line.split() for line in run_python(COMPILES).stdout.splitlines()]
    assert {name for name, _ in lines} == {
        "_rank_kernel", "_select_kernel", "_forward_kernel", "_query_kernel", "_key_kernel", "_decode_kernel",
        "_merge_kernel",
    }  # fmt: skip
    for name, shared in lines:
        assert int(shared) <= 227 * 1024, name


def test_tilings_fit_smaller_devices():
    from undivided.ops.dynamic_mask.backward import key_tiling, query_tiling
    from undivided.ops.dynamic_mask.triton import forward_tiling, tile_size

    for width in (64, 128, 256):
        for element_size in (2, 4):
            for choose in (forward_tiling, query_tiling, key_tiling):
                hopper = choose(width, width, element_size, 227 * 1024)
                small = choose(width, width, element_size, 99 * 1024)
                assert small.rows * small.keys <= hopper.rows * hopper.keys
            # A tile of queries shares a list: the forward takes it whole, the backward whole parts of it.
            assert forward_tiling(width, width, element_size, 99 * 1024).rows == tile_size(element_size)
            assert tile_size(element_size) % query_tiling(width, width, element_size, 99 * 1024).rows == 0


BAD = {
    "no window": ({"keep_window_size": 0}, ValueError, "keep_window_size=0 must be at least 1: a query keeps a key."),
    "a negative window": ({"keep_window_size": -3}, ValueError, "keep_window_size=-3 must be at least 1"),
    "half a key": ({"keep_window_size": 2.5}, TypeError, "keep_window_size=2.5 must be an integer."),
    "a truth value": ({"keep_window_size": True}, TypeError, "keep_window_size=True must be an integer."),
    "a selection": ({"selection": "tile"}, ValueError, "selection='tile' is not one of 'per_row', 'global', 'relu'."),
    "no key in a block": ({"block_smooth": 0}, ValueError, "block_smooth=0 must be at least 1; leave it None for"),
    "a bias": (
        {"key_bias": torch.zeros(2, 4, 20)}, ValueError,
        r"key_bias has shape \[2, 4, 20\]; it needs \[batch, key heads, keys\] = \[2, 2, 20\].",
    ),
    "an integer bias": (
        {"key_bias": torch.zeros(2, 2, 20, dtype=torch.int64)}, TypeError,
        "key_bias has dtype torch.int64; it needs a floating-point dtype.",
    ),
    "an additive mask": (
        {"attn_mask": torch.zeros(20, 20)}, TypeError, r"attn_mask has dtype torch.float32; use bool \(True = seen\).",
    ),
    "a mask": (
        {"attn_mask": torch.ones(3, 20, dtype=torch.bool)}, ValueError,
        r"attn_mask has shape \[3, 20\]; it must broadcast to \[2, 2, 20, 20\].",
    ),
    "key heads": (
        {"key": torch.zeros(2, 3, 20, 16).double(), "value": torch.zeros(2, 3, 20, 16).double(),
         "key_bias": torch.zeros(2, 3, 20)},
        ValueError, "key has 3 heads, which does not divide the 4 heads of query.",
    ),
    "a length": (
        {"value": torch.zeros(2, 2, 19, 16).double()}, ValueError,
        r"value \[2, 2, 19, 16\] must have the heads and the length of key \[2, 2, 20, 16\].",
    ),
    "a width": (
        {"key": torch.zeros(2, 2, 20, 8).double()}, ValueError,
        "key has head_dim 8, but query has 16; they must be equal.",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "error", "text"), BAD.values(), ids=BAD)
def test_bad_inputs_are_named(change, error, text):
    arguments = inputs() | {"keep_window_size": 6} | change
    with pytest.raises(error, match=text):
        dynamic_mask_attention(**arguments)


def test_kernels_say_what_they_cannot_do(device):
    x = {name: tensor.float() for name, tensor in inputs(device=device).items()}
    for options, reason in (
        ({"attn_mask": torch.ones(20, 20, dtype=torch.bool, device=device)}, "attn_mask is given"),
        ({"is_causal": False}, "is_causal is False"),
        ({"selection": "global"}, 'selection is "global"'),
        ({"block_smooth": 4}, r"block_smooth is 4 \(the kernels keep single keys\)"),
    ):
        with pytest.raises(
            ValueError, match=f'backend "triton" cannot run this: {reason}.*Able: "reference"'
        ):
            call("triton", 6, **options)(**x)
    x["query"] = x["query"][:, :, -3:].requires_grad_()
    with pytest.raises(ValueError, match="a gradient is wanted with more keys than queries"):
        call("triton", 6)(**x)
