from __future__ import annotations

import pytest
import torch

from undivided.ops import dense_attention
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

HEADS, KEY_HEADS = 6, 3
SHARED = torch.tensor([0, 0, 2, 2, 2, 2])
# One map a sample; a key head left out, an order that is not monotone.
OWN = torch.tensor([[0, 0, 2, 2, 2, 2], [2, 1, 0, 1, 1, 1]])
MAPS = {
    "shared": {"key_head_map": SHARED},
    "a map a sample": {"key_head_map": OWN},
    "values by another": {"key_head_map": SHARED, "value_head_map": OWN},
    "values alone": {"value_head_map": SHARED},
}
every_map = pytest.mark.parametrize("maps", MAPS.values(), ids=MAPS)
# Triton's interpreter multiplies bfloat16 wrongly.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


def inputs(queries=7, keys=9, head_dim=16, value_dim=24, dtype=torch.float64, device=None):
    draw = lambda heads, length, width: torch.randn(2, heads, length, width, dtype=dtype).to(device)  # noqa: E731
    return {
        "query": draw(HEADS, queries, head_dim),
        "key": draw(KEY_HEADS, keys, head_dim),
        "value": draw(KEY_HEADS, keys, value_dim),
    }


def call(backend, maps, **options):
    def run(**x):
        where = x["query"].device
        on_device = {name: head_map.to(where) for name, head_map in maps.items()}
        return dense_attention(**x, **on_device, backend=backend, **options)

    return run


def head_by_head(query, key, value, key_head_map=None, value_head_map=None, **options):
    """Each query head alone, with the heads its maps name."""
    uniform = torch.arange(HEADS) // (HEADS // KEY_HEADS)
    value_head_map = key_head_map if value_head_map is None else value_head_map
    maps = [
        (uniform if head_map is None else head_map).expand(2, HEADS)
        for head_map in (key_head_map, value_head_map)
    ]
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype)
    for b in range(2):
        for h in range(HEADS):
            own = query[b, h], key[b, maps[0][b, h]], value[b, maps[1][b, h]]
            out[b, h] = dense_attention(*(x[None, None] for x in own), backend="reference", **options)[0, 0]
    return out


@every_map
@pytest.mark.parametrize("queries", [7, 1])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_each_query_head_reads_the_heads_its_maps_name(backend, queries, maps):
    x = inputs(queries=queries)
    for options in ({}, {"is_causal": True}, {"is_causal": True, "window": 3}):
        out = dense_attention(**x, **maps, backend=backend, **options)
        expected = head_by_head(**x, **maps, **options)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_the_uniform_map_is_grouped_query_attention():
    x = inputs()
    uniform = torch.arange(HEADS) // 2
    assert torch.equal(dense_attention(**x, key_head_map=uniform), dense_attention(**x))


def test_keys_and_values_may_differ_in_number():
    x = inputs()
    value = x["value"][:, :2]
    out = dense_attention(
        x["query"], x["key"], value, key_head_map=SHARED, value_head_map=SHARED.clamp(max=1)
    )
    expected = head_by_head(**x, key_head_map=SHARED, value_head_map=SHARED.clamp(max=1))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    # Five key heads do not divide six query heads, and with a map they need not.
    five = torch.randn(2, 5, 9, 16, dtype=torch.float64)
    assert (
        dense_attention(x["query"], five, five, key_head_map=torch.tensor([0, 1, 2, 3, 4, 4])).shape[1] == 6
    )


@pytest.mark.parametrize("mask", ["one for all heads", "one a head"])
@pytest.mark.parametrize("queries", [5, 1])
def test_masks_stay_those_of_the_query_heads(queries, mask):
    x = inputs(queries=queries)
    seen = torch.rand(2, HEADS if mask == "one a head" else 1, queries, 9) > 0.4
    seen[..., 0] = True
    out, lse = dense_attention(**x, key_head_map=OWN, attn_mask=seen, return_lse=True)
    for b in range(2):
        index = OWN[b]
        one = {name: tensor[b : b + 1] for name, tensor in x.items()}
        one |= {name: one[name][:, index] for name in ("key", "value")}
        expected, sums = dense_attention(**one, attn_mask=seen[b : b + 1], return_lse=True)
        torch.testing.assert_close(out[b : b + 1], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(lse[b : b + 1], sums, rtol=1e-12, atol=1e-12)


def test_a_single_query_copies_no_key():
    """The product of a decoding step sees the key heads as they are, not one a query head."""
    x = inputs(queries=1)
    shapes = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.scaled_dot_product_attention:
                shapes.append(args[1].shape[1])
            return function(*args, **(kwargs or {}))

    with Watched():
        dense_attention(**x, key_head_map=SHARED, backend="sdpa")
        dense_attention(**inputs(queries=2), key_head_map=SHARED, backend="sdpa")
    assert shapes == [KEY_HEADS, HEADS]


def test_attention_with_a_fixed_map_passes_gradcheck():
    x = {name: tensor[:, :, :3, :4].requires_grad_() for name, tensor in inputs().items()}
    function = lambda q, k, v: dense_attention(q, k, v, key_head_map=OWN)  # noqa: E731
    assert torch.autograd.gradcheck(function, list(x.values()))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"queries": 37, "keys": 70}, {}),
        ({"queries": 37, "keys": 70, "head_dim": 24, "value_dim": 16}, {"is_causal": True}),
        ({"queries": 21, "keys": 5}, {"is_causal": True, "scale": -0.3}),
        ({"queries": 5, "keys": 21}, {"is_causal": True, "scale": 0.0}),
    ],
)
def test_the_kernel_is_as_accurate_as_eager(sizes, options, dtype, device):
    check_kernel(inputs(**sizes, dtype=torch.float32, device=device), MAPS["a map a sample"], dtype, options)


