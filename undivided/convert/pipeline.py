"""Checkpoint in, checkpoint out: what the command line and the demo share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undivided.convert import converter
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import Report
from undivided.convert.targets import TARGETS, check_options, target
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

# Of a calibration file without an evaluation file beside it, this share at the end is kept for evaluation.
_HELD_OUT = 0.1
_SAMPLES, _LENGTH = 128, 256


def convert_checkpoint(
    src: str | Path,
    out: str | Path,
    to: str,
    *,
    options: Mapping[str, Any] | None = None,
    calibration: str | Path | None = None,
    evaluation: str | Path | None = None,
    samples: int | None = None,
    sample_length: int | None = None,
    evaluation_tokens: int = 16384,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Converts the attention of a checkpoint and writes the result as a transformers folder.

    A source with grouped-query attention becomes MLA first, if TPLA is asked for. A killed run leaves the old target
    or none, and the next one resumes from the last finished stage.

    Args:
        src: checkpoint folder, the name of the demo model, or a name on the Hub.
        out: folder to be written.
        to: a row of `undivided.convert.targets.TARGETS`, such as "mla", "tpla" or "gda-grow".
        options: options of the target's converter, and of the one before it, by keyword.
        calibration: text file whose activations decide the conversion, for the targets that have such; the demo
            model has one by default.
        evaluation: text file of the reported perplexities; by default the last tenth of the calibration text, which
            is then not calibrated on (the demo model: speeches of other years).
        samples: calibration samples; default 128.
        sample_length: tokens of a calibration sample; default 256.
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
    options = dict(options or {})
    # Before minutes of conversion, not after them.
    check_options(to, options)
    row = target(to)
    _check_calibration(to, calibration, samples, sample_length)
    prepare_target(out, overwrite=overwrite)
    if row.calibrates:
        texts: tuple[str | None, str] = conversion_texts(src, calibration, evaluation, cache_dir, say)
    else:
        texts = None, evaluation_text(src, evaluation, cache_dir, say)
    source = open_checkpoint(src, dtype=dtype, device=device, cache_dir=cache_dir, progress=say)
    input_ids = None
    if texts[0] is not None:
        sizes = (
            _SAMPLES if samples is None else samples,
            _LENGTH if sample_length is None else sample_length,
        )
        input_ids = calibration_ids(source, texts[0], *sizes)
    read = "\n".join(text for text in texts if text is not None)
    key = {
        "source": source.fingerprint(),
        "texts": provenance(source, to, {}, calibration=read)["calibration_sha256"],
        "ids": None if input_ids is None else list(input_ids.shape),
    }
    with WorkFolder(out, key) as work:
        reports = []
        model = source.model
        arguments: dict[str, Any] = {
            "evaluate": perplexity_of(source, texts[1], evaluation_tokens, progress),
            "calibration": input_ids,
            "work": work,
            "progress": progress,
        }
        for name in _steps(src, model, to, options):
            own = {option: options[option] for option in TARGETS[name].options if option in options}
            model, report = _converted(name, model, own, arguments)
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


def _check_calibration(to: str, calibration: object, samples: int | None, sample_length: int | None) -> None:
    if target(to).calibrates:
        return
    given = {"calibration": calibration, "samples": samples, "sample_length": sample_length}
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f'to="{to}" takes no {name}: no activations decide this conversion. The text of the perplexities is '
                "evaluation."
            )


def _steps(src: str | Path, model: Any, to: str, options: Mapping[str, Any]) -> list[str]:
    """The targets that are made one after another, given what the source is."""
    row = target(to)
    if not is_latent(model):
        return [to] if row.first is None else [row.first, to]
    if not row.latent_source:
        able = ", ".join(f'"{name}"' for name, other in TARGETS.items() if other.latent_source)
        raise ValueError(f"{src} has latent attention already; convert it to {able}.")
    before = [name for name in options if name not in row.options]
    if before:
        raise ValueError(f"{src} has latent attention already, so {', '.join(before)} cannot be applied.")
    return [to]


def _converted(
    to: str, model: Any, options: Mapping[str, Any], arguments: Mapping[str, Any]
) -> tuple[Any, Report]:
    function = converter(to)
    # A converter that reads no calibration, or has nothing slow to keep, has no such argument.
    known = inspect.signature(function).parameters
    return function(model, **options, **{key: value for key, value in arguments.items() if key in known})


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
        # The demo's held-out speeches, one after the other; `evaluation` still takes precedence.
        return demo_texts(cache_dir, progress=say).calibration, evaluation_text(
            src, evaluation, cache_dir, say
        )
    text = read_text(calibration)
    if evaluation is not None:
        return text, read_text(evaluation)
    cut = text.rfind(" ", 0, int(len(text) * (1 - _HELD_OUT)))
    return (text[:cut], text[cut:].strip()) if cut > 0 else (text, text)


def evaluation_text(
    src: str | Path,
    evaluation: str | Path | None,
    cache_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> str:
    """Returns the text of the perplexities, for a conversion that no text decides.

    Raises:
        ValueError: none was given for a model that has none by default, or it cannot be read.
    """
    if evaluation is not None:
        return read_text(evaluation)
    if src != DEMO_MODEL:
        raise ValueError(f"evaluation is missing; only {DEMO_MODEL} has a text by default. Give a text file.")
    return "\n\n".join(demo_texts(cache_dir, progress=say).heldout.values())


def calibration_ids(source: Checkpoint, text: str, samples: int, sample_length: int) -> torch.Tensor:
    """Returns `[samples, sample_length]` token ids, drawn evenly over the text.

    Raises:
        ValueError: a number is less than one, or the text has fewer tokens than one sample.
    """
    import torch

    from undivided.data.text import token_blocks

    for name, value in (("samples", samples), ("sample_length", sample_length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")

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
