"""Healing a converted model: it learns, logs, is killed and goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_llama
from undivided.convert.transmla import convert_transmla
from undivided.models.bases import attention_layers
from undivided.training import Recipe, heal
from undivided.training.healing import read_log

RECIPE = Recipe(tokens=1920, batch_size=4, learning_rate=3e-3, evaluations=2, checkpoints=3)


def sequences() -> torch.Tensor:
    return torch.randint(256, (40, 16), generator=torch.Generator().manual_seed(0))


def pair():
    """A model and its lossy conversion."""
    teacher = tiny_llama()
    return convert_transmla(tiny_llama(), sequences(), latent_dim=8, rope_dim=4, freqfold=2)[0], teacher


def divergence(teacher):
    @torch.no_grad()
    def evaluate(model):
        ids = sequences()[:8]
        p, q = (each(ids).logits.log_softmax(-1) for each in (teacher, model))
        return {"kl": (p.exp() * (p - q)).sum(-1).mean().item()}

    return evaluate


@pytest.mark.parametrize(
    "changes", [{}, {"stage": "layers"}, {"kl": 0.0, "features": 1.0}, {"micro_batch_size": 2}], ids=str
)
def test_comes_nearer_to_its_teacher(tmp_path, changes):
    model, teacher = pair()
    rows = heal(
        model, teacher, sequences(), tmp_path, replace(RECIPE, **changes), evaluate=divergence(teacher)
    )
    assert [row["tokens"] for row in rows] == [0, 960, 1920]
    assert rows[-1]["kl"] < 0.95 * rows[0]["kl"]
    assert not model.training


def test_layers_stage_and_attention_change_nothing_else(tmp_path):
    for number, changes in enumerate(({"stage": "layers"}, {"train_on": "attention"})):
        model, teacher = pair()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        heal(model, teacher, sequences(), tmp_path / str(number), replace(RECIPE, tokens=128, **changes))
        changed = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
        assert changed and all(".self_attn." in name for name in changed)
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_exact_conversion_has_nothing_to_learn_layer_by_layer(tmp_path):
    teacher = tiny_llama(dtype=torch.float64)
    model, _ = convert_transmla(tiny_llama(dtype=torch.float64), sequences(), rank="full", rope_dim=8)
    heal(
        model, teacher, sequences(), tmp_path, replace(RECIPE, stage="layers", tokens=64, learning_rate=1e-12)
    )
    assert read_log(tmp_path / "log.jsonl")[0]["loss"] < 1e-20


def test_losses_that_layers_return_are_learned_from_too(tmp_path):
    from undivided.convert.moh import convert_moh

    losses = []
    for number, coefficient in enumerate((0.0, 5.0)):
        model, _ = convert_moh(tiny_llama(), shared_heads=1, top_k=1)
        for layer in model.attention_layers():
            layer.auxiliary_coefficients = {"balance": coefficient}
        heal(model, tiny_llama(), sequences(), tmp_path / str(number), replace(RECIPE, tokens=64))
        losses.append(read_log(tmp_path / str(number) / "log.jsonl")[0]["loss"])
    assert losses[1] > losses[0] + 4.0


def test_teacher_is_left_as_it_was(tmp_path):
    model, teacher = pair()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    heal(model, teacher, sequences(), tmp_path, replace(RECIPE, tokens=128))
    assert all(tensor.equal(before[name]) for name, tensor in teacher.state_dict().items())
    assert len(attention_layers(teacher)) == 2


_KILLED = """
import os, signal, sys, torch
from pathlib import Path
from tests.training.test_healing import RECIPE, divergence, pair, sequences
from undivided.training import heal
torch.set_num_threads(1)
model, teacher = pair()
def say(sentence):
    if "step 20 of" in sentence:
        os.kill(os.getpid(), signal.SIGKILL)
heal(model, teacher, sequences(), Path(sys.argv[1]), RECIPE, evaluate=divergence(teacher), say=say)
"""


def test_goes_on_after_a_kill_with_the_same_losses(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "killed")], cwd=Path(__file__).parents[2]
    )
    assert killed.returncode == -signal.SIGKILL
    said: list[str] = []
    results = []
    for name in ("killed", "whole"):
        model, teacher = pair()
        evaluate = divergence(teacher)
        heal(model, teacher, sequences(), tmp_path / name, RECIPE, evaluate=evaluate, say=said.append)
        results.append((model.state_dict(), read_log(tmp_path / name / "log.jsonl")))
    assert "going on from checkpoint-20" in said[0] or "going on from checkpoint-10" in said[0]
    (one, log), (other, expected) = results
    assert log == expected
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_refuses_another_recipe_for_an_unfinished_run(tmp_path):
    model, teacher = pair()
    heal(model, teacher, sequences(), tmp_path, replace(RECIPE, tokens=256))
    with pytest.raises(ValueError, match="unfinished run with learning_rate=0.003, now it is 0.1;"):
        heal(model, teacher, sequences(), tmp_path, replace(RECIPE, tokens=256, learning_rate=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens=0 must be at least 1"),
        ({"stage": "both"}, "stage='both' is not one of 'layers', 'logits'"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be positive"),
        ({"warmup": 1.0}, "warmup=1.0 must be"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 does not divide batch_size=4"),
        ({"train_on": "norms"}, "train_on='norms' is neither"),
    ],
)
def test_recipe_says_what_is_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(RECIPE, **changes)


def test_says_what_does_not_fit(tmp_path):
    model, teacher = pair()
    with pytest.raises(ValueError, match=r"sequences \[16\] must be token ids"):
        heal(model, teacher, sequences()[0], tmp_path, RECIPE)
    with pytest.raises(ValueError, match="the model has 256 tokens and its teacher 300"):
        heal(model, tiny_llama(vocab_size=300), sequences(), tmp_path, RECIPE)
    with pytest.raises(ValueError, match="2 layers of width 32 and its teacher 3 of 32"):
        heal(model, tiny_llama(num_hidden_layers=3), sequences(), tmp_path, replace(RECIPE, stage="layers"))
    with pytest.raises(ValueError, match="at least one above 0"):
        heal(model, teacher, sequences(), tmp_path, replace(RECIPE, kl=0.0))
    assert not (tmp_path / "log.jsonl").exists()
