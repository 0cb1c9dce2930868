"""One attention result from the results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from undivided.ops._backends import Backend, select
from undivided.ops.merge import reference

BACKENDS = (Backend("reference", reference.merge, reference.reasons),)


def merge_attention(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combines attention over disjoint sets of keys into attention over their union, exactly.

    `lse = log sum_i exp(lse_i)`, `out = sum_i exp(lse_i - lse) out_i`. A part with `lse_i = -inf` (no keys) counts
    for nothing, whatever its `out_i` holds; if all parts are empty, `out` is zero and `lse` is -inf.

    Args:
        outs: parts, each `[batch, heads, queries, value_dim]`.
        lses: their natural log-sum-exps, each `[batch, heads, queries]`.
        backend: "auto" or "reference".

    Returns:
        `out` like the first part, and `lse` `[batch, heads, queries]`.

    Raises:
        ValueError: there is no part, the counts differ, or the shapes do.

    Source: the online softmax, FlashAttention (arXiv 2205.14135), section 3.1.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"outs has {len(outs)} parts and lses has {len(lses)}; give one lse a part, at least one part."
        )
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or lse.shape != out.shape[:-1]:
            raise ValueError(
                f"outs[{index}] has shape {list(out.shape)} and lses[{index}] {list(lse.shape)}; "
                f"all parts must be {list(outs[0].shape)} with an lse of {list(outs[0].shape[:-1])}."
            )
    arguments = {"outs": tuple(outs), "lses": tuple(lses)}
    return select("merge_attention", BACKENDS, backend, outs[0].device, arguments).run(**arguments)
