"""Grouped differential attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers._base import (
    CausalAttention,
    additive_or_boolean,
    check_arguments,
    filled_keys,
    grouped_query_dimensions,
)
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops.differential import differential_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

VARIANTS = ("paper", "released")


class GDAttention(CausalAttention):
    """Grouped differential attention: g signal heads share the noise head that is subtracted from each of them.

    `O_h = softmax(scale * q_h k^T) V - lam * softmax(scale * q'_j k'^T) V`, `j = h // g`,
    `y = concat_h((1 - lam_init) * rms_norm(O_h)) W_O`, rotary positions on all queries and keys. V is twice as wide as
    a head and serves both maps, so `o_proj` reads `2 * num_signal_heads * head_dim`. One lam a layer, never clamped:
    `lam = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lam_init`. With as many noise as signal heads this is the
    Differential Transformer.

    Heads are striped in the weights, so that a cut of them keeps groups whole: queries as `[noise heads, (g signal,
    1 noise)]`, keys as `[G, (key_ratio signal, 1 noise)]`, values as `[G, 2]`, whose two halves lie side by side.
    Cached a token: `(key_ratio + 3) * G * head_dim` numbers, `keys [B, G, M, (key_ratio + 1) * head_dim]` and
    `values [B, G, M, 2 * head_dim]`; with `key_ratio=1` what grouped-query attention with 2 G heads caches.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: signal and noise query heads together.
        num_key_value_heads: 2 G, the value heads (and, with `key_ratio=1`, key heads) of both kinds together.
        head_dim: width D of a query or key.
        num_noise_heads: noise heads; a multiple of G. Default: half of the heads.
        num_signal_heads: signal heads g * num_noise_heads. Default: the heads that are not noise heads; given, it
            stands in place of `num_attention_heads`.
        key_ratio: signal keys a noise key; a divisor of g.
        variant: "paper", `lam_init = 0.8 - 0.6 exp(-0.3 layer_idx)`; "released", `layer_idx - 1` in place of
            `layer_idx`, so that the first layer has about -0.01: the formula counts layers from one and the code
            from zero.
        norm_eps: of the normalisation of heads.
        query_bias, key_value_bias, output_bias: whether the projections have a bias.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        layer_idx: index of the layer, from zero.

    Raises:
        ValueError: head counts that do not divide each other, or an unknown variant.

    Source: Grouped Differential Attention (arXiv 2510.06949); Differential Transformer (arXiv 2410.05258), section 2.
    """

    mechanism = "gda"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        num_noise_heads: int | None = None,
        num_signal_heads: int | None = None,
        key_ratio: int = 1,
        variant: str = "paper",
        norm_eps: float = 1e-5,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        num_signal_heads, num_noise_heads = differential_heads(
            num_attention_heads, num_signal_heads, num_noise_heads
        )
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(map(repr, VARIANTS))}.")
        _check_heads(num_signal_heads, num_noise_heads, num_key_value_heads, key_ratio)
        self.num_signal_heads = num_signal_heads
        self.num_noise_heads = num_noise_heads
        self.num_value_heads = num_key_value_heads // 2
        self.key_ratio = key_ratio
        self.head_dim = head_dim
        self.variant = variant
        self.lam_init = lam_init(layer_idx, variant)
        self.scale = head_dim**-0.5 if scale is None else scale
        self.softcap = softcap
        self.layer_idx = layer_idx
        groups = self.num_value_heads
        self.q_proj = nn.Linear(hidden_size, (num_signal_heads + num_noise_heads) * head_dim, bias=query_bias)
        self.k_proj = nn.Linear(hidden_size, (key_ratio + 1) * groups * head_dim, bias=key_value_bias)
        self.v_proj = nn.Linear(hidden_size, 2 * groups * head_dim, bias=key_value_bias)
        self.o_proj = nn.Linear(2 * num_signal_heads * head_dim, hidden_size, bias=output_bias)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            self.register_parameter(name, nn.Parameter(0.1 * torch.randn(head_dim)))
        self.subln = nn.RMSNorm(2 * head_dim, eps=norm_eps)

    @classmethod
    def native_dimensions(cls, config: Any) -> dict[str, Any]:
        return grouped_query_dimensions(config)

    @property
    def signal_ratio(self) -> int:
        """Signal heads a noise head."""
        return self.num_signal_heads // self.num_noise_heads

    def lam(self) -> torch.Tensor:
        """Returns the factor of the noise maps, a scalar in float32 at least."""
        dtype = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        q1, k1, q2, k2 = (
            x.to(dtype) for x in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2)
        )
        return (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + self.lam_init

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments("gda", **kwargs)
        query, keys, values = self.rows(hidden_states, position_embeddings)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
            keys, values = filled_keys(attention_mask, past_key_values, self.layer_idx, keys, values)
        mask = additive_or_boolean(attention_mask, keys.shape[2])
        key, noise_key = self.split_keys(keys)
        query, noise_query = split_heads(query, self.num_noise_heads)
        out = self.attend(query, noise_query, key, noise_key, values, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def rows(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns striped queries `[B, heads, N, D]`, and keys and values in the rows of the cache."""
        cos, sin = rotary_tables(position_embeddings)
        query, key = (
            apply_rotary(
                projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2),
                cos,
                sin,
                interleaved=False,
            )
            for projection in (self.q_proj, self.k_proj)
        )
        values = self.v_proj(hidden_states).unflatten(-1, (self.num_value_heads, -1)).transpose(1, 2)
        return query, side_by_side(key, self.num_value_heads), values

    def split_keys(self, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns signal keys `[B, key_ratio * G, M, D]` and noise keys `[B, G, M, D]` from the rows of the cache."""
        key, noise_key = keys.split([self.key_ratio * self.head_dim, self.head_dim], dim=-1)
        return one_below_another(key, self.key_ratio), noise_key

    def attend(
        self,
        query: torch.Tensor,
        noise_query: torch.Tensor,
        key: torch.Tensor,
        noise_key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns the normalised outputs of the signal heads, `[B, num_signal_heads, N, 2 * head_dim]`."""
        return differential_attention(
            query, noise_query, key, noise_key, value, self.lam(),
            norm_weight=self.subln.weight, norm_eps=self.subln.eps, out_scale=1 - self.lam_init,
            attn_mask=mask, is_causal=mask is None, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.systems import gda

        return gda(self.lam_init, self.subln.eps, self.scale, self.softcap)

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        query, keys, value = self.rows(hidden_states, position_embeddings)
        query, noise_query = split_heads(query, self.num_noise_heads)
        key, noise_key = self.split_keys(keys)
        return {
            "query": query, "query_noise": noise_query, "key": key, "key_noise": noise_key, "value": value,
            "lambda": self.lam(), "norm_weight": self.subln.weight,
        }  # fmt: skip


def lam_init(layer_idx: int, variant: str) -> float:
    """Returns the constant part of lam for a layer, counted from zero."""
    return 0.8 - 0.6 * math.exp(-0.3 * (layer_idx - (variant == "released")))


def split_heads(tensor: torch.Tensor, groups: int, dim: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits striped heads `[groups, (n, 1)]` along `dim` into `[groups * n]` signal and `[groups]` noise heads."""
    striped = tensor.unflatten(dim, (groups, -1))
    signal = striped.narrow(dim + 1, 0, striped.shape[dim + 1] - 1)
    return signal.flatten(dim, dim + 1), striped.select(dim + 1, -1)


def stripe_heads(signal: torch.Tensor, noise: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Joins what `split_heads` split: the inverse, a permutation of heads."""
    groups = noise.shape[dim]
    return torch.cat([signal.unflatten(dim, (groups, -1)), noise.unsqueeze(dim + 1)], dim=dim + 1).flatten(
        dim, dim + 1
    )


def side_by_side(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Turns `[B, groups * n, N, D]` into `[B, groups, N, n * D]`: one row a group in a cache."""
    return heads.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3)


def one_below_another(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Turns `[B, groups, N, count * D]` into `[B, groups * count, N, D]`: the inverse of `side_by_side`."""
    return rows if count == 1 else rows.unflatten(-1, (count, -1)).transpose(2, 3).flatten(1, 2)


def differential_heads(total: int, signal: int | None, noise: int | None) -> tuple[int, int]:
    """Returns how many signal and noise heads there are, of which either may be left open.

    Raises:
        ValueError: noise heads do not divide signal heads.
    """
    noise = total // 2 if noise is None else noise
    signal = total - noise if signal is None else signal
    if noise < 1 or signal < noise or signal % noise:
        raise ValueError(
            f"num_signal_heads={signal} is no multiple of num_noise_heads={noise}; each noise head serves the same "
            "number of signal heads."
        )
    return signal, noise


def _check_heads(signal: int, noise: int, key_value: int, key_ratio: int) -> None:
    if key_value < 2 or key_value % 2:
        raise ValueError(
            f"num_key_value_heads={key_value} must be even and at least 2: half of the keys are noise keys, and each "
            "value is two heads wide."
        )
    if noise % (key_value // 2):
        raise ValueError(
            f"num_key_value_heads={key_value} means {key_value // 2} noise keys, which do not divide "
            f"num_noise_heads={noise}."
        )
    if key_ratio < 1 or (signal // noise) % key_ratio:
        raise ValueError(
            f"key_ratio={key_ratio} does not divide the {signal // noise} signal heads of a noise head; "
            f"{', '.join(str(n) for n in range(1, signal // noise + 1) if signal // noise % n == 0)} would."
        )
