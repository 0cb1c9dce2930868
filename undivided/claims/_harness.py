"""What a claim is, what a row of its results is, and how one is run: gate first, then the measurement."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from undivided import __version__

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: one line of `results/SLUG.jsonl`.

    Claims build rows with `measured`, which computes `ratio` and `holds`; `run` fills in `slug`, `device`,
    `versions`, `command` and `date`.

    Args:
        slug: The system.
        what: The quantity, such as `"decode attention, one rank of two"`; with `shape` and `device` it
            identifies the row.
        shape: Sizes and dtype in words, such as `"batch 32, 32768 keys, bf16"`.
        ours: Our value, in `unit`.
        deviation: Its standard deviation over seeds, in `unit`; None for a single measurement.
        unit: Unit of `ours` and `baseline`, such as `"ms"`.
        baseline_name: The rival, such as `"FlashMLA"`.
        baseline: The rival's value from the same run, in `unit`.
        ratio: How many times better ours is than the baseline; above 1 ours wins.
        required: The smallest ratio for which the claim holds; None where it sets no bar.
        holds: Whether `ratio >= required`; None where the claim sets no bar.
        fraction_of_ceiling: Time of the roofline, from measured ceilings, over our time.
        device: The card's or the processor's name.
        versions: Package to version, with the driver on CUDA.
        command: The command that repeats the measurement.
        date: UTC, ISO 8601.
    """

    slug: str
    what: str
    shape: str
    ours: float
    deviation: float | None
    unit: str
    baseline_name: str | None
    baseline: float | None
    ratio: float | None
    required: float | None
    holds: bool | None
    fraction_of_ceiling: float | None
    device: str
    versions: dict[str, str]
    command: str
    date: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture of what a claim measured, which `undivided reproduce` writes beside the rows.

    Args:
        name: In words of a file's name; the file is `SLUG-NAME.png`.
        save: `save(path)` writes it.
    """

    name: str
    save: Callable[[Path], object]


Measure = Callable[[str, bool], Iterable[Row | Figure]]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published figure and how the same work is measured here.

    Args:
        slug: The system, as in the catalog.
        source: Where the figure stands, such as `"arXiv 2508.15881, section 5.2"`.
        paper: The quoted figures, one sentence each, with their shapes and hardware.
        gate: `gate(device)` raises if results are wrong; nothing is timed then.
        measure: `measure(device, quick)` yields rows built by `measured`, and figures; with `quick` on fewer
            shapes.
        parts: Name to a part of `measure` that can be run alone, such as `"speed"`.
        devices: Kinds of device it can run on, the preferred one first; of `"cpu"` and `"cuda"`.

    Raises:
        ValueError: If `devices` is empty or names another kind of device.
    """

    slug: str
    source: str
    paper: Sequence[str]
    gate: Callable[[str], None]
    measure: Measure
    parts: Mapping[str, Measure] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cuda", "cpu")

    def __post_init__(self) -> None:
        if not self.devices or set(self.devices) - set(DEVICES):
            raise ValueError(f'devices={self.devices} of claim "{self.slug}" must be some of {DEVICES}.')


def measured(
    what: str,
    shape: str,
    ours: float,
    unit: str,
    *,
    better: str,
    baseline_name: str | None = None,
    baseline: float | None = None,
    required: float | None = None,
    fraction_of_ceiling: float | None = None,
    deviation: float | None = None,
) -> Row:
    """Builds a row from what was measured.

    `ratio = baseline / ours` where lower is better, `ours / baseline` where higher is better.

    Args:
        what: The quantity.
        shape: Sizes and dtype in words.
        ours: Our value, in `unit`.
        unit: Unit of both values.
        better: `"lower"` (times, errors, bytes) or `"higher"` (throughput, accuracy).
        baseline_name: The rival.
        baseline: The rival's value from the same run.
        required: The smallest ratio for which the claim holds.
        fraction_of_ceiling: As `Ceilings.fraction` of `undivided.claims._timing` gives it.
        deviation: Standard deviation of `ours` over seeds.

    Raises:
        ValueError: If a number is not finite, or not above 0 where a ratio needs it; if a bar has no
            baseline; if only one of `baseline_name` and `baseline` is given.
    """
    if better not in ("lower", "higher"):
        raise ValueError(f'better="{better}" must be "lower" or "higher".')
    if (baseline is None) != (baseline_name is None):
        raise ValueError(f"baseline={baseline} and baseline_name={baseline_name} must be given together.")
    if required is not None and baseline is None:
        raise ValueError(f"required={required} needs a baseline to be compared with.")
    where = f'of "{what}", {shape},'
    if not math.isfinite(ours):
        raise ValueError(f"ours={ours} {where} must be a finite number.")
    if deviation is not None and not (math.isfinite(deviation) and deviation >= 0):
        raise ValueError(f"deviation={deviation} {where} must be a finite number of at least 0.")
    positive = {"baseline": baseline, "required": required, "fraction_of_ceiling": fraction_of_ceiling}
    if baseline is not None:
        positive["ours"] = ours
    for name, value in positive.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value} {where} must be a finite number above 0.")
    ratio = None
    if baseline is not None:
        ratio = baseline / ours if better == "lower" else ours / baseline
    return Row(
        slug="",
        what=what,
        shape=shape,
        ours=ours,
        deviation=deviation,
        unit=unit,
        baseline_name=baseline_name,
        baseline=baseline,
        ratio=ratio,
        required=required,
        holds=None if required is None or ratio is None else ratio >= required,
        fraction_of_ceiling=fraction_of_ceiling,
        device="",
        versions={},
        command="",
        date="",
    )


