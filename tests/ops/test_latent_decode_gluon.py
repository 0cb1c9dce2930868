"""The Hopper kernels: compiled on a GPU of that kind, elsewhere run as Python (`gluon_on_cpu.py`)."""

from __future__ import annotations

import pytest
import torch

from tests.ops import gluon_on_cpu
from tests.ops.latent_caches import assert_decodes, decode_inputs
from undivided.ops.latent_decode import kernels
from undivided.testing import poisoned_empty

pytest.importorskip("triton")

PACKAGE = "undivided.ops.latent_decode"
PARTS = [f"{PACKAGE}.{name}" for name in ("_hopper", "hopper_fp8", "hopper_shared", "hopper_separate")]
SHAPES = {
    "width 512": dict(heads=64, keys=200),
    "width 512, 72 rows": dict(batch=1, heads=72, keys=300),
    "width 512, pages of 64, causal": dict(heads=20, queries=3, keys=256, lengths=[256, 65], page_size=64),
    "width 512, pages of 128, two latent heads": dict(
        heads=6, latent_heads=2, keys=256, lengths=[70, 1], page_size=128
    ),
    "width 512, no rope part": dict(heads=4, keys=300, rope_dim=0),
    "width 512, empty and full blocks": dict(batch=3, heads=8, keys=192, lengths=[0, 64, 128]),
    "width 256, 64 rows": dict(heads=64, keys=600, latent_dim=256),
    "width 256, 130 rows": dict(heads=130, keys=450, lengths=[450, 0], latent_dim=256),
    "width 256, 5 queries": dict(
        heads=30, queries=5, keys=256, lengths=[256, 3], latent_dim=256, page_size=64
    ),
    "width 128": dict(heads=16, queries=2, keys=700, lengths=[700, 321], latent_dim=128),
    "width 128, 100 rows": dict(heads=100, keys=300, latent_dim=128, rope_dim=0),
    "width 64": dict(heads=8, keys=300, lengths=[300, 63], latent_dim=64),
}


@pytest.fixture(scope="module")
def on_cpu():
    return gluon_on_cpu.load(f"{PACKAGE}.gluon", *PARTS).latent_attention_forward


@pytest.fixture
def attend(device, request):
    if device.type == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of compute capability 9.0")
        return kernels.attend_gluon
    on_cpu = request.getfixturevalue("on_cpu")

    def run(
        query_latent, query_rope, latent, rope_key, scale, attn_mask, is_causal, cache_seqlens, softcap,
        block_table, latent_scale, num_splits, return_lse,
    ):  # fmt: skip
        return on_cpu(
            query_latent, query_rope, latent, rope_key, scale, cache_seqlens, block_table, latent_scale,
            softcap, is_causal, num_splits,
        )  # fmt: skip

    return run


def hopper_inputs(device, latent_dim=512, rope_dim=64, dtype=None, **shape):
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float16)
    return decode_inputs(**shape, latent_dim=latent_dim, rope_dim=rope_dim, dtype=dtype, device=device) | {
        "scale": 0.05
    }


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_accurate_as_the_reference_and_reads_no_unused_row(shape, splits, attend, device):
    x = hopper_inputs(device, **shape) | {"num_splits": splits}
    with poisoned_empty():
        assert_decodes(attend, x)


FP8_SHAPES = [name for name in SHAPES if name.split(",")[0] in ("width 512", "width 256")]


@pytest.mark.parametrize("factor", [1.0, 1e-6])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("shape", FP8_SHAPES)
def test_an_fp8_cache_is_as_accurate_whatever_the_size_of_its_factors(shape, splits, factor, attend, device):
    x = as_fp8(hopper_inputs(device, **SHAPES[shape]), factor) | {
        "num_splits": splits,
        "scale": 0.05 / factor,
    }
    # Weights of all sizes, not of the largest key alone.
    assert_decodes(attend, x)


def as_fp8(x, factor=1.0):
    """The rows in float8 with factors of their own, NaN where nothing may be read."""
    unread = x["latent"].isnan().any(-1).any(1)
    scale = factor * (torch.rand(unread.shape, device=unread.device) + 0.5).masked_fill(unread, float("nan"))
    stored = {name: x[name].to(torch.float8_e4m3fn) for name in ("latent", "rope_key") if x[name] is not None}
    return x | stored | {"latent_scale": scale}


