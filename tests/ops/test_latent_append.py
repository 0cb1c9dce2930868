from __future__ import annotations

import pytest
import torch

from undivided.layers.latent import LatentNorm
from undivided.layers.rotary import apply_rotary
from undivided.ops import append_latent, latent_attention
from undivided.ops.latent_append import kernels, reference
from undivided.testing import assert_as_accurate, poison_buffer

triton = pytest.importorskip("triton")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def append_inputs(
    batch=2, tokens=1, latent_dim=32, rope_dim=8, positions=12, lengths=(3, 0), page_size=None, norm=True,
    interleaved=True, counts=None, shards=None, fp8=False, heads=None, dtype=torch.float32, device="cpu",
):  # fmt: skip
    """Arguments of a backend of `append_latent`; the cache is NaN, so that what is written is what is finite."""
    width = latent_dim + rope_dim
    row = torch.randn(batch, tokens, width + 3, dtype=torch.float64)[..., :width].to(device, dtype)
    angles = torch.rand(batch, tokens, rope_dim // 2, dtype=torch.float64) * 6
    table = None
    shape = (batch, positions)
    if page_size is not None:
        pages = -(-positions // page_size)
        table = torch.randperm(batch * pages + 2)[: batch * pages].reshape(batch, pages).int().to(device)
        shape = (batch * pages + 2, page_size)

    def whole(values):
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    stored = torch.float8_e4m3fn if fp8 else dtype
    return {
        "row": row,
        "cos": angles.cos().to(device, dtype) if rope_dim else None,
        "sin": angles.sin().to(device, dtype) if rope_dim else None,
        "norm_weight": (torch.rand(latent_dim, dtype=torch.float64) + 0.5).to(device, dtype)
        if norm
        else None,
        "cache": poison_buffer(*shape, width, dtype=torch.float32, device=device).to(stored),
        "lengths": whole(lengths),
        "eps": 1e-6,
        "interleaved": interleaved,
        "block_table": table,
        "counts": whole(counts),
        "shard_scale": torch.rand(shards, device=device) + 0.5 if shards else None,
        "latent_scale": poison_buffer(*shape, device=device) if fp8 else None,
        "query_rope": queries(batch, heads, tokens, rope_dim).to(device, dtype) if heads else None,
    }


def queries(batch, heads, tokens, rope_dim):
    """A layer's view: heads and tokens exchanged, behind the part without positions."""
    whole = torch.randn(batch, tokens, heads, 5 + rope_dim, dtype=torch.float64)
    return whole.transpose(1, 2)[..., 5:]


def appended(backend, x):
    """The cache after the call on a copy, in float32 or float64, with the scales of an fp8 cache applied."""
    changed = ("cache", "latent_scale", "query_rope")
    fresh = x | {name: x[name].clone() for name in changed if x[name] is not None}
    backend(**fresh)
    if fresh["latent_scale"] is None:
        return fresh["cache"]
    return fresh["cache"].float() * fresh["latent_scale"][..., None]


def in_float64(x):
    names = ("row", "cos", "sin", "norm_weight", "cache", "shard_scale", "query_rope")
    wide = {name: x[name].double() for name in names if x[name] is not None}
    return x | wide | {"latent_scale": None}


def written(cache):
    return cache.isfinite().all(-1)


SHAPES = {
    "one token": dict(),
    "five tokens": dict(tokens=5, lengths=(0, 7)),
    "one sequence": dict(batch=1, lengths=(4,)),
    "rotary halves": dict(interleaved=False, tokens=2),
    "no norm": dict(norm=False),
    "no rope part": dict(rope_dim=0),
    "widths that are no powers of two": dict(latent_dim=48, rope_dim=24, tokens=2),
    "three shards": dict(latent_dim=39, shards=3, tokens=2),
    "two shards": dict(shards=2),
    "pages of 4": dict(page_size=4, tokens=3, lengths=(6, 9)),
    "pages of 64": dict(page_size=64, positions=130, lengths=(127, 63), tokens=2),
    "an idle sequence and a short one": dict(tokens=3, counts=(0, 2)),
    "tokens behind the capacity": dict(tokens=4, lengths=(10, 12)),
    "tokens behind the last page": dict(tokens=4, lengths=(10, 12), page_size=4),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_the_reference_and_writes_nothing_else(shape, dtype, device):
    x = append_inputs(**shape, dtype=dtype, device=device)
    fast, eager = appended(kernels.append_triton, x), appended(reference.append, x)
    exact = appended(reference.append, in_float64(x))
    there = written(exact)
    assert torch.equal(written(fast), there) and there.any()
    assert bool(fast[~there].isnan().all())
    assert_as_accurate(fast[there], eager[there], exact[there], factor=2.0, name="cache")


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("row", [1.0, 0.0, 1e-3])
def test_an_fp8_row_is_kept_to_half_a_step_of_its_largest_number(row, page_size, device):
    x = append_inputs(tokens=3, page_size=page_size, fp8=True, norm=False, device=device)
    x["row"] = x["row"] * row
    exact = appended(reference.append, in_float64(x | {"cache": x["cache"].float()}))
    # Triton's interpreter loses the carry of a mantissa that rounds up to a power of two.
    backends = [reference.append, kernels.append_triton] if device.type == "cuda" else [reference.append]
    for backend in backends:
        found = appended(backend, x).double()
        there = written(exact)
        assert torch.equal(written(found), there)
        found, wanted = found[there], exact[there]
        # Three bits of mantissa: half of an eighth of the number, or of the smallest step, 2**-9 of a scale.
        step = torch.maximum(wanted.abs() / 16, wanted.abs().amax(-1, keepdim=True) / 448 * 2**-10)
        assert bool(((found - wanted).abs() <= step * 1.001).all())


@pytest.mark.parametrize("page_size", [None, 4])
def test_numbers_that_fp8_can_hold_are_kept_exactly(page_size, device):
    x = append_inputs(tokens=3, page_size=page_size, fp8=True, norm=False, device=device)
    row = x["row"].to(torch.float8_e4m3fn).float()
    row[..., 7] = 448.0
    x |= {"row": row / 4, "cos": torch.ones_like(x["cos"]), "sin": torch.zeros_like(x["sin"])}
    found, expected = (appended(backend, x) for backend in (kernels.append_triton, reference.append))
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(expected[written(expected)].sort(0).values, x["row"].flatten(0, 1).sort(0).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        dict(heads=1),
        dict(heads=20, tokens=3, counts=(0, 2)),
        dict(heads=16, interleaved=False, rope_dim=24),
        dict(heads=3, fp8=True, norm=False),
        dict(heads=4, tokens=2, page_size=4, lengths=(10, 30)),
    ],
    ids=str,
)
def test_the_queries_of_all_tokens_are_rotated_in_place(shape, dtype, device):
    x = append_inputs(**shape, dtype=dtype, device=device)
    exact, eager, fast = in_float64(x | {"cache": x["cache"].float()}), dict(x), dict(x)
    for backend, given in (
        (reference.append, exact),
        (reference.append, eager),
        (kernels.append_triton, fast),
    ):
        whole = torch.zeros_like(given["query_rope"]).repeat(1, 1, 1, 2)
        given["query_rope"] = whole[..., : given["query_rope"].shape[3]].copy_(given["query_rope"])
        backend(**given)
        assert not whole[..., given["query_rope"].shape[3] :].any()
    wanted = apply_rotary(x["query_rope"].double(), exact["cos"], exact["sin"], x["interleaved"])
    assert torch.allclose(exact["query_rope"], wanted, rtol=0, atol=1e-12)
    assert_as_accurate(fast["query_rope"], eager["query_rope"], wanted, factor=2.0, name="query_rope")


def test_is_what_the_layers_compose(device):
    x = append_inputs(tokens=3, shards=2, dtype=torch.float32, device=device)
    norm = LatentNorm(32, 1e-6).to(device)
    norm.weight.data.copy_(x["norm_weight"])
    latent, rope = x["row"].split([32, 8], dim=-1)
    expected = torch.cat(
        [norm(latent, x["shard_scale"]), apply_rotary(rope[:, None], x["cos"], x["sin"], True)[:, 0]], dim=-1
    )
    found = appended(reference.append, x)
    for b, length in enumerate((3, 0)):
        torch.testing.assert_close(found[b, length : length + 3], expected[b])


def test_a_rank_with_one_shard_normalises_by_its_scale_over_the_number_of_shards(device):
    both = append_inputs(shards=2, rope_dim=0, dtype=torch.float32, device=device)
    whole = appended(reference.append, both)
    for shard in (0, 1):
        half = slice(16 * shard, 16 * shard + 16)
        one = both | {
            "row": both["row"][..., half],
            "cache": both["cache"][..., half].contiguous(),
            "norm_weight": both["norm_weight"][half],
            "shard_scale": both["shard_scale"][shard : shard + 1] / 2,
        }
        for backend in (reference.append, kernels.append_triton):
            torch.testing.assert_close(appended(backend, one), whole[..., half], equal_nan=True)


def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(device):
    x = append_inputs(batch=3, tokens=2, lengths=(3, 0, 9), dtype=torch.float16, device=device)
    together = appended(kernels.append_triton, x)
    for b in range(3):
        per_sequence = ("row", "cos", "sin", "cache", "lengths")
        alone = appended(kernels.append_triton, x | {name: x[name][b : b + 1] for name in per_sequence})
        assert torch.equal(alone[0].nan_to_num(7.0), together[b].nan_to_num(7.0))


def test_tables_of_one_batch_entry_and_complex_ones_are_taken_as_they_are(device):
    x = append_inputs(tokens=2, dtype=torch.float32, device=device)
    turns = torch.polar(torch.ones(1, 2, 4, device=device), torch.rand(1, 2, 4, device=device))
    views = appended(kernels.append_triton, x | {"cos": turns.real, "sin": turns.imag})
    copies = {"cos": turns.real.repeat(2, 1, 1), "sin": turns.imag.repeat(2, 1, 1)}
    assert torch.equal(views.nan_to_num(7.0), appended(kernels.append_triton, x | copies).nan_to_num(7.0))


def public(x, **changed):
    """Calls the operator itself."""
    arguments = dict(x | changed)
    positional = [arguments.pop(name) for name in ("row", "cos", "sin", "norm_weight", "cache", "lengths")]
    return append_latent(*positional, **arguments)


def test_decoding_over_what_was_appended_is_decoding_over_the_same_rows(device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = append_inputs(tokens=6, lengths=(0, 0), page_size=4, dtype=dtype, device=device)
    public(x)
    plain = append_inputs(tokens=6, lengths=(0, 0), positions=6, dtype=dtype, device=device)
    plain |= {name: x[name] for name in ("row", "cos", "sin", "norm_weight")}
    public(plain)
    query, query_rope = (torch.randn(2, 4, 1, dim, dtype=dtype, device=device) for dim in (32, 8))
    outs = []
    for cache, options in (
        (x["cache"], {"block_table": x["block_table"], "cache_seqlens": torch.full_like(x["lengths"], 6)}),
        (plain["cache"], {}),
    ):
        latent, rope_key = cache[:, None, :, :32], cache[:, None, :, 32:]
        outs.append(
            latent_attention(query, query_rope, latent, rope_key, scale=0.2, backend="reference", **options)
        )
    torch.testing.assert_close(outs[0], outs[1])


def test_no_history_is_kept_in_the_cache():
    x = append_inputs()
    public(x, row=x["row"].requires_grad_(), norm_weight=x["norm_weight"].requires_grad_())
    assert not x["cache"].requires_grad


def test_is_an_operator_that_says_what_it_changes(device):
    x = append_inputs(tokens=2, page_size=4, heads=3, device=device)
    x["cache"].nan_to_num_(0.0)
    torch.library.opcheck(
        torch.ops.undivided.latent_append.default,
        tuple(x.values()),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_as_one_graph(device):
    x = append_inputs(tokens=2, page_size=4, counts=(2, 1), heads=3, device=device)
    compiled = torch.compile(public, backend="aot_eager", fullgraph=True)
    found = appended(lambda **x: compiled(x, backend="triton"), x)
    assert torch.equal(found.nan_to_num(7.0), appended(kernels.append_triton, x).nan_to_num(7.0))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(sin=None), "cos and sin must be given together"),
        (dict(cos=torch.ones(3, 1, 4)), r"cos has shape \[3, 1, 4\]; it needs \[2 or 1, 1, rope_dim / 2\]"),
        (dict(norm_weight=torch.ones(40)), r"norm_weight has shape \[40\]; it needs \[latent_dim=32\]"),
        (dict(norm_weight=None, shard_scale=torch.ones(2)), "shard_scale is given, but norm_weight is None"),
        (
            dict(shard_scale=torch.ones(5)),
            r"shard_scale has shape \[5\]; its length must divide latent_dim=32",
        ),
        (dict(cache=torch.ones(2, 12, 41)), "cache has rows of 41, but row has width 40"),
        (dict(cache=torch.ones(3, 12, 40)), "cache has batch 3, but row has 2"),
        (dict(lengths=torch.zeros(3, dtype=torch.int32)), r"lengths has shape \[3\]; it needs \[batch=2\]"),
        (
            dict(lengths=torch.zeros(2, dtype=torch.int64)),
            "lengths has dtype torch.int64; it needs torch.int32",
        ),
        (dict(block_table=torch.zeros(2, dtype=torch.int32)), r"block_table has shape \[2\]"),
        (
            dict(cache=torch.ones(2, 12, 40, dtype=torch.float16)),
            "cache has dtype torch.float16; beside rows of",
        ),
        (
            dict(query_rope=torch.ones(2, 3, 2, 8)),
            r"query_rope has shape \[2, 3, 2, 8\]; it needs \[2, heads, 1, 8\]",
        ),
        (
            dict(query_rope=torch.ones(2, 3, 1, 8, dtype=torch.float16)),
            "query_rope has dtype torch.float16, but row has torch.float32",
        ),
        (
            dict(
                row=torch.ones(2, 1, 40),
                cos=None,
                sin=None,
                norm_weight=None,
                query_rope=torch.ones(2, 3, 1, 8),
            ),
            "query_rope is given, but cos and sin are None",
        ),
        (dict(query_rope=torch.ones(2, 3, 1, 8, requires_grad=True)), "query_rope needs a gradient"),
        (dict(row=torch.ones(2, 40)), r"row has shape \[2, 40\]; it needs 3 axes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named(change, text):
    with pytest.raises((ValueError, TypeError), match=text):
        public(append_inputs(), **change)


def test_a_wrong_scale_of_an_fp8_cache_is_named():
    x = append_inputs(fp8=True)
    with pytest.raises(
        ValueError, match=r"latent_scale is torch.float32 \[2, 11\]; it needs torch.float32 \[2, 12\]"
    ):
        public(x, latent_scale=x["latent_scale"][:, :11])


def test_says_what_it_cannot_run():
    x = append_inputs(rope_dim=0)
    assert "row is float64" in kernels.reasons(**in_float64(x))
    assert "the last axis of row has stride 64 (needs 1)" in kernels.reasons(
        **(x | {"row": torch.randn(1, 32, 64).mT[:, :2]})
    )
    assert "the width is 4128 (at most 4096)" in kernels.reasons(**append_inputs(latent_dim=4128, rope_dim=0))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths(device):
    x = append_inputs(batch=2, tokens=2, page_size=4, dtype=torch.bfloat16, device=device)
    public(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        public(x)
    for lengths in ((5, 1), (0, 10)):
        x["cache"].fill_(torch.nan)
        x["lengths"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected = appended(kernels.append_triton, x | {"cache": torch.full_like(x["cache"], torch.nan)})
        assert torch.equal(x["cache"].nan_to_num(7.0), expected.nan_to_num(7.0))


COMPILE = """
import torch
from tests.ops.ahead_of_time import compile_only

compile_only(lambda name, kernel, options: (kernel.metadata.shared,))
from undivided.ops.latent_append.triton import append

whole = lambda *shape: torch.zeros(*shape, dtype=torch.int32)
for latent_dim, pairs, page_size, shards, fp8, tokens, interleaved, heads in (
    (512, 32, 64, None, False, 1, True, 128), (512, 32, 0, None, False, 2048, False, 0),
    (512, 32, 64, 2, True, 1, True, 0), (255, 16, 16, 3, False, 1, True, 9), (256, 0, 64, 1, True, 1, True, 0),
):
    row = torch.empty(2, tokens, latent_dim + 2 * pairs, dtype=torch.bfloat16)
    table = torch.empty(2, tokens, pairs)
    cache = torch.empty(2, page_size or 4096, row.shape[2], dtype=torch.float8_e4m3fn if fp8 else row.dtype)
    append(
        row, table if pairs else None, table if pairs else None, torch.empty(latent_dim, dtype=row.dtype), cache,
        whole(2), 1e-6, interleaved, whole(2, 4) if page_size else None, whole(2),
        torch.ones(shards) if shards else None, torch.empty(cache.shape[:2]) if fp8 else None,
        torch.empty(2, heads, tokens, 2 * pairs, dtype=row.dtype) if heads else None,
    )
"""


def test_every_kernel_compiles_for_hopper(run_python):
    shared = [int(line) for line in run_python(COMPILE).stdout.splitlines()]
    assert len(shared) == 5 and max(shared) <= 48 * 1024
