"""What one attention layer caches, reads and computes on one rank when it decodes one token.

Everything here is counted in elements and in multiply-accumulates (MACs), so that the numbers can be compared
with a paper's; `undivided.cost.plan` turns them into bytes, FLOPs and seconds. Symbols of the formulas: H
query heads, G key/value heads, D head dim, R `latent_dim`, d_r `rope_dim`, d_n `nope_dim`, d_v `value_dim`, C
`hidden_size`, k `world_size`, g `num_shards`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GroupedShape:
    """One layer of multi-head, grouped-query or multi-query attention.

    `num_key_value_heads == num_heads` is multi-head attention, 1 is multi-query attention.

    Args:
        hidden_size: width of the residual stream, C.
        num_heads: query heads, H.
        num_key_value_heads: key and value heads, G; divides `num_heads`.
        head_dim: width of one query, key or value head, D.
        qkv_bias: the query, key and value projections have a bias.
        output_bias: the output projection has a bias.
        sliding_window: keys a query sees, and the cache keeps, at most; None sees all.
    """

    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        _require_divides("num_key_value_heads", self.num_key_value_heads, "num_heads", self.num_heads)

    @property
    def cache_elements(self) -> int:
        """Elements cached a token: `2 G D`."""
        return 2 * self.num_key_value_heads * self.head_dim


@dataclass(frozen=True)
class LatentShape:
    """One layer of multi-head latent attention, decoded in absorbed form.

    Args:
        hidden_size: width of the residual stream, C.
        num_heads: query heads, H.
        latent_dim: width of the cached latent, R (`kv_lora_rank`).
        rope_dim: width of the rotated key that all heads share, d_r (`qk_rope_head_dim`).
        nope_dim: width of a head's unrotated key, d_n (`qk_nope_head_dim`).
        value_dim: width of a head's value, d_v (`v_head_dim`).
        query_latent_dim: width of the compressed query (`q_lora_rank`); None projects queries directly.
        latent_norm: the latent passes an RMSNorm (in a converted model it does not).
        query_latent_norm: the compressed query passes an RMSNorm.
        query_bias: the query projection, the first one where there are two, has a bias.
        key_value_bias: the projection to latent and rope key has a bias.
        output_bias: the output projection has a bias.
        sliding_window: keys a query sees, and the cache keeps, at most; None sees all.
        mechanism: what the checkpoint itself computes: "mla", "tpla" or "gla".
        num_shards: parts the checkpoint's latent is cut into; 1 for "mla".
    """

    hidden_size: int
    num_heads: int
    latent_dim: int
    rope_dim: int
    nope_dim: int
    value_dim: int
    query_latent_dim: int | None = None
    latent_norm: bool = True
    query_latent_norm: bool = True
    query_bias: bool = False
    key_value_bias: bool = False
    output_bias: bool = False
    sliding_window: int | None = None
    mechanism: str = "mla"
    num_shards: int = 1

    @property
    def cache_elements(self) -> int:
        """Elements cached a token: `R + d_r`."""
        return self.latent_dim + self.rope_dim


AttentionShape = GroupedShape | LatentShape


@dataclass(frozen=True)
class RankAttention:
    """What one rank does for one layer.

    Args:
        cache_elements: elements the rank caches for each cached row (token) that it holds.
        macs_per_row: MACs of the attention core for each new token and each row the rank holds.
        query_output_elements: query read and core output written, elements for each new token.
        weight_elements: attention weights the rank holds.
        projection_macs: MACs for each new token outside the core, absorbed up-projections included.
        link_elements: elements the rank sends to other ranks for each new token of the group's batch.
        row_split: ranks that share the rows of one sequence.
        batch_split: ranks that share the batch.
    """

    cache_elements: int
    macs_per_row: int
    query_output_elements: int
    weight_elements: int
    projection_macs: int
    link_elements: float
    row_split: int = 1
    batch_split: int = 1

    def arithmetic_intensity(self, itemsize: float) -> float:
        """FLOPs for each cache byte read, `2 macs_per_row / (cache_elements itemsize)`.

        This is the limit of a long cache, where the bytes of queries and outputs vanish.
        """
        return 2 * self.macs_per_row / (self.cache_elements * itemsize)


def to_latent(shape: GroupedShape, latent_dim: int | None = None, rope_dim: int = 64) -> LatentShape:
    """The latent layer that a grouped-query layer becomes when its cache is compressed.

    `d_n = d_v = D`, one latent of R elements for all keys and values, one rope key of d_r elements. The
    compression is lossless (but for the rope part) at `R = 2 G D - d_r`.

    Args:
        shape: the layer to convert.
        latent_dim: R; default 512, or `2 G D - d_r` where that is less.
        rope_dim: d_r; divides the head dim. Default 64.

    Returns:
        The converted layer, without norms on the latent.

    Raises:
        ValueError: if `rope_dim` does not divide the head dim or `latent_dim` exceeds what the layer's keys
            and values can fill.

    Source: TransMLA (arXiv 2502.07864).
    """
    _require_divides("rope_dim", rope_dim, "head_dim", shape.head_dim)
    lossless = shape.cache_elements - rope_dim
    if latent_dim is None:
        latent_dim = min(512, lossless)
    if not 1 <= latent_dim <= lossless:
        raise ValueError(
            f"latent_dim={latent_dim} is not in 1 to {lossless}: {shape.num_key_value_heads} key/value heads "
            f"of {shape.head_dim} fill no more beside rope_dim={rope_dim}."
        )
    return LatentShape(
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        nope_dim=shape.head_dim,
        value_dim=shape.head_dim,
        latent_norm=False,
        query_bias=shape.qkv_bias,
        key_value_bias=shape.qkv_bias,
        output_bias=shape.output_bias,
        sliding_window=shape.sliding_window,
    )


def key_value_heads_per_rank(num_heads: int, num_key_value_heads: int, world_size: int) -> int:
    """Key/value heads that the fullest rank must hold when query heads are split over ranks.

    Rank r owns query heads `[r H/k, (r+1) H/k)`; query head h reads key/value head `h // (H/G)`. The answer
    is G/k where k divides G, 1 where G divides k (each head is then held by k/G ranks), and more where the
    ranks' borders cut groups.

    Args:
        num_heads: query heads, H; `world_size` divides it.
        num_key_value_heads: key/value heads, G; divides `num_heads`.
        world_size: ranks, k.

    Returns:
        The number of key/value heads on the rank that holds most.
    """
    heads_per_rank = num_heads // world_size
    group = num_heads // num_key_value_heads
    return max(
        (first + heads_per_rank - 1) // group - first // group + 1
        for first in range(0, num_heads, heads_per_rank)
    )


def grouped_tensor_parallel(shape: GroupedShape, world_size: int) -> RankAttention:
    """Grouped-query attention with query heads, and the key/value heads they read, split over ranks.

    Cache a row and rank `2 G_r D` with `G_r` from `key_value_heads_per_rank`: it stops shrinking at `k = G`,
    beyond which heads are replicated. MACs `2 (H/k) D`.
    """
    heads = _heads_per_rank(shape.num_heads, world_size)
    kv_heads = key_value_heads_per_rank(shape.num_heads, shape.num_key_value_heads, world_size)
    return _grouped(
        shape,
        heads=heads,
        kv_heads=kv_heads,
        link_elements=_all_reduce(shape.hidden_size, world_size),
    )


def grouped_data_parallel(shape: GroupedShape, world_size: int) -> RankAttention:
    """Grouped-query attention with the batch split over ranks and all heads on each.

    Cache `2 G D` for the 1/k of the sequences that a rank serves; MACs `2 H D`.
    """
    return _grouped(
        shape,
        heads=shape.num_heads,
        kv_heads=shape.num_key_value_heads,
        link_elements=0,
        batch_split=world_size,
    )


def grouped_context_parallel(shape: GroupedShape, world_size: int) -> RankAttention:
    """Grouped-query attention with the cached rows split over ranks, merged by log-sum-exp.

    Every rank scores all H heads on 1/k of the rows: cache `2 G D` for each row it holds, MACs `2 H D`.
    """
    heads = _heads_per_rank(shape.num_heads, world_size)
    return _grouped(
        shape,
        heads=heads,
        kv_heads=shape.num_key_value_heads,
        scored_heads=shape.num_heads,
        link_elements=_exchange(heads * shape.head_dim, shape.num_heads * (shape.head_dim + 1), world_size)
        + _all_reduce(shape.hidden_size, world_size),
        row_split=world_size,
    )


def latent_tensor_parallel(shape: LatentShape, world_size: int) -> RankAttention:
    """MLA with the query heads split over ranks and the one latent replicated on each.

    Cache a row and rank `R + d_r`, which no number of ranks reduces; MACs `(H/k) ((R + d_r) + R)`.
    Source: TPLA (arXiv 2508.15881).
    """
    return _latent(
        shape,
        heads=_heads_per_rank(shape.num_heads, world_size),
        latent_dim=shape.latent_dim,
        link_elements=_all_reduce(shape.hidden_size, world_size),
    )


def latent_data_parallel(shape: LatentShape, world_size: int) -> RankAttention:
    """MLA with the batch split over ranks and all heads (and all attention weights) on each.

    Cache `R + d_r` for the 1/k of the sequences that a rank serves; MACs `H ((R + d_r) + R)`.
    """
    return _latent(
        shape,
        heads=shape.num_heads,
        latent_dim=shape.latent_dim,
        link_elements=0,
        batch_split=world_size,
    )


def latent_context_parallel(shape: LatentShape, world_size: int) -> RankAttention:
    """MLA with the cached rows split over ranks and partial outputs merged by log-sum-exp.

    Cache `R + d_r` for the 1/k of the rows that a rank holds; every rank scores all heads, MACs
    `H ((R + d_r) + R)`. Projections are split by heads, so absorbed queries are gathered before the core and
    partial outputs (with their log-sum-exp) are exchanged after it: `(k-1) (H/k) (R + d_r) + (k-1)/k H (R +
    1)` elements a new token and rank.
    """
    heads = _heads_per_rank(shape.num_heads, world_size)
    return _latent(
        shape,
        heads=heads,
        latent_dim=shape.latent_dim,
        scored_heads=shape.num_heads,
        link_elements=_exchange(
            heads * shape.cache_elements, shape.num_heads * (shape.latent_dim + 1), world_size
        )
        + _all_reduce(shape.hidden_size, world_size),
        row_split=world_size,
    )


def latent_grouped(shape: LatentShape, world_size: int, num_shards: int) -> RankAttention:
    """GLA: head group j of g attends its own R/g latent elements only; the rope key is replicated.

    Cache a row and rank `R/min(g, k) + d_r`; MACs `(H/k) (R/g + d_r + R/g)`. A model must be trained this
    way: the blocks of the up-projections between a head group and the other groups' latents do not exist.

    Raises:
        ValueError: if `num_shards` does not divide the latent or the heads, or neither of it and `world_size`
            divides the other.

    Source: Hardware-Efficient Attention for Fast Decoding (arXiv 2505.21487).
    """
    _check_shards(shape, world_size, num_shards)
    _require_divides("num_shards", num_shards, "num_heads", shape.num_heads)
    return _latent(
        shape,
        heads=_heads_per_rank(shape.num_heads, world_size),
        latent_dim=shape.latent_dim // num_shards,
        latents_per_rank=max(1, num_shards // world_size),
        link_elements=_all_reduce(shape.hidden_size, world_size),
    )


def latent_sharded(shape: LatentShape, world_size: int, num_shards: int) -> RankAttention:
    """TPLA: the latent is cut into g shards, every head attends every shard; the rope key is replicated.

    Cache a row and rank `R/min(g, k) + d_r`. A group of k/g ranks that shares a shard splits the H heads, so
    a rank scores `H g/k` of them: MACs `(H g/k) (R/g + d_r + R/g)`. At `k = g = 2` and DeepSeek-V3 that is
    320 elements against MLA's 576 and `128 (320 + 256)` MACs against `64 (576 + 512)`, 5.9 % more: the rope
    part, twice.

    Raises:
        ValueError: if `num_shards` does not divide the latent, or neither of it and `world_size` divides the
            other.

    Source: TPLA (arXiv 2508.15881).
    """
    _check_shards(shape, world_size, num_shards)
    _heads_per_rank(shape.num_heads, world_size)
    heads = shape.num_heads * min(num_shards, world_size) // world_size
    shards = max(1, num_shards // world_size)
    return _latent(
        shape,
        heads=heads,
        latent_dim=shape.latent_dim // num_shards,
        latents_per_rank=shards,
        scored_heads=heads * shards,
        up_projected=heads * shards,
        link_elements=_all_reduce(shape.hidden_size, world_size),
    )


def _grouped(
    shape: GroupedShape,
    *,
    heads: int,
    kv_heads: int,
    link_elements: float,
    scored_heads: int | None = None,
    row_split: int = 1,
    batch_split: int = 1,
) -> RankAttention:
    """One rank of any grouped-query arrangement; the head counts mean what they mean in `_latent`."""
    scored = heads if scored_heads is None else scored_heads
    matrices = 2 * shape.hidden_size * shape.head_dim * (heads + kv_heads)
    vectors = shape.qkv_bias * shape.head_dim * (heads + 2 * kv_heads) + shape.output_bias * shape.hidden_size
    return RankAttention(
        cache_elements=2 * kv_heads * shape.head_dim,
        macs_per_row=2 * scored * shape.head_dim,
        query_output_elements=2 * scored * shape.head_dim,
        weight_elements=matrices + vectors,
        projection_macs=matrices,
        link_elements=link_elements,
        row_split=row_split,
        batch_split=batch_split,
    )


def _latent(
    shape: LatentShape,
    *,
    heads: int,
    latent_dim: int,
    link_elements: float,
    latents_per_rank: int = 1,
    scored_heads: int | None = None,
    up_projected: int | None = None,
    row_split: int = 1,
    batch_split: int = 1,
) -> RankAttention:
    """One rank of any latent arrangement.

    `heads` are those whose projections the rank owns, `scored_heads` those it scores in the core (TPLA counts
    a head once a shard), `up_projected` the (head, latent) pairs that have an up-projection on this rank,
    `latent_dim` the width of one latent and `latents_per_rank` how many of them the rank caches.
    """
    scored = heads if scored_heads is None else scored_heads
    pairs = heads if up_projected is None else up_projected
    width, query_width = shape.hidden_size, heads * (shape.nope_dim + shape.rope_dim)
    cache = latents_per_rank * latent_dim + shape.rope_dim
    matrices = (
        width * cache
        + pairs * latent_dim * (shape.nope_dim + shape.value_dim)
        + heads * shape.value_dim * width
    )
    vectors = shape.key_value_bias * cache + shape.output_bias * width
    vectors += shape.latent_norm * latents_per_rank * latent_dim
    if shape.query_latent_dim is None:
        matrices += width * query_width
        vectors += shape.query_bias * query_width
    else:
        # The compressed query is small and every rank needs all of it, so its projection is replicated.
        matrices += shape.query_latent_dim * (width + query_width)
        vectors += (shape.query_latent_norm + shape.query_bias) * shape.query_latent_dim
    return RankAttention(
        cache_elements=cache,
        macs_per_row=scored * (2 * latent_dim + shape.rope_dim),
        query_output_elements=scored * (2 * latent_dim + shape.rope_dim),
        weight_elements=matrices + vectors,
        projection_macs=matrices,
        link_elements=link_elements,
        row_split=row_split,
        batch_split=batch_split,
    )


def _all_reduce(elements: int, world_size: int) -> float:
    # A ring sends every element twice, less the rank's own part: reduce-scatter, then all-gather.
    return 2 * elements * (world_size - 1) / world_size


def _exchange(gathered_per_rank: int, scattered: int, world_size: int) -> float:
    return gathered_per_rank * (world_size - 1) + scattered * (world_size - 1) / world_size


def _heads_per_rank(num_heads: int, world_size: int) -> int:
    _require_divides("world_size", world_size, "num_heads", num_heads)
    return num_heads // world_size


def _check_shards(shape: LatentShape, world_size: int, num_shards: int) -> None:
    _require_divides("num_shards", num_shards, "latent_dim", shape.latent_dim)
    if world_size % num_shards and num_shards % world_size:
        raise ValueError(
            f"num_shards={num_shards} does not divide world_size={world_size} and is no multiple of it; "
            f"{_listed(_divisors(world_size) or [world_size])} would."
        )


def _require_divides(name: str, value: int, whole_name: str, whole: int) -> None:
    if value < 1 or whole % value:
        raise ValueError(
            f"{name}={value} does not divide {whole_name}={whole}; "
            f"{_listed(_divisors(whole) or [whole])} would."
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(2, number + 1) if number % divisor == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
