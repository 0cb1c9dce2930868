"""What reading in part costs SmolLM2-135M-Instruct: losses and needles by where chunks begin and how they are scored.

A boundary predictor is trained on the model's own attention to speeches. Held-out speeches of 2048 tokens are then read
with a budget of 256 and of 512 keys; the loss is that of the last 256 tokens but the instruction's. All arms choose the
same number of keys, and the same local and global ones among them. Blocks are chunks of fixed length; the oracle cuts
where the labels of the very text say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from undivided.claims._core_quality import LENGTH, Setting, setting
from undivided.claims._harness import Row, measured
from undivided.convert.dhsa import average_precision, boundary_examples, train_boundary_predictor
from undivided.layers.boundaries import inner_gaps

_QUERY_BLOCK, _INSTRUCTION, _SCORED = 64, 32, 256
_SIZES: dict[str, Any] = {
    "query_block": _QUERY_BLOCK,
    "num_local": 64,
    "num_global": 64,
    "num_instruction": _INSTRUCTION,
    "threshold": 0.0,
}


class _Told(nn.Module):
    """Stands in for a predictor: returns logits that were told before."""

    window = 4

    def forward(self, key: torch.Tensor) -> torch.Tensor:
        return self.logits


def quality(device: str, quick: bool) -> Iterator[Row]:
    """Yields the predictor's precision, then losses and needles of all arms."""
    import undivided

    own = setting(device, quick)
    texts = own.training[: (2 if quick or device == "cpu" else 16) * 1024].view(-1, 1024)
    losses: list[float] = []
    predictor = train_boundary_predictor(
        own.model, texts, epochs=1 if device == "cpu" else 2, record=losses.append
    )
    yield from _precision(own, predictor, len(texts))
    for budget in (256,) if quick or device == "cpu" else (256, 512):
        arms: dict[str, Any] = {
            "blocks of 64": {"boundaries": "fixed", "chunk_size": 64},
            "blocks of 128": {"boundaries": "fixed", "chunk_size": 128},
            "predicted chunks": {"share": "none"},
            "predicted chunks of the first layer": {"share": "boundaries"},
            "predicted chunks, mean": {"share": "none", "norm": "mean"},
            "predicted chunks, sum": {"share": "none", "norm": "sum"},
        }
        hosts = {
            name: undivided.attach(
                own.model, "dhsa", predictor=predictor, budget=budget, **(_SIZES | options)
            )
            if "share" in options
            else undivided.attach(own.model, "dhsa", budget=budget, **(_SIZES | options))
            for name, options in arms.items()
        }
        for name in ("random chunks", "chunks of the labels"):
            hosts[name] = _told(own.model, predictor, budget)
        yield from _rows(own, hosts, budget)


@torch.no_grad()
def decoding(device: str, quick: bool) -> Iterator[Row]:
    """Yields losses of tokens that are read one by one behind prompts, with a part of the cache and with all of it."""
    import undivided

    own = setting(device, quick)
    steps = 16 if quick or device == "cpu" else 64
    arms: dict[str, dict[str, Any]] = {
        f"chunks of 16, budget {budget}": {"boundaries": "fixed", "budget": budget} for budget in (256, 512)
    }
    arms |= {f"mode {mode}, density 0.125": {"mode": mode, "key_block": 16} for mode in ("topk", "a")}
    for name, options in arms.items():
        options = _SIZES | options
        losses = {
            decode: _stepped(own, undivided.attach(own.model, "dhsa", decode=decode, **options), steps)
            for decode in ("sparse", "full")
        }
        yield measured(
            f"loss of tokens read one by one, {name}",
            f"SmolLM2-135M-Instruct, {len(own.blocks)} prompts of {LENGTH - steps} tokens, {steps} steps",
            losses["sparse"], "nats a token", better="lower", baseline_name='decode="full" behind the same prompts',
            baseline=losses["full"],
        )  # fmt: skip


def _stepped(own: Setting, model: Any, steps: int) -> float:
    """Mean negative log-likelihood of the last tokens, each given behind a cache."""
    from transformers import DynamicCache

    ids, cache, total = own.blocks.to(own.model.device), DynamicCache(), 0.0
    first = LENGTH - steps
    for start, stop in ((0, first), *((n, n + 1) for n in range(first, LENGTH - 1))):
        out = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1)
        total += float(F.cross_entropy(out.logits[:, -1].float(), ids[:, stop]))
    return total / steps


