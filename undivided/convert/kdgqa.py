"""From multi-head to grouped-query attention by pooling heads, and head maps calibrated on the norms of keys.

Source: GQA (arXiv 2305.13245), section 2.1; Key-Driven Grouped Query Attention (arXiv 2408.08454) and its code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from undivided.convert._moments import Progress, no_progress, observe
from undivided.convert._report import ConversionLog, Report
from undivided.layers._base import grouped_query_dimensions
from undivided.layers.gqa import GQAttention
from undivided.layers.head_maps import allocate_query_heads
from undivided.layers.kdgqa import KDGQAttention, KeyDrivenGQA, key_norms
from undivided.layers.pgqa import PerturbedGQA
from undivided.layers.vision_gqa import VisionGQA

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder

POOLS = ("mean", "first")


@torch.no_grad()
def mha_to_gqa(
    model: nn.Module,
    num_key_value_heads: int,
    *,
    pool: str = "mean",
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Turns multi-head (or grouped-query) attention into grouped-query attention with fewer key and value heads.

    Each new key head is the mean of a run of neighbouring old ones, weights and biases, and so are the values; queries
    and outputs stay. Exact where the heads of a run are equal. The model given stays as it is; what is not pooled is
    shared with the result, so copy one of them before training.

    Args:
        model: a timm vision transformer, one of its `Attention` modules, or a language model of the host.
        num_key_value_heads: key and value heads G of every layer, a divisor of those there are.
        pool: "mean", or "first" head of each run.
        evaluate: returns the perplexity of a language model; it fills the report.
        work: not needed: nothing here is slow.
        progress: wraps the loop over layers.
        options: of vision layers: those of `KeyDrivenGQA` (default `rule="uniform"`), or with `target` those of
            `PerturbedGQA`.

    Returns:
        The converted module or model, and the report. Its stages are "original" and "pooled".

    Raises:
        ValueError: the number of heads does not divide those there are, or the model has no attention that is known.

    Source: GQA (arXiv 2305.13245), section 2.1.
    """
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is not one of {', '.join(map(repr, POOLS))}.")
    log = ConversionLog(evaluate, work, progress)
    noted = {"num_key_value_heads": num_key_value_heads, "pool": pool}
    if _is_language_model(model):
        if options:
            raise ValueError(
                f"{', '.join(options)}: options of vision layers, but the model is a language model."
            )
        host, cache_bytes = _pooled_language_model(model, num_key_value_heads, pool, log, GQAttention)
        return host, log.report("mha-to-gqa", noted, cache_bytes)
    if evaluate is not None:
        raise ValueError("evaluate returns perplexities, which a vision transformer has not; leave it out.")
    result = _pooled_vision(model, num_key_value_heads, pool, progress, options)
    log.approximate(_pooling(num_key_value_heads, pool))
    noted |= {name: value for name, value in options.items() if isinstance(value, str | int | float)}
    return result, log.report("mha-to-gqa", noted, 0)


