"""The claim of Geometric Attention: identities, a tiny model in the place of SmolLM2, kernels in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_llama
from undivided.claims import _regime_training as regimes
from undivided.claims import _score_study, _transport, load
from undivided.claims import geometric_attention as claim
from undivided.claims._harness import Figure
from undivided.claims._timing import Ceilings, Timing
from undivided.ops.transport import triton as kernels
from undivided.spec.heads import replaced_attention, text_loss


def test_every_identity_holds_and_the_gate_notices_one_that_does_not(monkeypatch):
    claim.gate("cpu")
    monkeypatch.setattr(claim, "free_energy", lambda *x: 1.001 * x[0].sum(-1))
    with pytest.raises(AssertionError, match="free energy: .* is not below 1e-12"):
        claim.gate("cpu")


def test_the_claim_is_the_one_of_its_slug_and_its_parts_keep_to_their_device():
    assert load("geometric_attention").slug == "geometric_attention"
    parts = load("geometric_attention").parts
    for name, device in (
        ("anchors", "cpu"),
        ("lowering", "cpu"),
        ("training", "cpu"),
        ("identities", "cuda"),
        ("heads", "cuda"),
    ):
        assert list(parts[name](device, True)) == []
    assert len(list(parts["identities"]("cpu", True))) == len(claim.identities())


# --- heads ---


@pytest.fixture
def found():
    model = tiny_llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20.0 if "q_proj" in name else 1.0)
    texts = [torch.randint(VOCAB_SIZE, (1, 48)) for _ in range(2)]
    return _score_study.ScoreStudy(model, texts, "tiny", 8)


def test_shares_ranks_cuts_and_the_figure(found, monkeypatch, tmp_path):
    monkeypatch.setattr(_score_study, "study", lambda device, quick: found)
    items = list(claim.CLAIM.measure("cpu", True))
    rows = [item for item in items if not isinstance(item, Figure)]
    shares = [row for row in rows if row.what.startswith("share of the variance")]
    # Two layers are two groups; in each the three parts make up the whole.
    assert len(shares) == 6
    for group in ("layers 0 to 0", "layers 1 to 1"):
        assert sum(row.ours for row in shares if group in row.shape) == pytest.approx(1.0)
    assert [row.required for row in rows if "energy of the interaction" in row.what] == [2.0, None]
    kept = [row.ours for row in rows if row.what.startswith("KL of attention from attention with the inter")]
    assert kept == sorted(kept, reverse=True) and kept[-1] < 1e-6
    perplexity = {row.what: row for row in rows if row.unit == "perplexity" and row.required is None}
    unseen = perplexity["perplexity without row fields, which softmax does not see"]
    assert unseen.ours == pytest.approx(unseen.baseline, rel=1e-5)
    # Heads are 8 wide, and two fields are taken off: ten components are all there are.
    assert perplexity["perplexity with the interaction of every head cut to rank 16"].ours == pytest.approx(
        unseen.baseline, rel=1e-4
    )
    assert [row.required for row in rows if "merged keys" in row.what] == [1.0] * 6
    (figure,) = (item for item in items if isinstance(item, Figure))
    figure.save(tmp_path / "shares.png")
    assert (tmp_path / "shares.png").read_bytes()[:4] == b"\x89PNG"


def merged(found, size, counted, **options):
    with replaced_attention(found.model, _score_study.merged_attention(size, counted, **options)):
        return text_loss(found.model, found.texts[0])


def test_where_nothing_is_far_enough_nothing_is_merged(found):
    expected = text_loss(found.model, found.texts[0])
    assert merged(found, 4, True, recent=48) == pytest.approx(expected, rel=1e-5)
    assert merged(found, 4, True, first=48) == pytest.approx(expected, rel=1e-5)
    assert merged(found, 1, True, recent=2) == pytest.approx(expected, rel=1e-5)
    assert merged(found, 4, True, first=0, recent=4) != pytest.approx(expected, rel=1e-4)


def test_equal_keys_merge_without_loss_if_they_are_counted():
    query, key, value = (torch.randn(1, 2, 24, 8, dtype=torch.float64) for _ in range(3))
    key, value = (x[:, :, ::4].repeat_interleave(4, 2) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    divergences: list[float] = []
    for counted in (True, False):
        attend = _score_study.merged_attention(4, counted, divergences, first=0, recent=3)
        out = attend(0, query, key, value, 8**-0.5)
        assert torch.allclose(out, expected, rtol=1e-10, atol=1e-12) is counted
    assert abs(divergences[0]) < 1e-12 < divergences[1]


# --- kernels ---


def heads(length=32, width=16, dtype=torch.float64, device="cpu"):
    return {name: torch.randn(1, 1, length, width).to(device, dtype) for name in ("query", "key", "value")}


@pytest.mark.parametrize("name", ["column", "sinkhorn"])
def test_the_rival_computes_the_same(name):
    x = heads()
    expected = _transport.anchored(name, "reference")(**x)
    # Its softmax is in float32, whatever the inputs are.
    torch.testing.assert_close(_transport._EAGER[name](**x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["column", "sinkhorn"])
def test_operations_are_those_of_the_passes(name, monkeypatch, device):
    products = {"lse": 1, "output": 2, "transfer": 1, "value_gradient": 2, "logit_gradient": 3}
    ran = []
    for kernel, count in products.items():
        method = getattr(kernels._Passes, kernel)

        def counting(self, *arguments, method=method, count=count, **options):
            ran.append(count)
            return method(self, *arguments, **options)

        monkeypatch.setattr(kernels._Passes, kernel, counting)
    x = {key: tensor.requires_grad_() for key, tensor in heads(dtype=torch.float32, device=device).items()}
    out = _transport.anchored(name, "triton")(**x)
    unit = 2.0 * _transport.HEADS * _transport.HEAD_DIM * 32**2
    assert sum(ran) * unit == _transport.flops(name, False, 32)
    out.sum().backward()
    assert sum(ran) * unit == _transport.flops(name, True, 32)


@pytest.fixture
def untimed(monkeypatch, device):
    """Runs every rival once; eager takes six times as long and compiled code as long."""

    def times(rivals, device, **options):
        found = {}
        for name, call in rivals.items():
            call()
            found[name] = Timing({"eager": 6.0}.get(name, 1.0), 1.0, 1.0, 1, "")
        return found

    for module in (_transport, claim):
        monkeypatch.setattr(module, "time_rivals", times)
    monkeypatch.setattr(_transport, "_DEVICE", device)
    monkeypatch.setattr(_transport, "HEADS", 1)
    monkeypatch.setattr(_transport, "measured_ceilings", lambda device: Ceilings(1e12, 1e15, ""))
    monkeypatch.setattr(_transport, "peak_bytes", lambda call: 2**20)


@pytest.mark.parametrize("training", [False, True])
def test_bars_are_set_against_eager(untimed, training):
    rows = list(_transport.anchor_rows("column", training, 32))
    assert [(row.unit, row.required, row.holds) for row in rows] == [("ms", 5.0, True), ("MiB", 20.0, False)]
    assert {row.baseline_name for row in rows} == {"eager"}
    assert rows[0].fraction_of_ceiling is not None
    assert [row.required for row in _transport.anchor_rows("column", training, 32, bars=False)] == [
        None,
        None,
    ]


def test_every_lowered_specification_runs_on_an_operator(untimed):
    rows = list(claim.lowered("cpu", batch=1, length=8))
    assert [row.what.split(" from")[0] for row in rows] == ["GQA", "SQA", "MoH, every head", "CCA", "MLA"]
    assert [row.required for row in rows] == [0.9, 0.9, None, None, None]


# --- training ---


def test_a_field_of_the_receivers_trains_alike_and_other_links_do_not(monkeypatch):
    from undivided.data import DemoTexts

    text = "a key reads what a query asks, and a value tells it. " * 40
    monkeypatch.setattr("undivided.data.demo_texts", lambda: DemoTexts(text, {"2024-Biden-1": text[:700]}))
    monkeypatch.setattr(regimes, "_SIZES", {"hidden_size": 32, "num_hidden_layers": 1, "head_dim": 8})
    monkeypatch.setattr(regimes, "_LENGTH", 48)
    rows = list(regimes.training_rows("cpu", quick=True))
    bits = {row.what.split(", ")[1]: row.ours for row in rows}
    assert list(bits) == list(regimes.SPECS)
    assert [row.baseline_name for row in rows] == [None] + [regimes.SOFTMAX] * (len(rows) - 1)
    assert bits[regimes.FIELD] == pytest.approx(bits[regimes.SOFTMAX], abs=1e-6)
    assert abs(bits["link elu + 1"] - bits[regimes.SOFTMAX]) > 5e-6
