"""Transport attention without an N x M buffer: the logits are recomputed block by block in every half-step.

The forward keeps only log-sum-exps: `row_lse` `[rows, batch, heads, queries]`, one for every row step, and
`col_lse` `[sweeps, batch, heads, keys]`. The backward differentiates through the sweeps. With R_t and C_t the
row- and column-stochastic matrices of sweep t, P the plan, and Delta_n = out_n . dout_n / a_n,

    ds = P * (dout . v - Delta) + sum_t (C_t * c_t + R_t * r_t),
    c_T = -relaxation * column sums of the first part,
    r_t = -C_t c_t,   c_{t-1} = -relaxation * R_t^T r_t,

so the chain from the last sweep to the first runs on vectors, one streaming pass a half-step, and `ds` is
formed only inside the blocks of the passes for the gradients of query and key. All logits, fields and
log-sum-exps are in base 2: exp2 is the hardware's, and a field that went through another base would be
rounded twice. Column attention is the plan with f = 0, g = -LSE, no sweeps, and Delta taken over the column.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from undivided.ops._triton import interprets

_LN2 = tl.constexpr(0.6931471805599453)

# How the y positions that x may meet are bounded.
_ALL = 0
_UP_TO = 1  # x is a query, y a key: y <= x + shift
_FROM = 2  # x is a key, y a query: y >= x - shift

# Lengths and counts: a kernel for each that is 1 or divides by 16 would be the same kernel compiled again.
_COUNTS = (
    "num_x", "num_y", "num_queries", "num_keys", "heads", "x_heads", "key_heads", "group", "x_group", "y_group",
    "shift", "sweeps", "plane_x", "plane_y",
)  # fmt: skip


@triton.jit
def _load_rows(pointer, offset, stride, index, count, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dim = tl.arange(0, BLOCK_DIM)
    inside = (index[:, None] < count) & (dim[None, :] < DIM)
    return tl.load(
        pointer + offset + index[:, None].to(tl.int64) * stride + dim[None, :], mask=inside, other=0.0
    )


@triton.jit
def _start(block, shift, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, DIRECTION: tl.constexpr):
    """First y position that some x of this block may meet, rounded down to a block."""
    start = block * 0
    if DIRECTION == 2:
        start = tl.maximum(block * BLOCK_X - shift, 0) // BLOCK_Y * BLOCK_Y
    return start


@triton.jit
def _stop(block, shift, num_y, BLOCK_X: tl.constexpr, DIRECTION: tl.constexpr):
    """One behind the last y position that some x of this block may meet."""
    stop = num_y
    if DIRECTION == 1:
        stop = tl.minimum(num_y, (block + 1) * BLOCK_X + shift)
    return stop


@triton.jit
def _logits(
    x_rows, y_rows, x, y, num_y, shift, scale,
    EVEN: tl.constexpr, DIRECTION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Logits of a block in base 2, -inf where y does not exist or x may not meet it.

    An x behind the end meets whatever there is: its row is never stored. EVEN says that no block of y has an end.
    """
    if INTERPRET:
        # Triton's interpreter multiplies bfloat16 wrongly.
        x_rows, y_rows = x_rows.to(tl.float32), y_rows.to(tl.float32)
    z = tl.dot(x_rows, tl.trans(y_rows), input_precision="ieee") * scale
    # A query meets no key behind the end, as the last one is the last query's own.
    if DIRECTION == 1:
        z = tl.where(y[None, :] <= x[:, None] + shift, z, float("-inf"))
    else:
        if not EVEN:
            z = tl.where(y[None, :] < num_y, z, float("-inf"))
        if DIRECTION == 2:
            z = tl.where(y[None, :] >= x[:, None] - shift, z, float("-inf"))
    return z


