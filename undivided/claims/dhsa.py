"""DHSA: what it saves to read a long prompt in part, mask building included, in a model of Gemma-2-2b's shape.

The paper's baselines are eager attention and scaled_dot_product_attention in transformers. Eager is Gemma-2's own, with
its softcap, and so are ours beside it. SDPA has no softcap, and ours beside it leave it out too; it gets masks as
transformers builds them, also for the layers with a window, and beside it, without a bar, stands a stronger rival: the
same kernels without masks, flash attention with a window where there is one. Weights are random: time and memory do
not depend on them, and the threshold of boundaries is set so low that as many chunks are cut as may be.

The later version, blocks of keys chosen by each head, is timed as attention alone at the shape of Llama-3.1-8B. Quality
is measured on SmolLM2-135M-Instruct; texts are short, and the model is small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from undivided.claims._harness import Claim, Measure, Row, all_of, measured
from undivided.claims._timing import time_rivals
from undivided.layers._block_modes import MODES, choose_blocks
from undivided.layers._chunks import block_lists, dhsa_select
from undivided.layers.boundaries import BoundaryPredictor, decode_boundaries, fixed_boundaries
from undivided.layers.dhsa import DHSAttention
from undivided.layers.gqa import GQAttention
from undivided.ops import dense_attention, gathered_attention
from undivided.ops.selected import selected_attention
from undivided.testing import compare_op

BUDGET, BLOCK = 2048, 256
LAYERS, HEADS, GROUPS, HEAD_DIM, WIDTH, WINDOW = 26, 8, 4, 256, 2304, 4096
SHAPE = f"{LAYERS} layers, width {WIDTH}, {HEADS} heads on {GROUPS} of {HEAD_DIM}, bf16"
LLAMA, QUERY_BLOCK, KEY_BLOCK, DENSITY = (32, 8, 128), 128, 32, 0.125
_OPTIONS: dict[str, Any] = {"budget": BUDGET, "query_block": BLOCK, "threshold": -1e9}


def gate(device: str) -> None:
    """Raises unless kernels are as accurate as eager PyTorch, and a budget for everything is full attention."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cases = ((256, 700, 50.0, None), (64, 333, None, 150), (16, 90, None, None))
    for head_dim, length, softcap, window in cases:
        if device == "cpu" and length > 100:
            continue
        x = {
            name: torch.randn(1, heads, length, head_dim, device=device)
            for name, heads in (("query", 4), ("key", 2), ("value", 2))
        }
        chunks = fixed_boundaries(length, 7, device=torch.device(device))
        lists = dhsa_select(
            x["query"], x["key"], chunks, block_size=32, budget=80, num_local=32, num_global=16,
            window=window,
        )  # fmt: skip
        own, reference = (
            partial(
                gathered_attention,
                indices=lists,
                block_size=32,
                softcap=softcap,
                window=window,
                backend=backend,
            )
            for backend in ("auto", "reference")
        )
        with torch.no_grad():
            compare_op(own, reference, reference, x, dtype, grad_inputs=())
    if device == "cuda":
        _check_few_queries()
    _check_full_budgets(device)


@torch.no_grad()
def _check_few_queries() -> None:
    """Long lists of an instruction and of one token, which are divided among programs."""
    for head_dim, queries in ((256, 64), (128, 1)):
        x = {
            name: torch.randn(1, heads, length, head_dim, device="cuda")
            for name, heads, length in (("query", 4, queries), ("key", 2, 4000), ("value", 2, 4000))
        }
        lists = torch.arange(4000, dtype=torch.int32, device="cuda").expand(1, 1, 1, -1)
        own, reference = (
            partial(gathered_attention, indices=lists, block_size=queries, softcap=50.0, backend=backend)
            for backend in ("triton", "reference")
        )
        compare_op(own, reference, reference, x, torch.bfloat16, grad_inputs=())


def _check_full_budgets(device: str) -> None:
    """A budget for every key, and a density of one, are full attention."""
    query, key, value = (
        torch.randn(1, heads, 200, 16, device=device, dtype=torch.float64) for heads in (4, 2, 2)
    )
    expected = dense_attention(query, key, value, is_causal=True, backend="reference")
    logits = BoundaryPredictor(32).to(device).double()(key)
    chunks = decode_boundaries(logits, -1.0, max_chunks=30)
    lists = dhsa_select(query, key, chunks, block_size=32, budget=200, num_local=32, num_global=32)
    torch.testing.assert_close(gathered_attention(query, key, value, lists, block_size=32), expected)
    for mode in MODES:
        index, counts = block_lists(choose_blocks(query, key, mode, 13, 32, 16))
        out, _ = selected_attention(
            query, key, value, index, counts, query_block_size=32, block_size=16, is_causal=True
        )
        torch.testing.assert_close(out, expected)


