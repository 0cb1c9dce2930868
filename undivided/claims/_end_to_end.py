"""The headlines end to end: decode throughput of whole stacks, time to the first token, and the engine on a real model.

Throughputs are of the largest batch whose cache fits beside the weights into the same memory on both sides.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from undivided.claims._harness import Row, measured
from undivided.claims._latent_problem import flash_mla_is_missing
from undivided.claims._stack import (
    HalfOutputAttention,
    Shape,
    Throughput,
    card_memory,
    latent_throughput,
    prefill_times,
    release,
    static_throughput,
)
from undivided.engine import Completion, Engine
from undivided.layers.gqa import GQAttention
from undivided.layers.mla import MLAttention

_LAYERS, _HIDDEN, _QUERY_LATENT = 61, 7168, 1536
_KEYS, _PROMPT = 32768, 1024


@dataclass(frozen=True)
class Ranks:
    """A model of the TPLA paper on two ranks.

    Args:
        name: of the model.
        heads: all query heads.
        required: least ratio of throughputs.
    """

    name: str
    heads: int
    required: float


DEEPSEEK, KIMI = Ranks("DeepSeek-V3", 128, 1.79), Ranks("Kimi-K2", 64, 1.93)


def _rank(name: str, kind: type[MLAttention], heads: int, latent_dim: int) -> Shape:
    def attention(index: int) -> nn.Module:
        return kind(_HIDDEN, heads, latent_dim, 64, 128, 128, query_latent_dim=_QUERY_LATENT, layer_idx=index)

    return Shape(name, _LAYERS, _HIDDEN, attention)


def stack_rows(ranks: Ranks) -> Iterator[Row]:
    """Yields decode throughput and time to first token of one rank of two, TPLA beside MLA.

    A rank of MLA has half of the heads and the whole latent; one of TPLA all heads, half of the latent, and the whole
    output projection, or half of it after a reduce-scatter of the heads. Sent between ranks and left out: an all-reduce
    a layer on both sides, and that reduce-scatter. What a bar asks for is held against what both sides would do if
    nothing but their bytes and products took time: weights do not shrink as the cache does.
    """
    memory = card_memory()
    mla = _rank(f"{ranks.name}, MLA rank", MLAttention, ranks.heads // 2, 512)
    tpla = _rank(f"{ranks.name}, TPLA rank", MLAttention, ranks.heads, 256)
    half = _rank(f"{ranks.name}, TPLA rank", HalfOutputAttention, ranks.heads, 256)
    base = latent_throughput(mla, _KEYS, memory, "cuda", with_flash=flash_mla_is_missing() is None)
    emulated = f"{ranks.name}, rank of 2 emulated without its traffic, {_LAYERS} layers of attention"
    where = f"{emulated}, {_KEYS} keys, {memory / 2**30:.0f} GiB"
    yield _tokens(f"decode throughput, MLA, {ranks.name}", where, base["ours"])
    for name, shape in (("", tpla), (", output projection halved by a reduce-scatter", half)):
        ours = latent_throughput(shape, _KEYS, memory, "cuda")["ours"]
        what = f"decode throughput, TPLA{name}"
        for rival, its in base.items():
            baseline = "MLA, our kernel" if rival == "ours" else f"MLA, {rival}"
            yield _tokens(f"{what}, against {baseline}", where, ours, baseline, its, ranks.required)
        yield _at_the_ceiling(what, where, ours, base["ours"])
    times = prefill_times((mla, tpla), _PROMPT, "cuda")
    yield measured(
        "time to first token, prompt read by MLA ranks, against TPLA ranks",
        f"{emulated}, prompt of {_PROMPT}",
        times[mla.name],
        "ms",
        better="lower",
        baseline_name="prompt read by TPLA ranks",
        baseline=times[tpla.name],
        required=1.4,
    )
    release()


def engine_rows() -> Iterator[Row]:
    """Yields the demo model's tokens and throughput in the engine."""
    study = demo_engine_study()
    yield from token_rows(study)
    yield from rate_rows(study)


def llama_rows(memory: int) -> Iterator[Row]:
    """Yields decode throughput of LLaMA-2-7B's shapes at 8192 tokens: converted to MLA, beside its own attention.

    Args:
        memory: bytes for weights and caches; the paper's card has 40 GB.
    """
    shapes = GroupedShapes("LLaMA-2-7B", 32, 4096, 32, 11008, 32000)
    yield from grouped_rows(shapes, latent_dim=512, rope_dim=64, keys=8192, memory=memory, required=5.1)


@dataclass(frozen=True)
class GroupedShapes:
    """Sizes of a model with grouped-query attention, whose heads are 128 wide."""

    name: str
    num_layers: int
    hidden_size: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int


