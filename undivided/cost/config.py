"""Reads a model's shape from its `config.json`; no weights, and no library but the standard one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from undivided.cost.attention import AttentionShape, GroupedShape, LatentShape
from undivided.cost.head_counts import sparse_head_counts
from undivided.cost.presets import PRESETS, ExpertShape, ModelShape

GROUPED_TYPES = ("llama", "qwen2", "mistral", "gemma2")
LATENT_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
# The option that says into how many parts a mechanism cuts the latent; its default is 2.
SHARDS = {"mla": None, "tpla": "num_shards", "gla": "num_latent_heads"}
LATENT_OPTIONS = (
    "latent_dim",
    "rope_dim",
    "nope_dim",
    "value_dim",
    "query_latent_dim",
    "latent_norm",
    "query_latent_norm",
    "query_bias",
    "key_value_bias",
    "output_bias",
)


def load_model(model: str | Path) -> ModelShape:
    """Find a model's shape by preset name, or read it from a folder or a `config.json`.

    Args:
        model: a key of `PRESETS` in any case, alone or after an organisation and a slash; or a path.

    Returns:
        The shape.

    Raises:
        ValueError: for a name that is neither (with the nearest presets), or a config that cannot be read.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return model_from_config(_read(path), name=path.resolve().parent.name)
    if path.suffix == ".json" or path.name == "config.json":
        raise ValueError(f"model {str(model)!r}: there is no file {path}.")
    names = {name.lower(): name for name in PRESETS}
    key = str(model).rstrip("/").rsplit("/", 1)[-1].lower()
    if key in names:
        return PRESETS[names[key]]
    close = [names[match] for match in difflib.get_close_matches(key, names, n=3, cutoff=0.5)]
    meant = f" Did you mean {' or '.join(close)}?" if close else ""
    raise ValueError(
        f"model {str(model)!r} is neither a folder with a config.json nor a preset.{meant} "
        f"Presets: {', '.join(PRESETS)}."
    )


def model_from_config(config: Mapping[str, Any], name: str) -> ModelShape:
    """Build a model's shape from the dictionary in its `config.json`.

    Args:
        config: a configuration of type llama, qwen2, mistral, gemma2, deepseek_v2, deepseek_v3, kimi_k2 or
            undivided. An undivided one has `base_config`, the configuration of the model it was made from,
            and `attention`, one entry a layer: null for the base model's own, or a dictionary with
            "mechanism" ("mla", "tpla", "gla", "gqa", "kdgqa" or "sqa") and its options in the words of
            `undivided.layers`.
        name: how reports call the model.

    Returns:
        The shape.

    Raises:
        ValueError: for another type or mechanism, or a missing key.
    """
    model_type = config.get("model_type")
    if model_type == "undivided":
        return _undivided(config, name)
    if model_type in GROUPED_TYPES:
        return _grouped_model(config, name)
    if model_type in LATENT_TYPES:
        return _latent_model(config, name)
    known = ", ".join((*GROUPED_TYPES, *LATENT_TYPES, "undivided"))
    raise ValueError(f"{name}: model_type {model_type!r} has no cost model; {known} have.")


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; a configuration is a JSON object.")
    return config


def _get(config: Mapping[str, Any], key: str, name: str) -> Any:
    if key not in config:
        raise ValueError(f"{name}: the {config.get('model_type')} configuration lacks {key!r}.")
    return config[key]


def _grouped_model(config: Mapping[str, Any], name: str) -> ModelShape:
    model_type = config["model_type"]
    heads = _get(config, "num_attention_heads", name)
    hidden_size = _get(config, "hidden_size", name)
    bias = bool(config.get("attention_bias", False))
    layer = GroupedShape(
        hidden_size=hidden_size,
        num_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden_size // heads,
        qkv_bias=bias or model_type == "qwen2",
        output_bias=bias,
    )
    num_layers = _get(config, "num_hidden_layers", name)
    return ModelShape(
        name=name,
        attention=tuple(
            replace(layer, sliding_window=window) for window in _windows(config, model_type, num_layers)
        ),
        intermediate_size=_get(config, "intermediate_size", name),
        vocab_size=_get(config, "vocab_size", name),
        # transformers leaves a value out of the file where it is the default of the model's class.
        tie_word_embeddings=config.get("tie_word_embeddings", model_type == "gemma2"),
        norms_per_layer=4 if model_type == "gemma2" else 2,
    )


def _windows(config: Mapping[str, Any], model_type: str, num_layers: int) -> list[int | None]:
    """The sliding window of each layer, by transformers' rules for the model type."""
    window = config.get("sliding_window")
    if model_type == "qwen2" and not config.get("use_sliding_window", False):
        window = None
    if window is None or model_type == "llama":
        return [None] * num_layers
    if config.get("layer_types") is not None:
        return [window if kind == "sliding_attention" else None for kind in config["layer_types"]]
    if model_type == "gemma2":
        return [window if layer % 2 == 0 else None for layer in range(num_layers)]
    if model_type == "qwen2":
        return [
            window if layer >= config.get("max_window_layers", 0) else None for layer in range(num_layers)
        ]
    return [window] * num_layers