def gemma(num_layers: int = LAYERS, softcap: float | None = 50.0) -> Any:
    """Returns an untrained model of Gemma-2-2b's shape, in bfloat16 on the GPU."""
    from transformers import AutoModelForCausalLM, Gemma2Config

    config = Gemma2Config(
        num_hidden_layers=num_layers, attn_logit_softcapping=softcap, max_position_embeddings=131072,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    finally:
        torch.set_default_dtype(torch.float32)


class _MaskedSDPA(GQAttention):
    """Attention as transformers computes it with attn_implementation="sdpa": a mask takes key heads repeated."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        if mask is not None:
            key, value = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=mask is None,
        )


def _with_masks(model: Any) -> Any:
    """Returns the model with scaled_dot_product_attention and the masks that transformers builds for it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    import undivided

    # Gemma-2 does not let itself be set to "sdpa", which has no softcap.
    AttentionInterface.register("with_masks", sdpa_attention_forward)
    AttentionMaskInterface.register("with_masks", sdpa_mask)
    host = undivided.attach(model, "gqa")
    for index, source in enumerate(host.attention_layers()):
        with torch.device("meta"):
            layer = _MaskedSDPA.from_config(model.config, index)
        layer.load_state_dict(source.state_dict(), assign=True)
        host.set_attention(index, layer)
    host.set_attn_implementation("with_masks")
    return host


_UNCAPPED = ", no softcap"
_FLASH = "SDPA and flash attention with windows, no masks"


def _arm(model: Any, name: str) -> Any:
    """Returns the model with one of the attentions that are compared; weights are shared."""
    import undivided

    if name == "eager":
        return model
    if name == "SDPA":
        return _with_masks(model)
    if name == _FLASH:
        host = undivided.attach(
            model, "dhsa", boundaries="fixed", budget=2**30, query_block=1, num_instruction=1
        )
        for layer in host.attention_layers():
            layer.softcap = None
        return host
    share = name.removesuffix(_UNCAPPED)
    host = undivided.attach(model, "dhsa", predictor=seeded_predictor(), share=share, **_OPTIONS)
    if share != name:
        for layer in host.attention_layers():
            layer.softcap = None
    return host


def seeded_predictor() -> BoundaryPredictor:
    """Returns an untrained predictor for the keys of the model, in bfloat16 on the GPU."""
    torch.manual_seed(0)
    return BoundaryPredictor(GROUPS * HEAD_DIM).to("cuda", torch.bfloat16)


@torch.no_grad()
def _speed(device: str, quick: bool) -> Iterator[Row]:
    """Yields times and peaks of prompts through the whole model; on a CPU of the attention of one layer."""
    if device == "cpu":
        yield from _on_cpu()
        return
    yield from _prompts(gemma(4 if quick else LAYERS), (8192,) if quick else (8192, 32768))


@torch.no_grad()
def _sharing(device: str, quick: bool) -> Iterator[Row]:
    """Yields the same for what layers share, and at other lengths, on a GPU."""
    if device == "cuda":
        model = gemma(4 if quick else LAYERS)
        yield from _prompts(model, (8192,), ("selection", "boundaries", "none"), ("SDPA",))
        yield from _prompts(model, (16384, 65536), rivals=(_FLASH,))


def _prompts(
    model: Any,
    lengths: tuple[int, ...],
    shares: tuple[str, ...] = ("selection",),
    rivals: tuple[str, ...] = ("SDPA", "eager", _FLASH),
) -> Iterator[Row]:
    for length in lengths:
        ids = torch.randint(256000, (1, length), device="cuda")
        times, peaks = {}, {}
        # Eager attention forms every weight.
        here = [name for name in rivals if name != "eager" or length <= 8192]
        ours = [share + cap for share in shares for cap in ("", _UNCAPPED) if cap or "eager" in here]
        for name in (*ours, *here):
            call = partial(_arm(model, name), ids, use_cache=False, logits_to_keep=1)
            times[name], peaks[name] = _time_and_peak(call)
        yield from _prompt_rows(length, times, peaks, shares, here)


def _time_and_peak(call: Callable[[], object], seconds: float = 1.5) -> tuple[float, float]:
    """Returns the median milliseconds and the peak of allocated memory in GiB, the model's weights included.

    Of five samples, or of as many as fit in `seconds`; one at least.
    """
    call()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    while len(times) < 5 and (not times or sum(times) + times[0] < 1e3 * seconds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2], torch.cuda.max_memory_allocated() / 2**30


def _prompt_rows(
    length: int,
    times: dict[str, float],
    peaks: dict[str, float],
    shares: tuple[str, ...],
    rivals: Sequence[str],
) -> Iterator[Row]:
    shape = f"{SHAPE}, {length} tokens, budget {BUDGET}, blocks of {BLOCK}"
    time_bars = {("eager", 8192): 1 / 0.75, ("SDPA", 8192): 1 / 0.85, ("SDPA", 32768): 2.0}
    for own in shares:
        for rival in rivals:
            # What SDPA leaves out, ours beside it does too.
            arm = own if rival == "eager" else own + _UNCAPPED
            words = f'share="{own}"{arm.removeprefix(own)}, against {rival}'
            yield measured(
                f"prompt through the whole model, {words}", shape, times[arm], "ms",
                better="lower", baseline_name=rival, baseline=times[rival],
                required=time_bars.get((rival, length)) if own == "selection" else None,
            )  # fmt: skip
            yield measured(
                f"peak memory of a prompt, weights included, {words}", shape, peaks[arm], "GiB",
                better="lower", baseline_name=rival, baseline=peaks[rival],
                required=1 / 0.65 if own == "selection" and rival == "eager" else None,
            )  # fmt: skip


@torch.no_grad()
def _steps(device: str, quick: bool) -> Iterator[Row]:
    """Yields the steps of one layer apart, and its attention against full attention."""
    if device == "cpu":
        return
    predictor = seeded_predictor()
    for length in (8192,) if quick else (8192, 32768):
        query, key, value = (
            torch.randn(1, heads, length, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for heads in (HEADS, GROUPS, GROUPS)
        )
        logits = predictor(key)
        cut = partial(decode_boundaries, logits, -1e9, max_chunks=length // BLOCK * 8, nms=8)
        choose = partial(dhsa_select, query, key, cut(), block_size=BLOCK, budget=BUDGET)
        attend = partial(gathered_attention, query, key, value, choose(), block_size=BLOCK)
        full = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
        calls: dict[str, Callable[[], object]] = {
            "predictor": partial(predictor.forward, key),
            "boundaries from logits": cut,
            "representations, scores and selection": choose,
            "attention to what is selected": attend,
            "attention and its softcap": partial(attend, softcap=50.0),
        }
        times = time_rivals(calls | {"SDPA": full}, "cuda", seconds=0.1)
        sizes = f"one layer, {HEADS} heads on {GROUPS} of {HEAD_DIM}"
        shape = f"{sizes}, {length} tokens, budget {BUDGET}, blocks of {BLOCK}"
        for name in calls:
            yield measured(
                f"step: {name}", shape, times[name].median, "ms", better="lower", baseline_name="SDPA, full attention",
                baseline=times["SDPA"].median,
            )  # fmt: skip


def _on_cpu() -> Iterator[Row]:
    query, key, value = (torch.randn(1, heads, 4096, 64) for heads in (8, 2, 2))
    chunks = fixed_boundaries(4096, 16)

    def ours() -> object:
        lists = dhsa_select(query, key, chunks, block_size=128, budget=512, num_local=128, num_global=64)
        return gathered_attention(query, key, value, lists, block_size=128)

    full = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
    times = time_rivals({"ours": ours, "SDPA": full}, "cpu", seconds=1.0)
    yield measured(
        "selection and attention of a layer", "8 heads on 2 of 64, 4096 tokens, budget 512, blocks of 128, float32",
        times["ours"].median, "ms", better="lower", baseline_name="SDPA", baseline=times["SDPA"].median,
    )  # fmt: skip


@torch.no_grad()
def _blocks(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of the later version's attention, mask building included, on a GPU."""
    if device == "cpu":
        return
    heads, groups, head_dim = LLAMA
    for length in (32768,) if quick else (32768, 131072):
        x = [
            torch.randn(1, count, length, head_dim, device="cuda", dtype=torch.bfloat16)
            for count in (heads, groups, groups)
        ]
        calls = {f"mode {mode}": partial(by_blocks, mode, *x) for mode in ("topk", "a", "vsb")}
        calls |= {name: partial(_full, name, *x) for name in ("FlashAttention", "cuDNN")}
        times = time_rivals(calls, "cuda", seconds=0.1)
        shape = (
            f"{heads} heads on {groups} of {head_dim}, {length} tokens, blocks of {QUERY_BLOCK} x {KEY_BLOCK}, density "
            f"{DENSITY}, bf16"
        )
        for name in (name for name in calls if name.startswith("mode")):
            for rival in ("FlashAttention", "cuDNN"):
                yield measured(
                    f"attention and choice of blocks, {name}, against {rival}", shape, times[name].median, "ms",
                    better="lower", baseline_name=rival, baseline=times[rival].median,
                )  # fmt: skip


def by_blocks(mode: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Returns the later version's attention, its choice of blocks included."""
    count = int(DENSITY * key.shape[2] // KEY_BLOCK)
    lists = block_lists(choose_blocks(query, key, mode, count, QUERY_BLOCK, KEY_BLOCK))
    return selected_attention(
        query, key, value, *lists, query_block_size=QUERY_BLOCK, block_size=KEY_BLOCK, is_causal=True
    )[0]


@torch.no_grad()
def _decode(device: str, quick: bool) -> Iterator[Row]:
    """Yields times of a step's attention, its choice of keys included, behind caches of one layer, on a GPU."""
    if device == "cpu":
        return
    heads, groups, head_dim = LLAMA
    for length, batch in ((32768, 8),) if quick else ((32768, 8), (131072, 1), (131072, 8)):
        query, key, value = (
            torch.randn(batch, count, tokens, head_dim, device="cuda", dtype=torch.bfloat16)
            for count, tokens in ((heads, 1), (groups, length), (groups, length))
        )
        calls = {
            name: step_behind(query, key, value, **options)
            for name, options in (
                ("chunks of 16, budget 2048", {"budget": BUDGET, "boundaries": "fixed"}),
                ("mode topk, density 0.0156", {"mode": "topk", "density": BUDGET / 131072}),
            )
        }
        full = "full attention, FlashAttention with divided keys"
        calls[full] = partial(F.scaled_dot_product_attention, query, key, value, enable_gqa=True)
        times = time_rivals(calls, "cuda", method="graph", seconds=0.05)
        for name in (name for name in calls if name != full):
            yield measured(
                f"attention of a step of decoding, choice of keys included, {name}",
                f"batch {batch}, {heads} heads on {groups} of {head_dim}, {length} tokens, bf16, CUDA graph",
                1e3 * times[name].median, "us", better="lower", baseline_name=full, baseline=1e3 * times[full].median,
            )  # fmt: skip


def step_behind(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> Callable[[], torch.Tensor]:
    """Returns a call of one step, which adds the last key to its chunk, chooses and attends."""
    from transformers import DynamicCache

    heads, groups = query.shape[1], key.shape[1]
    with torch.device("meta"):
        layer = DHSAttention(heads * query.shape[3], heads, groups, query.shape[3], **options)
    cache: Any = layer._chunk_layer(DynamicCache())
    cache.update(key, value)
    cache.begin(None, None)
    length = key.shape[2]
    cache.chunks(length - 1)

    def call() -> torch.Tensor:
        cache.summed = length - 1
        return layer._step(cache, query, key, value, {})

    return call


def _full(kernels: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"FlashAttention": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[kernels]
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _quality(device: str, quick: bool) -> Iterator[Row]:
    from undivided.claims._dhsa_quality import quality

    yield from quality(device, quick)


def _decode_quality(device: str, quick: bool) -> Iterator[Row]:
    from undivided.claims._dhsa_quality import decoding

    yield from decoding(device, quick)


_PARTS: dict[str, Measure] = {
    "speed": _speed,
    "sharing": _sharing,
    "steps": _steps,
    "blocks": _blocks,
    "decode": _decode,
    "quality": _quality,
    "decode_quality": _decode_quality,
}
CLAIM = Claim(
    slug="dhsa",
    source="arXiv 2510.24606, abstract and experiments; constants of the authors' repository xiongsiheng/DHSA",
    paper=(
        "Prefill takes 20 to 60 % less time and 35 % less peak memory at the accuracy of dense attention.",
        "Gemma2-2b, 8K tokens: eager 1.65 s and 10.72 GB, DHSA 1.19 s and 6.91 GB; SDPA 1.10 s, DHSA 0.91 s. 16K "
        "tokens 2.18 s and 9.69 GB, 32K tokens 4.51 s and 16.99 GB, where dense attention runs out of memory.",
        "LongBench, Gemma2, a budget of 2K, dense / block sparse / DHSA: NarrativeQA 22.37 / 16.74 / 20.69, Qasper "
        "35.32 / 26.15 / 30.20, HotpotQA 41.63 / 35.74 / 38.78, Musique 19.05 / 14.44 / 15.90.",
    ),
    gate=gate,
    measure=all_of(_PARTS),
    parts=_PARTS,
)
