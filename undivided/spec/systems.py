"""The systems of the library as specifications, by slug.

A system here is the attention operator alone: `inputs` says in words what the layer computes before it
(projections, convolutions, routers), and the output projection comes after it.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass

from undivided.spec.carrier import Carrier, Causal, GivenMask, HeadMap, Merge, NullSource, Window
from undivided.spec.evidence import Alibi, Chart, Cosine, Dot, Evidence, Identity, Relative, Relu
from undivided.spec.regime import (
    Column,
    ColumnSum,
    Entmax,
    NoAnchor,
    Plan,
    Raw,
    Sinkhorn,
    Support,
    TopK,
)
from undivided.spec.specification import (
    AttentionSpec,
    Gate,
    Perturb,
    RmsNorm,
    Scale,
    Source,
    Term,
    standard,
)

_CAUSAL = (Causal(),)


@dataclass(frozen=True)
class SpecifiedSystem:
    """A system written in the language.

    Args:
        slug: the name; that of the catalog for the systems it lists.
        name: the name its field uses.
        build: makes the specification from options; `spec` is the one with the defaults.
        inputs: what the named tensors are, where it is not the plain projection.
        source: paper and section.
        remark: what the specification cannot say, in one sentence; empty if there is nothing.
    """

    slug: str
    name: str
    build: Callable[..., AttentionSpec]
    inputs: tuple[tuple[str, str], ...] = ()
    source: str = ""
    remark: str = ""

    @property
    def spec(self) -> AttentionSpec:
        """The specification with default options."""
        return self.build()


def gqa(
    key_heads: int | None = None, scale: float | None = None, softcap: float | None = None
) -> AttentionSpec:
    """Grouped-query attention: key heads divide query heads."""
    return AttentionSpec(
        carrier=Carrier(_CAUSAL, HeadMap(key_heads=key_heads)), evidence=_dot_product(scale, softcap)
    )


def sqa(query_heads: int = 8, key_heads: int = 4) -> AttentionSpec:
    """Sparse query attention: fewer query heads than the width of a head implies."""
    return AttentionSpec(carrier=Carrier(_CAUSAL, HeadMap(query_heads, key_heads)))


def gda(
    lambda_init: float = 0.2, eps: float = 1e-5, scale: float | None = None, softcap: float | None = None
) -> AttentionSpec:
    """Grouped differential attention: signal maps minus lambda times the noise map of their group."""
    noise = Term(-1.0, "lambda", (("query", "query_noise"), ("key", "key_noise")))
    return AttentionSpec(
        carrier=Carrier(_CAUSAL),
        evidence=_dot_product(scale, softcap),
        mix=(Term(), noise),
        update=(RmsNorm(eps=eps), Scale(1.0 - lambda_init)),
    )


def gda_v2(scale: float | None = None, softcap: float | None = None) -> AttentionSpec:
    """Grouped differential attention, second version: both maps on the same keys, lambda of a token and a head."""
    noise = Term(-1.0, "lambda", (("query", "query_noise"),))
    return AttentionSpec(carrier=Carrier(_CAUSAL), evidence=_dot_product(scale, softcap), mix=(Term(), noise))


def gdla(
    nope_dim: int = 128,
    rope_dim: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
    gate: bool = False,
) -> AttentionSpec:
    """Grouped differential latent attention: signal maps minus lambda times noise maps, on one latent."""
    whole = mla(1, nope_dim, rope_dim, scale, softcap)
    own = {"query": nope_dim, "key_up": nope_dim, "query_rope": rope_dim, "value_up": 1}
    renamed = tuple((name, f"{name}_noise") for name, dim in own.items() if dim)
    update = (Gate("gate"),) if gate else ()
    return dataclasses.replace(whole, mix=(Term(), Term(-1.0, "lambda", renamed)), update=update)


def moh() -> AttentionSpec:
    """Mixture of heads: every token weighs the outputs of the heads."""
    return AttentionSpec(carrier=Carrier(_CAUSAL), update=(Gate("gates"),))


def dha() -> AttentionSpec:
    """Decoupled heads: key heads and value heads are shared by groups of their own."""
    return AttentionSpec(
        carrier=Carrier(_CAUSAL, HeadMap(assignment="key_head_map", value_assignment="value_head_map"))
    )


def kdgqa() -> AttentionSpec:
    """Key-driven grouped-query attention: the keys' norms decide how many query heads a key head serves."""
    return AttentionSpec(carrier=Carrier(heads=HeadMap(assignment="head_map")))


