"""One rank's decode attention over a latent cache at tensor parallelism of two: MLA's rank against TPLA's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from undivided.claims._harness import Row, measured
from undivided.claims._timing import measured_ceilings, time_rivals
from undivided.ops import latent_attention
from undivided.testing import assert_as_accurate

ROPE_DIM = 64
# The rows of a head of DeepSeek-V3 and Kimi-K2 without and with rotary positions decide the scale.
SCALE = (128 + ROPE_DIM) ** -0.5


@dataclass(frozen=True)
class Rank:
    """What one rank of two attends with: its query heads and the width of its cached latent.

    Args:
        heads: query heads.
        latent_dim: width of the cached latent; `ROPE_DIM` rotary dimensions stand beside it.
    """

    heads: int
    latent_dim: int

    def inputs(self, batch: int, keys: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """Returns random query_latent, query_rope, latent and rope_key; the last two are views of one row."""
        width = self.latent_dim + ROPE_DIM
        query = torch.randn(batch, self.heads, 1, width, device=device, dtype=dtype)
        rows = torch.randn(batch, 1, keys, width, device=device, dtype=dtype)
        return (
            query[..., : self.latent_dim].contiguous(),
            query[..., self.latent_dim :].contiguous(),
            rows[..., : self.latent_dim],
            rows[..., self.latent_dim :],
        )

    def bytes_moved(self, batch: int, keys: int, dtype: torch.dtype) -> int:
        """The cache once, queries and outputs once."""
        width = self.latent_dim + ROPE_DIM
        return batch * dtype.itemsize * (keys * width + self.heads * (width + self.latent_dim))

    def flops(self, batch: int, keys: int) -> int:
        """Both products over all keys."""
        return 2 * batch * keys * self.heads * (2 * self.latent_dim + ROPE_DIM)


@dataclass(frozen=True)
class Model:
    """A model of the paper: its MLA rank, its TPLA rank, and the speed-up at which its claim holds.

    Args:
        name: of the model.
        mla: half of the heads, the whole latent.
        tpla: all heads, half of the latent.
        required: least ratio at 32768 keys and a batch of 32 or more.
    """

    name: str
    mla: Rank
    tpla: Rank
    required: float


MODELS = (
    Model("DeepSeek-V3", Rank(64, 512), Rank(128, 256), 1.6),
    Model("Kimi-K2", Rank(32, 512), Rank(64, 256), 1.7),
)
# Batch sizes and cached keys; the quick run takes the first.
POINTS = (
    (32, 32768),
    (8, 32768),
    (64, 32768),
    (32, 1024),
    (32, 4096),
    (32, 16384),
    (32, 65536),
)
# The baseline must be near the memory's rate: a ratio over a slow one would be worth nothing.
_LEAST_BANDWIDTH = 0.7


def decode_rows(
    device: str, quick: bool, models: tuple[Model, ...] = MODELS, dtype: torch.dtype = torch.bfloat16
) -> Iterator[Row]:
    """Times one decoding step's attention of both ranks in turns, the same operator for both.

    Args:
        device: `"cpu"` or `"cuda"`.
        quick: one batch size at one length.
        models: shapes.
        dtype: of queries and cache.
    """
    for model in models:
        for batch, keys in POINTS[:1] if quick else POINTS:
            yield from _point(model, batch, keys, device, dtype)


def _point(model: Model, batch: int, keys: int, device: str, dtype: torch.dtype) -> Iterator[Row]:
    ranks = {"TPLA": model.tpla, "MLA": model.mla}
    inputs = {name: rank.inputs(batch, keys, device, dtype) for name, rank in ranks.items()}
    for name in ranks:
        gate(inputs[name], f"{name}, {model.name}, batch {batch}, {keys} keys")
    rivals = {name: _call(inputs[name], "auto") for name in ranks}
    rivals["MLA through torch SDPA"] = _call(inputs["MLA"], "sdpa")
    method = "graph" if device == "cuda" else "auto"
    times = {name: timing.median for name, timing in time_rivals(rivals, device, method=method).items()}
    ceilings = measured_ceilings(device)
    shape = f"{model.name}, batch {batch}, {keys} keys, {str(dtype).removeprefix('torch.')}"
    large = batch >= 32 and keys == 32768
    fraction = ceilings.fraction(
        times["TPLA"],
        flops=model.tpla.flops(batch, keys),
        bytes_moved=model.tpla.bytes_moved(batch, keys, dtype),
    )
    for name in ("MLA", "MLA through torch SDPA"):
        yield measured(
            "decode attention of one rank of two",
            f"{shape}, against {name}",
            times["TPLA"],
            "ms",
            better="lower",
            baseline_name=name,
            baseline=times[name],
            required=model.required if large and name == "MLA" else None,
            fraction_of_ceiling=fraction,
        )
    yield measured(
        "cache bandwidth of the MLA baseline",
        shape,
        model.mla.bytes_moved(batch, keys, dtype) / times["MLA"] / 1e6,
        "GB/s",
        better="higher",
        baseline_name="large copy",
        baseline=ceilings.copy_bytes_per_second / 1e9,
        required=_LEAST_BANDWIDTH if large else None,
    )


def gate(inputs: tuple[torch.Tensor, ...], name: str) -> None:
    """Raises an AssertionError unless what is about to be timed is as accurate as eager, both against float64.

    The operator runs at the whole shape; its first and its last sequence are compared, since the float64 cache of all
    of them would not fit beside what is timed.
    """
    out = _call(inputs, "auto")()
    for row in {0, out.shape[0] - 1}:
        one = tuple(x[row : row + 1] for x in inputs)
        eager, exact = (_call(each, "reference")() for each in (one, tuple(x.double() for x in one)))
        assert_as_accurate(out[row : row + 1], eager, exact, factor=2.0, name=f"{name}, sequence {row}")


def _call(inputs: tuple[torch.Tensor, ...], backend: str):
    return lambda: latent_attention(*inputs, scale=SCALE, backend=backend)
