"""Signed mix of two attention maps: each group of signal heads minus the noise head it shares."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, hopper_availability, interprets, is_hopper
from undivided.ops.differential import autograd, composed, reference


def _triton(**arguments):
    """Fused kernels in Triton, forward, backward and decoding: both maps in one pass over the keys."""
    return autograd.attend("triton", **arguments)


def _gluon(**arguments):
    """The fused forward in Gluon, for Hopper."""
    return autograd.attend("gluon", **arguments)


def _kernel_reasons(
    query, noise_query, key, noise_key, value, lam, norm_weight, norm_eps, out_scale, attn_mask, is_causal, window,
    scale, softcap,
) -> list[str]:  # fmt: skip
    found = []
    for name, given in (("attn_mask", attn_mask), ("window", window), ("softcap", softcap)):
        if given is not None:
            found.append(f"{name} is given (the kernels know is_causal only)")
    if scale <= 0:
        found.append(f"scale is {scale} (the kernels need a positive one)")
    if noise_key.shape[1] != value.shape[1]:
        found.append(f"noise_key has {noise_key.shape[1]} heads, value {value.shape[1]} (they must be equal)")
    if key.shape[2] == 0:
        found.append("key has no positions")
    return found


def _triton_reasons(**arguments) -> list[str]:
    query, value = arguments["query"], arguments["value"]
    found = availability()
    if found:
        return found
    found = _kernel_reasons(**arguments)
    if query.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')}")
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[3] > 256:
            found.append(f"the last axis of {name} is {tensor.shape[3]} (at most 256)")
    if query.device.type != "cuda" and not interprets():
        found.append(f"query is on {query.device.type}")
    elif query.device.type != "cuda" and query.dtype == torch.bfloat16:
        found.append("query is bfloat16 (Triton's interpreter multiplies it wrongly)")
    return found


def _gluon_reasons(**arguments) -> list[str]:
    query, noise_query, value = (arguments[name] for name in ("query", "noise_query", "value"))
    found = availability()
    if found:
        return found
    found = _kernel_reasons(**arguments)
    if query.dtype not in (torch.float16, torch.bfloat16):
        found.append(f"query is {str(query.dtype).removeprefix('torch.')} (needs a type of 16 bits)")
    if (query.shape[3], value.shape[3]) not in ((64, 128), (128, 256)):
        found.append(
            f"head_dim is {query.shape[3]} and value_dim {value.shape[3]} (needs 64 and 128, or 128 and 256)"
        )
    inputs = (
        arguments[name]
        for name in ("query", "noise_query", "key", "noise_key", "value", "lam", "norm_weight")
    )
    if autograd.few_rows(query, noise_query, value) and not autograd.needs_gradient(*inputs):
        found.append('query has few rows, for which keys are split (backend "triton" does)')
    if query.device.type != "cuda":
        found.append(f"query is on {query.device.type}")
    elif not is_hopper(query.device.index):
        found.append("the device is not of compute capability 9.0")
    return found


BACKENDS = (
    Backend("gluon", _gluon, _gluon_reasons, hopper_availability, automatic=("cuda",)),
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("sdpa", composed.attend_sdpa, composed.sdpa_reasons),
    Backend("flex", composed.attend_flex, composed.flex_reasons, automatic=("cuda",)),
    Backend("reference", reference.attend, reference.reasons),
)


def differential_attention(
    query: torch.Tensor,
    noise_query: torch.Tensor,
    key: torch.Tensor,
    noise_key: torch.Tensor,
    value: torch.Tensor,
    lam: torch.Tensor | float,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Grouped differential attention of projected heads.

    `out_h = out_scale * norm(A_h v - lam * A'_j v)`, with `A_h = softmax(scale * q_h k^T)` of signal head h,
    `A'_j = softmax(scale * q'_j k'^T)` of the noise head `j = h // g` and g signal heads a noise head. Both maps
    weigh the same values. `norm(z) = z / sqrt(mean(z^2) + norm_eps) * norm_weight` over the channels of a head.
    The rows of the mixed map sum to `1 - lam` and may be negative; `lam` is not clamped.

    Args:
        query: signal queries, `[batch, signal heads, queries, head_dim]`.
        noise_query: `[batch, noise heads, queries, head_dim]`; noise heads divide signal heads. With as many of
            them this is the Differential Transformer.
        key: `[batch, key heads, keys, head_dim]`, read by the signal queries; key heads divide signal heads.
        noise_key: `[batch, noise key heads, keys, head_dim]`; they divide the noise heads.
        value: `[batch, value heads, keys, value_dim]`; value heads divide both kinds of key heads. In the published
            layers `value_dim = 2 * head_dim`.
        lam: factor of the noise map: a number, or a tensor that broadcasts to `[batch, signal heads, queries]`.
        norm_weight: `[value_dim]`; None for no normalisation.
        norm_eps: added to the mean square.
        out_scale: constant factor of the result.
        attn_mask: broadcasts to `[batch, 1, queries, keys]`, for both maps; boolean (True = seen) or an additive bias.
        is_causal: query n of N sees key m of M only if `m <= n + M - N`.
        window: with `is_causal`, a query sees itself and the `window - 1` keys before it.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits, before the mask; default none.
        backend: "auto", "gluon", "triton", "sdpa", "flex" or "reference".

    Returns:
        `[batch, signal heads, queries, value_dim]`, of the dtype of `query`.

    Raises:
        ValueError: shapes or options do not fit; or the backend cannot run the inputs.
        TypeError: dtypes do not fit.

    Source: Grouped Differential Attention (arXiv 2510.06949); one noise head a signal head: Differential
    Transformer (arXiv 2410.05258), section 2.1.
    """
    _check(query, noise_query, key, noise_key, value)
    batch, heads, num_queries, head_dim = query.shape
    _rules.check_mask(attn_mask, batch, 1, num_queries, key.shape[2])
    if norm_weight is not None and tuple(norm_weight.shape) != (value.shape[3],):
        raise ValueError(
            f"norm_weight has shape {list(norm_weight.shape)}; it needs [value_dim={value.shape[3]}]."
        )
    if window is not None and (window < 1 or not is_causal):
        raise ValueError(
            f"window={window} with is_causal={is_causal}; a window is at least 1 and needs is_causal=True."
        )
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} must be positive; leave it None for no cap.")
    arguments = {
        "query": query,
        "noise_query": noise_query,
        "key": key,
        "noise_key": noise_key,
        "value": value,
        "lam": _broadcast(lam, query),
        "norm_weight": norm_weight,
        "norm_eps": norm_eps,
        "out_scale": out_scale,
        "attn_mask": attn_mask,
        "is_causal": is_causal,
        "window": window,
        "scale": head_dim**-0.5 if scale is None else scale,
        "softcap": softcap,
    }
    return select("differential_attention", BACKENDS, backend, query.device, arguments).run(**arguments)