@triton.jit(do_not_specialize=_COUNTS)
def _lse_kernel(
    X, Y, Y_FIELD, OUT, sxb, sxh, sxn, syb, syh, syn, num_x, num_y, heads, x_group, y_group, shift, scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    HAS_FIELD: tl.constexpr, EVEN: tl.constexpr, DIRECTION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One half-step: `out_x = log2 sum_y 2^(s_xy + field_y)` for one block of x of one head.

    Keeps the block of x, its running maximum and sum in registers; reads each y row once a block of x.
    """
    blocks = tl.cdiv(num_x, BLOCK_X)
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    x = block * BLOCK_X + tl.arange(0, BLOCK_X)
    x_rows = _load_rows(X, b * sxb + h // x_group * sxh, sxn, x, num_x, DIM, BLOCK_DIM)
    top = tl.full((BLOCK_X,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    for start in range(
        _start(block, shift, BLOCK_X, BLOCK_Y, DIRECTION),
        _stop(block, shift, num_y, BLOCK_X, DIRECTION),
        BLOCK_Y,
    ):
        y = start + tl.arange(0, BLOCK_Y)
        y_rows = _load_rows(Y, b * syb + h // y_group * syh, syn, y, num_y, DIM, BLOCK_DIM)
        z = _logits(x_rows, y_rows, x, y, num_y, shift, scale, EVEN, DIRECTION, INTERPRET)
        if HAS_FIELD:
            z += tl.load(Y_FIELD + bh * num_y + y, mask=y < num_y, other=0.0)[None, :]
        new_top = tl.maximum(top, tl.max(z, 1))
        # A row that has met nothing yet keeps -inf; subtracting it would make NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(z - base[:, None]), 1)
        top = new_top
    total = tl.where(x < num_x, total, 1.0)
    tl.store(OUT + bh * num_x + x, top + tl.log2(total), mask=x < num_x)


@triton.jit(do_not_specialize=_COUNTS)
def _output_kernel(
    Q, K, V, COL_FIELD, ROW_MASS, OUT, ROW_LSE, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    num_queries, num_keys, heads, group, shift, scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    HAS_FIELD: tl.constexpr, NORMALIZE: tl.constexpr, EVEN: tl.constexpr, DIRECTION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """The last pass: `out = P v` of one block of queries of one head; flash attention with a field on keys.

    With NORMALIZE also the last row step, written as `row_lse`, and rows of mass a; without, P is 2^(s +
    field) as it is (column attention, whose exponents are at most zero).
    """
    blocks = tl.cdiv(num_queries, BLOCK_X)
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    x = block * BLOCK_X + tl.arange(0, BLOCK_X)
    q = _load_rows(Q, b * sqb + h * sqh, sqn, x, num_queries, DIM, BLOCK_DIM)
    top = tl.full((BLOCK_X,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_X,), tl.float32)
    acc = tl.zeros((BLOCK_X, BLOCK_VALUE), tl.float32)
    for start in range(0, _stop(block, shift, num_keys, BLOCK_X, DIRECTION), BLOCK_Y):
        y = start + tl.arange(0, BLOCK_Y)
        k = _load_rows(K, b * skb + h // group * skh, skn, y, num_keys, DIM, BLOCK_DIM)
        v = _load_rows(V, b * svb + h // group * svh, svn, y, num_keys, VALUE_DIM, BLOCK_VALUE)
        z = _logits(q, k, x, y, num_keys, shift, scale, EVEN, DIRECTION, INTERPRET)
        if HAS_FIELD:
            z += tl.load(COL_FIELD + bh * num_keys + y, mask=y < num_keys, other=0.0)[None, :]
        if NORMALIZE:
            new_top = tl.maximum(top, tl.max(z, 1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            old = tl.exp2(top - base)
            p = tl.exp2(z - base[:, None])
            total = total * old + tl.sum(p, 1)
            acc *= old[:, None]
            top = new_top
        else:
            p = tl.exp2(z)
        if INTERPRET:
            acc += tl.dot(p, v.to(tl.float32), input_precision="ieee")
        else:
            acc += tl.dot(p.to(v.dtype), v, input_precision="ieee")
    if NORMALIZE:
        total = tl.where(x < num_queries, total, 1.0)
        acc *= (tl.load(ROW_MASS + bh * num_queries + x, mask=x < num_queries, other=0.0) / total)[:, None]
        tl.store(ROW_LSE + bh * num_queries + x, top + tl.log2(total), mask=x < num_queries)
    dim = tl.arange(0, BLOCK_VALUE)
    at = OUT + b * sob + h * soh + x[:, None].to(tl.int64) * son + dim[None, :]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=(x[:, None] < num_queries) & (dim[None, :] < VALUE_DIM))


@triton.jit(do_not_specialize=_COUNTS)
def _transfer_kernel(
    X, Y, X_FIELD, Y_FIELD, WEIGHT, OUT, sxb, sxh, sxn, syb, syh, syn, num_x, num_y, heads, x_group, y_group,
    shift, scale, factor,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    EVEN: tl.constexpr, DIRECTION: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One half-step of the backward: `out_x = factor * sum_y 2^(s_xy + x_field + y_field) weight_y`."""
    blocks = tl.cdiv(num_x, BLOCK_X)
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // heads, bh % heads
    x = block * BLOCK_X + tl.arange(0, BLOCK_X)
    x_rows = _load_rows(X, b * sxb + h // x_group * sxh, sxn, x, num_x, DIM, BLOCK_DIM)
    x_field = tl.load(X_FIELD + bh * num_x + x, mask=x < num_x, other=0.0)
    total = tl.zeros((BLOCK_X,), tl.float32)
    for start in range(
        _start(block, shift, BLOCK_X, BLOCK_Y, DIRECTION),
        _stop(block, shift, num_y, BLOCK_X, DIRECTION),
        BLOCK_Y,
    ):
        y = start + tl.arange(0, BLOCK_Y)
        y_rows = _load_rows(Y, b * syb + h // y_group * syh, syn, y, num_y, DIM, BLOCK_DIM)
        z = _logits(x_rows, y_rows, x, y, num_y, shift, scale, EVEN, DIRECTION, INTERPRET)
        y_field = tl.load(Y_FIELD + bh * num_y + y, mask=y < num_y, other=0.0)
        weight = tl.load(WEIGHT + bh * num_y + y, mask=y < num_y, other=0.0)
        total += tl.sum(tl.exp2(z + x_field[:, None] + y_field[None, :]) * weight[None, :], 1)
    tl.store(OUT + bh * num_x + x, total * factor, mask=x < num_x)


@triton.jit(do_not_specialize=_COUNTS)
def _value_gradient_kernel(
    Q, K, V, DOUT, ROW_FIELD, COL_FIELD, ROW_DELTA, DV, GAMMA, sqb, sqh, sqn, skb, skh, skn, svb, svh, svn,
    sob, soh, son, num_queries, num_keys, key_heads, group, shift, scale,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, EVEN: tl.constexpr, DIRECTION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """`dv_m = sum_n P_nm dout_n` of keys; a head's `gamma_m = sum_n P_nm (dout_n . v_m - Delta_n)`.

    gamma needs no second product: its first part is `v_m . dv_m` of that head. Loops over the query heads of
    the group.
    """
    blocks = tl.cdiv(num_keys, BLOCK_X)
    block = tl.program_id(0) % blocks
    bg = (tl.program_id(0) // blocks).to(tl.int64)
    b, g = bg // key_heads, bg % key_heads
    x = block * BLOCK_X + tl.arange(0, BLOCK_X)
    k = _load_rows(K, b * skb + g * skh, skn, x, num_keys, DIM, BLOCK_DIM)
    v = _load_rows(V, b * svb + g * svh, svn, x, num_keys, VALUE_DIM, BLOCK_VALUE).to(tl.float32)
    dv = tl.zeros((BLOCK_X, BLOCK_VALUE), tl.float32)
    for member in range(0, group):
        h = g * group + member
        bh = b * (key_heads * group) + h
        col_field = tl.load(COL_FIELD + bh * num_keys + x, mask=x < num_keys, other=0.0)
        one_head = tl.zeros((BLOCK_X, BLOCK_VALUE), tl.float32)
        taken = tl.zeros((BLOCK_X,), tl.float32)
        for start in range(_start(block, shift, BLOCK_X, BLOCK_Y, DIRECTION), num_queries, BLOCK_Y):
            y = start + tl.arange(0, BLOCK_Y)
            q = _load_rows(Q, b * sqb + h * sqh, sqn, y, num_queries, DIM, BLOCK_DIM)
            dout = _load_rows(DOUT, b * sob + h * soh, son, y, num_queries, VALUE_DIM, BLOCK_VALUE)
            z = _logits(k, q, x, y, num_queries, shift, scale, EVEN, DIRECTION, INTERPRET)
            row_field = tl.load(ROW_FIELD + bh * num_queries + y, mask=y < num_queries, other=0.0)
            delta = tl.load(ROW_DELTA + bh * num_queries + y, mask=y < num_queries, other=0.0)
            p = tl.exp2(z + col_field[:, None] + row_field[None, :])
            taken += tl.sum(p * delta[None, :], 1)
            if INTERPRET:
                one_head += tl.dot(p, dout.to(tl.float32), input_precision="ieee")
            else:
                one_head += tl.dot(p.to(dout.dtype), dout, input_precision="ieee")
        tl.store(GAMMA + bh * num_keys + x, tl.sum(one_head * v, 1) - taken, mask=x < num_keys)
        dv += one_head
    dim = tl.arange(0, BLOCK_VALUE)
    at = DV + (bg * num_keys + x[:, None]) * VALUE_DIM + dim[None, :]
    tl.store(at, dv.to(DV.dtype.element_ty), mask=(x[:, None] < num_keys) & (dim[None, :] < VALUE_DIM))


@triton.jit(do_not_specialize=_COUNTS)
def _logit_gradient_kernel(
    X, Y, XO, YO, X_FIELD, Y_FIELD, X_DELTA, Y_DELTA, X_FIRST, Y_FIRST, X_SECOND, Y_SECOND,
    WEIGHT_FIRST, WEIGHT_SECOND, DX, sxb, sxh, sxn, syb, syh, syn, uxb, uxh, uxn, uyb, uyh, uyn,
    num_x, num_y, x_heads, group, y_group, shift, scale, sweeps, plane_x, plane_y,
    DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, EVEN: tl.constexpr, DIRECTION: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """`dx = scale * sum_y ds_xy y` for one block of x (queries, or keys of a group of query heads).

    `ds = 2^(s + x_field + y_field) * (xo . yo - x_delta - y_delta)
        + sum_t 2^(s + x_first_t + y_first_t) * weight_first_t + 2^(s + x_second_t + y_second_t) *
        weight_second_t`
    where xo, yo are dout and value; the first of each sweep is weighted along y, the second along x. Every
    exponent is that of a stochastic matrix, at most zero up to rounding, so nothing overflows however far the
    sweeps moved.
    """
    blocks = tl.cdiv(num_x, BLOCK_X)
    block = tl.program_id(0) % blocks
    bx = (tl.program_id(0) // blocks).to(tl.int64)
    b, hx = bx // x_heads, bx % x_heads
    x = block * BLOCK_X + tl.arange(0, BLOCK_X)
    in_x = x < num_x
    x_rows = _load_rows(X, b * sxb + hx * sxh, sxn, x, num_x, DIM, BLOCK_DIM)
    xo = _load_rows(XO, b * uxb + hx * uxh, uxn, x, num_x, VALUE_DIM, BLOCK_VALUE)
    if INTERPRET:
        xo = xo.to(tl.float32)
    dx = tl.zeros((BLOCK_X, BLOCK_DIM), tl.float32)
    for member in range(0, group):
        h = hx * group + member
        bh = b * (x_heads * group) + h
        ax = bh * num_x + x
        x_field = tl.load(X_FIELD + ax, mask=in_x, other=0.0)
        x_delta = tl.load(X_DELTA + ax, mask=in_x, other=0.0)
        for start in range(
            _start(block, shift, BLOCK_X, BLOCK_Y, DIRECTION),
            _stop(block, shift, num_y, BLOCK_X, DIRECTION),
            BLOCK_Y,
        ):
            y = start + tl.arange(0, BLOCK_Y)
            in_y = y < num_y
            ay = bh * num_y + y
            y_rows = _load_rows(Y, b * syb + h // y_group * syh, syn, y, num_y, DIM, BLOCK_DIM)
            yo = _load_rows(YO, b * uyb + h // y_group * uyh, uyn, y, num_y, VALUE_DIM, BLOCK_VALUE)
            z = _logits(x_rows, y_rows, x, y, num_y, shift, scale, EVEN, DIRECTION, INTERPRET)
            y_field = tl.load(Y_FIELD + ay, mask=in_y, other=0.0)
            y_delta = tl.load(Y_DELTA + ay, mask=in_y, other=0.0)
            if INTERPRET:
                yo = yo.to(tl.float32)
            dp = tl.dot(xo, tl.trans(yo), input_precision="ieee")
            ds = tl.exp2(z + x_field[:, None] + y_field[None, :]) * (dp - x_delta[:, None] - y_delta[None, :])
            for t in range(0, sweeps):
                # bh * 0: int64, like every offset that grows with batch and length.
                x_first = tl.load(X_FIRST + (bh * 0 + t) * plane_x + ax, mask=in_x, other=0.0)
                y_first = tl.load(Y_FIRST + (bh * 0 + t) * plane_y + ay, mask=in_y, other=0.0)
                weight = tl.load(WEIGHT_FIRST + (bh * 0 + t) * plane_y + ay, mask=in_y, other=0.0)
                ds += tl.exp2(z + x_first[:, None] + y_first[None, :]) * weight[None, :]
                x_second = tl.load(X_SECOND + (bh * 0 + t) * plane_x + ax, mask=in_x, other=0.0)
                y_second = tl.load(Y_SECOND + (bh * 0 + t) * plane_y + ay, mask=in_y, other=0.0)
                weight = tl.load(WEIGHT_SECOND + (bh * 0 + t) * plane_x + ax, mask=in_x, other=0.0)
                ds += tl.exp2(z + x_second[:, None] + y_second[None, :]) * weight[:, None]
            if INTERPRET:
                dx += tl.dot(ds, y_rows.to(tl.float32), input_precision="ieee")
            else:
                dx += tl.dot(ds.to(y_rows.dtype), y_rows, input_precision="ieee")
    dim = tl.arange(0, BLOCK_DIM)
    at = DX + (bx * num_x + x[:, None]) * DIM + dim[None, :]
    tl.store(at, (dx * (scale * _LN2)).to(DX.dtype.element_ty), mask=in_x[:, None] & (dim[None, :] < DIM))


# In half precision: width of the wider head up to which, to each kernel's rows of x and y, warps and stages. Up to 64
# they are the fastest of five or six tried on an H100 at 8192 tokens (with five sweeps for the gradients of logits);
# the wider ones were chosen to fit, not timed.
_SIZES = {
    64: {
        "lse": (64, 128, 4, 3), "transfer": (128, 64, 4, 3), "output": (128, 64, 4, 3),
        "value_gradient": (128, 64, 4, 2), "logit_gradient": (64, 32, 4, 2),
    },
    128: {
        "lse": (128, 64, 8, 3), "transfer": (128, 64, 8, 3), "output": (128, 64, 8, 2),
        "value_gradient": (64, 64, 8, 2), "logit_gradient": (64, 64, 8, 2),
    },
    256: {
        "lse": (128, 32, 8, 3), "transfer": (128, 32, 8, 3), "output": (128, 32, 8, 2),
        "value_gradient": (32, 32, 8, 2), "logit_gradient": (32, 32, 8, 2),
    },
}  # fmt: skip


def block_sizes(kernel: str, dim: int, value_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows of x and y a program holds, and its warps and stages; chosen by size, never searched."""
    widest = max(dim, value_dim)
    if interprets():
        return {"BLOCK_X": 32, "BLOCK_Y": 32}
    if dtype == torch.float32:
        # Exact float32 products take registers and shared memory for two operands of twice the width.
        edge = 32 if widest <= 128 else 16
        chosen = (edge, edge, 4, 1)
    else:
        chosen = next(sizes[kernel] for width, sizes in _SIZES.items() if widest <= width)
    return dict(zip(("BLOCK_X", "BLOCK_Y", "num_warps", "num_stages"), chosen, strict=True))


def _dims(dim: int, value_dim: int | None = None) -> dict[str, int]:
    dims = {"DIM": dim, "BLOCK_DIM": max(16, triton.next_power_of_2(dim))}
    if value_dim is not None:
        dims |= {"VALUE_DIM": value_dim, "BLOCK_VALUE": max(16, triton.next_power_of_2(value_dim))}
    return dims


def _reach(direction: int, num_y: int, sizes: dict[str, int]) -> dict[str, int | bool]:
    """How the y of a block are bounded: one kernel where no block has an end, another where the last one does."""
    return {"DIRECTION": direction, "EVEN": direction != _UP_TO and num_y % sizes["BLOCK_Y"] == 0}


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The kernels walk the last axis with stride one; the others may be strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Passes:
    """The streaming passes over the logits of one problem."""

    def __init__(self, query, key, value, is_causal: bool, scale: float) -> None:
        self.query, self.key, self.value = _rows(query), _rows(key), _rows(value)
        self.batch, self.heads, self.num_queries, self.dim = query.shape
        self.key_heads, self.num_keys = key.shape[1], key.shape[2]
        self.value_dim = value.shape[3]
        self.group = self.heads // self.key_heads
        self.is_causal = is_causal
        self.shift = self.num_keys - self.num_queries
        self.scale = scale / math.log(2)
        self.common = {"INTERPRET": interprets()}

    def sizes(self, kernel: str) -> dict[str, int]:
        return block_sizes(kernel, self.dim, self.value_dim, self.query.dtype)

    def sides(self, over_queries: bool):
        """x, y, their lengths, their head groups, and the direction; x is the query if `over_queries`."""
        query = (self.query, self.num_queries, 1)
        key = (self.key, self.num_keys, self.group)
        x, y = (query, key) if over_queries else (key, query)
        direction = _ALL if not self.is_causal else _UP_TO if over_queries else _FROM
        return x[0], y[0], x[1], y[1], x[2], y[2], direction

    def empty(self, length: int) -> torch.Tensor:
        return torch.empty(self.batch, self.heads, length, dtype=torch.float32, device=self.query.device)

    def lse(self, over_queries: bool, y_field: torch.Tensor | None, out: torch.Tensor) -> None:
        x, y, num_x, num_y, x_group, y_group, direction = self.sides(over_queries)
        sizes = self.sizes("lse")
        grid = (triton.cdiv(num_x, sizes["BLOCK_X"]) * self.batch * self.heads,)
        _lse_kernel[grid](
            x, y, out if y_field is None else y_field, out, *x.stride()[:3], *y.stride()[:3], num_x, num_y,
            self.heads, x_group, y_group, self.shift, self.scale,
            HAS_FIELD=y_field is not None, **_reach(direction, num_y, sizes), **_dims(self.dim), **sizes,
            **self.common,
        )  # fmt: skip

    def output(
        self, col_field: torch.Tensor | None, row_mass: torch.Tensor, row_lse: torch.Tensor, normalize: bool
    ):
        out = self.query.new_empty(self.batch, self.heads, self.num_queries, self.value_dim)
        sizes = self.sizes("output")
        grid = (triton.cdiv(self.num_queries, sizes["BLOCK_X"]) * self.batch * self.heads,)
        _output_kernel[grid](
            self.query, self.key, self.value, row_mass if col_field is None else col_field, row_mass,
            out, row_lse,
            *self.query.stride()[:3], *self.key.stride()[:3], *self.value.stride()[:3], *out.stride()[:3],
            self.num_queries, self.num_keys, self.heads, self.group, self.shift, self.scale,
            HAS_FIELD=col_field is not None, NORMALIZE=normalize,
            **_reach(_UP_TO if self.is_causal else _ALL, self.num_keys, sizes),
            **_dims(self.dim, self.value_dim), **sizes, **self.common,
        )  # fmt: skip
        return out

    def transfer(self, over_queries: bool, x_field, y_field, weight, factor: float) -> torch.Tensor:
        x, y, num_x, num_y, x_group, y_group, direction = self.sides(over_queries)
        out = self.empty(num_x)
        sizes = self.sizes("transfer")
        grid = (triton.cdiv(num_x, sizes["BLOCK_X"]) * self.batch * self.heads,)
        _transfer_kernel[grid](
            x, y, x_field, y_field, weight, out, *x.stride()[:3], *y.stride()[:3], num_x, num_y, self.heads,
            x_group, y_group, self.shift, self.scale, factor,
            **_reach(direction, num_y, sizes), **_dims(self.dim), **sizes, **self.common,
        )  # fmt: skip
        return out

    def value_gradient(self, dout, row_field, col_field, row_delta):
        dv = self.value.new_empty(self.value.shape)
        gamma = self.empty(self.num_keys)
        sizes = self.sizes("value_gradient")
        grid = (triton.cdiv(self.num_keys, sizes["BLOCK_X"]) * self.batch * self.key_heads,)
        _value_gradient_kernel[grid](
            self.query, self.key, self.value, dout, row_field, col_field, row_delta, dv, gamma,
            *self.query.stride()[:3], *self.key.stride()[:3], *self.value.stride()[:3], *dout.stride()[:3],
            self.num_queries, self.num_keys, self.key_heads, self.group, self.shift, self.scale,
            **_reach(_FROM if self.is_causal else _ALL, self.num_queries, sizes),
            **_dims(self.dim, self.value_dim), **sizes, **self.common,
        )  # fmt: skip
        return dv, gamma

    def logit_gradient(self, over_queries: bool, dout, fields, deltas, first, second, weights):
        """Gradient of x; `first`, `second` are pairs (x, y) of stacked fields, `weights` along y, x."""
        x, y, num_x, num_y, _, y_group, direction = self.sides(over_queries)
        xo, yo = (dout, self.value) if over_queries else (self.value, dout)
        group = 1 if over_queries else self.group
        dx = x.new_empty(x.shape)
        sizes = self.sizes("logit_gradient")
        grid = (triton.cdiv(num_x, sizes["BLOCK_X"]) * self.batch * x.shape[1],)
        _logit_gradient_kernel[grid](
            x, y, xo, yo, *fields, *deltas, *first, *second, *weights, dx,
            *x.stride()[:3], *y.stride()[:3], *xo.stride()[:3], *yo.stride()[:3],
            num_x, num_y, x.shape[1], group, y_group, self.shift, self.scale, weights[0].shape[0],
            self.batch * self.heads * num_x, self.batch * self.heads * num_y,
            **_reach(direction, num_y, sizes), **_dims(self.dim, self.value_dim), **sizes, **self.common,
        )  # fmt: skip
        return dx


def forward(query, key, value, row_mass, column_mass, is_causal, scale, num_iterations, relaxation, column):
    """All passes of the forward; returns out, row_lse and col_lse."""
    passes = _Passes(query, key, value, is_causal, scale)
    stack = (num_iterations, passes.batch, passes.heads)
    row_mass, column_mass = row_mass.contiguous(), column_mass.contiguous()
    if column:
        row_lse = row_mass.new_empty(0, *stack[1:], passes.num_queries)
        col_lse = row_mass.new_empty(1, *stack[1:], passes.num_keys)
        passes.lse(False, None, col_lse[0])
        return passes.output(-col_lse[0], row_mass, row_mass, normalize=False), row_lse, col_lse
    row_lse = row_mass.new_empty(num_iterations + 1, *stack[1:], passes.num_queries)
    col_lse = row_mass.new_empty(*stack, passes.num_keys)
    log_rows, log_columns = row_mass.log2(), column_mass.log2()
    col_field = None
    for t in range(num_iterations):
        passes.lse(True, col_field, row_lse[t])
        passes.lse(False, log_rows - row_lse[t], col_lse[t])
        col_field = relaxation * (log_columns - col_lse[t])
    return passes.output(col_field, row_mass, row_lse[num_iterations], normalize=True), row_lse, col_lse


def backward(
    dout, query, key, value, out, row_mass, column_mass, row_lse, col_lse, is_causal, scale, num_iterations,
    relaxation, column,
):  # fmt: skip
    """All passes of the backward; returns the gradients of query, key and value."""
    passes = _Passes(query, key, value, is_causal, scale)
    dout = _rows(dout)
    no_rows, no_columns = torch.zeros_like(row_mass), torch.zeros_like(column_mass)
    no_rows, no_columns = no_rows.contiguous(), no_columns.contiguous()
    if column:
        col_field = -col_lse[0]
        dv, gamma = passes.value_gradient(dout, no_rows, col_field, no_rows)
        empty = (col_lse[:0], col_lse[:0])
        dq = passes.logit_gradient(True, dout, (no_rows, col_field), (no_rows, gamma), empty, empty, empty)
        dk = passes.logit_gradient(False, dout, (col_field, no_rows), (gamma, no_rows), empty, empty, empty)
        return dq, dk, dv

    rows = row_mass.log2() - row_lse
    columns = relaxation * (column_mass.log2() - col_lse)
    # columns[t] is the field that row step t + 1 saw; row step 0 saw none.
    seen = torch.cat([no_columns[None], columns])
    delta = (dout.float() * out.float()).sum(-1) / row_mass
    dv, gamma = passes.value_gradient(dout, rows[-1], seen[-1], delta)
    from_columns, from_rows = torch.empty_like(col_lse), torch.empty_like(rows[:-1])
    for t in reversed(range(num_iterations)):
        from_columns[t] = -relaxation * gamma if t == num_iterations - 1 else gamma
        from_rows[t] = passes.transfer(True, rows[t], -col_lse[t], from_columns[t], -1.0)
        if t > 0:
            gamma = passes.transfer(False, seen[t], -row_lse[t], from_rows[t], -relaxation)
    column_steps = (rows[:-1], -col_lse)
    row_steps = (-row_lse[:-1], seen[:-1])
    dq = passes.logit_gradient(
        True,
        dout,
        (rows[-1], seen[-1]),
        (delta, no_columns),
        column_steps,
        row_steps,
        (from_columns, from_rows),
    )
    dk = passes.logit_gradient(
        False, dout, (seen[-1], rows[-1]), (no_columns, delta), row_steps[::-1], column_steps[::-1],
        (from_rows, from_columns),
    )  # fmt: skip
    return dq, dk, dv
