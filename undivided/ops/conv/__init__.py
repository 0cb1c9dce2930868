"""Causal convolutions over a sequence that make queries and keys of latents, with a streaming state."""

from __future__ import annotations

import torch

from undivided.ops import _rules
from undivided.ops._backends import Backend, select
from undivided.ops._triton import availability, interprets
from undivided.ops.conv import composed, reference


def _triton(**arguments):
    """Fused kernels in Triton, forward and backward: each latent is read, each head written once."""
    from undivided.ops.conv import autograd

    return autograd.run(**arguments)


def _triton_reasons(
    latents,
    depthwise_weight,
    grouped_weight,
    num_heads,
    num_key_value_heads,
    value_shift,
    **arguments: object,
) -> list[str]:
    found = availability()
    if found:
        return found
    if latents.device.type == "cuda":
        if latents.dtype not in (torch.float16, torch.bfloat16):
            found.append(f"latents is {str(latents.dtype).removeprefix('torch.')} (needs a type of 16 bits)")
    elif not interprets():
        found.append(f"latents is on {latents.device.type}")
    elif latents.dtype not in (torch.float16, torch.float32):
        found.append("latents is of a type that Triton's interpreter multiplies wrongly or not at all")
    if depthwise_weight is not None and grouped_weight is None:
        found.append("depthwise_weight is given without grouped_weight")
    head_dim = latents.shape[2] // (num_heads + num_key_value_heads * (2 if value_shift else 1))
    if head_dim & (head_dim - 1) or not 32 <= head_dim <= 256:
        found.append(f"head_dim is {head_dim} (needs 32, 64, 128 or 256)")
    return found


BACKENDS = (
    Backend("triton", _triton, _triton_reasons, availability, automatic=("cuda",)),
    Backend("composed", composed.run, composed.reasons),
    Backend("reference", reference.run, reference.reasons),
)


def convolved_heads(
    latents: torch.Tensor,
    num_heads: int,
    num_key_value_heads: int,
    *,
    depthwise_weight: torch.Tensor | None = None,
    depthwise_bias: torch.Tensor | None = None,
    grouped_weight: torch.Tensor | None = None,
    grouped_bias: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    qk_mean: bool = True,
    qk_norm: bool = True,
    value_shift: bool = False,
    prefix: int = 0,
    history: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, ...]:
    """Queries and keys, and on demand values, of compressed convolutional attention, from the latents of a sequence.

    `z = conv1(conv0(x))` causally over the sequence, with x the latent queries and keys side by side;
    `q_h = z_h + m_h`, `k_g = z_g + mean_{h in g} m_h`, `m_h = (x_h + x_g(h)) / 2`;
    `q_h <- sqrt(D) q_h / |q_h|`, `k_g <- sqrt(D) tau_g k_g / |k_g|`; then rotary positions on the first dims.
    `conv0` is depthwise, `conv1` mixes the channels of a head. Before the first token both see latents of zero, so
    conv1 sees the bias of conv0 there. With `value_shift`, `v_t = [u_t, u'_(t-1)]` of values `[u, u']`.

    Args:
        latents: `[batch, prefix + length, channels]`, `channels = (H + G) * head_dim`: the queries first, then the
            keys; with `value_shift` G heads of values behind them.
        num_heads: query heads H.
        num_key_value_heads: key heads G, a divisor of H.
        depthwise_weight: `[(H + G) * head_dim, 1, kernel_size]` as of `torch.nn.Conv1d`; None for no such
            convolution.
        depthwise_bias: `[(H + G) * head_dim]`, with the weight.
        grouped_weight: `[(H + G) * head_dim, head_dim, kernel_size]`; None for no such convolution.
        grouped_bias: `[(H + G) * head_dim]`, with the weight.
        temperature: tau `[G]`; None for 1.
        cos, sin: `[batch or 1, length, pairs]`; dims `0 .. 2 * pairs - 1` of a head are rotated, dim p with dim
            `p + pairs`. None for no positions.
        qk_mean: whether to add the means m of the latents before the convolutions.
        qk_norm: whether to scale each head to norm `sqrt(head_dim)`; norms under the eps of the dtype count as that.
        value_shift: whether values follow, of whose channels the second half is moved to the next token.
        prefix: how many of the first rows of `latents` are a streaming state, rows of tokens before the first one at
            hand: at most the sum of `kernel_size - 1`, and one for values. `length` of everything else is without them.
        history: `[batch or 1, length]` integers, how many rows before it a token may read: 0 for the first token of
            a document among packed ones or after padding. Values above the sum of `kernel_size - 1` mean the same as
            that. None: every row there is.
        backend: "auto", "triton", "composed" or "reference".

    Returns:
        query `[batch, H, length, head_dim]`, key and, with `value_shift`, value `[batch, G, length, head_dim]`, of the
        dtype of `latents`.

    Raises:
        TypeError, ValueError: shapes, dtypes or head counts that do not fit; a backend that cannot run it.

    Source: Compressed Convolutional Attention (arXiv 2510.04476), section 3.
    """
    _check(
        latents, num_heads, num_key_value_heads, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias,
        temperature, cos, sin, value_shift, prefix, history,
    )  # fmt: skip
    arguments = {
        "latents": latents,
        "depthwise_weight": depthwise_weight,
        "depthwise_bias": depthwise_bias,
        "grouped_weight": grouped_weight,
        "grouped_bias": grouped_bias,
        "temperature": temperature,
        "cos": cos,
        "sin": sin,
        "history": history,
        "prefix": prefix,
        "num_heads": num_heads,
        "num_key_value_heads": num_key_value_heads,
        "qk_mean": qk_mean,
        "qk_norm": qk_norm,
        "value_shift": value_shift,
    }
    outputs = select("convolved_heads", BACKENDS, backend, latents.device, arguments).run(**arguments)
    return outputs if value_shift else outputs[:2]


