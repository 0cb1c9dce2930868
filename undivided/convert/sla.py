"""A diffusion transformer whose self-attention becomes SLA: weights stay, cores are exchanged, projections are new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers.sla import SparseLinearAttention


class SparseLinearProcessor(nn.Module):
    """SLA as a processor of diffusers' attention modules: what their `set_processor` takes.

    It projects, normalises, rotates and joins heads as their own processors of self-attention (Wan) and of joint
    attention to image and text (SD3, FLUX) do; the core between is `SparseLinearAttention`. Heads are normalised where
    the norm is as wide as a head, all channels together where it is wider (Wan). With a text, the map is of the image
    alone: image queries see every text key beside their critical blocks, and text queries attend to all.

    Args:
        core: the attention of queries, keys and values.
        text_tokens: tokens at the start of `hidden_states` that are text, where the model hands over both in one
            (single blocks of FLUX). Modules with projections of their own for the text are given it apart.
    """

    def __init__(self, core: SparseLinearAttention, text_tokens: int = 0) -> None:
        super().__init__()
        if text_tokens < 0:
            raise ValueError(f"text_tokens={text_tokens} must be at least 0.")
        self.core, self.text_tokens = core, text_tokens

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        # Diffusers leaves out what a processor does not name here, a rotation too.
        tables = rotary_emb if image_rotary_emb is None else image_rotary_emb
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, tables)

    def forward(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        tables: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        if attention_mask is not None:
            raise ValueError("attention_mask is given; SLA attends blocks without a mask.")
        is_joint = getattr(attn, "add_q_proj", None) is not None
        if encoder_hidden_states is not None and not is_joint:
            raise ValueError(
                "encoder_hidden_states is given; SLA is for self-attention, whose map is of one sequence."
            )
        if encoder_hidden_states is None and is_joint:
            raise ValueError("encoder_hidden_states is None; this attention is of an image and a text.")
        heads = _heads_of(attn, hidden_states, ("to_q", "to_k", "to_v"), "to_qkv", ("norm_q", "norm_k"))
        text = self.text_tokens
        if encoder_hidden_states is not None:
            added = _heads_of(
                attn, encoder_hidden_states, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv",
                ("norm_added_q", "norm_added_k"),
            )  # fmt: skip
            heads = [torch.cat(parts, dim=2) for parts in zip(added, heads, strict=True)]
            text = encoder_hidden_states.shape[1]
        query, key, value = heads
        if tables is not None:
            query, key = (_rotated(x, text, tables) for x in (query, key))
        query, key = query.type_as(value), key.type_as(value)
        words, image = slice(None, text), slice(text, None)
        if text == 0:
            out = self.core(query, key, value)
        else:
            beside = key[:, :, words], value[:, :, words]
            out = self.core(query[:, :, image], key[:, :, image], value[:, :, image], *beside)
            of_text = F.scaled_dot_product_attention(query[:, :, words], key, value)
            out = torch.cat([of_text, out], dim=2)
        out = out.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return _through(getattr(attn, "to_out", None), out)
        to_add_out = getattr(attn, "to_add_out", None)
        text_out = out[:, words] if to_add_out is None else to_add_out(out[:, words])
        return _through(attn.to_out, out[:, image]), text_out


class SparseLinearSelfAttention(nn.Module):
    """A timm `Attention`, its weights and names, with the core exchanged: what blocks of DiT and ViT have.

    Args:
        source: module with `qkv`, `q_norm`, `k_norm`, `proj`, `proj_drop` and `num_heads`.
        core: the attention of queries, keys and values.
    """

    def __init__(self, source: nn.Module, core: SparseLinearAttention) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.qkv, self.q_norm, self.k_norm = source.qkv, source.q_norm, source.k_norm
        self.norm = getattr(source, "norm", nn.Identity())
        self.proj, self.proj_drop = source.proj, source.proj_drop
        self.core = core

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        if attn_mask is not None or is_causal:
            given = "is_causal=True" if is_causal else "attn_mask"
            raise ValueError(f"{given} is given; SLA attends blocks without a mask, in both directions.")
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        out = self.core(self.q_norm(query).type_as(value), self.k_norm(key).type_as(value), value)
        return self.proj_drop(self.proj(self.norm(out.transpose(1, 2).flatten(2))))


def convert_sla(
    model: nn.Module,
    predicate: Callable[[str, nn.Module], bool] | None = None,
    *,
    text_tokens: int = 0,
    **options: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Exchanges the cores of a diffusion transformer's self-attention for SLA, in place.

    Recognised are: attention of diffusers and Wan (`to_q`, `to_k`, `to_v`, `to_out`, `heads`, `set_processor`), joint
    attention to image and text among it (with `add_q_proj`: SD3, FLUX), whose text keys and queries stay dense,
    attention of timm (`qkv`, `proj`, `num_heads`), and modules that hold their core as a submodule
    `core(query, key, value)` with `head_dim` beside it. Cross-attention is left alone. All weights stay; the
    projections are zero at first, so that the model starts as critical-only sparse attention. Fine-tune it with its own
    loss: 2000 steps of batch 64 in the paper.

    Args:
        model: the transformer.
        predicate: `predicate(name, module)` says which of the recognised modules to convert; default all.
        text_tokens: text at the start of the sequences of diffusers' modules without `to_out`, which are given both in
            one (single blocks of FLUX); 0 leaves these modules as they are.
        options: of `SparseLinearAttention`, but `head_dim`.

    Returns:
        The model, and a report: method, options, the names converted and left, the parameters added, what is
        approximate.

    Raises:
        ValueError: nothing to convert was found, or an option does not fit.

    Source: SLA (arXiv 2509.24006), section 5.
    """
    converted, left = [], []
    for name, module in list(model.named_modules()):
        kind = _kind(module)
        if kind is None:
            continue
        if (
            kind == "cross"
            or (kind == "single" and not text_tokens)
            or (predicate is not None and not predicate(name, module))
        ):
            left.append(name)
            continue
        core = SparseLinearAttention(_head_dim(module, kind), device=_device(module), **options)
        if kind in ("diffusers", "single"):
            module.set_processor(SparseLinearProcessor(core, text_tokens if kind == "single" else 0))
        elif kind == "timm":
            model = _exchange(model, name, SparseLinearSelfAttention(module, core))
        else:
            module.core = core
        converted.append(name)
    if not converted:
        raise ValueError(
            f"model is a {type(model).__name__} without a self-attention to convert; recognised are modules with to_q, "
            "to_k, to_v, to_out, heads and set_processor, with qkv, proj and num_heads, or with core and head_dim."
        )
    added = sum(p.numel() for core in _cores(model).values() for p in core.proj.parameters())
    return model, {
        "method": "sla",
        "options": options,
        "converted": converted,
        "left": left,
        "added_parameters": added,
        "approximations": [
            "attention outside of critical blocks is left out until the projections are trained"
        ],
    }


