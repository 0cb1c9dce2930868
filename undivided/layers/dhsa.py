"""Dynamic hierarchical sparse attention: prompts read the chunks that matter to them, in a model as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast

import torch
import torch.nn.functional as F

from undivided.layers._base import additive_or_boolean, check_arguments, filled_keys
from undivided.layers._block_modes import MODES, VARIANTS, choose_blocks, tokens_of_blocks
from undivided.layers._chunks import NORMS, block_lists, check_budget, choose_tokens, dhsa_select, normalised
from undivided.layers._padding import padding_before
from undivided.layers.boundaries import BoundaryPredictor, decode_boundaries, fixed_boundaries
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import PositionEmbeddings
from undivided.layers.sqa import within_window
from undivided.ops import dense_attention, gathered_attention
from undivided.ops._rules import causal_mask

if TYPE_CHECKING:
    from undivided.layers._chunk_cache import ChunkCacheLayer
    from undivided.spec import AttentionSpec

DECODES = ("sparse", "full")
SHARES = ("none", "boundaries", "selection")
BOUNDARIES = ("predicted", "fixed")


class DHSAttention(GQAttention):
    """Dynamic hierarchical sparse attention (DHSA), with the weights of grouped-query attention and none lost.

    While a prompt is read, each block of queries attends to `budget` keys: `mode="chunks"`, the first version, cuts
    the keys where a small `BoundaryPredictor` sees a boundary, scores chunks by `q . k` of normalised means, and takes
    the best (`dhsa_select`); the last `num_instruction` queries attend to all keys. The later version has blocks of
    fixed size, `key_block` keys, which heads choose for themselves: "topk", "a", "vs" or "vsb" (`choose_blocks`).
    Prompts of up to `budget` tokens and prompts behind a cache are attended in full.

    A single token behind a longer cache is a block of its own: it reads `budget` keys of the chunks with the highest
    scores, where all tokens behind the prompt are one growing chunk (of "fixed", chunks of the same size as before);
    with "topk" and "a" the share `density` of the blocks. "vs" and "vsb" let the last queries read everything, and so
    do layers with a window. Cached is what grouped-query attention caches, and of each chunk one sum of its keys, so
    that a step's scores cost as much as the chunks are many. Caches that do not grow are read in full.

    Each row of a batch with padding on the left is selected by itself. Selection has no gradient.

    Args:
        hidden_size: width C of the model.
        num_attention_heads: query heads H.
        num_key_value_heads: key and value heads G, a divisor of H.
        head_dim: width of a head.
        mode: "chunks", or "topk", "a", "vs" or "vsb" of the later version.
        budget: keys of a block of queries; of the blocks' modes `max(1, density * key blocks)` blocks instead.
        query_block: queries of a block.
        num_local, num_global: tokens that "chunks" always chooses, the last up to the block's end and the first.
        num_instruction: last queries that "chunks" lets attend to all.
        boundaries: "predicted", or "fixed", every `chunk_size` tokens, which needs no predictor.
        chunk_size: of "fixed".
        threshold: of a boundary's logit.
        chunks_per_block: at most so many boundaries for each block of queries.
        nms: tokens around a boundary without another.
        norm: of representations: "sqrt", or "mean" or "sum".
        share: what layer `shared_from` finds and the others use: "none", its "boundaries", or its "selection", one for
            layers with a window and one for those without.
        shared_from: that layer; it has the predictor then. With "none" each layer has one.
        predictor_window, predictor_heads, predictor_hidden: sizes of the predictor.
        key_block, density: of the blocks' modes.
        decode: whether single tokens read a part of the cache, "sparse", or all of it, "full", as in the authors' code.
        variant: of the blocks' modes, "paper" or "released".
        window: tokens a query sees, itself included; by default what the base model's layer has.
        query_bias, key_value_bias, output_bias: whether the projections have a bias.
        scale: factor of the logits; default `head_dim ** -0.5`.
        softcap: bound of the logits; default none. The blocks' modes have none.
        layer_idx: index of the layer, which names its place in a cache.

    Raises:
        ValueError: a name or a number is not allowed, or a budget is less than what is always chosen.

    Source: Dynamic Hierarchical Sparse Attention (arXiv 2510.24606); the modes of blocks: the authors' code.
    """

    mechanism = "dhsa"
    # The host hands one dictionary to all layers of a forward.
    shares_in_forward = True
    # A window is known without the base model's mask.
    counts_positions = True

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        mode: str = "chunks",
        budget: int = 1024,
        query_block: int = 128,
        num_local: int = 128,
        num_global: int = 128,
        num_instruction: int = 64,
        boundaries: str = "predicted",
        chunk_size: int = 16,
        threshold: float = 1.1,
        chunks_per_block: int = 8,
        nms: int = 8,
        norm: str = "sqrt",
        share: str = "boundaries",
        shared_from: int = 0,
        predictor_window: int = 4,
        predictor_heads: int = 4,
        predictor_hidden: int = 256,
        key_block: int = 32,
        density: float = 0.125,
        variant: str = "paper",
        decode: str = "sparse",
        window: int | None = None,
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        for name, value, allowed in (
            ("mode", mode, ("chunks", *MODES)),
            ("boundaries", boundaries, BOUNDARIES),
            ("norm", norm, NORMS),
            ("share", share, SHARES),
            ("variant", variant, VARIANTS),
            ("decode", decode, DECODES),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        if mode == "chunks":
            check_budget(budget, query_block, num_local, num_global)
        if not 0 < density <= 1:
            raise ValueError(f"density={density} must be above 0 and at most 1.")
        if min(key_block, query_block, chunk_size) < 1:
            raise ValueError(
                f"key_block={key_block}, query_block={query_block} and chunk_size={chunk_size} must be at least 1."
            )
        if mode != "chunks" and (softcap is not None or window is not None):
            raise ValueError(
                f'mode="{mode}" has neither softcap nor window; this layer has softcap={softcap}, window={window}. '
                'Use mode="chunks".'
            )
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
        self.mode, self.budget, self.query_block = mode, budget, query_block
        self.num_local, self.num_global, self.num_instruction = num_local, num_global, num_instruction
        self.boundaries, self.chunk_size, self.norm = boundaries, chunk_size, norm
        self.threshold, self.chunks_per_block, self.nms = threshold, chunks_per_block, nms
        self.share, self.shared_from = share, shared_from
        self.key_block, self.density, self.variant, self.window = key_block, density, variant, window
        # "vs" and "vsb" let the last queries read everything.
        self.steps_sparsely = decode == "sparse" and window is None and mode in ("chunks", "topk", "a")
        predicts = (
            mode == "chunks" and boundaries == "predicted" and (share == "none" or layer_idx == shared_from)
        )
        self.boundary_predictor = (
            BoundaryPredictor(
                num_key_value_heads * head_dim, predictor_window, predictor_heads, predictor_hidden
            )
            if predicts
            else None
        )

    @classmethod
    def from_config(cls, config: Any, layer_idx: int, **options: Any) -> Self:
        kinds = getattr(config, "layer_types", None)
        if kinds is not None and kinds[layer_idx] == "sliding_attention":
            options = {"window": config.sliding_window} | options
        return super().from_config(config, layer_idx, **options)

    def adopt(self, predictor: BoundaryPredictor) -> dict[str, torch.Tensor]:
        """Returns the weights of a trained predictor by the names they have here; none where the layer has no place."""
        if self.boundary_predictor is None:
            return {}
        for name in ("key_dim", "window", "num_heads", "hidden"):
            own, given = getattr(self.boundary_predictor, name), getattr(predictor, name)
            if own != given:
                raise ValueError(f"the predictor has {name}={given}, but this layer needs {own}.")
        return {f"boundary_predictor.{name}": weight for name, weight in predictor.named_parameters()}

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        layer_memo: dict[Any, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments(self.mechanism, **kwargs)
        query, key, value = self.heads(hidden_states, position_embeddings)
        memo = {} if layer_memo is None else layer_memo
        cache = None if past_key_values is None else self._chunk_layer(past_key_values)
        is_prompt = past_key_values is None or int(past_key_values.get_seq_length(self.layer_idx)) == 0
        cached = key, value
        if past_key_values is not None:
            cached = past_key_values.update(key, value, self.layer_idx)
        is_told = past_key_values is not None and (cache is not None or self.boundary_predictor is not None)
        if is_prompt and (self._is_long(query.shape[2]) or is_told):
            padding = padding_before(attention_mask, query.shape[2], query.shape[2], self.window)
        if is_prompt and self._is_long(query.shape[2]):
            out = self._read(query, key, value, padding, memo)
        elif cache is not None and query.shape[2] == 1 and self._is_long(cached[0].shape[2]):
            out = self._step(cache, query, *cached, memo)
        else:
            if past_key_values is not None:
                cached = filled_keys(attention_mask, past_key_values, self.layer_idx, *cached)
            out = self.attend(query, *cached, additive_or_boolean(attention_mask, cached[0].shape[2]))
        if is_prompt and is_told:
            self._remember(cache, key, padding, memo)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns the outputs of full attention, in the layer's window."""
        if self.window is None:
            return super().attend(query, key, value, mask)
        if mask is not None:
            return super().attend(query, key, value, within_window(mask, self.window))
        out = dense_attention(
            query, key, value, is_causal=True, window=self.window, scale=self.scale, softcap=self.softcap
        )
        return cast(torch.Tensor, out)

    def _is_long(self, length: int) -> bool:
        if self.mode == "chunks":
            return length > max(self.budget, self.num_instruction)
        return length > self.query_block

    def _read(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor | None,
        memo: dict[Any, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Returns the outputs of a prompt, read sparsely."""
        if padding is None:
            return self._sparse(query, key, value, memo, None)
        out = torch.zeros_like(query)
        for row, start in enumerate(padding.tolist()):
            own_query, own_key, own_value = (x[row : row + 1, :, start:] for x in (query, key, value))
            if self._is_long(own_query.shape[2]):
                own = self._sparse(own_query, own_key, own_value, memo, row)
            else:
                own = self.attend(own_query, own_key, own_value, None)
            out[row : row + 1, :, start:] = own
        return out

    def _sparse(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, memo: dict[Any, torch.Tensor],
        row: int | None,
    ) -> torch.Tensor:  # fmt: skip
        if self.mode != "chunks":
            return self._by_blocks(query, key, value)
        # The instruction reads everything; what comes before it never sees it.
        sparse = query.shape[2] - self.num_instruction
        rows = query[:, :, :sparse]
        out = gathered_attention(
            rows, key[:, :, :sparse], value[:, :, :sparse], self._selected(rows, key, memo, row),
            block_size=self.query_block, window=self.window, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip
        if self.num_instruction == 0:
            return cast(torch.Tensor, out)
        first = 0 if self.window is None else max(sparse - self.window + 1, 0)
        # Lists of all keys: the kernel of lists divides long ones among programs, which so few queries need.
        everything = torch.arange(first, query.shape[2], dtype=torch.int32, device=query.device)
        instruction = gathered_attention(
            query[:, :, sparse:], key, value, everything.expand(query.shape[0], 1, 1, -1),
            block_size=self.num_instruction, window=self.window, scale=self.scale, softcap=self.softcap,
        )  # fmt: skip
        # Heads of a token side by side, as the output projection reads them.
        parts = [cast(torch.Tensor, x).transpose(1, 2) for x in (out, instruction)]
        return torch.cat(parts, dim=1).transpose(1, 2)

    def _chunk_layer(self, past_key_values: Any) -> ChunkCacheLayer | None:
        """Returns the layer of a cache that knows chunks; None where single tokens read everything."""
        if not self.steps_sparsely:
            return None
        from undivided.layers._chunk_cache import chunk_layer

        if self.mode != "chunks":
            return chunk_layer(past_key_values, self.layer_idx, self.key_block, True)
        size = self.chunk_size if self.boundaries == "fixed" else None
        return chunk_layer(past_key_values, self.layer_idx, size, False)

    @torch.no_grad()
    def _remember(
        self,
        cache: ChunkCacheLayer | None,
        key: torch.Tensor,
        padding: torch.Tensor | None,
        memo: dict[Any, torch.Tensor],
    ) -> None:
        """Tells a cache the chunks of a prompt, and the memo those that other layers will ask for."""
        if self.mode != "chunks" or self.boundaries == "fixed":
            if cache is not None:
                cache.begin(padding, None)
            return
        length, told = key.shape[2], []
        for row, start in [(None, 0)] if padding is None else enumerate(padding.tolist()):
            # The boundaries of long prompts have been found by now.
            if not self._is_long(length - start) and (
                cache is not None or self.boundary_predictor is not None
            ):
                batch = slice(None) if row is None else slice(row, row + 1)
                self._boundaries(key[batch, :, start:], memo, row)
            told.append(start + memo["boundaries", row])
        if cache is not None:
            most = max(bounds.shape[1] for bounds in told)
            cache.begin(
                padding,
                torch.cat([F.pad(bounds, (0, most - bounds.shape[1]), value=length) for bounds in told]),
            )

    @torch.no_grad()
    def _chosen(self, cache: ChunkCacheLayer, query: torch.Tensor, length: int) -> torch.Tensor:
        """Returns which keys one more token reads, the last of `length`."""
        if self.mode != "chunks":
            sums, bounds = cache.chunks(length)
            means = (
                normalised(sums, bounds, "mean").unflatten(2, (self.num_key_value_heads, -1)).transpose(1, 2)
            )
            return tokens_of_blocks(
                query, means, bounds, self.mode, self.density, self.key_block, self.variant
            )
        # The growing chunk is that of the tokens before.
        sums, bounds = cache.chunks(length if self.boundaries == "fixed" else length - 1)
        scores = query.mean(dim=1, dtype=sums.dtype) @ normalised(sums, bounds, self.norm).mT
        here = torch.full_like(bounds[:, :1], length - 1)
        low = torch.zeros_like(here) if cache.padding is None else cache.padding[:, None]
        return choose_tokens(
            scores, bounds, here, here + 1, low, self.budget, self.num_local, self.num_global
        )

    def _step(
        self, cache: ChunkCacheLayer, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        memo: dict[Any, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Returns the output of one more token."""
        if self.share != "selection" or self.mode != "chunks" or "step" not in memo:
            memo["step"] = self._chosen(cache, query, key.shape[2])
        out = gathered_attention(
            query, key, value, memo["step"], block_size=1, scale=self.scale, softcap=self.softcap
        )
        return cast(torch.Tensor, out)

    @torch.no_grad()
    def _selected(
        self, query: torch.Tensor, key: torch.Tensor, memo: dict[Any, torch.Tensor], row: int | None
    ) -> torch.Tensor:
        """Returns the lists of keys, found here or by the layer that shares them."""
        name = ("selection", row, self.window)
        if self.share == "selection" and name in memo:
            return memo[name]
        memo[name] = dhsa_select(
            query, key, self._boundaries(key, memo, row), block_size=self.query_block, budget=self.budget,
            num_local=self.num_local, num_global=self.num_global, window=self.window, norm=self.norm,
        )  # fmt: skip
        return memo[name]

    def _boundaries(self, key: torch.Tensor, memo: dict[Any, torch.Tensor], row: int | None) -> torch.Tensor:
        length = key.shape[2]
        if self.boundaries == "fixed":
            return fixed_boundaries(length, self.chunk_size, device=key.device)
        predictor = self.boundary_predictor
        if predictor is not None and length < 2 * predictor.window:
            memo["boundaries", row] = torch.tensor([0, length], device=key.device).expand(key.shape[0], -1)
        elif predictor is not None:
            memo["boundaries", row] = decode_boundaries(
                predictor(key), self.threshold,
                max_chunks=max(length // self.query_block * self.chunks_per_block, 1), nms=self.nms,
                forced=(length - self.num_instruction,) if 0 < self.num_instruction < length else (),
                window=predictor.window,
            )  # fmt: skip
        if ("boundaries", row) not in memo:
            raise ValueError(
                f"layer {self.layer_idx} takes its boundaries from layer {self.shared_from}, which has not run before "
                'it; call the whole model, or set share="none".'
            )
        return memo["boundaries", row]

    def _by_blocks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Returns the outputs by the later version: blocks of keys, chosen by each head."""
        from undivided.ops.selected import selected_attention

        with torch.no_grad():
            count = max(1, int(self.density * -(-key.shape[2] // self.key_block)))
            chosen = choose_blocks(
                query, key, self.mode, count, self.query_block, self.key_block, self.variant
            )
            index, counts = block_lists(chosen)
        out, _ = selected_attention(
            query, key, value, index, counts, query_block_size=self.query_block, block_size=self.key_block,
            scale=self.scale, is_causal=True,
        )  # fmt: skip
        return out

    @property
    def spec(self) -> AttentionSpec:
        """What the layer computes of the tensors of `spec_inputs`; which pairs are admissible the state decides."""
        from undivided.spec import AttentionSpec, Carrier, Chart, Dot, Evidence, GivenMask, HeadMap

        return AttentionSpec(
            carrier=Carrier(
                (GivenMask("selected", state_free=False),), HeadMap(key_heads=self.num_key_value_heads)
            ),
            evidence=Evidence(Chart((Dot(scale=self.scale),), self.softcap)),
        )

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        """Returns the named tensors that `spec` reads; "chunks" with boundaries of its own only."""
        query, key, value = self.heads(hidden_states, position_embeddings)
        length = query.shape[2]
        mask = causal_mask(length, length, query.device, self.window)[None, None]
        if self._is_long(length):
            if self.mode == "chunks":
                sparse = length - self.num_instruction
                indices = self._selected(query[:, :, :sparse], key, {}, None)
                listed = torch.zeros(*indices.shape[:3], length + 1, dtype=torch.bool, device=query.device)
                listed.scatter_(-1, torch.where(indices >= 0, indices, length).long(), True)
                listed = listed[..., :length].repeat_interleave(self.query_block, dim=2)[:, :, :sparse]
                everything = listed.new_ones(*listed.shape[:2], self.num_instruction, length)
                mask = mask & torch.cat([listed, everything], dim=2)
            else:
                count = max(1, int(self.density * -(-length // self.key_block)))
                chosen = choose_blocks(
                    query, key, self.mode, count, self.query_block, self.key_block, self.variant
                )
                pairs = chosen.repeat_interleave(self.query_block, dim=2).repeat_interleave(
                    self.key_block, dim=3
                )
                mask = mask & pairs[:, :, :length, :length]
        return {"query": query, "key": key, "value": value, "selected": mask}
