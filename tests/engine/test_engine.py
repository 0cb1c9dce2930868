from __future__ import annotations

import functools

import pytest
import torch

from tests.engine.models import KINDS, model_of, random_prompts, transformers_tokens
from tests.tiny import tiny_llama, tiny_model, tiny_tokenizer
from undivided.engine import Engine
from undivided.engine.prefill import prefill_groups
from undivided.engine.sampling import Sampling
from undivided.engine.scheduler import Request

PROMPTS = random_prompts(3, 17, 1, 40, 9)
SMALL = {"max_tokens": 64, "max_batch": 2, "page_size": 8, "prefill_tokens": 16}


@pytest.fixture(scope="module")
def mla():
    return model_of("mla")


def tokens(engine: Engine, prompts=PROMPTS, **options) -> list[list[int]]:
    return [completion.tokens for completion in engine.generate(prompts, **options)]


@pytest.mark.parametrize("kind", KINDS)
def test_writes_what_transformers_writes(kind) -> None:
    model = model_of(kind)
    # Prompts longer than a chunk, more of them than places, and page limits in the middle of prompts and texts.
    found = tokens(Engine(model, **SMALL), max_new_tokens=12)
    assert found == [transformers_tokens(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_backends_write_the_same(mla, backend) -> None:
    expected = tokens(Engine(mla, **SMALL), max_new_tokens=12)
    assert tokens(Engine(mla, **SMALL, backend=backend), max_new_tokens=12) == expected


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}])
def test_neither_order_nor_company_changes_a_text(mla, sampling) -> None:
    whole = Engine(mla, **{**SMALL, "max_batch": 8, "prefill_tokens": 256})
    together = tokens(whole, max_new_tokens=12, **sampling)
    for index, prompt in enumerate(PROMPTS):
        seed = {"seed": sampling["seed"] + index} if sampling else {}
        alone = Engine(mla, **{**SMALL, "max_batch": 1})
        assert tokens(alone, [prompt], max_new_tokens=12, **{**sampling, **seed}) == [together[index]]
    if not sampling:
        backwards = tokens(Engine(mla, **SMALL), PROMPTS[::-1], max_new_tokens=12)
        assert backwards[::-1] == together


def test_an_engine_is_clean_after_a_stream(mla) -> None:
    engine = Engine(mla, **SMALL)
    first = tokens(engine, max_new_tokens=12)
    assert engine._scheduler.pool.num_free == engine._scheduler.pool.num_pages
    assert tokens(engine, max_new_tokens=12) == first


def test_a_stream_that_is_closed_early_leaves_the_engine_free(mla) -> None:
    engine = Engine(mla, **SMALL)
    expected = tokens(engine, max_new_tokens=12)
    stream = engine.stream(PROMPTS, max_new_tokens=12)
    for _ in range(5):
        next(stream)
    with pytest.raises(RuntimeError, match="the engine is busy"):
        next(engine.stream(PROMPTS, max_new_tokens=12))
    stream.close()
    assert tokens(engine, max_new_tokens=12) == expected


def test_different_seeds_write_different_texts(mla) -> None:
    engine = Engine(mla, **SMALL)
    texts = [tokens(engine, max_new_tokens=12, temperature=1.5, seed=seed) for seed in (1, 1, 20)]
    assert texts[0] == texts[1] != texts[2]


def test_stops_after_the_end_of_sequence_token(mla) -> None:
    engine = Engine(mla, **SMALL)
    free = tokens(engine, max_new_tokens=12, ignore_eos=True)
    end = free[1][4]
    mla.generation_config.eos_token_id = [end, 999]
    try:
        found = Engine(mla, **SMALL).generate(PROMPTS, max_new_tokens=12)
    finally:
        mla.generation_config.eos_token_id = 0
    for completion, text in zip(found, free, strict=True):
        cut = text[: text.index(end) + 1] if end in text else text
        assert completion.tokens == cut
        assert completion.finish_reason == ("eos" if end in text else "length")
    assert found[1].tokens == free[1][: free[1].index(end) + 1]


def test_a_place_that_comes_free_is_taken_at_once(mla) -> None:
    engine = Engine(mla, **SMALL)
    free = tokens(engine, max_new_tokens=12, ignore_eos=True)
    end = next(t for n, t in enumerate(free[0][:8]) if n > 1 and t not in [*free[0][:n], *free[1]])
    engine._eos = frozenset([end])
    events = [(event.index, event.finish_reason) for event in engine.stream(PROMPTS[:3], max_new_tokens=12)]
    begun, ended = events.index((2, None)), events.index((1, "length"))
    # One step may be under way when the end is read.
    assert events.index((0, "eos")) < begun <= events.index((0, "eos")) + 3 < ended


@pytest.mark.parametrize("count", [1, 2])
def test_the_shortest_texts(mla, count) -> None:
    found = tokens(Engine(mla, **SMALL), max_new_tokens=count)
    assert found == [transformers_tokens(mla, prompt, count) for prompt in PROMPTS]


