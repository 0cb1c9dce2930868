"""The claim harness: rows, gate, stamps, files of results, timing."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

import undivided
from undivided import claims
from undivided.claims import Claim, _harness, _results, _timing, measured


def _row(**changes):
    row = measured(
        "decode", "batch 2", 2.0, "ms", better="lower", baseline_name="eager", baseline=3.0, required=1.2
    )
    stamp = dict(
        slug="tpla",
        device="a card",
        versions={"torch": "2"},
        command="undivided reproduce tpla --device cuda",
        date="2026-01-02T03:04:05Z",
    )
    return dataclasses.replace(row, **{**stamp, **changes})


# Rows


def test_a_row_has_exactly_the_fields_of_the_results_files():
    names = (
        "slug what shape ours deviation unit baseline_name baseline ratio required holds fraction_of_ceiling"
    )
    names += " device versions command date"
    assert [field.name for field in dataclasses.fields(claims.Row)] == names.split()


@pytest.mark.parametrize(("better", "ratio"), [("lower", 1.5), ("higher", 1 / 1.5)])
def test_ratio_above_one_means_ours_is_better(better, ratio):
    row = measured("x", "y", 2.0, "ms", better=better, baseline_name="eager", baseline=3.0)
    assert row.ratio == pytest.approx(ratio)
    assert row.holds is None


def test_a_deviation_stands_beside_the_value_and_does_not_make_another_row():
    rows = [
        dataclasses.replace(measured("loss", "y", 2.0, "bits", better="lower", deviation=spread), slug="toy")
        for spread in (0.25, 0.5)
    ]
    (row,) = _results.latest(rows)
    assert _results.cells(row)[2] == "2 ± 0.5 bits"


@pytest.mark.parametrize(("required", "holds"), [(1.5, True), (1.49, True), (1.51, False)])
def test_a_bar_holds_from_the_required_ratio_on(required, holds):
    row = measured("x", "y", 2.0, "ms", better="lower", baseline_name="e", baseline=3.0, required=required)
    assert row.holds is holds


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"better": "faster"}, 'better="faster" must be "lower" or "higher".'),
        ({"ours": float("nan")}, 'ours=nan of "x", y, must be a finite number.'),
        ({"ours": 0.0}, 'ours=0.0 of "x", y, must be a finite number above 0.'),
        ({"deviation": -1.0}, 'deviation=-1.0 of "x", y, must be a finite number of at least 0.'),
        ({"baseline": float("inf")}, 'baseline=inf of "x", y, must be a finite number above 0.'),
        ({"baseline": None}, "baseline=None and baseline_name=e must be given together."),
        (
            {"baseline": None, "baseline_name": None, "required": 2.0},
            "required=2.0 needs a baseline to be compared with.",
        ),
    ],
)
def test_numbers_that_mean_nothing_are_refused(changes, message):
    good = dict(ours=2.0, better="lower", baseline_name="e", baseline=3.0)
    with pytest.raises(ValueError) as raised:
        measured("x", "y", unit="ms", **{**good, **changes})
    assert str(raised.value) == message


def test_a_quantity_without_baseline_may_be_zero():
    assert measured("bytes lost", "y", 0.0, "bytes", better="lower").ratio is None


# Running


def _claim(gate=lambda device: None, measure=None, **changes):
    rows = measure or (lambda device, quick: [measured("x", "y", 1.0, "ms", better="lower")])
    return Claim(**{**dict(slug="toy", source="s", paper=(), gate=gate, measure=rows), **changes})


def test_the_gate_runs_before_anything_is_measured():
    order = []

    def measure(device, quick):
        order.append(("measure", device, quick))
        yield measured("x", "y", 1.0, "ms", better="lower")

    claim = _claim(gate=lambda device: order.append(("gate", device)), measure=measure)
    list(_harness.run(claim, "cpu", quick=True))
    assert order == [("gate", "cpu"), ("measure", "cpu", True)]


def test_wrong_results_are_never_timed():
    def gate(device):
        raise AssertionError("out differs at [0, 3]")

    def measure(device, quick):
        pytest.fail("measured in spite of the gate")

    message = 'the gate of "toy" failed, so nothing was timed: out differs at \\[0, 3\\]'
    with pytest.raises(_harness.GateError, match=message):
        next(_harness.run(_claim(gate, measure), "cpu"))


def test_rows_are_stamped_with_where_and_how_they_were_made():
    (row,) = _harness.run(_claim(), "cpu", quick=True)
    assert row.slug == "toy"
    assert row.command == "undivided reproduce toy --device cpu --quick"
    assert row.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert f"{torch.get_num_threads()} threads" in row.device
    assert time.strptime(row.date, "%Y-%m-%dT%H:%M:%SZ")


def test_a_part_runs_alone_and_all_parts_in_their_order():
    def part(name):
        return lambda device, quick: [measured(name, "y", 1.0, "ms", better="lower")]

    parts = {"speed": part("fast"), "quality": part("good")}
    claim = _claim(measure=_harness.all_of(parts), parts=parts)
    assert [row.what for row in _harness.run(claim, "cpu")] == ["fast", "good"]
    (row,) = _harness.run(claim, "cpu", part="quality")
    assert row.what == "good"
    assert row.command == "undivided reproduce toy --device cpu --part quality"
    with pytest.raises(ValueError, match='part="size": claim "toy" has the parts: speed, quality.'):
        next(_harness.run(claim, "cpu", part="size"))


def test_gate_and_measurement_draw_the_same_numbers_on_every_run():
    drawn = []
    claim = _claim(gate=lambda device: drawn.append(torch.rand(1).item()))
    for _ in range(2):
        list(_harness.run(claim, "cpu"))
    assert drawn[0] == drawn[1]


def test_the_device_is_the_claims_first_that_is_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _harness.choose_device(_claim(devices=("cuda", "cpu"))) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _harness.choose_device(_claim(devices=("cuda", "cpu"))) == "cuda"
    assert _harness.choose_device(_claim(devices=("cpu", "cuda"))) == "cpu"


@pytest.mark.parametrize(
    ("devices", "wanted", "message"),
    [
        (("cuda",), "auto", 'device="auto": claim "toy" runs on cuda, and torch sees no CUDA device.'),
        (("cuda",), "cpu", 'device="cpu": claim "toy" runs on cuda.'),
        (("cpu",), "cuda", 'device="cuda": claim "toy" runs on cpu.'),
        (
            ("cuda", "cpu"),
            "cuda",
            'device="cuda": claim "toy" runs on cuda or cpu, and torch sees no CUDA device.',
        ),
    ],
)
def test_a_device_that_cannot_be_is_refused(monkeypatch, devices, wanted, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as raised:
        _harness.choose_device(_claim(devices=devices), wanted)
    assert str(raised.value) == message


def test_a_claim_names_its_devices():
    with pytest.raises(ValueError, match="devices=\\('tpu',\\) of claim \"toy\" must be some of"):
        _claim(devices=("tpu",))


# Finding


def test_every_claim_module_keeps_the_contract():
    for slug in claims.available():
        claim = claims.load(slug)
        assert claim.slug == slug
        assert undivided.catalog.get(slug).arxiv in claim.source
        assert all(isinstance(figure, str) for figure in claim.paper)


def test_a_system_without_claim_is_named(monkeypatch):
    monkeypatch.setattr(claims, "available", lambda: ("tpla", "gna"))
    with pytest.raises(ValueError) as raised:
        claims.load("ela")
    assert str(raised.value) == '"ela" (ELA) has no claim yet; claims exist for: tpla, gna.'


def test_an_unknown_system_is_told_what_is_near():
    with pytest.raises(ValueError, match='no system is called "tplaa"; near matches: tpla'):
        claims.load("tplaa")


# Files


def test_rows_survive_the_round_trip(tmp_path: Path):
    rows = [_row(), _row(shape="batch 4", ours=1.0)]
    for row in rows:
        path = _results.append(tmp_path / "results", row)
    assert path.name == "tpla.jsonl"
    assert _results.read(path) == rows


def test_each_row_is_on_disk_before_the_next_is_measured(tmp_path: Path, monkeypatch):
    synced = []
    monkeypatch.setattr(_results.os, "fsync", lambda handle: synced.append(_size(tmp_path)))
    _results.append(tmp_path, _row())
    _results.append(tmp_path, _row())
    size = _size(tmp_path)
    assert synced == [size // 2, size]


def _size(folder: Path) -> int:
    return (folder / "tpla.jsonl").stat().st_size


def test_a_torn_last_line_is_dropped_and_costs_no_other_row(tmp_path: Path):
    path = _results.append(tmp_path, _row())
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"slug": "tp')
    assert _results.read(path) == [_row()]
    _results.append(tmp_path, _row(shape="batch 4"))
    assert path.read_bytes().startswith(whole)
    assert _results.read(path) == [_row(), _row(shape="batch 4")]


def test_a_line_that_is_no_row_is_named(tmp_path: Path):
    path = _results.append(tmp_path, _row())
    with path.open("a") as file:
        file.write('{"slug": "tpla"}\n')
    with pytest.raises(
        ValueError, match="tpla.jsonl, line 2: not a row; a row has exactly slug, what, shape"
    ):
        _results.read(path)
    path.write_text("ours: 3\n")
    with pytest.raises(ValueError, match="tpla.jsonl, line 1: not JSON"):
        _results.read(path)


def test_nan_cannot_enter_the_files(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        _results.append(tmp_path, _row(ours=float("nan")))


def test_the_latest_row_of_each_quantity_shape_and_device_counts():
    rows = [_row(ours=1.0), _row(shape="batch 4"), _row(device="other"), _row(ours=5.0)]
    assert _results.latest(rows) == [rows[3], rows[1], rows[2]]


def test_a_quick_row_never_stands_in_for_a_full_one():
    quick = "undivided reproduce tpla --device cuda --quick"
    full, first, last = _row(ours=1.0), _row(ours=2.0, command=quick), _row(ours=3.0, command=quick)
    assert _results.latest([full, first]) == [full]
    assert _results.latest([first, full]) == [full]
    assert _results.latest([first, last]) == [last]


def test_the_table_holds_every_system_in_catalog_order_and_the_shapes_that_lose(tmp_path: Path):
    lost = _row(slug="rala", shape="a | b", ours=6.0, ratio=0.5, holds=False, fraction_of_ceiling=0.25)
    for row in (lost, _row()):
        _results.append(tmp_path, row)
    text = _results.write_table(tmp_path).read_text()
    assert text.index("## tpla") < text.index("## rala")
    assert "| decode | batch 2 | 2 ms | 3 ms, eager | 1.50 | 1.20 | yes |  | a card | 2026-01-02 |" in text
    assert "| decode | a \\| b | 6 ms | 3 ms, eager | 0.50 | 1.20 | no | 25% | a card | 2026-01-02 |" in text
    assert "Repeat with `undivided reproduce tpla --device cuda`." in text


def test_the_table_follows_from_the_rows_alone(tmp_path: Path):
    _results.append(tmp_path, _row())
    path = _results.write_table(tmp_path)
    first = path.read_text()
    path.write_text("edited")
    assert _results.write_table(tmp_path).read_text() == first


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch):
    path = tmp_path / "RESULTS.md"
    path.write_text("old")

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(_results.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        _results.replace_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["RESULTS.md"]
    assert path.read_text() == "old"


def test_replacing_keeps_the_permissions_of_the_file(tmp_path: Path):
    path = tmp_path / "README.md"
    path.write_text("old")
    path.chmod(0o664)
    _results.replace_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o664


def test_a_line_of_the_files_is_plain_json(tmp_path: Path):
    line = _results.append(tmp_path, _row()).read_text()
    assert json.loads(line)["versions"] == {"torch": "2"}


# Timing


def test_the_slower_rival_is_seen_to_be_slower():
    times = _timing.time_rivals(
        {"fast": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.006)}, "cpu", samples=7
    )
    assert list(times) == ["fast", "slow"]
    assert 2 <= times["fast"].median < times["slow"].median
    assert times["fast"].low <= times["fast"].median <= times["fast"].high
    assert times["fast"].samples == 7


def test_rivals_take_turns():
    order = []

    def rival(name):
        def call():
            order.append(name)
            time.sleep(0.006)

        return call

    _timing.time_rivals({name: rival(name) for name in "ab"}, "cpu", samples=8)
    # The samples come last; before them each rival was tried alone.
    assert order[-16:] == list("abba" * 4)


def test_a_short_call_is_repeated_within_a_sample():
    times = _timing.time_rivals({"nothing": lambda: None}, "cpu", samples=7)
    assert times["nothing"].median < 0.01
    assert int(times["nothing"].method.split()[2]) > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rivals={}), "rivals is empty; give at least one function."),
        (dict(device="meta"), 'device="meta" must be "cpu" or "cuda".'),
        (dict(method="graph"), 'method="graph" must be one of auto, wall on cpu.'),
        (
            dict(device="cuda", method="wall"),
            'method="wall" must be one of auto, events, graph on cuda.',
        ),
        (dict(samples=3), "samples=3 is too few for a median on cpu; use at least 7."),
        (
            dict(device="cuda", samples=29),
            "samples=29 is too few for a median on cuda; use at least 30.",
        ),
    ],
)
def test_a_timing_that_proves_nothing_is_refused(arguments, message):
    with pytest.raises(ValueError) as raised:
        _timing.time_rivals(**{**dict(rivals={"a": lambda: None}, device="cpu"), **arguments})
    assert str(raised.value) == message


def test_the_floor_is_the_larger_of_arithmetic_and_traffic():
    ceilings = _timing.Ceilings(copy_bytes_per_second=1e12, matmul_flops_per_second=1e14, matmul="m")
    assert ceilings.floor(flops=1e12, bytes_moved=1e9) == pytest.approx(10.0)
    assert ceilings.floor(flops=1e11, bytes_moved=1e10) == pytest.approx(10.0)
    assert ceilings.fraction(20.0, flops=1e12) == pytest.approx(0.5)


def test_ceilings_are_measured_once_a_process(monkeypatch):
    _timing._measure_ceilings.cache_clear()
    calls = []

    def fake(rivals, device, **_):
        calls.append(list(rivals))
        return {name: _timing.Timing(1.0, 1.0, 1.0, 7, "fake") for name in rivals}

    monkeypatch.setattr(_timing, "time_rivals", fake)
    first = _timing.measured_ceilings("cpu")
    assert _timing.measured_ceilings("cpu") is first
    assert calls == [["copy"], ["matmul"]]
    assert first.copy_bytes_per_second == 2 * 2**28 / 1e-3
    assert first.matmul_flops_per_second == 2 * 1024**3 / 1e-3
    _timing._measure_ceilings.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["events", "graph"])
def test_a_cold_copy_on_the_card_runs_below_the_copy_ceiling(method):
    # 32 MiB fit in the L2 of an H100: without the flush the copy would beat device memory.
    source = torch.randn(2**22, device="cuda")
    target = torch.empty_like(source)
    timing = _timing.time_rivals({"copy": lambda: target.copy_(source)}, "cuda", method=method)["copy"]
    ceilings = _timing.measured_ceilings("cuda")
    moved = 2 * source.numel() * source.element_size()
    assert timing.samples >= 30
    assert ceilings.fraction(timing.median, bytes_moved=moved) < 1.0