class GateError(RuntimeError):
    """A claim's gate found wrong results, so nothing was timed; the cause says which."""


def all_of(parts: Mapping[str, Measure]) -> Measure:
    """Returns the measurement that runs all parts, one after the other."""

    def measure(device: str, quick: bool) -> Iterator[Row | Figure]:
        for part in parts.values():
            yield from part(device, quick)

    return measure


def run(claim: Claim, device: str, quick: bool = False, part: str | None = None) -> Iterator[Row | Figure]:
    """Runs the gate of a claim, then yields its rows and figures as they are measured.

    Args:
        claim: The claim.
        device: `"cpu"` or `"cuda"`.
        quick: Measure fewer shapes.
        part: Only this of the claim's parts.

    Raises:
        ValueError: If the claim has no such part.
        GateError: If the gate raises anything.
    """
    import torch

    if part is not None and part not in claim.parts:
        names = ", ".join(claim.parts) or "none"
        raise ValueError(f'part="{part}": claim "{claim.slug}" has the parts: {names}.')
    measure = claim.measure if part is None else claim.parts[part]
    torch.manual_seed(0)
    try:
        claim.gate(device)
    except Exception as error:
        raise GateError(f'the gate of "{claim.slug}" failed, so nothing was timed: {error}') from error
    where, packages = device_name(device), versions(device)
    options = (f" --part {part}" if part else "") + (" --quick" if quick else "")
    command = f"undivided reproduce {claim.slug} --device {device}{options}"
    torch.manual_seed(0)
    for found in measure(device, quick):
        if isinstance(found, Figure):
            yield found
            continue
        yield dataclasses.replace(
            found,
            slug=claim.slug,
            device=where,
            versions=packages,
            command=command,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )


def choose_device(claim: Claim, wanted: str = "auto") -> str:
    """Returns the kind of device to run a claim on.

    Args:
        claim: The claim.
        wanted: `"auto"` (the first of the claim's devices that is here), `"cpu"` or `"cuda"`.

    Raises:
        ValueError: If the claim cannot run on it, or it is not here.
    """
    import torch

    possible = " or ".join(claim.devices)
    if wanted not in ("auto", *claim.devices):
        raise ValueError(f'device="{wanted}": claim "{claim.slug}" runs on {possible}.')
    here = [device for device in claim.devices if device == "cpu" or torch.cuda.is_available()]
    chosen = here if wanted == "auto" else [device for device in here if device == wanted]
    if not chosen:
        needs = f'claim "{claim.slug}" runs on {possible}'
        raise ValueError(f'device="{wanted}": {needs}, and torch sees no CUDA device.')
    return chosen[0]


def device_name(device: str) -> str:
    """Name of the card or of the processor, such as `"NVIDIA H100 80GB HBM3"`."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return f"{value.strip()}, {torch.get_num_threads()} threads"
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def clock() -> str:
    """The card's present SM clock; soon after a measurement, the one it ran at."""
    return _nvidia_smi("clocks.sm")


def versions(device: str) -> dict[str, str]:
    """Versions of Python, of the packages that matter and, on CUDA, of the toolkit and the driver."""
    found = {"undivided": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "timm", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        import torch

        found["cuda"] = torch.version.cuda or "none"
        found["driver"] = _nvidia_smi("driver_version")
    return found


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.splitlines()[0].strip() if answer.stdout.strip() else "unknown"