def history_of(cu_seqlens: torch.Tensor, length: int) -> torch.Tensor:
    """Returns `history` of documents packed in one row: how many tokens of its own document stand before each token.

    Args:
        cu_seqlens: `[documents + 1]` integers, where each document starts, and the end of the last.
        length: tokens of the row.

    Returns:
        `[1, length]` integers.
    """
    position = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
    return (position - cu_seqlens[document.clamp(max=len(cu_seqlens) - 2)])[None]


def _check(
    latents, num_heads, num_key_value_heads, depthwise_weight, depthwise_bias, grouped_weight, grouped_bias,
    temperature, cos, sin, value_shift, prefix, history,
) -> None:  # fmt: skip
    _rules.check_rank(3, "[batch, length, channels]", latents=latents, cos=cos, sin=sin)
    _rules.check_floating(
        latents=latents, depthwise_weight=depthwise_weight, depthwise_bias=depthwise_bias,
        grouped_weight=grouped_weight, grouped_bias=grouped_bias,
    )  # fmt: skip
    if num_key_value_heads < 1 or num_heads % num_key_value_heads:
        raise ValueError(f"num_key_value_heads={num_key_value_heads} does not divide num_heads={num_heads}.")
    batch, length, all_channels = latents.shape
    heads = num_heads + num_key_value_heads
    all_heads = heads + (num_key_value_heads if value_shift else 0)
    if all_channels % all_heads:
        raise ValueError(f"latents has {all_channels} channels, which {all_heads} heads do not divide.")
    head_dim = all_channels // all_heads
    channels = heads * head_dim
    if value_shift and num_key_value_heads * head_dim % 2:
        raise ValueError(
            f"value_shift halves the values, but {num_key_value_heads} heads of {head_dim} are odd."
        )
    before = sum(w.shape[2] - 1 for w in (depthwise_weight, grouped_weight) if w is not None and w.dim() == 3)
    before = min(max(before, int(value_shift)), length)
    if not 0 <= prefix <= before:
        raise ValueError(
            f"prefix={prefix} must be 0 to {before}: the rows that are looked back, of {length} rows."
        )
    length -= prefix
    for name, weight, bias_name, bias, width in (
        ("depthwise_weight", depthwise_weight, "depthwise_bias", depthwise_bias, 1),
        ("grouped_weight", grouped_weight, "grouped_bias", grouped_bias, head_dim),
    ):
        if (weight is None) != (bias is None):
            raise ValueError(f"{name} and {bias_name} must be given together.")
        if weight is None:
            continue
        if weight.dim() != 3 or weight.shape[:2] != (channels, width) or weight.shape[2] < 1:
            raise ValueError(
                f"{name} has shape {list(weight.shape)}; it needs [{channels}, {width}, kernel_size]."
            )
        if bias.shape != (channels,):
            raise ValueError(f"{bias_name} has shape {list(bias.shape)}; it needs [{channels}].")
    if temperature is not None and temperature.shape != (num_key_value_heads,):
        raise ValueError(
            f"temperature has shape {list(temperature.shape)}; it needs [{num_key_value_heads}]."
        )
    if (cos is None) != (sin is None):
        raise ValueError("cos and sin must be given together.")
    if cos is not None:
        for name, table in (("cos", cos), ("sin", sin)):
            if table.shape[0] not in (1, batch) or table.shape[1] != length or 2 * table.shape[2] > head_dim:
                raise ValueError(
                    f"{name} has shape {list(table.shape)}; it needs [{batch} or 1, {length}, pairs] with "
                    f"pairs <= head_dim / 2 = {head_dim / 2:g}."
                )
        if cos.shape != sin.shape:
            raise ValueError(f"cos has shape {list(cos.shape)}, but sin has {list(sin.shape)}.")
    if history is not None:
        if history.is_floating_point() or history.dtype == torch.bool:
            raise TypeError(f"history has dtype {history.dtype}; it needs integers.")
        if history.dim() != 2 or history.shape[0] not in (1, batch) or history.shape[1] != length:
            raise ValueError(f"history has shape {list(history.shape)}; it needs [{batch} or 1, {length}].")


__all__ = ["BACKENDS", "convolved_heads", "history_of"]
