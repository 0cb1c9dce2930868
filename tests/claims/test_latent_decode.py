from __future__ import annotations

import pytest
import torch

from undivided.claims import _latent_decode, _latent_problem
from undivided.claims._latent_decode import (
    Pair,
    decode_rows,
    mla_bar,
    mla_rows,
    narrow_rows,
    pair_rows,
    rank_rows,
)
from undivided.claims._latent_problem import Problem, flash_mla, gate, ours

SMALL = Pair("small", Problem(8, 16), Problem(4, 32), 1.6)


@pytest.fixture
def small(monkeypatch):
    ceilings = _latent_decode.measured_ceilings("cpu")
    monkeypatch.setattr(_latent_decode, "measured_ceilings", lambda device: ceilings)


def test_a_wrong_operator_is_not_timed(monkeypatch):
    def wrong(**arguments):
        found = right(**arguments)
        # One element of the last sequence, by a percent, where a kernel's own rounding is 1e-7.
        if arguments["backend"] == "auto":
            found[-1, 0, 0, 0] *= 1.01
        return found

    def timed(*arguments, **options):
        raise RuntimeError("timed")

    right = _latent_problem.latent_attention
    monkeypatch.setattr(_latent_problem, "latent_attention", wrong)
    monkeypatch.setattr(_latent_decode, "time_rivals", timed)
    with pytest.raises(AssertionError, match="small, 8 heads x 80, batch 3, 64 keys"):
        next(pair_rows(SMALL, 3, 64, "cpu", torch.float32))
    with pytest.raises(AssertionError, match="chosen, 4 heads x 96, batch 3, 64 keys, sequence 2"):
        next(mla_rows(Problem(4, 32, 3, 64), "cpu", torch.float32, None))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_the_right_operator_passes_the_gate(queries, fp8):
    problem = Problem(4, 32, 3, 150, queries)
    inputs = problem.inputs("cpu", torch.float32, fp8=fp8)
    gate(inputs, ours(inputs), "small")


def test_the_gate_reads_the_pages_of_the_last_sequence():
    problem = Problem(4, 32, 2, 128)
    inputs = problem.inputs("cpu", torch.float32)
    out = ours(inputs)()
    inputs["latent"][inputs["block_table"][1, 1].long()] += 0.01
    with pytest.raises(AssertionError, match="small, sequence 1"):
        gate(inputs, lambda: out, "small")


def test_rows_of_a_pair_hold_the_cut_rank_against_mlas(small):
    rows = list(pair_rows(SMALL, 2, 64, "cpu", torch.float32))
    assert [row.baseline_name for row in rows] == [None, "MLA, our kernel", None]
    assert rows[0].what.startswith(
        "decode attention, small, against MLA's 4 heads x 96, alone: FlashMLA is not"
    )
    assert rows[0].ours == rows[1].ours and all(row.holds is None for row in rows)


def test_without_flash_mla_a_row_says_so_and_sets_no_bar(small):
    row, rate = mla_rows(Problem(4, 32, 1, 64), "cpu", torch.float32, 0.95)
    assert "FlashMLA is not installed (pip install sgl-flash-mla==1.0.0)" in row.what
    assert row.required is None and row.baseline is None
    assert rate.unit in ("TB/s", "TFLOPS") and rate.fraction_of_ceiling is not None


def test_every_row_has_an_identity_of_its_own(monkeypatch, small):
    small_problems = {
        "MLA_HEADS": (2, 4),
        "MLA_BATCHES": (1, 2),
        "KEYS": 64,
        "PAIR_POINTS": ((1, 64), (2, 64)),
    }
    for name, value in small_problems.items():
        monkeypatch.setattr(_latent_decode, name, value)
    other = Pair("other", Problem(4, 16), Problem(4, 32))
    monkeypatch.setattr(_latent_decode, "MODELS", (SMALL,))
    monkeypatch.setattr(_latent_decode, "OTHERS", (other,))
    monkeypatch.setattr(_latent_decode, "EXTRA", (Problem(2, 32, 2, 64, 4),))
    monkeypatch.setattr(_latent_decode, "FP8", (Problem(2, 32, 2, 64), Problem(4, 32, 2, 64)))
    monkeypatch.setattr(_latent_decode, "time_rivals", fixed_times)
    rows = []
    for part, count in ((decode_rows, 4 * 2 + 2), (rank_rows, 2 * 3 + 3), (narrow_rows, 2 * 2)):
        found = list(part("cpu", False, torch.float32))
        assert len(found) == count > len(list(part("cpu", True, torch.float32)))
        rows += found
    assert len({(row.what, row.shape) for row in rows}) == len(rows)


def fixed_times(rivals, device, **options):
    from undivided.claims._timing import Timing

    return {name: Timing(float(i + 1), 1.0, 1.0, 30, "given") for i, name in enumerate(rivals)}


def test_bars_are_those_of_the_memory_and_of_an_idle_card():
    assert [mla_bar(heads, 64) for heads in (16, 64, 128)] == [0.95, 0.95, 0.85]
    assert {mla_bar(heads, batch) for heads in (16, 128) for batch in (1, 8)} == {1.0}


def test_flash_mla_gets_the_same_pages(monkeypatch):
    """A stand-in with FlashMLA's signature, which undoes the pages itself."""
    import sys
    import types

    def stand_in(q, cache, table, lengths, value_dim, plan, *, softmax_scale, causal, use_legacy):
        rows = cache[table.long()].flatten(1, 2)[:, : lengths[0], 0]
        scores = softmax_scale * torch.einsum("bnhd,bmd->bhnm", q, rows)
        n, m = scores.shape[2:]
        if causal:
            scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), float("-inf"))
        out = torch.einsum("bhnm,bmd->bnhd", scores.softmax(-1), rows[..., :value_dim])
        return out, None

    module = types.ModuleType("flash_mla")
    module.flash_mla_with_kvcache, module.get_mla_metadata = stand_in, lambda: (None, None)
    monkeypatch.setitem(sys.modules, "flash_mla", module)
    inputs = Problem(4, 32, 2, 150, 3).inputs("cpu", torch.float32)
    gate(inputs, flash_mla(inputs), "FlashMLA")


def test_bytes_of_a_rank_are_those_of_its_cache_queries_and_outputs():
    # DeepSeek-V3 at two ranks: 576 numbers a token for MLA, 320 for TPLA.
    mla, shard = (Problem(heads, dim, 1, 10**6).bytes_moved() for heads, dim in ((64, 512), (128, 256)))
    assert mla / shard == pytest.approx(576 / 320, rel=1e-3)
    # A number a byte and the scale of the row.
    assert Problem(64, 512, 1, 10**6).bytes_moved(1) / mla == pytest.approx(580 / 1152, rel=1e-3)


def test_flops_of_several_queries_leave_out_what_they_do_not_see():
    one, four = (Problem(16, 512, 2, 100, n).flops() for n in (1, 4))
    assert four == one * (4 * 100 - 6) // 100
