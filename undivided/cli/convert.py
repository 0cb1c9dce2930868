"""`undivided convert`: another attention for a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

_MLA = "Options of MLA (and of TPLA, where the source has grouped-query attention)"
_TPLA = "Options of TPLA"


def command(
    src: Annotated[
        str, typer.Argument(help="Checkpoint folder, smollm2-135m, or a name on the Hub (org/name).")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="mla or tpla.")],
    latent_dim: Annotated[
        int | None, typer.Option(help="Width of the latent [512].", rich_help_panel=_MLA)
    ] = None,
    rope_dim: Annotated[
        int | None,
        typer.Option(help="Dimensions that keep their rotary positions [64].", rich_help_panel=_MLA),
    ] = None,
    query_latent_dim: Annotated[
        int | None, typer.Option(help="Width of a latent for the queries [none].", rich_help_panel=_MLA)
    ] = None,
    freqfold: Annotated[
        str | None,
        typer.Option(help="Rotary frequencies folded into one: auto or a number.", rich_help_panel=_MLA),
    ] = None,
    balance: Annotated[
        float | None,
        typer.Option(
            help="Key norm over value norm before the PCA; 0 turns it off [1].", rich_help_panel=_MLA
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(help="pca, or full: lossless, at the cache of the source.", rich_help_panel=_MLA),
    ] = None,
    latent_norm: Annotated[
        bool,
        typer.Option("--latent-norm", help="Normalise the latent, as DeepSeek does.", rich_help_panel=_MLA),
    ] = False,
    shards: Annotated[
        int | None, typer.Option(help="Shards of the latent [2].", rich_help_panel=_TPLA)
    ] = None,
    transform: Annotated[
        str | None, typer.Option(help="pca, hadamard, random or none.", rich_help_panel=_TPLA)
    ] = None,
    norm: Annotated[str | None, typer.Option(help="local or exact.", rich_help_panel=_TPLA)] = None,
    softmax: Annotated[str | None, typer.Option(help="local or exact.", rich_help_panel=_TPLA)] = None,
    prefill: Annotated[str | None, typer.Option(help="sliced or exact.", rich_help_panel=_TPLA)] = None,
    logit_scale: Annotated[
        str | None, typer.Option(help="lstsq, inverse, literal or one.", rich_help_panel=_TPLA)
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; smollm2-135m has one by default.")
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(help="Text of the reported perplexities [the last tenth of the calibration text]."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    sample_length: Annotated[int, typer.Option(help="Tokens of a calibration sample.")] = 256,
    evaluation_tokens: Annotated[int, typer.Option(help="Tokens of the evaluation text.")] = 16384,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [as the source].")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at OUT.")
    ] = False,
) -> None:
    """Convert the attention of a checkpoint; OUT is an ordinary transformers folder with conversion.json."""
    from undivided.cli._console import note, progress, table
    from undivided.cli._options import dtype_of
    from undivided.convert.pipeline import convert_checkpoint

    mla: dict[str, Any] = {
        "latent_dim": latent_dim,
        "rope_dim": rope_dim,
        "query_latent_dim": query_latent_dim,
        "freqfold": _freqfold(freqfold),
        "rank": rank,
        "latent_norm": latent_norm or None,
    }
    tpla: dict[str, Any] = {
        "num_shards": shards,
        "transform": transform,
        "norm": norm,
        "softmax": softmax,
        "prefill": prefill,
        "logit_scale": logit_scale,
    }
    mla, tpla = ({k: v for k, v in options.items() if v is not None} for options in (mla, tpla))
    if balance is not None:
        mla["balance_kv_ratio"] = balance or None
    report = convert_checkpoint(
        src, out, to, mla=mla, tpla=tpla, calibration=calibration, evaluation=evaluation, samples=samples,
        sample_length=sample_length, evaluation_tokens=evaluation_tokens, dtype=dtype_of(dtype), device=device,
        overwrite=overwrite, progress=progress, say=note,
    )  # fmt: skip
    rows = [(stage.replace("_", " "), f"{value:.3f}") for stage, value in report["perplexity"].items()]
    table(["stage", "perplexity"], rows, numeric=["perplexity"])
    for stage, size in report["cache_bytes_per_token_per_rank"].items():
        note(f"cache bytes a token a rank, {stage}: {size:,.0f}")
    for line in report["approximations"]:
        note(line)
    note(f"written to {out}")


def _freqfold(value: str | None) -> int | str | None:
    if value is None or value == "auto":
        return value
    if not value.isdigit():
        raise ValueError(f'--freqfold {value} is neither "auto" nor a number.')
    return int(value)
