"""SmolLM2-135M-Instruct in sliding windows: with and without a gate and sinks, by position, and with a passkey."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from undivided.claims._harness import Row, measured
from undivided.claims._smollm_study import Plan, SmolStudy, demo_study
from undivided.convert.attention_editing import convert_edit_gate_swa
from undivided.models.bases import cache_of
from undivided.models.evaluation import cache_bytes

_WINDOW, _LENGTH, _FULL_EVERY, _SINKS = 256, 2048, 6, 4
ARMS: dict[str, dict[str, Any]] = {
    "window": {"gate": None},
    "window and gate": {"gate": "elementwise"},
    "window, gate and 4 sinks": {"gate": "elementwise", "sinks": _SINKS},
}
_PLAIN, _GATED = "window", "window and gate"
# Places of a text, in windows.
_PLACES = ((0, 1), (1, 2), (2, 4), (4, 8))
# What the gate is to give back of what the window alone leaves, and of the cache's bytes.
_CLOSED, _BYTES = 0.5, 5.0
_DIGITS = 5


@dataclass(frozen=True)
class Placed:
    """Of a model.

    Attributes:
        losses: mean loss of a token at each place of a text, float64 `[length - 1]`, nats.
        passkey: share of the passkey's digits that are the most probable.
    """

    losses: torch.Tensor
    passkey: float

    def perplexity(self, first: int, last: int) -> float:
        """Of the tokens at the places from `first` to before `last`."""
        return math.exp(self.losses[max(first - 1, 0) : last - 1].mean().item())


class WindowStudy:
    """Judges models by place and by passkey.

    Args:
        study: the source with its held-out text.
        passkeys: texts that end with their passkey's digits, `[number, length]`.
        window: of the arms.
    """

    def __init__(self, study: SmolStudy, passkeys: torch.Tensor, window: int = _WINDOW) -> None:
        self.study, self.passkeys, self.window = study, passkeys.to(study.device), window
        self.source = self.judged(study.source)

    def judged(self, model: Any) -> Placed:
        """Judges a model."""
        losses, right = [], 0
        with self.study.judging(model):
            for block in self.study.heldout.split(2):
                logits = model(block, use_cache=False).logits[:, :-1].float()
                losses.append(F.cross_entropy(logits.transpose(1, 2), block[:, 1:], reduction="none"))
            for texts in self.passkeys.split(8):
                logits = model(texts, use_cache=False, logits_to_keep=_DIGITS + 1).logits[:, :-1]
                right += int((logits.argmax(-1) == texts[:, -_DIGITS:]).sum())
        share = right / (len(self.passkeys) * _DIGITS)
        return Placed(torch.cat(losses).double().mean(0).cpu(), share)

    def models(self) -> dict[str, Any]:
        """What the arms begin with."""
        return {
            name: self.study.convert(
                convert_edit_gate_swa, window=self.window, full_every=_FULL_EVERY, **options
            )
            for name, options in ARMS.items()
        }

    def rows(self, models: Mapping[str, Any], counts: Sequence[int], where: str) -> Iterator[Row]:
        """Trains the arms and yields perplexities by place and shares of passkeys, and what the gate is worth."""
        found: dict[tuple[str, int], Placed] = {}
        length = self.study.heldout.shape[1]
        for name, count, placed in self.study.run(models, counts, judge=self.judged):
            found[name, count] = placed
            # Before training the gate is 1: the arm without it is the other.
            if count == 0 and name == _GATED:
                continue
            shape = f"{where}, {count / 1e6:g}M tokens of training"
            for first, last in _PLACES:
                place = first * self.window, min(last * self.window, length)
                yield measured(
                    f"perplexity of tokens {place[0]} to {place[1]}, {name}", shape, placed.perplexity(*place),
                    "perplexity", better="lower", baseline_name="the source", baseline=self.source.perplexity(*place),
                )  # fmt: skip
            yield measured(
                f"passkey's digits found, {name}", shape, placed.passkey, "of digits", better="higher",
                **_against("the source", self.source.passkey, placed.passkey),
            )  # fmt: skip
        last = max(counts)
        behind = (self.window, length)
        own = math.log(self.source.perplexity(*behind))
        plain, gated = (math.log(found[name, last].perplexity(*behind)) - own for name in (_PLAIN, _GATED))
        yield measured(
            "loss above the source's behind the first window, with the gate against without",
            f"{where}, {last / 1e6:g}M tokens of training", max(gated, 1e-4), "nats", better="lower",
            baseline_name="window", baseline=max(plain, 1e-4), required=1 / _CLOSED,
        )  # fmt: skip

    def cache_row(self, model: Any, length: int, where: str) -> Row:
        """The bytes of the cache of a text, against the source's."""
        ids = self.study.tokens[:length][None]
        sizes = []
        for each in (model, self.study.source):
            with self.study.judging(each):
                sizes.append(cache_bytes(cache_of(each(ids, use_cache=True, logits_to_keep=1))))
        return measured(
            "bytes of the cache", f"{where}, a text of {length} tokens", sizes[0], "bytes", better="lower",
            baseline_name="the source", baseline=sizes[1], required=_BYTES,
        )  # fmt: skip


def passkey_texts(tokenizer: Any, filler: torch.Tensor, length: int, number: int) -> torch.Tensor:
    """Returns texts `[number, length]`: a passkey at places over the whole text, and at the end the question for it.

    Args:
        tokenizer: whose digits are tokens.
        filler: token ids of other text, at least `number + length` of them.
        length: tokens of a text.
        number: texts.
    """
    generator = torch.Generator().manual_seed(0)

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)

    texts = []
    for row in range(number):
        key = "".join(str(int(d)) for d in torch.randint(10, (_DIGITS,), generator=generator))
        note = ids(f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n")
        question = ids(f"\nWhat is the pass key? The pass key is {key}")
        around = filler[row * 16 : row * 16 + length - len(note) - len(question)]
        place = len(around) * row // number
        texts.append(torch.cat([around[:place], note, around[place:], question]))
    return torch.stack(texts)


def window_rows(device: str, quick: bool) -> Iterator[Row]:
    """Yields the rows of windows of SmolLM2-135M, on a GPU."""
    if device == "cpu":
        return
    from undivided.models.checkpoint import open_checkpoint

    plan = Plan(batch_size=4, length=_LENGTH, attention_rate=3e-4, rate=1e-4)
    study = demo_study(device, plan)
    tokenizer = open_checkpoint("smollm2-135m").tokenizer
    windows = WindowStudy(study, passkey_texts(tokenizer, study.heldout.flatten().cpu(), _LENGTH, 32))
    where = f"SmolLM2-135M-Instruct, window of {_WINDOW} in 5 of 6 layers, texts of {_LENGTH}, speeches"
    models = windows.models()
    yield windows.cache_row(models[_GATED], 8192, where)
    yield from windows.rows(models, (250_000,) if quick else (1_000_000,), where)


def _against(name: str, baseline: float, ours: float) -> dict[str, Any]:
    # A share of nothing has no ratio.
    return {"baseline_name": name, "baseline": baseline} if baseline > 0 and ours > 0 else {}
