"""One step, and what the cache holds for it."""

from __future__ import annotations

import pytest
import torch

from tests.engine.models import model_of, random_prompts
from undivided.engine import Engine, Sampling
from undivided.engine.cache import EngineCache
from undivided.engine.prefill import read_prompts
from undivided.engine.sampling import sample
from undivided.engine.scheduler import Request

SMALL = {"max_tokens": 32, "max_batch": 4, "page_size": 8}


@pytest.fixture(scope="module")
def mla():
    return model_of("mla")


def request(place: int, pages: list[int], prompt: list[int], **sampling) -> Request:
    return Request(place, prompt, 8, Sampling(**sampling), tokens=[7], place=place, pages=pages)


def test_places_have_their_lengths_pages_and_counts(mla) -> None:
    cache = EngineCache(mla.attention_layers(), 4, 32, 10, 8)
    cache.place([request(2, [5, 1], list(range(9)))])
    assert cache.lengths.tolist() == [0, 0, 9, 0]
    assert cache.counts.tolist() == [0, 0, 1, 0]
    assert cache.block_table.tolist() == [[0] * 4, [0] * 4, [5, 1, 0, 0], [0] * 4]
    cache.place([request(0, [3], [1])])
    assert cache.counts.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", ["mla", "tpla"])
def test_rows_of_a_prompt_lie_in_its_pages_alone(kind) -> None:
    model = model_of(kind)
    engine = Engine(model, **SMALL)
    for pool in engine.cache.pools:
        pool.fill_(torch.nan)
    prompts = random_prompts(9, 3)
    group = [request(0, [4, 2], prompts[0]), request(1, [0], prompts[1])]
    read_prompts(model, engine._step, group, None)
    for pool in engine.cache.pools:
        filled = pool.isfinite().all(dim=-1)
        assert filled.any(dim=1).nonzero().flatten().tolist() == [0, 2, 4]
        assert [filled[page].sum().item() for page in (4, 2, 0)] == [8, 1, 3]


def test_a_step_with_every_place_idle_leaves_all_as_it_is(mla) -> None:
    # What the capture of a graph relies on.
    step = Engine(mla, **SMALL)._step
    step.place([request(1, [3], [1, 2, 3])])
    step.cache.counts.zero_()
    for pool in step.cache.pools:
        pool.zero_()
    before = [x.clone() for x in (step.tokens, step.cache.lengths, *step.cache.pools)]
    for sampled in (False, True):
        step.run(2, sampled)
    after = (step.tokens, step.cache.lengths, *step.cache.pools)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_a_step_advances_the_places_it_has_and_no_other(mla) -> None:
    step = Engine(mla, **SMALL)._step
    step.place([request(0, [1], [1, 2]), request(3, [2], [3, 4, 5])])
    step.run(2, sampled=False)
    assert step.cache.lengths.tolist() == [3, 0, 0, 3]
    step.run(4, sampled=False)
    assert step.cache.lengths.tolist() == [4, 0, 0, 4]


def test_token_k_is_drawn_with_number_k(mla) -> None:
    prompt = random_prompts(9)[0]
    sampling = Sampling(temperature=1.2, top_p=0.95, seed=4)
    numbers = sampling.uniforms(8)
    text: list[int] = []
    for number in numbers:
        with torch.no_grad():
            logits = mla(torch.tensor([prompt + text])).logits[:, -1]
        drawn = sample(logits, torch.tensor([1.2]), torch.tensor([0.95]), number[None])
        text.append(int(drawn))
    found = Engine(mla, **SMALL).generate(
        [prompt], max_new_tokens=8, temperature=1.2, top_p=0.95, seed=4, ignore_eos=True
    )
    assert found[0].tokens == text
