"""Group generalised mean pooling: one vector of all tokens, with one learned exponent for each group of channels.

A reconstruction: no code of the authors is known, and two readings of the groups are in use (`group_order`). Decided
here: groups are contiguous, as heads are; exponents start at 3; the last norm comes behind the pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from undivided.layers._vision import to_tokens
from undivided.ops import generalised_mean

GROUP_ORDERS = ("contiguous", "strided")


def ggem(
    x: torch.Tensor,
    exponent: torch.Tensor,
    *,
    group_order: str = "contiguous",
    eps: float = 1e-6,
    mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Generalised mean of the tokens: `f_c = (1/N sum_i max(x_ic, eps)^p)^(1/p)` with the exponent p of c's group.

    Tokens are divided by the largest of their channel before the power, so that no exponent overflows or vanishes;
    everything is computed in float32 at least. Composed of PyTorch's operators the forward pass moves 32 bytes an
    element of x in float32 and 38 in bfloat16; the kernel that CUDA tensors get reads x once, 4 and 2 bytes.

    Args:
        x: tokens `[B, N, C]`, of a floating type.
        exponent: positive, `[G]` with G dividing C: one is GeM, C is one exponent a channel. At 1 the result is the
            mean of what is above eps, and it tends to the maximum as the exponent grows.
        group_order: "contiguous": channel c is of group `c // (C / G)`, as in concatenated heads; "strided": `c % G`.
        eps: least value of an entry; what is below has no gradient.
        mask: `[B, N]`, True for tokens that count; a row without any gives eps.
        backend: of `undivided.ops.generalised_mean`.

    Returns:
        `[B, C]`, of the type of x.

    Raises:
        TypeError: x or exponent is not floating, or mask not boolean.
        ValueError: shapes that do not fit, no tokens, eps not positive, or another `group_order`.

    Source: GGeM (arXiv 2212.04114); GeM (arXiv 1711.02512), section 3.2.
    """
    _check(x, exponent, group_order, eps, mask)
    repeats = x.shape[2] // exponent.numel()
    power = exponent.to(torch.promote_types(exponent.dtype, torch.float32))
    power = power.repeat_interleave(repeats) if group_order == "contiguous" else power.repeat(repeats)
    return generalised_mean(x, power, eps=eps, mask=mask, backend=backend)


def _check(
    x: torch.Tensor, exponent: torch.Tensor, group_order: str, eps: float, mask: torch.Tensor | None
) -> None:
    for name, tensor in (("x", x), ("exponent", exponent)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is of {tensor.dtype}; it must be of a floating type.")
    if x.dim() != 3:
        raise ValueError(f"x has shape {list(x.shape)}; it needs 3 axes, [batch, tokens, channels].")
    if x.shape[1] == 0:
        raise ValueError("x has no tokens; a mean needs one at least.")
    if exponent.dim() != 1 or exponent.numel() == 0 or x.shape[2] % exponent.numel():
        raise ValueError(
            f"exponent has shape {list(exponent.shape)}; it must be [groups] with groups that divide the "
            f"{x.shape[2]} channels of x."
        )
    if group_order not in GROUP_ORDERS:
        raise ValueError(f"group_order={group_order!r} is not one of {', '.join(map(repr, GROUP_ORDERS))}.")
    if eps <= 0:
        raise ValueError(f"eps={eps} must be positive.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask is of {mask.dtype}; it must be boolean, True for tokens that count.")
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"mask has shape {list(mask.shape)}; it must be {list(x.shape[:2])}, as x has it."
            )


