"""TPLA: what cutting the latent costs in perplexity, and what it saves a rank in decoding.

The paper's models have latents of 512 and were trained on trillions of tokens. Here the same ablation is made
on a small model with DeepSeek's attention, trained from scratch (its latents are normalised, so norm and
softmax can be cut one by one), and on SmolLM2-135M after its conversion to MLA (no normalisation: the softmax
alone is cut; its axes are principal ones already, so that "none" is nearly "pca" there). What can be compared
is the order of the variants, not their size. On CUDA one rank's decode attention is timed at the paper's
shapes, and the throughput and the time to first token of one rank's 61 layers of attention, as the paper has them
but for the traffic between ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._latent_study import Study, demo_study, small_study

TRANSFORMS = ("none", "hadamard", "pca")
_BASELINE = "MLA"
_SCRATCH = "4-layer MLA trained from scratch, latent 128"


def gate(device: str) -> None:
    """Raises unless rewriting the latent is exact, and cutting it with exact modes too, in float64."""
    import torch

    from undivided.claims._small_lm import latent_lm
    from undivided.convert.tpla import convert_tpla, latent_rotations, reparameterise

    model = latent_lm(num_hidden_layers=2, hidden_size=64, kv_lora_rank=32).to(device, torch.float64).eval()
    ids = torch.arange(96, device=device).view(3, 32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(ids).logits
        rivals = {
            "rewritten": reparameterise(model, latent_rotations(model, "random")),
            "one shard": convert_tpla(model, num_shards=1, calibration=ids)[0],
            "exact modes": convert_tpla(model, calibration=ids, norm="exact", softmax="exact")[0],
        }
        # The norms outside of the attention round to float32, also in a float64 model.
        bound = 64 * torch.finfo(torch.float32).eps * expected.abs().max()
        for name, rival in rivals.items():
            error = (rival(ids).logits - expected).abs().max()
            if not error <= bound:
                raise ValueError(f"{name}: logits differ from MLA's by {error:.2e}, more than {bound:.2e}.")


def _decode(device: str, quick: bool) -> Iterator[Row]:
    """Yields MLA's decode attention, on a GPU."""
    if device == "cuda":
        from undivided.claims._latent_decode import decode_rows

        yield from decode_rows(device, quick)


def _ranks(device: str, quick: bool) -> Iterator[Row]:
    """Yields the decode attention of a rank of TPLA beside MLA's, on a GPU."""
    if device == "cuda":
        from undivided.claims._latent_decode import rank_rows

        yield from rank_rows(device, quick)


def _fp8(device: str, quick: bool) -> Iterator[Row]:
    """Yields decode attention over a cache of half the bytes, on a GPU."""
    if device == "cuda":
        from undivided.claims._latent_decode import narrow_rows

        yield from narrow_rows(device, quick)


def _deepseek(device: str, quick: bool) -> Iterator[Row]:
    """Yields throughput and prompt times of DeepSeek-V3's stack of attention layers, on a GPU."""
    if device == "cuda":
        from undivided.claims._end_to_end import DEEPSEEK, stack_rows

        yield from stack_rows(DEEPSEEK)


def _kimi(device: str, quick: bool) -> Iterator[Row]:
    """Yields throughput and prompt times of Kimi-K2's stack of attention layers, on a GPU."""
    if device == "cuda" and not quick:
        from undivided.claims._end_to_end import KIMI, stack_rows

        yield from stack_rows(KIMI)


def _prefill(device: str, quick: bool) -> Iterator[Row]:
    """Yields the attention of a rank that reads prompts, on a GPU."""
    if device == "cuda":
        from undivided.claims._latent_prefill import prefill_rows

        yield from prefill_rows(device, quick)


def _scratch(device: str, quick: bool) -> tuple[list[Study], str]:
    seeds = (0,) if quick else (0, 1, 2)
    shape = f"{_SCRATCH}, {len(seeds)} seeds, 2 shards"
    return [small_study(seed, device, quick) for seed in seeds], shape


def _perplexity(device: str, quick: bool) -> Iterator[Row]:
    """Yields the ablation and separated prefill on the model trained from scratch."""
    studies, shape = _scratch(device, quick)
    yield from ablation(studies, shape, normalised=True, groups=2)
    yield from separated(studies, shape, prompt=256, lengths=(64, 256))


