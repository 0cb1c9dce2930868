"""Dense attention through torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops._rules import combined_mask, zero_rows_without_keys
from undivided.ops._triton import has_capability

# From how many queries behind a cache two calls of cuDNN are faster than one with a mask: the fewest measured on an
# H100 (512 before 16384 keys, 0.29 against 0.44 ms; 4096 before them with 128 heads, 8.3 against 14.4 ms).
_MANY_QUERIES = 512


def reasons(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse) -> list[str]:
    found = []
    if softcap is not None:
        found.append(f"softcap is {softcap} (scaled_dot_product_attention has no cap)")
    if return_lse:
        found.append("return_lse is True (scaled_dot_product_attention keeps the log-sum-exp)")
    if key.shape[2] == 0:
        found.append("key has no positions")
    return found


def attend(query, key, value, attn_mask, is_causal, window, scale, softcap, return_lse):
    num_queries, num_keys = query.shape[2], key.shape[2]
    if is_causal and attn_mask is None and window is None and _pays_in_two_calls(query, key, value):
        return _in_two_calls(query, key, value, scale)
    # Torch aligns is_causal upper left; only the square case means the same as ours, and there it is the fast path.
    plain_causal = is_causal and attn_mask is None and window is None and num_queries == num_keys
    mask = None
    if not plain_causal:
        mask = combined_mask(attn_mask, is_causal, window, num_queries, num_keys, query.device)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
    grouped = query.shape[1] != key.shape[1]
    head_dim, value_dim = query.shape[3], value.shape[3]
    if query.device.type == "cpu" and value_dim != head_dim:
        # Torch's fused CPU kernel wants equal widths; without it the N x M matrix is formed, at five times the time.
        query, key = (F.pad(x, (0, max(value_dim - head_dim, 0))) for x in (query, key))
        value = F.pad(value, (0, max(head_dim - value_dim, 0)))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=plain_causal, scale=scale, enable_gqa=grouped
    )
    # Causality and a window alone leave no query behind a cache without a key.
    may_be_empty = attn_mask is not None or num_queries > num_keys
    return zero_rows_without_keys(out[..., :value_dim], mask if may_be_empty else None)


def _pays_in_two_calls(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    if query.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if not _MANY_QUERIES <= query.shape[2] < key.shape[2] or query.shape[1] != key.shape[1]:
        return False
    # The weights of the two results come from their log-sum-exps, which torch gives no gradient.
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        return False
    if not has_capability(query.device.index, 9, 0) or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, False)
    return torch.backends.cuda.can_use_cudnn_attention(parameters)


def _in_two_calls(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention behind a cache without a mask: over the keys before the queries, and among the queries.

    One call with a mask reads it for every head and skips none of the future.
    """
    past = key.shape[2] - query.shape[2]
    before, before_lse = _cudnn(query, key[:, :, :past], value[:, :, :past], scale, is_causal=False)
    among, among_lse = _cudnn(query, key[:, :, past:], value[:, :, past:], scale, is_causal=True)
    weight = torch.sigmoid((among_lse - before_lse).view(*query.shape[:3], 1))
    return before.float().lerp_(among.float(), weight).to(query.dtype)


def _cudnn(query, key, value, scale, is_causal):
    """The output and its natural log-sum-exp, which scaled_dot_product_attention keeps."""
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    return attend(query, key, value, None, True, is_causal=is_causal, scale=scale)[:2]