def _check(query, noise_query, key, noise_key, value) -> None:
    tensors = {
        "query": query,
        "noise_query": noise_query,
        "key": key,
        "noise_key": noise_key,
        "value": value,
    }
    _rules.check_rank(4, "[batch, heads, length, head_dim]", **tensors)
    _rules.check_floating(**tensors)
    for name, tensor, like_name, like in (
        ("noise_query", noise_query, "query", query),
        ("noise_key", noise_key, "key", key),
        ("value", value, "key", key),
    ):
        if tensor.shape[0] != like.shape[0] or tensor.shape[2] != like.shape[2]:
            raise ValueError(
                f"{name} {list(tensor.shape)} must have the batch and the length of {like_name} {list(like.shape)}."
            )
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key has batch {key.shape[0]}, but query has {query.shape[0]}.")
    for name in ("noise_query", "key", "noise_key"):
        if tensors[name].shape[3] != query.shape[3]:
            raise ValueError(
                f"{name} has head_dim {tensors[name].shape[3]}, but query has {query.shape[3]}; they must be equal."
            )
    for few, many in (
        ("noise_query", "query"),
        ("key", "query"),
        ("noise_key", "noise_query"),
        ("value", "key"),
        ("value", "noise_key"),
    ):
        if tensors[many].shape[1] % tensors[few].shape[1]:
            raise ValueError(
                f"{few} has {tensors[few].shape[1]} heads, which does not divide the {tensors[many].shape[1]} heads "
                f"of {many}."
            )


def _broadcast(lam: torch.Tensor | float, query: torch.Tensor) -> torch.Tensor:
    """Lam as `[batch, signal heads, queries]` without a copy, in at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    shape = query.shape[:3]
    if not isinstance(lam, torch.Tensor):
        return torch.full((), lam, dtype=dtype, device=query.device).expand(shape)
    if lam.dim() > 3 or any(
        size not in (1, want) for size, want in zip(lam.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            f"lam has shape {list(lam.shape)}; it must broadcast to [batch, signal heads, queries] = {list(shape)}."
        )
    return lam.to(query.device, dtype).expand(shape)
