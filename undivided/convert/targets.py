"""The attentions a checkpoint can be converted to: one row each, which the pipeline and the command line read.

A row belongs to the entry of the same name in `undivided.convert.CONVERTERS`, the function that converts a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Option:
    """One option of a conversion.

    Args:
        kind: int, float, str or bool.
        help: one sentence for the command line, with the default in brackets.
        flag: its name on the command line; None is the converter's keyword with dashes.
        read: from what the command line gives to what the converter takes.
    """

    kind: type
    help: str
    flag: str | None = None
    read: Callable[[Any], Any] = lambda given: given


@dataclass(frozen=True)
class Target:
    """One row: what `to=` can be.

    Args:
        title: what it makes from what, in words.
        options: the converter's keyword to the option. Two rows that share a keyword share the option.
        required: keywords that have no default.
        calibrates: whether the activations of a text decide the conversion.
        latent_source: whether the source may have latent attention.
        first: the target that a source without latent attention is converted to before.
        check: raises a ValueError if options cannot go together, before anything is loaded.
    """

    title: str
    options: Mapping[str, Option] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    calibrates: bool = True
    latent_source: bool = False
    first: str | None = None
    check: Callable[[Mapping[str, Any]], None] = lambda options: None


def _freqfold(given: str) -> int | str:
    if given != "auto" and not given.isdigit():
        raise ValueError(f'--freqfold {given} is neither "auto" nor a number.')
    return given if given == "auto" else int(given)


def _heads(given: str) -> list[int]:
    parts = given.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--keep-heads {given} is no list of heads; write it as 0,1,4.")
    return [int(part) for part in parts]


def _layers(given: str) -> list[int]:
    parts = given.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"--layers {given} is no list of layers; write it as 0,1,4.")
    return [int(part) for part in parts]


def _check_x_ecomla(options: Mapping[str, Any]) -> None:
    if ("latent_dim" in options) == ("latent_energy" in options):
        raise ValueError('to="x-ecomla" needs latent_dim or latent_energy, and one of the two alone.')


def _check_tpla(options: Mapping[str, Any]) -> None:
    from undivided.convert.tpla import check_options

    if "latent_dim" in options:
        own = {name: options[name] for name in TARGETS["tpla"].options if name in options}
        check_options({options["latent_dim"]}, **own)


def _check_sqa(options: Mapping[str, Any]) -> None:
    if ("num_query_heads" in options) == ("keep_heads" in options):
        raise ValueError('to="sqa" needs num_query_heads or keep_heads, and one of the two alone.')


_KEY_HEADS = Option(int, "Key and value heads.")
_LAYERS = Option(str, "Layers to replace, such as 0,1,4 [all].", read=_layers)
_LATENT_DIM = Option(int, "Width of the latent [mla: 512].")
_QUERY_LATENT_DIM = Option(
    int, "Width of a latent for the queries [mla: none; x-ecomla: as many weights as before]."
)
_ROPE_DIM = Option(int, "Dimensions that keep their rotary positions [mla: 64; x-ecomla: half of a head's].")
_WINDOW = Option(int, "Last tokens that a query reads one by one [core_context: 1024, nsa: 512].")
_POOL = Option(str, "A new key head is the mean, or the first, of a run of old ones [mean].")

TARGETS: dict[str, Target] = {
    "mla": Target(
        "latent attention by TransMLA, from grouped-query attention",
        {
            "latent_dim": _LATENT_DIM,
            "rope_dim": _ROPE_DIM,
            "query_latent_dim": _QUERY_LATENT_DIM,
            "freqfold": Option(
                str, "Rotary frequencies folded into one: auto or a number [auto].", read=_freqfold
            ),
            "balance_kv_ratio": Option(
                float,
                "Key norm over value norm before the PCA; 0 turns it off [1].",
                "--balance",
                lambda ratio: ratio or None,
            ),
            "rank": Option(str, "pca, or full: lossless, at the cache of the source [pca]."),
            "latent_norm": Option(bool, "Normalise the latent, as DeepSeek does."),
        },
    ),
    "tpla": Target(
        "latent attention in shards, from latent attention, or through mla and with its options",
        {
            "num_shards": Option(int, "Shards of the latent [2].", "--shards"),
            "transform": Option(str, "pca, hadamard, random or none [pca]."),
            "norm": Option(str, "local or exact [local]."),
            "softmax": Option(str, "local or exact [local]."),
            "prefill": Option(str, "sliced or exact [sliced]."),
            "logit_scale": Option(str, "lstsq, inverse, literal or one [lstsq]."),
        },
        latent_source=True,
        first="mla",
        check=_check_tpla,
    ),
    "gqa": Target(
        "fewer key and value heads, from multi-head or grouped-query attention",
        {"num_key_value_heads": _KEY_HEADS, "pool": _POOL},
        required=("num_key_value_heads",),
        calibrates=False,
    ),
    "kdgqa": Target(
        "as gqa, and key heads with larger keys serve more query heads",
        {
            "num_key_value_heads": _KEY_HEADS,
            "pool": _POOL,
            "rule": Option(str, "kd, or dgqa_ema: shares in proportion to the norms [kd]."),
        },
        required=("num_key_value_heads",),
    ),
    "sqa": Target(
        "fewer query heads, from multi-head or grouped-query attention",
        {
            "num_query_heads": Option(int, "Query heads to keep, the best ones."),
            "num_key_value_heads": _KEY_HEADS,
            "keep_heads": Option(
                str, "In place of a number the heads themselves, such as 0,1,4.", read=_heads
            ),
            "refit": Option(bool, "Fit the output projection to the outputs of all heads."),
        },
        check=_check_sqa,
    ),
    "moh": Target(
        "a router that picks heads for each token, from multi-head or grouped-query attention",
        {
            "shared_heads": Option(int, "Heads that every token uses, the first ones."),
            "top_k": Option(int, "Other heads that a token uses."),
            "router": Option(
                str, "query_norm, which needs no training, or linear: new weights [query_norm]."
            ),
            "gate_mode": Option(str, "binary, or released: chosen heads are weighed [binary]."),
            "balance_coeff": Option(float, "Factor of the balance loss in training [0.01]."),
        },
        required=("shared_heads", "top_k"),
        calibrates=False,
    ),
    "x-ecomla": Target(
        "latent attention by SVD of the weights, to be healed, from multi-head or grouped-query attention",
        {
            "latent_dim": _LATENT_DIM,
            "latent_energy": Option(float, "In place of a width the share that each layer's latent keeps."),
            "query_latent_dim": _QUERY_LATENT_DIM,
            "query_energy": Option(float, "In place of a width the share that the queries' latent keeps."),
            "rope_dim": _ROPE_DIM,
            "layers": _LAYERS,
            "init": Option(str, "svd, or random: new weights, to compare with [svd]."),
            "variant": Option(str, "paper or released: how a share becomes a width [paper]."),
        },
        calibrates=False,
        check=_check_x_ecomla,
    ),
    "dha": Target(
        "key and value heads fused in groups of their own, from multi-head or grouped-query attention",
        {
            "head_budget": Option(float, "Share of all key and value heads that stays [0.25]."),
            "search_steps": Option(int, "Training steps that find out how many heads a layer needs [30]."),
            "fusion_steps": Option(int, "Training steps that fuse; 0 takes means of heads [200]."),
            "learning_rate": Option(float, "Of the model's weights in these [1e-4]."),
            "batch_size": Option(int, "Samples of the calibration a step [8]."),
            "fusion_loss": Option(str, "operator or weight: what is pulled together [operator]."),
        },
    ),
    "edit-mla": Target(
        "latent attention with new weights, to be healed layer by layer and as a whole",
        {
            "latent_dim": _LATENT_DIM,
            "query_latent_dim": _QUERY_LATENT_DIM,
            "rope_dim": _ROPE_DIM,
            "layers": _LAYERS,
        },
        required=("latent_dim",),
        calibrates=False,
    ),
    "edit-gate-swa": Target(
        "sliding windows with an output gate in most layers, to be healed",
        {
            "window": _WINDOW,
            "full_every": Option(int, "One of so many layers keeps the whole text; 0 for none [6]."),
            "gate": Option(str, "elementwise or head [elementwise]."),
            "sinks": Option(
                int,
                "First tokens that all queries see besides; a few spare much training [0].",
            ),
        },
        required=("window",),
        calibrates=False,
    ),
    "core_context": Target(
        "core tokens for the far past, to be healed, from multi-head or grouped-query attention",
        {
            "group_size": Option(int, "Tokens of a core token [16]."),
            "window": _WINDOW,
            "pooling": Option(str, "Of a group: cca, mean or max [cca]."),
            "core_heads": Option(str, "A core token for each query head, query, or key head, kv [query]."),
            "rope": Option(str, "Keys are pooled after their rotation, post, or before it, pre [post]."),
            "core_logit_bias": Option(float, "Added to the scores of core tokens [0]."),
        },
        calibrates=False,
    ),
    "dhsa": Target(
        "long prompts read in part, from multi-head or grouped-query attention",
        {
            "mode": Option(str, "chunks, or blocks of keys: topk, a, vs or vsb [chunks]."),
            "budget": Option(int, "Keys that a block of queries reads, of chunks [1024]."),
            "query_block": Option(int, "Queries of a block [128]."),
            "boundaries": Option(
                str, "Of chunks: predicted, by what calibration teaches, or fixed [predicted]."
            ),
            "share": Option(str, "What layers share: none, boundaries or selection [boundaries]."),
            "density": Option(float, "Share of the blocks of keys that is read, of blocks [0.125]."),
            "decode": Option(str, "Generated tokens read a part, sparse, or everything, full [sparse]."),
            "epochs": Option(int, "How often the boundary predictor reads the calibration [2]."),
        },
    ),
    "dma": Target(
        "learned masks of few keys, to be healed, from multi-head or grouped-query attention",
        {
            "keep_window_size": Option(int, "Keys that a query keeps [2048]."),
            "score_form": Option(str, "What ranks keys: exp or linear [exp]."),
        },
        calibrates=False,
    ),
    "nsa": Target(
        "compressed and selected blocks and a window, to be healed, from multi-head or grouped-query attention",
        {
            "block_size": Option(int, "Tokens of a block that is selected [64]."),
            "topk": Option(int, "Blocks that a token selects [16]."),
            "window": _WINDOW,
            "kernel_size": Option(int, "Tokens of a compressed block [32]."),
            "kernel_stride": Option(int, "Tokens from one compressed block to the next [16]."),
        },
        calibrates=False,
    ),
    "gda-grow": Target(
        "a larger model, from grouped differential attention",
        {
            "signal_factor": Option(int, "Copies of each signal head [2]."),
            "width_factor": Option(int, "Copies of the hidden size and of the MLPs' width [1]."),
            "symmetry_break": Option(
                float, "Noise between copies that keeps the function, in deviations of the weights [0.1]."
            ),
            "query_noise": Option(float, "Noise on the copies' queries, which changes the function [0]."),
        },
        calibrates=False,
    ),
}


def target(to: str) -> Target:
    """Returns the row of a name.

    Raises:
        ValueError: there is none.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is not one of {', '.join(TARGETS)}.")
    return TARGETS[to]


def check_options(to: str, options: Mapping[str, Any]) -> None:
    """Raises a ValueError unless every option belongs to a target, or to the one its source is converted to before.

    Values are checked by the converters; those that a later step would refuse, here.
    """
    row = target(to)
    own = {**(TARGETS[row.first].options if row.first else {}), **row.options}
    strange = [name for name in options if name not in own]
    if strange:
        others = [f'"{name}"' for name, other in TARGETS.items() if strange[0] in other.options]
        whose = f"an option of {', '.join(others)}" if others else f"unknown; it has {', '.join(own)}"
        raise ValueError(f'to="{to}" takes no {", ".join(strange)}; {strange[0]} is {whose}.')
    missing = [name for name in row.required if name not in options]
    if missing:
        raise ValueError(f'to="{to}" needs {", ".join(missing)}.')
    row.check(options)
