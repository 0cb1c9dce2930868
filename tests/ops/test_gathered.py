from __future__ import annotations

import math

import pytest
import torch

from undivided.ops import dense_attention, gathered_attention
from undivided.ops.gathered import fused
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

EXACT = {"rtol": 1e-12, "atol": 1e-12}
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16
SHAPES = {
    "one list for all heads": dict(),
    "a list a head": dict(lists=4),
    "blocks that are no tile": dict(queries=50, keys=50, block_size=20),
    "queries behind keys": dict(queries=20, keys=60),
    "one query": dict(queries=1, keys=30),
    "widths that are no powers of two": dict(head_dim=24, value_dim=40),
    "one key head": dict(key_heads=1),
}
OPTIONS = ({}, {"softcap": 3.0}, {"window": 9}, {"return_lse": True}, {"is_causal": False})


def inputs(
    heads=4, key_heads=2, queries=40, keys=40, head_dim=16, value_dim=16, block_size=16, lists=1, places=13,
    device=None, batch=2,
):  # fmt: skip
    draw = lambda *sizes: torch.randn(batch, *sizes, dtype=torch.float64).to(device)  # noqa: E731
    shape = (batch, lists, -(-queries // block_size))
    chosen = torch.rand(*shape, keys).argsort(dim=-1)[..., :places].sort(dim=-1).values
    chosen[..., -2:] = -1
    return {
        "query": draw(heads, queries, head_dim),
        "key": draw(key_heads, keys, head_dim),
        "value": draw(key_heads, keys, value_dim),
        "indices": chosen.to(torch.int32).to(device),
        "block_size": block_size,
    }


def call(backend, **options):
    return lambda **x: gathered_attention(**x, backend=backend, **options)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gathered_blocks_are_as_accurate_as_eager(shape):
    for options in OPTIONS:
        reference = call("reference", **options)
        compare_op(call("blocks", **options), reference, reference, inputs(**shape), torch.float32)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_the_fused_kernel_is_as_accurate_as_eager(shape, device):
    for options in OPTIONS[:2]:
        reference = call("reference", **options)
        compare_op(
            call("triton", **options), reference, reference, inputs(**shape, batch=1, device=device), HALF, ()
        )


@torch.no_grad()
def test_the_fused_kernel_with_options(device):
    for options in OPTIONS:
        reference = call("reference", **options)
        compare_op(
            call("triton", **options), reference, reference, inputs(batch=1, device=device), torch.float32, ()
        )


@pytest.mark.parametrize("lists", [1, 4])
@torch.no_grad()
def test_parts_of_long_lists_of_few_queries_are_merged(lists, device, monkeypatch):
    monkeypatch.setattr(fused, "_PART", 8)
    launched = []
    attend = fused._attend
    monkeypatch.setattr(fused, "_attend", lambda *x: launched.append(x[3].shape) or attend(*x))
    for options in ({}, {"window": 20, "return_lse": True}):
        reference = call("reference", **options)
        x = inputs(queries=5, keys=40, block_size=3, places=30, lists=lists, batch=1, device=device)
        compare_op(call("triton", **options), reference, reference, x, torch.float32, ())
    assert launched == 2 * [(1, 16, 2, 8)]


def test_equals_a_softmax_over_the_list_written_with_loops():
    x = inputs()
    out = gathered_attention(**x, backend="reference")
    for row in (3, 16, 39):
        listed = [j for j in x["indices"][1, 0, row // 16].tolist() if 0 <= j <= row]
        logits = [float(x["query"][1, 3, row] @ x["key"][1, 1, j]) / 4 for j in listed]
        weights = [math.exp(logit) for logit in logits]
        expected = sum(w / sum(weights) * x["value"][1, 1, j] for w, j in zip(weights, listed, strict=True))
        torch.testing.assert_close(out[1, 3, row], expected * torch.ones(16, dtype=torch.float64), **EXACT)


@pytest.mark.parametrize("backend", ["reference", "blocks"])
def test_a_list_of_all_keys_is_full_attention(backend):
    x = inputs(queries=20, keys=35)
    every = torch.arange(35, dtype=torch.int32).expand(2, 1, 2, 35)
    for options in ({}, {"window": 6}, {"softcap": 2.0}):
        found = gathered_attention(**(x | {"indices": every}), backend=backend, **options)
        heads = {name: x[name] for name in ("query", "key", "value")}
        expected = dense_attention(**heads, is_causal=True, backend="reference", **options)
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "blocks", "triton"])
def test_keys_that_no_list_has_are_without_influence(backend, device):
    x = inputs(device=device)
    x = {name: t.float() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in x.items()}
    x["indices"] = torch.where(x["indices"] > 30, -1, x["indices"])
    expected = gathered_attention(**x, backend=backend)
    for name in ("key", "value"):
        x[name][:, :, 31:] += 5
    torch.testing.assert_close(gathered_attention(**x, backend=backend), expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "blocks", "triton"])
def test_places_that_list_nothing_add_nothing(backend, device):
    x = inputs(device=device)
    x = {name: t.float() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in x.items()}
    longer = torch.nn.functional.pad(x["indices"], (3, 30), value=-1)
    found, lse = gathered_attention(**(x | {"indices": longer}), return_lse=True, backend=backend)
    expected, expected_lse = gathered_attention(**x, return_lse=True, backend=backend)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lse, expected_lse)
    none = torch.full_like(longer, -1)
    found, lse = gathered_attention(**(x | {"indices": none}), return_lse=True, backend=backend)
    assert (found == 0).all()
    assert (lse == float("-inf")).all()


def test_what_surrounds_the_inputs_is_not_read(device):
    x = inputs(device=device)
    x = {name: t.float() if torch.is_tensor(t) and t.is_floating_point() else t for name, t in x.items()}
    expected = gathered_attention(**x, backend="triton")
    for name in ("query", "key", "value"):
        x[name] = poison_surroundings(x[name])
    with poisoned_empty():
        found = gathered_attention(**x, backend="triton")
    torch.testing.assert_close(found, expected)


def test_the_operator_is_sound_and_compiles(device):
    x = inputs(device=device)
    heads = [x[name].float() for name in ("query", "key", "value")]
    counts = torch.full((2, 1, 3), 13, dtype=torch.int32, device=device)
    torch.library.opcheck(
        torch.ops.undivided.gathered_forward, (*heads, x["indices"], counts, 16, True, None, 0.25, None),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    torch._dynamo.reset()
    run = lambda *heads: gathered_attention(*heads, x["indices"], block_size=16, backend="triton")  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*heads), run(*heads))


def test_errors_name_what_is_wrong():
    x = inputs()
    for change, message in (
        ({"block_size": 0}, "block_size=0 must be at least 1."),
        (
            {"indices": x["indices"][:, :, :2]},
            "40 queries in blocks of block_size=16 need [2, 1 or 4, 3, places].",
        ),
        ({"indices": x["indices"] + 100}, "but key has 40 positions."),
        ({"window": 4, "is_causal": False}, "window=4 with is_causal=False; a window is at least 1"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"key": x["key"][:, :, :3]}, "must share [batch, key_heads, keys]"),
        (
            {"backend": "triton", "query": x["query"]},
            "query is torch.float64 (needs float32, float16 or bfloat16)",
        ),
    ):
        with pytest.raises(ValueError) as error:
            gathered_attention(**(x | change))
        assert message in str(error.value)
    with pytest.raises(TypeError, match="indices has dtype torch.int16; use int32 or int64."):
        gathered_attention(**(x | {"indices": x["indices"].short()}))
