"""RALA: linear attention over a map with token weights and a modulation for its rank; and its softmax twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from undivided.layers._vision import Size, VisionAttention, map_size, to_map, to_tokens
from undivided.ops import dense_attention, linear_attention
from undivided.ops.linear import FEATURE_MAPS, key_value_buffer
from undivided.ops.linear.features import parts, rotate

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

Tables = tuple[torch.Tensor, torch.Tensor]


class ModulatedAttention(VisionAttention):
    """Base of both: projections, local term and modulation around an attention.

    `out = W_p ((A(q, k, v) + DWConv(v)) * o)` with q, k, v and o linear in x, o without an activation.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        qkv_bias, proj_bias: whether the projections have a bias.
        proj_drop: dropout of the output.
        lepe_kernel: side of the depthwise convolution of the values, odd; None for none.
        rope: whether queries and keys are rotated by row (first half of a head's channels) and column (second half).
        modulation: whether there is o.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        device, dtype: of the weights.

    Raises:
        ValueError: sizes that do not fit, or an option that this layer does not compute.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        lepe_kernel: int | None = 5,
        rope: bool = True,
        modulation: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, qk_norm=qk_norm, scale_norm=scale_norm)
        if rope and self.head_dim % 4:
            raise ValueError(
                f"rope=True needs a head_dim that 4 divides, but dim={dim} with num_heads={num_heads} makes it "
                f"{self.head_dim}."
            )
        if lepe_kernel is not None and (lepe_kernel < 1 or lepe_kernel % 2 == 0):
            raise ValueError(f"lepe_kernel={lepe_kernel} must be odd and positive, or None.")
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.rope = rope
        self.modulation = modulation
        self.qkvo = nn.Linear(dim, (3 + modulation) * dim, bias=qkv_bias, **options)
        self.lepe = (
            nn.Conv2d(dim, dim, lepe_kernel, padding=lepe_kernel // 2, groups=dim, **options)
            if lepe_kernel
            else None
        )
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **options)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: torch.Tensor,
        size: Size | None = None,
        rotary: Tables | None = None,
        token_mask: torch.Tensor | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        """Returns `[B, N, C]`.

        Args:
            x: tokens `[B, N, C]`.
            size: `(height, width)` of the map; without it the map is square.
            rotary: `axial_rotary(size, head_dim)` if it is at hand, as in a stage of many layers of one size.
            token_mask: boolean `[B, N]`, False for padding, which then changes no other token.
            attn_mask, is_causal: refused; timm's blocks pass them.
        """
        self.refuse_mask(attn_mask, is_causal)
        return self.proj_drop(self.proj(self.features(x, size, rotary, token_mask)))

    def features(
        self,
        x: torch.Tensor,
        size: Size | None = None,
        rotary: Tables | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns what the output projection reads, `[B, N, C]`."""
        size = map_size(x, size)
        cos, sin = self.tables(size, x, rotary)
        query, key, value, local, modulation = self.heads(x, size, token_mask)
        out = self.attend(query, key, value, local, modulation, cos, sin, token_mask)
        return out.transpose(1, 2).flatten(2)

    def tables(self, size: Size, x: torch.Tensor, rotary: Tables | None = None) -> Any:
        """Returns cos and sin, or None and None where nothing is rotated."""
        if not self.rope:
            return None, None
        return axial_rotary(size, self.head_dim, x.device, x.dtype) if rotary is None else rotary

    def heads(
        self, x: torch.Tensor, size: Size, token_mask: torch.Tensor | None = None
    ) -> list[torch.Tensor | None]:
        """Returns q, k, v, the local term and o, each `[B, H, N, head_dim]`, the last two None where there is none."""
        if token_mask is not None:
            x = x.masked_fill(~token_mask[..., None], 0.0)
        query, key, value, *modulation = self.qkvo(x).split(self.dim, dim=-1)
        local = None
        if self.lepe is not None:
            seen = value if token_mask is None else value.masked_fill(~token_mask[..., None], 0.0)
            local = to_tokens(self.lepe(to_map(seen, size)))[0]
        return [
            None if part is None else part.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for part in (query, key, value, local, modulation[0] if modulation else None)
        ]

    def attend(self, query, key, value, local, modulation, cos, sin, token_mask) -> torch.Tensor:
        """Returns `(A(q, k, v) + local) * modulation`, `[B, H, N, head_dim]`."""
        raise NotImplementedError

    def _updates(self) -> tuple[Any, ...]:
        from undivided.spec import Gate, Residual

        local = () if self.lepe is None else (Residual("local"),)
        return (*local, *((Gate("modulation"),) if self.modulation else ()))

    def _named(self, x: torch.Tensor, size: Size | None) -> tuple[dict[str, torch.Tensor], Any]:
        size = map_size(x, size)
        names = ("query", "key", "value", "local", "modulation")
        given = zip(names, self.heads(x, size), strict=True)
        return {name: tensor for name, tensor in given if tensor is not None}, self.tables(size, x)


class RankAugmentedLinearAttention(ModulatedAttention):
    """Linear attention over a map with weights of tokens in its buffer and a modulation of its output.

    `A_i = phi_R(q_i) S / (phi(q_i) . z + eps)`, `S = sum_j a_j phi_R(k_j)^T v_j`, `z = sum_j a_j phi(k_j)`,
    `a_j = softmax_j(D^-1/2 mean_i phi(q_i) . phi(k_j))`, `phi_R` the features rotated by row and column.

    The product with o raises the rank of the output. The weights a are there to raise that of S, of D x D numbers a
    head; with random projections they lower it (`rank_report` measures both).

    Args:
        feature_map: phi, one of `undivided.ops.linear.FEATURE_MAPS` but "identity".
        token_weight: whether tokens have the weights a; otherwise 1 / N each.
        eps: beside the denominator.
        Others as in `ModulatedAttention`.

    Raises:
        ValueError: sizes that do not fit, or an option that this layer does not compute.

    Source: Breaking the Low-Rank Dilemma of Linear Attention (arXiv 2411.07635) and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        lepe_kernel: int | None = 5,
        rope: bool = True,
        modulation: bool = True,
        feature_map: str = "elu1",
        token_weight: bool = True,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, num_heads, qkv_bias=qkv_bias, proj_bias=proj_bias, attn_drop=attn_drop, proj_drop=proj_drop,
            qk_norm=qk_norm, scale_norm=scale_norm, norm_layer=norm_layer, lepe_kernel=lepe_kernel, rope=rope,
            modulation=modulation, device=device, dtype=dtype,
        )  # fmt: skip
        allowed = [name for name in FEATURE_MAPS if name != "identity"]
        if feature_map not in allowed:
            raise ValueError(f"feature_map={feature_map!r} is not one of {', '.join(allowed)}.")
        self.feature_map = feature_map
        self.key_weight = "context" if token_weight else None
        self.eps = eps

    def attend(self, query, key, value, local, modulation, cos, sin, token_mask) -> torch.Tensor:
        return linear_attention(
            query, key, value, feature_map=self.feature_map, key_weight=self.key_weight, scale=self.scale,
            cos=cos, sin=sin, token_mask=token_mask, local=local, modulation=modulation, eps=self.eps,
        )  # fmt: skip

    def buffer(self, x: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """Returns S, `[B, H, head_dim, head_dim]`."""
        named, (cos, sin) = self._named(x, size)
        return key_value_buffer(
            named["query"], named["key"], named["value"], feature_map=self.feature_map,
            key_weight=self.key_weight, scale=self.scale, cos=cos, sin=sin,
        )  # fmt: skip

    @property
    def spec(self) -> AttentionSpec:
        """The operator in the language of `undivided.spec`: a signed kernel of features without an anchor.

        The denominator is a gate and not the anchor, because it is the row sum of another kernel, without rotations.
        """
        from undivided.spec import AttentionSpec, Chart, Dot, Evidence, Gate, Identity, NoAnchor, Raw

        return AttentionSpec(
            evidence=Evidence(chart=Chart((Dot(scale=1.0),)), link=Identity()),
            probe=Raw(),
            anchor=NoAnchor(),
            update=(Gate("normaliser"), *self._updates()),
        )

    def spec_inputs(self, x: torch.Tensor, size: Size | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads; queries and keys are features, rotated, keys with their weights."""
        named, (cos, sin) = self._named(x, size)
        query, key, value, share = parts(
            named["query"], named["key"], named["value"], self.feature_map, self.key_weight, self.scale, None
        )
        key = key * share[..., None]
        sums = (query * key.sum(-2, keepdim=True)).sum(-1)
        rotated = {"query": rotate(query, cos, sin), "key": rotate(key, cos, sin), "value": value}
        return {**named, **rotated, "normaliser": 1 / (sums + self.eps)}


class ModulatedSoftmaxAttention(ModulatedAttention):
    """The same layer around softmax attention: `A_i = sum_j softmax_j(D^-1/2 R q_i . R k_j) v_j`.

    Args and errors: as in `ModulatedAttention`.

    Source: Breaking the Low-Rank Dilemma of Linear Attention (arXiv 2411.07635), the authors' code for small maps.
    """

    def attend(self, query, key, value, local, modulation, cos, sin, token_mask) -> torch.Tensor:
        if self.rope:
            query, key = (rotate(x.to(cos.dtype), cos, sin).to(value.dtype) for x in (query, key))
        mask = None if token_mask is None else token_mask[:, None, None]
        out = dense_attention(query, key, value, scale=self.scale, attn_mask=mask)
        out = out if local is None else out + local
        return out if modulation is None else out * modulation

    @property
    def spec(self) -> AttentionSpec:
        """The operator in the language of `undivided.spec`."""
        from undivided.spec import AttentionSpec

        return AttentionSpec(update=self._updates())

    def spec_inputs(self, x: torch.Tensor, size: Size | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads; queries and keys are rotated."""
        named, (cos, sin) = self._named(x, size)
        return {**named, "query": rotate(named["query"], cos, sin), "key": rotate(named["key"], cos, sin)}


def axial_rotary(
    size: Size,
    head_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tables:
    """Returns cos and sin `[N, head_dim // 2]` of the angles of a map's tokens, in float32 or wider.

    Of the pairs of channels (0, 1), (2, 3), ... the first half turns by `row * f_p` and the second by `column * f_p`,
    `f_p = 10000^-(p / (P - 1))` for p of P = head_dim / 4, both ends included.

    Args:
        size: `(height, width)`.
        head_dim: a multiple of 4.
        device: of the tables.
        dtype: of the tokens.

    Source: arXiv 2411.07635, the authors' code.
    """
    wide = torch.promote_types(dtype, torch.float32)
    frequencies = 10000 ** -torch.linspace(0, 1, head_dim // 4, device=device, dtype=wide)
    rows, columns = (torch.arange(n, device=device, dtype=wide)[:, None] * frequencies for n in size)
    height, width = size
    angles = torch.cat(
        [rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1)], dim=-1
    ).flatten(0, 1)
    return angles.cos(), angles.sin()


class RankReport(NamedTuple):
    """Ranks of a layer's buffer S (None where there is none) and of its features, means over images (and heads).

    The numerical rank counts singular values above 1e-3 of the largest; the effective one is `exp(-sum p log p)` with p
    the singular values over their sum.
    """

    buffer_numerical: float | None
    buffer_effective: float | None
    output_numerical: float
    output_effective: float


@torch.no_grad()
def rank_report(layer: ModulatedAttention, x: torch.Tensor, size: Size | None = None) -> RankReport:
    """Measures the rank of the buffer, `head_dim x head_dim` a head, and of the features `[N, C]` before `proj`.

    Args:
        layer: one of the layers here.
        x: tokens `[B, N, C]`.
        size: `(height, width)` of the map; without it the map is square.

    Source: arXiv 2411.07635 (numerical rank); The Effective Rank (Roy and Vetterli, 2007).
    """
    has_buffer = isinstance(layer, RankAugmentedLinearAttention)
    buffer = _ranks(layer.buffer(x, size)) if has_buffer else (None, None)
    output = _ranks(layer.features(x, size))
    return RankReport(buffer[0], buffer[1], output[0], output[1])


def _ranks(matrices: torch.Tensor) -> tuple[float, float]:
    values = torch.linalg.svdvals(matrices.double())
    largest = values[..., :1]
    numerical = (values > 1e-3 * largest).double().sum(-1)
    shares = values / values.sum(-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny)
    effective = torch.special.entr(shares).sum(-1).exp()
    return numerical.mean().item(), effective.mean().item()
