"""Bytes and operations of attention to selected blocks by single tokens, in both loop orders: formulas. No torch.

shape = SelectedShape(tokens=65536, heads=32, key_heads=8, head_dim=128, block_size=64, topk=16)
shape.keys_outer_bytes / shape.tokens_outer_bytes     # 0.213: the paper's 21.3 %
shape.keys_outer_flops / shape.tokens_outer_flops     # 0.5625: the paper's 56.2 %
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SelectedShape:
    """A forward pass of the selected branch, elements of two bytes.

    Args:
        tokens: queries N, and as many keys.
        heads: query heads H.
        key_heads: key and value heads G; they divide H.
        head_dim: width d of a head.
        block_size: keys B of a block.
        topk: blocks n of a token.

    Raises:
        ValueError: a size is less than 1, or `key_heads` does not divide `heads`.

    Source: Flash Sparse Attention (arXiv 2508.18224), section 3.3.
    """

    tokens: int
    heads: int
    key_heads: int
    head_dim: int
    block_size: int
    topk: int

    # Rows that a tile of the tensor cores has at least, in the paper's count.
    LEAST_ROWS = 8

    def __post_init__(self) -> None:
        for name in ("tokens", "heads", "key_heads", "head_dim", "block_size", "topk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.heads % self.key_heads:
            raise ValueError(f"key_heads={self.key_heads} does not divide heads={self.heads}.")

    @property
    def group(self) -> int:
        """Query heads of a key head, g."""
        return self.heads // self.key_heads

    @property
    def tokens_outer_bytes(self) -> int:
        """`2 d G N (B n + g + 8)`: every token reads its blocks anew."""
        rows = self.block_size * self.topk + self.group + self.LEAST_ROWS
        return 2 * self.head_dim * self.key_heads * self.tokens * rows

    @property
    def tokens_outer_flops(self) -> int:
        """`32 d G N B n`: the heads of a group, padded to 8 rows."""
        return (
            4 * self.LEAST_ROWS * self.head_dim * self.key_heads * self.tokens * self.block_size * self.topk
        )

    @property
    def keys_outer_bytes(self) -> int:
        """`d N (6 H + 2 G) (1 + n)`: queries and partial outputs move once for each block of a token."""
        return self.head_dim * self.tokens * (6 * self.heads + 2 * self.key_heads) * (1 + self.topk)

    @property
    def keys_outer_flops(self) -> int:
        """`d N B n (4 H + 2 G)`: no padding; the paper's kernel computes scores once more for the maxima of a group."""
        pairs = self.tokens * self.block_size * self.topk
        return self.head_dim * pairs * (4 * self.heads + 2 * self.key_heads)

    @property
    def merged_bytes(self) -> int:
        """What the kernels here move: for each block of a token a query in, a partial output out and in again.

        Keys, values and outputs, and four bytes for each log-sum-exp, are counted too.
        """
        meetings = self.heads * self.tokens * self.topk
        own = 2 * self.tokens * self.head_dim * (2 * self.key_heads + self.heads)
        return meetings * (3 * 2 * self.head_dim + 2 * 4) + own

    @property
    def merged_flops(self) -> int:
        """`4 d H N B n`: each score once, no padding; the maxima need no pass of their own."""
        return 4 * self.head_dim * self.heads * self.tokens * self.block_size * self.topk

    def buffer_bytes(self, limit: int = 2**30) -> int:
        """Partial outputs and their log-sum-exps that are in memory at a time.

        `N n (2 d + 4)` bytes a head, as many heads as fit in `limit` bytes of outputs, one at least: whole groups, or
        an equal part of one.

        Args:
            limit: bytes of partial outputs.
        """
        outputs = 2 * self.tokens * self.topk * self.head_dim
        heads = max(limit // outputs, 1)
        if heads >= self.group:
            heads = min(heads // self.group * self.group, self.heads)
        else:
            heads = max(d for d in range(1, heads + 1) if self.group % d == 0)
        return heads * self.tokens * self.topk * (2 * self.head_dim + 4)
