"""Which key head each query head reads, chosen by the norms of the keys."""

from __future__ import annotations

import torch

RULES = ("uniform", "kd", "dgqa_diff", "dgqa_ema")


def allocate_query_heads(
    norms: torch.Tensor,
    num_heads: int,
    rule: str = "kd",
    *,
    cache: torch.Tensor | None = None,
    beta: float = 0.9,
    random_repair: bool = False,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Allocates query heads to key heads and returns the key head of each query head.

    Key head g gets `n_g = round(r_g / sum(r) * H)` query heads (halves to even), by its importance

    - "uniform": `r_g = 1`,
    - "kd": `r_g = (s_g - min s) / (max s - min s)`, so that the weakest key head is normally left out,
    - "dgqa_diff": `r_g = |c_g - s_g|`, how far the norms are from the cached ones,
    - "dgqa_ema": `r_g = beta s_g + (1 - beta) c_g`, their moving average.

    Then one head at a time is taken from the largest n_g, or given to the smallest, the first where several are, until
    they sum to H. The first n_1 query heads read key head 1, the next n_2 key head 2, and so on. Importances that are
    all equal to zero or not finite (equal norms in "kd", a single key head, an unchanged cache) give the uniform map.
    Nothing here waits for the device: repairs take `G // 2` steps, the most that rounding can need.

    Args:
        norms: `[..., G]`, the norms s of the keys of each key head.
        num_heads: query heads H; G need not divide it.
        rule: one of `RULES`.
        cache: the cached norms c, broadcasts to `norms`; needed by "dgqa_diff" and "dgqa_ema".
        beta: weight of the present norms in "dgqa_ema".
        random_repair: take from and give to random heads, as the authors' code does in DGQA.
        generator: of the random repair.

    Returns:
        Head map `[..., H]`, int64, non-decreasing along H.

    Raises:
        ValueError: an unknown rule, no cache where one is needed, fewer than one head.

    Source: Key-Driven Grouped Query Attention (arXiv 2408.08454); the repair is that of the authors' code.
    """
    check_rule(rule)
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads} must be at least 1.")
    importance = _importance(norms, rule, cache, beta)
    total = importance.sum(-1, keepdim=True)
    importance = torch.where((total > 0) & total.isfinite(), importance, torch.ones_like(importance))
    counts = (importance / importance.sum(-1, keepdim=True) * num_heads).round().long()
    return head_map_of(_repaired(counts, num_heads, random_repair, generator), num_heads)


def head_map_of(counts: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Returns the head map `[..., H]` of counts `[..., G]` that sum to H: runs of query heads, in order."""
    heads = torch.arange(num_heads, device=counts.device)
    return (heads[:, None] >= counts.cumsum(-1)[..., None, :]).sum(-1)


def head_counts(head_map: torch.Tensor, num_key_value_heads: int) -> torch.Tensor:
    """Returns how many query heads each key head has, `[..., G]`, from a head map `[..., H]`."""
    groups = torch.arange(num_key_value_heads, device=head_map.device)
    return (head_map[..., None] == groups).sum(-2)


def uniform_head_map(num_heads: int, num_key_value_heads: int) -> torch.Tensor:
    """Returns the head map `[H]` of grouped-query attention; where G does not divide H, as even as can be."""
    return allocate_query_heads(torch.ones(num_key_value_heads), num_heads, "uniform")


def check_rule(rule: str) -> None:
    """Raises a ValueError unless the rule is one of `RULES`."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not one of {', '.join(map(repr, RULES))}.")


def _importance(norms: torch.Tensor, rule: str, cache: torch.Tensor | None, beta: float) -> torch.Tensor:
    if rule == "uniform":
        return torch.ones_like(norms)
    if rule == "kd":
        least, most = norms.amin(-1, keepdim=True), norms.amax(-1, keepdim=True)
        return (norms - least) / (most - least)
    if cache is None:
        raise ValueError(f'rule="{rule}" needs cache, the norms it compares with.')
    if rule == "dgqa_diff":
        return (cache - norms).abs()
    return beta * norms + (1 - beta) * cache


def _repaired(
    counts: torch.Tensor, num_heads: int, random: bool, generator: torch.Generator | None
) -> torch.Tensor:
    """Counts that sum to `num_heads`: one head a step is taken from, or given to, the head chosen."""
    steps = counts.shape[-1] // 2
    groups = torch.arange(counts.shape[-1], device=counts.device)
    missing = num_heads - counts.sum(-1, keepdim=True)
    direction = missing.sign()
    moves = direction * (missing.abs() > torch.arange(steps, device=counts.device))
    for step in range(steps):
        if random:
            chosen = _random_choice((direction > 0) | (counts > 0), generator)
        else:
            # The smallest where heads are missing, the largest where there are too many.
            chosen = (direction * counts).argmin(-1, keepdim=True)
        counts = counts + moves[..., step : step + 1] * (groups == chosen)
    return counts


def _random_choice(eligible: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Index `[..., 1]` of one of the eligible entries of each row, all equally likely."""
    device = eligible.device if generator is None else generator.device
    draws = torch.rand(eligible.shape, generator=generator, device=device).to(eligible.device)
    return torch.where(eligible, draws, -1.0).argmax(-1, keepdim=True)
