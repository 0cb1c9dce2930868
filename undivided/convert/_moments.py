"""Second moments of activations, and the axes they decide: what the data-dependent conversions share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from torch import nn

from undivided.models.evaluation import Progress, no_progress


@torch.no_grad()
def observe(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    input_ids: torch.Tensor,
    receive: Callable[[str, torch.Tensor], None],
    *,
    batch_size: int = 8,
    progress: Progress = no_progress,
    description: str = "calibration",
) -> None:
    """Runs `model` over `input_ids` `[samples, length]` and hands every output of the named modules to `receive`."""

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
            receive(name, output)

        return keep

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(hook(name))
            stack.callback(handle.remove)
        for batch in progress(input_ids.split(batch_size), description):
            # Logits are not needed: the last position alone keeps the vocabulary's matrix out of the way.
            model(input_ids=batch.to(device), use_cache=False, logits_to_keep=1)


def second_moments(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    input_ids: torch.Tensor,
    *,
    batch_size: int = 8,
    progress: Progress = no_progress,
    description: str = "calibration",
) -> dict[str, torch.Tensor]:
    """Returns `E[y y^T]`, uncentred, float64, over all positions of the output y of each named module.

    The mean square is what an RMS normalisation and a truncation of a latent both see; a mean is not subtracted.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = dict.fromkeys(modules, 0)

    def receive(name: str, output: torch.Tensor) -> None:
        rows = output.flatten(0, -2).double()
        sums[name] = rows.T @ rows + sums.get(name, 0.0)
        counts[name] += rows.shape[0]

    observe(
        model, modules, input_ids, receive, batch_size=batch_size, progress=progress, description=description
    )
    return {name: total / counts[name] for name, total in sums.items()}


def principal_axes(moment: torch.Tensor, damping: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the eigenvectors (columns) and eigenvalues of a second moment, largest first, in float64.

    `damping` times the mean of the diagonal is added to the diagonal before, so that the axes of a nearly singular
    moment are well defined; the eigenvalues returned are those of the moment itself.
    """
    moment = moment.double()
    damped = moment + damping * moment.diagonal().mean() * torch.eye(
        len(moment), dtype=moment.dtype, device=moment.device
    )
    _, vectors = torch.linalg.eigh(damped)
    vectors = vectors.flip(-1)
    values = torch.einsum("ik,ij,jk->k", vectors, moment, vectors)
    return vectors, values
