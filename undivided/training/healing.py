"""Healing: a converted model learns from the model it came from, with a log, checkpoints and a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from undivided.models.bases import attention_layers
from undivided.training.compiling import compiled_layers
from undivided.training.trainers import DistillationTrainer, LayerwiseTrainer

STAGES = ("layers", "logits")
LOG = "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a stage of healing trains.

    Args:
        tokens: how many tokens it trains on; the text is gone through again where it is shorter.
        stage: "logits" trains the whole model on the teacher's distribution; "layers" the attention layers alone,
            each on the teacher's layer.
        learning_rate: the highest; a cosine takes it to zero after a linear warm-up.
        batch_size: sequences a step.
        micro_batch_size: sequences computed at once; default all of a step.
        warmup: share of the steps.
        weight_decay: of AdamW.
        kl, cross_entropy, features, temperature: as in `DistillationTrainer`; of stage "logits".
        bf16: bfloat16 by autocast, over weights in the model's own dtype.
        compile: whether layers and divergence are compiled (`undivided.training.compiling`) before the first step.
        train_on: "all" parameters or only those of "attention" layers.
        seed: of the order of the text.
        evaluations: how often the model is evaluated, evenly over the tokens, beside once before.
        checkpoints: how often a checkpoint is kept, from which a killed run goes on; 0 keeps none.

    Raises:
        ValueError: a value is out of its range.
    """

    tokens: int
    stage: str = "logits"
    learning_rate: float = 2e-5
    batch_size: int = 16
    micro_batch_size: int | None = None
    warmup: float = 0.03
    weight_decay: float = 0.01
    kl: float = 1.0
    cross_entropy: float = 0.0
    features: float = 0.0
    temperature: float = 1.0
    bf16: bool = False
    compile: bool = False
    train_on: str = "all"
    seed: int = 0
    evaluations: int = 4
    checkpoints: int = 4

    def __post_init__(self) -> None:
        for name, least in {"tokens": 1, "batch_size": 1, "evaluations": 1, "checkpoints": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.stage not in STAGES:
            raise ValueError(f"stage={self.stage!r} is not one of {', '.join(map(repr, STAGES))}.")
        if self.train_on not in ("all", "attention"):
            raise ValueError(f"train_on={self.train_on!r} is neither 'all' nor 'attention'.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be at least 0 and below 1.")
        if self.micro_batch_size is not None and (
            self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size
        ):
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide batch_size={self.batch_size}."
            )


def heal(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: torch.Tensor,
    folder: str | Path,
    recipe: Recipe,
    *,
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, float]]:
    """Trains a converted model in place to give what its teacher gives.

    A run that was killed goes on from its last checkpoint in `folder`, with the same losses as if it had not been.

    Args:
        model: the converted model, on its device.
        teacher: the model it came from, with the same tokens.
        sequences: token ids `[number, length]` of the text.
        folder: for the checkpoints and `log.jsonl`, one line a logged step.
        recipe: of this stage.
        evaluate: returns named figures of the model, such as its perplexity; called before, between and after.
        say: called with a sentence from time to time.

    Returns:
        The evaluations: `tokens` (trained on so far) and the figures, the first before any training.

    Raises:
        ValueError: `sequences` is empty or no matrix, or model and teacher differ in vocabulary or depth.
    """
    if sequences.dim() != 2 or not sequences.numel():
        raise ValueError(f"sequences {list(sequences.shape)} must be token ids [number, length], not empty.")
    _check_pair(model, teacher, recipe)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    steps = max(recipe.tokens // (recipe.batch_size * sequences.shape[1]), 1)
    was_training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    _choose_parameters(model, recipe)
    journal = _Journal(folder / LOG, steps, recipe, sequences.shape[1], evaluate, say)
    trainer = _trainer(model, teacher, sequences, folder, recipe, steps, journal)
    resume = (folder / "recipe.json").exists() and _last_checkpoint(folder)
    if resume:
        _check_same_recipe(folder, recipe)
        say(f"going on from {Path(resume).name}")
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe)))
    try:
        with compiled_layers(model, teacher) if recipe.compile else nullcontext():
            trainer.train(resume_from_checkpoint=resume or None)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_training[name])
            parameter.grad = None
    model.eval()
    return [row for row in read_log(folder / LOG) if "loss" not in row]


def read_log(path: str | Path) -> list[dict[str, float]]:
    """Returns the lines of a log, each with `step` and `tokens`; the last of each kind and step, in order."""
    rows: dict[tuple[bool, float], dict[str, float]] = {}
    for line in Path(path).read_text().splitlines():
        row = json.loads(line)
        rows[("loss" in row, row["step"])] = row
    return sorted(rows.values(), key=lambda row: (row["step"], "loss" in row))


