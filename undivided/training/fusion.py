"""The training that fuses heads: operators mix the heads of a group, and a constraint pulls them together.

Source: DHA (arXiv 2406.06567), section 4; the form of the constraint is that of Sheared LLaMA (arXiv 2310.06694).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

if TYPE_CHECKING:
    from undivided.layers.dha import Groups

LOSSES = ("operator", "weight")
_OPERATOR_RATE = 1e-2


@dataclass(frozen=True, kw_only=True)
class FusionRecipe:
    """How heads are fused.

    Args:
        steps: optimiser steps; the allowed fusion loss falls linearly to zero over them.
        learning_rate: of the model's weights.
        operator_rate: of fusion operators and multipliers.
        batch_size: sequences a step.
        loss: "operator", differences between operators, or "weight", between the heads that they make.
        bf16: bfloat16 by autocast; default on CUDA.
        seed: of the order of the sequences.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int
    learning_rate: float = 1e-4
    operator_rate: float = _OPERATOR_RATE
    batch_size: int = 8
    loss: str = "operator"
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"steps={self.steps} and batch_size={self.batch_size} must be at least 1.")
        if not (self.learning_rate > 0 and self.operator_rate > 0):
            raise ValueError(
                f"learning_rate={self.learning_rate} and operator_rate={self.operator_rate} must be positive."
            )
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is not one of {', '.join(map(repr, LOSSES))}.")


