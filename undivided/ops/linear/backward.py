"""Gradients of the fused linear attention, in products of PyTorch. Nothing is kept from the forward but its inputs."""

from __future__ import annotations

from undivided.ops.linear.features import feature_slope, parts, rotate


def backward(
    dout, query, key, value, local, modulation, cos, sin, feature_map, context, scale, normalize, eps
):  # fmt: skip
    """Returns the gradients of query, key, value, local and modulation; empty ones of what is not given."""
    weight = "context" if context else None
    q, k, v, share = parts(query, key, value, feature_map, weight, scale, None)
    dout, back = dout.to(q.dtype), None if sin is None else -sin
    weighted = k * share[..., None]
    rotated_q, rotated_k = rotate(q, cos, sin), rotate(weighted, cos, sin)
    buffer = rotated_k.transpose(-2, -1) @ v
    out = rotated_q @ buffer
    if normalize:
        key_sum = weighted.sum(-2, keepdim=True)
        norm = (q * key_sum).sum(-1, keepdim=True) + eps
        out = out / norm
    dmodulation, dlocal = None, dout
    if modulation is not None:
        dmodulation = dout * (out if local is None else out + local)
        dlocal = dout * modulation

    # out = rotated_q buffer / norm
    dproduct = dlocal / norm if normalize else dlocal
    dq = rotate(dproduct @ buffer.transpose(-2, -1), cos, back)
    dbuffer = rotated_q.transpose(-2, -1) @ dproduct
    dweighted = rotate(v @ dbuffer.transpose(-2, -1), cos, back)
    dv = rotated_k @ dbuffer
    if normalize:
        dnorm = -(dproduct * out).sum(-1, keepdim=True)
        dq = dq + dnorm * key_sum
        dweighted = dweighted + (dnorm * q).sum(-2, keepdim=True)
    dk = dweighted * share[..., None]
    if context:
        dshare = (dweighted * k).sum(-1)
        dlogits = scale * share * (dshare - (share * dshare).sum(-1, keepdim=True))
        dk = dk + dlogits[..., None] * q.mean(-2, keepdim=True)
        dq = dq + (dlogits[..., None] * k).sum(-2, keepdim=True) / q.shape[2]
    dq, dk = (
        gradient * feature_slope(x.to(gradient.dtype), feature_map)
        for gradient, x in ((dq, query), (dk, key))
    )
    given = ((query, dq), (key, dk), (value, dv), (local, dlocal), (modulation, dmodulation))
    # Copies: a local term's gradient may be the one that came.
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape).copy_(found) for x, found in given)
