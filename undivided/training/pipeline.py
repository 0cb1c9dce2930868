"""A checkpoint in, the trained one out: what `undivided heal` and `undivided prefer` do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

from undivided.convert.pipeline import conversion_texts
from undivided.data.text import token_blocks
from undivided.models.checkpoint import (
    Checkpoint,
    WorkFolder,
    open_checkpoint,
    prepare_target,
    provenance,
    save_checkpoint,
)
from undivided.models.evaluation import perplexity
from undivided.training.healing import LOG, Recipe, heal, read_log
from undivided.training.preference import PreferenceRecipe, prefer, read_pairs

FIGURE = "healing.png"


def heal_checkpoint(
    src: str | Path,
    out: str | Path,
    teacher: str | Path,
    recipes: Sequence[Recipe],
    *,
    text: str | Path | None = None,
    evaluation: str | Path | None = None,
    length: int = 1024,
    evaluation_tokens: int = 16384,
    device: str = "cpu",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Trains a converted checkpoint on what its source gives, and writes it with its log and a figure.

    A killed run leaves the old target or none, and the next one goes on from its last checkpoint.

    Args:
        src: checkpoint folder of the converted model.
        out: folder to be written: a checkpoint with `healing.jsonl` and `healing.png`.
        teacher: the checkpoint it was converted from, or another with the same tokens.
        recipes: the stages, one after the other.
        text: text file to train on; for the demo model as teacher there is one by default.
        evaluation: text file of the perplexities; by default the last tenth of `text`, which is then not trained on.
        length: tokens of a training sequence.
        evaluation_tokens: tokens of the evaluation text.
        device: where to train.
        overwrite: replace an existing checkpoint at `out`.
        say: called with a sentence from time to time.

    Returns:
        The report, as written to `conversion.json`: that of the conversion, with `healing` beside it.

    Raises:
        ValueError: an argument, a checkpoint or the text does not fit; the sentence says which and what would.
        OSError: the target cannot be written.
    """
    if not recipes:
        raise ValueError("recipes is empty; give at least one stage.")
    prepare_target(out, overwrite=overwrite)
    texts = conversion_texts(teacher, text, evaluation, say=say)
    student, taught = (open_checkpoint(each, device=device, progress=say) for each in (src, teacher))
    sequences = _sequences(student, texts[0], length)
    available = sequences.numel()
    say(f"{available:,} tokens of text; {sum(recipe.tokens for recipe in recipes):,} to train on")

    def evaluate(model: Any) -> dict[str, float]:
        tokenizer = student.tokenizer
        return {"perplexity": perplexity(model, tokenizer, texts[1], max_tokens=evaluation_tokens).perplexity}

    goal = evaluate(taught.model)["perplexity"]
    say(f"perplexity of the teacher: {goal:.4g}")
    key = [
        student.fingerprint(),
        taught.fingerprint(),
        hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        length,
    ]
    stages = []
    with WorkFolder(out) as work:
        for number, recipe in enumerate(recipes):
            key.append(json.dumps(asdict(recipe)))
            folder = work.path / f"stage-{number}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
            heal(student.model, taught.model, sequences, folder, recipe, evaluate=evaluate, say=say)
            stages.append(read_log(folder / LOG))
        report = _read_report(student.path)
        report["healing"] = {
            "teacher": {"perplexity": goal, **provenance(taught, "distillation", {}, texts[0])},
            "recipes": [asdict(recipe) for recipe in recipes],
            "available_tokens": available,
            "evaluations": [[row for row in rows if "loss" not in row] for rows in stages],
        }
        lines = [json.dumps({"stage": number, **row}) for number, rows in enumerate(stages) for row in rows]
        files: dict[str, str | bytes] = {
            "healing.jsonl": "\n".join(lines) + "\n",
            FIGURE: figure(report["healing"], student.name),
        }
        say(f"writing {out}")
        save_checkpoint(student.model, student.tokenizer, out, report, files=files, overwrite=overwrite)
    return report


def prefer_checkpoint(
    src: str | Path,
    out: str | Path,
    pairs: str | Path,
    recipe: PreferenceRecipe,
    *,
    heldout: str | Path | None = None,
    length: int = 1024,
    device: str = "cpu",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Trains a checkpoint on pairs of answers and writes it; a killed run goes on from its last checkpoint.

    Args:
        src: checkpoint folder; the model as it is there is the reference.
        out: folder to be written.
        pairs: file of pairs, as `read_pairs` takes it.
        recipe: how to train.
        heldout: file of pairs to judge by; by default the last tenth of `pairs`, which is then not trained on.
        length: most tokens of prompt and answer.
        device: where to train.
        overwrite: replace an existing checkpoint at `out`.
        say: called with a sentence from time to time.

    Returns:
        The report, as written to `conversion.json`: that of `src`, with `preferences` beside it.

    Raises:
        ValueError: an argument, the checkpoint or a file does not fit; the sentence says which and what would.
        OSError: the target cannot be written.
    """
    prepare_target(out, overwrite=overwrite)
    checkpoint = open_checkpoint(src, device=device, progress=say)
    known = read_pairs(pairs, checkpoint.tokenizer, length)
    if heldout is not None:
        judged = read_pairs(heldout, checkpoint.tokenizer, length)
    else:
        cut = max(len(known) // 10, 1)
        known, judged = (known[:-cut], known[-cut:]) if len(known) > 1 else (known, known)
    content = [Path(file).read_bytes() for file in (pairs, heldout) if file is not None]
    key = [checkpoint.fingerprint(), hashlib.sha256(b"\n".join(content)).hexdigest(), length, asdict(recipe)]
    with WorkFolder(out) as work:
        folder = work.path / f"preferences-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"
        found = prefer(checkpoint.model, known, folder, recipe, heldout=judged, say=say)
        report = _read_report(checkpoint.path)
        report["preferences"] = {"recipe": asdict(recipe), "pairs": len(known), "judged": found}
        say(f"writing {out}")
        save_checkpoint(checkpoint.model, checkpoint.tokenizer, out, report, overwrite=overwrite)
    return report


def figure(healing: dict[str, Any], name: str) -> bytes:
    """Returns the curve of perplexity over tokens as a PNG, the stages one after the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    start = 0.0
    for recipe, rows in zip(healing["recipes"], healing["evaluations"], strict=True):
        tokens = [start + row["tokens"] for row in rows]
        axes.plot(tokens, [row["perplexity"] for row in rows], marker="o", label=f"stage {recipe['stage']}")
        start = tokens[-1]
    goal = healing["teacher"]["perplexity"]
    axes.axhline(goal, color="0.5", linestyle="--", linewidth=1, label=f"teacher: {goal:.2f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.yaxis.set_minor_formatter("{x:.4g}")
    axes.set_xlabel("tokens of training")
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title(f"{name}, healed by distillation")
    axes.grid(True, which="both", color="0.92")
    axes.legend(frameon=False, fontsize=9)
    image = BytesIO()
    drawing.savefig(image, format="png", dpi=150)
    return image.getvalue()


def _sequences(checkpoint: Checkpoint, text: str, length: int) -> Any:
    import torch

    blocks = [
        block[0] for block in token_blocks(checkpoint.tokenizer, text, length) if block.shape[1] == length
    ]
    if not blocks:
        raise ValueError(
            f"the text has fewer than length={length} tokens; give a longer text or a smaller length."
        )
    return torch.stack(blocks)


def _read_report(path: Path) -> dict[str, Any]:
    file = path / "conversion.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