@every_map
def test_the_kernel_knows_every_kind_of_map(maps, device):
    check_kernel(inputs(queries=18, keys=20, dtype=torch.float32, device=device), maps, torch.float32, {})


def check_kernel(x, maps, dtype, options):
    fast, eager = (call(name, maps, return_lse=True, **options) for name in ("triton", "reference"))
    with torch.no_grad(), poisoned_empty():
        compare_op(fast, eager, eager, x, dtype, grad_inputs=())


def test_the_kernel_reads_strided_heads_and_no_batch_mate(device):
    x = inputs(queries=33, keys=33, dtype=torch.float32, device=device)
    with torch.no_grad():
        out = call("triton", MAPS["a map a sample"])(**x)
        strided = {name: poison_surroundings(tensor) for name, tensor in x.items()}
        torch.testing.assert_close(call("triton", MAPS["a map a sample"])(**strided), out, rtol=0, atol=0)
        alone = {name: tensor[1:] for name, tensor in x.items()}
        own = call("triton", {"key_head_map": OWN[1:]})(**alone)
        torch.testing.assert_close(own, out[1:], rtol=0, atol=0)


def test_the_kernel_answers_a_wrong_index_with_nan(device):
    x = inputs(dtype=torch.float32, device=device)
    with torch.no_grad():
        out = call("triton", {"key_head_map": torch.tensor([0, 3, 1, -1, 2, 0])})(**x)
    assert out[:, [1, 3]].isnan().all() and out[:, [0, 2, 4, 5]].isfinite().all()


def test_the_kernel_passes_opcheck_and_compiles_whole(device):
    x = inputs(dtype=torch.float32, device=device)
    shared, own = SHARED.to(device), OWN.to(device)
    arguments = (*x.values(), shared, own, True, 0.25, True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.undivided.mapped_attention.default, arguments, test_utils=checks)
    run = lambda **x: dense_attention(**x, key_head_map=own, backend="triton")  # noqa: E731
    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**x), run(**x), rtol=0, atol=0)


def test_the_kernel_compiles_for_hopper(run_python):
    assert run_python(AHEAD_OF_TIME).stdout.split() == ["compiled", "3"]


AHEAD_OF_TIME = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from undivided.ops.dense import triton as dense

FLOATS, MAPS = ("query", "key", "value", "out"), ("key_map", "value_map")
count = 0
for name, size, width, causal in (("bf16", 2, 64, False), ("bf16", 2, 256, True), ("fp32", 4, 128, False)):
    cut = dense.tiling(width, width, size)
    constants = dict(
        HEAD_DIM=width, VALUE_DIM=width, BLOCK_D=width, BLOCK_V=width, BLOCK_M=cut.rows, BLOCK_N=cut.keys,
        IS_CAUSAL=causal, WITH_LSE=causal, PRECISION="ieee" if size == 4 else "tf32",
    )
    types = {f: f"*{name}" for f in FLOATS} | {m: "*i64" for m in MAPS} | {"lse": "*fp32", "scale": "fp32"}
    signature = {
        p.name: "constexpr" if p.is_constexpr else types.get(p.name, "i32")
        for p in dense._forward_kernel.params
    }
    source = ASTSource(fn=dense._forward_kernel, signature=signature, constexprs=constants)
    options = dict(num_warps=cut.num_warps, num_stages=cut.num_stages)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    if compiled.metadata.shared > 227 * 1024:
        raise SystemExit(f"{name} {width} takes {compiled.metadata.shared} bytes")
    count += 1
print("compiled", count)
"""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"key_head_map": SHARED[:4]},
            ValueError,
            r"key_head_map has shape \[4\]; it must be \[heads=6\] or \[batch=2, heads=6\]",
        ),
        (
            {"value_head_map": SHARED.int()},
            TypeError,
            "value_head_map has dtype torch.int32; it names heads and must be torch.int64",
        ),
        ({"key_head_map": SHARED, "backend": "triton", "softcap": 2.0}, ValueError, "softcap is given"),
        ({"backend": "triton"}, ValueError, "no head map is given"),
    ],
)
def test_what_does_not_fit_is_named(change, error, message):
    x = inputs(dtype=torch.float32)
    with torch.no_grad(), pytest.raises(error, match=message):
        dense_attention(**x, **change)


def test_the_kernel_says_that_it_has_no_backward_and_is_not_for_one_query():
    x = {name: tensor.requires_grad_() for name, tensor in inputs(dtype=torch.float32).items()}
    with pytest.raises(ValueError, match=r"an input needs a gradient .*Able: .*\"sdpa\""):
        dense_attention(**x, key_head_map=SHARED, backend="triton")
    with torch.no_grad(), pytest.raises(ValueError, match="query has one position"):
        dense_attention(**inputs(queries=1, dtype=torch.float32), key_head_map=SHARED, backend="triton")


def test_without_a_map_heads_must_divide():
    x = inputs()
    with pytest.raises(ValueError, match="key has 4 heads, which does not divide the 6 heads of query"):
        dense_attention(x["query"], *[torch.randn(2, 4, 9, 16, dtype=torch.float64)] * 2)
    with pytest.raises(ValueError, match=r"must share \[batch, key_heads, keys\]"):
        dense_attention(x["query"], x["key"], x["value"][:, :1])
