"""What every differentiable operator must do under torch.compile and in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


def assert_compiles_whole(function: Callable[..., torch.Tensor], x: dict[str, torch.Tensor]) -> None:
    """The function is one graph to the compiler, with the output and the gradients that it has without.

    Args:
        function: takes the tensors by name.
        x: tensors that require gradients.
    """
    eager = function(**x)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(**x)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(
        torch.autograd.grad(compiled.sum(), list(x.values())),
        torch.autograd.grad(eager.sum(), list(x.values())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def assert_host_never_waits(function: Callable[..., torch.Tensor], x: dict[str, torch.Tensor]) -> None:
    """Forward and backward are captured as a CUDA graph, whose replay gives the same bits.

    Args:
        function: takes the tensors by name.
        x: tensors on a CUDA device that require gradients.
    """
    # Kernels are compiled outside of the graph; grad, unlike backward, leaves no node bound to another stream.
    torch.autograd.grad(function(**x).sum(), list(x.values()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function(**x)
        gradients = torch.autograd.grad(out.sum(), list(x.values()))
        # Its history would keep nodes of the capture's stream at the leaves.
        out = out.detach()
    graph.replay()
    expected = function(**x)
    assert torch.equal(out, expected)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), list(x.values())), strict=True):
        assert torch.equal(ours, theirs)