def _converted(device: str, quick: bool) -> Iterator[Row]:
    """Yields the ablation, separated prefill and the factors of the logits on SmolLM2-135M as MLA."""
    study = demo_study(device, quick)
    shape = "SmolLM2-135M as MLA, latent 256, 2 shards"
    yield from ablation([study], shape, normalised=False, groups=None)
    yield from scales([study], shape)
    yield from separated([study], shape, prompt=512, lengths=(64,) if quick else (64, 256))
    # Its nine heads cannot be cut into two groups.
    study = demo_study(device, quick, latent_dim=255)
    yield from grouped([study], "SmolLM2-135M as MLA, latent 255, 3 shards", groups=3)


def _aligned(device: str, quick: bool) -> Iterator[Row]:
    """Yields the factors of the logits and alignment on one seed of the model trained from scratch, on a GPU."""
    if device == "cpu":
        return
    from undivided.claims._healing import aligned

    study = small_study(0, device, quick)
    tokens = 125_000 if quick else 500_000
    yield from scales([study], f"{_SCRATCH}, one seed, 2 shards")
    yield from aligned(study, f"{_SCRATCH}, one seed, 2 shards", (tokens, tokens))


def _healed(device: str, quick: bool) -> Iterator[Row]:
    """Yields the whole table and alignment on SmolLM2-135M as MLA with normalised latents, healed, on a GPU."""
    if device == "cpu":
        return
    from undivided.claims._healing import aligned, healed_study

    tokens = 250_000 if quick else 1_000_000
    study = healed_study(device, quick, tokens)
    shape = f"SmolLM2-135M as MLA with normalised latents of 256, healed on {tokens:,} tokens, 2 shards"
    yield from ablation([study], shape, normalised=True, groups=None)
    yield from scales([study], shape)
    yield from separated([study], shape, prompt=512, lengths=(64,) if quick else (64, 256))
    yield from aligned(study, shape, (tokens // 4, tokens // 2))


def ablation(studies: Sequence[Study], shape: str, *, normalised: bool, groups: int | None) -> Iterator[Row]:
    """Yields the perplexities of all variants, each beside MLA's or beside what the paper says it beats.

    Args:
        studies: one a seed; values are geometric means over them.
        shape: of the rows.
        normalised: whether the latents are normalised, so that the norm can be cut alone.
        groups: head groups of the GLA conversion; None where they cannot be made.
    """
    mla = _over(studies, lambda study: study.perplexity(study.model))
    rotated = _over(studies, _converted_perplexity("pca", norm="exact", softmax="exact"))
    yield _row("perplexity, rewritten latent, nothing cut", shape, rotated, _BASELINE, mla, 0.999)
    modes = {"softmax": {"norm": "exact"}}
    if normalised:
        modes = {"norm": {"softmax": "exact"}, **modes, "norm and softmax": {}}
    found: dict[tuple[str, str], float] = {}
    for cut, options in modes.items():
        for transform in TRANSFORMS:
            value = found[cut, transform] = _over(studies, _converted_perplexity(transform, **options))
            required = 1 / 1.01 if (cut, transform) == ("norm", "hadamard") else None
            yield _row(f"perplexity, {cut} cut, {transform}", shape, value, _BASELINE, mla, required)
    both = "norm and softmax" if normalised else "softmax"
    for better, worse in (("pca", "hadamard"), ("hadamard", "none")):
        values = found[both, better], found[both, worse]
        yield _row(f"perplexity, {both} cut, {better}", shape, values[0], worse, values[1], 1.0)
    if normalised:
        values = found["norm", "pca"], found["softmax", "pca"]
        yield _row("perplexity, norm cut, pca", shape, values[0], "softmax cut", values[1], 1.0)
    if groups is not None:
        yield from grouped(studies, shape, groups=groups)


def grouped(studies: Sequence[Study], shape: str, *, groups: int) -> Iterator[Row]:
    """Yields TPLA beside the GLA conversion of the same latents, rotated alike."""
    from undivided.convert.tpla import latent_rotations, mla_to_gla, reparameterise

    def gla_perplexity(transform: str) -> Callable[[Study], float]:
        def score(study: Study) -> float:
            rotations = latent_rotations(study.model, transform)
            return study.perplexity(mla_to_gla(reparameterise(study.model, rotations), groups))

        return score

    tpla = _over(studies, _converted_perplexity("pca", num_shards=groups))
    for transform in ("none", "random"):
        gla = _over(studies, gla_perplexity(transform))
        name = "GLA conversion" if transform == "none" else "GLA conversion, latent rotated at random"
        yield _row("perplexity, TPLA by pca", shape, tpla, name, gla, 10.0 if transform == "none" else None)


def scales(studies: Sequence[Study], shape: str) -> Iterator[Row]:
    """Yields the perplexities of the four factors of a shard's logits, for every transform, and which one wins."""
    from undivided.convert.tpla import LOGIT_SCALES

    mla = _over(studies, lambda study: study.perplexity(study.model))
    for transform in TRANSFORMS:
        found = {}
        for scale in LOGIT_SCALES:
            found[scale] = _over(studies, _converted_perplexity(transform, logit_scale=scale))
            yield _row(f"perplexity, {transform}, logit scale {scale}", shape, found[scale], _BASELINE, mla)
        default = found.pop("lstsq")
        best = min(found, key=found.__getitem__)
        what = f"perplexity, {transform}, logit scale lstsq"
        yield _row(what, shape, default, f"the best other scale, {best}", found[best])


def separated(studies: Sequence[Study], shape: str, *, prompt: int, lengths: Sequence[int]) -> Iterator[Row]:
    """Yields decode perplexities after exact prompts beside those after sliced ones and MLA's."""
    for length in lengths:
        where = f"{shape}, {length} tokens after a prompt of {prompt}"

        def score(build: Callable[[Study], Any], length: int = length) -> float:
            return _over(studies, lambda study: study.decode_perplexity(build(study), prompt, length))

        mla = score(lambda study: study.model)
        sliced = score(lambda study: study.converted())
        exact = score(lambda study: study.converted(prefill="exact"))
        yield _row("decode perplexity, prompts sliced", where, sliced, _BASELINE, mla)
        yield _row("decode perplexity, prompts exact", where, exact, _BASELINE, mla)
        yield _row("decode perplexity, prompts exact", where, exact, "prompts sliced", sliced, 1.0)


def _converted_perplexity(transform: str, **options: Any) -> Callable[[Study], float]:
    return lambda study: study.perplexity(study.converted(transform, **options))


def _row(
    what: str, shape: str, ours: float, name: str, baseline: float, required: float | None = None
) -> Row:
    # The baseline is part of what a row is: the same value is held against several.
    return measured(
        f"{what}, against {name}",
        shape,
        ours,
        "perplexity",
        better="lower",
        baseline_name=name,
        baseline=baseline,
        required=required,
    )


def _over(studies: Sequence[Study], score: Callable[[Study], float]) -> float:
    """Geometric mean over the studies."""
    return math.exp(sum(math.log(score(study)) for study in studies) / len(studies))


_PARTS: dict[str, Measure] = {
    "decode": _decode,
    "ranks": _ranks,
    "fp8": _fp8,
    "prefill": _prefill,
    "deepseek": _deepseek,
    "kimi": _kimi,
    "perplexity": _perplexity,
    "converted": _converted,
    "aligned": _aligned,
    "healed": _healed,
}
CLAIM = Claim(
    slug="tpla",
    source="arXiv 2508.15881, figure 2 and the tables of perplexity and decode throughput",
    paper=(
        "Decode throughput over MLA at tensor parallelism of two, 32K context, two H800, BF16, without MoE "
        "layers, largest batch at each length: 1.79x (DeepSeek-V3-0324) and 1.93x (Kimi-K2-Base).",
        "Time to first token of a prompt of 1K: 1.4x faster where the prompt is read by MLA than by TPLA.",
        "WikiText-2 perplexity of DeepSeek-V2-Lite: MLA 6.31, TPLA by pca 7.24, with alignment 6.51, GLA "
        "conversion 2212; LLaMA-2-7B by TransMLA 5.88, then TPLA 6.74.",
        "Figure 2: cutting the norm costs least, the softmax more, both most; hadamard is best for the norm "
        "alone, pca for the softmax and for both.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
