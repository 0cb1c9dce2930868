"""Trainers that learn from a teacher; resuming, mixed precision and many GPUs are those of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from undivided.models.bases import attention_layers
from undivided.training.losses import distillation_loss, feature_loss


class _TaughtTrainer(Trainer):
    """A trainer with a frozen teacher on the student's device."""

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Losses are means over positions: they are averaged, not summed, over accumulated steps.
        self.model_accepts_loss_kwargs = False
        self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)


class DistillationTrainer(_TaughtTrainer):
    """Trains a model on its teacher's distribution of the next token, at every position but the last.

    `loss = kl * KL(teacher || student) + cross_entropy * CE(student) + features * mean_l feature_loss_l + aux`, with
    the residual streams after every layer as features, and the auxiliary losses that the model itself returns.

    Args:
        teacher: a model with the same tokens; frozen.
        kl, cross_entropy, features: weights of the three terms; at least one is positive.
        temperature: of the distributions.
        compile_loss: whether the divergence is compiled, which then reads the logits twice and not some twenty times.
        args, kwargs: those of `transformers.Trainer`.

    Raises:
        ValueError: a weight is negative or none is positive.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        kl: float = 1.0,
        cross_entropy: float = 0.0,
        features: float = 0.0,
        temperature: float = 1.0,
        compile_loss: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, teacher=teacher, **kwargs)
        weights = {"kl": kl, "cross_entropy": cross_entropy, "features": features}
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ValueError(f"{weights}: weights must be 0 or more, and at least one above 0.")
        self.kl, self.cross_entropy, self.features = kl, cross_entropy, features
        self.temperature = temperature
        self.divergence = torch.compile(distillation_loss) if compile_loss else distillation_loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        given["output_hidden_states"] = self.features > 0
        if self.cross_entropy > 0:
            labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
            out = model(**given, labels=labels)
        else:
            out = model(**given)
        # What layers return beside their output is in the model's loss already; it counts whatever the weights.
        auxiliary = getattr(out, "aux_loss", None)
        loss = torch.zeros((), device=ids.device) if auxiliary is None else auxiliary
        if self.cross_entropy > 0:
            own = out.loss if auxiliary is None else out.loss - auxiliary
            loss = loss + self.cross_entropy * own
        if self.kl > 0 or self.features > 0:
            with torch.no_grad():
                taught = self.teacher(**given)
        if self.kl > 0:
            predicted = None if mask is None else mask[:, 1:].bool()
            loss = loss + self.kl * self.divergence(
                out.logits[:, :-1], taught.logits[:, :-1], predicted, temperature=self.temperature
            )
        if self.features > 0:
            pairs = zip(out.hidden_states[1:], taught.hidden_states[1:], strict=True)
            seen = None if mask is None else mask.bool()
            errors = [feature_loss(own, other, seen) for own, other in pairs]
            loss = loss + self.features * torch.stack(errors).mean()
        return (loss, out) if return_outputs else loss


class LayerwiseTrainer(_TaughtTrainer):
    """Trains the attention layers alone, each on what the teacher's layer of the same place reads and writes.

    `loss = mean_l feature_loss(student_l(x_l), teacher_l(x_l))`, where x_l is what reaches layer l of the teacher:
    errors do not pile up over the layers, and every layer has a gradient of its own size.

    Args:
        teacher: a model of the same width and depth; frozen.
        args, kwargs: those of `transformers.Trainer`. Of the model, only parameters of attention layers get a gradient.

    Raises:
        ValueError: there are several processes; their gradients would not be averaged.

    Source: TPLA (arXiv 2508.15881), alignment, first stage.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, teacher=teacher, **kwargs)
        if self.args.world_size > 1:
            raise ValueError(
                f"world_size={self.args.world_size}: the layers are called one by one, past the wrapper that averages "
                "gradients over processes; run this stage in one process."
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        student = self.accelerator.unwrap_model(model)
        mask = inputs.get("attention_mask")
        with torch.no_grad(), recorded_calls(attention_layers(self.teacher)) as calls:
            self.teacher(input_ids=inputs["input_ids"], attention_mask=mask, use_cache=False)
        seen = None if mask is None else mask.bool()
        errors = [
            feature_loss(layer(**call)[0], expected, seen)
            for layer, (call, expected) in zip(attention_layers(student), calls, strict=True)
        ]
        loss = torch.stack(errors).mean()
        return (loss, {"loss": loss}) if return_outputs else loss


@contextmanager
def recorded_calls(layers: list[nn.Module]) -> Iterator[list[tuple[dict[str, Any], torch.Tensor]]]:
    """Within the context, the keywords and the output of each layer's next call are appended, in the order of calls."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    wanted = ("hidden_states", "position_embeddings", "attention_mask")

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named = dict(zip(wanted, args, strict=False)) | kwargs
        calls.append(({name: named[name] for name in wanted}, output[0]))

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
