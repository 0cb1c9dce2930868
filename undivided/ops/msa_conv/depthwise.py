"""MSA-Conv with one channel a head in Triton: each channel attends by itself, lane beside lane.

A product of scalars is no work for a tensor core. A program holds a tile of tokens by a block of channels and runs over
the taps; what a tap finds is read as the rows of `undivided.ops.msa_conv.triton` are, channels taking the place of
`head_dim`.

Logits and log-sums are natural: a factor for powers of two would be rounded where they are large, before the difference
that is small where a weight is large.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops.msa_conv._border import empty_like_tokens, empty_sums
from undivided.ops.msa_conv.triton import load_rows, place, programs, store_rows, taps_beyond, tokens

# Channels and numbers of a program: what a warp reads at once, and what leaves room for the gradients in registers.
_CHANNELS, _NUMBERS = 64, 1024


# One program: a tile of tokens by a block of channels. In registers, in float32: queries, the largest logit, the sum
# and the output. A tap reads a key twice and a value a lane, mostly from the L1 cache, and takes one exponential.
@triton.jit
def _depthwise_forward(
    query, key, value, out, lse, scale, blocks, size, dilation,
    query_strides, key_strides, value_strides, out_strides, lse_strides,
    K0: tl.constexpr, K1: tl.constexpr, WRAP: tl.constexpr, COUNT_ZEROS: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr,
):  # fmt: skip
    first, residue, length, block = place(size, dilation, T0, T1)
    if (first[0] >= length[0]) | (first[1] >= length[1]):
        return
    batch = (block // blocks).to(tl.int64)
    block = block % blocks
    a, b, exists, row, column = tokens(first, residue, length, size, dilation, T0, T1, False)
    query += batch * query_strides[0] + block * query_strides[1]
    key += batch * key_strides[0] + block * key_strides[1]
    value += batch * value_strides[0] + block * value_strides[1]
    q = load_rows(query, row, column, exists, query_strides, WIDTH, BLOCK).to(tl.float32) * scale

    # Twice over the taps, for the largest logit and for the sums: as many instructions as to correct the sums with each
    # tap, and less is rounded. Finite, so that a difference of it and -inf is never NaN.
    top = tl.full([T0 * T1, BLOCK], -1.0e30, tl.float32)
    if COUNT_ZEROS:
        beyond = taps_beyond(a, b, length, K0, K1)[:, None]
        top = tl.where(beyond > 0, 0.0, top)
    for tap in tl.range(0, K0 * K1):
        at = (first[0] + tap // K1 - K0 // 2, first[1] + tap % K1 - K1 // 2)
        c, d, found, key_row, key_column = tokens(at, residue, length, size, dilation, T0, T1, WRAP)
        k = load_rows(key, key_row, key_column, found, key_strides, WIDTH, BLOCK).to(tl.float32)
        top = tl.maximum(top, tl.where(found[:, None], q * k, float("-inf")))
    total = tl.zeros([T0 * T1, BLOCK], tl.float32)
    if COUNT_ZEROS:
        # Where there are some, the largest logit is at least 0.
        total = beyond.to(tl.float32) * tl.exp(-tl.abs(top))
    accumulator = tl.zeros([T0 * T1, BLOCK], tl.float32)
    for tap in tl.range(0, K0 * K1):
        at = (first[0] + tap // K1 - K0 // 2, first[1] + tap % K1 - K1 // 2)
        c, d, found, key_row, key_column = tokens(at, residue, length, size, dilation, T0, T1, WRAP)
        k = load_rows(key, key_row, key_column, found, key_strides, WIDTH, BLOCK).to(tl.float32)
        weight = tl.exp(tl.where(found[:, None], q * k - top, float("-inf")))
        total += weight
        v = load_rows(value, key_row, key_column, found, value_strides, WIDTH, BLOCK)
        accumulator += weight * v.to(tl.float32)
    # Rows that do not exist may have seen nothing.
    total = tl.where(exists[:, None], total, 1.0)

    out += batch * out_strides[0] + block * out_strides[1]
    store_rows(out, row, column, exists, out_strides, accumulator / total, WIDTH, BLOCK)
    lse += batch * lse_strides[0] + block * lse_strides[1]
    store_rows(lse, row, column, exists, lse_strides, top + tl.log(total), WIDTH, BLOCK)


# One program: such a tile, as queries and as keys. A kernel is odd, so that the taps of its queries are the places of
# the queries that see its keys, and one pass over them gives all three gradients. In registers, in float32: the tile's
# own query, key, value, gradient and log-sum, and the three gradients. A tap reads six numbers a lane.
@triton.jit
def _depthwise_backward(
    query, key, value, out, dout, lse, dlse, dquery, dkey, dvalue, scale, blocks, size, dilation,
    query_strides, key_strides, value_strides, out_strides, dout_strides, lse_strides, grad_strides,
    K0: tl.constexpr, K1: tl.constexpr, WRAP: tl.constexpr, HAS_DLSE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr,
):  # fmt: skip
    first, residue, length, block = place(size, dilation, T0, T1)
    if (first[0] >= length[0]) | (first[1] >= length[1]):
        return
    batch = (block // blocks).to(tl.int64)
    block = block % blocks
    a, b, exists, row, column = tokens(first, residue, length, size, dilation, T0, T1, False)
    query += batch * query_strides[0] + block * query_strides[1]
    key += batch * key_strides[0] + block * key_strides[1]
    value += batch * value_strides[0] + block * value_strides[1]
    out += batch * out_strides[0] + block * out_strides[1]
    dout += batch * dout_strides[0] + block * dout_strides[1]
    lse += batch * lse_strides[0] + block * lse_strides[1]
    if HAS_DLSE:
        dlse += batch * lse_strides[0] + block * lse_strides[1]
    q = load_rows(query, row, column, exists, query_strides, WIDTH, BLOCK).to(tl.float32)
    k = load_rows(key, row, column, exists, key_strides, WIDTH, BLOCK).to(tl.float32)
    v = load_rows(value, row, column, exists, value_strides, WIDTH, BLOCK).to(tl.float32)
    gradient = load_rows(dout, row, column, exists, dout_strides, WIDTH, BLOCK).to(tl.float32)
    delta = gradient * load_rows(out, row, column, exists, out_strides, WIDTH, BLOCK).to(tl.float32)
    log_sum = load_rows(lse, row, column, exists, lse_strides, WIDTH, BLOCK)
    if HAS_DLSE:
        delta -= load_rows(dlse, row, column, exists, lse_strides, WIDTH, BLOCK)

    dq = tl.zeros([T0 * T1, BLOCK], tl.float32)
    dk = tl.zeros([T0 * T1, BLOCK], tl.float32)
    dv = tl.zeros([T0 * T1, BLOCK], tl.float32)
    for tap in tl.range(0, K0 * K1):
        at = (first[0] + tap // K1 - K0 // 2, first[1] + tap % K1 - K1 // 2)
        c, d, found, far_row, far_column = tokens(at, residue, length, size, dilation, T0, T1, WRAP)
        far_k = load_rows(key, far_row, far_column, found, key_strides, WIDTH, BLOCK).to(tl.float32)
        far_v = load_rows(value, far_row, far_column, found, value_strides, WIDTH, BLOCK).to(tl.float32)
        weight = tl.exp(tl.where(found[:, None], q * far_k * scale - log_sum, float("-inf")))
        dq += weight * (gradient * far_v - delta) * far_k
        far_q = load_rows(query, far_row, far_column, found, query_strides, WIDTH, BLOCK).to(tl.float32)
        far_gradient = load_rows(dout, far_row, far_column, found, dout_strides, WIDTH, BLOCK).to(tl.float32)
        far_out = load_rows(out, far_row, far_column, found, out_strides, WIDTH, BLOCK).to(tl.float32)
        far_sum = load_rows(lse, far_row, far_column, found, lse_strides, WIDTH, BLOCK)
        far_delta = far_gradient * far_out
        if HAS_DLSE:
            far_delta -= load_rows(dlse, far_row, far_column, found, lse_strides, WIDTH, BLOCK)
        weight = tl.exp(tl.where(found[:, None], far_q * k * scale - far_sum, float("-inf")))
        dv += weight * far_gradient
        dk += weight * (far_gradient * v - far_delta) * far_q
    offset = batch * grad_strides[0] + block * grad_strides[1]
    store_rows(dquery + offset, row, column, exists, grad_strides, dq * scale, WIDTH, BLOCK)
    store_rows(dkey + offset, row, column, exists, grad_strides, dk * scale, WIDTH, BLOCK)
    store_rows(dvalue + offset, row, column, exists, grad_strides, dv, WIDTH, BLOCK)


def forward(query, key, value, kernel_size, dilation, border, scale, numbers: int = _NUMBERS):
    """Returns out and the natural log-sums of the logits."""
    out, lse = empty_like_tokens(query, 1), empty_sums(query, value)
    if out.numel() == 0:
        return out, lse
    inputs = [_lanes(x) for x in (query, key, value, out, lse.unsqueeze(-1))]
    edge = _edges(inputs[0], numbers)
    _depthwise_forward[programs(inputs[0], dilation, edge),](
        *inputs, scale, inputs[0].shape[1], tuple(query.shape[2:4]), tuple(dilation),
        *(x.stride()[:4] for x in inputs), COUNT_ZEROS=border == "zero",
        **_constants(inputs[0], kernel_size, border, edge), num_warps=4,
    )  # fmt: skip
    return out, lse


def backward(
    dout, dlse, out, lse, query, key, value, kernel_size, dilation, border, scale, numbers: int = _NUMBERS
):
    """Returns the gradients of query, key and value; `dlse` may be None."""
    gradients = tuple(empty_like_tokens(query, 1) for _ in range(3))
    if out.numel() == 0:
        return gradients
    # The log-sums and their gradient lie alike.
    lse, dlse = (None if x is None else x.movedim(1, -1).contiguous().movedim(-1, 1) for x in (lse, dlse))
    sums = _lanes(lse.unsqueeze(-1))
    inputs = [_lanes(x) for x in (query, key, value, out, dout)]
    results = [_lanes(x) for x in gradients]
    edge = _edges(inputs[0], numbers)
    _depthwise_backward[programs(inputs[0], dilation, edge),](
        *inputs, sums, sums if dlse is None else _lanes(dlse.unsqueeze(-1)), *results, scale, inputs[0].shape[1],
        tuple(query.shape[2:4]), tuple(dilation),
        *(x.stride()[:4] for x in (*inputs, sums, results[0])), HAS_DLSE=dlse is not None,
        **_constants(inputs[0], kernel_size, border, edge), num_warps=4,
    )  # fmt: skip
    return gradients


def _lanes(x: torch.Tensor) -> torch.Tensor:
    """Views `[batch, channels, height, width, 1]` as `[batch, blocks, height, width, channels of a block]`."""
    x = x.squeeze(-1).movedim(1, -1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    width = next(n for n in range(min(_CHANNELS, x.shape[-1]), 0, -1) if x.shape[-1] % n == 0)
    return x.unflatten(-1, (-1, width)).movedim(3, 1)


def _edges(lanes: torch.Tensor, numbers: int) -> tuple[int, int]:
    """Returns the edges of a tile of tokens, powers of two, for a program of so many numbers."""
    count = max(numbers // triton.next_power_of_2(lanes.shape[-1]), 1)
    power = count.bit_length() - 1
    return 2 ** (power // 2), 2 ** (power - power // 2)


def _constants(lanes: torch.Tensor, kernel_size, border: str, edge: tuple[int, int]) -> dict[str, object]:
    return {
        "K0": kernel_size[0],
        "K1": kernel_size[1],
        "WRAP": border == "circular",
        "WIDTH": lanes.shape[-1],
        "BLOCK": triton.next_power_of_2(lanes.shape[-1]),
        "T0": edge[0],
        "T1": edge[1],
    }
