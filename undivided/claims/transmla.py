"""TransMLA: what a smaller cache costs SmolLM2-135M without training, and what each step is worth.

The paper's models have 4 to 32 key heads a layer to find common axes in. SmolLM2-135M has 3, so it loses more
at the same ratio; what can be compared is the method against itself with a step left out. On CUDA the throughput of
LLaMA-2-7B's shapes is measured with random weights, and that of SmolLM2-135M by this library's engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import exp
from typing import Any

import torch
from torch import Tensor

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.convert._merged_heads import all_key_axes, key_axes, key_moments, merge_heads
from undivided.convert.pipeline import calibration_ids
from undivided.convert.transmla import compress_layers, convert_transmla, latent_moments
from undivided.data import demo_texts
from undivided.models.checkpoint import Checkpoint, open_checkpoint
from undivided.models.evaluation import perplexity
from undivided.testing import assert_as_accurate

_HELD_OUT = ("2015-Obama-1", "2024-Biden-1")
_ROPE_DIM = 32
# Of 2 * 3 * 64 = 384 numbers a token and layer: halves, the paper's -68.75 %, and a quarter.
_TOTALS = (192, 120, 96)
_ABLATED = 120
_HEALED_FOLD = 4


@dataclass
class Study:
    """SmolLM2-135M-Instruct with calibration and held-out text, and conversions of it.

    Args:
        source: the checkpoint.
        calibration: token ids `[samples, length]`.
        texts: held-out texts.
        tokens: tokens of each that are evaluated.
    """

    source: Checkpoint
    calibration: Tensor
    texts: Sequence[str]
    tokens: int
    key_moments: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.key_moments = key_moments(self.source.model, self.calibration)

    def perplexity(self, model: Any) -> float:
        """Perplexity over all tokens of the held-out texts, in blocks of 2048."""
        found = [
            perplexity(model, self.source.tokenizer, text, max_tokens=self.tokens) for text in self.texts
        ]
        return exp(sum(each.nll * each.tokens for each in found) / sum(each.tokens for each in found))

    def axes(self, rope_dim: int, fold: int | None) -> list[Tensor]:
        """Key axes of every layer; `fold=None` does not rotate, so the first key head keeps its positions."""
        if fold is not None:
            return all_key_axes(self.source.model, self.key_moments, rope_dim, fold)
        config = self.source.model.config
        stride = config.head_dim // rope_dim
        plain = key_axes(None, config.num_key_value_heads, config.head_dim, rope_dim, stride)
        return [plain] * config.num_hidden_layers

    def partial_rope(self, rope_dim: int, fold: int | None) -> Any:
        """The model with positions on `rope_dim` key dimensions and nothing cut."""
        return merge_heads(self.source.model, self.axes(rope_dim, fold), rope_dim)

    def compressions(self, rope_dim: int, fold: int | None, by: str = "activations") -> Callable[..., Any]:
        """Returns a function of (latent_dim, balance_kv_ratio) that gives the converted model.

        Args:
            rope_dim: key dimensions that keep positions.
            fold: as in `axes`.
            by: "activations", the method; "weights", the axes of `[W_K; W_V]`, which no calibration decides.
        """
        axes, model = self.axes(rope_dim, fold), self.source.model
        host = self.partial_rope(rope_dim, fold)
        if by == "activations":
            moments = latent_moments(host, self.calibration)
        else:
            moments = {}
            for index, layer in enumerate(host.attention_layers()):
                rows = layer.kv_a_proj_with_mqa.weight.detach()[: layer.latent_dim].double()
                moments[f"{index}.latent"] = rows @ rows.T

        def compressed(latent_dim: int, balance_kv_ratio: float | None = 1.0) -> Any:
            converted = self.partial_rope(rope_dim, fold)
            compress_layers(converted, model, axes, moments, latent_dim, balance_kv_ratio=balance_kv_ratio)
            return converted

        return compressed


def study(device: str, quick: bool) -> Study:
    """Opens the demo model and its texts: 128 samples of 256 tokens to calibrate, 16K held-out tokens."""
    texts = demo_texts()
    source = open_checkpoint("smollm2-135m", device=device)
    samples, tokens = (32, 2048) if quick else (128, 8192)
    ids = calibration_ids(source, texts.calibration, samples, 256)
    return Study(source, ids, [texts.heldout[name] for name in _HELD_OUT], tokens)


def gate(device: str) -> None:
    """The exact rewritings err no more than the model itself does in float32, against float64."""
    source = open_checkpoint("smollm2-135m", device=device)
    words = source.tokenizer(demo_texts().heldout[_HELD_OUT[0]][:2000], return_tensors="pt").input_ids
    ids = words[:, :128].to(device)
    moments = key_moments(source.model, ids)
    axes = all_key_axes(source.model, moments, _ROPE_DIM, 4)
    wide = open_checkpoint("smollm2-135m", device=device, dtype=torch.float64).model
    with torch.no_grad():
        full, _ = convert_transmla(source.model, None, rank="full")
        assert_as_accurate(
            full(ids).logits, source.model(ids).logits, wide(ids).logits, factor=2.0, name="full rank"
        )
        uncut, _ = convert_transmla(
            source.model, ids, latent_dim=384 - _ROPE_DIM, rope_dim=_ROPE_DIM, freqfold=4
        )
        partial = merge_heads(source.model, axes, _ROPE_DIM)(ids).logits
        exact = merge_heads(wide, axes, _ROPE_DIM)(ids).logits
        assert_as_accurate(uncut(ids).logits, partial, exact, factor=2.0, name="full width")


def _throughput(device: str, quick: bool) -> Iterator[Row]:
    """Yields tokens a second of LLaMA-2-7B's shapes, in the memory of the paper's card and of this one, on a GPU."""
    if device == "cpu":
        return
    from undivided.claims._end_to_end import card_memory, llama_rows

    yield from llama_rows(40 * 10**9)
    if not quick:
        yield from llama_rows(card_memory())


def _engine(device: str, quick: bool) -> Iterator[Row]:
    """Yields what the demo model writes in the engine, and how fast, on a GPU."""
    if device == "cpu":
        return
    from undivided.claims._end_to_end import engine_rows

    yield from engine_rows()


def _healing(device: str, quick: bool) -> Iterator[Row]:
    """Yields what distillation gives back of the smallest cache's loss, on a GPU."""
    if device == "cpu":
        return
    from undivided.claims._healing import healed_mla

    runs, tokens = study(device, quick), 500_000 if quick else 4_000_000
    model = runs.compressions(_ROPE_DIM, _HEALED_FOLD)(_ABLATED - _ROPE_DIM)
    shape = f"{_ABLATED - _ROPE_DIM} + {_ROPE_DIM} of 384 cached numbers, fold {_HEALED_FOLD}"
    yield from healed_mla(runs.source, model, runs.perplexity, f"{_where(runs)}; {shape}", tokens)