class _Journal(TrainerCallback):
    """Writes losses and evaluations to the log, and says how far it is."""

    def __init__(
        self,
        path: Path,
        steps: int,
        recipe: Recipe,
        length: int,
        evaluate: Callable[[PreTrainedModel], dict[str, float]] | None,
        say: Callable[[str], None],
    ) -> None:
        self.path, self.steps, self.evaluate, self.say = path, steps, evaluate, say
        self.compile = recipe.compile
        self.tokens_a_step = recipe.batch_size * length
        self.due = {math.ceil(steps * k / recipe.evaluations) for k in range(1, recipe.evaluations + 1)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.path.unlink(missing_ok=True)
            self._evaluate(0, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.due:
            self._evaluate(state.global_step, kwargs["model"])

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kw: Any
    ) -> None:
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            self._write({"step": state.global_step, "loss": loss, "learning_rate": logs["learning_rate"]})
            self.say(f"healing: step {state.global_step} of {self.steps}, loss {loss:.4f}")

    def _evaluate(self, step: int, model: PreTrainedModel) -> None:
        if self.evaluate is None:
            return
        model.eval()
        # What is evaluated has lengths of its own, and a compilation of each would take longer than it saves.
        with torch.compiler.set_stance("force_eager") if self.compile else nullcontext():
            found = self.evaluate(model)
        model.train()
        self._write({"step": step, **found})
        figures = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        self.say(f"healing: after {step * self.tokens_a_step:,} tokens: {figures}")

    def _write(self, row: dict[str, float]) -> None:
        row = {"step": row["step"], "tokens": row["step"] * self.tokens_a_step, **row}
        with self.path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")


def _trainer(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    sequences: torch.Tensor,
    folder: Path,
    recipe: Recipe,
    steps: int,
    journal: _Journal,
) -> Trainer:
    micro = recipe.micro_batch_size or recipe.batch_size
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // micro,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * steps),
        bf16=recipe.bf16,
        seed=recipe.seed,
        use_cpu=model.device.type == "cpu",
        logging_steps=max(steps // 50, 1),
        save_strategy="steps" if recipe.checkpoints else "no",
        save_steps=max(steps // max(recipe.checkpoints, 1), 1),
        save_total_limit=1,
        report_to="none",
        log_level="error",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row} for row in sequences]
    given: dict[str, Any] = {
        "model": model, "args": arguments, "train_dataset": data, "data_collator": _stacked, "callbacks": [journal],
        "teacher": teacher,
    }  # fmt: skip
    if recipe.stage == "layers":
        trainer: Trainer = LayerwiseTrainer(**given)
    else:
        weights = {name: getattr(recipe, name) for name in ("kl", "cross_entropy", "features", "temperature")}
        trainer = DistillationTrainer(**given, **weights, compile_loss=recipe.compile)
    # It prints every loss on stdout, where results go.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _stacked(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.stack([row["input_ids"] for row in rows])}


def _choose_parameters(model: PreTrainedModel, recipe: Recipe) -> None:
    if recipe.stage == "layers" or recipe.train_on == "attention":
        model.requires_grad_(False)
        for layer in attention_layers(model):
            layer.requires_grad_(True)


def _check_pair(model: PreTrainedModel, teacher: PreTrainedModel, recipe: Recipe) -> None:
    words = model.get_input_embeddings().weight.shape[0], teacher.get_input_embeddings().weight.shape[0]
    if words[0] != words[1]:
        raise ValueError(
            f"the model has {words[0]} tokens and its teacher {words[1]}; they must be the same."
        )
    if recipe.stage == "layers" or recipe.features > 0:
        depths = len(attention_layers(model)), len(attention_layers(teacher))
        widths = tuple(each.get_input_embeddings().weight.shape[1] for each in (model, teacher))
        if depths[0] != depths[1] or widths[0] != widths[1]:
            raise ValueError(
                f"the model has {depths[0]} layers of width {widths[0]} and its teacher {depths[1]} of {widths[1]}; "
                'to compare features they must be the same: use stage="logits" with features=0.'
            )


def _last_checkpoint(folder: Path) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    return get_last_checkpoint(str(folder))


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    stored = json.loads((folder / "recipe.json").read_text())
    changed = [name for name, value in asdict(recipe).items() if stored.get(name) != value]
    if changed:
        name = changed[0]
        raise ValueError(
            f"{folder} holds an unfinished run with {name}={stored.get(name)}, now it is {getattr(recipe, name)}; "
            "give the same recipe to go on, or remove the folder."
        )
