from __future__ import annotations

import inspect

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


class JointDense:
    """What diffusers' processors of joint attention do: FLUX's with rotations, text first; SD3's without."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        def heads(x, names, norms):
            x = [getattr(attn, name)(x).unflatten(2, (attn.heads, -1)) for name in names]
            return [*(getattr(attn, norm)(t) for norm, t in zip(norms, x, strict=False)), x[2]]

        parts = heads(hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            added = heads(
                encoder_hidden_states, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            )  # fmt: skip
            parts = [torch.cat(both, 1) for both in zip(added, parts, strict=True)]
        query, key, value = (x.transpose(1, 2) for x in parts)
        if image_rotary_emb is not None:
            cos, sin = (table[None, :, None] for table in image_rotary_emb)
            query, key = rotate_pairs(query, cos, sin), rotate_pairs(key, cos, sin)
        out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out
        words = out[:, :text] if attn.to_add_out is None else attn.to_add_out(out[:, :text])
        return attn.to_out[1](attn.to_out[0](out[:, text:])), words


class JointShaped(nn.Module):
    """The names of FluxAttention and of Attention with `added_kv_proj_dim` of diffusers 0.35."""

    def __init__(self, dim=16, heads=2, context_pre_only=False, pre_only=False):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim // heads) for _ in range(2))
        if not pre_only:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q, self.norm_added_k = (nn.RMSNorm(dim // heads) for _ in range(2))
            self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
            self.to_add_out = None if context_pre_only else nn.Linear(dim, dim)
        self.set_processor(JointDense())

    def set_processor(self, processor):
        self.processor = processor

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        # Diffusers drops what the processor's signature does not name.
        named = inspect.signature(self.processor.__call__).parameters
        kwargs = {name: given for name, given in kwargs.items() if name in named}
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, **kwargs)


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


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("context_pre_only", [False, True])
def test_with_all_blocks_critical_joint_attention_is_what_it_was(rotated, context_pre_only):
    model = nn.ModuleList([JointShaped(context_pre_only=context_pre_only)]).double()
    image, text, _ = given()
    options = {"image_rotary_emb": tuple(table[0, :, 0] for table in given(52)[2])} if rotated else {}
    before = model[0](image, text, **options)
    convert_sla(model, **EXACT)
    torch.testing.assert_close(model[0](image, text, **options), before)


def test_a_rotation_of_the_image_alone_leaves_the_text():
    model = nn.ModuleList([JointShaped()]).double()
    image, text, tables = given()
    cos, sin = (table[0, :, 0] for table in tables)
    still = torch.ones_like(cos[:7]), torch.zeros_like(sin[:7])
    whole = torch.cat([still[0], cos]), torch.cat([still[1], sin])
    before = model[0](image, text, image_rotary_emb=whole)
    convert_sla(model, **EXACT)
    torch.testing.assert_close(model[0](image, text, image_rotary_emb=(cos, sin)), before)
    with pytest.raises(ValueError, match="the rotation has 44 rows; 52 tokens, 7 of them text, do not fit"):
        model[0](image, text, image_rotary_emb=(cos[:44], sin[:44]))


def test_text_in_one_sequence_with_the_image_is_converted_where_its_length_is_given():
    model = nn.ModuleList([JointShaped(), JointShaped(pre_only=True)]).double()
    tokens, _, tables = given(52)
    options = {"image_rotary_emb": tuple(table[0, :, 0] for table in tables)}
    before = model[1](tokens, **options)
    _, report = convert_sla(model, lambda name, module: True, **EXACT)
    assert (report["converted"], report["left"]) == (["0"], ["1"])
    _, report = convert_sla(model, lambda name, module: name == "1", text_tokens=7, **EXACT)
    assert report["converted"] == ["1"]
    torch.testing.assert_close(model[1](tokens, **options), before)


def test_text_keys_reach_every_image_token_and_text_queries_see_all():
    model = nn.ModuleList([JointShaped()]).double()
    convert_sla(model, topk=0.1, bottomk=0.0, query_block_size=8, block_size=8)
    image, text, _ = (x.requires_grad_() if torch.is_tensor(x) else x for x in given())
    out, words = model[0](image, text)
    reached = torch.autograd.grad(out[0, 44].sum(), (image, text), retain_graph=True)
    assert (reached[1][0].abs().sum(-1) > 0).all()
    # One critical block of eight tokens, and the query itself; the projections are zero at first.
    assert (reached[0][0].abs().sum(-1) > 0).sum() <= 9
    assert (torch.autograd.grad(words[0, 0].sum(), image)[0][0].abs().sum(-1) > 0).all()


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
    with pytest.raises(ValueError, match="text_tokens=-1 must be at least 0"):
        convert_sla(nn.ModuleList([JointShaped(pre_only=True)]), text_tokens=-1, **SPARSE)
    joint = nn.ModuleList([JointShaped()]).double()
    convert_sla(joint, **SPARSE)
    with pytest.raises(
        ValueError, match="encoder_hidden_states is None; this attention is of an image and a text"
    ):
        joint[0](tokens)
    with pytest.raises(ValueError, match="attention_mask is given; SLA attends blocks without a mask"):
        model.attn1(tokens, attention_mask=text)
