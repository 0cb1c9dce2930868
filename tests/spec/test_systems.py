"""Every specified system against the system's own mathematics, written apart from the language."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from undivided.spec import SYSTEMS, AttentionSpec, explain, interpret, lower, system
from undivided.spec.systems import cca, entmax, gla, gqa, linear, mla, sliding_window, sqa, top_k, tpla

EXACT = {"rtol": 1e-10, "atol": 1e-11}
LENGTH = 6


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def triangle(length=LENGTH):
    return torch.ones(length, length, dtype=torch.bool).tril()


def causal(query, key, value, **options):
    mask = triangle(query.shape[2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True, **options)


def heads(num, width=8):
    return draw(2, num, LENGTH, width)


def case_gqa():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    return gqa(2), x, causal(**x)


def case_sqa():
    x = {"query": heads(4, 16), "key": heads(2, 16), "value": heads(2, 16)}
    return sqa(4, 2), x, causal(**x)


def case_gda():
    x = {
        "query": heads(6),
        "query_noise": heads(2),
        "key": heads(2),
        "key_noise": heads(2),
        "value": heads(2, 16),
    }
    x |= {"lambda": torch.tensor(0.37).double(), "norm_weight": draw(16)}
    signal = causal(x["query"], x["key"], x["value"])
    noise = causal(x["query_noise"], x["key_noise"], x["value"])
    heads_out = []
    for head in range(6):
        mixed = signal[:, head] - x["lambda"] * noise[:, head // 3]
        normed = F.rms_norm(mixed, (16,), eps=1e-5) * x["norm_weight"]
        heads_out.append(0.8 * normed)
    return SYSTEMS["gda"].spec, x, torch.stack(heads_out, 1)


def case_moh():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    probabilities = draw(2, LENGTH, 4).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(2, -1).indices, 1.0)
    gates = probabilities * chosen
    gates = 2 * gates / gates.sum(-1, keepdim=True)
    expected = causal(**x) * gates.transpose(1, 2)[..., None]
    return SYSTEMS["moh"].spec, {**x, "gates": gates.transpose(1, 2)}, expected


def case_dha():
    x = {"query": heads(4), "key": heads(3), "value": heads(2)}
    keys, values = torch.tensor([2, 0, 0, 1]), torch.tensor([1, 1, 0, 1])
    expected = causal(x["query"], x["key"][:, keys], x["value"][:, values])
    return SYSTEMS["dha"].spec, {**x, "key_head_map": keys, "value_head_map": values}, expected


def case_kdgqa():
    x = {"query": heads(6), "key": heads(3), "value": heads(3)}
    # Contiguous groups of uneven size, one of them empty: 4, 0 and 2 query heads.
    parts = []
    for group, (start, stop) in enumerate(((0, 4), (4, 4), (4, 6))):
        for head in range(start, stop):
            scores = x["query"][:, head] @ x["key"][:, group].mT / 8**0.5
            parts.append(scores.softmax(-1) @ x["value"][:, group])
    return SYSTEMS["kdgqa"].spec, {**x, "head_map": torch.tensor([0, 0, 0, 0, 2, 2])}, torch.stack(parts, 1)


def case_pgqa():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    plain = F.scaled_dot_product_attention(**x, enable_gqa=True)
    noise = torch.rand(2, LENGTH * 8, dtype=torch.float64)
    noise[torch.arange(2), torch.arange(2)] = 0.0
    noise = (noise - noise.mean(-1, keepdim=True)) / noise.std(-1, keepdim=True)
    grouped = plain.reshape(2, 2, 2, -1)
    scaled = noise * grouped.std(-1, keepdim=True) + grouped.mean(-1, keepdim=True)
    # One draw for the heads of a group, the same in every group.
    per_head = noise.reshape(2, LENGTH, 8).repeat(2, 1, 1)
    return SYSTEMS["pgqa"].spec, {**x, "noise": per_head}, (grouped - scaled).reshape(plain.shape)


def case_convit():
    """Two rows of three tokens; the logits by position are written with offsets here."""
    tensors = {name: heads(4) for name in ("query", "key", "value")}
    weight, gate = draw(4, 3), draw(4).sigmoid()
    y, x = torch.cartesian_prod(torch.arange(2), torch.arange(3)).double().unbind(-1)
    dy, dx = (place[None] - place[:, None] for place in (y, x))
    by_position = torch.einsum("hc,cij->hij", weight, torch.stack((dx, dy, dx**2 + dy**2))).softmax(-1)
    by_content = (tensors["query"] @ tensors["key"].mT / 8**0.5).softmax(-1)
    expected = torch.lerp(by_content, by_position, gate[:, None, None]) @ tensors["value"]
    # The dot products leave out what is the same for all keys.
    along_x, along_y, squared = weight[:, :, None].unbind(1)
    query = torch.stack((along_x - 2 * squared * x, along_y - 2 * squared * y, squared.expand(4, 6)), -1)
    tensors["query_position"] = (8**0.5 * query).expand(2, 4, 6, 3)
    tensors["key_position"] = torch.stack((x, y, x**2 + y**2), -1).expand(2, 4, 6, 3)
    spec = SYSTEMS["convit"].build(8**-0.5)
    return spec, tensors | {"content_gate": 1 - gate, "position_gate": gate}, expected


def case_cca():
    x = {"query": heads(4), "key": heads(2), "value": heads(2), "temperature": torch.rand(2).double() + 0.5}
    query = 8**0.5 * x["query"] / x["query"].norm(dim=-1, keepdim=True)
    key = 8**0.5 * x["key"] / x["key"].norm(dim=-1, keepdim=True) * x["temperature"][None, :, None, None]
    return cca(2), x, causal(query, key, x["value"])


def latent_tensors(groups, nope=6, rope=4, rank=5, value_dim=3):
    x = {
        "query": heads(4, nope),
        "query_rope": heads(4, rope),
        "rope_key": heads(1, rope),
        "latent": heads(groups, rank),
    }
    return x | {"key_up": draw(4, nope, rank), "value_up": draw(4, rank, value_dim)}


def expanded(x, groups, suffix=""):
    """Latent attention with keys and values formed head by head."""
    out = []
    for head in range(4):
        latent = x["latent" + suffix][:, head // (4 // groups)]
        key = torch.cat([latent @ x["key_up" + suffix][head].T, x["rope_key"][:, 0]], -1)
        query = torch.cat([x["query"][:, head], x["query_rope"][:, head]], -1)
        out.append(
            causal(query[:, None], key[:, None], (latent @ x["value_up" + suffix][head])[:, None])[:, 0]
        )
    return torch.stack(out, 1)


def case_mla():
    x = latent_tensors(1)
    return mla(1, 6, 4), x, expanded(x, 1)


def case_gla():
    x = latent_tensors(2)
    return gla(2, 6, 4), x, expanded(x, 2)


def case_tpla():
    x = latent_tensors(1)
    for name in ("latent", "key_up", "value_up"):
        whole = x.pop(name)
        for shard in range(2):
            x[f"{name}_{shard}"] = whole if shard == 0 else draw(*whole.shape)
    return tpla(2, 6, 4), x, expanded(x, 1, "_0") + expanded(x, 1, "_1")


def case_transmla():
    """A grouped-query model as latent attention of full rank: the maps select the key head's block."""
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    latent = torch.cat([x["key"][:, 0], x["key"][:, 1], x["value"][:, 0], x["value"][:, 1]], -1)[:, None]
    eye = torch.eye(32).double()
    key_up = torch.stack([eye[8 * (head // 2) :][:8] for head in range(4)])
    value_up = torch.stack([eye[:, 16 + 8 * (head // 2) :][:, :8] for head in range(4)])
    latents = {"query": x["query"], "latent": latent, "key_up": key_up, "value_up": value_up}
    return mla(1, nope_dim=8, rope_dim=0), latents, causal(**x)


def case_x_ecomla():
    """Singular vectors of the stacked key and value activations, at full rank."""
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    stacked = (
        torch.cat([x[n].repeat_interleave(2, 1) for n in ("key", "value")], 1).transpose(1, 2).flatten(2)
    )
    left, values, right = torch.linalg.svd(stacked, full_matrices=False)
    per_batch = []
    for b in range(2):
        up = right[b].mT.reshape(2, 4, 8, -1)
        latents = {
            "query": x["query"][b : b + 1],
            "latent": (left[b] * values[b])[None, None],
            "key_up": up[0],
            "value_up": up[1].mT,
        }
        per_batch.append(interpret(mla(1, 8, 0), latents).out)
    torch.testing.assert_close(torch.cat(per_batch), causal(**x), **EXACT)
    return mla(1, 8, 0), latents, causal(**{n: t[1:] for n, t in x.items()})


def case_alibi():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    slopes = 2.0 ** -torch.arange(1, 5).double()
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)[None, :]).double()
    bias = (-slopes[:, None, None] * distance).masked_fill(~triangle(), float("-inf"))
    expected = F.scaled_dot_product_attention(**x, attn_mask=bias, enable_gqa=True)
    return SYSTEMS["alibi"].spec, {**x, "alibi_slopes": slopes}, expected


def case_sliding_window():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    band = triangle() & ~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(-3)
    return sliding_window(3), x, F.scaled_dot_product_attention(**x, attn_mask=band, enable_gqa=True)


def case_relative():
    x = {"query": heads(4), "key": heads(4), "value": heads(4), "relative_table": draw(4, 2 * LENGTH - 1)}
    bias = torch.stack([x["relative_table"][:, LENGTH - 1 - n :][:, :LENGTH] for n in range(LENGTH)], 1)
    expected = F.scaled_dot_product_attention(x["query"], x["key"], x["value"], attn_mask=bias, scale=1.0)
    return SYSTEMS["relative"].spec, x, expected


def case_differential():
    x = {
        "query": heads(3),
        "query_noise": heads(3),
        "key": heads(3),
        "key_noise": heads(3),
        "value": heads(3, 16),
    }
    x |= {"lambda": torch.tensor(0.6).double(), "norm_weight": draw(16)}
    maps = [
        (x[q] @ x[k].mT / 8**0.5).masked_fill(~triangle(), float("-inf")).softmax(-1)
        for q, k in (("query", "key"), ("query_noise", "key_noise"))
    ]
    mixed = (maps[0] - x["lambda"] * maps[1]) @ x["value"]
    return SYSTEMS["differential"].spec, x, 0.8 * F.rms_norm(mixed, (16,), x["norm_weight"], 1e-5)


def case_gated():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    gate = draw(2, 4, LENGTH, 8).sigmoid()
    return SYSTEMS["gated"].spec, {**x, "gate": gate}, gate * causal(**x)


def case_sink():
    """One more key, whose score is the sink and whose value is zero."""
    x = {"query": heads(4), "key": heads(4), "value": heads(4)}
    logit = draw(4)
    scores = (x["query"] @ x["key"].mT / 8**0.5).masked_fill(~triangle(), float("-inf"))
    with_sink = torch.cat([scores, logit[None, :, None, None].expand(2, 4, LENGTH, 1)], -1)
    return SYSTEMS["sink"].spec, {**x, "sink_logit": logit}, with_sink.softmax(-1)[..., :-1] @ x["value"]


def case_query_key_norm():
    x = {"query": heads(4), "key": heads(4), "value": heads(4), "temperature": 10 * torch.rand(4).double()}
    query, key = (x[name] / x[name].norm(dim=-1, keepdim=True) for name in ("query", "key"))
    expected = causal(x["temperature"][None, :, None, None] * query, key, x["value"], scale=1.0)
    return SYSTEMS["query_key_norm"].spec, x, expected


def case_token_merging():
    """The merged keys, each as often as it stands for."""
    x = {"query": heads(4), "key": heads(4), "value": heads(4)}
    classes = ((0, 1, 4), (2,), (3, 5))
    members = [index for members in classes for index in members]
    repeated = [
        torch.cat(
            [x[name][:, :, list(m)].mean(2, keepdim=True).expand(-1, -1, len(m), -1) for m in classes], 2
        )
        for name in ("key", "value")
    ]
    assert len(members) == LENGTH
    expected = F.scaled_dot_product_attention(x["query"], *repeated)
    return SYSTEMS["token_merging"].spec, {**x, "assignment": torch.tensor([[0, 0, 1, 2, 0, 2]])}, expected


def case_neighborhood():
    """Every query has exactly three keys, also at the borders."""
    x = {"query": heads(4), "key": heads(4), "value": heads(4)}
    first = (torch.arange(LENGTH) - 1).clamp(0, LENGTH - 3)
    rows = []
    for n in range(LENGTH):
        near = slice(int(first[n]), int(first[n]) + 3)
        scores = x["query"][:, :, n : n + 1] @ x["key"][:, :, near].mT / 8**0.5
        rows.append(scores.softmax(-1) @ x["value"][:, :, near])
    column = torch.arange(LENGTH)
    mask = (column >= first[:, None]) & (column < first[:, None] + 3)
    return SYSTEMS["neighborhood"].spec, {**x, "neighborhood": mask}, torch.cat(rows, 2)


def case_top_k():
    x = {"query": heads(4), "key": heads(4), "value": heads(4)}
    scores = (x["query"] @ x["key"].mT / 8**0.5).masked_fill(~triangle(), float("-inf"))
    least = scores.topk(2, -1).values[..., -1:]
    return top_k(2), x, scores.masked_fill(scores < least, float("-inf")).softmax(-1) @ x["value"]


def case_entmax():
    """alpha = 2 has the closed form of a projection onto the simplex."""
    x = {"query": heads(4), "key": heads(4), "value": heads(4)}
    scores = (2 * x["query"] @ x["key"].mT / 8**0.5).masked_fill(~triangle(), -1e9)
    ordered = scores.sort(-1, descending=True).values
    count = torch.arange(1, LENGTH + 1).double()
    support = (1 + count * ordered > ordered.cumsum(-1)).sum(-1, keepdim=True)
    threshold = (ordered.cumsum(-1).gather(-1, support - 1) - 1) / support
    weights = (scores - threshold).clamp(min=0)
    return entmax(2.0), x | {"query": 2 * x["query"]}, weights @ x["value"]


def case_retention():
    """The recurrence S <- gamma S + k v^T, then a norm without a weight."""
    x = {"query": heads(2), "key": heads(2), "value": heads(2)}
    gamma, state, rows = torch.tensor([0.9, 0.7]).double(), draw(2, 2, 8, 8) * 0, []
    for n in range(LENGTH):
        state = gamma[:, None, None] * state + x["key"][:, :, n, :, None] * x["value"][:, :, n, None, :]
        rows.append((x["query"][:, :, n, None, :] / 8**0.5 @ state)[:, :, 0])
    expected = F.rms_norm(torch.stack(rows, 2), (8,), eps=1e-5)
    return SYSTEMS["retention"].spec, {**x, "alibi_slopes": -gamma.log()}, expected


def case_slot():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    scores = x["query"] @ x["key"].repeat_interleave(2, 1).mT / 8**0.5
    return SYSTEMS["slot"].spec, x, scores.softmax(-2) @ x["value"].repeat_interleave(2, 1)


def case_sinkhorn():
    x = {"query": heads(4), "key": heads(2), "value": heads(2)}
    plan = (x["query"] @ x["key"].repeat_interleave(2, 1).mT / 8**0.5).exp()
    for _ in range(5):
        plan = plan / plan.sum(-1, keepdim=True)
        plan = plan / plan.sum(-2, keepdim=True)
    plan = plan / plan.sum(-1, keepdim=True)
    return SYSTEMS["sinkhorn"].spec, x, plan @ x["value"].repeat_interleave(2, 1)


def case_linear():
    """The recurrence over a state."""
    x = {"query": heads(2), "key": heads(2), "value": heads(2)}
    phi_q, phi_k = F.elu(x["query"]) + 1, F.elu(x["key"]) + 1
    state, total, rows = draw(2, 2, 8, 8) * 0, draw(2, 2, 8) * 0, []
    for n in range(LENGTH):
        state = state + phi_k[:, :, n, :, None] * x["value"][:, :, n, None, :]
        total = total + phi_k[:, :, n]
        numerator = (phi_q[:, :, n, None, :] @ state)[:, :, 0]
        rows.append(numerator / (phi_q[:, :, n] * total).sum(-1, keepdim=True))
    return linear(), x, torch.stack(rows, 2)


CASES = {
    name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")
}


def test_every_specified_system_has_a_case():
    assert set(CASES) == set(SYSTEMS)


@pytest.mark.parametrize("slug", CASES)
def test_the_interpreter_is_the_system(slug):
    spec, x, expected = CASES[slug]()
    assert set(spec.inputs) == set(x)
    torch.testing.assert_close(interpret(spec, x).out, expected, **EXACT)


@pytest.mark.parametrize("slug", CASES)
def test_what_a_system_is_lowered_to_computes_it(slug):
    spec, x, _ = CASES[slug]()
    assert lower(spec).verify(x) < 1e-10


# What of the library computes a system, beside the interpreter: an operator, to which its specification is lowered.
ROUND_TRIPS = {
    "dense": {
        "alibi", "cca", "convit", "dha", "gated", "gla", "gqa", "kdgqa", "mla", "moh", "neighborhood", "pgqa",
        "query_key_norm", "relative", "sink", "sliding_window", "sqa", "token_merging", "tpla", "transmla", "x_ecomla",
    },
    "differential": {"differential", "gda"},
    "column": {"slot"},
    "sinkhorn": {"sinkhorn"},
}  # fmt: skip


def test_twenty_systems_and_more_go_from_words_to_an_operator_and_back():
    found: dict[str, set[str]] = {}
    for slug, case in CASES.items():
        spec, x, expected = case()
        read = AttentionSpec.from_json(spec.to_json())
        assert read == spec
        lowered = lower(read)
        if lowered.target.name == "interpreter":
            continue
        torch.testing.assert_close(lowered(x), expected, **EXACT)
        found.setdefault(lowered.target.name, set()).add(slug)
    assert found == ROUND_TRIPS
    assert sum(map(len, found.values())) == 25


def test_signal_minus_noise_rows_have_mass_one_minus_lambda():
    spec, x, _ = case_gda()
    weights = interpret(spec, x).weights
    torch.testing.assert_close(weights.sum(-1), (1 - x["lambda"]).expand(2, 6, LENGTH), **EXACT)
    assert (weights < 0).any()


def test_raw_linear_attention_is_the_recurrence_without_a_normaliser():
    _, x, _ = case_linear()
    phi_q, phi_k = F.elu(x["query"]) + 1, F.elu(x["key"]) + 1
    expected = (phi_q @ phi_k.mT).tril() @ x["value"]
    torch.testing.assert_close(interpret(linear(normalised=False), x).out, expected, **EXACT)


def test_unknown_systems_are_refused_with_near_names():
    with pytest.raises(ValueError, match='no specification is called "x-ecomla"; near matches: x_ecomla'):
        system("x-ecomla")
    with pytest.raises(ValueError, match='no specification is called "zzz"; there are alibi, cca'):
        system("zzz")


@pytest.mark.parametrize("slug", SYSTEMS)
def test_every_system_can_be_explained(slug):
    lines = explain(SYSTEMS[slug].spec)
    assert len(lines) == 10
    assert all(line.this for line in lines)
