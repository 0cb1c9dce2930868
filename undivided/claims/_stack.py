"""Decode throughput of stacks of layers that fill a card.

The largest batch that fits is decoded, and a step of all layers is one CUDA graph. Weights are random; every layer has
weights and a cache of its own. A stack of one rank of several leaves out what the ranks send to each other.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.engine.cache import EngineCache, StepCache
from undivided.layers.gqa import GQAttention
from undivided.layers.latent import LatentAttention
from undivided.layers.mla import MLAttention
from undivided.layers.paged import PagedRows
from undivided.testing import assert_as_accurate

PAGE_SIZE = 64
DTYPE = torch.bfloat16
# What a step needs beside weights and cache, and what the card's driver keeps.
_SHARE = 0.9
_METHOD = {"cpu": "auto", "cuda": "graph"}


class Gated(nn.Module):
    """Llama's feed-forward block."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Shape:
    """A stack of equal layers.

    Args:
        name: of the rank or model.
        num_layers: layers.
        hidden_size: width of the residual stream.
        attention: builds the attention of a layer from its index.
        intermediate_size: of the feed-forward blocks; None for attention alone.
        vocab_size: of embedding and output head; None for neither.
    """

    name: str
    num_layers: int
    hidden_size: int
    attention: Callable[[int], nn.Module]
    intermediate_size: int | None = None
    vocab_size: int | None = None


class Stack(nn.Module):
    """The layers of a shape: `x + attention(norm(x))`, and `x + mlp(norm(x))` where there are feed-forward blocks."""

    def __init__(self, shape: Shape, device: str) -> None:
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        with torch.device("meta"):
            self.attentions = nn.ModuleList(shape.attention(index) for index in range(shape.num_layers))
            self.norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for _ in self.attentions)
            blocks = [] if shape.intermediate_size is None else self.norms
            self.mlps = nn.ModuleList(Gated(size, int(shape.intermediate_size or 0)) for _ in blocks)
            self.mlp_norms = nn.ModuleList(nn.RMSNorm(size, eps=1e-6) for _ in blocks)
            if shape.vocab_size is not None:
                self.embedding = nn.Embedding(shape.vocab_size, size)
                self.last_norm = nn.RMSNorm(size, eps=1e-6)
                self.head = nn.Linear(size, shape.vocab_size, bias=False)
        self.to(DTYPE).to_empty(device=device).requires_grad_(False)
        for parameter in self.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def multiplied_weights(self) -> int:
        """Weights that a token is multiplied with; of an embedding it reads one row."""
        embedding = self.embedding.weight.numel() if hasattr(self, "embedding") else 0
        return sum(p.numel() for p in self.parameters() if p.dim() == 2) - embedding

    def forward(self, x: torch.Tensor, tables: Any, cache: Any) -> torch.Tensor:
        """Returns the hidden states of `x`, hidden states or token ids, or the chosen tokens where there is a head."""
        if hasattr(self, "embedding"):
            x = self.embedding(x)
        for index, (norm, attention) in enumerate(zip(self.norms, self.attentions, strict=True)):
            x = x + attention(norm(x), tables, None, cache)[0]
            if len(self.mlps):
                x = x + self.mlps[index](self.mlp_norms[index](x))
        return self.head(self.last_norm(x)).argmax(dim=-1) if hasattr(self, "head") else x


class FlashMLAttention(MLAttention):
    """MLA whose decoding is FlashMLA's kernel; `plan` is shared by the layers of a stack."""

    plan: Any

    def attend_rows(
        self, query_nope: torch.Tensor, query_rope: torch.Tensor, rows: PagedRows
    ) -> torch.Tensor:
        from flash_mla import flash_mla_with_kvcache

        up_key, up_value = self.up_projections()
        absorbed = torch.einsum("bhnd,hdr->bhnr", query_nope, up_key)
        query = torch.cat([absorbed, query_rope], dim=-1).transpose(1, 2).contiguous()
        out, _ = flash_mla_with_kvcache(
            query, rows.cache[:, :, None], rows.block_table, rows.filled, self.latent_dim, self.plan,
            softmax_scale=self.scale, causal=False, use_legacy=True,
        )  # fmt: skip
        return torch.einsum("bnhr,hvr->bhnv", out, up_value)


