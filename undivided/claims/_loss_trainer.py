"""The small trainer of vision models, for losses other than that of classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from undivided.claims._tiny_vit import Trainer, computing
from undivided.data.images import ImageSet

_CLIP = 1.0


class LossTrainer(Trainer):
    """Trains in place, as `Trainer`, what `loss(model, images, labels)` asks for; parameters without gradients rest.

    Args:
        model: on the device of the images.
        images: the set.
        loss: of normalised images `[B, C, H, W]` and labels `[B]`.
        batch_size: images a step.
    """

    def __init__(
        self,
        model: nn.Module,
        images: ImageSet,
        loss: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor],
        *,
        batch_size: int,
    ) -> None:
        self.loss = loss
        super().__init__(model, images, batch_size=batch_size)

    def _step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        with computing(self.device):
            loss = self.loss(self.model, self.x, self.y)
        loss.backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        nn.utils.clip_grad_norm_(trained, _CLIP)
        self.optimiser.step()


def small_images(device: str) -> ImageSet:
    """Returns Fashion-MNIST on a device where it is at hand, else the digits of scikit-learn."""
    from undivided.claims._tiny_vit import on_device
    from undivided.data.images import digits, fashion_mnist

    if device != "cuda":
        return on_device(digits(), device)
    try:
        images = fashion_mnist()
    except FileNotFoundError:
        images = digits()
    return on_device(images, device)
