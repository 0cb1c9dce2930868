"""Preferences: the loss, what counts as an answer, learning, resuming, and the command."""

from __future__ import annotations

import json
import math

import pytest
import torch

from tests.tiny import tiny_llama, tiny_tokenizer
from undivided.training.preference import (
    PreferencePair,
    PreferenceRecipe,
    answer_log_probability,
    collated,
    dpo_loss,
    prefer,
    read_pairs,
)

RECIPE = PreferenceRecipe(epochs=6, beta=0.5, learning_rate=3e-2, batch_size=4, checkpoints=0)


def pairs(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def text(first, last):
        length = int(torch.randint(2, 6, (), generator=generator))
        return torch.randint(first, last, (length,), generator=generator).tolist()

    # What is liked: a few of the tokens.
    return [PreferencePair(text(1, 256), text(1, 9), text(128, 136)) for _ in range(count)]


def test_the_loss_is_its_equation():
    own, old = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)
    margin = 0.3 * ((own[0] - old[0]) - (own[1] - old[1]))
    expected = torch.log1p(torch.exp(-margin)).mean()
    torch.testing.assert_close(dpo_loss(*own, *old, beta=0.3), expected)
    assert dpo_loss(*own, *own).item() == pytest.approx(math.log(2))
    old.requires_grad_()
    assert not dpo_loss(*own, *old).requires_grad
    with pytest.raises(ValueError, match="beta=0 must be positive"):
        dpo_loss(*own, *old, beta=0)


def test_only_the_answer_counts_and_padding_does_not():
    model, group = tiny_llama(dtype=torch.float64), pairs(3)
    batch = collated([{"pair": pair} for pair in group])
    found = answer_log_probability(model, **batch)
    texts = [(p.prompt, p.chosen) for p in group] + [(p.prompt, p.rejected) for p in group]
    for value, (prompt, answer) in zip(found, texts, strict=True):
        logits = model(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        expected = sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer))
        torch.testing.assert_close(value, expected)


def test_what_is_liked_becomes_likelier(tmp_path):
    model = tiny_llama()
    found = prefer(model, pairs(24), tmp_path, RECIPE, heldout=pairs(12, seed=1))
    assert found["before"]["loss"] == pytest.approx(math.log(2))
    assert found["after"]["accuracy"] > 0.9
    assert found["after"]["loss"] < 0.9 * math.log(2)
    assert not model.training


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path):
    class Killed(Exception):
        pass

    recipe = PreferenceRecipe(epochs=2, beta=0.5, learning_rate=5e-3, batch_size=4, checkpoints=3)
    whole = tiny_llama()
    prefer(whole, pairs(), tmp_path / "whole", recipe)

    def kill(module, args):
        if module.training and len(list((tmp_path / "killed").glob("checkpoint-*"))):
            raise Killed

    victim = tiny_llama()
    victim.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        prefer(victim, pairs(), tmp_path / "killed", recipe)
    resumed = tiny_llama()
    prefer(resumed, pairs(), tmp_path / "killed", recipe)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], weight, msg=name)
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        prefer(tiny_llama(), pairs(), tmp_path / "killed", RECIPE)


def test_the_command_trains_and_writes_a_checkpoint(tmp_path, capsys):
    from undivided.cli import main

    model, tokenizer = tiny_llama(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "src")
    tokenizer.save_pretrained(tmp_path / "src")
    rows = [{"prompt": "the key", "chosen": " the the", "rejected": " a a"}] * 20
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = [
        "prefer",
        str(tmp_path / "src"),
        str(tmp_path / "out"),
        "--pairs",
        str(tmp_path / "pairs.jsonl"),
    ]
    with pytest.raises(SystemExit) as status:
        main([*arguments, "--learning-rate", "5e-3", "--batch-size", "6", "--beta", "0.5"])
    assert status.value.code == 0
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())["preferences"]
    assert (report["pairs"], report["recipe"]["batch_size"]) == (18, 6)
    assert report["judged"]["after"]["loss"] < math.log(2)
    assert "after" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", r"line 1: not JSON"),
        ('{"prompt": "the"}', "line 1: needs the texts prompt, chosen, rejected"),
        ('{"prompt": "the", "chosen": "", "rejected": "a"}', "line 1: an answer is empty"),
        ("", "has no pair"),
    ],
)
def test_files_that_are_no_pairs_are_refused(tmp_path, line, text):
    (tmp_path / "pairs.jsonl").write_text(line)
    with pytest.raises(ValueError, match=text):
        read_pairs(tmp_path / "pairs.jsonl", tiny_tokenizer())


def test_long_prompts_lose_their_beginning(tmp_path):
    row = {"prompt": "the key " * 20, "chosen": " the", "rejected": " a"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    (pair,) = read_pairs(tmp_path / "pairs.jsonl", tiny_tokenizer(), max_length=8)
    assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) == 8


@pytest.mark.parametrize("changes", [{"epochs": 0}, {"beta": 0.0}, {"learning_rate": -1.0}, {"warmup": 1.0}])
def test_recipes_are_checked(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value} must be"):
        PreferenceRecipe(**changes)
