"""Throughput of stacks, on tiny ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from undivided.claims import _end_to_end, _stack
from undivided.claims._stack import HalfOutputAttention, Shape, Stack
from undivided.claims._timing import Ceilings
from undivided.layers.gqa import GQAttention
from undivided.layers.mla import MLAttention

MEMORY, KEYS = 2**17, 40
MLP = {"intermediate_size": 48, "vocab_size": 64}


@pytest.fixture(autouse=True)
def _fast(monkeypatch):
    monkeypatch.setattr(_stack, "PAGE_SIZE", 16)
    monkeypatch.setattr(_stack, "measured_ceilings", lambda device: Ceilings(1e12, 1e12, "tiny"))

    def once(rivals, device, **options):
        for run in rivals.values():
            run()
        return {name: dataclasses.make_dataclass("T", ["median"])(2.0) for name in rivals}

    monkeypatch.setattr(_stack, "time_rivals", once)


def latent(kind=MLAttention, heads=4, **options) -> Shape:
    return Shape("tiny", 2, 32, lambda i: kind(32, heads, 16, 4, 6, 8, layer_idx=i), **options)


def grouped(**options) -> Shape:
    return Shape("tiny own", 2, 32, lambda i: GQAttention(32, 4, 4, 8, layer_idx=i), **options)


@pytest.mark.parametrize("shape", [latent(), latent(HalfOutputAttention), latent(**MLP)])
def test_the_largest_batch_is_decoded_and_smaller_ones(shape) -> None:
    found = _stack.latent_throughput(shape, KEYS, MEMORY, "cpu", batches=(2,))
    weights = Stack(shape, "cpu").weight_bytes
    # Two layers of 20 numbers of two bytes.
    batch = found["ours"].batch
    assert weights + batch * KEYS * 80 <= MEMORY < weights + (batch + 1) * KEYS * 80
    assert found["ours"].tokens_per_second == pytest.approx(500 * batch)
    assert found["ours, batch 2"].batch == 2


def test_keys_and_values_of_every_head_count() -> None:
    shape = grouped(**MLP)
    found, kernel = _stack.static_throughput(shape, KEYS, MEMORY, "cpu")
    assert kernel == "flash_attention"
    assert found.batch == (MEMORY - Stack(shape, "cpu").weight_bytes) // (KEYS * 2 * 2 * 2 * 32)


def test_a_step_reads_the_whole_cache() -> None:
    stack = Stack(latent(), "cpu")
    cache = _stack.filled_cache(stack, 3, KEYS)
    x, tables = torch.randn(3, 1, 32).bfloat16(), _stack.rotary(4, 1, "cpu")
    step = _stack._step(stack, x, tables, cache, 3)
    with torch.no_grad():
        before = step()
        cache.pools[1][cache.block_table[2, 0].long(), 0] += 4.0
        changed = (step() != before).flatten(1).any(dim=1).tolist()
    assert changed == [False, False, True]


def test_the_gate_notices_a_wrong_kernel(monkeypatch) -> None:
    right = MLAttention.attend_rows

    def wrong(self, query_nope, query_rope, rows):
        out = right(self, query_nope, query_rope, rows)
        return out * 1.05 if rows.backend == "auto" else out

    monkeypatch.setattr(MLAttention, "attend_rows", wrong)
    with pytest.raises(AssertionError, match="tiny, sequence 0"):
        _stack.latent_throughput(latent(), KEYS, MEMORY, "cpu")


def test_weights_that_leave_no_room_are_named() -> None:
    with pytest.raises(ValueError, match="tiny: weights of .* do not fit into"):
        _stack.largest_batch(Stack(latent(), "cpu"), 10**6, MEMORY)


def test_half_of_the_heads_are_projected() -> None:
    whole, half = (Stack(latent(kind), "cpu").attentions[0] for kind in (MLAttention, HalfOutputAttention))
    assert half.o_proj.in_features == whole.o_proj.in_features // 2
    with torch.no_grad():
        half.load_state_dict({**whole.state_dict(), "o_proj.weight": whole.o_proj.weight[:, :16]})
        heads = torch.randn(2, 4, 1, 8).bfloat16()
        torch.testing.assert_close(
            half.project_output(heads), whole.project_output(heads * (torch.arange(4) < 2)[:, None, None])
        )


def test_prompts_are_read_by_every_stack() -> None:
    shapes = [dataclasses.replace(latent(heads=h), name=str(h)) for h in (2, 4)]
    assert _stack.prefill_times(shapes, 12, "cpu") == {"2": 2.0, "4": 2.0}


def test_rows_hold_tpla_against_mla(monkeypatch) -> None:
    seen = []

    def throughput(shape, keys, memory, device, *, with_flash=False, **options):
        seen.append(shape.attention(0))
        return {"ours": _stack.Throughput(10 * len(seen), 5.0, 0.5 if len(seen) == 1 else 0.8)}

    monkeypatch.setattr(_end_to_end, "latent_throughput", throughput)
    monkeypatch.setattr(
        _end_to_end, "prefill_times", lambda shapes, *given: {shapes[0].name: 1.0, shapes[1].name: 1.5}
    )
    monkeypatch.setattr(_end_to_end, "card_memory", lambda: 10**9)
    with torch.device("meta"):
        rows = list(_end_to_end.stack_rows(_end_to_end.DEEPSEEK))
    assert [(layer.num_heads, layer.latent_dim) for layer in seen] == [(64, 512), (128, 256), (128, 256)]
    # Of the ceiling MLA reaches half and TPLA 80 %: without that its lead is smaller.
    assert [row.ratio for row in rows] == [None, 2.0, pytest.approx(1.25), 3.0, pytest.approx(1.875), 1.5]
    assert [row.holds for row in rows] == [None, True, None, True, None, True]
