from __future__ import annotations

import pytest
import torch

from tests.ops.latent_caches import assert_decodes, decode_inputs
from undivided.ops.latent_decode import kernels
from undivided.testing import poisoned_empty

triton = pytest.importorskip("triton")

HALF = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float32, torch.float16]
SHAPES = {
    "one latent head": dict(),
    "two latent heads": dict(latent_heads=2),
    "a head of its own for each query head": dict(heads=3, latent_heads=3),
    "one head": dict(heads=1, keys=17),
    "20 heads": dict(heads=20),
    "40 rows": dict(heads=20, queries=2),
    "eight queries": dict(queries=8),
    "three queries, two latent heads": dict(queries=3, latent_heads=2),
    "more queries than keys": dict(queries=5, keys=3),
    "no rope part": dict(rope_dim=0),
    "widths that are no powers of two": dict(latent_dim=48, rope_dim=24),
    "one key": dict(keys=1),
    "ragged": dict(batch=4, lengths=[40, 0, 1, 33], queries=2),
    "all empty": dict(lengths=[0, 0]),
    "pages of 16": dict(batch=3, lengths=[40, 0, 7], page_size=16),
    "pages of 64": dict(batch=3, keys=130, lengths=[130, 64, 7], page_size=64, queries=2),
    "pages of 256, two latent heads": dict(latent_heads=2, keys=256, lengths=[256, 77], page_size=256),
    "pages of 5": dict(keys=20, lengths=[19, 6], page_size=5),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_shape
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_as_accurate_as_the_reference_and_reads_no_unused_row(shape, dtype, device):
    x = decode_inputs(**shape, dtype=dtype, device=device)
    with poisoned_empty():
        assert_decodes(kernels.attend_triton, x)


@pytest.mark.parametrize(
    ("splits", "page_size"), [(1, 32), (2, None), (3, 32), (5, 32), (33, None), (64, None)]
)
def test_every_number_of_splits(splits, page_size, device):
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    x = decode_inputs(keys=200, lengths=[200, 65], queries=2, page_size=page_size, dtype=dtype, device=device)
    with poisoned_empty():
        assert_decodes(kernels.attend_triton, x | {"num_splits": splits})


@pytest.mark.parametrize("options", [dict(softcap=2.0), dict(is_causal=False), dict(scale=-0.2)], ids=str)
def test_options(options, device):
    x = decode_inputs(queries=3, lengths=[40, 21], dtype=torch.float16, device=device)
    assert_decodes(kernels.attend_triton, x | options)


@pytest.mark.parametrize("page_size", [None, 16])
def test_an_fp8_cache_is_scaled_by_row(page_size, device):
    x = decode_inputs(queries=2, lengths=[40, 21], page_size=page_size, dtype=torch.float16, device=device)
    rows, unread = x["latent"].shape[0], x["latent"].isnan().any(-1).any(1)
    scale = (torch.rand(rows, x["latent"].shape[2], device=device) + 0.5).masked_fill(unread, float("nan"))
    stored = {name: x[name].to(torch.float8_e4m3fn) for name in ("latent", "rope_key")}
    assert_decodes(kernels.attend_triton, x | stored | {"latent_scale": scale})


@pytest.mark.parametrize("splits", [1, 3])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(splits, device):
    x = decode_inputs(batch=3, lengths=[40, 13, 29], dtype=torch.float16, device=device) | {
        "num_splits": splits
    }
    out, lse = kernels.attend_triton(**x)
    for b in range(3):
        alone = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in x.items()}
        alone_out, alone_lse = kernels.attend_triton(**alone)
        assert torch.equal(alone_out[0], out[b]) and torch.equal(alone_lse[0], lse[b])


def test_views_and_strided_queries_are_taken_as_they_are(device):
    x = decode_inputs(queries=2, dtype=torch.float16, device=device)
    out, lse = kernels.attend_triton(**x)
    transposed = {
        name: x[name].transpose(1, 2).contiguous().transpose(1, 2) for name in ("query_latent", "query_rope")
    }
    separate = {name: x[name].contiguous() for name in ("latent", "rope_key")}
    for changed in (transposed, separate, {"query_latent": x["query_latent"].mT.contiguous().mT}):
        again = kernels.attend_triton(**(x | changed))
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_an_empty_batch(device):
    x = decode_inputs(dtype=torch.float16, device=device)
    none = {k: v[:0] if isinstance(v, torch.Tensor) else v for k, v in x.items()}
    out, lse = kernels.attend_triton(**none)
    assert out.shape == (0, 4, 1, 64) and lse.shape == (0, 4, 1)


