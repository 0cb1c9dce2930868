"""A diffusion transformer whose self-attention becomes SLA: weights stay, cores are exchanged, projections are new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from undivided.layers.sla import SparseLinearAttention


class SparseLinearProcessor(nn.Module):
    """SLA as a processor of diffusers' attention modules: what their `set_processor` takes.

    It projects, normalises, rotates and joins heads as their own processor of self-attention does; the core between is
    `SparseLinearAttention`. Heads are normalised where the norm is as wide as a head, all channels together where it is
    wider (Wan).

    Args:
        core: the attention of queries, keys and values.
    """

    def __init__(self, core: SparseLinearAttention) -> None:
        super().__init__()
        self.core = core

    def forward(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(
                "encoder_hidden_states is given; SLA is for self-attention, whose map is of one sequence."
            )
        if attention_mask is not None:
            raise ValueError("attention_mask is given; SLA attends blocks without a mask.")
        if getattr(attn, "fused_projections", False):
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (project(hidden_states) for project in (attn.to_q, attn.to_k, attn.to_v))
        query, key, value = _heads_of(query, key, value, attn.heads, attn.norm_q, attn.norm_k)
        if rotary_emb is not None:
            query, key = (rotate_pairs(x, *rotary_emb) for x in (query, key))
        out = self.core(query.type_as(value), key.type_as(value), value)
        out = out.transpose(1, 2).flatten(2)
        for layer in attn.to_out:
            out = layer(out)
        return out


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
    model: nn.Module, predicate: Callable[[str, nn.Module], bool] | None = None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """Exchanges the cores of a diffusion transformer's self-attention for SLA, in place.

    Recognised are: attention of diffusers and Wan (`to_q`, `to_k`, `to_v`, `to_out`, `heads`, `set_processor`),
    attention of timm (`qkv`, `proj`, `num_heads`), and modules that hold their core as a submodule
    `core(query, key, value)` with `head_dim` beside it. Cross-attention is left alone. All weights stay; the
    projections are zero at first, so that the model starts as critical-only sparse attention. Fine-tune it with its own
    loss: 2000 steps of batch 64 in the paper.

    Args:
        model: the transformer.
        predicate: `predicate(name, module)` says which of the recognised modules to convert; default all.
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
        if kind == "cross" or (predicate is not None and not predicate(name, module)):
            left.append(name)
            continue
        core = SparseLinearAttention(_head_dim(module, kind), device=_device(module), **options)
        if kind == "diffusers":
            module.set_processor(SparseLinearProcessor(core))
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


def _heads_of(query, key, value, heads, norm_q, norm_k):
    """Queries, keys and values by heads, `[batch, heads, length, head_dim]`, normalised where a norm is given."""

    def split(x, norm):
        weight = getattr(norm, "weight", None)
        # A norm as wide as all channels comes before the heads are parted, one of a head's width behind.
        if norm is not None and weight is not None and weight.numel() == x.shape[-1]:
            return norm(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        x = x.unflatten(-1, (heads, -1))
        return (x if norm is None else norm(x)).transpose(1, 2)

    return split(query, norm_q), split(key, norm_k), split(value, None)


def _kind(module: nn.Module) -> str | None:
    def has(*names):
        return all(hasattr(module, name) for name in names)

    if isinstance(module, (SparseLinearAttention, SparseLinearSelfAttention)):
        return None
    if has("to_q", "to_k", "to_v", "to_out", "heads", "set_processor"):
        crossing = (
            getattr(module, "is_cross_attention", False) or getattr(module, "add_k_proj", None) is not None
        )
        return "cross" if crossing else "diffusers"
    if has("qkv", "proj", "num_heads"):
        return "timm"
    return "core" if has("core", "head_dim") else None


def _head_dim(module: nn.Module, kind: str) -> int:
    if kind == "diffusers":
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
