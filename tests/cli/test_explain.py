from __future__ import annotations

import pytest

from undivided.cli.explain import command
from undivided.spec import SYSTEMS, AttentionSpec


def test_prints_only_what_differs(capsys):
    command("gda")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["standard", "attention", "GDA"]
    assert [line.split("  ")[0] for line in lines[1:3]] == ["mix z", "update"]
    assert "alpha V - lambda alpha(query_noise, key_noise) V" in lines[1]
    assert lines[3] == "the same: carrier, heads, chart s, baseline, link, probe, anchor, payload V"
    assert lines[-1] == "Grouped Differential Attention (arXiv 2510.06949)"


def test_full_prints_every_declaration(capsys):
    command("gda", full=True)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines[1:11] if "  " in line]) == 10
    assert not any(line.startswith("the same") for line in lines)


def test_json_is_the_specification(capsys):
    command("tpla", as_json=True)
    assert AttentionSpec.from_json(capsys.readouterr().out) == SYSTEMS["tpla"].spec


def test_a_system_that_only_chooses_heads_says_so(capsys):
    command("gqa")
    assert "GQA (with MHA and MQA) is standard attention with a choice of heads." in capsys.readouterr().out


def test_unknown_systems_are_refused():
    with pytest.raises(ValueError, match='no specification is called "tpl"; near matches: tpla'):
        command("tpl")


@pytest.mark.parametrize("slug", SYSTEMS)
def test_every_system_prints_its_source(slug, capsys):
    command(slug)
    assert "arXiv" in capsys.readouterr().out