def test_the_operator_is_sound_for_torch(device):
    x = decode_inputs(keys=20, lengths=[20, 3], dtype=torch.float16, device=device)
    order = (
        "query_latent", "query_rope", "latent", "rope_key", "scale", "cache_seqlens", "block_table",
        "latent_scale", "softcap", "is_causal", "num_splits",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.undivided.latent_decode.default, tuple(x[name] for name in order))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(attn_mask=torch.ones(1, 1, 1, 40, dtype=torch.bool)), "attn_mask is given"),
        (
            dict(query_latent=torch.randn(2, 4, 1, 72)),
            "latent_dim is 72 (needs a multiple of 16, at most 512)",
        ),
        (dict(query_rope=torch.randn(2, 4, 1, 80)), "rope_dim is 80 (at most 64)"),
        (
            dict(query_latent=torch.randn(2, 4, 1, 64, dtype=torch.float64)),
            "query_latent is float64 (needs float16 or",
        ),
        (dict(query_latent=torch.randn(2, 4, 1, 64, requires_grad=True)), "a gradient is needed"),
        (dict(latent=torch.randn(2, 1, 64, 40).mT), "the last axis of latent has stride 40 (needs 1)"),
        (dict(cache_seqlens=torch.tensor([3, 4])), "cache_seqlens is int64 on cpu (needs int32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_says_what_it_cannot_run(change, reason):
    assert any(reason in sentence for sentence in kernels.triton_reasons(**(decode_inputs() | change)))


def test_gluon_says_what_it_cannot_run(monkeypatch):
    monkeypatch.setattr(kernels, "hopper_availability", lambda: [])
    x = decode_inputs(keys=48, page_size=48, latent_dim=96, rope_dim=16)
    reasons = kernels.gluon_reasons(**(x | {"softcap": 2.0, "scale": 0.0}))
    for reason in (
        "query_latent is on cpu",
        "query_latent is float32 (needs float16 or bfloat16)",
        'softcap is given (backend "triton" can)',
        "scale is 0.0 (needs a positive one)",
        "latent_dim is 96 (needs 64, 128, 256 or 512)",
        "rope_dim is 16 (needs 64, or none)",
        "page_size is 48 (needs a multiple of 64)",
    ):
        assert reason in reasons
    scaled = kernels.gluon_reasons(
        **(x | {"latent_scale": torch.ones(2, 48, 2, dtype=torch.float64)[..., 0]})
    )
    assert "latent_dim is 96 (an fp8 cache needs 256 or 512)" in scaled
    assert "latent_scale is float64 with stride 2 (needs float32, 1)" in scaled
    rows = torch.randn(2, 1, 48, 69, dtype=torch.float16)
    assert any(
        "the copy engine needs" in r for r in kernels.gluon_reasons(**(x | {"latent": rows[..., :64]}))
    )


def test_splits_fill_the_device_and_no_more():
    from undivided.ops.latent_decode._splits import choose_splits

    blocks = 32768 // 64
    assert 64 <= choose_splits(1, blocks, 132) <= 132
    assert choose_splits(64, blocks, 132) == 2
    assert choose_splits(128, blocks, 132) == 1
    assert choose_splits(1000, blocks, 132) == 1
    assert choose_splits(1, 3, 132) <= 3
    assert choose_splits(1, 0, 132) == 1


def test_tilings_fit_smaller_devices():
    from undivided.ops.latent_decode.triton import choose_tiling

    for rows in (1, 16, 17, 64, 128, 1000):
        for width in (128, 320, 576):
            hopper = choose_tiling(rows, width, 2, 227 * 1024, True)
            small = choose_tiling(rows, width, 2, 99 * 1024, False)
            assert small.block_rows * small.block_keys <= hopper.block_rows * hopper.block_keys
            assert hopper.block_rows >= min(rows, 64)


COMPILE = """
import torch
from tests.ops.ahead_of_time import compile_only

compile_only(lambda name, kernel, options: (name, kernel.metadata.shared, options.get("BLOCK_ROWS")))
from undivided.ops.latent_decode import triton as decode

def attend(heads, latent_dim, rope_dim=64, tiling=None, page_size=0, num_splits=8, dtype=torch.bfloat16):
    softcap = 30.0 if dtype.itemsize == 1 else None
    if tiling:
        decode.choose_tiling = lambda *arguments: tiling
    query = torch.empty(2, heads, 1, latent_dim + rope_dim, dtype=torch.bfloat16)
    shape = (256 // page_size, 1, page_size) if page_size else (2, 1, 128)
    cache = torch.empty(*shape, latent_dim + rope_dim, dtype=dtype)
    decode.latent_attention_forward(
        query[..., :latent_dim], query[..., latent_dim:] if rope_dim else None,
        cache[..., :latent_dim], cache[..., latent_dim:] if rope_dim else None, 0.1,
        torch.empty(2, dtype=torch.int32),
        torch.empty(2, 128 // page_size, dtype=torch.int32) if page_size else None,
        torch.empty(shape[0], shape[2]) if dtype.itemsize == 1 else None, softcap, True, num_splits,
    )
"""

EVERY_TILING = """
for width, tilings in decode._TILINGS.items():
    for tiling in tilings:
        attend(tiling.block_rows, width, tiling=tiling)
"""
EVERY_OPTION = """
for latent_dim, rope_dim in ((512, 0), (320, 32), (192, 64), (64, 16)):
    attend(16, latent_dim, rope_dim)
attend(16, 512, page_size=64, num_splits=1)
attend(32, 256, page_size=16)
for heads in (16, 64):
    attend(heads, 512, dtype=torch.float8_e4m3fn)
for num_splits in (2, 4, 16, 128):
    attend(16, 512, num_splits=num_splits)
"""


@pytest.mark.parametrize("calls", [EVERY_TILING, EVERY_OPTION], ids=["tilings", "options"])
def test_every_configuration_compiles_for_hopper_and_fits_its_shared_memory(calls, run_python):
    lines = [line.split() for line in run_python(COMPILE + calls).stdout.splitlines()]
    assert {name for name, *_ in lines} == {"_attend_kernel", "_merge_kernel"}
    assert all(int(shared) <= 227 * 1024 for _, shared, _ in lines), lines
