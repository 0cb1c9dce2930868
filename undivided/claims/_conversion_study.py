"""Conversions with training, on tiny byte-level models: a source is trained, converted, and taught by itself.

What such tables can show is how fast one initialisation recovers beside another; they say nothing about tasks, and
little about models of useful size. All arms of a seed see the same bytes in the same order.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from undivided.claims._tiny_lm import as_bytes, bits_per_byte, next_byte_loss, tiny_lm, train
from undivided.models.bases import attention_layers
from undivided.models.masks import without_masks
from undivided.training.losses import distillation_loss, feature_loss
from undivided.training.trainers import recorded_calls

_HELD_OUT = "2024-Biden-1"


@dataclass(frozen=True)
class Scale:
    """Sizes of the source and of its training.

    Args:
        sizes: fields of the Llama config.
        batch_size, length: windows a step and bytes a window.
        source_steps: training of the source.
        learning_rate: of the source; what is taught has a third of it.
    """

    sizes: dict[str, int]
    batch_size: int
    length: int
    source_steps: int
    learning_rate: float = 3e-3

    @property
    def where(self) -> str:
        """In words."""
        layers, width = self.sizes["num_hidden_layers"], self.sizes["hidden_size"]
        heads = f"{self.sizes['num_attention_heads']}:{self.sizes['num_key_value_heads']} heads"
        return f"byte model, {layers} layers, width {width}, {heads}"

    def tokens(self, steps: int) -> str:
        """How many bytes so many steps are, in words."""
        return f"{steps * self.batch_size * self.length:,} bytes"


def scale_of(device: str, key_heads: int) -> Scale:
    """The sizes that a device trains in seconds."""
    if device == "cuda":
        sizes = {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
        }
        return Scale(sizes | {"num_key_value_heads": key_heads, "head_dim": 32}, 32, 256, 600)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 8}
    return Scale(sizes | {"num_key_value_heads": key_heads, "head_dim": 16}, 16, 128, 400)


class ConversionStudy:
    """A trained source of one seed, and what teaches and judges its conversions."""

    def __init__(self, scale: Scale, seed: int, device: str, source_steps: int | None = None) -> None:
        from undivided.data import demo_texts

        texts = demo_texts()
        self.scale, self.seed, self.device = scale, seed, device
        self.text, self.heldout = texts.calibration, texts.heldout[_HELD_OUT]
        self.source_steps = scale.source_steps if source_steps is None else source_steps
        self.source = self.trained(scale.learning_rate, scale.sizes)

    def trained(self, rate: float, sizes: dict[str, int]) -> nn.Module:
        """Returns a frozen model of other sizes, trained as long as the source, on the same bytes."""
        model = tiny_lm(None, self.seed, **sizes).to(self.device)
        self._train(model, self.source_steps, rate, None)
        return model.eval().requires_grad_(False)

    def convert(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> nn.Module:
        """Converts a copy of the source, so that training changes nothing that it shares."""
        return function(copy.deepcopy(self.source), *arguments, **options)[0].requires_grad_(True)

    def calibration(self, samples: int = 16) -> torch.Tensor:
        """Windows of the text `[samples, length]`."""
        data, length = as_bytes(self.text), self.scale.length
        starts = torch.linspace(0, len(data) - length, samples).long()[:, None]
        return data[starts + torch.arange(length)].to(self.device)

    def teach(
        self, model: nn.Module, steps: int, *, layers: int = 0, teacher: nn.Module | None = None
    ) -> nn.Module:
        """Teaches a model a teacher's next bytes, by default the source's, the first `layers` steps layer by layer."""
        teacher = self.source if teacher is None else teacher
        with without_masks(teacher):
            if layers:
                self._train(model, layers, self.scale.learning_rate, self._layer_loss)
            if steps > layers:
                loss = functools.partial(_divergence, teacher)
                self._train(model, steps - layers, self.scale.learning_rate / 3, loss)
        return model.eval()

    def tune(self, model: nn.Module, steps: int) -> nn.Module:
        """Trains a model on the text itself."""
        self._train(model, steps, self.scale.learning_rate / 3, None)
        return model.eval()

    def bits(self, model: nn.Module) -> float:
        """Bits a byte on held-out text."""
        return bits_per_byte(model, self.heldout, length=self.scale.length, most_bytes=16384)

    @torch.no_grad()
    def divergence(self, model: nn.Module) -> float:
        """Mean divergence of the next byte's distribution from the source's on held-out text, in nats."""
        length = self.scale.length
        data = as_bytes(self.heldout)[:16384]
        windows = data[: len(data) // length * length].view(-1, length).to(self.device)
        model.eval()
        return torch.stack(
            [_divergence(self.source, model, ids) * len(ids) for ids in windows.split(32)]
        ).sum().item() / len(windows)

    def _train(self, model: nn.Module, steps: int, rate: float, loss: Any) -> None:
        if steps < 1:
            return
        train(
            model, self.text, steps=steps, batch_size=self.scale.batch_size, length=self.scale.length,
            learning_rate=rate, seed=self.seed, loss=loss or next_byte_loss,
        )  # fmt: skip

    def _layer_loss(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), recorded_calls(attention_layers(self.source)) as calls:
            self.source(input_ids=ids, use_cache=False)
        errors = [
            feature_loss(layer(**call)[0], expected)
            for layer, (call, expected) in zip(attention_layers(model), calls, strict=True)
        ]
        return torch.stack(errors).mean()


def _divergence(teacher: nn.Module, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        taught = teacher(input_ids=ids, use_cache=False).logits
    return distillation_loss(model(input_ids=ids, use_cache=False).logits, taught)
