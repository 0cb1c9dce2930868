"""What core tokens cost and keep on SmolLM2-135M-Instruct, as it is and after training its attention for seconds.

Speeches are read in blocks of 2048 tokens; the loss is that of the second half of each, whose tokens have most of their
context behind the window. Needles are key-value pairs of rare tokens in the same speeches, asked for at the end, far
behind the window. Every arm is trained on other speeches with such pairs in them, its attention alone. The baseline of
StreamingLLM sees four sinks and as many of the last tokens as core tokens and window are together. A model of this size
recalls little, and a single seed shows large differences only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from undivided.claims._harness import Row, measured
from undivided.claims._sink_window import with_sink_window
from undivided.claims._tiny_lm import train
from undivided.data.recall import RecallTexts, RecallVocabulary, recall_texts

LENGTH, GROUP, WINDOW, SINKS = 2048, 16, 256, 4
# As many keys as core tokens and window hold at the end of a text.
BUDGET = WINDOW + LENGTH // GROUP
_RATE, _BATCH = 3e-4, 4
# Rare tokens of the vocabulary, and a line break before a question.
_KEYS, _VALUES = range(30000, 30400), range(31000, 31400)


@dataclass(frozen=True)
class Setting:
    """The model, the texts it is trained and measured on, and how long it is trained."""

    model: Any
    training: torch.Tensor
    blocks: torch.Tensor
    needles: RecallTexts
    steps: int

    def loss(self, model: Any) -> float:
        """Mean negative log-likelihood of the second halves of the blocks, in nats."""
        total = 0.0
        for ids in self.blocks.split(2):
            ids = ids.to(model.device)
            logits = _logits(model, ids)[:, LENGTH // 2 - 1 : -1]
            total += float(
                F.cross_entropy(logits.flatten(0, 1), ids[:, LENGTH // 2 :].flatten(), reduction="sum")
            )
        return total / (len(self.blocks) * LENGTH / 2)

    def recalled(self, model: Any) -> float:
        """Share of the needles that are found, between 0 and 1."""
        parts = [self.needles.part(start, start + 4) for start in range(0, len(self.needles.ids), 4)]
        hits = [part.correct(_logits(model, part.ids.to(model.device))) for part in parts]
        return float(torch.cat(hits).float().mean())


def setting(device: str, quick: bool) -> Setting:
    """Returns the setting of a device."""
    from undivided.data import demo_texts
    from undivided.models.checkpoint import open_checkpoint

    opened = open_checkpoint("smollm2-135m", device=device)
    texts = demo_texts()
    ids = lambda text: torch.tensor(opened.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)  # noqa: E731
    heldout = ids("\n\n".join(texts.heldout.values()))
    count = 2 if quick or device == "cpu" else 8
    mark = ids("\n")[0].item()
    vocabulary = RecallVocabulary(int(mark), tuple(_KEYS), tuple(_VALUES))
    draw: dict[str, Any] = {"vocabulary": vocabulary, "num_pairs": 4, "num_queries": 4, "depth": 0.1}
    needles = recall_texts(4 * count, num_fillers=1000, haystack=heldout[count * LENGTH :], seed=1, **draw)
    # A million characters are more than seconds of training read.
    haystack = ids(texts.calibration[:1_000_000])
    training = recall_texts(500, num_fillers=1000, haystack=haystack, seed=2, **(draw | {"depth": None}))
    return Setting(
        opened.model.eval(),
        training.ids.flatten(),
        heldout[: count * LENGTH].view(count, LENGTH),
        needles,
        0 if device == "cpu" else 10 if quick else 80,
    )


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses and shares of needles found, zero-shot and, on a GPU, after training."""
    own = setting(device, quick)
    arms = _arms()
    yield from _rows(own, {name: make(own.model) for name, make in arms.items()}, "as it is")
    if own.steps:
        trained = {}
        for name in ("full attention", "core context", _STREAMING, "core context, mean pooling"):
            trained[name] = _tuned(own, arms[name])
        yield from _rows(own, trained, f"after {own.steps} steps on its attention")
        yield from _through_peft(own, arms["core context"], trained["core context"])


_STREAMING = f"StreamingLLM, {SINKS} sinks and a window, of as many keys"


def _arms() -> dict[str, Callable[[Any], Any]]:
    import undivided

    def core(**options: Any) -> Callable[[Any], Any]:
        return lambda model: undivided.attach(
            model, "core_context", **({"group_size": GROUP, "window": WINDOW} | options)
        )

    return {
        "full attention": lambda model: undivided.attach(model, "gqa"),
        "core context": core(),
        _STREAMING: lambda model: with_sink_window(model, BUDGET - SINKS, SINKS),
        'core context, rope="pre"': core(rope="pre"),
        "core context, mean pooling": core(pooling="mean"),
        "core context, max pooling": core(pooling="max"),
        "core context, core_logit_bias=log g": core(core_logit_bias=2.7725887),
    }


def _tuned(own: Setting, make: Callable[[Any], Any], wrap: Callable[[Any], Any] | None = None) -> Any:
    """Returns an arm whose attention weights, or what `wrap` adds to them, were trained on a copy of the model."""
    model = make(copy.deepcopy(own.model))
    if wrap is not None:
        model = wrap(model)
    else:
        model.requires_grad_(False)
        for layer in model.attention_layers():
            layer.requires_grad_(True)
    train(
        model, own.training, steps=own.steps, batch_size=_BATCH, length=LENGTH,
        learning_rate=_RATE if wrap is None else 5 * _RATE,
    )  # fmt: skip
    return model.eval()


def _through_peft(own: Setting, make: Callable[[Any], Any], rival: Any) -> Iterator[Row]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = _tuned(own, make, lambda model: get_peft_model(model, config))
    yield measured(
        f"loss far behind the window, core context, after {own.steps} steps of LoRA through PEFT", _shape(own),
        own.loss(model), "nats a token", better="lower", baseline_name="all weights of attention trained",
        baseline=own.loss(rival),
    )  # fmt: skip


def _rows(own: Setting, models: dict[str, Any], when: str) -> Iterator[Row]:
    losses = {name: own.loss(model) for name, model in models.items()}
    found = {name: own.recalled(model) for name, model in models.items()}
    is_trained = "after" in when
    for name in models:
        for rival in ("full attention", _STREAMING):
            if name in ("full attention", rival):
                continue
            has_bar = is_trained and name == "core context"
            # Within three parts of a hundred of full attention, and no worse than the window.
            bar = (0.97 if rival == "full attention" else 1.0) if has_bar else None
            yield measured(
                f"loss far behind the window, {name}, {when}, against {rival}", _shape(own), losses[name],
                "nats a token", better="lower", baseline_name=rival, baseline=losses[rival], required=bar,
            )  # fmt: skip
    for name, share in found.items():
        yield measured(
            f"needles found far behind the window, {name}, {when}", _shape(own, needles=True), share, "share",
            better="higher",
        )  # fmt: skip


def _shape(own: Setting, needles: bool = False) -> str:
    texts = (
        f"{len(own.needles.ids)} texts of 1000 tokens, 4 needles each"
        if needles
        else f"{len(own.blocks)} blocks"
    )
    return f"SmolLM2-135M-Instruct, {texts}, {LENGTH} tokens, g {GROUP}, s {WINDOW}"


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    on_gpu = ids.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        return model(input_ids=ids, use_cache=False).logits.float()