class FusedHeads(nn.Module):
    """A projection to heads, mixed within groups: head j of a group is `sum_k operator_jk W_k`.

    The operators begin as the identity, with which this is the projection that it was made of.

    Args:
        linear: projection to H heads; its parameters are taken over.
        groups: `[groups, size]`, heads of each group; every head once.
    """

    def __init__(self, linear: nn.Linear, groups: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.register_buffer("groups", groups.to(device))
        self.register_buffer("places", groups.to(device).flatten().argsort())
        eye = torch.eye(
            groups.shape[1], dtype=torch.promote_types(linear.weight.dtype, torch.float32), device=device
        )
        self.operator = nn.Parameter(eye.repeat(len(groups), 1, 1))

    groups: torch.Tensor
    places: torch.Tensor

    def fused(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns `[groups, size, head_dim, ...]`, the heads that the operators make of `[H * head_dim, ...]`."""
        heads = rows.unflatten(0, (self.groups.numel(), -1))[self.groups]
        return torch.einsum("gjk,gk...->gj...", self.operator.to(rows.dtype), heads)

    def projection(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns weight and bias with the heads in their old order."""

        def in_order(rows: torch.Tensor) -> torch.Tensor:
            return self.fused(rows).flatten(0, 1)[self.places].flatten(0, 1)

        return in_order(self.weight), None if self.bias is None else in_order(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, *self.projection())

    def loss(self, kind: str = "operator") -> torch.Tensor:
        """How far the heads of a group are apart, the mean over groups; 0 if and only if they are equal.

        "operator": `sum_{j < j'} ||operator_j - operator_j'||^2`; "weight": `sum_j ||W_j - mean W||^2 / ||W||^2`.
        """
        if kind == "operator":
            rows = self.operator
            # sum over pairs of squared distances = size * sum of squared distances from the mean
            return rows.shape[1] * (rows - rows.mean(1, keepdim=True)).square().sum((1, 2)).mean()
        heads = self.fused(self.weight).flatten(2).to(self.operator.dtype)
        apart = (heads - heads.mean(1, keepdim=True)).square().sum((1, 2))
        return (apart / heads.square().sum((1, 2)).clamp(min=torch.finfo(heads.dtype).tiny)).mean()


class LagrangianConstraint(nn.Module):
    """`m_1 (loss - target) + m_2 (loss - target)^2`, whose multipliers m climb while everything else descends.

    Their gradient is turned around, so that one optimiser moves both ways; they begin at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.multipliers = nn.Parameter(torch.zeros(2))

    def forward(self, loss: torch.Tensor, target: torch.Tensor | float) -> torch.Tensor:
        excess = loss - target
        climbing = 2 * self.multipliers.detach() - self.multipliers
        return climbing[0].to(loss.dtype) * excess + climbing[1].to(loss.dtype) * excess.square()


class FusionTrainer(Trainer):
    """Trains a model with `FusedHeads` on its own next tokens, under the constraint that heads become equal.

    Args:
        constraint: part of the model, so that the optimiser and checkpoints have it.
        fused: the projections with operators.
        recipe: rates, steps and the form of the fusion loss.
        args, kwargs: those of `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        constraint: LagrangianConstraint,
        fused: Sequence[FusedHeads],
        recipe: FusionRecipe,
        **kw: Any,
    ) -> None:
        super().__init__(*args, **kw)
        self.model_accepts_loss_kwargs = False
        self.constraint, self.fused, self.recipe = constraint, fused, recipe
        with torch.no_grad():
            self.start = self.fusion_loss()

    def fusion_loss(self) -> torch.Tensor:
        """The mean over layers and kinds."""
        return torch.stack([each.loss(self.recipe.loss) for each in self.fused]).mean()

    def target(self) -> torch.Tensor:
        """What the fusion loss may be at this step: from what it was in a line to 0 at the last but one."""
        done = self.state.global_step / max(self.recipe.steps - 1, 1)
        return self.start * max(1 - done, 0.0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if getattr(self, "optimizer", None) is None:
            own = [*(each.operator for each in self.fused), self.constraint.multipliers]
            known = {id(parameter) for parameter in own}
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in known]
            groups = [{"params": rest}, {"params": own, "lr": self.recipe.operator_rate}]
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
                groups, lr=self.recipe.learning_rate, weight_decay=0.0
            )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        ids = inputs["input_ids"]
        out = model(input_ids=ids, labels=ids, use_cache=False)
        loss = out.loss + self.constraint(self.fusion_loss(), self.target())
        return (loss, out) if return_outputs else loss


def fuse(
    model: PreTrainedModel,
    grouped: Sequence[Groups],
    sequences: torch.Tensor | None,
    recipe: FusionRecipe,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda iterable, description: iterable,
) -> torch.Tensor:
    """Trains a model so that the heads of each group become equal, and leaves it with the heads that came of it.

    Args:
        model: a host as `undivided.convert.dha.multi_head` makes it; trained in place.
        grouped: the groups of keys and values of every layer.
        sequences: token ids `[number, length]`.
        recipe: how to train.
        progress: wraps the loop over steps.

    Returns:
        What is left of the fusion loss of every layer's keys and values, `[layers, 2]`.

    Raises:
        ValueError: there are no sequences.

    Source: DHA (arXiv 2406.06567), section 4.
    """
    if sequences is None or sequences.dim() != 2 or not sequences.numel():
        raise ValueError("sequences must be token ids [number, length], not empty.")
    places = [
        (layer, kind, groups[kind])
        for layer, groups in zip(model.attention_layers(), grouped, strict=True)
        for kind in groups
    ]
    for layer, kind, groups in places:
        setattr(layer, kind, FusedHeads(getattr(layer, kind), groups))
    fused = [getattr(layer, kind) for layer, kind, _ in places]
    model.fusion_constraint = LagrangianConstraint().to(model.device)
    on_cuda = model.device.type == "cuda"
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                output_dir=folder,
                max_steps=recipe.steps,
                per_device_train_batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                lr_scheduler_type="constant",
                bf16=on_cuda if recipe.bf16 is None else recipe.bf16,
                seed=recipe.seed,
                use_cpu=not on_cuda,
                save_strategy="no",
                report_to="none",
                log_level="error",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            )
            trainer = FusionTrainer(
                model, arguments, train_dataset=[{"input_ids": row} for row in sequences], data_collator=_stacked,
                callbacks=[_Steps(progress(range(recipe.steps), "fusing heads"))],
                constraint=model.fusion_constraint, fused=fused, recipe=recipe,
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        with torch.no_grad():
            left = torch.stack([each.loss(recipe.loss).double().cpu() for each in fused])
    finally:
        del model.fusion_constraint
        for layer, kind, _ in places:
            setattr(layer, kind, _linear(getattr(layer, kind)))
    model.eval()
    return left.view(len(grouped), -1)


@torch.no_grad()
def _linear(fused: FusedHeads) -> nn.Linear:
    weight, bias = fused.projection()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear


def _stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


class _Steps(TrainerCallback):
    """Moves a progress bar on with every step."""

    def __init__(self, steps: Iterable[Any]) -> None:
        self.steps = iter(steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        next(self.steps, None)
