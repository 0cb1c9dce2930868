"""timm's contract of a model, once for all backbones here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import ClassifierHead
from torch import nn
from torch.utils.checkpoint import checkpoint

from undivided.layers._vision import Size, to_map
from undivided.models.vision._initialisation import initialise, truncated_normal
from undivided.models.vision._official import Renaming


class Stage(nn.Module):
    """Base of the stages: `forward(x [B, N, C], size)` gives tokens and their size, which may be others.

    `run` recomputes a block in the backward pass where the model was told to (`set_grad_checkpointing`).
    """

    grad_checkpointing = False

    def run(self, block: nn.Module, *arguments: Any) -> Any:
        """Returns `block(*arguments)`."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


class VisionBackbone(nn.Module):
    """A backbone of stages, a last norm, and a classifier on the mean of the tokens, with timm's methods.

    A family builds `stem`, `stages` and `norm` and hands them over. What is its own it says by class attributes:
    `renamings` (the names in released checkpoints), `generic_initialisation` (what holds for all modules),
    `feature_indices` (stages of `features_only`). Its layers may have `initialise()`, called after the generic one,
    and `undecayed`, names of their parameters without weight decay.

    Args:
        stem: image `[B, in_chans, H, W]` -> tokens `[B, N, C]` and their size.
        stages: each takes tokens and size and returns tokens and size.
        norm: of the last tokens.
        channels: width of the tokens after each stage.
        reductions: image pixels per token along one axis, after each stage.
        num_classes: classes; 0 for no classifier.
        in_chans: channels of an image.
        global_pool: timm's name of the pooling; "" for none.
        drop_rate: dropout before the classifier.
        device, dtype: of the classifier.
    """

    renamings: ClassVar[dict[str, Renaming]] = {}
    feature_indices: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)
    generic_initialisation = staticmethod(truncated_normal)
    output_fmt = "NCHW"

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[nn.Module],
        norm: nn.Module,
        *,
        channels: Sequence[int],
        reductions: Sequence[int],
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = channels[-1]
        self.drop_rate = drop_rate
        self.global_pool = global_pool
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = norm
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": width, "reduction": reduction, "module": f"stages.{index}"}
            for index, (width, reduction) in enumerate(zip(channels, reductions, strict=True))
        ]
        self.head = self._new_head(num_classes, global_pool, device, dtype)
        initialise(self, type(self).generic_initialisation)

    def _new_head(self, num_classes: int, global_pool: str, device: Any, dtype: Any) -> ClassifierHead:
        head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=self.drop_rate,
            device=device,
            dtype=dtype,
        )
        self.head_hidden_size = self.num_features * head.global_pool.feat_mult()
        return head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalised last map, `[B, num_features, h, w]`."""
        x, size = self.stem(x)
        for stage in self.stages:
            x, size = stage(x, size)
        return self.features(self.norm(x), size)

    def features(self, x: torch.Tensor, size: Size) -> torch.Tensor:
        """Returns what timm shall see of tokens: a map `[B, C, h, w]`."""
        return to_map(x, size)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Returns the logits `[B, num_classes]` of a last map, or with `pre_logits` what the classifier reads."""
        return self.head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the last map and those after stages.

        Args:
            x: images `[B, in_chans, H, W]`.
            indices: of stages; a number for the last ones, None for all.
            norm: normalise the last stage's; the others have no norm.
            stop_early: do not run stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: return the list alone.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt={output_fmt!r} must be "NCHW".')
        taken, last = taken_stages(len(self.stages), indices)
        x, size = self.stem(x)
        intermediates = []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x, size = stage(x, size)
            if index in taken:
                normalised = norm and index == len(self.stages) - 1
                intermediates.append(self.features(self.norm(x) if normalised else x, size))
        if intermediates_only:
            return intermediates
        if index == len(self.stages) - 1:
            x = self.norm(x)
        return self.features(x, size), intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the stages after the last one asked for, and what comes after them; returns the indices."""
        taken, last = taken_stages(len(self.stages), indices)
        is_cut = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if is_cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if is_cut or prune_norm:
            # The norm is of the last stage's width.
            self.norm = nn.Identity()
        if is_cut or prune_head:
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """Returns the last linear layer."""
        return self.head.fc

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None, device: Any = None, dtype: Any = None
    ) -> None:
        """Exchanges the classifier for a fresh one of `num_classes` classes, 0 for none."""
        here = next(self.parameters())
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = self._new_head(
            num_classes,
            self.global_pool,
            here.device if device is None else device,
            here.dtype if dtype is None else dtype,
        )
        initialise(self.head, type(self).generic_initialisation)
        self.head.train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recomputes each block in the backward pass."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters without weight decay: those that their module lists in `undecayed`."""
        return {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in self.named_modules()
            for name in getattr(module, "undecayed", ())
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns the groups of parameters for learning rates that fall with depth."""
        if coarse:
            return {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}
        # What stands before the blocks of a stage belongs to the first of them.
        before = (r"^stages\.(\d+)\.(?!blocks)", (0,))
        block = (r"^stages\.(\d+)\.blocks\.(\d+)", None)
        return {"stem": r"^stem", "blocks": [before, block, (r"^norm", (99999,))]}


def taken_stages(num_stages: int, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
    """Returns the stages that `indices` means, from zero, and the last of them.

    Args:
        num_stages: how many there are.
        indices: a number for the last ones, None for all, or indices; negative ones count from the end.

    Raises:
        ValueError: there are not so many stages.
    """
    if indices is None:
        indices = num_stages
    if isinstance(indices, int):
        if not 1 <= indices <= num_stages:
            raise ValueError(f"indices={indices} must be from 1 to the {num_stages} stages.")
        indices = range(num_stages - indices, num_stages)
    for index in indices:
        if not -num_stages <= index < num_stages:
            raise ValueError(f"indices has {index}, but there are {num_stages} stages.")
    taken = [index % num_stages for index in indices]
    return taken, max(taken)
