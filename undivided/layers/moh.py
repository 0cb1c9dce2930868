"""Mixture-of-head attention: every token uses some of the heads, and weighs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from undivided.layers._base import additive_or_boolean, check_arguments, filled_keys
from undivided.layers.gqa import GQAttention
from undivided.layers.head_router import HeadRouter, Routing, balance_loss
from undivided.layers.rotary import PositionEmbeddings
from undivided.ops import dense_attention, routed_attention
from undivided.ops._triton import availability

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

BACKENDS = ("auto", "routed", "mask")
# From so many queries on, and up to this share of active heads, skipping is faster on an H100 than computing all heads
# with torch's flash attention: `undivided reproduce moh`.
ROUTED_FROM, ROUTED_SHARE = 2048, 0.75


class MoHAttention(GQAttention):
    """Mixture-of-head attention: grouped-query attention whose heads are experts.

    `y_n = concat_h(g_hn * softmax(scale * q_hn k_g(h)^T) v_g(h)) W_O`, with gates g of a router, zero for the heads
    that token n does not use. Every token uses the first `shared_heads` heads and the `top_k` best of the others; see
    `HeadRouter` for the gates. When training, the second item of the forward is `{"balance": loss}`.

    Keys and values of all heads are computed and cached, `2 * G * head_dim` numbers a token: a head that no token so
    far selected may be selected by the next one. What can be saved is the attention of pairs (token, head) that are
    not selected; "mask" computes it and multiplies by zero, "routed" skips it.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: query heads H.
        num_key_value_heads: key and value heads G, a divisor of H. Heads of one group are routed each for itself.
        head_dim: width of a head.
        shared_heads: heads that every token uses, the first ones.
        top_k: routed heads that a token uses; 0 only if all heads are shared.
        router: "linear" or "query_norm" (no parameters).
        gate_mode: "released", "paper" or "binary".
        two_stage: whether shared and routed heads are weighed against each other.
        balance_coeff: factor of the balance loss in a model's loss.
        backend: "mask", "routed" (an error where the kernels cannot run), or "auto": routed where it is faster.
        query_bias, key_value_bias, output_bias: whether the projections have a bias.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: head counts that do not fit, or options that do not go together.

    Source: MoH (arXiv 2410.11842), equations 3 to 8.
    """

    mechanism = "moh"
    has_auxiliary: ClassVar[bool] = True

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        shared_heads: int,
        top_k: int,
        router: str = "linear",
        gate_mode: str = "released",
        two_stage: bool = True,
        balance_coeff: float = 0.01,
        backend: str = "auto",
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__(
            hidden_size,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            query_bias=query_bias,
            key_value_bias=key_value_bias,
            output_bias=output_bias,
            scale=scale,
            softcap=softcap,
            layer_idx=layer_idx,
        )
        _check_options(balance_coeff, backend)
        self.router = HeadRouter(
            hidden_size, num_attention_heads, shared_heads, top_k, router=router, gate_mode=gate_mode,
            two_stage=two_stage,
        )  # fmt: skip
        self.backend = backend
        self.auxiliary_coefficients = {"balance": balance_coeff}

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        check_arguments(self.mechanism, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings)
        routing = self.router(hidden_states, query)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
            key, value = filled_keys(attention_mask, past_key_values, self.layer_idx, key, value)
        mask = additive_or_boolean(attention_mask, key.shape[2])
        if _skips(self.backend, self.router.active_share, query, mask, self.softcap):
            out = routed_attention(
                query, key, value, routing.selected, routing.gates, attn_mask=mask, is_causal=mask is None,
                scale=self.scale, softcap=self.softcap, backend="triton",
            )  # fmt: skip
        else:
            out = gated(self.attend(query, key, value, mask), routing)
        auxiliary = _auxiliary(self.router, routing, self.training, real_tokens(mask, query.shape[2]))
        return self.o_proj(out.transpose(1, 2).flatten(2)), auxiliary

    @property
    def spec(self) -> AttentionSpec:
        """What the layer computes between its projections, in the specification language."""
        import dataclasses

        from undivided.spec.specification import Gate
        from undivided.spec.systems import gqa

        base = gqa(self.num_key_value_heads, self.scale, self.softcap)
        return dataclasses.replace(base, update=(Gate("gates"),))

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings
    ) -> dict[str, torch.Tensor]:
        """Returns what `spec` reads: rotated query and key, and value, `[B, heads, N, D]`; gates `[B, H, N]`."""
        query, key, value = self.heads(hidden_states, position_embeddings)
        return {
            "query": query,
            "key": key,
            "value": value,
            "gates": self.router(hidden_states, query).gates,
        }


class MoHVisionAttention(nn.Module):
    """Mixture-of-head attention between the tokens of an image, without a mask; constructor words of timm.

    As `MoHAttention`, with `qkv` and `proj` as timm's attention has them.

    Args:
        dim: width C.
        num_heads: heads H.
        shared_heads, top_k, router, gate_mode, two_stage, backend: as in `MoHAttention`.
        head_dim: width of a head; default `dim / num_heads`.
        qkv_bias: whether queries, keys and values have a bias.
        proj_drop: dropout after the output projection.
        balance_coeff: factor of the balance loss, for those who add up the loss.

    Raises:
        ValueError: head counts that do not fit, or options that do not go together.

    Source: MoH (arXiv 2410.11842), equations 3 to 8, as the authors' code for DiT applies them.
    """

    has_auxiliary: ClassVar[bool] = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        shared_heads: int,
        top_k: int,
        router: str = "linear",
        gate_mode: str = "released",
        two_stage: bool = True,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        balance_coeff: float = 0.01,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}; give head_dim.")
        _check_options(balance_coeff, backend)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=qkv_bias)
        self.proj = nn.Linear(num_heads * self.head_dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.router = HeadRouter(
            dim, num_heads, shared_heads, top_k, router=router, gate_mode=gate_mode, two_stage=two_stage
        )
        self.backend = backend
        self.auxiliary_coefficients = {"balance": balance_coeff}

    def forward(
        self, x: torch.Tensor, size: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Returns the tokens `[B, N, C]` and, when training, `{"balance": loss}`; `size` is not needed."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        routing = self.router(x, query)
        if _skips(self.backend, self.router.active_share, query, None, None):
            out = routed_attention(query, key, value, routing.selected, routing.gates, backend="triton")
        else:
            out = gated(cast(torch.Tensor, dense_attention(query, key, value)), routing)
        out = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return out, _auxiliary(self.router, routing, self.training, None)

    def load_official(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights of one `MoHAttention` of the authors' code for DiT, without query and key norms.

        Raises:
            RuntimeError: a weight is missing, unknown or has another shape.
        """
        names = {"wg": "router.routed", "wg_1": "router.shared", "wg_0": "router.kind"}
        own = {}
        for name, weight in state_dict.items():
            module, _, kind = name.rpartition(".")
            own[f"{names.get(module, module)}.{kind}"] = weight
        self.load_state_dict(own)


