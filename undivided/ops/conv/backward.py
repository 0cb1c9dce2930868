"""The backward pass of the convolved heads: from the heads back to the convolutions, and from those to the latents.

Nothing but the inputs is kept from the forward pass. No sum needs an atomic: the gradient of the convolution at a row
reaches the latents of the rows before it, and a program of the second kernel gathers what reaches its own rows; sums
over all rows are partial sums, one a program, added afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undivided.ops.conv.triton import (
    RUNTIME,
    Tiling,
    angles,
    convolve,
    halves,
    launch,
    limits,
    role,
    tiling_of,
    with_rows,
)


# One program: BLOCK rows of one head. It computes the head again, reads its gradient and writes that of the
# convolution, `3 + partners` times rows * head_dim elements, as `[heads, batch, length, head_dim]`.
@triton.jit(do_not_specialize=RUNTIME)
def _heads_kernel(
    latents, matrices, bias, temperature, cos, sin, history, dquery, dkey, dmixed, dbias, dtemperature,
    batch_stride, row_stride, length, prefix, table_stride_b, table_stride_n, table_stride_p, history_stride_b, eps,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, key_stride_n,
    num_heads, num_key_heads, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    TAPS: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_NORM: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    HAS_HISTORY: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < length)[:, None]
    first, second = halves(HEAD_DIM, ROTARY_DIM)
    limit = limits(row, length, prefix, history + batch * history_stride_b, HAS_HISTORY)
    a, b = convolve(
        latents + batch * batch_stride + prefix * row_stride, matrices, bias, row, limit, head, first, second,
        row_stride, num_heads, num_key_heads, HEAD_DIM, TAPS, HAS_MEAN, PRECISION, BLOCK_K,
    )  # fmt: skip
    is_key = head >= num_heads
    gradient = dquery + batch * query_stride_b + head.to(tl.int64) * query_stride_h
    stride = query_stride_n
    if is_key:
        gradient = dkey + batch * key_stride_b + (head - num_heads).to(tl.int64) * key_stride_h
        stride = key_stride_n
    gradient += row[:, None].to(tl.int64) * stride
    da = tl.load(gradient + first[None, :], mask=inside, other=0.0).to(tl.float32)
    db = tl.load(gradient + second[None, :], mask=inside, other=0.0).to(tl.float32)
    if ROTARY_DIM > 0:
        table = batch * table_stride_b
        c = angles(cos + table, row, length, table_stride_n, table_stride_p, HEAD_DIM, ROTARY_DIM, 1.0)
        s = angles(sin + table, row, length, table_stride_n, table_stride_p, HEAD_DIM, ROTARY_DIM, 0.0)
        da, db = da * c + db * s, db * c - da * s
    along = tl.sum(da * a, 1) + tl.sum(db * b, 1)
    factor = 1.0
    if HAS_TEMPERATURE:
        factor = tl.load(temperature + head - num_heads, mask=is_key, other=1.0)
    if HAS_NORM:
        square = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        norm = tl.sqrt(square)
        scale = HEAD_DIM**0.5 / tl.maximum(norm, eps)
        of_temperature = scale * along
        # A norm under eps counts as eps, whatever the head: nothing flows through it.
        along = tl.where(norm > eps, along / tl.where(norm > eps, square, 1.0), 0.0)
        scale = (scale * factor)[:, None]
        da = scale * (da - a * along[:, None])
        db = scale * (db - b * along[:, None])
    else:
        of_temperature = along
        da *= factor
        db *= factor
    # Rounded here, so that the sum and the products see the same gradient.
    da = da.to(dmixed.dtype.element_ty)
    db = db.to(dmixed.dtype.element_ty)
    base = dmixed + ((head * tl.num_programs(2).to(tl.int64) + batch) * length + row)[:, None] * HEAD_DIM
    tl.store(base + first[None, :], da, mask=inside)
    tl.store(base + second[None, :], db, mask=inside)
    # One row a program and a sum afterwards: atomics would change the order of the sum from run to run.
    program = (batch * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + head
    tl.store(dbias + program * HEAD_DIM + first, tl.sum(da.to(tl.float32), 0))
    tl.store(dbias + program * HEAD_DIM + second, tl.sum(db.to(tl.float32), 0))
    tl.store(dtemperature + program, tl.sum(of_temperature, 0))


@triton.jit
def _gather_values(
    dvalue, history, out, token, local, length, stride_h, stride_n, num_key_heads, HEAD_DIM: tl.constexpr,
    HAS_HISTORY: tl.constexpr, inside,
):  # fmt: skip
    """The gradient of a head of values: of the second half of all channels, that of the token after."""
    column = tl.arange(0, HEAD_DIM)
    channel = local * HEAD_DIM + column
    delay = (channel >= num_key_heads * HEAD_DIM // 2).to(tl.int32)
    reader = token[:, None] + delay[None, :]
    seen = (reader >= 0) & (reader < length)
    if HAS_HISTORY:
        allowed = tl.load(history + token + 1, mask=(token >= -1) & (token + 1 < length), other=0) >= 1
        seen &= allowed[:, None] | (delay == 0)[None, :]
    offset = reader.to(tl.int64) * stride_n + column[None, :]
    x = tl.load(dvalue + local.to(tl.int64) * stride_h + offset, mask=seen, other=0.0)
    tl.store(out + column[None, :], x, mask=inside)


# One program: BLOCK rows of the latents of one head. It gathers the gradients of the convolution at the rows that read
# them and of the means, `delays + partners` loads of rows * head_dim elements, mostly from the caches, and writes one;
# of a head of values it copies the gradient.
@triton.jit(do_not_specialize=RUNTIME)
def _latents_kernel(
    matrices, history, dmixed, dvalue, dlatents, length, prefix, history_stride_b, value_stride_b, value_stride_h,
    value_stride_n, num_heads, num_key_heads, HEAD_DIM: tl.constexpr, TAPS: tl.constexpr,
    HAS_MEAN: tl.constexpr, HAS_HISTORY: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    batches = tl.num_programs(2).to(tl.int64)
    # The row of the latents, and the token that it is: negative before the first.
    row = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = row - prefix
    is_row = (row < length + prefix)[:, None]
    out = dlatents + ((batch * (length + prefix) + row) * tl.num_programs(0) + head)[:, None] * HEAD_DIM
    history += batch * history_stride_b
    if head >= num_heads + num_key_heads:
        _gather_values(
            dvalue + batch * value_stride_b, history, out, token, head - (num_heads + num_key_heads), length,
            value_stride_h, value_stride_n, num_key_heads, HEAD_DIM, HAS_HISTORY, is_row,
        )  # fmt: skip
    else:
        parts: tl.constexpr = HEAD_DIM // BLOCK_K
        channel = tl.arange(0, HEAD_DIM)
        own = dmixed + (head * batches + batch) * length * HEAD_DIM
        gradient = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
        for step in tl.range(TAPS * parts):
            delay = step // parts
            source = step % parts * BLOCK_K + tl.arange(0, BLOCK_K)
            reader = token + delay
            seen = (reader >= 0) & (reader < length)
            if HAS_HISTORY:
                seen &= tl.load(history + reader, mask=seen, other=0) >= delay
            offset = reader.to(tl.int64)[:, None] * HEAD_DIM + source[None, :]
            x = tl.load(own + offset, mask=seen[:, None], other=0.0)
            place = ((delay * (num_heads + num_key_heads) + head) * HEAD_DIM + source)[
                :, None
            ] * HEAD_DIM + channel[None, :]
            gradient = tl.dot(x, tl.load(matrices + place), gradient, input_precision=PRECISION)
        inside = ((token >= 0) & (token < length))[:, None]
        offset = token.to(tl.int64)[:, None] * HEAD_DIM + channel[None, :]
        if TAPS == 0:
            gradient += tl.load(own + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_MEAN:
            partner, count = role(head, num_heads, num_key_heads)
            gradient += 0.5 * tl.load(own + offset, mask=inside, other=0.0).to(tl.float32)
            # A query is one of the group's that a key's mean is over; a key counts fully in each query's mean.
            share = tl.where(head >= num_heads, 0.5, 0.5 / (num_heads // num_key_heads))
            for i in range(count):
                other = dmixed + ((partner + i) * batches + batch) * length * HEAD_DIM
                gradient += share * tl.load(other + offset, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + channel[None, :], gradient.to(out.dtype.element_ty), mask=is_row)


# One program: the matrix of one delay and one head, OUT of its rows, summed over CHUNK rows of the sequence. It reads
# `2 * CHUNK * head_dim` elements and writes a partial sum in float32.
@triton.jit(do_not_specialize=RUNTIME)
def _matrices_kernel(
    latents, history, dmixed, partial, batch_stride, row_stride, length, prefix, history_stride_b,
    num_heads, HEAD_DIM: tl.constexpr, HAS_HISTORY: tl.constexpr, PRECISION: tl.constexpr,
    OUT: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    head = which % num_heads
    delay = which // num_heads
    chunk = tl.program_id(1)
    parts: tl.constexpr = HEAD_DIM // OUT
    batch = (tl.program_id(2) // parts).to(tl.int64)
    batches = (tl.num_programs(2) // parts).to(tl.int64)
    out_channel = (tl.program_id(2) % parts) * OUT + tl.arange(0, OUT)
    channel = tl.arange(0, HEAD_DIM)
    history += batch * history_stride_b
    dmixed += (head * batches + batch) * length * HEAD_DIM
    latents += batch * batch_stride + (prefix - delay).to(tl.int64) * row_stride + head * HEAD_DIM
    total = tl.zeros([OUT, HEAD_DIM], tl.float32)
    for start in range(0, tl.minimum(CHUNK, length - chunk * CHUNK), BLOCK):
        row = chunk * CHUNK + start + tl.arange(0, BLOCK)
        seen = limits(row, length, prefix, history, HAS_HISTORY) >= delay
        place = row.to(tl.int64)[:, None]
        x = tl.load(latents + place * row_stride + channel[None, :], mask=seen[:, None], other=0.0)
        gradient = tl.load(
            dmixed + place * HEAD_DIM + out_channel[None, :], mask=(row < length)[:, None], other=0.0
        )
        total = tl.dot(tl.trans(gradient), x, total, input_precision=PRECISION)
    program = (batch * tl.num_programs(1) + chunk) * tl.num_programs(0) + which
    tl.store(partial + (program * HEAD_DIM + out_channel)[:, None] * HEAD_DIM + channel[None, :], total)


# One program: IN input channels of one head, from the gradients of the matrices to those of both convolutions.
@triton.jit
def _split_kernel(
    depthwise_weight, depthwise_bias, grouped_weight, dmatrices, dbias, ddepthwise, ddepthwise_bias, dgrouped,
    HEAD_DIM: tl.constexpr, TAPS0: tl.constexpr, TAPS1: tl.constexpr, PADDED0: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    heads = tl.num_programs(0)
    head = tl.program_id(0)
    row = head * HEAD_DIM + tl.arange(0, HEAD_DIM)
    column = tl.program_id(1) * IN + tl.arange(0, IN)
    channel = head * HEAD_DIM + column
    tap0 = tl.arange(0, PADDED0)
    bias_gradient = tl.load(dbias + row)
    first_bias = tl.load(depthwise_bias + channel).to(tl.float32)
    of_depthwise = tl.zeros([PADDED0, IN], tl.float32)
    of_bias = tl.zeros([IN], tl.float32)
    for tap1 in tl.static_range(TAPS1):
        place = (row[:, None] * HEAD_DIM + column[None, :]) * TAPS1 + tap1
        weight = tl.load(grouped_weight + place).to(tl.float32)
        gradient = bias_gradient[:, None] * first_bias[None, :]
        of_bias += tl.sum(weight * bias_gradient[:, None], 0)
        for tap in tl.static_range(TAPS0):
            delay = TAPS0 + TAPS1 - 2 - tap - tap1
            of_matrix = tl.load(
                dmatrices + (delay * heads * HEAD_DIM + row)[:, None] * HEAD_DIM + column[None, :]
            )
            gradient += of_matrix * tl.load(depthwise_weight + channel * TAPS0 + tap).to(tl.float32)[None, :]
            of_depthwise += tl.where((tap0 == tap)[:, None], tl.sum(weight * of_matrix, 0)[None, :], 0.0)
        tl.store(dgrouped + place, gradient.to(dgrouped.dtype.element_ty))
    tl.store(ddepthwise_bias + channel, of_bias.to(ddepthwise_bias.dtype.element_ty))
    tl.store(
        ddepthwise + channel[None, :] * TAPS0 + tap0[:, None], of_depthwise.to(ddepthwise.dtype.element_ty),
        mask=(tap0 < TAPS0)[:, None],
    )  # fmt: skip


MATRICES_TILING = Tiling(64, 64, 8, 3)
# Rows of one partial sum of the matrices' gradients: few enough for their number to fill a device.
CHUNK = 2048


def backward(
    dquery, dkey, dvalue, latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos,
    sin, history, prefix, num_heads, num_key_value_heads, qk_mean, qk_norm, value_shift, heads_tiling=None,
    latents_tiling=None, matrices_tiling=MATRICES_TILING, chunk=CHUNK,
):  # fmt: skip
    """Returns the gradients of the latents, both weights and biases, and the temperature; None for what is absent."""
    latents = with_rows(latents)
    batch, rows, channels = latents.shape
    length, heads = rows - prefix, num_heads + num_key_value_heads
    all_heads = heads + (num_key_value_heads if value_shift else 0)
    head_dim = channels // all_heads
    inputs, sizes, words = launch(
        latents, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias, temperature, cos, sin, history,
        prefix, num_heads, num_key_value_heads, qk_mean, qk_norm, head_dim,
    )  # fmt: skip
    matrices, history = inputs[1], inputs[6]
    batch_stride, row_stride, history_stride = sizes[0], sizes[1], sizes[7]
    heads_tiling = heads_tiling or tiling_of(head_dim, length)
    latents_tiling = latents_tiling or tiling_of(head_dim, rows)
    dquery, dkey, dvalue = with_rows(dquery), with_rows(dkey), with_rows(dvalue)
    dmixed = latents.new_empty(heads, batch, length, head_dim)
    blocks = triton.cdiv(length, heads_tiling.rows)
    dbias = latents.new_empty(blocks * batch, heads * head_dim, dtype=torch.float32)
    dtemperature = dbias.new_empty(blocks * batch, heads)
    _heads_kernel[heads, blocks, batch](
        *inputs, dquery, dkey, dmixed, dbias, dtemperature, *sizes, *dquery.stride()[:3], *dkey.stride()[:3],
        **words, **heads_tiling.options(head_dim),
    )  # fmt: skip
    dlatents = latents.new_empty(batch, rows, channels)
    shared = {name: words[name] for name in ("HEAD_DIM", "HAS_HISTORY", "PRECISION")}
    _latents_kernel[all_heads, triton.cdiv(rows, latents_tiling.rows), batch](
        matrices, history, dmixed, dvalue, dlatents, length, prefix, history_stride, *dvalue.stride()[:3],
        num_heads=num_heads, num_key_heads=num_key_value_heads, TAPS=words["TAPS"], HAS_MEAN=qk_mean, **shared,
        **latents_tiling.options(head_dim),
    )  # fmt: skip
    weights = (None,) * 4
    if grouped_weight is not None:
        out = min(head_dim, 128)
        grid = (words["TAPS"] * heads, triton.cdiv(length, chunk), batch * (head_dim // out))
        partial = dbias.new_empty(grid[1] * batch, words["TAPS"], heads, head_dim, head_dim)
        _matrices_kernel[grid](
            latents, history, dmixed, partial, batch_stride, row_stride, length, prefix, history_stride,
            num_heads=heads, **shared, OUT=out, CHUNK=chunk, BLOCK=matrices_tiling.rows,
            num_warps=matrices_tiling.num_warps, num_stages=matrices_tiling.num_stages,
        )  # fmt: skip
        weights = _split(
            partial.sum(0), dbias.sum(0), depthwise_weight, depthwise_bias, grouped_weight, grouped_bias
        )
    if temperature is not None:
        dtemperature = dtemperature[:, num_heads:].sum(0).to(temperature.dtype)
    return dlatents, *weights, None if temperature is None else dtemperature


def _split(dmatrices, dbias, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias):
    """Returns the gradients of both convolutions' weights and biases from those of their product."""
    delays, heads, head_dim, _ = dmatrices.shape
    dgrouped_bias = dbias.to(grouped_bias.dtype)
    if depthwise_weight is None:
        dgrouped = dmatrices.flip(0).permute(1, 2, 3, 0).flatten(0, 1)
        return None, None, dgrouped.to(grouped_weight.dtype), dgrouped_bias
    before, taps = depthwise_weight.shape[2], grouped_weight.shape[2]
    ddepthwise, ddepthwise_bias, dgrouped = (
        x.new_empty(x.shape) for x in (depthwise_weight, depthwise_bias, grouped_weight)
    )
    _split_kernel[heads, head_dim // 8](
        depthwise_weight.contiguous(), depthwise_bias, grouped_weight.contiguous(), dmatrices, dbias, ddepthwise,
        ddepthwise_bias, dgrouped, HEAD_DIM=head_dim, TAPS0=before, TAPS1=taps,
        PADDED0=triton.next_power_of_2(before), IN=8,
    )  # fmt: skip
    return ddepthwise, ddepthwise_bias, dgrouped, dgrouped_bias