def projection_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the projections alone, by name: an adapter must store them beside its own weights.

    Args:
        model: a converted model.

    Raises:
        ValueError: the model has no SLA.
    """
    found = {
        f"{name}.proj.{kind}": tensor.detach()
        for name, core in _cores(model).items()
        for kind, tensor in core.proj.named_parameters()
    }
    if not found:
        raise ValueError(f"model is a {type(model).__name__} without SLA; convert_sla makes one.")
    return found


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Returns `[batch, heads, length, head_dim]` with neighbouring channels (2p, 2p + 1) rotated.

    Args:
        x: queries or keys.
        cos, sin: `[1, length, 1, head_dim]`, as diffusers has them: each angle twice, for both channels of its pair.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (table.transpose(1, 2)[..., 0::2] for table in (cos, sin))
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return pairs.flatten(-2).type_as(x)


def _heads_of(attn, tokens, names, fused, norms):
    """Queries, keys and values by heads, `[batch, heads, length, head_dim]`, normalised where a norm is given."""
    if getattr(attn, "fused_projections", False):
        parts = getattr(attn, fused)(tokens).chunk(3, dim=-1)
    else:
        parts = [getattr(attn, name)(tokens) for name in names]

    def split(x, norm):
        weight = getattr(norm, "weight", None)
        # A norm as wide as all channels comes before the heads are parted, one of a head's width behind.
        if norm is not None and weight is not None and weight.numel() == x.shape[-1]:
            return norm(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        x = x.unflatten(-1, (attn.heads, -1))
        return (x if norm is None else norm(x)).transpose(1, 2)

    return [
        split(x, norm)
        for x, norm in zip(parts, (*(getattr(attn, n, None) for n in norms), None), strict=True)
    ]


def _rotated(x, text, tables):
    """Heads after a rotation by tables of all tokens, text first, or of those behind the text alone."""
    rows = tables[0].shape[-3 if tables[0].dim() == 4 else 0]
    cos, sin = (t.view(1, rows, 1, -1) for t in tables)
    if rows == x.shape[2]:
        return rotate_pairs(x, cos, sin)
    if rows == x.shape[2] - text:
        return torch.cat([x[:, :, :text], rotate_pairs(x[:, :, text:], cos, sin)], dim=2)
    raise ValueError(f"the rotation has {rows} rows; {x.shape[2]} tokens, {text} of them text, do not fit.")


def _through(layers, x):
    for layer in layers or ():
        x = layer(x)
    return x


def _kind(module: nn.Module) -> str | None:
    def has(*names):
        return all(hasattr(module, name) for name in names)

    if isinstance(module, (SparseLinearAttention, SparseLinearSelfAttention)):
        return None
    if has("to_q", "to_k", "to_v", "heads", "set_processor"):
        added = [getattr(module, name, None) is not None for name in ("add_q_proj", "add_k_proj")]
        if getattr(module, "is_cross_attention", False) or added == [False, True]:
            return "cross"
        return "diffusers" if getattr(module, "to_out", None) is not None else "single"
    if has("qkv", "proj", "num_heads"):
        return "timm"
    return "core" if has("core", "head_dim") else None


def _head_dim(module: nn.Module, kind: str) -> int:
    if kind in ("diffusers", "single"):
        return module.to_q.out_features // module.heads
    return module.qkv.out_features // 3 // module.num_heads if kind == "timm" else module.head_dim


def _device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)


def _exchange(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
    return model


def _cores(model: nn.Module) -> dict[str, SparseLinearAttention]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinearAttention)}
