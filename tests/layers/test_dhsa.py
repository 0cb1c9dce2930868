from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_config, tiny_model
from undivided.convert import attach
from undivided.layers._block_modes import MODES, block_means, choose_blocks
from undivided.layers._chunks import block_lists, chunk_representations, dhsa_select
from undivided.layers.boundaries import BoundaryPredictor, fixed_boundaries
from undivided.layers.dhsa import DHSAttention
from undivided.layers.gqa import GQAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.spec import interpret

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEAD_DIM = 24, 8
SMALL = {
    "query_block": 8,
    "num_local": 8,
    "num_global": 4,
    "num_instruction": 5,
    "budget": 24,
    "key_block": 4,
}


def build(mode="chunks", dtype=torch.float64, **options) -> DHSAttention:
    options = {"mode": mode, "boundaries": "fixed", "chunk_size": 5, "density": 0.4} | SMALL | options
    layer = DHSAttention(WIDTH, 4, 2, HEAD_DIM, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return layer.to(dtype).eval()


def tables(length, dtype=torch.float64):
    angles = torch.outer(torch.arange(length).double(), 100.0 ** -(torch.arange(4) / 4)).repeat(1, 2)[None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def heads(length, batch=2):
    return tuple(torch.randn(batch, count, length, HEAD_DIM, dtype=torch.float64) for count in (4, 2, 2))


def select(query, key, chunks, **options):
    words = {"block_size": 8, "budget": 24, "num_local": 8, "num_global": 4} | options
    return dhsa_select(query, key, chunks, **words)


def as_sets(indices):
    return [[set(row[row >= 0].tolist()) for row in sample[0]] for sample in indices]


def test_representations_equal_sums_chunk_by_chunk():
    rows, bounds = torch.randn(2, 20, 3), torch.tensor([[0, 4, 11, 20], [0, 1, 20, 20]])
    for norm, power in (("sqrt", 0.5), ("mean", 1.0), ("sum", 0.0)):
        found = chunk_representations(rows, bounds, norm)
        for sample in range(2):
            for chunk in range(3):
                first, last = bounds[sample, chunk], bounds[sample, chunk + 1]
                part = rows[sample, first:last]
                expected = part.sum(0) / max(len(part), 1) ** power
                torch.testing.assert_close(found[sample, chunk], expected, rtol=1e-6, atol=1e-6)


def test_a_chunk_of_n_copies_is_the_square_root_of_n_times_one():
    row = torch.randn(1, 1, 6)
    found = chunk_representations(row.expand(1, 12, 6), torch.tensor([[0, 3, 12]]))
    torch.testing.assert_close(found[0], row[0] * torch.tensor([[3.0], [9.0]]).sqrt(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 20])
def test_lists_hold_what_is_always_chosen_and_nothing_of_the_future(window):
    query, key, _ = heads(50)
    lists = select(query, key, fixed_boundaries(50, 3), window=window)
    assert lists.shape == (2, 1, 7, 24)
    for sample in as_sets(lists):
        for block, chosen in enumerate(sample):
            begin, end = 8 * block, min(8 * block + 8, 50)
            low = 0 if window is None else max(begin - window + 1, 0)
            assert chosen >= set(range(begin, end)) | set(range(low, min(low + 4, begin)))
            assert min(chosen) >= low
            assert max(chosen) < end
            assert len(chosen) == min(24, end - low)
    for row in lists.flatten(0, 2):
        listed = row[row >= 0]
        assert torch.equal(listed, listed.unique())
        assert (row[len(listed) :] == -1).all()


def test_the_best_chunks_are_chosen_whole_and_the_last_in_part():
    query, key, _ = heads(64, batch=1)
    bounds = torch.tensor([[0, 9, 13, 24, 31, 40, 64]])
    lists = as_sets(select(query, key, bounds))[0]
    rows, columns = query.mean(1)[0], key.mean(1)[0]
    block, begin, end = 6, 48, 56
    score = {}
    for chunk in range(6):
        first, last = int(bounds[0, chunk]), int(bounds[0, chunk + 1])
        mean = columns[first:last].sum(0) / (last - first) ** 0.5
        score[chunk] = float(rows[begin:end].sum(0) / 8**0.5 @ mean)
    expected, left = set(range(4)) | set(range(begin, end)), 24 - 4 - 8
    for chunk in sorted(score, key=score.get, reverse=True):
        members = [j for j in range(int(bounds[0, chunk]), int(bounds[0, chunk + 1])) if 4 <= j < begin]
        expected |= set(members[:left])
        left -= len(members[:left])
    assert lists[block] == expected


def test_chunks_of_equal_length_are_blocks_by_their_means():
    query, key, _ = heads(64)
    lists = as_sets(select(query, key, fixed_boundaries(64, 4), budget=8 + 4 + 8, num_global=4))
    scores = block_means(query.mean(1, keepdim=True), 8) @ block_means(key.mean(1, keepdim=True), 4).mT
    for sample in range(2):
        for block in range(3, 8):
            free = scores[sample, 0, block, 1 : 2 * block]
            best = 1 + free.topk(2).indices
            members = {4 * int(b) + j for b in best for j in range(4)}
            assert lists[sample][block] == set(range(4)) | members | set(range(8 * block, 8 * block + 8))


@pytest.mark.parametrize("norm", ["mean", "sum"])
def test_the_norm_decides_between_long_and_short_chunks(norm):
    query, key = torch.ones(1, 1, 40, 2), torch.ones(1, 1, 40, 2)
    key[:, :, 4:8] = 1.2
    bounds = torch.tensor([[0, 4, 8, 28, 40]])
    chosen = as_sets(select(query, key, bounds, budget=16, norm=norm))[0][4]
    # A mean prefers the short chunk of larger keys, a sum the long one.
    assert ({4, 5, 6, 7} <= chosen) == (norm == "mean")


@pytest.mark.parametrize("mode", ["chunks", *MODES])
@torch.no_grad()
def test_a_budget_for_everything_is_full_attention(mode):
    query, key, value = heads(45)
    layer = build(mode, budget=45, density=1.0, num_instruction=0)
    full = GQAttention(WIDTH, 4, 2, HEAD_DIM).attend(query, key, value, None)
    torch.testing.assert_close(layer._sparse(query, key, value, {}, None), full, **EXACT)


@torch.no_grad()
def test_the_instruction_reads_everything_and_short_prompts_too():
    layer, x = build(), torch.randn(2, 60, WIDTH, dtype=torch.float64)
    plain = GQAttention(WIDTH, 4, 2, HEAD_DIM).double()
    plain.load_state_dict(layer.state_dict())
    found, full = layer(x, tables(60))[0], plain(x, tables(60))[0]
    torch.testing.assert_close(found[:, -5:], full[:, -5:], **EXACT)
    assert not torch.allclose(found[:, 40:-5], full[:, 40:-5])
    torch.testing.assert_close(found[:, :24], full[:, :24], **EXACT)
    short = tuple(t[:, :24] for t in tables(60))
    assert torch.equal(layer(x[:, :24], short)[0], plain(x[:, :24], short)[0])


@pytest.mark.parametrize(
    "options", [{}, {"window": 20}, {"softcap": 2.0}, *({"mode": mode} for mode in MODES)], ids=str
)
@torch.no_grad()
def test_is_its_specification(options):
    layer, x = build(**options), torch.randn(2, 61, WIDTH, dtype=torch.float64)
    inputs = layer.spec_inputs(x, tables(61))
    assert set(inputs) == set(layer.spec.inputs)
    out = interpret(layer.spec, inputs).out
    torch.testing.assert_close(layer.o_proj(out.transpose(1, 2).flatten(2)), layer(x, tables(61))[0], **EXACT)


@pytest.mark.parametrize("mode", MODES)
def test_chosen_blocks_hold_every_query_itself_and_no_more_than_counted(mode):
    query, key, _ = heads(90)
    for variant in ("paper", "released"):
        chosen = choose_blocks(query, key, mode, 6, 8, 4, variant)
        assert chosen.shape == (2, 4, 12, 23)
        row, column = torch.arange(12)[:, None], torch.arange(23)
        last = ((row + 1) * 8 - 1) // 4
        if variant == "paper":
            band = (column >= row * 2) & (column <= last)
            assert (chosen | ~band).all()
            assert not (chosen & (column > last)).any()
        if mode != "topk":
            assert chosen[..., 0].all()
            full = (last + 1 <= 6)[:, 0] | (mode != "a") & ((torch.arange(12) < 3) | (torch.arange(12) == 11))
            assert (chosen.sum(-1)[..., ~full] <= 6).all()
        elif variant == "released":
            assert (chosen.sum(-1) == 6).all()


def test_topk_of_the_authors_counts_the_future_and_ours_does_not():
    query, key, _ = heads(80)
    theirs, ours = (choose_blocks(query, key, "topk", 5, 8, 4, variant) for variant in ("released", "paper"))
    assert theirs[:, :, 0, 2:].any()
    assert not ours[:, :, 0, 2:].any()


def test_lists_of_blocks():
    chosen = torch.tensor([[[[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 1, 1]]]]).bool()
    index, counts = block_lists(chosen)
    assert index.tolist() == [[[[1, 2, -1], [-1, -1, -1], [0, 2, 3]]]]
    assert counts.tolist() == [[[2, 0, 3]]]


@torch.no_grad()
def test_padded_texts_are_what_they_are_alone():
    layer, lengths, width = build(), [61, 30, 20], 61
    x = torch.randn(3, width, WIDTH, dtype=torch.float64)
    padding = torch.tensor([width - length for length in lengths])
    column = torch.arange(width)
    mask = ((column <= column[:, None]) & (column >= padding[:, None, None]))[:, None]
    cos_sin = tuple(t[0][(column - padding[:, None]).clamp(min=0)] for t in tables(width))
    found = layer(x, cos_sin, attention_mask=mask)[0]
    for index, length in enumerate(lengths):
        alone = layer(x[index : index + 1, -length:], tables(length))[0][0]
        torch.testing.assert_close(found[index, -length:], alone, **EXACT)


def hosted(share, **options):
    torch.manual_seed(0)
    predictor = BoundaryPredictor(16)
    model = tiny_model("llama", dtype=torch.float64)
    options = SMALL | {"share": share, "threshold": -0.5} | options
    return model, attach(model, "dhsa", predictor=predictor.double(), **options).eval()


@torch.no_grad()
def test_layers_share_what_they_are_told_to():
    ids = torch.randint(1, 256, (2, 70))
    logits = {}
    for share, predictors in (("none", 2), ("boundaries", 1), ("selection", 1)):
        model, host = hosted(share)
        layers = host.attention_layers()
        assert sum(layer.boundary_predictor is not None for layer in layers) == predictors
        memo, lists, bounds = {}, [], []
        for layer in layers:
            query, key = torch.randn(1, 4, 60, 8).double(), torch.randn(1, 2, 60, 8).double()
            lists.append(layer._selected(query, key, memo, None))
            bounds.append(memo["boundaries", None])
        assert torch.equal(*lists) == (share == "selection")
        assert torch.equal(*bounds) == (share != "none")
        logits[share] = host(ids).logits
        assert not torch.allclose(logits[share], model(ids).logits)
    assert not torch.allclose(logits["none"], logits["boundaries"])
    assert not torch.allclose(logits["selection"], logits["boundaries"])


def test_a_layer_without_boundaries_says_whose_it_takes():
    _, host = hosted("boundaries")
    x = torch.randn(1, 60, 32, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="layer 1 takes its boundaries from layer 0, which has not run before it"
    ):
        host.attention_layers()[1](x, tables(60))


@torch.no_grad()
def test_an_unmodified_model_reads_its_prompt_so_and_goes_on():
    model, host = hosted("boundaries")
    ids = torch.randint(1, 256, (1, 70))
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = host.generate(ids, **greedy)
    cache = host(ids, use_cache=True).past_key_values
    for index in range(70, 75):
        step = host(written[:, index : index + 1], past_key_values=cache, use_cache=True).logits
        assert int(step.argmax()) == int(written[0, index + 1])
    assert torch.equal(model(ids).logits, model(ids).logits)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == dict(host.native.named_parameters())[name].data_ptr()


def test_it_is_saved_with_its_predictor(tmp_path):
    _, host = hosted("boundaries")
    ids = torch.randint(1, 256, (1, 70))
    host.save_pretrained(tmp_path)
    loaded = UndividedForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(loaded(ids).logits, host(ids).logits, **EXACT)


@torch.no_grad()
def test_windows_and_caps_of_gemma_are_kept():
    model = tiny_model("gemma2", dtype=torch.float64, sliding_window=24)
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 256, (1, 60))
    options = SMALL | {"boundaries": "fixed"}
    host = attach(model, "dhsa", **options)
    assert [layer.window for layer in host.attention_layers()] == [24, None]
    assert {layer.softcap for layer in host.attention_layers()} == {model.config.attn_logit_softcapping}
    # The base model takes its softmax in float32.
    everything = attach(model, "dhsa", **(options | {"budget": 59}))
    torch.testing.assert_close(everything(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    found = host(ids).logits
    # With the base model's masks or without them.
    host.set_attn_implementation("eager")
    torch.testing.assert_close(host(ids).logits, found, **EXACT)
    greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert host.generate(ids, **greedy).shape == (1, 63)


def test_gradients_pass_through_what_is_selected():
    layer, x = build(), torch.randn(1, 60, WIDTH, dtype=torch.float64, requires_grad=True)
    layer(x, tables(60))[0].sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_bad_options_are_named():
    for change, message in (
        ({"budget": 11}, "budget=11 is less than the 12 tokens that are always chosen: num_global=4"),
        ({"mode": "best"}, "mode='best' is not one of 'chunks', 'topk', 'a', 'vs', 'vsb'."),
        ({"share": "all"}, "share='all' is not one of 'none', 'boundaries', 'selection'."),
        ({"norm": "max"}, "norm='max' is not one of 'sqrt', 'mean', 'sum'."),
        ({"density": 0.0}, "density=0.0 must be above 0 and at most 1."),
        (
            {"mode": "a", "softcap": 3.0},
            'mode="a" has neither softcap nor window; this layer has softcap=3.0',
        ),
        ({"num_global": -1}, "num_global=-1 at least 0"),
        ({"key_block": 0}, "key_block=0, query_block=8 and chunk_size=5 must be at least 1."),
    ):
        with pytest.raises(ValueError) as error:
            build(**change)
        assert message in str(error.value)
    query, key, _ = heads(40)
    for bounds, message in (
        (torch.tensor([[0, 20, 10, 40]]), "boundaries are not ascending from 0 on."),
        (torch.tensor([[0, 20, 39]]), "boundaries end at 39, but key has 40 tokens."),
        (torch.tensor([0, 40]), "boundaries has shape [2]; it needs [batch, chunks + 1]."),
    ):
        with pytest.raises(ValueError) as error:
            select(query, key, bounds)
        assert str(error.value) == message


def test_a_model_without_a_predictor_says_what_it_needs():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r'trains one\), or boundaries="fixed"'):
        attach(model, "dhsa")
    with pytest.raises(ValueError, match="the predictor has key_dim=20, but this layer needs 16."):
        attach(model, "dhsa", predictor=BoundaryPredictor(20))
    with pytest.raises(ValueError, match='mechanism "gqa" takes no predictor; "dhsa" does.'):
        attach(model, "gqa", predictor=BoundaryPredictor(16))
    with pytest.raises(ValueError, match="layers has 2, but the model has layers 0 to 1."):
        attach(model, "dhsa", layers=[0, 2])
    with pytest.raises(ValueError, match='model_type "gpt2" is not supported'):
        attach(type("Model", (), {"config": type("Config", (), {"model_type": "gpt2"})()})(), "dhsa")


def test_some_layers_alone():
    model = tiny_model("llama")
    host = attach(model, "dhsa", layers=[1], boundaries="fixed", **SMALL)
    assert [entry is None for entry in host.config.attention] == [True, False]
    assert host.config._attn_implementation == model.config._attn_implementation
    assert tiny_config("llama").model_type == "llama"
