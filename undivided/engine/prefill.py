"""How prompts are read: by the model's ordinary forward, several at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from undivided.engine.sampling import sample
from undivided.engine.scheduler import Request
from undivided.engine.step import DecodeStep
from undivided.models.bases import cache_argument

# The logits of a group are of every pair of a prompt and an end.
_LARGEST_GROUP = 32


def prefill_groups(requests: Sequence[Request], most_tokens: int) -> Iterator[list[Request]]:
    """Yields neighbours that are read together: at most `most_tokens` with their padding, or one alone."""
    group: list[Request] = []
    longest = 0
    for request in requests:
        longest = max(longest, len(request.prompt))
        if group and (longest * (len(group) + 1) > most_tokens or len(group) == _LARGEST_GROUP):
            yield group
            group, longest = [], len(request.prompt)
        group.append(request)
    if group:
        yield group


@torch.no_grad()
def read_prompts(model: Any, step: DecodeStep, group: Sequence[Request], chunk: int | None) -> list[int]:
    """Reads prompts, keeps their rows in the cache of the step, and returns their first new tokens.

    The prompts are padded behind their ends and need no mask: causality hides the padding from every token that is
    kept.

    Args:
        model: a causal language model of transformers.
        step: of the engine.
        group: requests that have their places and pages.
        chunk: tokens that are read at a time; None reads the prompts whole.
    """
    from transformers import DynamicCache

    device = step.cache.device
    lengths = [len(request.prompt) for request in group]
    longest = max(lengths)
    ids = torch.tensor([r.prompt + [0] * (longest - len(r.prompt)) for r in group], device=device)
    prompts = DynamicCache()
    held = {cache_argument(): prompts}
    starts = range(0, longest, chunk or longest)
    for start in starts[:-1]:
        part = ids[:, start : start + starts.step]
        model(part, use_cache=True, logits_to_keep=1, **held)
    ends = sorted(set(lengths))
    logits = model(
        ids[:, starts[-1] :],
        use_cache=True,
        logits_to_keep=torch.tensor(ends, device=device) - 1 - starts[-1],
        **held,
    ).logits
    step.cache.store(group, prompts)
    last = logits[torch.arange(len(group)), [ends.index(length) for length in lengths]]
    return _first_tokens(step, group, last)


def _first_tokens(step: DecodeStep, group: Sequence[Request], logits: torch.Tensor) -> list[int]:
    first = []
    for request in group:
        uniforms = torch.zeros(1)
        if request.sampling.temperature > 0:
            uniforms = request.sampling.uniforms(request.max_new_tokens)
            step.set_uniforms(request, uniforms)
        first.append(float(uniforms[0]))
    temperature, top_p, uniform = (
        torch.tensor(numbers, dtype=torch.float32, device=logits.device)
        for numbers in ([r.sampling.temperature for r in group], [r.sampling.top_p for r in group], first)
    )
    return sample(logits, temperature, top_p, uniform).tolist()