@torch.no_grad()
def convert_kdgqa(
    model: nn.Module,
    num_key_value_heads: int,
    calibration: Tensor | None = None,
    *,
    rule: str = "kd",
    pool: str = "mean",
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> tuple[nn.Module, Report]:
    """Pools the heads as `mha_to_gqa` does, and gives key heads with larger keys more query heads.

    A language model needs `calibration`: its head maps are chosen once, from the norms of the pooled keys, and frozen.
    A vision transformer allocates while it runs; with `calibration` its maps are frozen, too.

    Args:
        model: as in `mha_to_gqa`.
        num_key_value_heads: key and value heads G.
        calibration: token ids `[samples, length]`, or images `[samples, channels, height, width]`.
        rule: "kd", or "dgqa_ema" for shares in proportion to the norms ("dgqa_diff" gives the same where nothing has
            been cached).
        pool, evaluate, work, progress, options: as in `mha_to_gqa`.

    Returns:
        The converted model and the report. Its stages are "original", "pooled" and, of language models, "mapped".

    Raises:
        ValueError: as `mha_to_gqa`; or a language model without calibration.

    Source: Key-Driven Grouped Query Attention (arXiv 2408.08454).
    """
    noted = {"num_key_value_heads": num_key_value_heads, "pool": pool, "rule": rule}
    if not _is_language_model(model):
        model, report = mha_to_gqa(
            model, num_key_value_heads, pool=pool, evaluate=evaluate, progress=progress, rule=rule, **options
        )
        if calibration is not None:
            calibrate_head_maps(model, calibration, progress=progress)
        return model, Report(**{**vars(report), "method": "kdgqa", "options": report.options | noted})
    if calibration is None:
        raise ValueError(
            "calibration is missing: head maps of a language model are chosen before it runs, from token ids."
        )
    if pool not in POOLS:
        raise ValueError(f"pool={pool!r} is not one of {', '.join(map(repr, POOLS))}.")
    if options:
        raise ValueError(
            f"{', '.join(options)}: options of vision layers, but the model is a language model."
        )
    log = ConversionLog(evaluate, work, progress)
    host, cache_bytes = _pooled_language_model(model, num_key_value_heads, pool, log, KDGQAttention)
    calibrate_head_maps(host, calibration, rule=rule, progress=progress)
    log.evaluate("mapped", host)
    log.approximate(f'query heads re-allocated by rule "{rule}"')
    return host, log.report("kdgqa", noted, cache_bytes)


@torch.no_grad()
def calibrate_head_maps(
    model: nn.Module,
    calibration: Tensor,
    *,
    rule: str = "kd",
    batch_size: int = 64,
    progress: Progress = no_progress,
) -> dict[str, list[int]]:
    """Chooses and freezes the head map of every key-driven layer from the mean norms of its keys.

    Norms are those of the model as it runs. Rotary positions keep them.

    Args:
        model: a vision transformer with `KeyDrivenGQA` layers, whose own rules apply; or a language model of the host
            with the mechanism "kdgqa".
        calibration: images, or token ids `[samples, length]`.
        rule: of a language model.
        batch_size: samples a forward.
        progress: wraps the loop over batches.

    Returns:
        Name of each layer to its head map.

    Raises:
        ValueError: no layer is key-driven.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, KeyDrivenGQA | KDGQAttention)
    }
    if not layers:
        raise ValueError(
            'no layer of the model is key-driven (KeyDrivenGQA, or the mechanism "kdgqa"); convert it first.'
        )
    sums: dict[str, Tensor] = {}

    def add(name: str, norms: Tensor) -> None:
        sums[name] = norms.sum(0) + sums.get(name, 0.0)

    was_training = model.training
    model.eval()
    if _is_language_model(model):
        projections = {name: layer.k_proj for name, layer in layers.items()}

        def receive(name: str, output: Tensor) -> None:
            add(name, key_norms(output.unflatten(-1, (-1, layers[name].head_dim)).transpose(1, 2)))

        observe(model, projections, calibration, receive, batch_size=batch_size, progress=progress)
    else:
        _observe_vision(model, layers, calibration, add, batch_size, progress)
    model.train(was_training)
    for name, layer in layers.items():
        norms = sums[name] / len(calibration)
        if isinstance(layer, KeyDrivenGQA):
            layer.freeze(norms=norms)
        else:
            num_heads = len(layer.head_map)
            layer.head_map.copy_(allocate_query_heads(norms, num_heads, rule, cache=torch.zeros_like(norms)))
    if _is_language_model(model):
        _note_head_maps(model)
    return {name: layer.head_map.tolist() for name, layer in layers.items()}


def pooled(linear: nn.Linear, num_heads: int, num_key_value_heads: int, pool: str = "mean") -> nn.Linear:
    """Returns the projection to fewer heads: each the mean, or the first, of a run of the old ones.

    Args:
        linear: a projection to `num_heads` heads.
        num_heads: heads there are.
        num_key_value_heads: heads there will be, a divisor of `num_heads`.
        pool: "mean" or "first".

    Raises:
        ValueError: it is no divisor.
    """
    check_divisor(num_key_value_heads, num_heads)

    def pool_rows(rows: Tensor) -> Tensor:
        runs = rows.unflatten(0, (num_key_value_heads, num_heads // num_key_value_heads, -1))
        return (runs.mean(1) if pool == "mean" else runs[:, 0]).flatten(0, 1).clone()

    weight = pool_rows(linear.weight.detach())
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    result.weight = nn.Parameter(weight)
    if linear.bias is not None:
        result.bias = nn.Parameter(pool_rows(linear.bias.detach()))
    return result


def check_divisor(num_key_value_heads: int, num_heads: int) -> None:
    """Raises a ValueError unless `num_heads` heads can be pooled to `num_key_value_heads`."""
    if num_key_value_heads < 1 or num_heads % num_key_value_heads:
        divisors = [str(n) for n in range(1, num_heads + 1) if num_heads % n == 0]
        raise ValueError(
            f"num_key_value_heads={num_key_value_heads} does not divide the {num_heads} key heads there are; "
            f"{', '.join(divisors)} would."
        )


def _pooling(num_key_value_heads: int, pool: str) -> str:
    return f"keys and values pooled to {num_key_value_heads} heads ({pool} of neighbours)"


# --- vision ---


def _pooled_vision(
    model: nn.Module, groups: int, pool: str, progress: Progress, options: dict[str, Any]
) -> nn.Module:
    if _is_vision_attention(model):
        return _pooled_vision_layer(model, groups, pool, options)
    names = [name for name, module in model.named_modules() if _is_vision_attention(module)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no timm.layers.Attention and is no language model of the host."
        )
    for name in names:
        check_divisor(groups, model.get_submodule(name).num_heads)
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    for name in progress(names, "pooling"):
        result.set_submodule(name, _pooled_vision_layer(model.get_submodule(name), groups, pool, options))
    return result


def _pooled_vision_layer(attention: nn.Module, groups: int, pool: str, options: dict[str, Any]) -> VisionGQA:
    for name, off in (("gate", None), ("norm", nn.Identity)):
        part = getattr(attention, name, None)
        if part is not None and (off is None or not isinstance(part, off)):
            raise ValueError(f"the attention has a {name} on its output, which is not converted.")
    if attention.attn_drop.p:
        raise ValueError(
            f"attn_drop={attention.attn_drop.p} is not supported by the layers here; set it to 0.0."
        )
    heads, qkv, proj = attention.num_heads, attention.qkv, attention.proj
    if proj.out_features != qkv.in_features:
        raise ValueError(
            f"the attention maps width {qkv.in_features} to {proj.out_features}; they must be equal."
        )
    layer_class: type[VisionGQA] = PerturbedGQA if "target" in options else KeyDrivenGQA
    rule = {} if "target" in options else {"rule": "uniform"}
    layer = layer_class(
        qkv.in_features, heads, groups, attn_head_dim=attention.head_dim, qkv_bias=qkv.bias is not None,
        proj_bias=proj.bias is not None, device=qkv.weight.device, dtype=qkv.weight.dtype, **(rule | options),
    )  # fmt: skip
    parts = []
    for index in range(3):
        part = nn.Linear(qkv.in_features, qkv.out_features // 3, bias=qkv.bias is not None, device="meta")
        part.weight = nn.Parameter(qkv.weight.detach().chunk(3)[index].clone())
        if qkv.bias is not None:
            part.bias = nn.Parameter(qkv.bias.detach().chunk(3)[index].clone())
        parts.append(part)
    layer.q_proj = parts[0]
    layer.k_proj, layer.v_proj = (pooled(part, heads, groups, pool) for part in parts[1:])
    layer.q_norm, layer.k_norm, layer.proj = attention.q_norm, attention.k_norm, proj
    layer.proj_drop = attention.proj_drop
    return layer.train(attention.training)


def _observe_vision(model, layers, images, add, batch_size, progress) -> None:
    def hook(name: str) -> Callable[..., None]:
        return lambda layer, inputs: add(name, key_norms(layer.heads(inputs[0])[1]))

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        where = next(model.parameters())
        for batch in progress(images.split(batch_size), "calibration"):
            model(batch.to(where.device, where.dtype))
    finally:
        for handle in handles:
            handle.remove()


def _is_vision_attention(module: nn.Module) -> bool:
    try:
        from timm.models.vision_transformer import Attention
    except ImportError:
        return False
    return isinstance(module, Attention)


# --- language ---


def _is_language_model(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _pooled_language_model(
    model: PreTrainedModel, groups: int, pool: str, log: ConversionLog, layer_class: type[GQAttention]
) -> tuple[UndividedForCausalLM, int]:
    """Returns the host with pooled layers, and what it caches a token in bytes."""
    from undivided.convert._host import host_sharing_weights, native_model

    source = native_model(model)
    sizes = grouped_query_dimensions(source.config)
    check_divisor(groups, sizes["num_key_value_heads"])
    log.evaluate("original", model)
    host = host_sharing_weights(source)
    options = {"num_key_value_heads": groups}
    for layer_idx in log.progress(range(len(host.decoder_layers)), "pooling"):
        attention = source.get_decoder().layers[layer_idx].self_attn
        layer = layer_class.from_config(source.config, layer_idx, **options)
        layer.q_proj, layer.o_proj = attention.q_proj, attention.o_proj
        for name in ("k_proj", "v_proj"):
            linear = pooled(getattr(attention, name), sizes["num_key_value_heads"], groups, pool)
            setattr(layer, name, linear)
        host.set_attention(layer_idx, layer.train(attention.training), **options)
    log.evaluate("pooled", host)
    if groups < sizes["num_key_value_heads"]:
        log.approximate(_pooling(groups, pool))
    width = 2 * groups * sizes["head_dim"] * len(host.decoder_layers)
    return host, width * next(source.parameters()).element_size()


def _note_head_maps(host: UndividedForCausalLM) -> None:
    """Writes the layers' maps into the config, which a checkpoint is built from."""
    for index, layer in enumerate(host.attention_layers()):
        if isinstance(layer, KDGQAttention):
            host.config.attention[index]["head_map"] = layer.head_map.tolist()
