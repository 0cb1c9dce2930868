"""The engine: prompts in, tokens out, as many sequences at a time as there is memory for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from undivided.engine._support import check_model
from undivided.engine.cache import EngineCache
from undivided.engine.prefill import prefill_groups, read_prompts
from undivided.engine.sampling import Sampling
from undivided.engine.scheduler import Request, Scheduler, batch_bucket
from undivided.engine.step import DecodeStep
from undivided.engine.text import TextStream
from undivided.models.bases import attention_layers


@dataclass(frozen=True)
class Event:
    """One token of one continuation.

    Args:
        index: of the prompt among those given.
        token: its id.
        text: what it adds to the text; may be empty.
        finish_reason: "eos" or "length" with the last token, None before.
    """

    index: int
    token: int
    text: str
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """One continuation.

    Args:
        prompt: token ids of the prompt.
        tokens: token ids of the continuation, with the end-of-sequence token if it came.
        text: of the continuation, without special tokens; empty without a tokenizer.
        finish_reason: "eos" or "length".
    """

    prompt: list[int]
    tokens: list[int]
    text: str
    finish_reason: str


@dataclass
class _Launch:
    """A step under way: who was in the batch, and where its tokens will be."""

    requests: list[Request]
    tokens: torch.Tensor
    done: torch.cuda.Event | None

    def read(self) -> list[tuple[Request, int]]:
        if self.done is not None:
            self.done.synchronize()
        chosen = self.tokens.tolist()
        return [(request, chosen[request.place]) for request in self.requests]


class Engine:
    """Decodes many prompts at a time on one device.

    Prompts are read by the model's ordinary forward, and their latents are copied into pages of a pool that lies in
    the device's memory once and for all. A step then advances all running sequences by one token; on CUDA it is one
    CUDA graph a batch size (1, 2, 4, ...). Sequences join when a place and their pages are free and leave when they
    end. The host reads the chosen tokens once a step, while the next step runs already.

    Latent layers ("mla", "gla", "tpla") have pages; others (the base model's own, "gqa") have static keys and values
    of `max_batch * max_tokens` places, attended with a mask.

    Args:
        model: a causal language model, native or `UndividedForCausalLM`, of a supported base model.
        tokenizer: turns prompts into tokens and tokens into text; None if prompts are token ids and no text is wanted.
        max_tokens: longest sequence, prompt and continuation together.
        max_batch: most sequences at a time.
        cache_tokens: rows of the page pool over all sequences; default `max_batch * max_tokens`.
        page_size: rows of a page.
        prefill_tokens: tokens that a prefill reads at a time; longer prompts are read in chunks, unless a layer reads
            its prompt exactly (`prefill="exact"`), which needs it whole.
        backend: of the latent attention while decoding: "auto", "gluon", "triton", "sdpa" or "reference".
        cuda_graphs: whether a decoding step is one CUDA graph; by default, where the model is on CUDA and the
            backend is not "reference", whose steps wait for the device.
        compile: whether `torch.compile` fuses the decoding step; takes its time once a batch size.

    Raises:
        ValueError: a size is not positive, the model has something that the engine does not compute, or
            `cuda_graphs` is asked of the reference backend.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        max_tokens: int = 2048,
        max_batch: int = 32,
        cache_tokens: int | None = None,
        page_size: int = 64,
        prefill_tokens: int = 4096,
        backend: str = "auto",
        cuda_graphs: bool | None = None,
        compile: bool = False,
    ) -> None:
        sizes = {
            "max_tokens": max_tokens,
            "max_batch": max_batch,
            "cache_tokens": max_batch * max_tokens if cache_tokens is None else cache_tokens,
            "page_size": page_size,
            "prefill_tokens": prefill_tokens,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1.")
        if cuda_graphs and backend == "reference":
            raise ValueError(
                'cuda_graphs=True cannot hold the steps of backend="reference", which wait for the device; use "auto".'
            )
        check_model(model, max_tokens)
        self.model = model
        self.tokenizer = tokenizer
        self.prefill_tokens = prefill_tokens
        layers = attention_layers(model)
        self._whole_prompts = any(getattr(layer, "prefill", "sliced") == "exact" for layer in layers)
        if cache_tokens is None:
            num_pages = max_batch * -(-max_tokens // page_size)
        else:
            num_pages = -(-cache_tokens // page_size)
        self.cache = EngineCache(layers, max_batch, max_tokens, num_pages, page_size)
        on_cuda = self.cache.device.type == "cuda"
        self._scheduler = Scheduler(max_batch, max_tokens, num_pages, page_size)
        self._step = DecodeStep(
            model,
            self.cache,
            backend=backend,
            cuda_graphs=on_cuda and backend != "reference" if cuda_graphs is None else cuda_graphs,
            compile=compile,
        )
        self._eos = _eos_tokens(model)
        self._texts: dict[int, TextStream] = {}

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> list[Completion]:
        """Returns the continuations of all prompts, in their order; the arguments are those of `stream`."""
        encoded = self._encode(prompts)
        events: list[list[Event]] = [[] for _ in encoded]
        for event in self.stream(
            encoded, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
            ignore_eos=ignore_eos,
        ):  # fmt: skip
            events[event.index].append(event)
        return [
            Completion(
                prompt, [e.token for e in own], "".join(e.text for e in own), str(own[-1].finish_reason)
            )
            for prompt, own in zip(encoded, events, strict=True)
        ]

    def stream(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Iterator[Event]:
        """Yields the tokens of all continuations as they come, those of a step in the order of the prompts.

        Args:
            prompts: texts, or token ids.
            max_new_tokens: longest continuation.
            temperature: 0 takes the most probable token; above, samples.
            top_p: probability that the tokens drawn from have together.
            seed: prompt i draws with `seed + i`, whatever else is in the batch.
            ignore_eos: go on after an end-of-sequence token, as when throughput is measured.

        Raises:
            ValueError: an argument is out of range, or a prompt can never run in this engine.
            RuntimeError: another stream of this engine has not been read to its end, nor closed.
        """
        requests = [
            Request(index, prompt, max_new_tokens, Sampling(temperature, top_p, seed + index))
            for index, prompt in enumerate(self._encode(prompts))
        ]
        for request in requests:
            self._scheduler.check(request)
        return self._serve(requests, frozenset() if ignore_eos else self._eos)

    def _serve(self, requests: list[Request], eos: frozenset[int]) -> Iterator[Event]:
        if self._scheduler.running or self._scheduler.waiting:
            raise RuntimeError("the engine is busy: read its other stream to the end, or close it.")
        self._scheduler.add(requests)
        self._texts = {request.index: TextStream(self.tokenizer) for request in requests}
        ahead: _Launch | None = None
        try:
            while True:
                if ahead is None:
                    yield from self._admit(eos)
                    if not self._scheduler.running:
                        return
                    self._step.place(list(self._scheduler.running.values()))
                    ahead = self._launch()
                current, ahead = ahead, self._launch() if self._goes_on() else None
                yield from self._deliver(current.read(), eos)
                if ahead is not None and len(self._scheduler.running) < len(current.requests):
                    # The batch changes only with nothing under way.
                    yield from self._deliver(ahead.read(), eos)
                    ahead = None
        finally:
            # Also when the reader stops early: the next stream begins with an empty batch.
            self._scheduler.clear()

    def _admit(self, eos: frozenset[int]) -> Iterator[Event]:
        while admitted := self._scheduler.admit():
            for group in prefill_groups(admitted, self.prefill_tokens):
                chunk = None if self._whole_prompts else self.prefill_tokens
                first = read_prompts(self.model, self._step, group, chunk)
                yield from self._deliver(list(zip(group, first, strict=True)), eos)

    def _deliver(self, chosen: list[tuple[Request, int]], eos: frozenset[int]) -> Iterator[Event]:
        for request, token in sorted(chosen, key=lambda pair: pair[0].index):
            if self._scheduler.running.get(request.place) is not request:
                continue  # it ended while the step was under way
            request.tokens.append(token)
            reason = None
            if token in eos:
                reason = "eos"
            elif len(request.tokens) == request.max_new_tokens:
                reason = "length"
            if reason is not None:
                self._scheduler.finish(request)
            text = self._texts[request.index].push(token, reason is not None)
            yield Event(request.index, token, text, reason)

    def _goes_on(self) -> bool:
        """Whether a request will need a step after the one under way."""
        return any(len(r.tokens) + 1 < r.max_new_tokens for r in self._scheduler.running.values())

    def _launch(self) -> _Launch:
        running = self._scheduler.running
        places = batch_bucket(self._scheduler.places, self.cache.max_batch)
        self._step.run(places, any(r.sampling.temperature > 0 for r in running.values()))
        tokens, done = self._step.tokens[:places].clone(), None
        if tokens.is_cuda:
            tokens = tokens.to("cpu", non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return _Launch(list(running.values()), tokens, done)

    def _encode(self, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise TypeError("prompts is one text; give a list of prompts.")
        encoded = []
        for prompt in prompts:
            if not isinstance(prompt, str):
                encoded.append([int(token) for token in prompt])
            elif self.tokenizer is None:
                raise ValueError("prompts are texts, but the engine has no tokenizer; give token ids.")
            else:
                encoded.append(self.tokenizer(prompt).input_ids)
        return encoded


def _eos_tokens(model: Any) -> frozenset[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
