"""Forward over lists of single tokens with key blocks outside, in the two passes of Flash Sparse Attention.

The first pass leaves the maximum of the logits of each meeting of a token with a block, from which the running maximum
over the blocks of a token follows; the second leaves the output and the sum relative to it, which a third kernel adds
up, `acc_i = acc_{i-1} exp(m_{i-1} - m_i) + O_i`, without atomics. The maxima are those of each head and token. (The
authors' release takes the first head's for the whole group, which overflows where another head has larger logits.)

The kernels in `tokens_forward` need no first pass: their partial outputs are each normalised by its own log-sum-exp.
This form is kept to compare with: it computes the scores twice.

Source: Flash Sparse Attention (arXiv 2508.18224), section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops._flash import LOG2E, block_width, load_tile, precision, rows_contiguous
from undivided.ops.block_map import block_bounds
from undivided.ops.selected._tiles import block_range
from undivided.ops.selected.tokens_forward import gathered_rows, load_rows, partial_launch, passes
from undivided.ops.selected.tokens_index import list_width, segments

_SEGMENT_ROWS = 1024


# One program: one key block against a segment of the rows that list it. Without VALUES it leaves the maximum of each
# row; with them, given the running maxima, the output of each row and its sum, neither of them divided.
@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "blocks", "max_blocks", "first_list", "first_member"]
)
def _meeting_kernel(
    query, key, value, offsets, entries, table, key_bounds, tops, partial, sums,
    scale, num_queries, num_keys, list_heads, key_lists, blocks, max_blocks, first_list, first_member,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_m,
    value_stride_b, value_stride_h, value_stride_m,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, MEMBERS: tl.constexpr, SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, IS_CAUSAL: tl.constexpr, PACKED: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(1)
    lists = (first_list + unit).to(tl.int64)
    cell = table + 2 * (unit * tl.num_programs(0) + tl.program_id(0))
    block = tl.load(cell)
    if block >= blocks:
        return
    first_row = tl.load(cell + 1)
    start = tl.load(offsets + lists * (blocks + 1) + block)
    rows = (tl.load(offsets + lists * (blocks + 1) + block + 1) - start) * MEMBERS
    entries += lists * num_queries * max_blocks + start
    batch = lists // list_heads
    list_head = lists % list_heads
    query += batch * query_stride_b + (list_head * GROUP + first_member) * query_stride_h
    key += batch * key_stride_b + (list_head // key_lists) * key_stride_h
    value += batch * value_stride_b + (list_head // key_lists) * value_stride_h
    first, last = block_range(key_bounds, block, num_keys, BLOCK_N, PACKED)
    k = load_tile(key, first, key_stride_m, last, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    if VALUES:
        v = load_tile(value, first, value_stride_m, last, VALUE_DIM, BLOCK_N, BLOCK_V, True)
    column = first + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_V)
    for place in tl.range(first_row, tl.minimum(first_row + SEGMENT, rows), BLOCK_M):
        token, rank, member, inside = gathered_rows(
            entries, rows, place + tl.arange(0, BLOCK_M), WIDTH, MEMBERS
        )
        source = token.to(tl.int64) * query_stride_n + member * query_stride_h
        q = load_rows(query, source, inside, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        seen = (column < last)[None, :]
        if IS_CAUSAL:
            seen = seen & (column[None, :] <= (token + (num_keys - num_queries))[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        target = (unit * MEMBERS + member) * num_queries + token
        target = target * max_blocks + rank
        if VALUES:
            top = tl.load(tops + target, mask=inside, other=0.0)
            weights = tl.exp2(scores * scale - top[:, None])
            tl.store(sums + target, tl.sum(weights, 1), mask=inside)
            result = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            tl.store(
                partial + target[:, None] * VALUE_DIM + channel[None, :], result.to(partial.dtype.element_ty),
                mask=inside[:, None] & (channel < VALUE_DIM)[None, :],
            )  # fmt: skip
        else:
            # Finite, so that differences of maxima are never NaN.
            tl.store(tops + target, tl.maximum(tl.max(scores, 1) * scale, -1.0e30), mask=inside)


# One program: BLOCK_M tokens of one head. It adds their partial outputs up in the order of their blocks.
@triton.jit(do_not_specialize=["num_queries", "max_blocks", "first_list", "first_member"])
def _reduce_kernel(
    partial, tops, sums, counts, out, lse,
    num_queries, list_heads, max_blocks, first_list, first_member, out_stride_b, out_stride_h, out_stride_n,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    lists = (first_list + tl.program_id(1) // MEMBERS).to(tl.int64)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = token < num_queries
    count = tl.load(counts + lists * num_queries + token, mask=inside, other=0)
    place = (tl.program_id(1).to(tl.int64) * num_queries + token) * max_blocks
    channel = tl.arange(0, BLOCK_V)
    accumulator = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for rank in tl.range(0, max_blocks):
        mask = rank < count
        new_top = tl.where(mask, tl.load(tops + place + rank, mask=mask, other=0.0), top)
        part = tl.load(
            partial + (place + rank)[:, None] * VALUE_DIM + channel[None, :],
            mask=mask[:, None] & (channel < VALUE_DIM)[None, :], other=0.0,
        )  # fmt: skip
        decay = tl.exp2(top - new_top)
        accumulator = accumulator * decay[:, None] + part.to(tl.float32)
        total = total * decay + tl.load(sums + place + rank, mask=mask, other=0.0)
        top = new_top
    nonempty = total > 0
    total = tl.where(nonempty, total, 1.0)
    result = tl.where(nonempty[:, None], accumulator / total[:, None], 0.0)
    log_sum = tl.where(nonempty, (top + tl.log2(total)) * 0.6931471805599453, float("-inf"))
    batch = lists // list_heads
    head = (lists % list_heads) * GROUP + first_member + tl.program_id(1) % MEMBERS
    tl.store(lse + (batch * list_heads * GROUP + head) * num_queries + token, log_sum, mask=inside)
    target = batch * out_stride_b + head * out_stride_h + token.to(tl.int64) * out_stride_n
    tl.store(
        out + target[:, None] + channel[None, :], result.to(out.dtype.element_ty),
        mask=inside[:, None] & (channel < VALUE_DIM)[None, :],
    )  # fmt: skip


def forward(query, key, value, index, counts, offsets, entries, block_size, scale, is_causal, cu_seqlens):
    """Returns out, a view of `[batch, queries, heads, value_dim]`, and the natural lse."""
    query, key, value = map(rows_contiguous, (query, key, value))
    batch, heads, num_queries, head_dim = query.shape
    key_heads, num_keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    out = query.new_empty((batch, num_queries, heads, value_dim)).transpose(1, 2)
    lse = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    list_heads, max_blocks = index.shape[1], index.shape[3]
    if out.numel() == 0 or max_blocks == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    packed = cu_seqlens is not None
    key_bounds = block_bounds(num_keys, block_size, query.device, cu_seqlens) if packed else index
    counts = counts.contiguous()
    group, lists, blocks = heads // list_heads, batch * list_heads, offsets.shape[2] - 1
    launch = partial_launch(query.element_size(), head_dim + value_dim)
    valid = torch.arange(max_blocks, device=query.device) < counts.view(lists, 1, num_queries, 1)
    offsets = offsets.view(lists, blocks + 1)
    slots = num_queries * max_blocks
    for first, some, member, members in passes(lists, group, slots * value_dim * query.element_size()):
        partial = query.new_empty((some * members, slots, value_dim))
        tops, sums = (lse.new_empty((some, members, num_queries, max_blocks)) for _ in range(2))
        table, _ = segments(offsets[first : first + some], members, _SEGMENT_ROWS, slots)
        for has_values in (False, True):
            _meeting_kernel[table.shape[1], some](
                query, key, value, offsets, entries, table, key_bounds, tops, partial, sums,
                scale * LOG2E, num_queries, num_keys, list_heads, list_heads // key_heads, blocks, max_blocks, first,
                member, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
                HEAD_DIM=head_dim, VALUE_DIM=value_dim, BLOCK_D=block_width(head_dim), BLOCK_V=block_width(value_dim),
                GROUP=group, MEMBERS=members, SEGMENT=_SEGMENT_ROWS, BLOCK_N=block_size, WIDTH=list_width(max_blocks),
                IS_CAUSAL=is_causal, PACKED=packed, VALUES=has_values, PRECISION=precision(query), **launch,
            )  # fmt: skip
            if not has_values:
                # Entries that do not exist are behind those of a list and change no maximum before them.
                tops = tops.where(valid[first : first + some], -1.0e30).cummax(-1).values
        _reduce_kernel[triton.cdiv(num_queries, 16), some * members](
            partial, tops, sums, counts, out, lse,
            num_queries, list_heads, max_blocks, first, member, *out.stride()[:3],
            VALUE_DIM=value_dim, BLOCK_V=block_width(value_dim), GROUP=group, MEMBERS=members, BLOCK_M=16,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        # Else the next buffer would be made beside this one.
        del partial, tops, sums
    return out, lse
