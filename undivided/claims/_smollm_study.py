"""SmolLM2-135M-Instruct as latent attention, taught by itself from several initial values: who recovers how fast.

All arms see the same batches, and the teacher reads each batch once for all of them. The text is 636,000 tokens of
speeches, in windows at random places: 10M tokens go through it sixteen times, 50M seventy-nine times, so that late
figures are also those of a model that knows its text by heart. Other speeches are held out. What such a table shows is
how fast each arm recovers on text of one kind; nothing about tasks.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from undivided.claims._tiny_lm import Graphed
from undivided.convert._merged_heads import rows_with_bias
from undivided.convert.attention_editing import convert_edit_mla
from undivided.convert.transmla import convert_transmla
from undivided.convert.x_ecomla import convert_x_ecomla, energy_rank
from undivided.models.bases import attention_layers
from undivided.models.masks import without_masks
from undivided.training.compiling import compiled_layers
from undivided.training.losses import distillation_loss, feature_loss
from undivided.training.trainers import recorded_calls

COLD, FIXED, DYNAMIC, TRANSMLA = "random", "SVD, fixed rank", "SVD, dynamic rank", "TransMLA"
COLD_STAGED, TRANSMLA_STAGED = "random, first layer by layer", "TransMLA, first layer by layer"
ARMS = (COLD, FIXED, DYNAMIC, TRANSMLA, COLD_STAGED, TRANSMLA_STAGED)
ROPE_DIM = 32
_FOLD = 4
# Held-out blocks computed at once.
_BLOCKS = 4
_BETAS, _CLIP = (0.9, 0.98), 1.0
_HELD_OUT = ("2015-Obama-1", "2024-Biden-1")


@dataclass(frozen=True)
class Scores:
    """Of a model on held-out text.

    Attributes:
        divergence: from the source's next-token distribution, mean in nats.
        perplexity: of the text.
        agreement: share of positions where both find the same token the most probable.
    """

    divergence: float
    perplexity: float
    agreement: float


@dataclass(frozen=True)
class Plan:
    """How the arms of a table are trained, all alike.

    Args:
        batch_size, length: windows a step and tokens a window.
        attention_rate, rate: highest learning rates of the exchanged layers and of everything else: they rise
            for `warm_up` tokens, and fall behind `peak` tokens with one over the square root of the tokens, so that a
            run has no end and each of its figures is of one run.
        layers_rate: of the first stage, which falls to zero in a line.
        layers_tokens: tokens of the first stage, in the arms that have one; they count.
        warm_up, peak: tokens.
    """

    batch_size: int = 8
    length: int = 1024
    attention_rate: float = 1e-3
    rate: float = 3e-4
    layers_rate: float = 1e-3
    layers_tokens: int = 1_000_000
    warm_up: int = 200_000
    peak: int = 1_000_000

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.batch_size * self.length

    def steps(self, tokens: int) -> int:
        """Steps of about so many tokens."""
        return round(tokens / self.step_tokens)

    def factor(self, step: int) -> float:
        """Of the rates, at a step of training as a whole."""
        seen = (step + 1) * self.step_tokens
        return min(seen / self.warm_up, 1.0) * math.sqrt(self.peak / max(seen, self.peak))

    def layers_factor(self, step: int) -> float:
        """Of the rate of the first stage."""
        seen = (step + 1) * self.step_tokens
        return min(seen / self.warm_up, 1.0) * max(1 - step / max(self.steps(self.layers_tokens), 1), 0.0)


class SmolStudy:
    """A source with text to train on and to judge by, on one device.

    Args:
        source: the model; it teaches, and is not changed.
        tokens: of the text `[number]`.
        heldout: blocks of other text `[number, length]`.
        plan: how arms are trained.
    """

    def __init__(
        self, source: Any, tokens: torch.Tensor, heldout: torch.Tensor, plan: Plan | None = None
    ) -> None:
        self.source = source.eval().requires_grad_(False)
        self.device = next(source.parameters()).device
        self.plan = Plan() if plan is None else plan
        self.tokens, self.heldout = tokens.to(self.device), heldout.to(self.device)
        self.on_gpu = self.device.type == "cuda"
        # Steps are CUDA graphs: a model of this size would wait for its launches for most of a step.
        self.graphs = self.compiled = self.on_gpu
        with torch.no_grad():
            # Of a few hundred megabytes a block, computed once for all evaluations.
            self.expected = [source(block, use_cache=False).logits for block in self.heldout.split(_BLOCKS)]
        self.calibration = self.tokens[: 64 * 256].view(-1, 256) if len(tokens) >= 64 * 256 else heldout

    @functools.cached_property
    def own(self) -> Scores:
        """The source's."""
        return self.scores(self.source)

    def convert(
        self, function: Callable[..., Any], *arguments: Any, on_cpu: bool = False, **options: Any
    ) -> nn.Module:
        """Converts a copy of the source, all of whose parameters are to be trained."""
        model = copy.deepcopy(self.source)
        host = function(model.cpu() if on_cpu else model, *arguments, **options)[0]
        return host.to(self.device).requires_grad_(True).train()

    def build(self, name: str, latent_dim: int) -> nn.Module:
        """Returns the model that an arm begins with."""
        sizes: dict[str, Any] = {"latent_dim": latent_dim, "rope_dim": ROPE_DIM}
        if name in (COLD, COLD_STAGED):
            return self.convert(convert_edit_mla, **sizes)
        if name == FIXED:
            # Singular values in float64 take a GPU longer.
            return self.convert(convert_x_ecomla, on_cpu=True, **sizes)
        if name == DYNAMIC:
            share = energy_of_ranks(self.source, latent_dim)
            return self.convert(convert_x_ecomla, on_cpu=True, latent_energy=share, rope_dim=ROPE_DIM)
        if name in (TRANSMLA, TRANSMLA_STAGED):
            return self.convert(convert_transmla, self.calibration, **sizes, freqfold=_FOLD)
        raise ValueError(f"name={name!r} is not one of {', '.join(map(repr, ARMS))}.")

    @contextmanager
    def judging(self, model: Any) -> Iterator[None]:
        """Eval mode, no gradients, and nothing compiled: what is judged has shapes of its own."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            model.train(training)

    def scores(self, model: Any) -> Scores:
        """Judges a model, in the precision of its weights."""
        divergence, nll, equal = 0.0, 0.0, 0
        with self.judging(model):
            for blocks, expected in zip(self.heldout.split(_BLOCKS), self.expected, strict=True):
                logits = model(blocks, use_cache=False).logits
                divergence += len(blocks) * distillation_loss(logits, expected).item()
                words = logits[:, :-1].flatten(0, 1), blocks[:, 1:].flatten()
                nll += len(blocks) * F.cross_entropy(*words).item()
                equal += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        count = len(self.heldout)
        return Scores(divergence / count, math.exp(nll / count), equal / self.heldout.numel())

    def run(
        self,
        models: Mapping[str, nn.Module],
        counts: Sequence[int],
        staged: Sequence[str] = (),
        most: Mapping[str, int] | None = None,
        seed: int = 0,
        judge: Callable[[Any], Any] | None = None,
    ) -> Iterator[tuple[str, int, Any]]:
        """Trains the arms beside each other, and yields name, tokens so far and scores of each, before and at counts.

        Args:
            models: name to what an arm begins with; trained in place.
            counts: tokens at which arms are judged; they end at the last.
            staged: the arms that learn layer by layer first.
            most: name to the tokens at which an arm ends before that; read whenever arms were judged.
            seed: of the order of the text.
            judge: gives the scores of a model; default `scores`.
        """
        most = {} if most is None else most
        judge = self.scores if judge is None else judge
        for name, model in models.items():
            yield name, 0, judge(model)
        plan = self.plan
        with ExitStack() as stack:
            stack.enter_context(without_masks(self.source, *models.values()))
            if self.compiled:
                # Attention is left out: of every arm, and of layers of many ranks, it would be compiled anew.
                stack.enter_context(compiled_layers(self.source, *models.values(), parts=("mlp", "norm")))
            teacher = self._step(Teacher(self.source, self.on_gpu))
            step_of = functools.partial(self._step, beside=teacher)
            loss = torch.compile(distillation_loss, dynamic=False) if self.compiled else distillation_loss
            learners = {
                name: Learner(model, plan, name in staged, loss, step_of) for name, model in models.items()
            }
            judged = {plan.steps(count): count for count in sorted(counts)}
            generator = torch.Generator().manual_seed(seed)
            for step in range(1, max(judged) + 1):
                starts = torch.randint(
                    len(self.tokens) - plan.length, (plan.batch_size, 1), generator=generator
                )
                ids = self.tokens[(starts + torch.arange(plan.length)).to(self.device)]
                taught = teacher(ids)
                for learner in learners.values():
                    learner(ids, taught)
                if step in judged:
                    for name, learner in learners.items():
                        yield name, judged[step], judge(learner.model)
                    for name in [name for name in learners if most.get(name, max(counts)) <= judged[step]]:
                        del learners[name]

    def _step(self, function: Callable[[torch.Tensor], Any], beside: Any = None) -> Any:
        return Graphed(function, beside) if self.graphs else function


class Teacher:
    """What the source gives for a batch: its logits, and what each attention layer reads and writes."""

    def __init__(self, source: Any, on_gpu: bool) -> None:
        self.source, self.on_gpu = source, on_gpu

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        with _precision(self.on_gpu), recorded_calls(attention_layers(self.source)) as calls:
            logits = self.source(input_ids=ids, use_cache=False).logits
        return logits, list(calls)


class Learner:
    """A model in training, first layer by layer if it is to be, then as a whole."""

    def __init__(
        self,
        model: Any,
        plan: Plan,
        staged: bool,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        step_of: Callable[[Callable[[torch.Tensor], Any]], Any],
    ) -> None:
        self.model, self.plan, self.loss, self.step_of = model, plan, loss, step_of
        self.on_gpu = next(model.parameters()).device.type == "cuda"
        own = {id(p) for layer in attention_layers(model) for p in layer.parameters()}
        parameters = list(model.parameters())
        self.attention = [p for p in parameters if id(p) in own]
        self.rest = [p for p in parameters if id(p) not in own]
        self.layers_left = plan.steps(plan.layers_tokens) if staged else 0
        if self.layers_left:
            self._begin(self._layer_loss, plan.layers_factor, [(self.attention, plan.layers_rate)])
        else:
            self._begin_whole()

    def __call__(self, ids: torch.Tensor, taught: tuple[torch.Tensor, list[Any]]) -> torch.Tensor:
        """Takes a step and returns its loss, which the next step overwrites."""
        # A captured step reads these where they were at its capture, which is where the teacher's own graph puts them.
        self.taught = taught
        value = self.step(ids)
        self.schedule.step()
        if self.layers_left:
            self.layers_left -= 1
            if not self.layers_left:
                self._begin_whole()
        return value

    def _begin_whole(self) -> None:
        groups = [(self.attention, self.plan.attention_rate), (self.rest, self.plan.rate)]
        self._begin(self._divergence, self.plan.factor, groups)

    def _begin(
        self, loss: Any, factor: Callable[[int], float], groups: list[tuple[list[Any], float]]
    ) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        device = self.attention[0].device

        def rate(value: float) -> Any:
            # A graph reads it from memory when it is replayed.
            return torch.tensor(value, device=device) if self.on_gpu else value

        optimiser = torch.optim.AdamW(
            [{"params": parameters, "lr": rate(value)} for parameters, value in groups],
            betas=_BETAS, weight_decay=0.0, fused=True if self.on_gpu else None, capturable=self.on_gpu,
        )  # fmt: skip
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        trained = [parameter for parameters, _ in groups for parameter in parameters]

        def update(ids: torch.Tensor) -> torch.Tensor:
            with _precision(self.on_gpu):
                value = loss(ids)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trained, _CLIP)
            optimiser.step()
            return value.detach()

        self.step = self.step_of(update)

    def _divergence(self, ids: torch.Tensor) -> torch.Tensor:
        out = self.model(input_ids=ids, use_cache=False)
        auxiliary = getattr(out, "aux_loss", None)
        divergence = self.loss(out.logits, self.taught[0])
        return divergence if auxiliary is None else divergence + auxiliary

    def _layer_loss(self, ids: torch.Tensor) -> torch.Tensor:
        pairs = zip(attention_layers(self.model), self.taught[1], strict=True)
        errors = [feature_loss(layer(**call)[0], expected) for layer, (call, expected) in pairs]
        return torch.stack(errors).mean()


def demo_study(device: str, plan: Plan | None = None, heldout_tokens: int = 8192) -> SmolStudy:
    """SmolLM2-135M-Instruct and its speeches."""
    from undivided.data import demo_texts
    from undivided.data.text import token_blocks
    from undivided.models.checkpoint import open_checkpoint

    plan, texts = Plan() if plan is None else plan, demo_texts()
    source = open_checkpoint("smollm2-135m", device=device)
    tokens = torch.tensor(source.tokenizer(texts.calibration, verbose=False).input_ids)
    blocks = [
        block
        for name in _HELD_OUT
        for block in token_blocks(source.tokenizer, texts.heldout[name], plan.length, heldout_tokens)
        if block.shape[1] == plan.length
    ]
    return SmolStudy(source.model, tokens, torch.cat(blocks), plan)


@torch.no_grad()
def energy_of_ranks(source: Any, latent_dim: int) -> float:
    """Returns the share of energy whose ranks, rounded as they are, are on average nearest to `latent_dim`."""
    layers = [torch.cat([rows_with_bias(x) for x in (a.k_proj, a.v_proj)]) for a in attention_layers(source)]
    values = [torch.linalg.svdvals(rows.cpu().double()) for rows in layers]

    def distance(share: float) -> int:
        return abs(sum(energy_rank(each, share) for each in values) - latent_dim * len(values))

    return min((k / 200 for k in range(20, 200)), key=distance)


def _precision(on_gpu: bool) -> torch.autocast:
    # Without its cache: a graph would keep the first step's copies of the weights.
    return torch.autocast("cuda", torch.bfloat16, enabled=on_gpu, cache_enabled=False)
