"""Core context aware attention: summaries of the far past, every token of the near past, one softmax."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

from undivided.layers._base import check_arguments
from undivided.layers._padding import padding_before
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops import core_context_attention, dense_attention, pool_core_tokens
from undivided.ops.core_context import check_sizes, group_weights, visible, visible_cores, weighted

if TYPE_CHECKING:
    from undivided.layers._core_cache import CoreContextCacheLayer
    from undivided.spec import AttentionSpec

ROPES = ("post", "pre")
Tables = tuple[torch.Tensor, torch.Tensor]


class CoreContextAttention(GQAttention):
    """Core context aware attention (CCA) with the weights of grouped-query attention and none of its own.

    Groups of `group_size` = g neighbours have a core token, weighed by the query of the group's last token:
    `a = softmax_j(scale * q_mg . k_j)`, `core key = sum_j a_j k_j`, `core value = sum_j a_j v_j`. The i-th token sees
    `n = max(0, (i - window) // g)` core tokens and the tokens `g n + 1 .. i`, in one softmax. Up to `window` tokens it
    is grouped-query attention; zero-shot beyond, a trained model gives the far past up to g times too little weight.

    Cached: of every g tokens before the window one core key and value a core head; of the others, at most
    `window + g - 1`, `2 G head_dim` numbers a token and, until their group is pooled, H weights. A batch with padding,
    whose groups end at different columns, keeps every token's keys, values and queries instead.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: query heads H.
        num_key_value_heads: key and value heads G, a divisor of H.
        head_dim: width of a head.
        group_size: tokens g that a core token stands for.
        window: fewest tokens that are seen one by one.
        pooling: "cca"; or "mean", or "max" of each dimension, which need no query and have G core heads.
        core_heads: "query", a core token a query head, as in the authors' code, H / G times the cache of "kv", a core
            token a key head by the mean of the queries that share it.
        rope: "post" pools rotated keys, as the authors' code does; "pre" pools keys that are rotated to the position
            of the group's last token, so that no two are turned against each other.
        core_logit_bias: added to the logits of core tokens; `log(group_size)` weighs them as so many tokens.
        query_bias, key_value_bias, output_bias: whether the projections have a bias.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: a number or a name is not allowed.

    Warns:
        UserWarning: `window` is less than `group_size`.

    Source: Core Context Aware Transformers (arXiv 2412.12465), section 3; heads and positions: the authors' code.
    """

    mechanism = "core_context"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        group_size: int = 16,
        window: int = 1024,
        pooling: str = "cca",
        core_heads: str = "query",
        rope: str = "post",
        core_logit_bias: float = 0.0,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        check_sizes(group_size, window, pooling, core_heads)
        if rope not in ROPES:
            raise ValueError(f"rope={rope!r} is not one of {', '.join(map(repr, ROPES))}.")
        if window < group_size:
            warnings.warn(f"window={window} is less than group_size={group_size}.", UserWarning, stacklevel=2)
        super().__init__(
            hidden_size,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            query_bias=query_bias,
            key_value_bias=key_value_bias,
            output_bias=output_bias,
            scale=scale,
            softcap=softcap,
            layer_idx=layer_idx,
        )
        self.group_size = group_size
        self.window = window
        self.pooling = pooling
        self.core_heads = core_heads
        self.rope = rope
        self.core_logit_bias = core_logit_bias

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments(self.mechanism, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings)
        tables = rotary_tables(cast(PositionEmbeddings, position_embeddings)) if self.rope == "pre" else None
        cache = None
        if past_key_values is not None:
            from undivided.layers._core_cache import CoreContextCacheLayer
            from undivided.layers._own_cache import own_cache_layer

            kind = CoreContextCacheLayer
            cache = own_cache_layer(past_key_values, self.layer_idx, kind, kind)
        before = 0 if cache is None else cache.tokens
        padding = padding_before(attention_mask, query.shape[2], before + query.shape[2])
        if cache is None:
            out = self._whole(query, key, value, tables, padding)
        elif padding is None and cache.queries is None:
            out = self._behind(cache, query, key, value, tables)
        else:
            out = self._behind_padded(cache, query, key, value, tables, padding)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def _whole(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: Tables | None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Returns the outputs of whole texts; padded ones are moved to the front, what comes behind is not seen."""
        if padding is not None:
            query, key, value = (_moved(x, padding) for x in (query, key, value))
            tables = _moved_tables(tables, padding)
        cores = visible_cores(key.shape[2], self.group_size, self.window)
        if cores == 0:
            out = self.attend(query, key, value, None)
        else:
            out = self._attend_cores(query, key, value, *self._cores(query, key, value, tables, cores))
        return out if padding is None else _moved(out, -padding)

    def _cores(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: Tables | None, cores: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the first core tokens of whole texts."""
        rows = slice(cores * self.group_size)
        last = query[:, :, self.group_size - 1 : rows.stop : self.group_size]
        return self._pool(last, key[:, :, rows], value[:, :, rows], _rows(tables, rows))

    def _pool(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: Tables | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the core tokens of whole groups; `query` holds the last query of each."""
        if self.pooling != "cca":
            return pool_core_tokens(
                None, self._turned(key, tables), value, self.group_size, pooling=self.pooling
            )
        if self.rope == "post":
            return pool_core_tokens(self._pooling_query(query), key, value, self.group_size, scale=self.scale)
        return self._weighed(self._weights(query, key), key, value, tables)

    def _weights(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Returns the weights of the keys of whole groups, by the last query of each."""
        return group_weights(self._pooling_query(query), key.unflatten(2, (-1, self.group_size)), self.scale)

    def _weighed(
        self, weights: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tables: Tables | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        core_key, core_value = (
            weighted(weights, x.unflatten(2, (-1, self.group_size)))
            for x in (self._turned(key, tables), value)
        )
        return core_key, core_value

    def _pooling_query(self, query: torch.Tensor) -> torch.Tensor:
        if self.core_heads == "query":
            return query
        return query.unflatten(1, (self.num_key_value_heads, -1)).mean(dim=2)

    def _turned(self, key: torch.Tensor, tables: Tables | None) -> torch.Tensor:
        """Returns keys of whole groups as they are pooled: with "pre" as if they stood at the group's last token."""
        if tables is None:
            return key
        cos, sin = (table.unflatten(1, (-1, self.group_size)) for table in tables)
        last_cos, last_sin = cos[:, :, -1:], sin[:, :, -1:]
        # Tables of some base models are scaled; the quotient of two is a rotation alone.
        size = cos**2 + sin**2
        turn_cos = (last_cos * cos + last_sin * sin) / size
        turn_sin = (last_sin * cos - last_cos * sin) / size
        return apply_rotary(key, turn_cos.flatten(1, 2), turn_sin.flatten(1, 2), interleaved=False)

    def _attend_cores(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, core_key: torch.Tensor,
        core_value: torch.Tensor, num_tokens: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        out = core_context_attention(
            query, key, value, core_key, core_value, group_size=self.group_size, window=self.window,
            num_tokens=num_tokens, scale=self.scale, softcap=self.softcap, core_logit_bias=self.core_logit_bias,
        )  # fmt: skip
        return cast(torch.Tensor, out)

    def _behind(
        self, cache: CoreContextCacheLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        tables: Tables | None,
    ) -> torch.Tensor:  # fmt: skip
        """Returns the outputs of the tokens at hand behind those of the cache, which is brought up to date."""
        size, before = self.group_size, cache.tokens
        key, value = cache.update(key, value)
        tables = cache.joined_tables(tables)
        dropped = cache.tokens - key.shape[2]
        # Groups: `old` are core tokens already, `known` were complete before and have weights; now `whole` are complete
        # and `new` out of the window.
        old, known, whole = dropped // size, before // size, cache.tokens // size
        new = visible_cores(cache.tokens, size, self.window)
        if self.pooling != "cca":
            known = old
        rows = lambda first, last: slice(first * size - dropped, last * size - dropped)  # noqa: E731
        ends = lambda first, last: query[:, :, (first + 1) * size - 1 - before : last * size - before : size]  # noqa: E731
        middle = min(max(known, old), new)
        for first, last in ((old, middle), (middle, new)):
            if first < last:
                here = rows(first, last)
                members = key[:, :, here], value[:, :, here], _rows(tables, here)
                if last <= known:
                    cache.add_cores(*self._weighed(cache.waiting(last - first), *members))
                else:
                    cache.add_cores(
                        *self._pool(ends(first, last) if self.pooling == "cca" else query, *members)
                    )
        if self.pooling == "cca":
            first = max(known, new)
            fresh = (
                self._weights(ends(first, whole), key[:, :, rows(first, whole)]) if first < whole else None
            )
            cache.keep_weights(max(new - old, 0), fresh)
        if new == 0:
            out = self.attend(query, key, value, None)
        else:
            out = self._attend_cores(query, key, value, cache.core_keys, cache.core_values, cache.tokens)
        cache.drop(new * size - dropped, tables)
        return out

    def _behind_padded(
        self, cache: CoreContextCacheLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        tables: Tables | None, padding: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """The same where texts begin at different columns: nothing is dropped, and all core tokens are formed anew."""
        if cache.tokens and cache.queries is None:
            raise ValueError(
                "attention_mask hides the first tokens of a cache that was filled without padding; start it anew."
            )
        length = query.shape[2]
        cache.queries = cache.joined("queries", query)
        key, value = cache.update(key, value)
        tables = cache.joined_tables(tables)
        cache.drop(0, tables)
        if padding is None:
            padding = torch.zeros(query.shape[0], dtype=torch.long, device=query.device)
        if length == cache.tokens:
            return self._whole(query, key, value, tables, padding)
        cores = visible_cores(cache.tokens, self.group_size, self.window)
        queries, keys, values = (_moved(x, padding) for x in (cache.queries, key, value))
        core_key, core_value = self._cores(queries, keys, values, _moved_tables(tables, padding), cores)
        mask = _padded_visible(padding, length, cache.tokens, cores, self.group_size, self.window)
        if self.core_logit_bias:
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
            bias[..., :cores] = self.core_logit_bias
            mask = bias.masked_fill(~mask, float("-inf"))
        copies = core_key.shape[1] // key.shape[1]
        out = dense_attention(
            query,
            torch.cat([core_key, key.repeat_interleave(copies, dim=1)], dim=2),
            torch.cat([core_value, value.repeat_interleave(copies, dim=1)], dim=2),
            attn_mask=mask,
            scale=self.scale,
            softcap=self.softcap,
        )
        return cast(torch.Tensor, out)

    @property
    def spec(self) -> AttentionSpec:
        """What the layer computes of the tensors of `spec_inputs`, whose keys are core tokens and single ones."""
        from undivided.spec import (
            AttentionSpec,
            Carrier,
            Chart,
            Dot,
            Evidence,
            GivenMask,
            GivenScores,
            HeadMap,
        )

        terms: tuple[Any, ...] = (Dot(scale=self.scale),)
        if self.core_logit_bias:
            terms = (*terms, GivenScores("core_bias"))
        heads = HeadMap(key_heads=None if self.core_heads == "query" else self.num_key_value_heads)
        return AttentionSpec(
            carrier=Carrier((GivenMask("visible"),), heads), evidence=Evidence(Chart(terms, self.softcap))
        )

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        """Returns the named tensors that `spec` reads."""
        query, key, value = self.heads(hidden_states, position_embeddings)
        tables = rotary_tables(cast(PositionEmbeddings, position_embeddings)) if self.rope == "pre" else None
        length = query.shape[2]
        cores = visible_cores(length, self.group_size, self.window)
        core_key, core_value = (
            self._cores(query, key, value, tables, cores) if cores else (key[:, :, :0], value[:, :, :0])
        )
        copies = max(core_key.shape[1] // key.shape[1], 1)
        mask = visible(length, length, cores, length, self.group_size, self.window, query.device)
        inputs = {
            "query": query,
            "key": torch.cat([core_key, key.repeat_interleave(copies, dim=1)], dim=2),
            "value": torch.cat([core_value, value.repeat_interleave(copies, dim=1)], dim=2),
            "visible": mask,
        }
        if self.core_logit_bias:
            is_core = torch.arange(mask.shape[1], device=query.device) < cores
            inputs["core_bias"] = self.core_logit_bias * is_core.to(query.dtype).expand(1, 1, *mask.shape)
        return inputs


def _moved(rows: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Moves the rows of each sample, `[batch, heads, length, width]`, that many places to the front; ends repeat."""
    length = rows.shape[2]
    place = (torch.arange(length, device=rows.device) + by[:, None]).clamp(0, length - 1)
    return rows.gather(2, place[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))


def _moved_tables(tables: Tables | None, by: torch.Tensor) -> Tables | None:
    if tables is None:
        return None
    cos, sin = (_moved(table.expand(by.shape[0], -1, -1)[:, None], by)[:, 0] for table in tables)
    return cos, sin


def _rows(tables: Tables | None, rows: slice) -> Tables | None:
    return None if tables is None else (tables[0][:, rows], tables[1][:, rows])


def _padded_visible(
    padding: torch.Tensor, queries: int, keys: int, num_cores: int, group_size: int, window: int
) -> torch.Tensor:
    """Returns `[batch, 1, queries, cores + keys]` as `visible` does, each text counted from its own first column."""
    column = torch.arange(keys, device=padding.device) - padding[:, None]
    seen = (column[:, keys - queries :] + 1)[..., None]
    cores = (seen - window).clamp(min=0) // group_size
    single = (column[:, None] >= cores * group_size) & (column[:, None] < seen)
    core = torch.arange(num_cores, device=padding.device) < cores
    return torch.cat([core, single], dim=2)[:, None]
