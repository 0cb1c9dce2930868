from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_model, tiny_text, tiny_tokenizer
from undivided.claims import tpla


def study(seed: int = 0) -> tpla.Study:
    ids = torch.randint(VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(seed))
    model = tiny_model("deepseek_v3", seed=seed)
    texts = [tiny_text(60, seed=seed), tiny_text(50, seed=seed + 1)]
    return tpla.Study(model, tiny_tokenizer(), ids, texts, 24, 48)


def test_the_gate_holds() -> None:
    tpla.gate("cpu")


def test_the_gate_notices_a_wrong_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undivided.convert.tpla.rotate_latent", lambda *given: None)
    fold = "undivided.convert._mla.fold_norm_weight"
    monkeypatch.setattr(fold, lambda layer: layer.kv_b_proj.weight.data.mul_(2))
    with pytest.raises(ValueError, match="rewritten: logits differ from MLA's by"):
        tpla.gate("cpu")


def test_ablation_has_every_variant_and_cuts_change_the_result() -> None:
    rows = list(tpla.ablation([study(0), study(1)], "tiny", normalised=True, groups=2))
    assert len({(row.what, row.shape) for row in rows}) == len(rows)
    whats = [row.what for row in rows]
    for cut in ("norm", "softmax", "norm and softmax"):
        for transform in tpla.TRANSFORMS:
            assert f"perplexity, {cut} cut, {transform}, against MLA" in whats
    exact = rows[0]
    assert exact.what == "perplexity, rewritten latent, nothing cut, against MLA"
    assert exact.ours == pytest.approx(exact.baseline, rel=1e-4)
    cut = next(row for row in rows if row.what == "perplexity, norm and softmax cut, none, against MLA")
    assert cut.ours != pytest.approx(cut.baseline, rel=1e-4)


def test_a_latent_without_norm_has_no_rows_for_it() -> None:
    rows = list(tpla.ablation([study()], "tiny", normalised=False, groups=None))
    assert all("norm" not in row.what and "GLA" not in row.what for row in rows)


def test_exact_prompts_are_scored_in_decoding() -> None:
    rows = list(tpla.separated([study()], "tiny", prompt=12, lengths=(4, 8)))
    assert [row.shape for row in rows[::3]] == [
        "tiny, 4 tokens after a prompt of 12",
        "tiny, 8 tokens after a prompt of 12",
    ]
    sliced, exact, against = rows[:3]
    # MLA's own perplexity would mean that nothing was decoded.
    assert exact.ours != pytest.approx(exact.baseline, rel=1e-4)
    assert (against.ours, against.baseline) == (exact.ours, sliced.ours)


def test_the_winning_logit_scale_is_named() -> None:
    rows = list(tpla.scales([study()], "tiny"))
    assert len({(row.what, row.shape) for row in rows}) == len(rows) == 3 * 5
    for *each, against in (rows[:5], rows[5:10], rows[10:]):
        default, *others = each
        best = min(others, key=lambda row: row.ours)
        assert against.what.startswith(default.what.removesuffix("MLA") + "the best other scale, ")
        assert against.what.endswith(best.what.split("scale ")[1].removesuffix(", against MLA"))
        assert (against.ours, against.baseline) == (default.ours, best.ours)


def test_moments_are_collected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from undivided.convert import tpla as convert

    calls, collect = [], convert.latent_moments
    monkeypatch.setattr(convert, "latent_moments", lambda *given: calls.append(1) or collect(*given))
    one = study()
    first, second = one.converted("pca"), one.converted("none")
    assert len(calls) == 1
    assert not torch.equal(
        first.attention_layers()[0].kv_b_proj.weight, second.attention_layers()[0].kv_b_proj.weight
    )
