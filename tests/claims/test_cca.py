from __future__ import annotations

import pytest
import torch

from undivided.claims import cca, load
from undivided.claims._tiny_lm import matching_width, tiny_lm
from undivided.layers.cca import CCAttention


def test_the_block_of_plain_pytorch_is_the_block():
    layer, rival = CCAttention(24, 4, 2, 8).double(), cca._Composed(24, 4, 2, 8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rival.load_state_dict(layer.state_dict())
    x, tables = torch.randn(2, 7, 24, dtype=torch.float64), cca._tables(7, 8, "cpu", torch.float64)
    torch.testing.assert_close(rival(x, tables)[0], layer(x, tables)[0])


def test_a_block_that_is_not_causal_attends_to_every_token():
    layer, x = CCAttention(24, 4, 2, 8, **cca._OFF).double(), torch.randn(1, 5, 24, dtype=torch.float64)
    tables = cca._tables(5, 8, "cpu", torch.float64)
    out = cca._run(layer, x, tables, is_causal=False)()
    query, key, value = layer.project(x, tables)
    key, value = (heads.repeat_interleave(2, dim=1) for heads in (key, value))
    weights = torch.softmax(query @ key.mT / 8**0.5, dim=-1)
    torch.testing.assert_close(out, layer.o_proj((weights @ value).transpose(1, 2).flatten(2)))


def test_operations_are_those_of_the_products():
    block = CCAttention(32, 4, 2, 128)
    # Projections of 32 into 4 + 2 + 2 heads and of 4 heads into 32; 6 pairs of 3 tokens, two products each.
    assert cca._attention_flops(block, 2, 3) == 2 * 4 * 4 * 128 * 6
    assert cca._attention_flops(block, 2, 3, is_causal=False) == 2 * 4 * 4 * 128 * 9
    assert cca._block_flops(block, 1, 3) == 2 * 3 * 32 * 128 * 12 + cca._attention_flops(block, 1, 3)


@pytest.mark.parametrize("sizes", [cca._CUDA_SIZES, cca._CPU_SIZES], ids=["cuda", "cpu"])
def test_the_trained_arms_are_of_equal_size_and_all_but_mha_cache_the_same(sizes):
    parameters = 4_000_000 if sizes is cca._CUDA_SIZES else 120_000
    for name, entry in cca._arms(sizes).items():
        width = matching_width(entry, parameters, **sizes)
        with torch.device("meta"):
            model = tiny_lm(entry, **sizes, intermediate_size=width)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert abs(count - parameters) < 0.01 * parameters, name
        heads = model.attention_layers()[0].num_key_value_heads
        assert heads == sizes["num_attention_heads"] // (1 if name == "MHA" else 4), name


def test_the_gate_passes_and_can_fail(monkeypatch):
    cca.gate("cpu")
    monkeypatch.setattr("undivided.layers.cca.stream", lambda layer, rows, num_rows: (rows, 0))
    with pytest.raises(AssertionError, match="not close"):
        cca.gate("cpu")


def test_the_cache_is_counted_as_the_paper_counts_it():
    ratios = [(row.ours, row.ratio, row.holds) for row in cca._cache()]
    assert ratios == [(2048, 4.0, True), (1024, 8.0, True)]


def test_the_claim_is_the_one_of_its_slug():
    assert load("cca").slug == "cca"