def grouped_rows(
    model: GroupedShapes,
    *,
    latent_dim: int,
    rope_dim: int,
    keys: int,
    memory: int,
    required: float,
    required_batch: float | None = None,
) -> Iterator[Row]:
    """Yields decode throughput of a model's shapes: converted to MLA, beside its own attention.

    Args:
        model: its shapes.
        latent_dim, rope_dim: cached numbers of the converted one.
        keys: tokens in the cache.
        memory: bytes for weights and caches.
        required: bar of the largest batches' throughputs.
        required_batch: bar of the largest batches themselves.
    """
    width, head_dim = model.hidden_size, 128
    heads = width // head_dim
    nope_dim = head_dim if model.num_key_value_heads == heads else head_dim - rope_dim
    sizes = {"intermediate_size": model.intermediate_size, "vocab_size": model.vocab_size}

    def own(index: int) -> nn.Module:
        return GQAttention(width, heads, model.num_key_value_heads, head_dim, layer_idx=index)

    def converted(index: int) -> nn.Module:
        return MLAttention(
            width, heads, latent_dim, rope_dim, nope_dim, head_dim, latent_norm=False, rope_interleaved=True,
            layer_idx=index,
        )  # fmt: skip

    native = Shape(model.name, model.num_layers, width, own, **sizes)
    mla = Shape(f"{model.name} as MLA", model.num_layers, width, converted, **sizes)
    base, kernel = static_throughput(native, keys, memory, "cuda")
    found = latent_throughput(mla, keys, memory, "cuda", batches=(base.batch,))
    where = f"{model.name} shapes, random weights, {keys} keys, {memory / 1e9:.0f} GB"
    what, name = (
        f"decode throughput, {latent_dim} + {rope_dim} cached numbers",
        f"its own attention, torch {kernel}",
    )
    yield _tokens(f"{what}, largest batch", where, found["ours"], name, base, required)
    yield _tokens(f"{what}, equal batch", where, found[f"ours, batch {base.batch}"], name, base)
    yield _tokens("decode throughput, its own attention", f"{where}, torch {kernel}", base)
    if required_batch is not None:
        yield measured(
            f"largest batch, {latent_dim} + {rope_dim} cached numbers", where, found["ours"].batch, "sequences",
            better="higher", baseline_name="its own attention", baseline=base.batch, required=required_batch,
        )  # fmt: skip
    release()


def _at_the_ceiling(what: str, where: str, ours: Throughput, base: Throughput) -> Row:
    """The throughputs of the same batches if each took its least time for bytes and products, by measured ceilings."""
    return measured(
        f"{what}, if bytes and products alone took time, against MLA",
        f"{where}, batches {ours.batch} and {base.batch}, bfloat16",
        ours.tokens_per_second / ours.fraction,
        "tokens/s",
        better="higher",
        baseline_name="MLA",
        baseline=base.tokens_per_second / base.fraction,
    )


def _tokens(
    what: str,
    where: str,
    ours: Throughput,
    name: str | None = None,
    base: Throughput | None = None,
    bar: float | None = None,
) -> Row:
    batches = f"batch {ours.batch}" if base is None else f"batches {ours.batch} and {base.batch}"
    return measured(
        what,
        f"{where}, {batches}, bfloat16",
        ours.tokens_per_second,
        "tokens/s",
        better="higher",
        baseline_name=name,
        baseline=None if base is None else base.tokens_per_second,
        required=bar,
        fraction_of_ceiling=ours.fraction,
    )


@dataclass
class EngineStudy:
    """A model before and after its conversion to MLA, with prompts.

    Args:
        source: the base model, in the dtype of decoding.
        model: converted, in the same dtype.
        wide: converted, in float32.
        prompts: token ids.
        name: of the model, for the rows.
        max_new_tokens: length of the continuations.
    """

    source: Any
    model: Any
    wide: Any
    prompts: list[list[int]]
    name: str
    max_new_tokens: int = 256

    @functools.cached_property
    def fast(self) -> Engine:
        """The engine with the fastest kernels."""
        return self.engine("auto")

    @property
    def where(self) -> str:
        """The shape of the rows."""
        size = f"{len(self.prompts)} prompts, {self.max_new_tokens} new tokens each"
        return f"{self.name}, {size}, greedy, bfloat16"

    def engine(self, backend: str) -> Engine:
        """An engine with a place for every prompt."""
        longest = max(map(len, self.prompts)) + self.max_new_tokens
        return Engine(self.model, max_tokens=longest, max_batch=len(self.prompts), backend=backend)

    def complete(self, engine: Engine) -> list[Completion]:
        """Greedy continuations of full length."""
        return engine.generate(self.prompts, max_new_tokens=self.max_new_tokens, ignore_eos=True)


