"""Sparse-linear attention as it is written: two masks over all pairs. It defines what is correct."""

from __future__ import annotations

import torch

from undivided.ops._rules import masked_softmax
from undivided.ops.block_map import token_blocks
from undivided.ops.sparse_linear.classes import block_classes, feature, linear_blocks


def reasons(**arguments: object) -> list[str]:
    return []


def attend(
    query, key, value, weight, bias, classes, topk, bottomk, feature_map, query_block_size, block_size, linear_scope,
    scale,
):  # fmt: skip
    if classes is None:
        classes = block_classes(
            query,
            key,
            topk=topk,
            bottomk=bottomk,
            query_block_size=query_block_size,
            block_size=block_size,
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    query_, key_, value_ = (x.to(dtype) for x in (query, key, value))
    rows = token_blocks(query.shape[2], query_block_size, query.device)
    columns = token_blocks(key.shape[2], block_size, query.device)

    def tokens(blocks):
        return blocks[:, :, rows][..., columns]

    logits = scale * (query_ @ key_.transpose(-2, -1))
    weights, lse = masked_softmax(logits.masked_fill(~tokens(classes == 1), float("-inf")))
    sparse = weights @ value_

    products = feature(query_, feature_map) @ feature(key_, feature_map).transpose(-2, -1)
    products = products.masked_fill(~tokens(linear_blocks(classes, linear_scope)), 0.0)
    total = products.sum(-1, keepdim=True)
    # A row without such blocks has a zero output; it is divided by one, so that its gradient is no NaN.
    linear = products @ value_ / total.masked_fill(total == 0, 1.0)
    if weight is not None:
        sparse = sparse + linear @ weight.to(dtype).T
        sparse = sparse if bias is None else sparse + bias.to(dtype)
    return sparse.to(query.dtype), linear.to(query.dtype), lse