def gated(out: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Returns the outputs of all heads `[B, H, N, D]` times their gates, in the dtype of the outputs."""
    return (out * routing.gates[..., None]).to(out.dtype)


def real_tokens(mask: torch.Tensor | None, num_queries: int) -> torch.Tensor | None:
    """Returns which queries are no padding, `[B, N]`: those that see themselves; None where there is no mask."""
    if mask is None:
        return None
    own = mask[:, 0].diagonal(mask.shape[-1] - num_queries, -2, -1)
    # Masks of transformers have the lowest finite number where nothing is seen.
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def _auxiliary(
    router: HeadRouter, routing: Routing, training: bool, valid: torch.Tensor | None
) -> dict[str, torch.Tensor] | None:
    if not training or routing.probabilities is None:
        return None
    return {"balance": balance_loss(routing, valid, scaled=router.gate_mode != "paper")}


def _skips(
    backend: str, share: float, query: torch.Tensor, mask: torch.Tensor | None, softcap: float | None
) -> bool:
    """Whether heads that are not selected are skipped, and not computed and masked."""
    if backend != "auto":
        return backend == "routed"
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[2] >= ROUTED_FROM
        and share <= ROUTED_SHARE
        and mask is None
        and softcap is None
        and not availability()
    )


def _check_options(balance_coeff: float, backend: str) -> None:
    if not 0 <= balance_coeff < float("inf"):
        raise ValueError(f"balance_coeff={balance_coeff} must be a number from 0 on.")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(map(repr, BACKENDS))}.")
