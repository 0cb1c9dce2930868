from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from undivided.convert import convert_sla
from undivided.convert.sla import projection_state, rotate_pairs
from undivided.layers.sla import SparseLinearAttention

EXACT = {"topk": 1.0, "bottomk": 0.0, "query_block_size": 8, "block_size": 8}
SPARSE = {"topk": 0.3, "query_block_size": 8, "block_size": 8}


class Dense(nn.Module):
    """What diffusers' processors of self-attention do."""

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if attn.wide:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if not attn.wide:
            query, key = attn.norm_q(query), attn.norm_k(key)
        if rotary_emb is not None:
            query, key = (rotate_pairs(x.transpose(1, 2), *rotary_emb).transpose(1, 2) for x in (query, key))
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


class WanShaped(nn.Module):
    """The names of WanAttention of diffusers 0.35; `wide` norms see all channels."""

    def __init__(self, dim=16, heads=2, wide=True, cross=False):
        super().__init__()
        self.heads, self.wide, self.is_cross_attention = heads, wide, cross
        self.add_k_proj = None
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim if wide else dim // heads) for _ in range(2))
        self.set_processor(Dense())

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


class Block(nn.Module):
    def __init__(self, wide=True):
        super().__init__()
        self.attn1, self.attn2 = WanShaped(wide=wide), WanShaped(cross=True)

    def forward(self, x, text, tables):
        x = x + self.attn1(x, rotary_emb=tables)
        return x + self.attn2(x, text)


class WithCore(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = 8
        self.qkv_proj = nn.Linear(16, 48)
        self.core = None

    def forward(self, x):
        query, key, value = self.qkv_proj(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.core(query, key, value).transpose(1, 2).flatten(2)


def given(length=45):
    angles = torch.randn(1, length, 1, 4, dtype=torch.float64).repeat_interleave(2, dim=-1)
    tokens = torch.randn(2, length, 16, dtype=torch.float64)
    return tokens, torch.randn(2, 7, 16, dtype=torch.float64), (angles.cos(), angles.sin())


@pytest.mark.parametrize("wide", [True, False])
def test_with_all_blocks_critical_a_wan_model_is_what_it_was(wide):
    model = nn.Sequential(Block(wide), Block(wide)).double()
    tokens, text, tables = given()

    def run():
        return model[1](model[0](tokens, text, tables), text, tables)

    before = run()
    names = set(model.state_dict())
    _, report = convert_sla(model, **EXACT)
    torch.testing.assert_close(run(), before)
    assert report["converted"] == ["0.attn1", "1.attn1"] and report["left"] == ["0.attn2", "1.attn2"]
    assert report["added_parameters"] == 2 * (8 * 8 + 8)
    added = set(model.state_dict()) - names
    assert added == set(projection_state(model)) and len(added) == 4


def test_timms_attention_keeps_its_names_and_its_function():
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=4, embed_dim=16, depth=2, num_heads=2, qk_norm=True, class_token=False,
        global_pool="avg", num_classes=3,
    ).double().eval()  # fmt: skip
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    before, names = model(image), set(model.state_dict())
    convert_sla(model, **EXACT)
    torch.testing.assert_close(model(image), before)
    assert set(model.state_dict()) - names == set(projection_state(model))


def test_a_held_core_is_exchanged_and_only_where_the_predicate_says():
    model = nn.Sequential(WithCore(), WithCore()).double()
    _, report = convert_sla(model, lambda name, module: name == "1", **SPARSE)
    assert model[0].core is None and isinstance(model[1].core, SparseLinearAttention)
    assert (report["converted"], report["left"]) == (["1"], ["0"])
    assert model[1](given()[0]).shape == (2, 45, 16)


def test_fine_tuning_reaches_every_weight_from_the_second_step():
    model = Block()
    convert_sla(model, **SPARSE)
    tokens, text, tables = (x.float() if torch.is_tensor(x) else tuple(t.float() for t in x) for x in given())
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimiser.zero_grad()
        model(tokens, text, tables).square().mean().backward()
        optimiser.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_what_is_saved_loads_into_a_converted_model():
    model, other = Block(), Block()
    for one in (model, other):
        convert_sla(one, **SPARSE)
    nn.init.normal_(model.attn1.processor.core.proj.weight)
    other.load_state_dict(model.state_dict())
    tokens, text, tables = (x.float() if torch.is_tensor(x) else tuple(t.float() for t in x) for x in given())
    assert torch.equal(model(tokens, text, tables), other(tokens, text, tables))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="model is a Linear without a self-attention to convert"):
        convert_sla(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model is a Linear without SLA; convert_sla makes one"):
        projection_state(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model is a Block without a self-attention to convert"):
        convert_sla(Block(), lambda name, module: False)
    with pytest.raises(ValueError, match="topk=2 must be in"):
        convert_sla(Block(), topk=2)
    model = Block().double()
    convert_sla(model, **SPARSE)
    tokens, text, _ = given()
    with pytest.raises(ValueError, match="encoder_hidden_states is given; SLA is for self-attention"):
        model.attn1(tokens, text)
    with pytest.raises(ValueError, match="attention_mask is given; SLA attends blocks without a mask"):
        model.attn1(tokens, attention_mask=text)
