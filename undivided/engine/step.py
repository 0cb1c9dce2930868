"""One decoding step of a batch: eagerly, or as one CUDA graph a batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from undivided.engine.cache import EngineCache, StepCache
from undivided.engine.sampling import sample
from undivided.engine.scheduler import Request
from undivided.models.bases import cache_argument

_MOST_COMPILATIONS = 256


class DecodeStep:
    """Runs a model for one token a place, chooses the next tokens, and leaves everything ready for the next step.

    Tokens, lengths, tables and the numbers of the sampling lie in tensors that never move, and a step changes them on
    the device: nothing is read on the host, so a step is one CUDA graph, captured when its batch size first occurs.

    Args:
        model: a causal language model of transformers.
        cache: of all places.
        backend: of the latent attention.
        cuda_graphs: whether to capture.
        compile: whether `torch.compile` fuses the model's forward first, once a batch size.
    """

    def __init__(
        self, model: Any, cache: EngineCache, *, backend: str, cuda_graphs: bool, compile: bool
    ) -> None:
        self.model = model
        self.cache = cache
        self.backend = backend
        self._cache_argument = cache_argument()
        self.cuda_graphs = cuda_graphs
        self._compiled = torch.compile(self._logits, dynamic=False) if compile else None
        device = cache.device
        self.tokens = torch.zeros(cache.max_batch, dtype=torch.long, device=device)
        self.temperature = torch.zeros(cache.max_batch, device=device)
        self.top_p = torch.ones(cache.max_batch, device=device)
        # By position: the token after position n is drawn with number n.
        self.uniforms = torch.zeros(cache.max_batch, cache.max_tokens, device=device)
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._memory = torch.cuda.graph_pool_handle() if cuda_graphs else None

    def place(self, requests: Sequence[Request]) -> None:
        """Sets the batch: all requests that run, each with the tokens it has so far."""
        self.cache.place(requests)
        places = self.cache.max_batch
        tokens = torch.zeros(places, dtype=torch.long)
        temperature, top_p = torch.zeros(places), torch.ones(places)
        for request in requests:
            tokens[request.place] = request.tokens[-1]
            temperature[request.place] = request.sampling.temperature
            top_p[request.place] = request.sampling.top_p
        self.tokens.copy_(tokens)
        self.temperature.copy_(temperature)
        self.top_p.copy_(top_p)

    def set_uniforms(self, request: Request, uniforms: torch.Tensor) -> None:
        """Sets the random numbers of a request that has just got its place."""
        first = len(request.prompt) - 1
        self.uniforms[request.place, first : first + len(uniforms)].copy_(uniforms)

    @torch.no_grad()
    def run(self, places: int, sampled: bool) -> None:
        """Advances the first `places` places by one token; `sampled`: whether one of them is not greedy."""
        if not self.cuda_graphs:
            self._advance(places, sampled)
            return
        if (places, sampled) not in self._graphs:
            self._graphs[places, sampled] = self._captured(places, sampled)
        self._graphs[places, sampled].replay()

    def _advance(self, places: int, sampled: bool) -> None:
        lengths, counts = self.cache.lengths[:places], self.cache.counts[:places]
        logits = self._forward(places)
        if sampled:
            uniform = self.uniforms[:places].gather(1, lengths[:, None].long())[:, 0]
            chosen = sample(logits, self.temperature[:places], self.top_p[:places], uniform)
        else:
            chosen = logits.argmax(dim=-1)
        tokens = self.tokens[:places]
        tokens.copy_(torch.where(counts > 0, chosen, tokens))
        lengths.add_(counts)

    def _logits(self, places: int) -> torch.Tensor:
        view = StepCache(self.cache, places, self.backend)
        out = self.model(
            input_ids=self.tokens[:places, None],
            position_ids=view.lengths[:, None].long(),
            attention_mask=view.mask(self.model.dtype),
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: view},
        )
        return out.logits[:, -1]

    def _forward(self, places: int) -> torch.Tensor:
        if self._compiled is None:
            return self._logits(places)
        # Every batch size of every engine is a compilation of its own; beyond its limit torch would go on uncompiled.
        with torch._dynamo.config.patch(recompile_limit=_MOST_COMPILATIONS):
            return self._compiled(places)

    def _captured(self, places: int, sampled: bool) -> torch.cuda.CUDAGraph:
        # With every place idle a step leaves tokens, lengths and pages as they are; what it writes into static keys
        # is what the next step overwrites.
        counts = self.cache.counts.clone()
        self.cache.counts.zero_()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            # Kernels are compiled and workspaces allocated outside the graph.
            for _ in range(2):
                self._advance(places, sampled)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            self._advance(places, sampled)
        self.cache.counts.copy_(counts)
        return graph
