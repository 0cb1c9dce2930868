"""ViG's layer: gated linear attention over image tokens in both directions, beside a gate for local detail."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers._vision import Size, VisionAttention, map_size, to_map, to_tokens
from undivided.ops import gated_scan

VARIANTS = ("paper", "released")
# Of the uniform distribution of Glorot and Bengio, in all weights of the layer.
GAIN = 2**-2.5


class BidirectionalGatedLinearAttention(VisionAttention):
    """A scan from the first token and one from the last, mixed with a convolution, all of it linear in the tokens.

    With L the 3x3 depthwise convolution of the map, which everything below reads in place of x:
    `q, k, v = L W_qkv`; `log a, log b = logsigmoid(L W_1 W_2 + bias) / gate_normalizer`, a decay for each token, key
    channel and direction; o the mean of both scans (`undivided.ops.gated_scan`);
    `out = act(g * norm(o) + (1 - g) * norm(L)) W_o` with `g = sigmoid(L W_g + bias)` two RMSNorms a head wide.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide the widths of keys and values.
        expand_k: width of queries and keys over C. Values are as wide as the convolution, C.
        gate_rank: width between the two projections of the decays.
        gate_normalizer: divides the logarithms of the decays; larger ones remember longer.
        conv_act: SiLU after the convolution.
        out_act: SiLU before the last projection.
        norm_eps: of the RMSNorms.
        variant: "paper", or "released" for the authors' code of the plain models, which halves o once more when it
            evaluates; the norm hides it unless o is small.
        qkv_bias, proj_bias: whether the projections have a bias; the authors' have none.
        proj_drop: dropout of the output.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size=(height, width))` gives `[B, N, C]`; without `size` the map is square.

    Raises:
        ValueError: sizes that do not fit, or an option that this layer does not compute.

    Source: ViG (arXiv 2405.18425) and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        expand_k: float = 0.5,
        *,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        conv_act: bool = False,
        out_act: bool = False,
        norm_eps: float = 1e-6,
        variant: str = "paper",
        qkv_bias: bool = False,
        proj_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, qk_norm=qk_norm, scale_norm=scale_norm)
        self.key_dim = int(dim * expand_k)
        if self.key_dim < 1 or self.key_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide the width {self.key_dim} of keys, "
                f"expand_k={expand_k} of dim={dim}."
            )
        if gate_normalizer <= 0:
            raise ValueError(f"gate_normalizer={gate_normalizer} must be positive.")
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} must be one of {', '.join(map(repr, VARIANTS))}.")
        options = {"device": device, "dtype": dtype}
        self.scale = (self.key_dim // num_heads) ** -0.5
        self.gate_normalizer = gate_normalizer
        self.conv_act, self.out_act = conv_act, out_act
        self.variant = variant
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False, **options)
        self.qkv = nn.Linear(dim, 2 * self.key_dim + dim, bias=qkv_bias, **options)
        self.decay_down = nn.Linear(dim, gate_rank, bias=False, **options)
        self.decay_up = nn.Linear(gate_rank, 2 * self.key_dim, **options)
        self.gate = nn.Linear(dim, dim, **options)
        self.scan_norm = nn.RMSNorm(self.head_dim, eps=norm_eps, **options)
        self.local_norm = nn.RMSNorm(self.head_dim, eps=norm_eps, **options)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **options)
        self.proj_drop = nn.Dropout(proj_drop)
        self.initialise()

    def initialise(self) -> None:
        """Draws all weights as the authors do; biases are zero."""
        for module in (self.conv, self.qkv, self.decay_down, self.decay_up, self.gate, self.proj):
            nn.init.xavier_uniform_(module.weight, gain=GAIN)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        x: torch.Tensor,
        size: Size | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        self.refuse_mask(attn_mask, is_causal)
        local = self.local(x, size)
        query, key, value, forward_gate, reverse_gate = self.heads(local)
        scanned: torch.Tensor = gated_scan(
            query, key, value, forward_gate, reverse_log_gate=reverse_gate, scale=self.scale
        )
        if self.variant == "released" and not self.training:
            scanned = scanned / 2
        return self.proj_drop(self.mix(local, scanned))

    def local(self, x: torch.Tensor, size: Size | None = None) -> torch.Tensor:
        """Returns the convolution L of tokens `[B, N, C]`, likewise."""
        local = self.conv(to_map(x, map_size(x, size)))
        return to_tokens(F.silu(local) if self.conv_act else local)[0]

    def heads(self, local: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns queries, keys, values and the logarithms of the decays of both directions, `[B, H, N, width]`."""
        widths = [self.key_dim, self.key_dim, self.dim]
        decays = self.decay_up(self.decay_down(local))
        # In float32 at least: they are added up over many tokens.
        decays = decays.to(torch.promote_types(decays.dtype, torch.float32))
        decays = F.logsigmoid(decays) / self.gate_normalizer
        parts = (*self.qkv(local).split(widths, -1), *decays.chunk(2, -1))
        return tuple(part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)

    def mix(self, local: torch.Tensor, scanned: torch.Tensor) -> torch.Tensor:
        """Returns the projected mixture of the scans `[B, H, N, head_dim]` with L, `[B, N, C]`."""
        heads = (self.num_heads, self.head_dim)
        gate = torch.sigmoid(self.gate(local)).unflatten(-1, heads)
        # Under autocast both are narrower than the weights of the norms, which torch warns of.
        dtype = self.scan_norm.weight.dtype
        local = self.local_norm(local.unflatten(-1, heads).to(dtype))
        scanned = self.scan_norm(scanned.transpose(1, 2).to(dtype))
        # g * scanned + (1 - g) * local in one pass over the tokens.
        out = torch.lerp(local, scanned, gate.to(dtype)).flatten(2)
        return self.proj(F.silu(out) if self.out_act else out)
