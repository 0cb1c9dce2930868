"""SLA: an attention core for diffusion transformers, exact on a few blocks and linear on the others."""

from __future__ import annotations

import torch
from torch import nn

from undivided.ops.block_map import check_block_size
from undivided.ops.sparse_linear import FEATURE_MAPS, LINEAR_SCOPES, check_ratios, sparse_linear_attention

# variant -> share of negligible blocks and what the linear branch sees.
_VARIANTS: dict[str, tuple[float, str]] = {"paper": (0.10, "marginal"), "released": (0.0, "noncritical")}


class SparseLinearAttention(nn.Module):
    """The core of a bidirectional attention layer: queries, keys and values in, heads out.

    `out = O^s + O^l W^T + b`: softmax over the blocks whose pooled scores are highest, plus a learned projection of
    linear attention over the blocks between the highest and the lowest. With W = b = 0, as it is built, the output is
    block-sparse attention alone, and in the first step only W and b have a gradient from the linear branch; fine-tuning
    of a few thousand steps with the model's own loss makes up for what is left out.

    The map is chosen anew in every call and has no gradient. W is of one head's width and shared by all heads; it is
    kept in float32 and rounded to the type of the queries.

    Args:
        head_dim: width of queries and keys.
        topk: share of critical blocks of a row, at least one.
        bottomk: share of negligible blocks; None for that of `variant`.
        feature_map: "softmax", "elu1" or "relu".
        query_block_size: queries of a block.
        block_size: keys of a block.
        linear_scope: what the linear branch sees: "marginal", "noncritical" or "all"; None for that of `variant`.
        variant: "paper" (10 % negligible, the linear branch sees the marginal blocks) or "released" (none negligible,
            it sees all but the critical ones: the authors' code, branch SLA-1; "all" is their later branch, but for
            the 1e-5 that it adds to the denominator). Weights of one do not fit the other.
        value_dim: width of values; default `head_dim`.
        proj_init: "zero", or a factor: W = factor * identity, with which the linear branch learns from the first step.
        device: of the projection.
        backend: of `sparse_linear_attention`.

    Shape:
        `forward(query, key, value)`, each `[batch, heads, length, head_dim]` after norms and rotations, gives
        `[batch, heads, length, value_dim]`. Further keys and values, `additional_key` and `additional_value` of any
        length, such as a text's beside an image's, are critical to all queries.

    Raises:
        ValueError: an option that is not allowed.

    Source: SLA (arXiv 2509.24006), sections 4 and 5, and the authors' code.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        topk: float = 0.05,
        bottomk: float | None = None,
        feature_map: str = "softmax",
        query_block_size: int = 64,
        block_size: int = 64,
        linear_scope: str | None = None,
        variant: str = "paper",
        value_dim: int | None = None,
        proj_init: str | float = "zero",
        device: torch.device | str | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if variant not in _VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(_VARIANTS)}.")
        default_bottomk, default_scope = _VARIANTS[variant]
        self.topk = topk
        # Where little is left beside the critical blocks, nothing is negligible by default.
        self.bottomk = min(default_bottomk, max(1 - topk, 0)) if bottomk is None else bottomk
        check_ratios(self.topk, self.bottomk)
        self.feature_map = feature_map
        self.linear_scope = default_scope if linear_scope is None else linear_scope
        for name, value, allowed in (
            ("feature_map", feature_map, FEATURE_MAPS),
            ("linear_scope", self.linear_scope, LINEAR_SCOPES),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}.")
        check_block_size("query_block_size", query_block_size)
        check_block_size("block_size", block_size)
        self.query_block_size, self.block_size = query_block_size, block_size
        self.variant, self.backend = variant, backend
        if head_dim < 1:
            raise ValueError(f"head_dim={head_dim} must be at least 1.")
        width = head_dim if value_dim is None else value_dim
        self.head_dim = head_dim
        self.proj = nn.Linear(width, width, dtype=torch.float32, device=device)
        if not isinstance(proj_init, (int, float)) and proj_init != "zero":
            raise ValueError(f'proj_init={proj_init!r} must be "zero" or a factor of the identity.')
        with torch.no_grad():
            nn.init.zeros_(self.proj.bias)
            nn.init.zeros_(self.proj.weight)
            if proj_init != "zero":
                self.proj.weight.fill_diagonal_(float(proj_init))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        additional_key: torch.Tensor | None = None,
        additional_value: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if query.shape[-1] != self.head_dim:
            raise ValueError(
                f"query has head_dim {query.shape[-1]}; this layer was built for {self.head_dim}."
            )
        return sparse_linear_attention(
            query, key, value, self.proj.weight, self.proj.bias,
            topk=self.topk, bottomk=self.bottomk, feature_map=self.feature_map,
            query_block_size=self.query_block_size, block_size=self.block_size,
            linear_scope=self.linear_scope, additional_key=additional_key, additional_value=additional_value,
            backend=self.backend,
        )  # fmt: skip

    def load_official(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Loads the projection of the authors' module, `proj_l.weight` and `proj_l.bias`.

        Args:
            state_dict: of their `SparseLinearAttention`; it must have been trained with this layer's `linear_scope`.

        Raises:
            ValueError: names or shapes do not fit.
        """
        wanted = {"proj_l.weight", "proj_l.bias"}
        if set(state_dict) != wanted:
            raise ValueError(f"state_dict has {sorted(state_dict)}; it needs {sorted(wanted)}.")
        for name in ("weight", "bias"):
            own, given = getattr(self.proj, name), state_dict[f"proj_l.{name}"]
            if own.shape != given.shape:
                raise ValueError(
                    f"proj_l.{name} has shape {list(given.shape)}; this layer has {list(own.shape)}."
                )
            with torch.no_grad():
                own.copy_(given)

    def extra_repr(self) -> str:
        return (
            f"topk={self.topk}, bottomk={self.bottomk}, feature_map={self.feature_map}, "
            f"blocks={self.query_block_size}/{self.block_size}, linear_scope={self.linear_scope}"
        )