def _latent_model(config: Mapping[str, Any], name: str) -> ModelShape:
    bias = bool(config.get("attention_bias", False))
    layer = LatentShape(
        hidden_size=_get(config, "hidden_size", name),
        num_heads=_get(config, "num_attention_heads", name),
        latent_dim=_get(config, "kv_lora_rank", name),
        rope_dim=_get(config, "qk_rope_head_dim", name),
        nope_dim=_get(config, "qk_nope_head_dim", name),
        value_dim=_get(config, "v_head_dim", name),
        query_latent_dim=_get(config, "q_lora_rank", name),
        query_bias=bias,
        key_value_bias=bias,
        output_bias=bias,
    )
    experts = None
    if config.get("n_routed_experts"):
        experts = ExpertShape(
            num_experts=config["n_routed_experts"],
            experts_per_token=_get(config, "num_experts_per_tok", name),
            num_shared_experts=config.get("n_shared_experts") or 0,
            intermediate_size=_get(config, "moe_intermediate_size", name),
            first_dense_layers=_get(config, "first_k_dense_replace", name),
        )
    return ModelShape(
        name=name,
        attention=(layer,) * _get(config, "num_hidden_layers", name),
        intermediate_size=_get(config, "intermediate_size", name),
        vocab_size=_get(config, "vocab_size", name),
        tie_word_embeddings=config.get("tie_word_embeddings", False),
        experts=experts,
    )


def _undivided(config: Mapping[str, Any], name: str) -> ModelShape:
    base = model_from_config(_get(config, "base_config", name), name)
    entries = _get(config, "attention", name)
    if len(entries) != base.num_layers:
        raise ValueError(
            f"{name}: attention has {len(entries)} entries; its base model has {base.num_layers} layers."
        )
    attention = tuple(
        native if entry is None else _converted(native, entry, f"{name}: layer {index}")
        for index, (native, entry) in enumerate(zip(base.attention, entries, strict=True))
    )
    return replace(base, attention=attention, base_attention=base.attention)


def _converted(native: AttentionShape, entry: Mapping[str, Any], where: str) -> AttentionShape:
    """The attention of a layer with a mechanism of its own; options not given are the base model's."""
    mechanism = entry.get("mechanism")
    if mechanism in ("gqa", "kdgqa") and isinstance(native, GroupedShape):
        return replace(native, **_chosen(entry, ("num_key_value_heads", "head_dim")))
    if mechanism == "sqa" and isinstance(native, GroupedShape):
        return _sparse_query(native, entry, where)
    if mechanism not in SHARDS:
        raise ValueError(
            f"{where}: mechanism {mechanism!r} on a {type(native).__name__} has no cost model; "
            f"{', '.join(SHARDS)} and, on a grouped-query base, gqa, kdgqa and sqa have."
        )
    options = _chosen(entry, LATENT_OPTIONS)
    if isinstance(native, GroupedShape):
        missing = [key for key in ("latent_dim", "rope_dim", "nope_dim", "value_dim") if key not in options]
        if missing:
            raise ValueError(f"{where}: mechanism {mechanism!r} lacks {', '.join(missing)}.")
        options |= {
            "hidden_size": native.hidden_size,
            "num_heads": native.num_heads,
            "sliding_window": native.sliding_window,
        }
        shape = LatentShape(**options)
    else:
        shape = replace(native, **options)
    shards_option = SHARDS[mechanism]
    num_shards = 1 if shards_option is None else entry.get(shards_option, 2)
    return replace(shape, mechanism=mechanism, num_shards=num_shards)


def _sparse_query(native: GroupedShape, entry: Mapping[str, Any], where: str) -> GroupedShape:
    """Fewer query heads of the base model's width; with more key than query heads the formulas do not hold."""
    if entry.get("reverse"):
        raise ValueError(f'{where}: mechanism "sqa" with reverse=True has no cost model.')
    own = None if entry.get("preset") else native.num_key_value_heads
    query_heads, key_heads = sparse_head_counts(
        native.num_heads,
        entry.get("num_query_heads"),
        entry.get("num_key_value_heads", own),
        entry.get("preset"),
    )
    # A window of the entry is left out: it bounds what is read, and the cache keeps all tokens.
    return replace(
        native,
        num_heads=query_heads,
        num_key_value_heads=key_heads,
        output_bias=entry.get("output_bias", native.output_bias),
        **_chosen(entry, ("head_dim",)),
    )


def _chosen(entry: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: entry[name] for name in names if name in entry}
