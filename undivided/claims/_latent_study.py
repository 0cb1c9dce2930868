"""The models with MLA that claims study: one trained from scratch in minutes, and SmolLM2-135M after its conversion."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Study:
    """A model with MLA, with calibration and held-out text.

    Args:
        model: as `convert_tpla` takes it.
        tokenizer: of the model.
        calibration: token ids `[samples, length]`.
        texts: held-out texts.
        block: tokens a block of the perplexities.
        tokens: tokens of each text that are evaluated.
    """

    model: Any
    tokenizer: Any
    calibration: Tensor
    texts: Sequence[str]
    block: int
    tokens: int

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """Second moments of the latents."""
        from undivided.convert.tpla import latent_moments

        return latent_moments(self.model, self.calibration)

    def converted(self, transform: str = "pca", **options: Any) -> Any:
        """The model after `convert_tpla`; the moments of the latents are collected once for all."""
        from undivided.convert.tpla import convert_tpla

        known: Any = _Known(self.moments)
        given = {"transform": transform, "calibration": self.calibration, "work": known, **options}
        return convert_tpla(self.model, **given)[0]

    def perplexity(self, model: Any) -> float:
        """Over all held-out tokens, in blocks."""
        from undivided.models.evaluation import perplexity

        return _mean(
            perplexity(model, self.tokenizer, text, block=self.block, max_tokens=self.tokens)
            for text in self.texts
        )

    def decode_perplexity(self, model: Any, prompt: int, length: int) -> float:
        """Over `length` tokens after the first `prompt` of every text, read through the cache.

        Steps of 16 tokens give what single ones do: a row of the cache and a query's output depend on no other query.
        """
        from undivided.models.evaluation import decode_perplexity

        return _mean(
            decode_perplexity(model, self.tokenizer, text, prefix=prompt, max_tokens=prompt + length, step=16)
            for text in self.texts
        )


class _Known:
    """A work folder that knows the moments already and keeps nothing."""

    def __init__(self, moments: dict[str, Tensor]) -> None:
        self.moments = moments

    def stage(
        self, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        return self.moments if name == "tpla-moments" else compute()


def small_study(seed: int, device: str, quick: bool) -> Study:
    """A small model trained on three million characters of speeches; speeches of other years are held out."""
    import torch

    from undivided.claims._small_lm import latent_lm, train_tokenizer
    from undivided.claims._tiny_lm import train
    from undivided.data import demo_texts

    texts = demo_texts()
    tokenizer = train_tokenizer(texts.calibration)
    tokens = torch.tensor(tokenizer(texts.calibration, verbose=False).input_ids)
    model = latent_lm(seed).to(device)
    train(model, tokens, steps=_STEPS[quick], batch_size=8, length=_LENGTH, seed=seed)
    samples = tokens[: 32 * 256].view(32, 256)
    return Study(model.eval(), tokenizer, samples, list(texts.heldout.values()), _LENGTH, 8192)


# Optimiser steps of 8 windows of so many tokens.
_STEPS = {False: 800, True: 200}
_LENGTH = 512


def demo_study(device: str, quick: bool, latent_dim: int = 256, latent_norm: bool = False) -> Study:
    """SmolLM2-135M-Instruct as MLA, with 32 rotary dimensions beside the latent in place of 384 numbers."""
    from undivided.convert.pipeline import calibration_ids
    from undivided.convert.transmla import convert_transmla
    from undivided.data import demo_texts
    from undivided.models.checkpoint import open_checkpoint

    texts = demo_texts()
    source = open_checkpoint("smollm2-135m", device=device)
    ids = calibration_ids(source, texts.calibration, 16 if quick else 64, 256)
    model, _ = convert_transmla(
        source.model, ids, latent_dim=latent_dim, rope_dim=32, freqfold=4, latent_norm=latent_norm
    )
    heldout = [texts.heldout[name] for name in ("2015-Obama-1", "2024-Biden-1")]
    return Study(model, source.tokenizer, ids, heldout, 1024, 1024 if quick else 4096)


def _mean(evaluations: Iterator[Any]) -> float:
    """Perplexity over all tokens of several evaluations."""
    found = list(evaluations)
    return math.exp(sum(each.nll * each.tokens for each in found) / sum(each.tokens for each in found))
