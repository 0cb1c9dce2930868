"""What core tokens cost and keep on SmolLM2-135M-Instruct, as it is and after training its attention for seconds.

Speeches are read in blocks of 2048 tokens; the loss is that of the second half of each, whose tokens have most of their
context behind the window. Needles are key-value pairs of rare tokens in the same speeches, asked for at the end, far
behind the window. Every arm is trained on other speeches with such pairs in them, its attention alone. Baselines see as
many keys as core tokens and window are together: the last ones, or four sinks and the last ones (StreamingLLM). The
same is measured at 8192 tokens, the model's whole context, by position and by the depth of the needle. A model of this
size recalls little, and a single seed shows large differences only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from undivided.claims._harness import Row, measured
from undivided.claims._sink_window import with_sink_window
from undivided.claims._tiny_lm import train
from undivided.data.recall import RecallTexts, RecallVocabulary, recall_texts

LENGTH, GROUP, WINDOW, SINKS = 2048, 16, 256, 4
_LONG, _LONG_WINDOW = 8192, 1024
_RATE, _BATCH = 3e-4, 4
# Rare tokens of the vocabulary, and a line break before a question.
_KEYS, _VALUES = range(30000, 30400), range(31000, 31400)
_CORE, _FULL, _LAST = "core context", "full attention", "a window of as many keys"
_STREAMING = f"StreamingLLM, {SINKS} sinks and a window, of as many keys"


@dataclass(frozen=True)
class Setting:
    """The model, the texts it is trained and measured on, and how long it is trained.

    Attributes:
        needles: texts by the depth of what is asked for.
        window: of core context.
        sentence_ends: tokens that end a sentence or a line.
    """

    model: Any
    training: torch.Tensor
    blocks: torch.Tensor
    needles: Mapping[float, RecallTexts]
    steps: int
    window: int = WINDOW
    sentence_ends: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return self.blocks.shape[1]

    @property
    def budget(self) -> int:
        """As many keys as core tokens and window hold at the end of a text."""
        return self.window + self.length // GROUP

    def loss(self, model: Any, first: int | None = None, last: int | None = None) -> float:
        """Mean negative log-likelihood in nats of the tokens `first .. last - 1`, by default the second halves."""
        first, last = self.length // 2 if first is None else first, self.length if last is None else last
        total = 0.0
        for ids in self.blocks.split(max(2 * LENGTH // self.length, 1)):
            ids = ids.to(model.device)
            logits = _logits(model, ids)[:, first - 1 : last - 1]
            total += float(
                F.cross_entropy(logits.flatten(0, 1), ids[:, first:last].flatten(), reduction="sum")
            )
        return total / (len(self.blocks) * (last - first))

    def recalled(self, model: Any, depth: float | None = None) -> float:
        """Share of the needles that are found, between 0 and 1; of one depth, or of all."""
        texts = [own for key, own in self.needles.items() if depth in (None, key)]
        size = max(2 * LENGTH // self.length, 1)
        parts = [own.part(start, start + size) for own in texts for start in range(0, len(own.ids), size)]
        hits = [part.correct(_logits(model, part.ids.to(model.device))) for part in parts]
        return float(torch.cat([hit.flatten() for hit in hits]).float().mean())


def setting(device: str, quick: bool, length: int = LENGTH) -> Setting:
    """Returns the setting of a device, with texts of so many tokens."""
    from undivided.data import demo_texts
    from undivided.models.checkpoint import open_checkpoint

    opened = open_checkpoint("smollm2-135m", device=device)
    texts = demo_texts()
    ids = lambda text: torch.tensor(opened.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)  # noqa: E731
    heldout = ids("\n\n".join(texts.heldout.values()))
    count = 2 if quick or device == "cpu" or length > LENGTH else 8
    mark = ids("\n")[0].item()
    vocabulary = RecallVocabulary(int(mark), tuple(_KEYS), tuple(_VALUES))
    draw: dict[str, Any] = {"vocabulary": vocabulary, "num_pairs": 4, "num_queries": 4}
    fillers, depths = (1000, (0.1,)) if length == LENGTH else (length - 1024, (0.1, 0.5, 0.9))
    rest = heldout[count * length :]
    needles = {
        depth: recall_texts(
            4 * count, num_fillers=fillers, haystack=rest, seed=1, depth=depth, **draw
        )
        for depth in depths
    }  # fmt: skip
    # A million characters are more than seconds of training read.
    haystack = ids(texts.calibration[:1_000_000])
    training = recall_texts(500_000 // fillers, num_fillers=fillers, haystack=haystack, seed=2, **draw)
    return Setting(
        opened.model.eval(),
        training.ids.flatten(),
        heldout[: count * length].view(count, length),
        needles,
        0 if device == "cpu" else 10 if quick else 80,
        WINDOW if length == LENGTH else _LONG_WINDOW,
        torch.tensor([int(ids(mark)[0]) for mark in (".", "!", "?", "\n")]),
    )


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses and shares of needles found, zero-shot and, on a GPU, after training."""
    own = setting(device, quick)
    arms = _arms(own)
    yield from _rows(own, {name: make(own.model) for name, make in arms.items()}, "as it is")
    if own.steps:
        trained = {name: _tuned(own, arms[name]) for name in (_FULL, _CORE, _STREAMING)}
        yield from _rows(own, trained, f"after {own.steps} steps on its attention")


