"""`undivided plan MODEL`: what each arrangement of a model's attention would cost on a group of devices."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from undivided.cost import (
    ASSUMPTIONS,
    DEVICES,
    ITEMSIZE,
    OWN,
    PRESETS,
    RESERVED,
    TRAINED,
    Device,
    ModelShape,
    PlanRow,
    get_device,
    load_model,
    num_parameters,
    plan,
)

_WIDTH = 100
# A terminal narrower than `_WIDTH` is not shown these.
_WIDE_ONLY = ("attention\nweights", "core+weights\n+links, ms")
_COLUMNS = (
    "arrangement",
    "cache,\nB/token,\na layer",
    "largest\nbatch",
    "attention\ncore",
    "FLOP/B,\nbound",
    "attention\nweights",
    "core+weights\n+links, ms",
    "tokens/s",
)
_READING = (
    "Cache, bytes and FLOPs are those of one rank, over all layers, in one decode step; the batch and "
    "tokens/s are those of the whole group."
)


def command(
    model: Annotated[
        str, typer.Argument(help=f"A preset ({', '.join(PRESETS)}) or a folder with a config.json.")
    ],
    device: Annotated[str, typer.Option(help=f"{', '.join(DEVICES)} or custom.")] = "h100",
    context: Annotated[int, typer.Option(help="Tokens cached for each sequence.")] = 32768,
    batch: Annotated[int, typer.Option(help="Sequences that the group decodes together.")] = 64,
    world_size: Annotated[int, typer.Option(help="Devices of the group.")] = 1,
    latent_dim: Annotated[
        int | None, typer.Option(help="Latent of a grouped-query model after conversion.  [default: 512]")
    ] = None,
    rope_dim: Annotated[
        int | None, typer.Option(help="Its key with rotary positions.  [default: 64]")
    ] = None,
    shards: Annotated[
        int | None, typer.Option(help="Shards of TPLA and groups of GLA.  [default: 2 where it divides]")
    ] = None,
    dtype: Annotated[str, typer.Option(help=f"Of cache and weights: {', '.join(ITEMSIZE)}.")] = "bf16",
    weight_dtype: Annotated[
        str | None, typer.Option(help="Of the weights, where it is not the cache's.")
    ] = None,
    reserve_gb: Annotated[
        float | None, typer.Option(help="Memory kept free on each device.  [default: a tenth]")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Replaces the device's memory, 10**9 bytes.")
    ] = None,
    bandwidth_tb: Annotated[
        float | None, typer.Option(help="Replaces its memory bandwidth, 10**12 bytes a second.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(help="Replaces its matmul rate, 10**12 FLOPs a second.")
    ] = None,
    link_gb: Annotated[
        float | None, typer.Option(help="Replaces its link's rate, one direction, 10**9 bytes a second.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows, in full, as JSON.")] = False,
) -> None:
    """Predict cache bytes, FLOPs and roofline time of a decode step, for each arrangement of the attention.

    No weights are needed. The rows are bounds from the devices' nominal figures, not measurements; the best
    row is the one with most tokens a second at this batch of those that fit.
    """
    shape = load_model(model)
    chosen = get_device(
        device, memory_gb=memory_gb, bandwidth_tb=bandwidth_tb, tflops=tflops, link_gb=link_gb
    )
    reserve = RESERVED * chosen.memory_gb if reserve_gb is None else reserve_gb
    rows = plan(
        shape,
        chosen,
        context=context,
        batch=batch,
        world_size=world_size,
        latent_dim=latent_dim,
        rope_dim=rope_dim,
        num_shards=shards,
        dtype=dtype,
        weight_dtype=weight_dtype,
        reserve_gb=reserve,
    )
    setting = {
        "model": shape.name,
        "num_parameters": num_parameters(shape),
        "device": asdict(chosen),
        "world_size": world_size,
        "context": context,
        "batch": batch,
        "dtype": dtype,
        "weight_dtype": weight_dtype or dtype,
        "reserve_gb": reserve,
    }
    if as_json:
        typer.echo(
            json.dumps(
                {**setting, "assumptions": ASSUMPTIONS, "rows": [asdict(row) for row in rows]}, indent=2
            )
        )
        return
    _print(shape, chosen, setting, rows)


def _print(shape: ModelShape, device: Device, setting: dict[str, object], rows: Sequence[PlanRow]) -> None:
    from undivided.cli._console import out, table

    def say(text: str, bullet: str = "") -> None:
        lines = textwrap.fill(
            text, _WIDTH, initial_indent=bullet, subsequent_indent=" " * len(bullet), break_on_hyphens=False
        )
        out.print(lines, markup=False, soft_wrap=True)

    world_size = setting["world_size"]
    say(
        f"{shape.name}, {_parameters(num_parameters(shape))}, on {world_size} x {device.name}: "
        f"context {setting['context']:,}, batch {setting['batch']:,}, cache {setting['dtype']}, "
        f"weights {setting['weight_dtype']}; {setting['reserve_gb']:g} of {device.memory_gb:g} GB in reserve."
    )
    out.print()
    narrow = out.is_terminal and out.width < _WIDTH
    columns = [name for name in _COLUMNS if not (narrow and name in _WIDE_ONLY)]
    cells: list[list[str]] = []
    for row in rows:
        if cells:
            cells.append([""] * len(columns))
        cells.append([cell for name, cell in _cells(row).items() if name in columns])
    table(columns, cells, numeric=columns[1:])
    out.print()
    for sentence in _verdict(rows):
        say(sentence)
    for row in rows:
        for note in row.notes:
            say(f"{row.label}: {note}", "- ")
    for remark in _remarks(device, rows, world_size == 1):
        say(remark, "- ")
    if narrow:
        say(f"Columns are left out below a width of {_WIDTH}; --json has all numbers.", "- ")
    for sentence in (_READING, *ASSUMPTIONS):
        say(sentence, "- ")


def _cells(row: PlanRow) -> dict[str, str]:
    """The cells of a row, two lines each, by column."""
    seconds = (row.core_seconds, row.weight_seconds, row.link_seconds)
    speed = _count(round(row.tokens_per_second)) + ("\nbest" if row.best else "")
    cells = (
        f"{row.label}\n{row.relation}",
        f"{row.cache_bytes_per_token:,.0f}\n{row.cache_bytes_per_token_per_layer:,.0f}",
        _count(row.largest_batch),
        f"{_scaled(row.core_bytes, 'B')}\n{_scaled(row.core_flops, 'FLOP')}",
        f"{row.arithmetic_intensity:.3g}\n{row.bound}",
        f"{_scaled(row.projection_bytes, 'B')}\n{_scaled(row.projection_flops, 'FLOP')}",
        f"{_milliseconds(row.step_seconds, 3)}\n{'+'.join(_milliseconds(part, 2) for part in seconds)}",
        speed if row.fits else "does not\nfit",
    )
    return dict(zip(_COLUMNS, cells, strict=True))


def _verdict(rows: Sequence[PlanRow]) -> list[str]:
    """Which row is best, and which is where the model or its training must not change."""
    best = next((row for row in rows if row.best), None)
    if best is None:
        return ["No arrangement fits this batch."]
    sentences = [f"Best: {best.label} ({best.relation}), {_count(round(best.tokens_per_second))} tokens/s."]
    told = {best.arrangement}
    for condition, kept in (
        ("without training", [row for row in rows if row.relation != TRAINED]),
        ("with the model's own attention", [row for row in rows if row.relation == OWN]),
    ):
        fitting = [row for row in kept if row.fits]
        if not fitting:
            sentences.append(f"Best {condition}: none fits.")
            continue
        row = max(fitting, key=lambda row: row.tokens_per_second)
        if row.arrangement not in told:
            told.add(row.arrangement)
            sentences.append(
                f"Best {condition}: {row.label}, {_count(round(row.tokens_per_second))} tokens/s."
            )
    return sentences


def _remarks(device: Device, rows: Sequence[PlanRow], single: bool) -> list[str]:
    remarks = []
    if single:
        remarks.append("On one rank the three arrangements of MLA are the same.")
    elif device.link_gb is None:
        remarks.append("Time on links is not counted: this device has no link_gb.")
    if not any(row.arrangement == "gla" for row in rows):
        remarks.append("GLA is left out: its groups do not divide the heads.")
    return remarks


def _scaled(value: float, unit: str) -> str:
    """Three significant digits with a decimal prefix."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 0.9995 * 10**power:
            digits = value / 10**power
            text = f"{digits:,.0f}" if digits >= 99.95 else f"{digits:.3g}"
            return f"{text} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _parameters(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:,.4g} billion parameters"
    return f"{number / 1e6:,.4g} million parameters"


def _milliseconds(seconds: float, digits: int) -> str:
    """So many digits between 1 ms and 100 ms; below, as many after the point; above, whole milliseconds."""
    value = 1e3 * seconds
    if value < 1:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}g}" if value < 99.5 else f"{value:,.0f}"


def _count(value: int) -> str:
    return f"{value:,}" if value < 1_000_000 else f"{value / 1e6:.3g}M"