def pgqa() -> AttentionSpec:
    """Perturbed grouped-query attention: standardised noise is subtracted from the outputs."""
    return AttentionSpec(update=(Perturb("noise"),))


def convit(scale: float | None = None) -> AttentionSpec:
    """Gated positional self-attention: one map by content and one by position, mixed by a gate of each head."""
    position = (("query", "query_position"), ("key", "key_position"))
    mix = (Term(1.0, "content_gate"), Term(1.0, "position_gate", position))
    return AttentionSpec(evidence=_dot_product(scale, None), mix=mix)


def cca(key_heads: int | None = None) -> AttentionSpec:
    """Compressed convolutional attention: cosine scores of convolved latents."""
    return AttentionSpec(
        carrier=Carrier(_CAUSAL, HeadMap(key_heads=key_heads)),
        evidence=Evidence(Chart((Cosine(temperature="temperature"),))),
    )


def mla(
    latent_heads: int | None = 1,
    nope_dim: int = 128,
    rope_dim: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """Multi-head latent attention: score and payload read one latent, through maps of each head.

    `scale` defaults to `(nope_dim + rope_dim) ** -0.5`, whatever the width of the latent. Without `rope_dim`
    there is no rope term, without `nope_dim` no latent term.
    """
    factor = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
    terms = (Dot("query", "latent", factor, "key_up"), Dot("query_rope", "rope_key", factor))
    kept = tuple(term for term, dim in zip(terms, (nope_dim, rope_dim), strict=True) if dim)
    return AttentionSpec(
        carrier=Carrier(_CAUSAL, HeadMap(key_heads=latent_heads)),
        evidence=Evidence(Chart(kept, softcap)),
        payload=Source("latent", "value_up"),
    )


def gla(
    num_latent_heads: int = 2,
    nope_dim: int = 128,
    rope_dim: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """Grouped latent attention: each group of heads has a latent of its own."""
    return mla(num_latent_heads, nope_dim, rope_dim, scale, softcap)


def tpla(
    num_shards: int = 2,
    nope_dim: int = 128,
    rope_dim: int = 64,
    scale: float | None = None,
    softcap: float | None = None,
) -> AttentionSpec:
    """Tensor-parallel latent attention: every head attends in each shard; the results add up."""
    base = mla(1, nope_dim, rope_dim, scale, softcap)
    names = ("latent", "key_up", "value_up")
    shards = tuple(Term(1.0, None, tuple((name, f"{name}_{j}") for name in names)) for j in range(num_shards))
    return dataclasses.replace(base, mix=shards)


def alibi() -> AttentionSpec:
    """Attention with linear biases: a baseline that falls with the distance."""
    return AttentionSpec(carrier=Carrier(_CAUSAL), evidence=Evidence(baseline=(Alibi(),)))


def sliding_window(window: int = 128) -> AttentionSpec:
    """Causal attention to the last `window` tokens."""
    return AttentionSpec(carrier=Carrier((Window(window - 1),)))


def relative() -> AttentionSpec:
    """Attention with a learned number for each head and distance."""
    return AttentionSpec(evidence=Evidence(Chart((Dot(scale=1.0),)), (Relative(),)))


def differential(lambda_init: float = 0.2, eps: float = 1e-5) -> AttentionSpec:
    """Differential attention: as many noise maps as signal maps."""
    return gda(lambda_init, eps)


def gated() -> AttentionSpec:
    """Gated attention: every channel of a head's output times a sigmoid of the token."""
    return AttentionSpec(carrier=Carrier(_CAUSAL), update=(Gate("gate"),))


def sink() -> AttentionSpec:
    """Attention with a sink: a null source takes what no key deserves."""
    return AttentionSpec(Carrier(_CAUSAL, empty_row=NullSource("sink_logit")))


def query_key_norm() -> AttentionSpec:
    """Query-key normalisation: a learned factor times the cosine."""
    return AttentionSpec(
        carrier=Carrier(_CAUSAL), evidence=Evidence(Chart((Cosine(scale=1.0, temperature="temperature"),)))
    )


def token_merging() -> AttentionSpec:
    """Token merging: a merged key counts as often as the keys it stands for."""
    return AttentionSpec(Carrier(source_map=Merge()))


def neighborhood() -> AttentionSpec:
    """Neighborhood attention: the nearest keys, the window shifted and not cut at the borders."""
    return AttentionSpec(Carrier((GivenMask("neighborhood"),)))


def top_k(k: int = 32) -> AttentionSpec:
    """Explicit sparse attention: softmax over the k largest scores."""
    return AttentionSpec(carrier=Carrier(_CAUSAL), probe=Support(), anchor=TopK(k))


def entmax(alpha: float = 1.5) -> AttentionSpec:
    """Adaptively sparse attention: entmax in the place of softmax."""
    return AttentionSpec(carrier=Carrier(_CAUSAL), probe=Support(), anchor=Entmax(alpha))


def retention(eps: float = 1e-5) -> AttentionSpec:
    """Retention: a product that fades with the distance, without a normaliser over keys."""
    return AttentionSpec(
        Carrier(_CAUSAL),
        Evidence(baseline=(Alibi(),), link=Identity()),
        Raw(),
        NoAnchor(),
        update=(RmsNorm(None, eps),),
    )


def slot() -> AttentionSpec:
    """Inverted attention: softmax over the receivers, which compete for sources."""
    return AttentionSpec(probe=Column(), anchor=ColumnSum())


def sinkhorn(num_iterations: int = 5) -> AttentionSpec:
    """Doubly stochastic attention."""
    return AttentionSpec(probe=Plan(), anchor=Sinkhorn(num_iterations))


def linear(feature: str = "elu1", normalised: bool = True) -> AttentionSpec:
    """Linear attention: positive features in the place of the exponential; anchored by rows, or raw."""
    chart = Chart((Dot(scale=1.0, feature=feature),))
    if normalised:
        # On products of positive features relu is the identity, and declares that weights cannot be negative.
        return AttentionSpec(Carrier(_CAUSAL), Evidence(chart, link=Relu()))
    return AttentionSpec(Carrier(_CAUSAL), Evidence(chart, link=Identity()), Raw(), NoAnchor())


def _dot_product(scale: float | None, softcap: float | None) -> Evidence:
    return Evidence(Chart((Dot(scale=scale),), softcap))


_LATENT_INPUTS = (
    ("latent", "norm(x W_DKV), one row for all heads; what is cached, with rope_key"),
    ("rope_key", "RoPE(x W_KR), one for all heads"),
    ("key_up, value_up", "a head's part of the up-projection"),
)

SYSTEMS: dict[str, SpecifiedSystem] = {
    system.slug: system
    for system in (
        SpecifiedSystem(
            "gqa", "GQA (with MHA and MQA)", gqa, source="GQA (arXiv 2305.13245), section 2",
        ),
        SpecifiedSystem(
            "sqa", "SQA", sqa,
            source="SQA (arXiv 2510.01817)",
            remark="The head's width stays hidden_size / num_heads, so fewer heads are fewer operations.",
        ),
        SpecifiedSystem(
            "gda", "GDA", gda,
            (
                ("query, query_noise", "signal and noise heads; a noise head serves a group of signal heads"),
                ("key, key_noise", "keys of the two kinds"),
                ("value", "the values of both kinds side by side, twice as wide"),
                ("lambda", "one learned number a layer"),
            ),
            "Grouped Differential Attention (arXiv 2510.06949)",
            "A signed mix: rows add up to 1 - lambda, and there is no potential and no divergence.",
        ),
        SpecifiedSystem(
            "moh", "MoH", moh,
            (("gates", "a router's weight of each head and token, zero for the heads not chosen"),),
            "MoH (arXiv 2410.11842), section 3",
            "The gates depend on the receiver, not on the pair: no key or value can be left out.",
        ),
        SpecifiedSystem(
            "dha", "DHA", dha,
            (("key_head_map, value_head_map", "which fused key head and value head a query head reads"),),
            "DHA (arXiv 2406.06567)",
        ),
        SpecifiedSystem(
            "kdgqa", "KDGQA / DGQA", kdgqa,
            (("head_map", "key head of each query head, from the norms of the keys of the whole batch"),),
            "Key-Driven Grouped Query Attention (arXiv 2408.08454)",
            "The head map is chosen by the state, so samples of a batch influence one another.",
        ),
        SpecifiedSystem(
            "pgqa", "PGQA", pgqa,
            (("noise", "uniform noise without its diagonal, standardised per head"),),
            "Key-Driven Grouped Query Attention (arXiv 2408.08454)",
        ),
        SpecifiedSystem(
            "convit", "ConViT (GPSA)", convit,
            (
                ("content_gate, position_gate", "1 - sigmoid and sigmoid of one learned number a head"),
                ("query_position, key_position", "of rank 3: a quadratic form of the offset between two tokens"),
            ),
            "ConViT (arXiv 2103.10697), section 3",
            "The maps are mixed after their softmax; a sum of the logits would be another system.",
        ),
        SpecifiedSystem(
            "cca", "CCA / CCGQA", cca,
            (
                ("query, key", "two causal convolutions over narrow latents, plus the mean of query and key"),
                ("value", "half of the heads from this token, half from the one before"),
                ("temperature", "a factor of each key head"),
            ),
            "Compressed Convolutional Attention (arXiv 2510.04476)",
            "RoPE follows the normalisation and keeps lengths, so the cosine is that of the rotated vectors.",
        ),
        SpecifiedSystem(
            "mla", "MLA", mla, _LATENT_INPUTS, "DeepSeek-V2 (arXiv 2405.04434), section 2.1",
        ),
        SpecifiedSystem(
            "gla", "GLA", gla,
            (("latent", "as many as groups; a head reads that of its group"), *_LATENT_INPUTS[1:]),
            "Hardware-Efficient Attention for Fast Decoding (arXiv 2505.21487)",
        ),
        SpecifiedSystem(
            "tpla", "TPLA", tpla,
            (("latent_j", "shard j of the latent, normalised by its own energy"), *_LATENT_INPUTS[1:]),
            "TPLA (arXiv 2508.15881)",
            "The logit scale of a shard is part of its key_up.",
        ),
        SpecifiedSystem(
            "transmla", "TransMLA", mla,
            (
                ("latent", "principal components of balanced keys and values, without a normalisation"),
                *_LATENT_INPUTS[1:],
            ),
            "TransMLA (arXiv 2502.07864)",
            "The operator is MLA's; the method is how its weights come from a grouped-query model.",
        ),
        SpecifiedSystem(
            "x_ecomla", "X-EcoMLA", mla,
            (("latent", "singular vectors of the stacked key and value weights"), *_LATENT_INPUTS[1:]),
            "X-EcoMLA (arXiv 2503.11132)",
            "The operator is MLA's; the method is how its weights come from a grouped-query model.",
        ),
        SpecifiedSystem("alibi", "ALiBi", alibi, source="ALiBi (arXiv 2108.12409), section 3"),
        SpecifiedSystem(
            "sliding_window", "Sliding window", sliding_window,
            source="Longformer (arXiv 2004.05150), section 3.1"
        ),
        SpecifiedSystem(
            "relative", "Relative bias (T5)", relative,
            (("relative_table", "one number a head and distance; T5 shares those of far distances"),),
            "T5 (arXiv 1910.10683)",
        ),
        SpecifiedSystem(
            "differential", "Differential Transformer", differential,
            (
                ("query, query_noise", "the two halves of a pair of heads"),
                ("key, key_noise", "the same for keys"),
                ("value", "twice as wide as a key"),
                ("lambda", "one learned number a layer"),
            ),
            "Differential Transformer (arXiv 2410.05258)",
            "GDA with one signal head a noise head.",
        ),
        SpecifiedSystem(
            "gated", "Gated attention", gated,
            (("gate", "sigmoid(x W) for each head and channel"),),
            "Gated Attention for Large Language Models (arXiv 2505.06708)",
        ),
        SpecifiedSystem(
            "sink", "Attention sink", sink,
            (("sink_logit", "one learned logit a head"),),
            "gpt-oss (arXiv 2508.10925)",
            "Rows of keys add up to less than one.",
        ),
        SpecifiedSystem(
            "query_key_norm", "QKNorm", query_key_norm,
            (("temperature", "one learned factor a key head"),),
            "Query-Key Normalization for Transformers (arXiv 2010.04245)",
        ),
        SpecifiedSystem(
            "token_merging", "ToMe, proportional attention", token_merging,
            (("assignment", "class of each token, from the similarity of keys"),),
            "Token Merging (arXiv 2210.09461)",
            "The baseline is the size of a class; without it a class of n weighs n times too little.",
        ),
        SpecifiedSystem(
            "neighborhood", "Neighborhood attention, one axis", neighborhood,
            (("neighborhood", "a mask that depends on positions alone"),),
            "Neighborhood Attention Transformer (arXiv 2204.07143)",
        ),
        SpecifiedSystem(
            "top_k", "Explicit sparse attention", top_k,
            source="Explicit Sparse Transformer (arXiv 1912.11637)",
            remark="Not a limit of softmax: of equal scores it keeps the earlier ones.",
        ),
        SpecifiedSystem(
            "entmax", "Adaptively sparse attention", entmax,
            source="Adaptively Sparse Transformers (arXiv 1909.00015)",
        ),
        SpecifiedSystem(
            "retention", "Retention", retention,
            (("alibi_slopes", "-log gamma of a head"), ("query, key", "rotated by xPos")),
            "Retentive Network (arXiv 2307.08621)",
            "Signed weights: there is no potential and no divergence.",
        ),
        SpecifiedSystem(
            "slot", "Inverted (slot) attention", slot,
            source="Slot Attention (arXiv 2006.15055), section 2.1",
            remark="Slot attention divides by the row sums afterwards; here the column anchor acts alone.",
        ),
        SpecifiedSystem(
            "sinkhorn", "Sinkhorn attention", sinkhorn, source="Sinkformers (arXiv 2110.11773), section 3"
        ),
        SpecifiedSystem(
            "linear", "Linear attention", linear,
            source="Transformers are RNNs (arXiv 2006.16236), section 3.2"
        ),
    )
}  # fmt: skip


def system(slug: str) -> SpecifiedSystem:
    """Returns a system by its slug.

    Raises:
        ValueError: it is not written in the language yet; the message lists near names.
    """
    if slug in SYSTEMS:
        return SYSTEMS[slug]
    near = difflib.get_close_matches(slug.lower().replace("-", "_"), SYSTEMS, n=3, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}" if near else f"there are {', '.join(sorted(SYSTEMS))}"
    raise ValueError(f'no specification is called "{slug}"; {hint}.')


__all__ = ["SYSTEMS", "SpecifiedSystem", "standard", "system"]
