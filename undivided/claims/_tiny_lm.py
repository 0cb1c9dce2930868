"""Tiny byte-level language models, trained on real text in seconds: for the quality tables of claims.

What such a table can show is that a mechanism trains, and large differences between mechanisms; it says nothing about
models of useful size. All arms of a table see the same bytes in the same order for a seed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCABULARY = 256
_DECAY, _CLIP, _BETAS = 0.1, 1.0, (0.9, 0.95)
_LAST_RATE = 0.1

Attention = dict[str, Any] | None
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TinyRun:
    """One trained model.

    Attributes:
        seed: of the weights and of the order of the text.
        losses: training loss of every step, nats a byte.
        bits_per_byte: on the held-out text.
        parameters: how many the model has.
        seconds: wall-clock time of training.
        model: the trained model, in eval mode.
    """

    seed: int
    losses: list[float]
    bits_per_byte: float
    parameters: int
    seconds: float
    model: nn.Module


def train_tiny_lm(
    attention: Attention | Sequence[Attention],
    text: str,
    heldout: str,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    steps: int = 200,
    batch_size: int = 16,
    length: int = 128,
    learning_rate: float = 3e-3,
    parameters: int | None = None,
    device: torch.device | str = "cpu",
    loss: Loss | None = None,
    **sizes: Any,
) -> list[TinyRun]:
    """Trains one tiny causal language model a seed and measures it on held-out text.

    Args:
        attention: entry of `UndividedConfig.attention` for every layer, or one entry a layer; None is the native
            attention of Llama.
        text, heldout: text to train on and to evaluate on.
        seeds: one model each.
        steps, batch_size, length, learning_rate, loss: as in `train`.
        parameters: choose the width of the MLPs so that the model has about so many parameters.
        device: where to train.
        sizes: fields of the Llama config, as in `tiny_lm`.

    Returns:
        One run a seed, in order.
    """
    if parameters is not None:
        sizes["intermediate_size"] = matching_width(attention, parameters, **sizes)
    runs = []
    for seed in seeds:
        model = tiny_lm(attention, seed, max_position_embeddings=max(length, 128), **sizes).to(device)
        started = time.perf_counter()
        losses = train(
            model, text, steps=steps, batch_size=batch_size, length=length, learning_rate=learning_rate, seed=seed,
            loss=loss,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        count = sum(parameter.numel() for parameter in model.parameters())
        runs.append(
            TinyRun(seed, losses, bits_per_byte(model, heldout, length=length), count, seconds, model.eval())
        )
    return runs


def tiny_lm(attention: Attention | Sequence[Attention], seed: int = 0, **sizes: Any) -> nn.Module:
    """Returns an untrained byte-level `UndividedForCausalLM` on a Llama base.

    Args:
        attention: as in `train_tiny_lm`.
        seed: of the weights.
        sizes: fields of the Llama config; by default 2 layers, `hidden_size=64`, 4 heads of 16, MLPs of 2.5 times the
            hidden size, untied embeddings.
    """
    from transformers import LlamaConfig

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.configuration import UndividedConfig

    width = sizes.get("hidden_size", 64)
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 5 * width // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": sizes.get("num_attention_heads", 4),
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    base = LlamaConfig(**(defaults | sizes))
    layers = base.num_hidden_layers
    entries = list(attention) if isinstance(attention, Sequence) else [attention] * layers
    torch.manual_seed(seed)
    return UndividedForCausalLM(UndividedConfig(base_config=base, attention=entries))


def matching_width(attention: Attention | Sequence[Attention], parameters: int, **sizes: Any) -> int:
    """Returns the width of the MLPs with which `tiny_lm` has nearest to `parameters` parameters.

    Raises:
        ValueError: the rest of the model has more parameters than that.
    """

    def count(width: int) -> int:
        with torch.device("meta"):
            model = tiny_lm(attention, **(sizes | {"intermediate_size": width}))
        return sum(parameter.numel() for parameter in model.parameters())

    one, two = count(1), count(2)
    width = 1 + round((parameters - one) / (two - one))
    if width < 1:
        raise ValueError(
            f"parameters={parameters} is less than the {one} that the model has with MLPs of width 1."
        )
    return width


def train(
    model: nn.Module,
    text: str | torch.Tensor,
    *,
    steps: int,
    batch_size: int = 16,
    length: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    loss: Loss | None = None,
) -> list[float]:
    """Trains a model in place with AdamW: short warm-up, cosine decay to a tenth, clipped gradients.

    On a GPU the products are in bfloat16 by autocast, and steps are CUDA graphs: neither model nor loss may wait for
    the device.

    Args:
        model: a causal language model over bytes, or over the tokens given.
        text: text to draw windows from, or its token ids `[num_tokens]`.
        steps: optimiser steps.
        batch_size, length: windows a step and bytes a window.
        learning_rate: the highest.
        seed: of the order of the text.
        loss: `loss(model, ids)` to minimise; by default the next-byte cross-entropy. The returned losses are its.

    Returns:
        The loss of every step, in nats.
    """
    from undivided.models.masks import without_masks

    device = next(model.parameters()).device
    data = (as_bytes(text) if isinstance(text, str) else text).to(device)
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": _DECAY}, {"params": vectors, "weight_decay": 0.0}]
    on_gpu = device.type == "cuda"
    # A graph reads the rate from memory when it is replayed; a number would be the captured step's for ever.
    rate = torch.tensor(learning_rate, device=device) if on_gpu else learning_rate
    optimiser = torch.optim.AdamW(groups, lr=rate, betas=_BETAS, capturable=on_gpu)
    warm_up = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps, warm_up))
    model.train()

    def update(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            value = next_byte_loss(model, ids) if loss is None else loss(model, ids)
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimiser.step()
        return value.detach()

    step = Graphed(update) if on_gpu else update
    losses = []
    with without_masks(model):
        for _ in range(steps):
            starts = torch.randint(len(data) - length, (batch_size, 1), generator=generator)
            losses.append(step(data[(starts + torch.arange(length)).to(device)]).clone())
            schedule.step()
    return torch.stack(losses).tolist()


class Graphed:
    """A step of training whose kernels are launched as one CUDA graph, captured after a few ordinary steps.

    The models are so small that a GPU would spend nearly all of its time waiting for their launches.

    Args:
        step: what is captured; what it returns is overwritten by the next call.
        beside: another one that never runs at the same time; both have one stream, and with it one memory.
    """

    ORDINARY_STEPS = 3
    pool: Any
    stream: Any

    def __init__(self, step: Callable[[torch.Tensor], Any], beside: Graphed | None = None) -> None:
        self.step = step
        self.calls = 0
        self.pool = torch.cuda.graph_pool_handle() if beside is None else beside.pool
        self.stream = torch.cuda.Stream() if beside is None else beside.stream
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, ids: torch.Tensor) -> Any:
        self.calls += 1
        if self.calls <= self.ORDINARY_STEPS:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                value = self.step(ids)
            torch.cuda.current_stream().wait_stream(self.stream)
            return value
        if self.calls == self.ORDINARY_STEPS + 1:
            self.ids = ids.clone()
            with torch.cuda.graph(self.graph, pool=self.pool, stream=self.stream):
                self.value = self.step(self.ids)
        self.ids.copy_(ids)
        self.graph.replay()
        return self.value


def next_byte_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Returns the mean cross-entropy of the next byte, in nats."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: str, *, length: int = 128, most_bytes: int = 65536) -> float:
    """Returns the mean `-log2 p` of the next byte over the windows of the first `most_bytes` bytes of a text."""
    device = next(model.parameters()).device
    data = as_bytes(text)[:most_bytes]
    windows = data[: len(data) // length * length].view(-1, length).to(device)
    model.eval()
    total = sum(next_byte_loss(model, ids).item() * len(ids) for ids in windows.split(64))
    return total / len(windows) / math.log(2)


def as_bytes(text: str) -> torch.Tensor:
    """Returns the UTF-8 bytes of a text as token ids, int64."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and the sample standard deviation; of one value, with deviation 0."""
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else 0.0


def _rate(step: int, steps: int, warm_up: int) -> float:
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(steps - warm_up, 1)
    return _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
