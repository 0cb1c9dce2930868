"""Small vision transformers, trained on small real images in seconds to a minute: for the quality tables of claims.

What such a table can show is that a mechanism trains, and differences larger than those between seeds; it says nothing
about ImageNet. All arms of a table see the same images in the same order for a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.data.images import ImageSet

_DECAY, _CLIP, _BETAS, _LAST_RATE = 0.05, 1.0, (0.9, 0.95), 0.01


def tiny_vit(images: ImageSet, seed: int = 0, *, patch_size: int, **sizes: Any) -> nn.Module:
    """Returns an untrained timm `VisionTransformer` for a set of images; the mean of its tokens is classified.

    Args:
        images: decides image size, channels and classes.
        seed: of the weights.
        patch_size: pixels of a patch's side.
        sizes: `embed_dim`, `depth`, `num_heads` and further arguments of the class.
    """
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=images.train_images.shape[-1], patch_size=patch_size, in_chans=images.train_images.shape[1],
        num_classes=images.num_classes, class_token=False, global_pool="avg", **sizes,
    )  # fmt: skip


def on_device(images: ImageSet, device: str) -> ImageSet:
    """Returns the set on a device."""
    names = ("train_images", "train_labels", "test_images", "test_labels")
    return ImageSet(images.name, **{name: getattr(images, name).to(device) for name in names})


class Trainer:
    """Trains a classifier in place: AdamW, warm-up, cosine decay, clipped gradients, images moved and mirrored.

    On CUDA a step is one CUDA graph, in bf16, captured once: a model that waits for the device cannot be trained so.
    `run` may be called again after `reset`, for another seed.

    Args:
        model: a classifier, on the device of the images.
        images: the set.
        batch_size: images a step.
        shift: move images by up to so many pixels.
        flip: mirror half of them.
    """

    def __init__(
        self, model: nn.Module, images: ImageSet, *, batch_size: int, shift: int = 0, flip: bool = False
    ) -> None:
        self.model = model
        self.images = images
        self.shift, self.flip = shift, flip
        self.device = images.train_images.device
        on_cuda = self.device.type == "cuda"
        self.x = normalised(images.train_images[:batch_size])
        self.y = images.train_labels[:batch_size].clone()
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": vectors, "weight_decay": 0.0}]
        # In a graph the rate must be a tensor, to be changed from outside.
        rate = torch.zeros((), device=self.device) if on_cuda else 0.0
        self.optimiser = torch.optim.AdamW(groups, lr=rate, betas=_BETAS, fused=on_cuda, capturable=on_cuda)
        model.train()
        self.graph = self._captured() if on_cuda else None

    def reset(self, state: Mapping[str, torch.Tensor]) -> None:
        """Starts from the parameters and buffers of `state`, and from an optimiser that has seen nothing."""
        self.model.load_state_dict(state)
        for own in self.optimiser.state.values():
            for value in own.values():
                value.zero_()

    def run(
        self,
        *,
        steps: int,
        learning_rate: float,
        seed: int = 0,
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Trains.

        Args:
            steps, learning_rate: of the optimiser; the highest rate.
            seed: of the order of the images and of their moves.
            after_step: called with the number of steps done.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        order = torch.empty(0, dtype=torch.int64, device=self.device)
        count, batch_size = len(self.images.train_images), len(self.y)
        self.model.train()
        for step in range(steps):
            if len(order) < batch_size:
                order = torch.cat([order, torch.randperm(count, generator=generator, device=self.device)])
            chosen, order = order[:batch_size], order[batch_size:]
            self.x.copy_(augmented(self.images.train_images[chosen], generator, self.shift, self.flip))
            self.y.copy_(self.images.train_labels[chosen])
            self._set_rate(learning_rate * _decay(step, steps))
            if self.graph is None:
                self._step()
            else:
                self.graph.replay()
            if after_step is not None:
                after_step(step + 1)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _step(self) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        with computing(self.device):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimiser.step()

    def _captured(self) -> torch.cuda.CUDAGraph:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph


@torch.no_grad()
def accuracy(model: nn.Module, images: ImageSet, batch_size: int = 1000) -> float:
    """Returns the share of test images whose class is found, in percent."""
    was_training = model.training
    model.eval()
    right = []
    for x, y in zip(images.test_images.split(batch_size), images.test_labels.split(batch_size), strict=True):
        with computing(x.device):
            right.append((model(normalised(x)).argmax(-1) == y).sum())
    model.train(was_training)
    return 100 * int(torch.stack(right).sum()) / len(images.test_labels)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """Returns images as float32 from -1 to 1."""
    return images.float() / 127.5 - 1


def augmented(
    images: torch.Tensor, generator: torch.Generator, shift: int = 0, flip: bool = False
) -> torch.Tensor:
    """Returns normalised images, each moved by up to `shift` pixels and, with `flip`, mirrored half of the time."""
    count, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4)
    corner = torch.randint(2 * shift + 1, (2, count, 1), generator=generator, device=images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    if flip:
        mirrored = torch.rand(count, 1, generator=generator, device=images.device) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(count, device=images.device)[:, None, None]
    moved = padded[sample, :, rows[:, :, None], columns[:, None, :]]
    return normalised(moved.permute(0, 3, 1, 2))


def computing(device: torch.device) -> ExitStack:
    """On CUDA: bf16, and flash attention, because others plan for a second at every new shape."""
    stack = ExitStack()
    if device.type == "cuda":
        from torch.nn.attention import SDPBackend, sdpa_kernel

        stack.enter_context(torch.autocast("cuda", torch.bfloat16, cache_enabled=False))
        stack.enter_context(sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]))
    return stack


def _decay(step: int, steps: int) -> float:
    warm_up = max(steps // 20, 1)
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