class GGeMPool(nn.Module):
    """Pools tokens `[B, T, C]` or maps `[B, C, H, W]` to `[B, C]` by `ggem`, with exponents that are learned.

    Exponents are one-dimensional, which timm's optimisers do not decay; `undecayed` names them for others. Where the
    channels of x are centred, as behind a LayerNorm, about half of all entries are below eps and have no gradient:
    `dead_fraction` tells.

    Args:
        dim: channels C.
        num_groups: groups G, which divide C; as a rule the heads of the last block.
        exponent: where exponents start: one for all, or G of them.
        eps: least value of an entry.
        min_exponent: exponents below are taken as this one, and have no gradient then; `floored` counts them.
        learnable: whether exponents are a parameter; else a buffer.
        group_order: "contiguous" or "strided", see `ggem`.
        num_prefix_tokens: tokens in front that are no patches (class, registers) and are left out; maps have none.
        keepdim: give `[B, C, 1, 1]` of a map.
        device, dtype: of the exponents; float32 is best, also in a model of another type.

    Shape:
        `forward(x, mask=None)` gives `[B, C]`; mask `[B, T]` is True for tokens that count.

    Raises:
        ValueError: `num_groups` does not divide `dim`, exponents that are not positive or not as many, or a token
            sequence without patches.

    Source: GGeM (arXiv 2212.04114).
    """

    undecayed = ("exponent",)
    # What timm asks a pooling.
    pool_type = "ggem"

    def __init__(
        self,
        dim: int,
        num_groups: int,
        exponent: float | Sequence[float] = 3.0,
        *,
        eps: float = 1e-6,
        min_exponent: float = 0.05,
        learnable: bool = True,
        group_order: str = "contiguous",
        num_prefix_tokens: int = 0,
        keepdim: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if num_groups < 1 or dim % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide dim={dim}.")
        start = (
            [float(exponent)] * num_groups if isinstance(exponent, int | float) else [*map(float, exponent)]
        )
        if len(start) != num_groups:
            raise ValueError(f"exponent has {len(start)} entries, but num_groups is {num_groups}.")
        if min_exponent <= 0:
            raise ValueError(f"min_exponent={min_exponent} must be positive.")
        if min(start) < min_exponent:
            raise ValueError(f"exponent has {min(start)}; it must be min_exponent={min_exponent} or more.")
        if group_order not in GROUP_ORDERS:
            raise ValueError(
                f"group_order={group_order!r} is not one of {', '.join(map(repr, GROUP_ORDERS))}."
            )
        if eps <= 0:
            raise ValueError(f"eps={eps} must be positive.")
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens={num_prefix_tokens} must be 0 or more.")
        self.dim = dim
        self.num_groups = num_groups
        self.eps = eps
        self.min_exponent = min_exponent
        self.group_order = group_order
        self.num_prefix_tokens = num_prefix_tokens
        self.keepdim = keepdim
        values = torch.tensor(start, device=device, dtype=dtype)
        if learnable:
            self.exponent = nn.Parameter(values)
        else:
            self.register_buffer("exponent", values)

    @classmethod
    def gem(cls, dim: int, exponent: float = 3.0, **options: Any) -> GGeMPool:
        """Returns generalised mean pooling (arXiv 1711.02512): one exponent for all channels."""
        return cls(dim, 1, exponent, **options)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        is_map = x.dim() == 4
        tokens = self.patches(x)
        if mask is not None and not is_map:
            mask = mask[:, self.num_prefix_tokens :]
        exponent = self.exponent.clamp(min=self.min_exponent)
        out = ggem(tokens, exponent, group_order=self.group_order, eps=self.eps, mask=mask)
        return out[:, :, None, None] if is_map and self.keepdim else out

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the tokens `[B, N, C]` that are pooled."""
        if x.dim() == 4:
            tokens = to_tokens(x)[0]
        elif x.dim() == 3 and x.shape[1] > self.num_prefix_tokens:
            tokens = x[:, self.num_prefix_tokens :]
        elif x.dim() == 3:
            raise ValueError(
                f"x has {x.shape[1]} tokens, of which num_prefix_tokens={self.num_prefix_tokens} are no patches; "
                "nothing is left to pool."
            )
        else:
            raise ValueError(
                f"x has shape {list(x.shape)}; it must be tokens [batch, tokens, {self.dim}] or a map "
                f"[batch, {self.dim}, height, width]."
            )
        if tokens.shape[2] != self.dim:
            raise ValueError(f"x has {tokens.shape[2]} channels, but dim={self.dim}.")
        return tokens

    def feat_mult(self) -> int:
        """Returns how many numbers become of a channel, which timm's classifiers ask: 1."""
        return 1

    def is_identity(self) -> bool:
        """Returns whether it pools nothing, which timm's models ask: False."""
        return False

    @property
    def floored(self) -> int:
        """How many exponents are below `min_exponent`."""
        return int((self.exponent < self.min_exponent).sum())

    @torch.no_grad()
    def dead_fraction(self, x: torch.Tensor) -> float:
        """Returns the fraction of entries that are not above eps, and so have no gradient."""
        return (self.patches(x) <= self.eps).float().mean().item()

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, {self.num_groups}, group_order={self.group_order!r}, "
            f"num_prefix_tokens={self.num_prefix_tokens}"
        )