def _where(runs: Study) -> str:
    return f"SmolLM2-135M-Instruct, float32, {2 * runs.tokens} held-out tokens in blocks of 2048"


def _perplexity(device: str, quick: bool) -> Iterator[Row]:
    """Yields perplexities of the stages, of three sizes of the cache, and of the method without one of its steps."""
    runs = study(device, quick)
    where = _where(runs)
    original = runs.perplexity(runs.source.model)

    def row(what: str, shape: str, ours: float, name: str, baseline: float, bar: float | None = None) -> Row:
        return measured(
            what, f"{where}; {shape}", ours, "perplexity", better="lower",
            baseline_name=name, baseline=baseline, required=bar,
        )  # fmt: skip

    # c = 64 / 32 is the smallest fold that keeps 32 dimensions.
    smallest = 2
    folds = {}
    for fold in (2, 4, 8, 16):
        folds[fold] = runs.perplexity(runs.partial_rope(_ROPE_DIM, fold))
        shape = f"positions on {_ROPE_DIM} of 192 key dimensions, {fold} frequencies folded"
        yield row("partial positions, no training", shape, folds[fold], "the original", original)
    best = min(folds, key=folds.__getitem__)
    shape = f"positions on {_ROPE_DIM} of 192 key dimensions, {best} frequencies folded"
    what = "partial positions: the best fold against the smallest"
    yield row(what, shape, folds[best], f"{smallest} folded", folds[smallest], 1.0)

    method = runs.compressions(_ROPE_DIM, best)
    found = {}
    for total in _TOTALS:
        found[total] = runs.perplexity(method(total - _ROPE_DIM))
        shape = f"{total - _ROPE_DIM} + {_ROPE_DIM} of 384 cached numbers, fold {best}"
        yield row("MLA, no training", shape, found[total], "the original", original)

    latent_dim = _ABLATED - _ROPE_DIM
    left_out = {
        "without rotating keys (positions of the first head)": runs.compressions(_ROPE_DIM, None)(latent_dim),
        "axes of the weights, not of activations": runs.compressions(_ROPE_DIM, best, "weights")(
            latent_dim, None
        ),
        "without balancing keys and values": method(latent_dim, None),
        f"{smallest} frequencies folded": runs.compressions(_ROPE_DIM, smallest)(latent_dim),
    }
    shape = f"{latent_dim} + {_ROPE_DIM} of 384 cached numbers, fold {best}"
    for name, model in left_out.items():
        what = f"MLA, no training, against the method {name}"
        yield row(what, shape, found[_ABLATED], name, runs.perplexity(model), 1.0)


_PARTS: dict[str, Measure] = {
    "perplexity": _perplexity,
    "throughput": _throughput,
    "engine": _engine,
    "healing": _healing,
}
CLAIM = Claim(
    slug="transmla",
    source="arXiv 2502.07864, experiments without training; model table of the authors' repository",
    paper=(
        "LLaMA-2-7B with a cache 68.75 % smaller, without training: 58.20 on average over six tasks, "
        "59.85 before, 37.90 with MHA2MLA.",
        "WikiText-2 perplexity before, with partial positions, and as MLA, without training: Llama-3.2-1B, "
        "512 + 64 cached numbers: 9.75, 16.34, 16.14; Qwen2.5-7B, 448 + 128: 6.85, 7.31, 7.98; "
        "Mistral-7B-v0.3, 448 + 128: 5.32, 5.59, 7.03.",
        "The best fold is 4 or 8 for every model of the table, never 1.",
        "LLaMA-2-7B with a cache 92.97 % smaller, vLLM, 8K context, a card of 40 GB: 218.51 and 1118.18 tokens/s "
        "(5.1x); up to 10.6x on a card of 24 GB.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
    devices=("cpu", "cuda"),
)