class HalfOutputAttention(MLAttention):
    """A TPLA rank of two that projects half of the heads, summed over the ranks by a reduce-scatter before it.

    The sum itself is left out, as all traffic between ranks is.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, *sizes: int, **options: Any) -> None:
        super().__init__(hidden_size, num_attention_heads, *sizes, **options)
        self.o_proj = nn.Linear(num_attention_heads // 2 * self.value_dim, hidden_size, bias=False)

    def project_output(self, heads: torch.Tensor) -> torch.Tensor:
        return super().project_output(heads[:, : self.num_heads // 2])


class WholeCache:
    """Keys and values `[batch, heads, keys, head_dim]` of every layer, full but for the row of the step."""

    def __init__(self, layers: Sequence[GQAttention], batch: int, keys: int) -> None:
        weight = layers[0].k_proj.weight
        sizes = [(batch, layer.num_key_value_heads, keys, layer.head_dim) for layer in layers]
        self.layers = [[weight.new_empty(size).normal_() for _ in range(2)] for size in sizes]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the last row and returns all."""
        keys, values = self.layers[layer_idx]
        keys[:, :, -1:].copy_(key)
        values[:, :, -1:].copy_(value)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the keys of a layer."""
        return self.layers[layer_idx][0].shape[2]


class PromptCache:
    """Room for the latent rows of one prompt, which is read whole."""

    def __init__(self, layers: Sequence[LatentAttention], length: int) -> None:
        weight = layers[0].o_proj.weight
        self.length = length
        self.rows = [weight.new_empty(1, 1, length, layer.latent_dim + layer.rope_dim) for layer in layers]

    def update(
        self, latent: torch.Tensor, rope_key: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keeps the rows and hands them back."""
        torch.cat([latent, rope_key], dim=-1, out=self.rows[layer_idx])
        return latent, rope_key

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the length of the prompt."""
        return self.length


def cache_bytes(layer: nn.Module) -> int:
    """Bytes that a layer caches for a token."""
    if isinstance(layer, LatentAttention):
        return DTYPE.itemsize * (layer.latent_dim + layer.rope_dim)
    if isinstance(layer, GQAttention):
        return DTYPE.itemsize * 2 * layer.num_key_value_heads * layer.head_dim
    raise TypeError(f"{type(layer).__name__} is neither a latent layer nor grouped-query attention.")


def card_memory(share: float = _SHARE) -> int:
    """Bytes of the card for weights and caches, beside what this process holds already."""
    release()
    return int(share * torch.cuda.get_device_properties(0).total_memory) - torch.cuda.memory_reserved()


def largest_batch(stack: Stack, keys: int, memory: int) -> int:
    """Returns how many sequences of `keys` tokens fit into `memory` bytes beside the weights.

    Raises:
        ValueError: not one does.
    """
    sequence = keys * sum(cache_bytes(layer) for layer in stack.attentions)
    batch = (memory - stack.weight_bytes) // sequence
    if batch < 1:
        raise ValueError(
            f"{stack.shape.name}: weights of {stack.weight_bytes / 2**30:.1f} GiB and one sequence of "
            f"{sequence / 2**30:.1f} GiB do not fit into {memory / 2**30:.1f} GiB."
        )
    return batch


def rotary(head_dim: int, length: int, device: str, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns cos and sin of random angles, as a Llama model hands them to its attention."""
    angles = torch.rand(batch, length, head_dim // 2, device=device).repeat(1, 1, 2) * 6.28
    return angles.cos().to(DTYPE), angles.sin().to(DTYPE)


def filled_cache(stack: Stack, batch: int, keys: int) -> EngineCache:
    """Returns a paged cache of random rows, full but for the row of the step, its pages shuffled."""
    device = next(stack.parameters()).device
    pages = -(-keys // PAGE_SIZE)
    cache = EngineCache(list(stack.attentions), batch, keys, batch * pages, PAGE_SIZE)
    for pool in _pools(cache):
        pool.normal_()
    cache.block_table.copy_(torch.randperm(batch * pages, device=device).view(batch, pages))
    cache.lengths.fill_(keys - 1)
    cache.counts.fill_(1)
    return cache


def gate(rival: Stack, stack: Stack, cache: EngineCache, x: torch.Tensor, tables: Any, name: str) -> None:
    """Raises an AssertionError unless the first layer's step is as accurate as eager, both against float64.

    It runs at the whole batch; its first and last sequences are compared. `stack` has the weights of `rival` and our
    layers, which compute the two it is held against.
    """
    layer, batch = rival.attentions[0], len(x)
    out = layer(x, tables, None, StepCache(cache, batch))[0]
    for sequence in sorted({0, batch - 1}):
        pages = cache.block_table[sequence].long()
        found = []
        for dtype in (DTYPE, torch.float64):
            one = copy.deepcopy(stack.attentions[0]).to(dtype)
            own = EngineCache([one], 1, cache.max_tokens, len(pages), PAGE_SIZE)
            _pools(own)[0].copy_(_pools(cache)[0][pages])
            own.block_table.copy_(torch.arange(len(pages))[None])
            own.lengths.copy_(cache.lengths[sequence : sequence + 1])
            own.counts.fill_(1)
            # Not the reference: it would repeat the cache for every head, and the card is full.
            step = StepCache(own, 1, "sdpa")
            at = tuple(
                t.to(dtype)[-1:] if len(t) == 1 else t[sequence : sequence + 1].to(dtype) for t in tables
            )
            found.append(one(x[sequence : sequence + 1].to(dtype), at, None, step)[0])
        eager, exact = found
        assert_as_accurate(
            out[sequence : sequence + 1], eager, exact, factor=2.0, name=f"{name}, sequence {sequence}"
        )


@dataclass(frozen=True)
class Throughput:
    """A measured stack.

    Args:
        batch: sequences.
        milliseconds: of a step.
        fraction: of the ceiling: the least time for its bytes and products over the measured one.
    """

    batch: int
    milliseconds: float
    fraction: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all sequences."""
        return 1e3 * self.batch / self.milliseconds


def latent_throughput(
    shape: Shape,
    keys: int,
    memory: int,
    device: str,
    *,
    batches: Sequence[int] = (),
    with_flash: bool = False,
) -> dict[str, Throughput]:
    """Decodes the largest batch that fits with our kernels and, if asked, with FlashMLA; both over the same cache.

    Args:
        shape: of the stack; its attention is latent.
        keys: length of every sequence.
        memory: bytes for weights and caches.
        device: `"cpu"` or `"cuda"`.
        batches: smaller batches to measure too.
        with_flash: also with FlashMLA's kernel.

    Returns:
        Name to throughput: "ours", "FlashMLA", and `ours, batch N`.
    """
    release()
    stack = Stack(shape, device)
    batch = largest_batch(stack, keys, memory)
    cache = filled_cache(stack, batch, keys)
    x, tables = _inputs(stack, batch), rotary(stack.attentions[0].rope_dim, 1, device)
    hidden = torch.randn(batch, 1, shape.hidden_size, device=device, dtype=DTYPE)
    with torch.no_grad():
        gate(stack, stack, cache, hidden, tables, shape.name)
        steps = {"ours": _step(stack, x, tables, cache, batch)}
        sizes = {"ours": batch}
        for fewer in batches:
            steps[f"ours, batch {fewer}"] = _step(stack, x[:fewer], tables, cache, fewer)
            sizes[f"ours, batch {fewer}"] = fewer
        if with_flash:
            rival = _with_flash_mla(stack)
            gate(rival, stack, cache, hidden, tables, f"{shape.name}, FlashMLA")
            steps["FlashMLA"], sizes["FlashMLA"] = _step(rival, x, tables, cache, batch), batch
        times = time_rivals(steps, device, method=_METHOD[device], seconds=0.8)
    layer = stack.attentions[0]
    pair = layer.num_heads * (2 * layer.latent_dim + layer.rope_dim)
    return {
        name: _throughput(stack, sizes[name], keys, timing.median, pair) for name, timing in times.items()
    }


def static_throughput(shape: Shape, keys: int, memory: int, device: str) -> tuple[Throughput, str]:
    """Decodes the largest batch that fits of a stack with grouped-query attention, with the fastest of torch's kernels.

    Returns:
        The throughput, and which kernel it is.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    release()
    stack = Stack(shape, device)
    batch = largest_batch(stack, keys, memory)
    cache = WholeCache(list(stack.attentions), batch, keys)
    x, tables = _inputs(stack, batch), rotary(stack.attentions[0].head_dim, 1, device)
    query = torch.randn(batch, stack.attentions[0].q_proj.out_features, device=device, dtype=DTYPE)
    query = query.view(batch, -1, 1, stack.attentions[0].head_dim)
    kernels = [SDPBackend.FLASH_ATTENTION]
    grouped = cache.layers[0][0].shape[1] != query.shape[1]
    if device == "cuda":
        # The memory-efficient kernel has no grouped heads.
        kernels += [SDPBackend.CUDNN_ATTENTION, *([] if grouped else [SDPBackend.EFFICIENT_ATTENTION])]

    def within(kernel: SDPBackend, function: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            with sdpa_kernel(kernel):
                return function()

        return run

    def attend() -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(query, *cache.layers[0], enable_gqa=grouped)

    with torch.no_grad():
        rivals = {kernel.name: within(kernel, attend) for kernel in kernels}
        found = time_rivals(rivals, device, method=_METHOD[device], seconds=0.1)
        best = min(kernels, key=lambda kernel: found[kernel.name].median)
        step = within(best, lambda: stack(x, tables, cache))
        times = time_rivals({"step": step}, device, method=_METHOD[device], seconds=0.8)
    layer = stack.attentions[0]
    pair = layer.q_proj.out_features * 2
    return _throughput(stack, batch, keys, times["step"].median, pair), best.name.lower()


def prefill_times(shapes: Sequence[Shape], length: int, device: str) -> dict[str, float]:
    """Returns the milliseconds in which each stack reads one prompt, caching it; in turns, by CUDA graph."""
    release()
    rivals = {}
    for shape in shapes:
        stack = Stack(shape, device)
        x = torch.randn(1, length, shape.hidden_size, device=device, dtype=DTYPE)
        tables = rotary(stack.attentions[0].rope_dim, length, device)
        cache = PromptCache(list(stack.attentions), length)

        def read(
            stack: Stack = stack, x: torch.Tensor = x, tables: Any = tables, cache: Any = cache
        ) -> torch.Tensor:
            return stack(x, tables, cache)

        rivals[shape.name] = read
    with torch.no_grad():
        times = time_rivals(rivals, device, method=_METHOD[device], seconds=0.5)
    return {name: timing.median for name, timing in times.items()}


def release() -> None:
    """Gives the memory of earlier stacks back to the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _pools(cache: EngineCache) -> list[torch.Tensor]:
    return [pool for pool in cache.pools if pool is not None]


def _inputs(stack: Stack, batch: int) -> torch.Tensor:
    device = stack.norms[0].weight.device
    if stack.shape.vocab_size is not None:
        return torch.randint(stack.shape.vocab_size, (batch, 1), device=device)
    return torch.randn(batch, 1, stack.shape.hidden_size, device=device, dtype=DTYPE)


def _step(
    stack: Stack, x: torch.Tensor, tables: Any, cache: EngineCache, batch: int
) -> Callable[[], torch.Tensor]:
    return lambda: stack(x, tables, StepCache(cache, batch))


def _with_flash_mla(stack: Stack) -> Stack:
    """The same weights under FlashMLA's kernel."""
    from flash_mla import get_mla_metadata

    rival = copy.copy(stack)
    rival._modules = dict(stack._modules)
    plan = get_mla_metadata()[0]
    layers = []
    for layer in stack.attentions:
        flash = copy.copy(layer)
        flash.__class__ = FlashMLAttention
        flash.plan = plan
        layers.append(flash)
    rival.attentions = nn.ModuleList(layers)
    return rival


def _throughput(stack: Stack, batch: int, keys: int, milliseconds: float, pair: int) -> Throughput:
    """`pair`: multiplications of a query token with one cached token in a layer."""
    layers = len(stack.attentions)
    cached = batch * keys * sum(cache_bytes(layer) for layer in stack.attentions)
    flops = 2 * batch * (stack.multiplied_weights + layers * keys * pair)
    fraction = measured_ceilings(stack.norms[0].weight.device.type).fraction(
        milliseconds, flops=flops, bytes_moved=stack.weight_bytes + cached
    )
    return Throughput(batch, milliseconds, fraction)