def _told(model: Any, predictor: nn.Module, budget: int) -> Any:
    import undivided

    host = undivided.attach(
        model, "dhsa", predictor=predictor, share="none", budget=budget, **(_SIZES | {"threshold": 0.5})
    )
    for layer in host.attention_layers():
        layer.boundary_predictor = _Told()
    return host


def _rows(own: Setting, hosts: dict[str, Any], budget: int) -> Iterator[Row]:
    words = f"{len(own.blocks)} blocks of {LENGTH} tokens, budget {budget}, blocks of {_QUERY_BLOCK} queries"
    shape = f"SmolLM2-135M-Instruct, {words}"
    dense = _loss(own, own.model, None)
    excess = {name: _loss(own, host, _labels(own, name)) - dense for name, host in hosts.items()}
    found = {
        name: own.recalled(host)
        for name, host in hosts.items()
        if not name.startswith(("random", "chunks of"))
    }
    found["full attention"] = own.recalled(own.model)
    for name, value in excess.items():
        rival = "blocks of 64"
        # A difference may have any sign, and then no ratio means anything.
        has_ratio = name != rival and value > 0 and excess[rival] > 0
        yield measured(
            f"loss of the last tokens above full attention, {name}", shape, value, "nats a token", better="lower",
            baseline_name=rival if has_ratio else None, baseline=excess[rival] if has_ratio else None,
        )  # fmt: skip
    for name, share in found.items():
        yield measured(
            f"needles found, {name}", f"{shape}, texts of 1000 tokens", share, "share", better="higher"
        )


def _labels(own: Setting, name: str) -> Any:
    """Returns what tells the stand-ins their logits, text by text; None for arms with a predictor."""
    if name == "random chunks":
        generator = torch.Generator().manual_seed(0)
        return lambda ids: [torch.rand(1, LENGTH - 1, generator=generator) for _ in range(_count(own))]
    if name == "chunks of the labels":
        return lambda ids: [target for _, target in boundary_examples(own.model, ids)]
    return None


def _count(own: Setting) -> int:
    return int(own.model.config.num_hidden_layers)


@torch.no_grad()
def _loss(own: Setting, model: Any, labels: Any) -> float:
    """Mean negative log-likelihood of the last tokens before the instruction's."""
    total = 0.0
    for ids in own.blocks.split(1):
        ids = ids.to(own.model.device)
        if labels is not None:
            for layer, logits in zip(model.attention_layers(), labels(ids), strict=True):
                layer.boundary_predictor.logits = logits.to(ids.device)
        stop = LENGTH - _INSTRUCTION
        logits = model(input_ids=ids, use_cache=False).logits[0, stop - _SCORED - 1 : stop - 1].float()
        total += float(F.cross_entropy(logits, ids[0, stop - _SCORED : stop]))
    return total / len(own.blocks)


@torch.no_grad()
def _precision(own: Setting, predictor: Any, count: int) -> Iterator[Row]:
    """Average precision of the predictor on a held-out text, against random scores, ends of sentences and blocks."""
    scores, targets = [], []
    ids = own.blocks[:1, :1024]
    length = ids.shape[1]
    for key, target in boundary_examples(own.model, ids.to(own.model.device)):
        mask = inner_gaps(length, predictor.window, key.device)
        scores.append(predictor(key)[:, mask].cpu())
        targets.append(target[:, mask].cpu())
    labels = torch.cat(targets)
    value = average_precision(torch.cat(scores), labels)
    rivals = {"chance, the share of boundaries": float(labels.mean())}
    # What is not told apart has its order by chance.
    noise = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) / 2
    gaps = inner_gaps(length, predictor.window)
    if own.sentence_ends is not None:
        ends = torch.isin(ids[:, :-1], own.sentence_ends)[:, gaps]
        rivals["ends of sentences and lines"] = average_precision(ends + noise, labels)
    blocks = (torch.arange(1, length) % 16 == 0)[gaps]
    rivals["blocks of 16"] = average_precision(blocks + noise, labels)
    for name, rival in rivals.items():
        yield measured(
            "average precision of predicted boundaries",
            f"SmolLM2-135M-Instruct, {count} texts of 1024 tokens, all layers", value, "precision", better="higher",
            baseline_name=name, baseline=rival,
        )  # fmt: skip