def demo_engine_study() -> EngineStudy:
    """SmolLM2-135M-Instruct as MLA, latent 256 and 32 rotary dimensions; 20 beginnings of paragraphs as prompts."""
    from undivided.claims._latent_study import demo_study
    from undivided.data import demo_texts
    from undivided.models.checkpoint import open_checkpoint

    # A short calibration: what is compared does not depend on it.
    study = demo_study("cuda", quick=True)
    text = " ".join(demo_texts().heldout.values())
    ids = study.tokenizer(text, verbose=False).input_ids
    # Of different lengths: 16, 24, ..., 168 tokens.
    prompts = [ids[400 * i : 400 * i + 16 + 8 * i] for i in range(20)]
    source = open_checkpoint("smollm2-135m", device="cuda", dtype=torch.bfloat16).model
    return EngineStudy(
        source, in_dtype(study.model, torch.bfloat16), study.model, prompts, "SmolLM2-135M as MLA, 256 + 32"
    )


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Returns a copy with weights in `dtype`; buffers such as rotary frequencies stay as they are."""
    import copy

    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def token_rows(study: EngineStudy) -> Iterator[Row]:
    """Yields whether the fast kernels write the tokens of the reference backend, and where they first do not."""
    length, count = study.max_new_tokens, len(study.prompts)
    fast, plain = study.complete(study.fast), study.complete(study.engine("reference"))
    common = [_common(a.tokens, b.tokens) for a, b in zip(fast, plain, strict=True)]
    equal = sum(n == length for n in common)
    yield measured(
        "texts of the engine equal to those of its reference backend",
        study.where,
        equal,
        "texts",
        better="higher",
        baseline_name="all" if equal else None,
        baseline=count if equal else None,
    )
    yield measured(
        "tokens of the engine before the first that differs from its reference backend's",
        study.where,
        sum(common),
        "tokens",
        better="higher",
        baseline_name="all" if sum(common) else None,
        baseline=length * count if sum(common) else None,
    )
    margins = [
        _margin(study, a.prompt, a.tokens, b.tokens, n)
        for a, b, n in zip(fast, plain, common, strict=True)
        if n < length
    ]
    if margins:
        margin, error = max(margins, key=lambda pair: pair[0] / pair[1])
        # Two runs that err by e at most can exchange two tokens less than 2 e apart; e is that of a third run, so
        # twice as much is allowed.
        yield measured(
            "margin in float32 between the two tokens of a first difference, the largest",
            study.where,
            max(margin, 1e-9),
            "logits",
            better="lower",
            baseline_name="four times the largest error of the bfloat16 model's logits there",
            baseline=4 * error,
            required=1.0,
        )


def rate_rows(study: EngineStudy) -> Iterator[Row]:
    """Yields the engine's throughput, prompts included, beside that of transformers' `generate`."""
    total = len(study.prompts) * study.max_new_tokens
    ours = total / _seconds(lambda: study.complete(study.fast))
    static = functools.partial(_native, study.source, study, cache_implementation="static")
    eager = functools.partial(_native, study.model, study)
    rivals: dict[str, Callable[[], float]] = {
        "transformers' generate, base model, static cache, torch.compile": lambda: _seconds(static),
        "transformers' generate, the same model": lambda: _seconds(eager, warm_ups=0, runs=1),
    }
    for name, seconds in rivals.items():
        yield measured(
            f"throughput of the engine, prompts included, against {name}",
            study.where,
            ours,
            "tokens/s",
            better="higher",
            baseline_name=name,
            baseline=total / seconds(),
        )


def _native(model: Any, study: EngineStudy, **options: Any) -> list[list[int]]:
    """Greedy continuations by transformers, of prompts padded on the left."""
    longest = max(map(len, study.prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in study.prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in study.prompts]
    # No token ends a text: this one is not in the vocabulary.
    never = model.config.get_text_config().vocab_size
    with torch.no_grad():
        out = model.generate(
            torch.tensor(ids, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
            max_new_tokens=study.max_new_tokens, do_sample=False, pad_token_id=0, eos_token_id=never, **options,
        )  # fmt: skip
    return out[:, longest:].tolist()


def _seconds(run: Callable[[], object], warm_ups: int = 1, runs: int = 2) -> float:
    """Of the best run after those that compile and capture; each reads its tokens on the host."""
    found = []
    for _ in range(warm_ups + runs):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found[warm_ups:])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        if a != b:
            return index
    return len(first)


@torch.no_grad()
def _margin(
    study: EngineStudy, prompt: list[int], first: list[int], second: list[int], at: int
) -> tuple[float, float]:
    """Returns how far the two tokens at `at` are apart in float32, and the error of the bfloat16 logits there."""
    device = study.model.device
    ids = torch.tensor([prompt + first[:at]], device=device)
    exact, rounded = (
        model(ids, logits_to_keep=1).logits[0, -1].float() for model in (study.wide, study.model)
    )
    margin = (exact[first[at]] - exact[second[at]]).abs()
    return float(margin), float((rounded - exact).abs().max())