def pooling(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses of other ways to pool, and of training through PEFT, all after training, on a GPU."""
    if device == "cpu":
        return
    own = setting(device, quick)
    arms = _arms(own)
    core = _tuned(own, arms[_CORE])
    loss = own.loss(core)
    for kind in ("mean", "max"):
        name = f"{_CORE}, {kind} pooling"
        yield measured(
            f"loss far behind the window, {name}, after {own.steps} steps on its attention", _shape(own),
            own.loss(_tuned(own, arms[name])), "nats a token", better="lower", baseline_name='pooling="cca"',
            baseline=loss,
        )  # fmt: skip
    yield from _through_peft(own, arms[_CORE], loss)


def long(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses by position and needles by depth at the model's whole context, after training, on a GPU."""
    if device == "cpu":
        return
    own = setting(device, quick, _LONG)
    arms = _arms(own)
    when = f"after {own.steps} steps on its attention"
    models = {name: _tuned(own, arms[name]) for name in (_FULL, _CORE, _STREAMING)}
    edges = [own.window * factor for factor in (1, 2, 4, 8) if own.window * factor <= own.length]
    for first, last in zip(edges, edges[1:], strict=False):
        losses = {name: own.loss(model, first, last) for name, model in models.items()}
        for rival in (_FULL, _STREAMING):
            yield measured(
                f"loss of tokens {first} to {last}, {_CORE}, {when}, against {rival}", _shape(own), losses[_CORE],
                "nats a token", better="lower", baseline_name=rival, baseline=losses[rival],
            )  # fmt: skip
    for depth in own.needles:
        for name, model in models.items():
            yield measured(
                f"needles found at depth {depth}, {name}, {when}", _shape(own, needles=True),
                own.recalled(model, depth), "share", better="higher",
            )  # fmt: skip


def _arms(own: Setting) -> dict[str, Callable[[Any], Any]]:
    import undivided

    def core(**options: Any) -> Callable[[Any], Any]:
        return lambda model: undivided.attach(
            model, "core_context", **({"group_size": GROUP, "window": own.window} | options)
        )

    return {
        _FULL: lambda model: undivided.attach(model, "gqa"),
        _CORE: core(),
        _STREAMING: lambda model: with_sink_window(model, own.budget - SINKS, SINKS),
        _LAST: lambda model: with_sink_window(model, own.budget, 0),
        f'{_CORE}, rope="pre"': core(rope="pre"),
        f'{_CORE}, core_heads="kv"': core(core_heads="kv"),
        f"{_CORE}, mean pooling": core(pooling="mean"),
        f"{_CORE}, max pooling": core(pooling="max"),
        f"{_CORE}, core_logit_bias=log g": core(core_logit_bias=2.7725887),
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
        model, own.training, steps=own.steps, batch_size=max(_BATCH * LENGTH // own.length, 1), length=own.length,
        learning_rate=_RATE if wrap is None else 5 * _RATE,
    )  # fmt: skip
    return model.eval()


def _through_peft(own: Setting, make: Callable[[Any], Any], rival: float) -> Iterator[Row]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
    model = _tuned(own, make, lambda model: get_peft_model(model, config))
    yield measured(
        f"loss far behind the window, core context, after {own.steps} steps of LoRA through PEFT", _shape(own),
        own.loss(model), "nats a token", better="lower", baseline_name="all weights of attention trained",
        baseline=rival,
    )  # fmt: skip


def _rows(own: Setting, models: dict[str, Any], when: str) -> Iterator[Row]:
    losses = {name: own.loss(model) for name, model in models.items()}
    found = {name: own.recalled(model) for name, model in models.items()}
    is_trained = "after" in when
    for name in models:
        for rival in (_FULL, _STREAMING):
            if name in (_FULL, rival):
                continue
            has_bar = is_trained and name == _CORE
            # Within three parts of a hundred of full attention, and no worse than the window.
            bar = (0.97 if rival == _FULL else 1.0) if has_bar else None
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
    texts = list(own.needles.values())
    what = (
        f"{len(texts[0].ids)} texts of {texts[0].ids.shape[1]} tokens a depth, 4 needles each"
        if needles
        else f"{len(own.blocks)} blocks of {own.length} tokens"
    )
    return f"SmolLM2-135M-Instruct, {what}, g {GROUP}, s {own.window}"


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    on_gpu = ids.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        return model(input_ids=ids, use_cache=False).logits.float()
