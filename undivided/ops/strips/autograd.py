"""The torch operators around the Triton kernels, and the gradient between them.

What belongs to strips alone (convolution, norm, sigmoid) is small, and its gradient is PyTorch's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from undivided.ops.strips import composed

_GATES = "Tensor row_gate, Tensor column_gate"
_WEIGHTS = (
    "Tensor conv, Tensor norm, Tensor bias, int conv_groups, int norm_groups, float eps, bool is_circular"
)
torch.library.define(
    "undivided::strip_attend",
    "(Tensor x, Tensor[] weights, int conv_groups, int norm_groups, float eps, bool is_circular, bool residual)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("undivided::strip_means", "(Tensor x) -> (Tensor, Tensor)")
torch.library.define("undivided::strip_gate", f"(Tensor strip, {_WEIGHTS}, ScalarType dtype) -> Tensor")
torch.library.define("undivided::strip_products", f"(Tensor x, {_GATES}, bool residual) -> Tensor")
torch.library.define(
    "undivided::strip_gate_gradients", f"(Tensor dout, Tensor x, {_GATES}) -> (Tensor, Tensor)"
)
torch.library.define(
    "undivided::strip_map_gradient",
    f"(Tensor dout, {_GATES}, Tensor row_add, Tensor column_add, bool residual, Tensor x) -> Tensor",
)


@torch.library.impl("undivided::strip_attend", "default")
def _attend_impl(*arguments):
    from undivided.ops.strips import triton

    return triton.attend(*arguments)


@torch.library.impl("undivided::strip_means", "default")
def _means(x):
    from undivided.ops.strips import triton

    return triton.strip_means(x)


@torch.library.impl("undivided::strip_gate", "default")
def _gate(strip, conv, norm, bias, conv_groups, norm_groups, eps, is_circular, dtype):
    from undivided.ops.strips import triton

    options = conv, norm, bias, conv_groups, norm_groups, eps, is_circular
    if triton.has_gate_kernel(strip.shape[1], norm_groups, strip.shape[2]):
        return triton.strip_gate(strip, *options, dtype)
    return composed.gate(strip, *options).to(dtype)


@torch.library.impl("undivided::strip_products", "default")
def _products(*arguments):
    from undivided.ops.strips import triton

    return triton.products(*arguments)


@torch.library.impl("undivided::strip_gate_gradients", "default")
def _gate_gradients(*arguments):
    from undivided.ops.strips import triton

    return triton.gate_gradients(*arguments)


@torch.library.impl("undivided::strip_map_gradient", "default")
def _map_gradient(*arguments):
    from undivided.ops.strips import triton

    return triton.map_gradient(*arguments)


@torch.library.register_fake("undivided::strip_attend")
def _attend_fake(x, *options):
    means = _means_fake(x)
    return torch.empty_like(x), *means, *(torch.empty_like(mean, dtype=x.dtype) for mean in means)


@torch.library.register_fake("undivided::strip_means")
def _means_fake(x):
    batch, channels, height, width = x.shape
    return tuple(x.new_empty((batch, channels, length), dtype=torch.float32) for length in (height, width))


@torch.library.register_fake("undivided::strip_gate")
def _gate_fake(strip, conv, norm, bias, conv_groups, norm_groups, eps, is_circular, dtype):
    return torch.empty_like(strip, dtype=dtype)


@torch.library.register_fake("undivided::strip_products")
def _products_fake(x, row_gate, column_gate, residual):
    return torch.empty_like(x)


@torch.library.register_fake("undivided::strip_gate_gradients")
def _gate_gradients_fake(dout, x, row_gate, column_gate):
    return tuple(torch.empty_like(gate, dtype=torch.float32) for gate in (row_gate, column_gate))


@torch.library.register_fake("undivided::strip_map_gradient")
def _map_gradient_fake(dout, row_gate, column_gate, row_add, column_add, residual, x):
    return torch.empty_like(x)


def _attend(x, weights, options, residual):
    if _is_one_launch(x, *options[:2]):
        out, *found = torch.ops.undivided.strip_attend(x, weights, *options, residual)
        return out, found[:2], found[2:]
    means = torch.ops.undivided.strip_means(x)
    gates = [
        torch.ops.undivided.strip_gate(mean, *own, *options, x.dtype)
        for mean, own in zip(means, (weights[:3], weights[3:]), strict=True)
    ]
    return torch.ops.undivided.strip_products(x, *gates, residual), means, gates


def _is_one_launch(x: torch.Tensor, conv_groups: int, norm_groups: int) -> bool:
    from undivided.ops.strips import triton

    return triton.is_one_launch(x, conv_groups, norm_groups)


class StripAttention(torch.autograd.Function):
    """The products, and the gradients of the map and of the weights of both strips."""

    @staticmethod
    def forward(ctx, x, residual, options, *weights):
        out, means, gates = _attend(x, weights, options, residual)
        ctx.save_for_backward(x, *means, *gates, *weights)
        ctx.options = residual, options
        return out

    @staticmethod
    def backward(ctx, dout):
        x, *saved = ctx.saved_tensors
        means, gates, weights = saved[:2], saved[2:4], saved[4:]
        residual, options = ctx.options
        gradients = torch.ops.undivided.strip_gate_gradients(dout, x, *gates)
        found, adds = [], []
        # Autocast, where it is on around the backward pass too, would round the strips.
        with torch.autocast(dout.device.type, enabled=False):
            for mean, own, gradient in zip(means, (weights[:3], weights[3:]), gradients, strict=True):
                dmean, *dweights = _gate_backward(gradient, mean, *own, *options)
                adds.append(dmean)
                found += [dweight.to(weight.dtype) for dweight, weight in zip(dweights, own, strict=True)]
        dx = torch.ops.undivided.strip_map_gradient(dout, *gates, *adds, residual, x)
        return dx, None, None, *found


def _gate_backward(gradient, strip, conv, norm, bias, conv_groups, norm_groups, eps, is_circular):
    """Returns the gradients of a strip and of the three weights of its gate, in float32; the gate is computed anew."""
    batch, channels, length = strip.shape
    conv, norm, bias = (weight.float() for weight in (conv, norm, bias))
    padding = conv.shape[2] // 2
    padded = F.pad(strip, (padding, padding), mode="circular") if is_circular and padding else strip
    inner = 0 if is_circular else padding
    mixed = F.conv1d(padded, conv, padding=inner, groups=conv_groups)
    aten = torch.ops.aten
    normed, mean, rstd = aten.native_group_norm(mixed, norm, bias, batch, channels, length, norm_groups, eps)
    gate = torch.sigmoid(normed)
    slope = (gradient * gate * (1 - gate)).contiguous()
    dmixed, dnorm, dbias = aten.native_group_norm_backward(
        slope, mixed, mean, rstd, norm, batch, channels, length, norm_groups, [True, True, True]
    )
    dpadded, dconv, _ = aten.convolution_backward(
        dmixed, padded, conv, None, [1], [inner], [1], False, [0], conv_groups, [True, True, False]
    )
    if is_circular and padding:
        dstrip = dpadded[..., padding:-padding].clone()
        dstrip[..., :padding] += dpadded[..., -padding:]
        dstrip[..., -padding:] += dpadded[..., :padding]
        dpadded = dstrip
    return dpadded.contiguous(), dconv, dnorm, dbias


def attend(x, weights, conv_groups, norm_groups, eps, is_circular, residual):
    options = conv_groups, norm_groups, float(eps), is_circular
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights)):
            return StripAttention.apply(x, residual, options, *weights)
        return _attend(x, weights, options, residual)[0]
