"""One step of decoding over a latent cache: its tensors, its work, the check of a result, and who else can do it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from undivided.ops import latent_attention
from undivided.testing import assert_as_accurate

ROPE_DIM = 64
PAGE_SIZE = 64
# The rows of a head of DeepSeek-V3 and Kimi-K2 without and with rotary positions decide the scale.
SCALE = (128 + ROPE_DIM) ** -0.5
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """What one rank attends with.

    Args:
        heads: query heads.
        latent_dim: width of the cached latent; `ROPE_DIM` rotary dimensions stand beside it.
        batch: sequences, all of one length.
        keys: cached tokens of each.
        queries: new tokens of each (more than one: speculative decoding).
    """

    heads: int
    latent_dim: int
    batch: int = 1
    keys: int = 1
    queries: int = 1

    @property
    def width(self) -> int:
        """Numbers in a cache row."""
        return self.latent_dim + ROPE_DIM

    def __str__(self) -> str:
        tokens = "" if self.queries == 1 else f" x {self.queries} queries"
        return f"{self.heads} heads{tokens} x {self.width}"

    def at(self, batch: int, keys: int) -> Problem:
        """The same rank at another batch and length."""
        return replace(self, batch=batch, keys=keys)

    def inputs(self, device: str, dtype: torch.dtype, fp8: bool = False) -> Inputs:
        """Random arguments of `latent_attention`; the cache lies in shuffled pages of `PAGE_SIZE` rows."""
        pages = -(-self.keys // PAGE_SIZE)
        query = torch.randn(self.batch, self.heads, self.queries, self.width, device=device, dtype=dtype)
        rows = torch.randn(self.batch * pages, 1, PAGE_SIZE, self.width, device=device, dtype=dtype)
        scale = None
        if fp8:
            rows = rows.to(torch.float8_e4m3fn)
            scale = torch.rand(self.batch * pages, PAGE_SIZE, device=device) + 0.5
        table = torch.randperm(self.batch * pages, device=device).view(self.batch, pages).int()
        return {
            "query_latent": query[..., : self.latent_dim].contiguous(),
            "query_rope": query[..., self.latent_dim :].contiguous(),
            "latent": rows[..., : self.latent_dim],
            "rope_key": rows[..., self.latent_dim :],
            "cache_seqlens": torch.full((self.batch,), self.keys, dtype=torch.int32, device=device),
            "block_table": table,
            "latent_scale": scale,
        }

    def bytes_moved(self, itemsize: int = 2) -> int:
        """The cache once (with the scales of an fp8 one), queries and outputs once."""
        row = self.width * itemsize + (4 if itemsize == 1 else 0)
        return self.batch * (self.keys * row + 2 * self.queries * self.heads * (self.width + self.latent_dim))

    def flops(self) -> int:
        """Both products over all keys that a query sees."""
        pairs = self.queries * self.keys - self.queries * (self.queries - 1) // 2
        return 2 * self.batch * pairs * self.heads * (2 * self.latent_dim + ROPE_DIM)


def ours(inputs: Inputs, backend: str = "auto") -> Callable[[], torch.Tensor]:
    """The operator on these inputs."""

    def attend() -> torch.Tensor:
        out = latent_attention(**inputs, scale=SCALE, backend=backend)
        return out[0] if isinstance(out, tuple) else out

    return attend


def flash_mla_is_missing() -> str | None:
    """Says in words why FlashMLA cannot be timed here; None when it can."""
    if importlib.util.find_spec("flash_mla") is None:
        return "FlashMLA is not installed (pip install sgl-flash-mla==1.0.0)"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "FlashMLA's dense decoding needs a GPU of compute capability 9.0"
    return None


def flash_mla(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """FlashMLA's dense decoding of the same pages; what it plans once a length is not counted."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    latent, rope_key = inputs["latent"], inputs["rope_key"]
    width = latent.shape[3] + rope_key.shape[3]
    # The two are views of one row; FlashMLA wants the row.
    cache = latent.as_strided(
        (*latent.shape[:1], latent.shape[2], 1, width), (*latent.stride()[:1], width, width, 1)
    )
    query = torch.cat([inputs["query_latent"], inputs["query_rope"]], dim=-1).transpose(1, 2).contiguous()
    plan = get_mla_metadata()[0]

    def attend() -> torch.Tensor:
        out, _ = flash_mla_with_kvcache(
            query, cache, inputs["block_table"], inputs["cache_seqlens"], latent.shape[3], plan,
            softmax_scale=SCALE, causal=query.shape[1] > 1, use_legacy=True,
        )  # fmt: skip
        return out.transpose(1, 2)

    attend()
    return attend


