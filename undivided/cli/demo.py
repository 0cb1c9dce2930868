"""`undivided demo`: the main job on a real model, from grouped queries to tensor-parallel latents, in minutes."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import Checkpoint, WorkFolder

PROMPTS = (
    "The three most important things about a good public library are",
    "The economy of our country depends on",
    "When the new bridge was finished, the people of the town",
    "To make a simple vegetable soup, first",
)
_NEW_TOKENS = 40
_TRANSFORMS = ("none", "hadamard", "pca")
_SHARDS = 2


def command(
    src: Annotated[
        str, typer.Argument(help="Checkpoint folder, smollm2-135m, or a name on the Hub.")
    ] = "smollm2-135m",
    output: Annotated[Path, typer.Option(help="Folder of demo.json and demo.png.")] = Path("."),
    latent_dim: Annotated[int, typer.Option(help="Width of the latent; a power of two.")] = 256,
    rope_dim: Annotated[int, typer.Option(help="Dimensions that keep their rotary positions.")] = 32,
    calibration: Annotated[Path | None, typer.Option(help="Text to calibrate on, for another model.")] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples of 256 tokens.")] = 32,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens of the evaluation text.")] = 4096,
) -> None:
    """Convert a small real model and draw its perplexity against its cache."""
    from undivided.cli._console import note, table
    from undivided.convert.pipeline import calibration_ids, conversion_texts
    from undivided.models.checkpoint import WorkFolder, open_checkpoint

    begin = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    calibration_text, text = conversion_texts(src, calibration, None, say=note)
    source = open_checkpoint(src, progress=note)
    ids = calibration_ids(source, calibration_text, samples, 256)
    key = {"source": source.fingerprint(), "ids": hashlib.sha256(ids.numpy().tobytes()).hexdigest()}
    with WorkFolder(output / "demo", key) as work:
        demo = _Demo(source, ids, text, evaluation_tokens, work)
        result = demo.run(latent_dim, rope_dim)
    for name, continuation in demo.texts.items():
        typer.echo(f"{name}: {PROMPTS[0]}{continuation}\n")
    result["seconds"] = round(time.monotonic() - begin, 1)

    numeric = ["bytes/token/rank", "perplexity", "decoded", "same token", "tokens/s"]
    table(["form", *numeric], _rows(result), numeric=numeric)
    (output / "demo.json").write_text(json.dumps(result, indent=2) + "\n")
    draw(result, output / "demo.png")
    note(f"{result['seconds']:.0f} s; wrote {output / 'demo.json'} and {output / 'demo.png'}")


class _Demo:
    """One run: every form of the model is made, evaluated once, and continues the first prompt."""

    def __init__(
        self, source: Checkpoint, ids: torch.Tensor, text: str, evaluation_tokens: int, work: WorkFolder
    ) -> None:
        from undivided.cli._console import progress
        from undivided.convert.pipeline import perplexity_of

        self.source = source
        self.ids = ids
        self.text = text
        self.work = work
        self.texts: dict[str, str] = {}
        self._measure = perplexity_of(source, text, evaluation_tokens, progress)
        self._decoded_tokens = min(evaluation_tokens, 2048)
        self._known: dict[Any, float] = {}

    def evaluate(self, model: Any) -> float:
        """Perplexity; of the models that several conversions start from it is measured once."""
        return self._known[model] if model in self._known else self._measure(model)

    def run(self, latent_dim: int, rope_dim: int) -> dict[str, Any]:
        from undivided.cli._console import note, progress
        from undivided.convert.tpla import convert_tpla
        from undivided.convert.transmla import convert_transmla
        from undivided.models.evaluation import cache_bytes_per_token, token_agreement

        original = self.source.model
        shared: dict[str, Any] = {"evaluate": self.evaluate, "work": self.work, "progress": progress}
        note("perplexity of the original and of its exact rewriting as MLA")
        perplexity: dict[str, Any] = {"original": self.evaluate(original)}
        self._known[original] = perplexity["original"]
        perplexity["lossless"] = self.evaluate(convert_transmla(original, None, rank="full")[0])

        note(f"MLA with {latent_dim} latent and {rope_dim} rotary dimensions")
        sizes: dict[str, Any] = {"rope_dim": rope_dim, "latent_dim": latent_dim}
        mla, report = convert_transmla(original, self.ids, **sizes, **shared)
        perplexity |= {stage: report.perplexity[stage] for stage in ("partial_rope", "mla")}
        self._known[mla] = perplexity["mla"]

        perplexity["tpla"] = {}
        tpla: dict[str, UndividedForCausalLM] = {}
        for transform in _TRANSFORMS:
            note(f"TPLA with {_SHARDS} shards, transform {transform}")
            tpla[transform], made = convert_tpla(
                mla, num_shards=_SHARDS, transform=transform, calibration=self.ids, **shared
            )
            perplexity["tpla"][transform] = made.perplexity["tpla"]
            perplexity["reparameterised"] = made.perplexity["reparameterised"]
        chosen = tpla["pca"]

        note("decoding the second half of a block through the cache")
        decoded = {
            name: self.decode(m) for name, m in {"original": original, "mla": mla, "tpla": chosen}.items()
        }
        for layer in chosen.attention_layers():
            layer.prefill = "exact"
        decoded["separated"] = perplexity["separated"] = self.decode(chosen)
        for layer in chosen.attention_layers():
            layer.prefill = "sliced"

        note("the same model with smaller latents, for the figure")
        curve = []
        for width in (latent_dim // 2, latent_dim // 4):
            options = {**sizes, "latent_dim": width, "freqfold": report.options["freqfold"]}
            smaller, _ = convert_transmla(original, self.ids, **options, work=self.work)
            curve.append([cache_bytes_per_token(smaller), self.evaluate(smaller)])

        whole = {name: cache_bytes_per_token(model) for name, model in (("original", original), ("mla", mla))}
        layer = mla.attention_layers()[0]
        share = (layer.latent_dim / _SHARDS + layer.rope_dim) / (layer.latent_dim + layer.rope_dim)
        forms = {"original": original, "mla": mla, "tpla": chosen}
        speed = {name: self.speak(name, model) for name, model in forms.items()}
        return {
            "model": self.source.name,
            "perplexity": perplexity,
            "decode_perplexity": decoded,
            "cache_bytes_per_token_per_rank": {**whole, "tpla": whole["mla"] * share},
            "agreement": {
                name: token_agreement(forms[name], original, self.source.tokenizer, PROMPTS, _NEW_TOKENS)
                for name in ("mla", "tpla")
            },
            "tokens_per_second": speed,
            "curve": curve,
            "options": report.options | {"num_shards": _SHARDS},
        }

    def decode(self, model: Any) -> float:
        """Perplexity of the second half of the first block, read through the cache."""
        from undivided.models.evaluation import decode_perplexity

        limit = self._decoded_tokens
        return decode_perplexity(
            model, self.source.tokenizer, self.text, max_tokens=limit, step=64
        ).perplexity

    def speak(self, name: str, model: Any) -> float:
        """Continues the first prompt and returns the tokens a second."""
        from undivided.models.evaluation import generate_text

        start = time.monotonic()
        self.texts[name] = generate_text(model, self.source.tokenizer, PROMPTS[0], _NEW_TOKENS)
        written = len(self.source.tokenizer(self.texts[name], add_special_tokens=False).input_ids)
        return round(written / (time.monotonic() - start), 1)


@dataclass(frozen=True)
class _Point:
    label: str
    size: float
    perplexity: float


def _points(result: dict[str, Any]) -> list[_Point]:
    """The forms of the table and the figure, with what one rank caches and the perplexity."""
    size, perplexity = result["cache_bytes_per_token_per_rank"], result["perplexity"]
    return [
        _Point("original", size["original"], perplexity["original"]),
        _Point("MLA, lossless", size["original"], perplexity["lossless"]),
        _Point("MLA, partial RoPE", size["original"], perplexity["partial_rope"]),
        _Point("MLA", size["mla"], perplexity["mla"]),
        _Point("MLA, reparameterised", size["mla"], perplexity["reparameterised"]),
        *(_Point(f"TPLA, {name}", size["tpla"], value) for name, value in perplexity["tpla"].items()),
    ]


def _rows(result: dict[str, Any]) -> list[list[str | None]]:
    decoded, agreement, speed = (
        result[key] for key in ("decode_perplexity", "agreement", "tokens_per_second")
    )
    keys = {"original": "original", "MLA": "mla", "TPLA, pca": "tpla"}
    rows: list[list[str | None]] = []
    for point in _points(result):
        key = keys.get(point.label, "")
        rows.append([
            point.label, f"{point.size:,.0f}", f"{point.perplexity:.3f}",
            f"{decoded[key]:.3f}" if key in decoded else None,
            f"{agreement[key]:.1%}" if key in agreement else None,
            f"{speed[key]:.1f}" if key in speed else None,
        ])  # fmt: skip
    size = result["cache_bytes_per_token_per_rank"]["tpla"]
    rows.append(
        ["TPLA, pca, prompt read exactly", f"{size:,.0f}", None, f"{decoded['separated']:.3f}", None, None]
    )
    return rows


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws perplexity against what one rank caches, and writes the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = _points(result)
    figure = Figure(figsize=(7.2, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    mla = next(point for point in points if point.label == "MLA")
    curve = sorted([*map(tuple, result["curve"]), (mla.size, mla.perplexity)])
    axes.plot(
        *zip(*curve, strict=True),
        color="0.6",
        marker=".",
        linewidth=1,
        label="MLA, smaller latents",
        zorder=1,
    )
    for point in points:
        if point.label in ("MLA, lossless", "MLA, reparameterised"):
            continue
        axes.scatter(
            point.size, point.perplexity, s=44, zorder=2, label=f"{point.label}: {point.perplexity:.2f}"
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.set_xlim(left=0)
    axes.set_xlabel("cache, bytes a token a rank")
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title(f"{result['model']}: attention converted without training")
    axes.grid(True, which="both", color="0.92")
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