def test_a_small_pool_takes_turns(mla) -> None:
    expected = tokens(Engine(mla, **SMALL), max_new_tokens=12)
    # 52 rows for the longest prompt alone; the others wait for its pages.
    engine = Engine(mla, **{**SMALL, "max_batch": 4, "cache_tokens": 56})
    assert tokens(engine, max_new_tokens=12) == expected


def test_a_pool_that_is_too_small_says_how_large(mla) -> None:
    engine = Engine(mla, **SMALL, cache_tokens=48)
    with pytest.raises(
        ValueError, match="prompt 3 .* takes 7 pages of 8 rows, and the pool has 6; make cache_tokens"
    ):
        engine.stream(PROMPTS, max_new_tokens=12)


def test_rows_that_no_sequence_has_are_never_read(mla) -> None:
    expected = tokens(Engine(mla, **SMALL), max_new_tokens=12)
    engine = Engine(mla, **SMALL)
    for pool in engine.cache.pools:
        pool.fill_(torch.nan)
    assert tokens(engine, max_new_tokens=12) == expected


def test_events_come_as_tokens_do(mla) -> None:
    engine = Engine(mla, tiny_tokenizer(), **SMALL)
    events = list(engine.stream(["the key", "a"], max_new_tokens=5, ignore_eos=True))
    assert [event.index for event in events] == [0, 1] * 5
    assert [event.finish_reason for event in events] == [None] * 8 + ["length"] * 2
    whole = engine.generate(["the key", "a"], max_new_tokens=5, ignore_eos=True)
    assert [event.token for event in events if event.index == 0] == whole[0].tokens
    assert whole[0].prompt == tiny_tokenizer()("the key").input_ids


def test_short_prompts_are_read_together_and_long_ones_alone() -> None:
    requests = [Request(i, [1] * length, 1, Sampling()) for i, length in enumerate((4, 5, 3, 40, 8, 9, 2))]
    groups = [[len(r.prompt) for r in group] for group in prefill_groups(requests, 16)]
    assert groups == [[4, 5, 3], [40], [8], [9], [2]]
    many = [Request(i, [1], 1, Sampling()) for i in range(40)]
    assert [len(group) for group in prefill_groups(many, 4096)] == [32, 8]


@pytest.mark.parametrize(
    ("build", "options", "text"),
    [
        (lambda: tiny_model("gemma2"), {}, "in windows of 8 tokens.*; use max_tokens of at most 8, not 64"),
        (
            lambda: tiny_llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            {},
            'rope_type "dynamic" rotates by the longest sequence',
        ),
        (tiny_llama, {"max_batch": 0}, "max_batch=0 must be at least 1"),
        (
            tiny_llama,
            {"backend": "reference", "cuda_graphs": True},
            'cuda_graphs=True cannot hold the steps of backend="reference"',
        ),
        (
            lambda: tiny_llama(attn_implementation="flex_attention"),
            {},
            'attn_implementation="flex_attention" takes no mask of static keys',
        ),
    ],
)
def test_what_the_engine_does_not_compute_is_refused(build, options, text) -> None:
    with pytest.raises(ValueError, match=text):
        Engine(build(), **{**SMALL, **options})


def test_arguments_are_checked(mla) -> None:
    engine = Engine(mla, **SMALL)
    with pytest.raises(TypeError, match="prompts is one text; give a list"):
        engine.generate("one text")
    with pytest.raises(ValueError, match="the engine has no tokenizer; give token ids"):
        engine.generate(["one text"])
    with pytest.raises(ValueError, match="temperature=-1 is negative"):
        engine.stream(PROMPTS, temperature=-1)


def test_eager_attention_takes_the_mask(monkeypatch) -> None:
    model = tiny_llama(attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    found = tokens(Engine(model, **SMALL), max_new_tokens=12)
    assert found == [transformers_tokens(model, prompt, 12) for prompt in PROMPTS]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["mla", "tpla", "hybrid"])
def test_a_graph_of_the_step_writes_what_the_step_writes(kind) -> None:
    model = model_of(kind).to(torch.bfloat16).cuda()
    model.get_decoder().rotary_emb.float()
    for options in ({}, {"temperature": 0.8, "top_p": 0.9}):
        found = [
            tokens(Engine(model, **SMALL, cuda_graphs=graphs), max_new_tokens=12, **options)
            for graphs in (True, False)
        ]
        assert found[0] == found[1]
    if kind == "mla":
        # It reads on the host, so its steps are no graphs.
        assert tokens(Engine(model, **SMALL, backend="reference"), max_new_tokens=12)


@pytest.mark.parametrize("kind", ["tpla", "hybrid"])
def test_the_step_is_one_graph_to_the_compiler(kind, monkeypatch) -> None:
    model = model_of(kind)
    expected = tokens(Engine(model, **SMALL), PROMPTS[:2], max_new_tokens=4)
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    assert tokens(Engine(model, **SMALL, compile=True), PROMPTS[:2], max_new_tokens=4) == expected


@pytest.mark.gpu
def test_a_compiled_step_writes_what_the_step_writes() -> None:
    model = model_of("mla").cuda()
    found = [
        tokens(Engine(model, **{**SMALL, "max_batch": 1}, compile=compile), max_new_tokens=12)
        for compile in (True, False)
    ]
    assert found[0] == found[1]