@pytest.mark.parametrize("fp8", [False, True])
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(fp8, attend, device):
    x = hopper_inputs(device, batch=3, heads=8, keys=300, lengths=[300, 64, 129]) | {"num_splits": 2}
    x = as_fp8(x) if fp8 else x
    out, lse = attend(**x)
    for b in range(3):
        alone = {k: v[b : b + 1] if isinstance(v, torch.Tensor) else v for k, v in x.items()}
        alone_out, alone_lse = attend(**alone)
        assert torch.equal(alone_out[0], out[b]) and torch.equal(alone_lse[0], lse[b])


@pytest.mark.gpu
@pytest.mark.parametrize("latent_dim", [512, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [16, 64, 128])
@pytest.mark.parametrize("fp8", [False, True])
def test_long_caches(fp8, latent_dim, dtype, heads, attend, device):
    shape = dict(
        batch=3, heads=heads, keys=8192, lengths=[8192, 5000, 1], page_size=64, latent_dim=latent_dim
    )
    x = hopper_inputs(device, **shape, dtype=dtype)
    x = as_fp8(x) if fp8 else x
    first = assert_decodes(attend, x)
    for _ in range(20):
        again = attend(**x)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


@pytest.mark.gpu
def test_a_captured_graph_follows_the_lengths(attend, device):
    x = hopper_inputs(device, batch=2, heads=64, keys=1024, lengths=[1024, 1024], page_size=64)
    attend(**x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(**x)
    for lengths in ([1000, 3], [0, 64], [1024, 1024]):
        x["cache_seqlens"].copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        expected = attend(**x)
        assert torch.equal(captured[0], expected[0]) and torch.equal(captured[1], expected[1])


COMPILE = """
import torch
from tests.ops.ahead_of_time import compile_only, ptxas

def report(name, kernel, options):
    said = ptxas(kernel)
    return name, kernel.metadata.shared, "serialized" in said, "0 bytes spill stores" in said

compile_only(report)
from undivided.ops.latent_decode import gluon as decode

whole, narrow = torch.bfloat16, torch.float8_e4m3fn
for heads, latent_dim, rope_dim, page_size, queries, num_splits, dtype in (
    (64, 512, 64, 0, 1, 8, whole), (128, 512, 64, 64, 2, 1, whole), (16, 512, 0, 128, 1, 8, whole),
    (64, 256, 64, 64, 1, 8, whole), (16, 128, 0, 0, 1, 8, whole), (128, 256, 64, 64, 1, 1, whole),
    (100, 128, 64, 0, 2, 8, whole), (8, 64, 64, 64, 1, 8, whole), (64, 512, 64, 64, 1, 8, narrow),
    (128, 256, 64, 0, 2, 1, narrow),
):
    query = torch.empty(2, heads, queries, latent_dim + rope_dim, dtype=torch.bfloat16)
    shape = (256 // page_size, 1, page_size) if page_size else (2, 1, 128)
    cache = torch.empty(*shape, latent_dim + rope_dim, dtype=dtype)
    decode.latent_attention_forward(
        query[..., :latent_dim], query[..., latent_dim:] if rope_dim else None,
        cache[..., :latent_dim], cache[..., latent_dim:] if rope_dim else None, 0.1,
        torch.empty(2, dtype=torch.int32),
        torch.empty(2, 128 // page_size, dtype=torch.int32) if page_size else None,
        torch.empty(shape[0], shape[2]) if dtype == narrow else None, None, True, num_splits,
    )
decode.merge_splits(torch.empty(4, 8, 256), torch.empty(4, 8), torch.empty(8, 256), torch.empty(8), overlaps=True)
"""


def test_every_kernel_compiles_for_hopper_without_spills_or_serialized_products(run_python):
    lines = [line.split() for line in run_python(COMPILE).stdout.splitlines()]
    assert {name for name, *_ in lines} == {"shared_kernel", "separate_kernel", "fp8_kernel", "_merge_kernel"}
    for line in lines:
        _, shared, serialized, no_spills = line
        assert (int(shared) <= 227 * 1024, serialized, no_spills) == (True, "False", "True"), line
