"""Native sparse attention: compressed blocks, selected blocks and a window, mixed by gates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from undivided.layers._base import check_arguments
from undivided.layers._padding import packed_texts, padding_before
from undivided.layers.gqa import GQAttention
from undivided.layers.rotary import PositionEmbeddings, apply_rotary, rotary_tables
from undivided.ops import dense_attention
from undivided.ops.compressed import compressed_attention, compressed_blocks, select_compressed
from undivided.ops.selected import selected_attention

if TYPE_CHECKING:
    from undivided.ops.block_map import BlockLists
    from undivided.spec import AttentionSpec

COMPRESSIONS = ("linear", "mean", "mlp")
GATES = ("token", "head")
SCORES = ("group", "first_head")
BRANCHES = ("compressed", "selected", "window")


class NSAttention(GQAttention):
    """Native sparse attention (NSA), with the kernels of Flash Sparse Attention (FSA): the same function, other loops.

    `y_t = concat_h(sum_c sigmoid(x_t W_gate)_c Attn_c(q_h,t)) W_O` over three branches c. *Compressed*: keys and values
    `phi(k_{id .. id+l-1})` of the blocks i of l tokens, every d tokens, that end at t or before; l - 1 tokens see none
    and get 0. *Selected*: all tokens up to t of `topk` blocks of `block_size` tokens, those with the largest compressed
    weights, summed over the heads of a group, which share the choice; the first and the local blocks are always among
    them. *Window*: the last `window` tokens. Keys are compressed before their rotary positions and then rotated by the
    position of their block's first token. The three branches share keys and values. No gradient passes the selection.

    Cached a token: `2 G head_dim (1 + 1 / d)` numbers, and raw keys of less than a block. A batch with padding keeps
    all raw keys, and is decoded row by row: its blocks begin at different columns. Texts packed into one row are
    attended one after the other, each with blocks of its own.

    Args:
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: as in `GQAttention`.
        kernel_size: tokens l of a compressed block.
        kernel_stride: tokens d from one compressed block to the next; divides `kernel_size` and `block_size`.
        block_size: tokens of a block that is selected.
        topk: blocks that a token selects, the given ones included.
        init_blocks: blocks at the start that are always selected.
        local_blocks: blocks up to the token's own that are always selected.
        window: tokens that the window branch sees, the token itself included. (The authors of FSA have 513.)
        compression: phi: "linear", a matrix over the block's tokens with learned positions for keys, as in FSA; "mean";
            or "mlp", the matrix, SiLU and a second one (NSA names a network, but not its form).
        gate: "token", three gates a token, as in FSA; "head", three for each head.
        gate_bias: whether the gates have a bias.
        scores: "group", the sum over the heads of a group, or "first_head", as the authors' release of FSA.
        query_bias, key_value_bias, output_bias, scale, softcap, layer_idx: as in `GQAttention`; softcap must be None.

    Raises:
        ValueError: sizes do not fit each other, an option is unknown, or a softcap is given.

    Source: Native Sparse Attention (arXiv 2502.11089), section 3; Flash Sparse Attention (arXiv 2508.18224).
    """

    mechanism = "nsa"

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        topk: int = 16,
        init_blocks: int = 1,
        local_blocks: int = 2,
        window: int = 512,
        compression: str = "linear",
        gate: str = "token",
        gate_bias: bool = False,
        scores: str = "group",
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
        super().__init__(
            hidden_size, num_attention_heads, num_key_value_heads, head_dim, query_bias=query_bias,
            key_value_bias=key_value_bias, output_bias=output_bias, scale=scale, layer_idx=layer_idx,
        )  # fmt: skip
        _check_sizes(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks, window)
        for name, value, allowed in (
            ("compression", compression, COMPRESSIONS),
            ("gate", gate, GATES),
            ("scores", scores, SCORES),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
        if softcap is not None:
            raise ValueError(f"softcap={softcap}: native sparse attention does not cap its logits; use None.")
        self.kernel_size, self.kernel_stride, self.block_size = kernel_size, kernel_stride, block_size
        self.topk, self.init_blocks, self.local_blocks = topk, init_blocks, local_blocks
        self.window = window
        self.scores = scores
        sizes = (num_key_value_heads, kernel_size, head_dim, compression)
        self.compress_key = BlockCompression(*sizes, has_position=True)
        self.compress_value = BlockCompression(*sizes, has_position=False)
        gates = 3 if gate == "token" else 3 * num_attention_heads
        self.gate_proj = nn.Linear(hidden_size, gates, bias=gate_bias)
        nn.init.xavier_uniform_(self.gate_proj.weight)

    @torch.no_grad()
    def start_from_attention(self) -> None:
        """Sets what a layer of grouped-query attention has not: blocks are means, and gates open the selection.

        With `gate_bias` the gates are `sigmoid(-4), sigmoid(4), sigmoid(-4)`, of all tokens: a text of up to `topk`
        blocks is then attended nearly as before, by 0.98 of it. Without, all are 1/2: full attention of short texts
        comes twice, from the selected blocks and from the window, each by half.
        """
        for module in (self.compress_key, self.compress_value):
            module.start_from_mean()
        nn.init.zeros_(self.gate_proj.weight)
        if self.gate_proj.bias is not None:
            start = self.gate_proj.bias.new_tensor([-4.0, 4.0, -4.0])
            self.gate_proj.bias.copy_(start.repeat(self.gate_proj.bias.numel() // 3))

    @property
    def spec(self) -> AttentionSpec:
        """Raises a NotImplementedError: the language has no branches that gates add up."""
        raise NotImplementedError(
            f'mechanism "{self.mechanism}" is not written in the specification language.'
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: PositionEmbeddings | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        check_arguments(self.mechanism, **kwargs)
        query, raw, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is None:
            raise ValueError("position_embeddings is None; give the tables of the base model.")
        cos, sin = rotary_tables(position_embeddings)
        query, key = (apply_rotary(x, cos, sin, interleaved=False) for x in (query, raw))
        length, cache = query.shape[2], None
        if past_key_values is not None:
            from undivided.layers._nsa_cache import NSACacheLayer
            from undivided.layers._own_cache import own_cache_layer

            cache = own_cache_layer(past_key_values, self.layer_idx, NSACacheLayer, NSACacheLayer)
        before = 0 if cache is None else int(cache.get_seq_length())
        texts = packed_texts(attention_mask, length) if cache is None else None
        if texts is not None and len(texts) == 1:
            # One mask for all rows.
            texts = texts * len(query)
        padding = None if texts is not None else padding_before(attention_mask, length, before + length)
        if cache is not None and past_key_values is not None:
            if before == 0:
                cache.is_padded = padding is not None
            elif padding is not None and not cache.is_padded:
                raise ValueError(
                    "attention_mask hides the first tokens of a cache that was filled without padding; start it anew."
                )
            key, value = past_key_values.update(key, value, self.layer_idx)
            raw, cos, sin = cache.extend(raw, cos, sin)
        if texts is not None:
            out = self._text_by_text(query, raw, key, value, cos, sin, self.gates(hidden_states), texts)
        elif padding is not None and before == 0:
            out = self._moved_to_front(query, raw, key, value, cos, sin, self.gates(hidden_states), padding)
        elif cache is not None and cache.is_padded:
            skipped = [0] * len(query) if padding is None else padding.tolist()
            starts = [[min(first, key.shape[2])] for first in skipped]
            out = self._text_by_text(query, raw, key, value, cos, sin, self.gates(hidden_states), starts)
        else:
            # The raw keys at hand are the last ones.
            values = value[:, :, value.shape[2] - raw.shape[2] :]
            compressed = self.compress(raw, values, cos, sin)
            if cache is not None:
                cache.compress(*compressed, compressed[0].shape[2] * self.kernel_stride)
                compressed = (cache.compressed_keys, cache.compressed_values)
            out = self.mix(query, key, value, *compressed, self.gates(hidden_states))
        return self.o_proj(out.transpose(1, 2).flatten(2)), None

    def gates(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns the gates of the branches, `[3, B, H or 1, N, 1]`."""
        gates = torch.sigmoid(self.gate_proj(hidden_states)).unflatten(-1, (-1, 3))
        return gates.permute(3, 0, 2, 1)[..., None]

    def compress(
        self, raw: torch.Tensor, value: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns keys and values of the whole blocks, `[B, G, blocks, head_dim]`, keys with rotary positions.

        Args:
            raw, value: keys before their positions, and values, `[B, G, M, head_dim]`; the first block begins at the
                first of them.
            cos, sin: tables of their positions, `[B or 1, M, head_dim / 2]`.
        """
        blocks = compressed_blocks(raw.shape[2], self.kernel_size, self.kernel_stride)
        if blocks == 0:
            return raw[:, :, :0], value[:, :, :0]
        keys, values = (
            module(x.unfold(2, self.kernel_size, self.kernel_stride).transpose(-1, -2))
            for module, x in ((self.compress_key, raw), (self.compress_value, value))
        )
        starts = slice(0, blocks * self.kernel_stride, self.kernel_stride)
        return apply_rotary(keys, cos[:, starts], sin[:, starts], interleaved=False), values

    def mix(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        compressed_key: torch.Tensor,
        compressed_value: torch.Tensor,
        gates: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the gated sum of the branches, `[B, H, N, head_dim]`, of texts without padding.

        Args:
            query: of the last N tokens, `[B, H, N, head_dim]`.
            key, value: of all tokens, `[B, G, M, head_dim]`.
            compressed_key, compressed_value: `[B, G, blocks, head_dim]`.
            gates: `[3, B, H or 1, N, 1]`.
        """
        num_keys = key.shape[2]
        compressed, lse = self.attend_compressed(query, compressed_key, compressed_value, num_keys)
        selected = self.attend_selected(query, key, value, *self.select(query, compressed_key, lse, num_keys))
        window = dense_attention(query, key, value, is_causal=True, window=self.window, scale=self.scale)
        # Three passes over the outputs in place of five.
        return torch.addcmul(torch.addcmul(gates[0] * compressed, gates[1], selected), gates[2], window)

    def attend_compressed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_keys: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the compressed branch and its log-sum-exp, of queries that are the last of `num_keys` tokens."""
        return compressed_attention(
            query, key, value, num_keys, kernel_size=self.kernel_size, kernel_stride=self.kernel_stride,
            scale=self.scale,
        )  # fmt: skip

    def attend_selected(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor,
        counts: torch.Tensor,
    ) -> torch.Tensor:
        """Returns the selected branch, `[B, H, N, head_dim]`, of the lists that `select` gives."""
        out, _ = selected_attention(
            query, key, value, index, counts, query_block_size=1, block_size=self.block_size, scale=self.scale,
            is_causal=True,
        )  # fmt: skip
        return out

    def select(self, query: torch.Tensor, key: torch.Tensor, lse: torch.Tensor, num_keys: int) -> BlockLists:
        """Returns the blocks that each query attends, by the weights of the compressed branch.

        Args:
            query: of the last tokens, `[B, H, N, head_dim]`.
            key: compressed keys, `[B, G, blocks, head_dim]`.
            lse: of the compressed branch, `[B, H, N]`.
            num_keys: tokens so far.
        """
        if self.scores == "first_head":
            group = query.shape[1] // key.shape[1]
            query, lse = query[:, ::group], lse[:, ::group]
        return select_compressed(
            query, key, lse, num_keys, kernel_size=self.kernel_size, kernel_stride=self.kernel_stride,
            block_size=self.block_size, topk=self.topk, init_blocks=self.init_blocks,
            local_blocks=self.local_blocks, scale=self.scale,
        )  # fmt: skip

    def load_official(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Loads the weights of one `NativeSparseAttention` of the authors' release; needs the default options.

        Its window of 512 is 513 tokens here, and it scores with the first head of each group: `window=513`,
        `scores="first_head"` compute what it does.

        Args:
            state_dict: names and weights of that module.

        Raises:
            RuntimeError: a weight is missing or has another shape.
        """
        names = {
            "proj_q.weight": "q_proj.weight",
            "proj_k.weight": "k_proj.weight",
            "proj_v.weight": "v_proj.weight",
            "proj_o.weight": "o_proj.weight",
            "compress_key": "compress_key.weight",
            "compress_value": "compress_value.weight",
            "intra_block_pe": "compress_key.position",
            "gate.0.weight": "gate_proj.weight",
        }
        self.load_state_dict({names[n]: weight for n, weight in state_dict.items() if n in names})

    def _moved_to_front(
        self,
        query: torch.Tensor,
        raw: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        gates: torch.Tensor,
        padding: torch.Tensor,
    ) -> torch.Tensor:
        """The branches of whole texts, which are moved to the first column: padding behind a text is not seen."""
        query, raw, key, value = (moved(x, padding) for x in (query, raw, key, value))
        cos, sin = (moved(x[:, None].expand(len(padding), -1, -1, -1), padding)[:, 0] for x in (cos, sin))
        gates = torch.stack([moved(x, padding) for x in gates])
        out = self.mix(query, key, value, *self.compress(raw, value, cos, sin), gates)
        return moved(out, -padding)

    def _text_by_text(
        self,
        query: torch.Tensor,
        raw: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        gates: torch.Tensor,
        starts: list[list[int]],
    ) -> torch.Tensor:
        """The branches of texts that begin at different columns, and so have their blocks elsewhere.

        Args:
            query: of the last columns; the others of all.
            starts: the columns at which the texts of each row begin, one behind the other up to the last column; what
                is before the first is padding, and has no output.
        """
        rows = []
        num_keys = key.shape[2]
        before = num_keys - query.shape[2]
        for row, firsts in enumerate(starts):
            one = slice(row, row + 1)
            tables = [table[one] if len(table) > 1 else table for table in (cos, sin)]
            parts = [query.new_zeros((1, query.shape[1], max(firsts[0] - before, 0), value.shape[3]))]
            for first, last in zip(firsts, [*firsts[1:], num_keys], strict=True):
                own, asked = slice(first, last), slice(max(first - before, 0), last - before)
                own_key, own_value = key[one, :, own], value[one, :, own]
                compressed = self.compress(raw[one, :, own], own_value, *(x[:, own] for x in tables))
                parts.append(
                    self.mix(query[one, :, asked], own_key, own_value, *compressed, gates[:, one, :, asked])
                )
            rows.append(torch.cat(parts, dim=2))
        return torch.cat(rows)


def moved(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Returns `x [B, heads, N, D]` with each row of the batch rolled to the front by its number of columns."""
    place = (torch.arange(x.shape[2], device=x.device) + columns[:, None]) % x.shape[2]
    return x.gather(2, place[:, None, :, None].expand(x.shape))


class BlockCompression(nn.Module):
    """One key or value for a block of tokens, `phi(x) = vec(x + p) W`, with weights of each key head.

    Args:
        heads: key heads G.
        kernel_size: tokens l of a block.
        head_dim: width D of a head.
        kind: "linear", "mean" (no weights) or "mlp" (SiLU and a second matrix behind the first).
        has_position: whether a learned position p of each token in the block is added, with "linear" and "mlp".
    """

    def __init__(
        self, heads: int, kernel_size: int, head_dim: int, kind: str = "linear", *, has_position: bool
    ) -> None:
        super().__init__()
        self.weight, self.position, self.second = None, None, None
        if kind == "mean":
            return
        self.weight = nn.Parameter(torch.empty(heads, kernel_size * head_dim, head_dim))
        if has_position:
            self.position = nn.Parameter(torch.empty(heads, kernel_size, head_dim))
        if kind == "mlp":
            self.second = nn.Parameter(torch.empty(heads, head_dim, head_dim))
        for parameter in self.parameters():
            for part in parameter:
                nn.init.xavier_uniform_(part)

    @torch.no_grad()
    def start_from_mean(self) -> None:
        """Makes the linear map the mean of the tokens; the second matrix of a network stays as it is."""
        if self.weight is None:
            return
        head_dim = self.weight.shape[-1]
        tokens = self.weight.shape[1] // head_dim
        mean = torch.eye(head_dim, device=self.weight.device, dtype=self.weight.dtype) / tokens
        self.weight.copy_(mean.repeat(tokens, 1))
        if self.position is not None:
            nn.init.zeros_(self.position)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        """Returns `[B, G, blocks, D]` of blocks `[B, G, blocks, l, D]`."""
        if self.weight is None:
            return blocks.mean(dim=-2)
        weight = self.weight.to(blocks.dtype)
        out = blocks.flatten(-2) @ weight
        if self.position is not None:
            # The same for all blocks: a bias.
            out = out + self.position.to(blocks.dtype).flatten(1)[:, None] @ weight
        if self.second is not None:
            out = nn.functional.silu(out) @ self.second.to(blocks.dtype)
        return out


def _check_sizes(
    kernel_size: int, kernel_stride: int, block_size: int, topk: int, init_blocks: int, local_blocks: int, window: int
) -> None:  # fmt: skip
    for name, size, least in (
        ("kernel_stride", kernel_stride, 1),
        ("kernel_size", kernel_size, 1),
        ("block_size", block_size, 1),
        ("topk", topk, 1),
        ("init_blocks", init_blocks, 0),
        ("local_blocks", local_blocks, 1),
        ("window", window, 1),
    ):
        if size < least:
            raise ValueError(f"{name}={size} must be at least {least}.")
    for name, size in (("kernel_size", kernel_size), ("block_size", block_size)):
        if size % kernel_stride:
            raise ValueError(
                f"kernel_stride={kernel_stride} does not divide {name}={size}; overlaps of blocks are counted in "
                "strides."
            )
    if topk < init_blocks + local_blocks:
        raise ValueError(
            f"topk={topk} is less than init_blocks={init_blocks} plus local_blocks={local_blocks}, which are always "
            "selected."
        )
