from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.layers.latents import positions
from tests.tiny import VOCAB_SIZE, tiny_config
from undivided.layers._padding import packed_texts
from undivided.layers.gqa import GQAttention
from undivided.layers.nsa import BlockCompression, NSAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig
from undivided.ops.block_map import block_mask
from undivided.ops.compressed import compressed_blocks, reference

EXACT = {"rtol": 1e-10, "atol": 1e-10}
WIDTH, HEADS, GROUPS, DIM = 16, 4, 2, 4
SIZES = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 3, "window": 5}


def randomised(module: torch.nn.Module, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(2 * noise * parameter.shape[-1] ** -0.5)
    return module.double()


def layer_of(**options) -> NSAttention:
    return randomised(NSAttention(WIDTH, HEADS, GROUPS, DIM, **(SIZES | options)))


def hidden_states(length: int) -> torch.Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


def tables(length: int):
    return positions(length, DIM // 2)


def model_of(base: str = "llama", **options) -> UndividedForCausalLM:
    entry = {"mechanism": "nsa", **SIZES, **options}
    return randomised(
        UndividedForCausalLM(UndividedConfig(base_config=tiny_config(base), attention=[entry, entry]))
    ).eval()


def token_by_token(layer: NSAttention, x: torch.Tensor) -> torch.Tensor:
    """The definition, one token and head at a time, for the first text; linear compression, one gate a token."""
    length = x.shape[1]
    cos, sin = (table[0, :, : DIM // 2] for table in tables(length))

    def turned(y, n):
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * cos[n] - b * sin[n], b * cos[n] + a * sin[n]], -1)

    raw, value, query = (
        projection(x[0]).unflatten(-1, (-1, DIM)) for projection in (layer.k_proj, layer.v_proj, layer.q_proj)
    )
    key = torch.stack([turned(raw[n], n) for n in range(length)])
    size, stride = layer.kernel_size, layer.kernel_stride
    blocks = []
    for first in range(0, length - size + 1, stride):
        tokens = slice(first, first + size)
        pairs = []
        for g in range(GROUPS):
            k = (raw[tokens, g] + layer.compress_key.position[g]).flatten() @ layer.compress_key.weight[g]
            v = value[tokens, g].flatten() @ layer.compress_value.weight[g]
            pairs.append((turned(k, first), v))
        blocks.append(pairs)
    rows = []
    for n in range(length):
        gates = torch.sigmoid(layer.gate_proj(x[0, n]))
        whole = [i for i in range(len(blocks)) if i * stride + size - 1 <= n]
        heads = []
        for g in range(GROUPS):
            scores = torch.zeros(n // layer.block_size + 1, dtype=torch.float64)
            own = [turned(query[n, g * 2 + member], n) for member in range(2)]
            compressed = []
            for q in own:
                if not whole:
                    compressed.append(torch.zeros(DIM, dtype=torch.float64))
                    continue
                p = torch.softmax(layer.scale * torch.stack([blocks[i][g][0] @ q for i in whole]), 0)
                compressed.append(sum(w * blocks[i][g][1] for w, i in zip(p, whole, strict=True)))
                for w, i in zip(p, whole, strict=True):
                    for step in range(i * stride, i * stride + size, stride):
                        if step // layer.block_size < len(scores):
                            scores[step // layer.block_size] += w.detach()
            chosen = {0, len(scores) - 1, max(len(scores) - 2, 0)}
            for j in scores.argsort(descending=True, stable=True).tolist():
                if len(chosen) < layer.topk:
                    chosen.add(j)
            selected = [m for m in range(n + 1) if m // layer.block_size in chosen]
            near = list(range(max(n - layer.window + 1, 0), n + 1))
            for q, c in zip(own, compressed, strict=True):
                parts = [c]
                for seen in (selected, near):
                    p = torch.softmax(layer.scale * (key[seen, g] @ q), 0)
                    parts.append(p @ value[seen, g])
                heads.append(sum(gate * part for gate, part in zip(gates, parts, strict=True)))
        rows.append(layer.o_proj(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "sizes", [{}, {"kernel_size": 2, "block_size": 6, "topk": 4}, {"kernel_size": 6, "window": 1}]
)
def test_is_what_the_paper_says_token_by_token(sizes):
    layer, x = layer_of(**sizes), hidden_states(27)
    torch.testing.assert_close(layer(x, tables(27))[0][0], token_by_token(layer, x), **EXACT)


def choice_of(layer: NSAttention, query: torch.Tensor, compressed: torch.Tensor, num_keys: int):
    _, lse = layer.attend_compressed(query, compressed, compressed, num_keys)
    return layer.select(query, compressed, lse, num_keys)


def test_the_choice_is_of_a_group_has_the_given_blocks_and_none_of_the_future():
    query, compressed = torch.randn(2, 4, 40, DIM), torch.randn(2, 2, compressed_blocks(40, 4, 2), DIM)
    layer = layer_of(topk=4)
    lists = choice_of(layer, query, compressed, 40)
    mask = block_mask(lists, 10)
    own = torch.arange(40) // 4
    assert lists.index.shape == (2, 2, 40, 4) and torch.equal(
        mask.sum(-1), (own + 1).clamp(max=4).expand(2, 2, 40)
    )
    assert mask[..., 0].all() and not (mask & (torch.arange(10) > own[:, None])).any()
    for block in (own, (own - 1).clamp(min=0)):
        assert mask.gather(-1, block[None, None, :, None].expand(2, 2, -1, 1)).all()
    # Each head alone chooses otherwise; the sum is what counts.
    alone = choice_of(layer_of(topk=4, scores="first_head"), query, compressed, 40)
    assert not torch.equal(alone.index, lists.index)
    first = choice_of(layer, query[:, ::2].repeat_interleave(2, 1), compressed, 40)
    assert torch.equal(alone.index, first.index)
    swapped = query.unflatten(1, (2, 2)).flip(2).flatten(1, 2)
    assert torch.equal(choice_of(layer, swapped, compressed, 40).index, lists.index)


def test_the_choice_does_not_depend_on_how_many_queries_there_are(monkeypatch):
    query, compressed = torch.randn(1, 4, 40, DIM), torch.randn(1, 2, compressed_blocks(40, 4, 2), DIM)
    layer = layer_of(topk=4)
    lists = choice_of(layer, query, compressed, 40)
    last = choice_of(layer, query[:, :, -3:], compressed, 40)
    assert torch.equal(last.index, lists.index[:, :, -3:])
    monkeypatch.setattr(reference, "_WEIGHT_BYTES", 4 * 4 * 19 * 7)
    assert torch.equal(choice_of(layer, query, compressed, 40).index, lists.index)


def test_the_first_tokens_have_no_compressed_block_and_no_gradient():
    layer = layer_of()
    query, key, value = (
        torch.randn(1, heads, 20, DIM, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS)
    )
    query.requires_grad_()
    out, _ = layer.attend_compressed(query, key[:, :, :9], value[:, :, :9], 20)
    assert not out[:, :, :3].any() and out[:, :, 3:].abs().amin() > 0
    (gradient,) = torch.autograd.grad(out.square().sum(), query)
    # The fourth token sees one block alone, whose weight is 1 whatever the query is.
    assert not gradient[:, :, :3].any() and gradient[:, :, 5:].abs().sum(-1).amin() > 0


@pytest.mark.parametrize("window", [1, 5, 512])
def test_with_the_gate_of_the_window_alone_it_is_a_sliding_window(window):
    layer, x = layer_of(window=window, gate_bias=True), hidden_states(23)
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(torch.tensor([-1e9, -1e9, 1e9]))
    query, key, value = layer.heads(x, tables(23))
    place = torch.arange(23)
    mask = (place <= place[:, None]) & (place > place[:, None] - window)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(layer(x, tables(23))[0], layer.o_proj(out.transpose(1, 2).flatten(2)), **EXACT)


def test_with_enough_blocks_the_selected_branch_is_full_attention():
    layer, x = layer_of(topk=9, gate_bias=True), hidden_states(23)
    full = GQAttention(WIDTH, HEADS, GROUPS, DIM).double()
    full.load_state_dict(
        {name: value for name, value in layer.state_dict().items() if name in full.state_dict()}
    )
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.gate_proj.bias.copy_(torch.tensor([-1e9, 1e9, -1e9]))
    torch.testing.assert_close(layer(x, tables(23))[0], full(x, tables(23))[0], **EXACT)
    layer.start_from_attention()
    layer.gate_proj.bias.data[1] = 1e9
    layer.gate_proj.bias.data[[0, 2]] = -1e9
    torch.testing.assert_close(layer(x, tables(23))[0], full(x, tables(23))[0], **EXACT)


def test_a_layer_that_starts_from_attention_compresses_by_means():
    layer = layer_of(gate_bias=True)
    layer.start_from_attention()
    blocks = torch.randn(1, GROUPS, 3, 4, DIM, dtype=torch.float64)
    for module in (layer.compress_key, layer.compress_value):
        torch.testing.assert_close(module(blocks), blocks.mean(-2), **EXACT)
    gates = layer.gates(hidden_states(5))
    assert gates.shape == (3, 2, 1, 5, 1)
    torch.testing.assert_close(
        gates[:, 0, 0, 0, 0].detach(), torch.sigmoid(torch.tensor([-4.0, 4, -4])).double()
    )


@pytest.mark.parametrize(
    "options", [{}, {"compression": "mlp", "gate": "head", "gate_bias": True}, {"compression": "mean"}]
)
def test_gradients_are_those_of_finite_differences(options):
    layer, x = layer_of(**options), hidden_states(9)[:1].requires_grad_()
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def function(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x, tables(9)))[0]

    assert torch.autograd.gradcheck(function, (x, *tensors), fast_mode=True)


def test_gates_of_heads_are_of_their_head():
    layer, x = layer_of(gate="head"), hidden_states(7)
    gates = layer.gates(x)
    assert gates.shape == (3, 2, HEADS, 7, 1)
    by_hand = torch.sigmoid(x @ layer.gate_proj.weight[3 * 2 + 1])
    torch.testing.assert_close(gates[1, :, 2, :, 0], by_hand, **EXACT)


@pytest.mark.parametrize("length", [1, 3, 4])
def test_texts_shorter_than_a_block_have_the_other_branches(length):
    layer, x = layer_of(), hidden_states(length)
    torch.testing.assert_close(layer(x, tables(length))[0][0], token_by_token(layer, x), **EXACT)


@pytest.mark.parametrize("base", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize(
    "options", [{}, {"compression": "mean", "gate": "head", "kernel_size": 6, "topk": 4}]
)
def test_decoding_in_pieces_equals_the_whole_forward(base, options):
    model = model_of(base, **options)
    ids = torch.randint(1, VOCAB_SIZE, (2, 33))
    expected = model(ids).logits
    output = model(ids[:, :2], use_cache=True)
    logits = [output.logits]
    for piece in ids[:, 2:].split([1, 1, 1, 7, 1, 9, 2, 1, 8], dim=1):
        output = model(piece, past_key_values=output.past_key_values)
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-9, atol=1e-9)
    layer = output.past_key_values.layers[0]
    kernel = options.get("kernel_size", 4)
    assert layer.compressed_keys.shape[2] == compressed_blocks(33, kernel, 2)
    assert layer.raw_keys.shape[2] == 33 - 2 * compressed_blocks(33, kernel, 2) < kernel + 2


def test_a_padded_batch_is_each_text_alone():
    model = model_of()
    ids = torch.randint(1, VOCAB_SIZE, (2, 21))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    both = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(both[:1, 7:], model.generate(ids[:1, 7:], **options))
    assert torch.equal(both[1:], model.generate(ids[1:], **options))
    static = model.generate(
        ids, attention_mask=mask, cache_implementation="static", disable_compile=True, **options
    )
    assert torch.equal(static, both)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_texts_packed_into_one_row_are_each_alone(kind):
    model = model_of()
    ids = torch.randint(1, VOCAB_SIZE, (2, 31))
    starts = ([0, 12, 13], [0, 20])
    owner = torch.stack([(torch.arange(31)[:, None] >= torch.tensor(first)).sum(-1) for first in starts])
    places = torch.stack(
        [torch.arange(31) - torch.tensor(first)[o - 1] for first, o in zip(starts, owner, strict=True)]
    )
    mask = (owner[:, :, None] == owner[:, None]) & torch.ones(31, 31).tril().bool()
    mask = mask[:, None]
    if kind == "additive":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    packed = model(ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    for row, firsts in enumerate(starts):
        for first, last in zip(firsts, [*firsts[1:], 31], strict=True):
            alone = model(ids[row : row + 1, first:last]).logits
            torch.testing.assert_close(packed[row : row + 1, first:last], alone, **EXACT)
    # Without a mask of its own the base model finds the texts by their positions.
    found = model(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(found, packed, **EXACT)


def test_one_mask_of_packed_texts_serves_all_rows():
    model = model_of()
    owner = torch.arange(24) >= 10
    mask = ((owner[:, None] == owner[None]) & torch.ones(24, 24).tril().bool())[None, None]
    places = (torch.arange(24) - 10 * owner)[None]
    layer = model.attention_layers()[0]
    x = torch.randn(2, 24, model.config.base_config.hidden_size, dtype=torch.float64)
    tables = model.native.model.rotary_emb(x, places.expand(2, -1))
    one, all_rows = (
        layer(x, position_embeddings=tables, attention_mask=m)[0] for m in (mask, mask.expand(2, -1, -1, -1))
    )
    torch.testing.assert_close(one, all_rows, **EXACT)


def test_other_masks_are_refused():
    layer, x = layer_of(), hidden_states(9)
    window = torch.ones(9, 9).tril().triu(-2).bool()[None, None].expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="attention_mask is not that of one causal text a row"):
        layer(x, tables(9), window)
    assert packed_texts(window, 9) is None and packed_texts(torch.ones(1, 1, 9, 9).tril().bool(), 9) is None


def test_beams_reorder_every_state_of_the_cache():
    model = model_of()
    ids = torch.randint(1, VOCAB_SIZE, (2, 11))
    cache = model(ids, use_cache=True).past_key_values
    swapped = model(ids.flip(0), use_cache=True).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    step = torch.randint(1, VOCAB_SIZE, (2, 1))
    ours, theirs = (model(step, past_key_values=past).logits for past in (cache, swapped))
    torch.testing.assert_close(ours, theirs, **EXACT)
    with pytest.raises(ValueError, match="a cache of compressed blocks cannot be shortened"):
        cache.layers[0].crop(1)


def test_the_weights_of_the_release_have_their_places():
    layer = layer_of()
    theirs = {
        name.replace("_proj", "")
        .replace("q.", "proj_q.")
        .replace("k.", "proj_k.")
        .replace("v.", "proj_v."): weight
        for name, weight in layer.state_dict().items()
        if name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    }
    theirs |= {
        "proj_o.weight": layer.o_proj.weight,
        "compress_key": layer.compress_key.weight,
        "compress_value": layer.compress_value.weight,
        "intra_block_pe": layer.compress_key.position,
        "gate.0.weight": layer.gate_proj.weight,
        "rope.inv_freq": torch.ones(2),
    }
    other = NSAttention(WIDTH, HEADS, GROUPS, DIM, **SIZES).double()
    other.load_official(theirs)
    x = hidden_states(9)
    assert torch.equal(other(x, tables(9))[0], layer(x, tables(9))[0])
    with pytest.raises(RuntimeError, match="compress_key.weight"):
        other.load_official({name: weight for name, weight in theirs.items() if name != "compress_key"})


def test_compressions_differ_in_their_weights_alone():
    sizes = {kind: BlockCompression(2, 4, DIM, kind, has_position=True) for kind in ("linear", "mean", "mlp")}
    counts = {kind: sum(p.numel() for p in module.parameters()) for kind, module in sizes.items()}
    linear = 2 * (4 * DIM * DIM + 4 * DIM)
    assert counts == {"linear": linear, "mean": 0, "mlp": linear + 2 * DIM * DIM}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"topk": 0}, "topk=0 must be at least 1."),
        ({"topk": 2}, "topk=2 is less than init_blocks=1 plus local_blocks=2, which are always selected."),
        (
            {"kernel_stride": 3},
            "kernel_stride=3 does not divide kernel_size=4; overlaps of blocks are counted in strides.",
        ),
        (
            {"block_size": 5},
            "kernel_stride=2 does not divide block_size=5; overlaps of blocks are counted in strides.",
        ),
        ({"local_blocks": 0}, "local_blocks=0 must be at least 1."),
        ({"window": 0}, "window=0 must be at least 1."),
        ({"compression": "max"}, "compression='max' is not one of 'linear', 'mean', 'mlp'."),
        ({"gate": "softmax"}, "gate='softmax' is not one of 'token', 'head'."),
        ({"scores": "mean"}, "scores='mean' is not one of 'group', 'first_head'."),
        ({"softcap": 2.0}, "softcap=2.0: native sparse attention does not cap its logits; use None."),
    ],
)
def test_options_that_do_not_fit_are_named(options, text):
    with pytest.raises(ValueError) as raised:
        layer_of(**options)
    assert str(raised.value) == text


def test_heads_that_do_not_divide_and_missing_tables_are_named():
    with pytest.raises(ValueError, match="num_key_value_heads=3 does not divide num_attention_heads=4"):
        NSAttention(WIDTH, 4, 3, DIM)
    with pytest.raises(ValueError, match="position_embeddings is None; give the tables of the base model"):
        layer_of()(hidden_states(3))
