"""Sparsifiner from a trained vision transformer: its attention gets predictors of keys, trained in two phases.

Phase 1 trains the predictors alone to reproduce the attention maps, which stay as they are; phase 2 freezes them and
trains the backbone under the masks, with the model it came from as its teacher.

Source: Sparsifiner (arXiv 2303.13755), section 3.4, and the authors' code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.convert._report import ConversionLog, Report
from undivided.layers.sparsifiner import PHASES, AliveTokens, SparsifinerAttention

# Not trained in either phase, as in the authors' recipe.
_FIXED = ("cls_token", "pos_embed")


def sparsify(
    vit: nn.Module,
    *,
    keep: float = 0.25,
    reduce_n: int = 6,
    reduce_c: int = 2,
    basis_threshold: float = 2e-2,
    coef_topk: int = 8,
    coef_threshold: float | None = None,
    score_threshold: float | None = None,
    predictor_scale: float | None = None,
    share_basis: bool = False,
    impl: str = "masked",
    prune_after: Sequence[int] = (),
    token_keep: float = 0.7,
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
) -> tuple[nn.Module, Report]:
    """Returns a copy of a vision transformer whose attention is to predicted keys, with new predictors.

    Args:
        vit: a timm `VisionTransformer` with a class token and without norms of queries and keys, or the `LVViT` of
            `undivided.models.vision.lvvit`.
        keep, reduce_n, reduce_c, basis_threshold, coef_topk, coef_threshold, score_threshold, predictor_scale,
            share_basis, impl: as in `SparsifinerAttention`.
        prune_after: blocks after which patches are dropped, such as (3, 6, 9).
        token_keep: share r of the patches; after the i-th such block `ceil(r^i * patches)` are left.
        seed: of the predictors.
        evaluate: returns a number that says how good a model is; it fills the report's `perplexity`, whatever it is.

    Returns:
        The model, in phase "sparse", and the report. Its stages are "original" and "sparse".

    Raises:
        ValueError: a model without a class token or with other attention, blocks that it does not have, or sizes that
            do not fit.

    Source: Sparsifiner (arXiv 2303.13755).
    """
    blocks = getattr(vit, "blocks", None)
    prefix = getattr(vit, "num_prefix_tokens", 0)
    if blocks is None or prefix != 1:
        raise ValueError(
            f"vit is a {type(vit).__name__} with {prefix} tokens before the patches; it must be a VisionTransformer of "
            "timm with a class token alone."
        )
    wrong = [index for index in prune_after if not 0 <= index < len(blocks)]
    if wrong:
        raise ValueError(f"prune_after has {wrong[0]}, but vit has {len(blocks)} blocks.")
    if not 0 < token_keep <= 1:
        raise ValueError(f"token_keep={token_keep} must be above 0 and at most 1.")
    log = ConversionLog(evaluate)
    log.evaluate("original", vit)
    model = copy.deepcopy(vit)
    patches = model.patch_embed.num_patches
    tokens = AliveTokens() if prune_after else None
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    for index, block in enumerate(model.blocks):
        source = block.attn
        if getattr(source, "qkv", None) is None or not isinstance(
            getattr(source, "q_norm", None), nn.Identity
        ):
            raise ValueError(
                f"blocks[{index}].attn is a {type(source).__name__}; it must be timm's Attention without qk_norm."
            )
        power = sorted(prune_after).index(index) + 1 if index in prune_after else None
        layer = SparsifinerAttention(
            source.qkv.in_features, source.num_heads, patches + 1, keep=keep, reduce_n=reduce_n, reduce_c=reduce_c,
            basis_threshold=basis_threshold, coef_topk=coef_topk, coef_threshold=coef_threshold,
            score_threshold=score_threshold, predictor_scale=predictor_scale, share_basis=share_basis, impl=impl,
            tokens=tokens, tokens_kept=None if power is None else math.ceil(token_keep**power * patches),
            qkv_bias=source.qkv.bias is not None, proj_bias=source.proj.bias is not None,
            proj_drop=source.proj_drop.p,
        ).to(source.qkv.weight)  # fmt: skip
        layer.load_state_dict(source.state_dict() | _prefixed("predictor.", layer.predictor.state_dict()))
        block.attn = layer.train(source.training)
        if tokens is not None:
            block.register_forward_hook(_Silence(tokens))
    if tokens is not None:
        model.blocks[0].register_forward_pre_hook(_Reset(tokens))
    torch.set_rng_state(generator_state)
    log.evaluate("sparse", model)
    if score_threshold is not None:
        log.approximate(
            f"each query but the class token's attends to keys of a score above {score_threshold}"
        )
    elif keep < 1:
        budget = layer.predictor.budget
        log.approximate(f"each query but the class token's attends to {budget} of {patches + 1} keys")
    if prune_after:
        log.approximate(f"patches are dropped after blocks {', '.join(map(str, sorted(prune_after)))}")
    options = {
        "keep": keep, "reduce_n": reduce_n, "reduce_c": reduce_c, "basis_threshold": basis_threshold,
        "coef_topk": coef_topk, "coef_threshold": coef_threshold, "score_threshold": score_threshold, "impl": impl,
        "prune_after": list(prune_after), "token_keep": token_keep, "seed": seed,
    }  # fmt: skip
    return model, log.report("sparsifiner", options, 0)


def _prefixed(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@dataclass
class _Reset:
    """Before the first block: all tokens are in use."""

    tokens: AliveTokens

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        self.tokens.mask = self.tokens.count = None


@dataclass
class _Silence:
    """After a block: tokens that are not in use are zero."""

    tokens: AliveTokens

    def __call__(self, module: nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
        if self.tokens.mask is None:
            return out
        return out * F.pad(self.tokens.mask, (1, 0), value=True)[..., None].to(out.dtype)


def sparse_layers(model: nn.Module) -> list[SparsifinerAttention]:
    """Returns the layers with predictors, in order.

    Raises:
        ValueError: there is none.
    """
    found = [module for module in model.modules() if isinstance(module, SparsifinerAttention)]
    if not found:
        raise ValueError(
            f"model is a {type(model).__name__} without SparsifinerAttention; use sparsify first."
        )
    return found


def set_phase(model: nn.Module, phase: str) -> None:
    """Sets what the layers compute, and which parameters are trained.

    Args:
        model: of `sparsify`.
        phase: "reconstruct" (phase 1) trains the predictors alone, "sparse" (phase 2) all but these, the class token
            and the positions, "joint" all but the last two; "dense" is the model as it was, and trains nothing.

    Raises:
        ValueError: an unknown phase, or a model without such layers.
    """
    if phase not in PHASES:
        raise ValueError(f"phase={phase!r} is not one of {', '.join(map(repr, PHASES))}.")
    predictors: set[int] = set()
    for layer in sparse_layers(model):
        layer.phase = phase
        layer.reconstruction_error = None
        predictors.update(map(id, layer.predictor.parameters()))
    for name, parameter in model.named_parameters():
        is_predictor = id(parameter) in predictors
        trained = {
            "reconstruct": is_predictor,
            "sparse": not is_predictor and name not in _FIXED,
            "joint": name not in _FIXED,
            "dense": False,
        }
        parameter.requires_grad_(trained[phase])


def reconstruction_loss(model: nn.Module, weight: float = 0.01) -> torch.Tensor:
    """Returns `weight` times the mean over layers of the squared errors of all predicted maps of the last forward pass.

    The errors are summed over images, heads and pairs, as the authors have it: for another batch or number of tokens,
    another weight. Maps are compared with the layer's own: in phase 1 the backbone is not trained, so they are the
    teacher's; in phase "joint" that is the authors' self-distillation, whose weight they have as 0.002.

    Raises:
        ValueError: there was no forward pass in phase "reconstruct" or "joint".
    """
    errors = [layer.reconstruction_error for layer in sparse_layers(model)]
    if any(error is None for error in errors):
        raise ValueError(
            'no reconstruction error is known; run the model in phase "reconstruct" or "joint" first.'
        )
    return weight * torch.stack(errors).mean()


def basis_loss(model: nn.Module, weight: float) -> torch.Tensor:
    """Returns `weight` times the sum of the absolute entries of all bases that maps are made of, which empties them.

    The authors have it beside the losses of either phase, off by default. (Their losses of the share of chosen keys and
    of the least of them are of the choice alone, through which no gradient passes, and so change no training.)

    Raises:
        ValueError: there is no layer with a predictor.
    """
    return weight * torch.stack([layer.predictor.up.abs().sum() for layer in sparse_layers(model)]).sum()


class SparsifinerLoss(nn.Module):
    """The loss of phase 2: `a CE + b KL(teacher || student) + c D(last tokens)`.

    D is the mean square of the difference, or with `tokens="kl"` the divergence of the softmax over channels. Tokens
    are the normalised patches of the last block, of LV-ViT their classes; where tokens are pruned, those in use.

    Args:
        teacher: the model before the conversion; it is not trained.
        weights: a, b and c.
        tokens: "mse" (the authors') or "kl" (their alternative).

    Shape:
        `forward(model, images, labels)` gives a scalar; labels are numbers `[B]` or probabilities `[B, classes]`.

    Raises:
        ValueError: there are not three weights, or an unknown distance of tokens.

    Source: Sparsifiner (arXiv 2303.13755), section 3.4, and the authors' code.
    """

    def __init__(
        self, teacher: nn.Module, weights: tuple[float, float, float] = (1.0, 0.5, 0.5), tokens: str = "mse"
    ) -> None:
        super().__init__()
        if tokens not in ("mse", "kl"):
            raise ValueError(f"tokens={tokens!r} is not one of 'mse', 'kl'.")
        self.tokens = tokens
        if len(weights) != 3:
            raise ValueError(
                f"weights={weights} must be three: of the classes, of the teacher's and of the tokens."
            )
        self.teacher = teacher.eval().requires_grad_(False)
        self.weights = tuple(weights)

    def forward(self, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher_logits, theirs = _outputs(self.teacher, images)
            teacher_logits = teacher_logits.log_softmax(-1)
        logits, ours = _outputs(model, images)
        divergence = F.kl_div(logits.log_softmax(-1), teacher_logits, reduction="batchmean", log_target=True)
        if self.tokens == "mse":
            error = (ours - theirs).square().mean(-1)
        else:
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            error = (theirs.exp() * (theirs - ours)).sum(-1)
        layers = [module for module in model.modules() if isinstance(module, SparsifinerAttention)]
        shared = layers[-1].tokens if layers else None
        if shared is None or shared.mask is None:
            distance = error.mean()
        else:
            used = shared.mask.to(error)
            distance = (error * used).sum() / used.sum()
        a, b, c = self.weights
        return a * F.cross_entropy(logits, labels) + b * divergence + c * distance


def _outputs(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits and tokens; of a model that classifies its patches too, without their part and their logits."""
    features = model.forward_features(images)
    aux_head = getattr(model, "aux_head", None)
    if aux_head is None:
        return model.forward_head(features).float(), features[:, 1:].float()
    return model.head(features[:, 0]).float(), aux_head(features[:, 1:]).float()


@dataclass(frozen=True)
class Phase:
    """One phase of training.

    Args:
        name: what `set_phase` takes.
        epochs: how many.
        learning_rate, last_learning_rate: where the cosine starts and ends.
        warm_up: epochs in which the rate rises.
    """

    name: str
    epochs: int
    learning_rate: float
    last_learning_rate: float
    warm_up: int = 3

    def rate(self, epoch: float) -> float:
        """Returns the learning rate at a time in epochs."""
        if epoch < self.warm_up:
            return self.learning_rate * (epoch + 1) / (self.warm_up + 1)
        progress = (epoch - self.warm_up) / max(self.epochs - self.warm_up, 1)
        half = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.last_learning_rate + (self.learning_rate - self.last_learning_rate) * half


def two_phase_schedule(epochs: tuple[int, int] = (5, 45)) -> Iterator[Phase]:
    """Yields the authors' phases: predictors for 5 epochs, the backbone for 45 (AdamW, weight decay 0.05).

    Raises:
        ValueError: a number of epochs below 1.
    """
    if min(epochs) < 1:
        raise ValueError(f"epochs={epochs} must be two numbers of at least 1.")
    yield Phase("reconstruct", epochs[0], 3e-4, 2e-4)
    yield Phase("sparse", epochs[1], 8e-5, 2e-6)
