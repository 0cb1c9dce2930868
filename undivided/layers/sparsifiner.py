"""Sparsifiner: a light predictor says, head by head, which keys each query of an image attends to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from undivided.layers._vision import VisionAttention
from undivided.ops import dense_attention, listed_attention
from undivided.ops.block_map import select_topk
from undivided.ops.block_map.select import kernels_choose

PHASES = ("dense", "reconstruct", "sparse", "joint")
IMPLEMENTATIONS = ("masked", "gather", "block")


@dataclass(frozen=True)
class Connectivity:
    """Which keys the queries of the patches attend to; the class token attends to all.

    Args:
        indices: keys of each query but the class token's, int32 or int64 `[B, H, N - 1, b]`, ascending; None where
            every query has another number of them.
        approximation: the predicted map, `[B, H, N - 1, N]`.
        seen: in the place of `indices`, the boolean map `[B, H, N - 1, N]`.
    """

    indices: torch.Tensor | None
    approximation: torch.Tensor
    seen: torch.Tensor | None = None

    def mask(self) -> torch.Tensor:
        """Returns the boolean `[B, H, N, N]`, True where a query attends to a key."""
        seen = self.seen
        if self.indices is not None:
            empty = torch.zeros_like(self.approximation, dtype=torch.bool)
            seen = empty.scatter_(-1, self.indices.long(), True)
        return F.pad(seen, (0, 0, 1, 0), value=True)


class ConnectivityPredictor(nn.Module):
    """Predicts an attention map of low rank, and takes its largest entries.

    With `q' = W_q q`, `k' = W_k k` of width c and K basis rows: `P = softmax_K(scale * q' (k'^T D))` and
    `approximation = P U^T`. Phase "reconstruct" uses it as it is. Otherwise the basis is `|U|` with entries up to
    `basis_threshold` set to 0, and P keeps its `coef_topk` largest entries of a row, unchanged, or with
    `coef_threshold` those above it: a product of two sparse matrices. The b = ceil(keep * N) largest entries of a row
    are its keys; of equal entries, the first. With `score_threshold` all entries above it are, few or many, or none.

    It is computed in float32 at least, and of a fixed number of tokens: the class token and N - 1 patches.

    Args:
        head_dim: width D of a head.
        num_heads: H.
        num_tokens: N, with the class token.
        reduce_n: K is `num_tokens // reduce_n`.
        reduce_c: c is `head_dim // reduce_c`.
        keep: share of the keys that a query keeps.
        basis_threshold, coef_topk, coef_threshold, score_threshold: as above; the authors' alternatives are 5e-2 and
            1e-4.
        scale: of the logits of P; default `num_heads ** -0.5`, as in the authors' code (not the width of a head).
        share_basis: U is D.
        device, dtype: of the weights.

    Shape:
        `forward(query, key [B, H, N, D], token_mask [B, N - 1] or None, phase, num_alive)` gives a `Connectivity`.
        `token_mask` is True for patches in use; every image has as many, `num_alive`, and b is at most that.

    Raises:
        ValueError: sizes that do not fit, a share that is not in (0, 1], or an unknown phase.

    Source: Sparsifiner (arXiv 2303.13755), section 3, and the authors' code.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_tokens: int,
        *,
        reduce_n: int = 6,
        reduce_c: int = 2,
        keep: float = 0.25,
        basis_threshold: float = 2e-2,
        coef_topk: int = 8,
        coef_threshold: float | None = None,
        score_threshold: float | None = None,
        scale: float | None = None,
        share_basis: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduce_c < 1 or head_dim % reduce_c:
            raise ValueError(f"reduce_c={reduce_c} does not divide head_dim={head_dim}.")
        rank = num_tokens // reduce_n if reduce_n >= 1 else 0
        if rank < 1:
            raise ValueError(
                f"reduce_n={reduce_n} leaves no basis of num_tokens={num_tokens}; use 1 to {num_tokens}."
            )
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep} must be above 0 and at most 1.")
        if coef_topk < 1:
            raise ValueError(f"coef_topk={coef_topk} must be at least 1.")
        self.num_tokens, self.keep = num_tokens, keep
        self.basis_threshold, self.coef_topk = basis_threshold, min(coef_topk, rank)
        self.coef_threshold, self.score_threshold = coef_threshold, score_threshold
        self.scale = num_heads**-0.5 if scale is None else scale
        self.q = nn.Linear(head_dim, head_dim // reduce_c, device=device, dtype=dtype)
        self.k = nn.Linear(head_dim, head_dim // reduce_c, device=device, dtype=dtype)
        self.down = nn.Parameter(torch.empty(num_tokens, rank, device=device, dtype=dtype))
        self.up = (
            self.down
            if share_basis
            else nn.Parameter(torch.empty(num_tokens, rank, device=device, dtype=dtype))
        )
        for weight in (self.q.weight, self.k.weight, self.down, self.up):
            nn.init.trunc_normal_(weight, std=0.02)
        for bias in (self.q.bias, self.k.bias):
            nn.init.zeros_(bias)

    @property
    def budget(self) -> int:
        """Keys b of a query."""
        return math.ceil(self.keep * self.num_tokens)

    def basis(self, phase: str = "sparse") -> torch.Tensor:
        """Returns the basis `[N, K]` as the phase uses it."""
        if phase == "reconstruct":
            return self.up
        positive = self.up.abs()
        return positive.masked_fill(positive <= self.basis_threshold, 0.0)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        phase: str = "sparse",
        num_alive: int | None = None,
    ) -> Connectivity:
        if query.shape[2] != self.num_tokens:
            raise ValueError(
                f"query has {query.shape[2]} tokens, but the predictor is of {self.num_tokens}: its basis is of one "
                "image size."
            )
        if phase not in PHASES:
            raise ValueError(f"phase={phase!r} is not one of {', '.join(map(repr, PHASES))}.")
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            q, k = (
                F.linear(x.to(dtype), layer.weight.to(dtype), layer.bias.to(dtype))
                for x, layer in ((query, self.q), (key, self.k))
            )
            if token_mask is not None:
                alive = F.pad(token_mask, (1, 0), value=True)[:, None, :, None]
                q, k = q.masked_fill(~alive, 0.0), k.masked_fill(~alive, 0.0)
            logits = q[:, :, 1:] @ (k.transpose(-2, -1) @ self.down.to(dtype))
            weights = (self.scale * logits).softmax(-1)
            if phase != "reconstruct" and self.coef_threshold is not None:
                weights = weights.masked_fill(weights <= self.coef_threshold, 0.0)
            elif phase != "reconstruct":
                chosen = first_largest(weights.detach(), self.coef_topk).long()
                weights = torch.zeros_like(weights).scatter(-1, chosen, weights.gather(-1, chosen))
            approximation = weights @ self.basis(phase).to(dtype).T
        scores = approximation.detach()
        if token_mask is not None:
            dead = ~F.pad(token_mask, (1, 0), value=True)
            scores = scores.masked_fill(dead[:, None, None], float("-inf"))
        if self.score_threshold is not None:
            return Connectivity(None, approximation, scores > self.score_threshold)
        return Connectivity(self._largest(scores, token_mask, num_alive), approximation)

    def _largest(
        self, scores: torch.Tensor, token_mask: torch.Tensor | None, num_alive: int | None
    ) -> torch.Tensor:
        budget = self.budget
        if token_mask is not None:
            # Asking the mask waits for the device; layers that pruned it know.
            budget = min(budget, int(token_mask[0].sum()) if num_alive is None else num_alive)
        return first_largest(scores, budget)


def first_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the places of the `count` largest entries of each row of `[B, H, rows, N]`, of equal ones the first.

    They are ascending. Rows have many entries of exactly 0, among which `topk` chooses differently on every device.
    """
    if kernels_choose(scores):
        # A row of NaN chooses nothing: its list is filled up with the first key, so that no list leaves the row.
        return select_topk(scores, count).index.clamp(min=0)
    if scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
    # Bits of a float32 as integers rise with it; below zero they fall. With the place behind them all are different.
    # Adding 0 makes a negative zero positive.
    bits = (scores + 0.0).contiguous().view(torch.int32)
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    place = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    return (bits * 2**31 + place).topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


class AliveTokens:
    """What layers of one model share when tokens are pruned: the patches in use, `[B, N - 1]` or None, and how many."""

    def __init__(self) -> None:
        self.mask: torch.Tensor | None = None
        self.count: int | None = None


class SparsifinerAttention(VisionAttention):
    """Attention of image tokens to predicted keys, in the place of timm's attention.

    `out_n = sum_(m in M(n)) softmax_m(scale * q_n . k_m) v_m`, with the set M(n) of `ConnectivityPredictor`, by head;
    the class token attends to all. No gradient passes through the choice. In phase "reconstruct" attention is dense
    and `reconstruction_error` is the sum of squares between the predicted map and its own; in "joint" it is sparse, and
    the error that of the map by which keys are chosen; in "dense" it is the attention it was made from.

    Args:
        dim: width C of a token.
        num_heads: heads H; they divide `dim`.
        num_tokens: N, with the class token.
        keep, reduce_n, reduce_c, basis_threshold, coef_topk, coef_threshold, score_threshold, predictor_scale,
            share_basis: of the predictor.
        impl: "masked" computes all pairs and masks them; "gather" reads the lists, row by row; "block" leaves out
            tiles of pairs that no list names and masks inside the others (FlexAttention; not in the paper).
        tokens: shared by the layers of a model whose tokens are pruned.
        tokens_kept: patches that stay in use after this layer; None keeps all.
        qkv_bias, proj_bias: whether the projections have a bias.
        proj_drop: dropout of the output.
        attn_drop, qk_norm, scale_norm: refused unless off; timm's blocks pass them.
        norm_layer: not used; timm's blocks pass it.
        device, dtype: of the weights.

    Shape:
        `forward(x [B, N, C])` gives `[B, N, C]`.

    Raises:
        ValueError: sizes that do not fit, another number of tokens, or an option that is not computed.

    Source: Sparsifiner (arXiv 2303.13755), section 3, and the authors' code.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_tokens: int = 197,
        *,
        keep: float = 0.25,
        reduce_n: int = 6,
        reduce_c: int = 2,
        basis_threshold: float = 2e-2,
        coef_topk: int = 8,
        coef_threshold: float | None = None,
        score_threshold: float | None = None,
        predictor_scale: float | None = None,
        share_basis: bool = False,
        impl: str = "masked",
        tokens: AliveTokens | None = None,
        tokens_kept: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        qk_norm: bool = False,
        scale_norm: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, attn_drop=attn_drop, qk_norm=qk_norm, scale_norm=scale_norm)
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl={impl!r} is not one of {', '.join(map(repr, IMPLEMENTATIONS))}.")
        if impl == "gather" and score_threshold is not None:
            raise ValueError(
                f'impl="gather" reads lists of one length, which score_threshold={score_threshold} does not give; use '
                '"masked" or "block".'
            )
        self.impl, self.phase = impl, "sparse"
        self.tokens, self.tokens_kept = tokens, tokens_kept
        self.reconstruction_error: torch.Tensor | None = None
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.predictor = ConnectivityPredictor(
            self.head_dim, num_heads, num_tokens, reduce_n=reduce_n, reduce_c=reduce_c, keep=keep,
            basis_threshold=basis_threshold, coef_topk=coef_topk, coef_threshold=coef_threshold,
            score_threshold=score_threshold, scale=predictor_scale, share_basis=share_basis, device=device, dtype=dtype,
        )  # fmt: skip

    def forward(
        self, x: torch.Tensor, *, attn_mask: torch.Tensor | None = None, is_causal: bool = False
    ) -> torch.Tensor:
        self.refuse_mask(attn_mask, is_causal)
        query, key, value = self.heads(x)
        is_sparse = self.phase in ("sparse", "joint")
        alive = self.tokens.mask if self.tokens is not None and is_sparse else None
        if alive is not None:
            used = F.pad(alive, (1, 0), value=True)[:, None, :, None]
            query, key, value = (part.masked_fill(~used, 0.0) for part in (query, key, value))
        if self.phase == "reconstruct":
            out = self._reconstruct(query, key, value)
        elif self.phase == "dense":
            out = dense_attention(query, key, value, scale=self.scale)
        else:
            found = self._predict(query, key, alive)
            out = self.attend(query, key, value, found)
            if self.phase == "joint":
                self.reconstruction_error = self._error(found.approximation, self._weights(query, key))
            if self.tokens is not None and self.tokens_kept is not None:
                self.tokens.mask = self._chosen(query, key, alive)
                self.tokens.count = self.tokens_kept
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns query, key and value of tokens `[B, N, C]`, each `[B, H, N, head_dim]`."""
        parts = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return parts.permute(2, 0, 3, 1, 4).unbind(0)

    def _predict(self, query: torch.Tensor, key: torch.Tensor, alive: torch.Tensor | None) -> Connectivity:
        if alive is None or self.tokens is None:
            return cast(Connectivity, self.predictor(query.detach(), key.detach()))
        return cast(
            Connectivity, self.predictor(query.detach(), key.detach(), alive, num_alive=self.tokens.count)
        )

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, connectivity: Connectivity
    ) -> torch.Tensor:
        """Returns the attention `[B, H, N, head_dim]` to chosen keys, by `impl`."""
        if self.impl == "gather" and connectivity.indices is not None:
            first = cast(torch.Tensor, dense_attention(query[:, :, :1], key, value, scale=self.scale))
            rest = listed_attention(query[:, :, 1:], key, value, connectivity.indices, scale=self.scale)
            return torch.cat([first, rest], dim=2)
        backend = "flex" if self.impl == "block" else "auto"
        return cast(
            torch.Tensor,
            dense_attention(
                query, key, value, attn_mask=connectivity.mask(), scale=self.scale, backend=backend
            ),
        )

    def _reconstruct(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weights = self._weights(query, key)
        predicted = self.predictor(query.detach(), key.detach(), phase="reconstruct").approximation
        self.reconstruction_error = self._error(predicted, weights)
        return weights.to(value.dtype) @ value

    def _weights(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Returns the weights of dense attention, in float32 at least."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        return (self.scale * (query.to(dtype) @ key.to(dtype).transpose(-2, -1))).softmax(-1)

    def _error(self, predicted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (predicted - weights[:, :, 1:]).square().sum()

    def _chosen(self, query: torch.Tensor, key: torch.Tensor, alive: torch.Tensor | None) -> torch.Tensor:
        """Returns the patches, `[B, N - 1]`, that the class token attends to most, of those in use."""
        logits = self.scale * (query[:, :, :1].float() @ key.float().transpose(-2, -1))
        score = logits.softmax(-1)[:, :, 0, 1:].mean(1)
        if alive is not None:
            score = score.masked_fill(~alive, float("-inf"))
        order = score.sort(dim=-1, descending=True, stable=True).indices[:, : self.tokens_kept]
        return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


@dataclass(frozen=True)
class AttentionCost:
    """Multiply-adds of the two products of attention of one layer, and of what stands in their place.

    Args:
        dense: queries with all keys, and weights with all values.
        predictor: projections, the low-rank map, and the product of the sparse matrices.
        core: queries with chosen keys, and weights with their values.
    """

    dense: int
    predictor: int
    core: int

    @property
    def saving(self) -> float:
        """Share of the dense products that is saved; projections of queries, keys and values are in neither."""
        return 1 - (self.predictor + self.core) / self.dense


def attention_cost(
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    kept: int,
    *,
    reduce_n: int = 6,
    reduce_c: int = 2,
    coef_topk: int = 8,
    density: float = 1.0,
) -> AttentionCost:
    """Returns the multiply-adds of one layer.

    Args:
        num_tokens: N.
        num_heads: H.
        head_dim: D.
        kept: keys b of a query.
        reduce_n, reduce_c, coef_topk: of the predictor.
        density: share of the basis that is not 0.
    """
    rank, width = num_tokens // reduce_n, head_dim // reduce_c
    tokens = num_heads * num_tokens
    predictor = 2 * tokens * head_dim * width + 2 * tokens * width * rank
    predictor += round(min(coef_topk, rank) * tokens * num_tokens * density)
    return AttentionCost(2 * tokens * num_tokens * head_dim, predictor, 2 * tokens * kept * head_dim)
