"""Key-driven grouped-query attention: the norms of the keys decide how many query heads a key head serves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from undivided.layers.gqa import GQAttention
from undivided.layers.head_maps import allocate_query_heads, check_rule, head_counts, uniform_head_map
from undivided.layers.vision_gqa import VisionGQA
from undivided.ops import dense_attention

if TYPE_CHECKING:
    from undivided.layers.rotary import PositionEmbeddings
    from undivided.spec import AttentionSpec

VARIANTS = ("paper", "released")


class KeyDrivenGQA(VisionGQA):
    """KDGQA and DGQA: grouped-query attention in which key heads with larger keys serve more query heads.

    `y = concat_h(softmax(scale * q_h k_m(h)^T) v_m(h)) W_O`, with the head map m of `allocate_query_heads` for the
    norms `s_g = ||k_g||_F` over tokens and channels. Allocation is not differentiable; gradients pass through the
    attention alone.

    - rule "kd": from the keys of every forward. By default each image has the allocation of its own norms. The weakest
      key head is normally left out; of two key heads, the stronger one serves all query heads.
    - rules "dgqa_diff", "dgqa_ema": every `window`-th forward in training allocates anew, from the batch's mean norms
      and the cached ones; in between, and in evaluation, the last map stands.
    - `freeze` keeps one map for good: a static, non-uniform grouped-query attention that can be exported.

    With `variant="released"` it does as the authors' code: norms are summed over the batch, so that an image's output
    depends on its batch mates; DGQA draws its repairs at random, `cache <- (cache + s) / window` in training, and in
    evaluation every forward allocates anew and overwrites the cache, so that outputs depend on the batches before.
    The default differs in these points alone, and what the abstract leaves open is decided so: the cache of
    "dgqa_diff" is the norms at the last allocation (how they evolve), that of "dgqa_ema" the moving average itself;
    repairs are those of "kd".

    A step is a forward in training: with gradients accumulated over n batches, use n times the window. The authors
    count anew in each epoch (`layer.steps.zero_()`). Recomputing activations repeats a forward; freeze a DGQA layer
    before. Map, cache and steps are buffers and are saved.

    Args:
        dim, num_heads, num_key_value_heads: as in `VisionGQA`; G need not divide H.
        rule: "uniform", "kd", "dgqa_diff" or "dgqa_ema".
        window: steps from one allocation of DGQA to the next; the authors' example has 300, their layer 1.
        beta: weight of the present norms in "dgqa_ema".
        variant: "paper" or "released".
        frozen: the map is the stored one (at first the uniform one) and stays; set it before loading a frozen layer.
        generator: of the random repairs of "released".
        options: as in `VisionGQA`.

    Raises:
        ValueError: an option is unknown or out of range.

    Source: Key-Driven Grouped Query Attention (arXiv 2408.08454) and the authors' code.
    """

    head_map: torch.Tensor
    cache: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        num_key_value_heads: int | None = None,
        *,
        rule: str = "kd",
        window: int = 1,
        beta: float = 0.9,
        variant: str = "paper",
        frozen: bool = False,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, num_key_value_heads, **options)
        check_rule(rule)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not one of {', '.join(map(repr, VARIANTS))}.")
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 step.")
        if not 0 <= beta <= 1:
            raise ValueError(f"beta={beta} must be from 0 to 1.")
        self.rule = rule
        self.window = window
        self.beta = beta
        self.variant = variant
        self.frozen = frozen
        self.generator = generator
        device = self.k_proj.weight.device
        self.register_buffer("head_map", uniform_head_map(num_heads, self.num_key_value_heads).to(device))
        self.register_buffer("cache", torch.zeros(self.num_key_value_heads, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        return f"rule={self.rule!r}, window={self.window}, variant={self.variant!r}, frozen={self.frozen}"

    def choose_head_map(self, key: torch.Tensor) -> torch.Tensor | None:
        if self.frozen:
            return self.head_map
        if self.rule == "uniform":
            return super().choose_head_map(key)
        with torch.no_grad():
            norms = key_norms(key)
            if self.rule == "kd":
                return self.allocate(norms if self.variant == "paper" else norms.sum(0))
            return self._dynamic(norms)

    def allocate(self, norms: torch.Tensor) -> torch.Tensor:
        """Returns the head map `[..., H]` that the rule gives for norms `[..., G]` and the present cache."""
        random = self.variant == "released" and self.rule.startswith("dgqa")
        return allocate_query_heads(
            norms, self.num_heads, self.rule, cache=self.cache, beta=self.beta, random_repair=random,
            generator=self.generator,
        )  # fmt: skip

    def _dynamic(self, norms: torch.Tensor) -> torch.Tensor:
        """Allocates where it is due and updates the state, without waiting for the device to know whether it is."""
        if self.variant == "paper":
            if not self.training:
                return self.head_map
            norms = norms.mean(0)
            cache = self.beta * norms + (1 - self.beta) * self.cache if self.rule == "dgqa_ema" else norms
        else:
            norms = norms.sum(0)
            cache = (self.cache + norms) / self.window if self.training else norms
        head_map = self.allocate(norms)
        if self.training:
            due = self.steps % self.window == 0
            head_map = torch.where(due, head_map, self.head_map)
            cache = torch.where(due, cache, self.cache)
            self.steps += 1
        self.cache.copy_(cache)
        # The attention keeps its map for the backward pass, and the next forward overwrites the buffer.
        self.head_map.copy_(head_map)
        return head_map

    @torch.no_grad()
    def freeze(self, hidden_states: torch.Tensor | None = None, *, norms: torch.Tensor | None = None) -> None:
        """Fixes the head map.

        Args:
            hidden_states: calibration inputs of the layer, `[B, N, C]`: the map is what the rule gives for the mean
                norms of their keys. Without them and `norms` it is the stored one, such as that of a trained DGQA.
            norms: mean norms `[G]`, already measured.
        """
        if hidden_states is not None:
            norms = key_norms(self.heads(hidden_states)[1]).mean(0)
        if norms is not None:
            self.head_map.copy_(self.allocate(norms))
        self.frozen = True

    def allocation(self, hidden_states: torch.Tensor | None = None) -> torch.Tensor:
        """Returns how many query heads each key head serves, `[G]` or `[B, G]`: for these inputs, or as stored."""
        if hidden_states is None or self.frozen or self.rule.startswith("dgqa") or self.rule == "uniform":
            return head_counts(self.head_map, self.num_key_value_heads)
        head_map = cast(torch.Tensor, self.choose_head_map(self.heads(hidden_states)[1]))
        return head_counts(head_map, self.num_key_value_heads)


def key_norms(key: torch.Tensor) -> torch.Tensor:
    """Returns the Frobenius norm of each key head over tokens and channels, `[B, G]`, in float32 at least."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    return torch.linalg.vector_norm(key, dim=(2, 3), dtype=dtype)