def replace_pool(
    model: nn.Module,
    num_groups: int | None = None,
    exponent: float | Sequence[float] = 3.0,
    *,
    eps: float = 1e-6,
    min_exponent: float = 0.05,
    group_order: str = "contiguous",
    norm: str = "post",
) -> GGeMPool:
    """Puts a `GGeMPool` in the place of a timm model's global pooling.

    A vision transformer gets it as `attn_pool`, timm's place for a pooling with parameters, and its `global_pool`
    becomes "map", the name of that place; a CNN, or a backbone of this library, in the place of its `global_pool`
    module. Do it behind `reset_classifier`, which makes such a module anew.

    Args:
        model: of timm; vision transformers, and models whose last map is `[B, C, H, W]`.
        num_groups: groups; default the heads of the model's last attention.
        exponent, eps, min_exponent, group_order: as in `GGeMPool`.
        norm: of a vision transformer: "post" pools the tokens of the last block and normalises the result, "pre"
            normalises first (then about half of all entries are below eps). The model's own last norm is moved,
            with its weights.

    Returns:
        The new pooling, which is part of the model.

    Raises:
        ValueError: the model has no such place, pools maps `[B, H, W, C]` or gives several numbers of a channel, or it
            has no attention to count heads of.

    Source: GGeM (arXiv 2212.04114).
    """
    from timm.models import Eva, VisionTransformer

    if norm not in ("post", "pre"):
        raise ValueError(f'norm={norm!r} must be "post" or "pre".')
    if num_groups is None:
        num_groups = _heads(model)
    here = next(model.parameters())

    def pool(keepdim: bool) -> GGeMPool:
        return GGeMPool(
            model.num_features, num_groups, exponent,
            eps=eps, min_exponent=min_exponent, group_order=group_order, keepdim=keepdim, device=here.device,
        ).train(model.training)  # fmt: skip

    if isinstance(model, VisionTransformer | Eva):
        return _replace_in_transformer(model, pool(keepdim=False), norm)
    owner = next(
        (part for part in (model, getattr(model, "head", None)) if _has_pool(part)),
        None,
    )
    if owner is None:
        raise ValueError(f"{type(model).__name__} has neither attn_pool nor a module global_pool to replace.")
    if getattr(owner, "input_fmt", "NCHW") != "NCHW":
        raise ValueError(
            f"{type(model).__name__} pools maps [batch, height, width, channels]; only NCHW can."
        )
    with torch.no_grad():
        pooled = owner.global_pool(torch.zeros(1, model.num_features, 2, 2, device=here.device))
    if pooled.shape[1] != model.num_features or pooled.numel() != model.num_features:
        raise ValueError(
            f"global_pool of {type(model).__name__} makes {list(pooled.shape[1:])} of {model.num_features} channels; "
            "it must pool each to one number."
        )
    owner.global_pool = pool(keepdim=pooled.dim() == 4)
    return owner.global_pool


def _replace_in_transformer(model: nn.Module, pool: GGeMPool, norm: str) -> GGeMPool:
    before = model.attn_pool
    model.attn_pool = pool
    seen: list[int] = []
    hook = pool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape[1]))
    patches, here = 4, next(model.parameters())
    tokens = torch.zeros(
        1, model.num_prefix_tokens + patches, model.num_features, device=here.device, dtype=here.dtype
    )
    try:
        with torch.no_grad():
            model.forward_head(tokens, pre_logits=True)
    finally:
        hook.remove()
    if not seen:
        model.attn_pool = before
        raise ValueError(
            f"{type(model).__name__} reads other tokens than those of attn_pool; it has a head of its own."
        )
    # Some models take the prefix off before they call it, others do not.
    pool.num_prefix_tokens = seen[0] - patches
    model.global_pool = "map"
    source, target = ("norm", "fc_norm") if norm == "post" else ("fc_norm", "norm")
    if isinstance(getattr(model, target), nn.Identity):
        setattr(model, target, getattr(model, source))
        setattr(model, source, nn.Identity())
    return pool


def _has_pool(part: nn.Module | None) -> bool:
    return isinstance(getattr(part, "global_pool", None), nn.Module)


def _heads(model: nn.Module) -> int:
    heads = [
        module.num_heads
        for name, module in model.named_modules()
        if isinstance(getattr(module, "num_heads", None), int) and not name.startswith("attn_pool")
    ]
    if not heads:
        raise ValueError(
            f"num_groups is needed: {type(model).__name__} has no attention whose heads could be counted."
        )
    return heads[-1]
