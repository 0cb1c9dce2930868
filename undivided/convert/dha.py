"""DHA: heads of a trained model are fused, keys and values in groups of their own, more of them where it costs less.

Similar heads are found by annealing, a short training pulls each group together while the model stays a language model,
what is left of the fusion loss decides how many heads a layer gets, and a second, longer training fuses them.

Source: DHA (arXiv 2406.06567), sections 3 and 4. Group sizes, the similarity and the search are ours: the paper's code
was not released.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from undivided.convert._host import host_sharing_weights, native_model
from undivided.convert._moments import Progress, no_progress
from undivided.convert._report import ConversionLog, Report
from undivided.layers._base import grouped_query_dimensions
from undivided.layers.dha import DecoupledHeadAttention, Groups
from undivided.models.evaluation import cache_bytes_per_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.causal_lm import UndividedForCausalLM
    from undivided.models.checkpoint import WorkFolder

KINDS = ("k_proj", "v_proj")


def convert_dha(
    model: PreTrainedModel,
    calibration: Tensor | None,
    *,
    head_budget: float = 0.25,
    adaptive: bool = True,
    search_steps: int = 30,
    fusion_steps: int = 200,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    fusion_loss: str = "operator",
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Fuses the key and value heads of a model down to a share of them, with a short training.

    A model with grouped-query attention is seen as one with multi-head attention whose heads are equal in groups. The
    model given stays as it is.

    Args:
        model: a causal language model with multi-head or grouped-query attention, or a host of one with no layer
            exchanged.
        calibration: token ids `[samples, length]` to train on; may be None where no step is asked for.
        head_budget: share of the `2 H` key and value heads of all layers that stays, above 0 to 1.
        adaptive: whether layers and kinds get as many heads as they need; otherwise all get the same number.
        search_steps: of the training that finds out what they need.
        fusion_steps: of the training that fuses; 0 takes the mean of each group.
        learning_rate: of the model's weights; fusion operators and multipliers have 1e-2.
        batch_size: samples a step.
        fusion_loss: "operator" or "weight", what is pulled together.
        seed: of the search and of the order of the samples.
        evaluate: returns the perplexity of a model; it fills the report.
        work: keeps what the trainings have found, so that a killed conversion resumes.
        progress: wraps the long loops.

    Returns:
        The model and the report. Its stages are "original" and "fused".

    Raises:
        ValueError: an option is out of its range, the budget cannot be met exactly, or a training has no text.

    Source: DHA (arXiv 2406.06567), sections 3 and 4.
    """
    source = native_model(model)
    steps = {"search_steps": search_steps if adaptive else 0, "fusion_steps": fusion_steps}
    _check(calibration, head_budget, fusion_loss, steps)
    count, heads = source.config.num_hidden_layers, source.config.num_attention_heads
    sizes = group_counts(heads)
    total = round(head_budget * 2 * heads * count)
    log = ConversionLog(evaluate, work, progress)
    log.evaluate("original", model)
    weights = [head_weights(source, index) for index in range(count)]
    losses = torch.ones(count, 2, dtype=torch.float64)
    if adaptive and search_steps:
        from undivided.training.fusion import FusionRecipe, fuse

        uniform = min(sizes, key=lambda size: abs(size * 2 * count - total))
        grouped = [group_layer(layer, (uniform, uniform), seed) for layer in weights]
        recipe = FusionRecipe(
            steps=search_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            loss=fusion_loss,
            seed=seed,
        )
        key = {
            "head_budget": head_budget,
            "steps": search_steps,
            "loss": fusion_loss,
            "seed": seed,
            "rate": learning_rate,
        }
        losses = log.keep(
            "dha-search", key,
            lambda: {"losses": fuse(multi_head(source), grouped, calibration, recipe, progress)},
        )["losses"]  # fmt: skip
    if adaptive:
        counts = allocate_heads(losses, total, sizes)
    else:
        if total % (2 * count) or total // (2 * count) not in sizes:
            raise ValueError(
                f"head_budget={head_budget} is {total / (2 * count):g} heads a layer and kind; if not adaptive, it "
                f"must be one of {', '.join(f'{size / heads:g}' for size in sizes)}."
            )
        counts = torch.full((count, 2), total // (2 * count))
    grouped = [
        group_layer(layer, tuple(row), seed) for layer, row in zip(weights, counts.tolist(), strict=True)
    ]
    host = multi_head(source)
    if fusion_steps:
        from undivided.training.fusion import FusionRecipe, fuse

        recipe = FusionRecipe(
            steps=fusion_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            loss=fusion_loss,
            seed=seed,
        )
        remaining = fuse(host, grouped, calibration, recipe, progress)
        log.approximations.append(
            f"fusion loss left after training: {remaining.mean().item():.3g} on average"
        )
    share_heads(host, grouped)
    log.evaluate("fused", host)
    log.approximate(f"{int(counts.sum())} of {2 * heads * count} key and value heads stay")
    options = {
        "head_budget": head_budget, "adaptive": adaptive, "search_steps": search_steps, "fusion_steps": fusion_steps,
        "fusion_loss": fusion_loss, "learning_rate": learning_rate, "batch_size": batch_size, "seed": seed,
        "heads": counts.tolist(),
    }  # fmt: skip
    return host, log.report("dha", options, round(cache_bytes_per_token(host)))


def group_counts(num_heads: int) -> list[int]:
    """Returns the numbers of heads that groups of one size can share, ascending."""
    return [size for size in range(1, num_heads + 1) if num_heads % size == 0]


def head_weights(source: PreTrainedModel, layer_idx: int) -> dict[str, Tensor]:
    """Returns the projections of each query head's keys and values, `[H, head_dim, C]`, copies where it shares them."""
    attention = source.get_decoder().layers[layer_idx].self_attn
    sizes, heads = grouped_query_dimensions(source.config), source.config.num_attention_heads
    return {
        kind: getattr(attention, kind)
        .weight.detach()
        .unflatten(0, (-1, sizes["head_dim"]))
        .repeat_interleave(heads // sizes["num_key_value_heads"], dim=0)
        for kind in KINDS
    }


def head_similarity(weight: Tensor) -> Tensor:
    """Returns the cosines between the projections of heads, `[H, H]` from `[H, head_dim, C]`.

    Dimensions within a head are compared as they stand, since rotary positions tell them apart.

    Raises:
        ValueError: a head is zero.
    """
    rows = weight.flatten(1).double()
    norms = rows.norm(dim=1)
    if not bool((norms > 0).all()):
        raise ValueError(
            f"head {int((norms == 0).nonzero()[0])} is zero, so it is similar to none; remove it before."
        )
    rows = rows / norms[:, None]
    return rows @ rows.T


def group_heads(similarity: Tensor, num_groups: int, seed: int = 0, steps: int = 4000) -> Tensor:
    """Returns groups of equal size `[num_groups, H / num_groups]` of heads, as similar within as annealing finds.

    Begins with each head beside the ones nearest to it, then swaps heads of two groups: always if that raises the sum
    of similarities within groups, sometimes if not, ever more seldom. Groups and heads within come in ascending order.

    Args:
        similarity: `[H, H]`, symmetric.
        num_groups: a divisor of H.
        seed: of the swaps.
        steps: how many are tried.

    Raises:
        ValueError: `num_groups` does not divide H.
    """
    heads = len(similarity)
    if num_groups < 1 or heads % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {heads} heads.")
    size = heads // num_groups
    table = similarity.tolist()
    groups = _nearest_groups(table, num_groups, size)
    if size > 1 and num_groups > 1:
        groups = _anneal(table, groups, seed, steps)
    return torch.tensor(sorted(sorted(group) for group in groups))


def _nearest_groups(table: list[list[float]], num_groups: int, size: int) -> list[list[int]]:
    free, groups = set(range(len(table))), []
    for _ in range(num_groups):
        # The head whose nearest free ones are the most similar begins a group.
        def closeness(head: int) -> float:
            return sum(
                sorted((table[head][other] for other in free if other != head), reverse=True)[: size - 1]
            )

        first = max(sorted(free), key=closeness)
        free.remove(first)
        rest = sorted(free, key=lambda other: (-table[first][other], other))[: size - 1]
        free.difference_update(rest)
        groups.append([first, *rest])
    return groups


def _anneal(table: list[list[float]], groups: list[list[int]], seed: int, steps: int) -> list[list[int]]:
    import random

    draw = random.Random(seed)
    best, best_gain, gain = [list(group) for group in groups], 0.0, 0.0
    hot = 0.1
    for step in range(steps):
        a, b = draw.sample(range(len(groups)), 2)
        i, j = draw.randrange(len(groups[a])), draw.randrange(len(groups[b]))
        x, y = groups[a][i], groups[b][j]
        change = sum(table[y][o] - table[x][o] for o in groups[a] if o != x)
        change += sum(table[x][o] - table[y][o] for o in groups[b] if o != y)
        heat = hot * (1 - step / steps) + 1e-9
        if change > 0 or draw.random() < math.exp(max(change / heat, -60.0)):
            groups[a][i], groups[b][j] = y, x
            gain += change
            if gain > best_gain + 1e-12:
                best, best_gain = [list(group) for group in groups], gain
    return best


def group_layer(weights: dict[str, Tensor], counts: tuple[int, ...], seed: int = 0) -> Groups:
    """Returns the groups of a layer's keys and of its values, each by its own similarity.

    Args:
        weights: as `head_weights` gives them.
        counts: heads that stay, of keys and of values.
        seed: of the search.
    """
    return {
        kind: group_heads(head_similarity(weights[kind]), count, seed)
        for kind, count in zip(KINDS, counts, strict=True)
    }


def allocate_heads(losses: Tensor, total: int, sizes: Sequence[int]) -> Tensor:
    """Returns how many heads each layer and kind gets: the sum is exact, and a larger loss never gets fewer.

    Of all such allocations the one with the largest `sum loss * log(heads)`: what doubling saves is taken to be in
    proportion to the loss.

    Args:
        losses: what is left of the fusion loss, `[layers, 2]`, 0 or more.
        total: heads in all.
        sizes: numbers of heads that are allowed, ascending.

    Raises:
        ValueError: no allocation has this sum; the sentence names the nearest that has.
    """
    order = losses.flatten().argsort(stable=True).tolist()
    values = losses.flatten().double()
    values = (values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)).tolist()
    # Of the first items, in the order of their losses: (last size, sum) -> (value, sizes so far).
    found: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for item in order:
        grown: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (last, used), (value, chosen) in found.items():
            for index in range(last, len(sizes)):
                state = index, used + sizes[index]
                worth = value + values[item] * math.log(sizes[index])
                if state[1] <= total + sizes[-1] and (state not in grown or worth > grown[state][0]):
                    grown[state] = worth, (*chosen, sizes[index])
        found = grown
    fits = {key: entry for key, entry in found.items() if key[1] == total}
    if not fits:
        near = min((used for _, used in found), key=lambda used: (abs(used - total), used), default=None)
        raise ValueError(
            f"no allocation of {', '.join(map(str, sizes))} heads to {len(order)} layers and kinds has {total} in all; "
            f"{near} would do."
        )
    chosen = max(fits.values())[1]
    counts = torch.zeros(len(order), dtype=torch.long)
    counts[torch.tensor(order)] = torch.tensor(chosen)
    return counts.view(losses.shape)


def multi_head(source: PreTrainedModel) -> UndividedForCausalLM:
    """Returns a host with attention of its own in every layer, one key head and one value head a query head.

    Exact: heads that the source shares are copied. All weights are new, so that they can be trained.
    """
    import copy

    host = host_sharing_weights(copy.deepcopy(source))
    config, heads = source.config, source.config.num_attention_heads
    options = {"key_head_map": list(range(heads)), "value_head_map": list(range(heads))}
    for layer_idx in range(config.num_hidden_layers):
        attention = host.attention_layers()[layer_idx]
        copies = heads // grouped_query_dimensions(config)["num_key_value_heads"]
        weights = dict(attention.named_parameters())
        for kind in KINDS:
            for name in ("weight", "bias"):
                if f"{kind}.{name}" in weights:
                    rows = weights[f"{kind}.{name}"].detach().unflatten(0, (heads // copies, -1))
                    rows = rows.repeat_interleave(copies, dim=0).flatten(0, 1)
                    weights[f"{kind}.{name}"] = nn.Parameter(rows)
        layer = DecoupledHeadAttention.from_config(config, layer_idx, **options)
        layer.load_state_dict(weights | dict(layer.named_buffers()), assign=True)
        host.set_attention(layer_idx, layer.train(attention.training), **options)
    return host


@torch.no_grad()
def share_heads(host: UndividedForCausalLM, grouped: Sequence[Groups]) -> None:
    """Puts in place of each group of heads their mean; exact where they are equal.

    Args:
        host: as `multi_head` makes it.
        grouped: the groups of every layer.
    """
    config = host.config.base_config
    for layer_idx, groups in enumerate(grouped):
        layer = host.attention_layers()[layer_idx]
        weights = dict(layer.named_parameters())
        options = {}
        for kind, option in zip(KINDS, ("key_head_map", "value_head_map"), strict=True):
            members = groups[kind].to(layer.q_proj.weight.device)
            shared = torch.empty(members.numel(), dtype=torch.long)
            shared[groups[kind].flatten()] = torch.arange(len(members)).repeat_interleave(members.shape[1])
            options[option] = shared.tolist()
            for name in ("weight", "bias"):
                if f"{kind}.{name}" in weights:
                    rows = weights[f"{kind}.{name}"].unflatten(0, (members.numel(), -1))
                    weights[f"{kind}.{name}"] = nn.Parameter(
                        rows[members].double().mean(1).to(rows.dtype).flatten(0, 1)
                    )
        own = DecoupledHeadAttention.from_config(config, layer_idx, **options)
        own.load_state_dict(weights | dict(own.named_buffers()), assign=True)
        host.set_attention(layer_idx, own.train(layer.training), **options)


def _check(calibration: Tensor | None, head_budget: float, fusion_loss: str, steps: dict[str, int]) -> None:
    if not 0 < head_budget <= 1:
        raise ValueError(f"head_budget={head_budget} must be above 0 and at most 1.")
    if fusion_loss not in ("operator", "weight"):
        raise ValueError(f"fusion_loss={fusion_loss!r} is neither 'operator' nor 'weight'.")
    for name, value in steps.items():
        if value < 0:
            raise ValueError(f"{name}={value} must be 0 or more.")
        if value and (calibration is None or not calibration.numel()):
            raise ValueError(
                f"calibration is missing, and {name}={value} needs text to train on; give token ids."
            )
