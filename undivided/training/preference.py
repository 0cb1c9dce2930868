"""Direct preference optimisation: a model learns which of two answers is liked, against itself as it was.

Source: Rafailov et al. (arXiv 2305.18290), equation 7; as the last stage of X-EcoMLA (arXiv 2503.11132), section 3.4.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint


@dataclass(frozen=True)
class PreferencePair:
    """Two answers to a prompt as token ids, of which `chosen` is liked."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe:
    """How preferences are learnt; the defaults are those of X-EcoMLA.

    Args:
        epochs: how often the pairs are gone through.
        beta: how far the model may go from where it was: large is near.
        learning_rate: the highest; a cosine takes it to zero after a linear warm-up.
        batch_size: pairs a step.
        warmup: share of the steps.
        bf16: bfloat16 by autocast.
        seed: of the order of the pairs.
        checkpoints: how many checkpoints a killed run could go on from; 0 keeps none.

    Raises:
        ValueError: a value is out of its range.
    """

    epochs: int = 1
    beta: float = 0.01
    learning_rate: float = 5e-7
    batch_size: int = 64
    warmup: float = 0.1
    bf16: bool = False
    seed: int = 0
    checkpoints: int = 4

    def __post_init__(self) -> None:
        for name, least in {"epochs": 1, "batch_size": 1, "checkpoints": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        for name in ("beta", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be at least 0 and below 1.")


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float = 0.01,
) -> torch.Tensor:
    """Mean over pairs of `-log sigmoid(beta ((chosen - reference_chosen) - (rejected - reference_rejected)))`.

    Args:
        chosen, rejected: log-probabilities of the answers, `[pairs]`, with gradients.
        reference_chosen, reference_rejected: those of the model as it was; no gradient flows into them.
        beta: weight of the divergence from the model as it was.

    Raises:
        ValueError: `beta` is not positive.

    Source: Rafailov et al. (arXiv 2305.18290), equation 7.
    """
    if beta <= 0:
        raise ValueError(f"beta={beta} must be positive.")
    margin = (chosen - reference_chosen.detach()) - (rejected - reference_rejected.detach())
    return -F.logsigmoid(beta * margin).mean()


def answer_log_probability(
    model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, answer: torch.Tensor
) -> torch.Tensor:
    """Returns the sum of the log-probabilities of each text's answer, `[texts]`, in float32.

    Args:
        model: a causal language model.
        input_ids: `[texts, length]`, prompt and answer, padded on the right.
        attention_mask: 1 for tokens, 0 for padding.
        answer: boolean `[texts, length]`, the tokens of the answer.
    """
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    target = input_ids[:, 1:, None]
    return ((logits.gather(-1, target)[..., 0] - logits.logsumexp(-1)) * answer[:, 1:]).sum(-1)


def read_pairs(path: str | Path, tokenizer: Any, max_length: int = 1024) -> list[PreferencePair]:
    """Reads a file of one JSON object a line, each with the texts `prompt`, `chosen` and `rejected`.

    The prompt loses its beginning where prompt and answer are longer than `max_length` tokens, the answer its end.

    Raises:
        ValueError: a line is no such object, an answer is empty, or there is no line.
    """
    found = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        names = ("prompt", "chosen", "rejected")
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
            raise ValueError(f"{path}, line {number}: needs the texts {', '.join(names)}.")
        prompt, *answers = (tokenizer(row[name], add_special_tokens=False).input_ids for name in names)
        if not all(answers):
            raise ValueError(f"{path}, line {number}: an answer is empty.")
        answers = [answer[: max_length // 2] for answer in answers]
        room = max_length - max(map(len, answers))
        found.append(PreferencePair(prompt[-room:], *answers))
    if not found:
        raise ValueError(f"{path} has no pair; write one JSON object a line.")
    return found


class PreferenceTrainer(Trainer):
    """Trains on batches of pairs made by `collated`, with the log-probabilities of the model as it was in them."""

    def __init__(self, *args: Any, beta: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.beta = beta

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        reference = inputs.pop("reference")
        own = answer_log_probability(model, **inputs)
        (chosen, rejected), before = own.chunk(2), reference.chunk(2)
        loss = dpo_loss(chosen, rejected, before[0], before[1], self.beta)
        return (loss, {"log_probability": own}) if return_outputs else loss


def prefer(
    model: PreTrainedModel,
    pairs: Sequence[PreferencePair],
    folder: str | Path,
    recipe: PreferenceRecipe | None = None,
    *,
    heldout: Sequence[PreferencePair] = (),
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, dict[str, float]]:
    """Trains a model in place on pairs; a killed run goes on from its last checkpoint.

    Args:
        model: as it was when the run began, also when it goes on: it is its own reference.
        pairs: to train on.
        folder: for the checkpoints.
        recipe: how to train.
        heldout: other pairs, of which the accuracy is told.
        say: called with a sentence from time to time.

    Returns:
        "before" and "after": `accuracy`, the share of the held-out pairs (of the training pairs, if there are none)
        whose chosen answer the model has made more likely by more than the rejected one; before training 0 by
        definition, so that "before" tells the share whose chosen answer is the likelier. `loss`: of equation 7.

    Raises:
        ValueError: there is no pair, or the folder holds a run of another recipe.
    """
    if not pairs:
        raise ValueError("pairs is empty; give at least one.")
    recipe = PreferenceRecipe() if recipe is None else recipe
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "recipe.json"
    if stored.exists() and json.loads(stored.read_text()) != asdict(recipe):
        raise ValueError(
            f"{folder} holds a run of another recipe; give the same to go on, or remove the folder."
        )
    stored.write_text(json.dumps(asdict(recipe)))
    judged = list(heldout) or list(pairs)
    reference, measured = (_log_probabilities(model, group, recipe.batch_size) for group in (pairs, judged))
    before = _figures(measured, None, recipe.beta)
    say(f"preferences: the chosen answer is the likelier in {before['accuracy']:.0%} of {len(judged)} pairs")
    data = [{"pair": pair, "reference": row} for pair, row in zip(pairs, reference, strict=True)]
    steps = math.ceil(len(pairs) / recipe.batch_size) * recipe.epochs
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(recipe.warmup * steps),
        bf16=recipe.bf16,
        seed=recipe.seed,
        use_cpu=model.device.type == "cpu",
        save_strategy="steps" if recipe.checkpoints else "no",
        save_steps=max(steps // max(recipe.checkpoints, 1), 1),
        save_total_limit=1,
        report_to="none",
        log_level="error",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = PreferenceTrainer(
        model, arguments, train_dataset=data, data_collator=collated, beta=recipe.beta
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    model.eval()
    after = _figures(_log_probabilities(model, judged, recipe.batch_size), measured, recipe.beta)
    say(f"preferences: after {steps} steps {after['accuracy']:.0%}, loss {after['loss']:.4f}")
    return {"before": before, "after": after}


def collated(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns a batch: the chosen answers of all pairs, then the rejected ones, each behind its prompt."""
    pairs = [row["pair"] for row in rows]
    texts = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    length = max(len(prompt) + len(answer) for prompt, answer in texts)
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    mask, answered = torch.zeros_like(ids), torch.zeros(len(texts), length, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(texts):
        stop = len(prompt) + len(answer)
        ids[row, :stop] = torch.tensor([*prompt, *answer])
        mask[row, :stop] = 1
        # The first token of a text has nothing before it that could predict it.
        answered[row, max(len(prompt), 1) : stop] = True
    batch = {"input_ids": ids, "attention_mask": mask, "answer": answered}
    if "reference" in rows[0]:
        batch["reference"] = torch.stack([row["reference"] for row in rows], dim=1).flatten()
    return batch


@torch.no_grad()
def _log_probabilities(model: nn.Module, pairs: Sequence[PreferencePair], batch_size: int) -> torch.Tensor:
    """Those of chosen and rejected answers, `[pairs, 2]`, on the CPU."""
    training, device = model.training, next(model.parameters()).device
    model.eval()
    parts = []
    for start in range(0, len(pairs), batch_size):
        batch = collated([{"pair": pair} for pair in pairs[start : start + batch_size]])
        found = answer_log_probability(model, **{name: x.to(device) for name, x in batch.items()})
        parts.append(torch.stack(found.chunk(2), dim=1).cpu())
    model.train(training)
    return torch.cat(parts)


def _figures(own: torch.Tensor, reference: torch.Tensor | None, beta: float) -> dict[str, float]:
    change = own if reference is None else own - reference
    start = own if reference is None else reference
    loss = dpo_loss(own[:, 0], own[:, 1], start[:, 0], start[:, 1], beta)
    return {"accuracy": (change[:, 0] > change[:, 1]).float().mean().item(), "loss": loss.item()}
