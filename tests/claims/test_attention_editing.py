"""The claim of Attention Editing: its gate, windows by place, passkeys, and the cache of a decoding step."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_llama, tiny_tokenizer
from undivided import claims
from undivided.claims import _window_study, attention_editing
from undivided.claims._smollm_study import Plan, SmolStudy
from undivided.claims._window_study import WindowStudy, passkey_texts
from undivided.layers.gate_swa import GateSWAttention
from undivided.layers.gqa import GQAttention


@pytest.fixture(scope="module")
def windows():
    study = SmolStudy(
        tiny_llama(num_hidden_layers=6),
        torch.randint(256, (3000,), generator=torch.Generator().manual_seed(0)),
        torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(1)),
        Plan(batch_size=2, length=64),
    )
    return WindowStudy(study, torch.randint(256, (3, 40)), window=8)


def test_the_gate_passes_and_notices_another_window(monkeypatch):
    claims.load("attention_editing").gate("cpu")
    convert = attention_editing.convert_edit_gate_swa
    monkeypatch.setattr(
        attention_editing,
        "convert_edit_gate_swa",
        lambda model, window, full_every: convert(model, window=window - 1, full_every=full_every),
    )
    with pytest.raises(ValueError, match="logits of a window of the whole text differ"):
        attention_editing.gate("cpu")


def test_a_model_on_a_cpu_has_no_rows():
    claim = claims.load("attention_editing")
    assert list(claim.measure("cpu", True)) == []


def test_perplexities_by_place_are_those_of_the_losses(windows):
    losses = windows.source.losses
    assert len(losses) == 63
    assert windows.source.perplexity(0, 8) == pytest.approx(losses[:7].mean().exp().item())
    assert windows.source.perplexity(8, 64) == pytest.approx(losses[7:].mean().exp().item())


def test_windows_change_nothing_within_the_first_one(windows):
    model = windows.models()["window"]
    placed = windows.judged(model)
    torch.testing.assert_close(placed.losses[:7], windows.source.losses[:7])
    assert not torch.allclose(placed.losses[8:], windows.source.losses[8:])


def test_rows_name_places_and_the_worth_of_the_gate(windows):
    rows = list(windows.rows(windows.models(), (256, 512), "tiny"))
    assert len({(row.what, row.shape) for row in rows}) == len(rows) == 5 * (2 + 3 + 3) + 1
    assert [row.required for row in rows if row.required] == [2.0]
    row = windows.cache_row(windows.models()["window and gate"], 48, "tiny")
    # One layer of six keeps 48 tokens, the others 7.
    assert row.ratio == pytest.approx(6 * 48 / (48 + 5 * 7)) and row.required == 5.0


def test_passkeys_stand_all_over_texts_of_one_length_that_end_with_them():
    tokenizer = tiny_tokenizer()
    texts = passkey_texts(tokenizer, torch.full((400,), 120), 160, 4)
    assert texts.shape == (4, 160)
    places = []
    for text in texts.tolist():
        decoded = tokenizer.decode(text)
        key = decoded[-5:]
        assert key.isdigit() and decoded.count(key) == 3
        places.append(decoded.index(key))
    assert places == sorted(places) and places[-1] - places[0] > 30


def test_the_share_of_passkeys_counts_digits(windows, monkeypatch):
    study = windows.study
    texts = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for place in range(25, 30):
            texts[0, place] = study.source(texts[:1, :place]).logits[0, -1].argmax()
    assert WindowStudy(study, texts[:1], 8).source.passkey == 1.0
    assert WindowStudy(study, texts, 8).source.passkey < 1.0
    assert _window_study._against("x", 0.0, 0.5) == {}


def test_a_step_over_whole_layers_and_windows_is_that_of_a_mask():
    torch.manual_seed(0)
    whole = GQAttention(32, 4, 2, 8, layer_idx=0)
    window = GateSWAttention(32, 4, 2, 8, window=4, layer_idx=1)
    window.load_state_dict(whole.state_dict(), strict=False)
    cache = attention_editing.MixedCache([whole, window], 3, 20)
    keys, values = cache.layers[0]
    cache.layers[1].keys, cache.layers[1].values = keys[:, :, 16:19], values[:, :, 16:19]
    x, tables = torch.randn(3, 1, 32), (torch.ones(1, 1, 8), torch.zeros(1, 1, 8))
    seen = torch.zeros(3, 1, 1, 20, dtype=torch.bool)
    seen[..., 16:] = True
    with torch.no_grad():
        for _ in range(2):
            out = window(x, tables, None, cache)[0]
            torch.testing.assert_close(out, whole(x, tables, seen, cache)[0])
    assert cache.layers[1].keys.shape[2] == 3 and cache.get_seq_length() == 20
