"""Checkpoint in, checkpoint out: what the command line and the demo share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undivided.convert._moments import Progress, no_progress
from undivided.data import demo_texts, read_text
from undivided.data.demo import DEMO_MODEL
from undivided.models.checkpoint import (
    Checkpoint,
    WorkFolder,
    open_checkpoint,
    prepare_target,
    provenance,
    save_checkpoint,
)
from undivided.models.evaluation import cache_bytes_per_token, perplexity

if TYPE_CHECKING:
    import torch

TARGETS = ("mla", "tpla")
# Of a calibration file without an evaluation file beside it, this share at the end is kept for evaluation.
_HELD_OUT = 0.1


def convert_checkpoint(
    src: str | Path,
    out: str | Path,
    to: str,
    *,
    mla: dict[str, Any] | None = None,
    tpla: dict[str, Any] | None = None,
    calibration: str | Path | None = None,
    evaluation: str | Path | None = None,
    samples: int = 128,
    sample_length: int = 256,
    evaluation_tokens: int = 16384,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Converts the attention of a checkpoint and writes the result as a transformers folder.

    A source with grouped-query attention becomes MLA first, also when TPLA is asked for. A killed run leaves the old
    target or none, and the next one resumes from the last finished stage.

    Args:
        src: checkpoint folder, the name of the demo model, or a name on the Hub.
        out: folder to be written.
        to: "mla" or "tpla".
        mla: options of `convert_transmla`.
        tpla: options of `convert_tpla`.
        calibration: text file whose activations decide the conversion; the demo model has one by default.
        evaluation: text file of the reported perplexities; by default the last tenth of the calibration text, which
            is then not calibrated on (the demo model: speeches of other years).
        samples, sample_length: calibration samples and their tokens.
        evaluation_tokens: tokens of the evaluation text.
        dtype: of the converted weights; by default the source's.
        device: where to compute.
        cache_dir: where the demo model is kept.
        overwrite: replace an existing checkpoint at `out`.
        progress: wraps the long loops; called with an iterable and a description.
        say: called with a sentence before each slow step.

    Returns:
        The report, as written to `conversion.json`.

    Raises:
        ValueError: an argument, the source or the text does not fit; the sentence says which and what would.
        OSError: the target cannot be written.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is not one of {', '.join(TARGETS)}.")
    if to == "mla" and tpla:
        raise ValueError(f'to="mla" takes no {", ".join(tpla)}; these are options of "tpla".')
    if to == "tpla" and mla and "latent_dim" in mla:
        from undivided.convert.tpla import check_options

        # Before minutes of conversion, not after them.
        check_options({mla["latent_dim"]}, **{k: v for k, v in (tpla or {}).items() if k != "seed"})
    prepare_target(out, overwrite=overwrite)
    texts = conversion_texts(src, calibration, evaluation, cache_dir, say)
    source = open_checkpoint(src, dtype=dtype, device=device, cache_dir=cache_dir, progress=say)
    input_ids = calibration_ids(source, texts[0], samples, sample_length)
    both = provenance(source, to, {}, calibration="\n".join(texts))["calibration_sha256"]

    with WorkFolder(
        out, {"source": source.fingerprint(), "texts": both, "ids": list(input_ids.shape)}
    ) as work:
        reports = []
        model = source.model
        arguments: dict[str, Any] = {
            "evaluate": perplexity_of(source, texts[1], evaluation_tokens, progress),
            "work": work,
            "progress": progress,
        }
        if not is_latent(model):
            from undivided.convert.transmla import convert_transmla

            model, report = convert_transmla(model, input_ids, **(mla or {}), **arguments)
            reports.append(report)
        elif mla:
            raise ValueError(f"{src} has latent attention already, so {', '.join(mla)} cannot be applied.")
        elif to == "mla":
            raise ValueError(f'{src} has latent attention already; convert it to "tpla".')
        if to == "tpla":
            from undivided.convert.tpla import convert_tpla

            model, report = convert_tpla(model, calibration=input_ids, **(tpla or {}), **arguments)
            reports.append(report)
        cache = {"original": cache_bytes_per_token(source.model)}
        written = {
            **asdict(reports[-1]),
            "cache_bytes_per_token_per_rank": cache
            | {r.method: r.cache_bytes_per_token_per_rank for r in reports},
            "seconds": sum(report.seconds for report in reports),
            "perplexity": {stage: value for report in reports for stage, value in report.perplexity.items()},
            "approximations": [line for report in reports for line in report.approximations],
            "provenance": provenance(source, to, {r.method: r.options for r in reports}, texts[0]),
        }
        model.config.provenance = written["provenance"]
        say(f"writing {out}")
        save_checkpoint(model, source.tokenizer, out, written, overwrite=overwrite)
    return written


def conversion_texts(
    src: str | Path,
    calibration: str | Path | None,
    evaluation: str | Path | None,
    cache_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> tuple[str, str]:
    """Returns the calibration and the evaluation text, which share nothing.

    Raises:
        ValueError: no calibration text was given for a model that has none by default, or a file cannot be read.
    """
    if calibration is None:
        if src != DEMO_MODEL:
            raise ValueError(
                f"calibration is missing; only {DEMO_MODEL} has a text by default. Give a text file."
            )
        texts = demo_texts(cache_dir, progress=say)
        # The demo's held-out speeches, one after the other; `evaluation` still takes precedence.
        held_out = "\n\n".join(texts.heldout.values())
        return texts.calibration, held_out if evaluation is None else read_text(evaluation)
    text = read_text(calibration)
    if evaluation is not None:
        return text, read_text(evaluation)
    cut = text.rfind(" ", 0, int(len(text) * (1 - _HELD_OUT)))
    return (text[:cut], text[cut:].strip()) if cut > 0 else (text, text)


def calibration_ids(source: Checkpoint, text: str, samples: int, sample_length: int) -> torch.Tensor:
    """Returns `[samples, sample_length]` token ids, drawn evenly over the text.

    Raises:
        ValueError: the text has fewer tokens than one sample.
    """
    import torch

    from undivided.data.text import token_blocks

    blocks = [
        block[0]
        for block in token_blocks(source.tokenizer, text, sample_length)
        if block.shape[1] == sample_length
    ]
    if not blocks:
        raise ValueError(
            f"calibration has fewer than sample_length={sample_length} tokens; give a longer text."
        )
    step = max(len(blocks) // samples, 1)
    return torch.stack(blocks[::step][:samples])


def perplexity_of(
    source: Checkpoint, text: str, tokens: int, progress: Progress = no_progress
) -> Callable[[Any], float]:
    """Returns a function that measures a model's perplexity on the first `tokens` tokens of `text`."""

    def evaluate(model: Any) -> float:
        return perplexity(model, source.tokenizer, text, max_tokens=tokens, progress=progress).perplexity

    return evaluate


def is_latent(model: Any) -> bool:
    """Whether a model's attention is latent already: DeepSeek, or a converted model."""
    config = model.config
    if config.model_type == "undivided":
        entries: Iterable[dict[str, Any] | None] = config.attention
        return any(entry is not None and entry["mechanism"] in ("mla", "gla", "tpla") for entry in entries)
    return hasattr(config, "kv_lora_rank")