class KDGQAttention(GQAttention):
    """Grouped-query attention of a decoder with a head map frozen beforehand: key heads serve unequal numbers of heads.

    `y = concat_h(softmax(scale * q_h k_m(h)^T) v_m(h)) W_O`, rotary positions on q and k. Cached a token:
    `2 * G * head_dim` numbers. A map chosen from the keys at hand would be that of a whole text: a token's output would
    depend on later tokens, and each step of decoding would use another map than the steps before. So the map is
    calibrated once (`undivided.convert.kdgqa`) and stays.

    Args:
        hidden_size, num_attention_heads, num_key_value_heads, head_dim: as in `GQAttention`.
        head_map: key head of each query head, H numbers; default the uniform map.
        rule: "frozen"; others are refused.
        query_bias, key_value_bias, output_bias, scale, softcap, layer_idx: as in `GQAttention`.

    Raises:
        ValueError: a map that does not fit, or a rule that would choose one while the model runs.

    Source: Key-Driven Grouped Query Attention (arXiv 2408.08454), for vision transformers; a decoder is not described.
    """

    mechanism = "kdgqa"
    head_map: torch.Tensor

    def __init__(
        self,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        *,
        head_map: Sequence[int] | None = None,
        rule: str = "frozen",
        query_bias: bool = False,
        key_value_bias: bool = False,
        output_bias: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layer_idx: int = 0,
    ) -> None:
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
        if rule != "frozen":
            raise ValueError(
                f"rule={rule!r} would choose the head map from the keys of a whole text, which is neither causal nor "
                'can be cached; calibrate a map with undivided.convert.kdgqa and leave rule="frozen".'
            )
        if head_map is None:
            stored = uniform_head_map(num_attention_heads, num_key_value_heads)
        else:
            check_head_map(head_map, num_attention_heads, num_key_value_heads)
            stored = torch.tensor(list(head_map))
        self.register_buffer("head_map", stored.to(self.k_proj.weight.device))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        return cast(
            torch.Tensor,
            dense_attention(
                query, key, value, key_head_map=self.head_map, attn_mask=mask, is_causal=mask is None,
                scale=self.scale, softcap=self.softcap,
            ),
        )  # fmt: skip

    @property
    def spec(self) -> AttentionSpec:
        from undivided.spec.carrier import Carrier, Causal, HeadMap

        heads = HeadMap(key_heads=self.num_key_value_heads, assignment="head_map")
        return dataclasses.replace(super().spec, carrier=Carrier((Causal(),), heads))

    def spec_inputs(
        self, hidden_states: torch.Tensor, position_embeddings: PositionEmbeddings | None
    ) -> dict[str, torch.Tensor]:
        return super().spec_inputs(hidden_states, position_embeddings) | {"head_map": self.head_map}


def check_head_map(head_map: Sequence[int], num_heads: int, num_key_value_heads: int) -> None:
    """Raises a ValueError unless a map names a key head for each query head."""
    if len(head_map) != num_heads or any(not 0 <= head < num_key_value_heads for head in head_map):
        raise ValueError(
            f"head_map={list(head_map)} must hold {num_heads} numbers from 0 to {num_key_value_heads - 1}, the key "
            "head of each query head."
        )