def flash_infer_is_missing() -> str | None:
    """Says in words why FlashInfer cannot be timed here; None when it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "FlashInfer is not installed (pip install flashinfer-python)"
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "FlashInfer's kernel for Hopper needs a GPU of compute capability 9.0"
    if shutil.which("nvcc") is None or shutil.which("ninja") is None:
        return "FlashInfer compiles its kernels when they are first used, and nvcc or ninja is missing"
    return None


def flash_infer(inputs: Inputs) -> Callable[[], torch.Tensor]:
    """FlashInfer's attention for Hopper over the same pages; what it plans once a length is not counted."""
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    latent, rope_key, table = inputs["latent"], inputs["rope_key"], inputs["block_table"]
    batch, heads, queries, latent_dim = inputs["query_latent"].shape
    pages = torch.arange(batch + 1, dtype=torch.int32, device=table.device)
    workspace = torch.empty(256 * 2**20, dtype=torch.int8, device=table.device)
    wrapper = BatchMLAPagedAttentionWrapper(workspace, backend="fa3")
    wrapper.plan(
        pages * queries, pages * table.shape[1], table.flatten(), inputs["cache_seqlens"], heads, latent_dim,
        rope_key.shape[3], latent.shape[2], queries > 1, SCALE, latent.dtype, latent.dtype,
    )  # fmt: skip
    query, query_rope = (
        inputs[name].transpose(1, 2).reshape(batch * queries, heads, -1).contiguous()
        for name in ("query_latent", "query_rope")
    )

    def attend() -> torch.Tensor:
        out = wrapper.run(query, query_rope, latent[:, 0], rope_key[:, 0])
        return out.view(batch, queries, heads, latent_dim).transpose(1, 2)

    attend()
    return attend


def gate(inputs: Inputs, attend: Callable[[], torch.Tensor], name: str) -> None:
    """Raises an AssertionError unless what is about to be timed is as accurate as eager, both against float64.

    It runs at the whole shape; its first and its last sequence are compared, since the float64 cache of all of them
    would not fit beside what is timed.
    """
    out = attend()
    for sequence in sorted({0, out.shape[0] - 1}):
        one = _sequence(inputs, sequence)
        exact, eager = (_reference(each) for each in ({name: x.double() for name, x in one.items()}, one))
        assert_as_accurate(
            out[sequence : sequence + 1], eager.to(out.dtype), exact, 2.0, f"{name}, sequence {sequence}"
        )


def _reference(one: dict[str, torch.Tensor]) -> torch.Tensor:
    out = latent_attention(**one, scale=SCALE, backend="reference")
    return out[0] if isinstance(out, tuple) else out


def _sequence(inputs: Inputs, sequence: int) -> dict[str, torch.Tensor]:
    """One sequence with a cache of its own, its rows in order, those of an fp8 cache multiplied out."""
    pages, length = inputs["block_table"][sequence].long(), inputs["cache_seqlens"][sequence]
    found = {name: inputs[name][sequence : sequence + 1] for name in ("query_latent", "query_rope")}
    for name in ("latent", "rope_key"):
        rows = inputs[name][pages]
        if inputs["latent_scale"] is not None:
            rows = rows.float() * inputs["latent_scale"][pages][:, None, :, None]
            found["query_latent"], found["query_rope"] = (
                found["query_latent"].float(),
                found["query_rope"].float(),
            )
        found[name] = rows.transpose(0, 1).flatten(1, 2)[None, :, :length]
    return found
