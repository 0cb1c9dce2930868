"""MSA-Conv, attention with the support of a convolution, and TiC's two ways to see further: shifts and pooling.

The operator is the authors'. Their code has neither the shifts nor the pooling, and only an early block: `CyclicShift`,
`InterPool` and the network of `undivided.models.vision.tic` are a reconstruction from the paper's abstract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers._vision import Size, VisionAttention, map_size, to_map, to_tokens
from undivided.ops.msa_conv import checked_kernel, msa_conv_attention

if TYPE_CHECKING:
    from undivided.spec import AttentionSpec

# Where a group of channels moves: rows, columns.
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (0, -1),
    "right": (0, 1),
    "up": (-1, 0),
    "down": (1, 0),
    "up left": (-1, -1),
    "up right": (-1, 1),
    "down left": (1, -1),
    "down right": (1, 1),
}
FOUR = ("left", "right", "up", "down")


class CyclicShift(nn.Module):
    """Rolls equal groups of channels of a map, each in its direction and with wrap-around.

    A token then stands at a place together with channels of tokens that are `shift` away on all sides; what leaves the
    map comes in on the other side, so that opposite borders meet.

    Args:
        directions: names of `DIRECTIONS`, one a group of channels.
        shift: places; "half" for half of each axis.

    Shape:
        `forward(x [B, C, H, W])` gives `[B, C, H, W]`; `inverse` undoes it.

    Raises:
        ValueError: an unknown direction, none, or a negative shift.

    Source: a reconstruction of the multi-directional cyclic shifted mechanism of TiC (arXiv 2310.04134, abstract).
    """

    def __init__(self, directions: Sequence[str] = FOUR, shift: int | str = "half") -> None:
        super().__init__()
        unknown = [name for name in directions if name not in DIRECTIONS]
        if unknown or not directions:
            raise ValueError(
                f"directions={tuple(directions)} must be some of {', '.join(map(repr, DIRECTIONS))}."
            )
        if not (shift == "half" or (isinstance(shift, int) and shift >= 0)):
            raise ValueError(f'shift={shift!r} must be 0 or more, or "half".')
        self.directions = tuple(directions)
        self.shift = shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._roll(x, 1)

    def inverse(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the map as it was before `forward`."""
        return self._roll(x, -1)

    def _roll(self, x: torch.Tensor, sign: int) -> torch.Tensor:
        if self.shift == 0:
            return x
        far = [length // 2 if self.shift == "half" else int(self.shift) for length in x.shape[2:]]
        parts = x.tensor_split(len(self.directions), dim=1)
        rolled = []
        for part, name in zip(parts, self.directions, strict=True):
            rows, columns = DIRECTIONS[name]
            rolled.append(part.roll((sign * rows * far[0], sign * columns * far[1]), dims=(2, 3)))
        return torch.cat(rolled, dim=1)


class MSAConv(VisionAttention):
    """Attention of each token to the taps of a kernel around it, in the place of timm's attention.

    `out_i = W_o concat_h(sum_a softmax_a(scale * q_i . k_(i+a)) v_(i+a))` with the taps a of the kernel; queries, keys
    and values are 1 x 1 convolutions. With `border="zero"` taps beyond the map are zero vectors that stay in the
    softmax, so outputs near the border are smaller. Nothing depends on the size of the map, and there is no position:
    within a window the order of the neighbours does not matter.

    `num_heads=1` and no `output_proj` is the authors' operator, `dilation` above 1 the dilated form, `num_heads=dim`
    the depthwise one, in which each channel attends by itself, and `grouped` the one in which a head's queries, keys
    and values are made from its own channels alone. `qkv` and `proj` are named and shaped as in timm's
    attention, whose weights can be loaded: only the support is another. (The authors' layer drops 10 % of the weights
    in training; the fused kernels do not.)

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        kernel_size: taps of rows and columns, or one number; odd.
        dilation: places from tap to tap.
        border: "zero" (the authors'), "mask" or "circular".
        scale: factor of the products; default `head_dim ** -0.5`.
        shift: places by which groups of channels are rolled in four directions before the projections, and back
            after attention; "half" of the map, or 0 for none.
        directions: of the groups of channels that are rolled; names of `DIRECTIONS`.
        kv_pool: keys and values are averages of so many by so many tokens, and the window is one of averages.
        grouped: as above; `qkv` is a convolution of one tap in `num_heads` groups then.
        qkv_bias, proj_bias: whether the projections have a bias.
        output_proj: whether there is an output projection.
        proj_drop: dropout of the output.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size=(height, width))` gives `[B, N, C]`; without `size` the map is square.

    Raises:
        ValueError: sizes that do not fit, an even kernel, an unknown border, or an option that is not computed.

    Source: TiC (arXiv 2310.04134) and the authors' operator; `shift` and `kv_pool` are a reconstruction.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int | Size = 7,
        *,
        dilation: int | Size = 1,
        border: str = "zero",
        scale: float | None = None,
        shift: int | str = 0,
        directions: Sequence[str] = FOUR,
        kv_pool: int = 1,
        grouped: bool = False,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        output_proj: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, qk_norm=qk_norm, scale_norm=scale_norm)
        self.kernel_size, self.dilation = checked_kernel(kernel_size, dilation, border)
        if kv_pool < 1:
            raise ValueError(f"kv_pool={kv_pool} must be at least 1.")
        self.border = border
        self.scale = self.scale if scale is None else scale
        self.shift = CyclicShift(directions, shift)
        self.kv_pool = kv_pool
        self.qkv = (
            nn.Conv1d(dim, 3 * dim, 1, groups=num_heads, bias=qkv_bias, device=device, dtype=dtype)
            if grouped
            else nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        )
        self.proj = (
            nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype) if output_proj else nn.Identity()
        )
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        x: torch.Tensor,
        size: Size | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
    ) -> torch.Tensor:
        self.refuse_mask(attn_mask, is_causal)
        size = map_size(x, size)
        if self.shift.shift != 0:
            x = to_tokens(self.shift(to_map(x, size)))[0]
        query, key, value = (part.unflatten(2, size) for part in self.heads(x))
        out = self.attend(query, key, value).flatten(2, 3).transpose(1, 2).flatten(2)
        if self.shift.shift != 0:
            out = to_tokens(self.shift.inverse(to_map(out, size)))[0]
        return self.proj_drop(self.proj(out))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns query, key and value of tokens `[B, N, C]`, each `[B, H, N, head_dim]`."""
        if isinstance(self.qkv, nn.Conv1d):
            # What a head makes of its channels stands together.
            own = self.qkv(x.transpose(1, 2)).unflatten(1, (self.num_heads, 3, self.head_dim))
            return own.permute(2, 0, 1, 4, 3).unbind(0)
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Returns the attention of maps `[B, H, height, width, head_dim]`, before the output projection."""
        options: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "dilation": self.dilation,
            "border": self.border,
        }
        if self.kv_pool == 1:
            return cast(torch.Tensor, msa_conv_attention(query, key, value, scale=self.scale, **options))
        pool, heads, (height, width) = self.kv_pool, self.num_heads, query.shape[2:4]
        key, value = (_averaged(part, pool) for part in (key, value))
        rows, columns = key.shape[2:4]
        query = F.pad(query, (0, 0, 0, columns * pool - width, 0, rows * pool - height))
        # The queries of one place of a cell have one window each: each place is a map as large as that of the keys.
        query = query.unflatten(3, (columns, pool)).unflatten(2, (rows, pool)).permute(0, 3, 5, 1, 2, 4, 6)
        key, value = (part.repeat(1, pool**2, 1, 1, 1) for part in (key, value))
        out = cast(
            torch.Tensor, msa_conv_attention(query.flatten(1, 3), key, value, scale=self.scale, **options)
        )
        out = out.unflatten(1, (pool, pool, heads)).permute(0, 3, 4, 1, 5, 2, 6).flatten(4, 5).flatten(2, 3)
        return out[:, :, :height, :width]

    @property
    def spec(self) -> AttentionSpec:
        """The operator between the projections, as a specification; zeros beyond the map are none of its tokens.

        Raises:
            ValueError: `border` is not "mask", or keys are pooled.
        """
        from undivided.spec.systems import neighborhood

        if self.border != "mask" or self.kv_pool != 1:
            raise ValueError(
                f'border="{self.border}" with kv_pool={self.kv_pool} has no specification; "mask" with 1 has.'
            )
        return neighborhood()

    def spec_inputs(self, hidden_states: torch.Tensor, size: Size | None = None) -> dict[str, torch.Tensor]:
        """Returns the tensors that `spec` reads; `neighborhood` is the mask of the whole map."""
        size = map_size(hidden_states, size)
        if self.shift.shift != 0:
            hidden_states = to_tokens(self.shift(to_map(hidden_states, size)))[0]
        query, key, value = self.heads(hidden_states)
        near = []
        for length, kernel, step in zip(size, self.kernel_size, self.dilation, strict=True):
            place = torch.arange(length, device=query.device)
            far = place[None] - place[:, None]
            near.append((far.abs() <= kernel // 2 * step) & (far % step == 0))
        mask = near[0][:, None, :, None] & near[1][None, :, None, :]
        return {"query": query, "key": key, "value": value, "neighborhood": mask.flatten(2, 3).flatten(0, 1)}


def _averaged(x: torch.Tensor, pool: int) -> torch.Tensor:
    """Returns the means of cells of a map `[B, H, height, width, D]`; a cell that is cut counts what it has."""
    heads = x.shape[1]
    cells = F.avg_pool2d(x.movedim(-1, 2).flatten(1, 2), pool, ceil_mode=True)
    return cells.unflatten(1, (heads, -1)).movedim(2, -1)


class MSAConv2d(MSAConv):
    """`MSAConv` of maps, with one head and without an output projection by default: the authors' operator.

    Args and errors: as in `MSAConv`.

    Shape:
        `forward(x [B, C, H, W])` gives `[B, C, H, W]`.

    Source: TiC (arXiv 2310.04134) and the authors' operator.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int | Size = 7,
        num_heads: int = 1,
        *,
        dilation: int | Size = 1,
        border: str = "zero",
        scale: float | None = None,
        shift: int | str = 0,
        directions: Sequence[str] = FOUR,
        kv_pool: int = 1,
        grouped: bool = False,
        qkv_bias: bool = True,
        output_proj: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, num_heads, kernel_size, dilation=dilation, border=border, scale=scale, shift=shift,
            directions=directions, kv_pool=kv_pool, grouped=grouped, qkv_bias=qkv_bias, output_proj=output_proj,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        if x.dim() != 4 or x.shape[1] != self.dim:
            raise ValueError(f"x has shape {list(x.shape)}; it must be [batch, {self.dim}, height, width].")
        tokens, size = to_tokens(x)
        return to_map(super().forward(tokens, size), size)


class MSAConvBlock(nn.Module):
    """The authors' early block: `ReLU(conv(x + MSAConv(x)))`, the convolution without a bias.

    Their in-place sum and in-place ReLU are written out of place here: the values are the same.

    Args:
        in_channels, out_channels: channels before and after.
        kernel_size: of both; odd.
        stride, padding: of the convolution.
        dilation: of the attention.

    Shape:
        `forward(x [B, C, H, W])`.

    Source: the authors' code of TiC (arXiv 2310.04134).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Size = 7,
        *,
        stride: int = 1,
        padding: int = 1,
        dilation: int | Size = 1,
    ) -> None:
        super().__init__()
        self.attn = MSAConv2d(in_channels, kernel_size, dilation=dilation)
        self.conv = nn.Conv2d(
            in_channels, out_channels, self.attn.kernel_size, stride=stride, padding=padding, bias=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x + self.attn(x)))

    def load_official(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Loads the weights of the authors' `MSA_Conv_2d`.

        Raises:
            ValueError: other names.
        """
        names = {
            "qkv_conv.weight": "attn.qkv.weight",
            "qkv_conv.bias": "attn.qkv.bias",
            "mlp.weight": "conv.weight",
        }
        if set(state_dict) != set(names):
            raise ValueError(f"state_dict has {sorted(state_dict)}; the authors' block has {sorted(names)}.")
        renamed = {names[key]: value for key, value in state_dict.items()}
        renamed["attn.qkv.weight"] = renamed["attn.qkv.weight"].flatten(1)
        self.load_state_dict(renamed)


class InterPool(nn.Module):
    """Lets tokens see further through a coarse map: `x + upsample(MSAConv(norm(pool(x))))`.

    Args:
        dim: width C of a token.
        num_heads: they divide `dim`.
        kernel_size: taps on the coarse map.
        ratio: places that are averaged along each axis.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C], size)` gives `[B, N, C]`.

    Raises:
        ValueError: a ratio below 2.

    Source: a reconstruction of the inter-pooling mechanism of TiC (arXiv 2310.04134, abstract).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Size = 7,
        ratio: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if ratio < 2:
            raise ValueError(f"ratio={ratio} must be at least 2.")
        self.ratio = ratio
        self.norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = MSAConv(dim, num_heads, kernel_size, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        size = map_size(x, size)
        coarse, coarse_size = to_tokens(F.avg_pool2d(to_map(x, size), self.ratio, ceil_mode=True))
        coarse = to_map(self.attn(self.norm(coarse), coarse_size), coarse_size)
        fine = coarse.repeat_interleave(self.ratio, 2).repeat_interleave(self.ratio, 3)
        return x + to_tokens(fine[:, :, : size[0], : size[1]])[0]
