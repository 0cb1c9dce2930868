"""What a conversion costs: perplexity, divergence from the original, other words, bytes of the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from undivided.data.text import token_blocks
from undivided.models.bases import cache_argument, cache_of

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Progress = Callable[[Iterable[Any], str], Iterable[Any]]

DEFAULT_BLOCK = 2048
# Rows of logits turned into float32 log-probabilities at once: 256 x 128K words are 134 MB.
_ROWS = 256


def no_progress(items: Iterable[Any], description: str) -> Iterable[Any]:
    """The default `progress`: goes through `items` and says nothing."""
    return items


@dataclass(frozen=True)
class Evaluation:
    """Result of `perplexity` and `decode_perplexity`.

    Attributes:
        perplexity: exp(nll).
        nll: mean negative log-likelihood of a predicted token, in nats.
        tokens: number of predicted tokens.
    """

    perplexity: float
    nll: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        kl: mean over positions of KL(reference || model), in nats.
        agreement: fraction of positions where both give the same token the highest probability.
        tokens: number of positions.
        model: what `perplexity` gives for the model.
        reference: what `perplexity` gives for the reference.
    """

    kl: float
    agreement: float
    tokens: int
    model: Evaluation
    reference: Evaluation


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    block: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Perplexity of a causal language model on a text cut into non-overlapping blocks.

    `exp(-1/T sum_t log p(x_t | x_<t of the same block))`, over all tokens of a block but its first;
    log-softmax in float32, sums in float64.

    Args:
        model: the model.
        tokenizer: its tokenizer. If it puts a beginning-of-sequence token before a text, every block has one.
        text: the text.
        block: tokens a block; by default 2048, or the model's context if that is shorter.
        max_tokens: use only so many tokens of the text.
        progress: wraps the loop over blocks; called with an iterable and a description.

    Returns:
        Perplexity, mean negative log-likelihood in nats, number of predicted tokens.

    Raises:
        ValueError: the block exceeds the model's context, the text is too short, or logits are not finite.
    """
    total, tokens = 0.0, 0
    with _evaluating(model):
        for ids in progress(_blocks(model, tokenizer, text, block, max_tokens), "perplexity"):
            ids = ids.to(model.device)
            logits = model(ids, use_cache=False).logits[0, :-1]
            total += _nll(logits, ids[0, 1:]).item()
            tokens += ids.shape[1] - 1
    return _evaluation(total, tokens)


def decode_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    prefix: int | None = None,
    step: int = 1,
    max_tokens: int | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Perplexity of the second part of a text, read token by token through the cache.

    The prefix is prefilled in one pass; every later token is fed alone, with the cache as its only memory,
    and counts. For a model whose prefill and decode agree this is its ordinary perplexity on those tokens.
    A `step` above 1 feeds so many tokens at once, which is faster and still reads what came before from the
    cache.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: the text.
        prefix: tokens to prefill; by default half of all.
        step: tokens fed at once.
        max_tokens: use only so many tokens of the text; by default 512, or the model's context if that is
            shorter.
        progress: wraps the loop over steps; called with an iterable and a description.

    Returns:
        Perplexity, mean negative log-likelihood in nats, number of predicted tokens.

    Raises:
        ValueError: max_tokens exceeds the context, prefix leaves nothing to predict, step is not positive, or
            logits are not finite.
    """
    block = _block(model, max_tokens, "max_tokens", default=512)
    ids = token_blocks(tokenizer, text, block, block)[0].to(model.device)
    length = ids.shape[1]
    prefix = length // 2 if prefix is None else prefix
    if step < 1:
        raise ValueError(f"step={step} is too small; use at least 1.")
    if not 1 <= prefix < length:
        raise ValueError(f"prefix={prefix} does not split {length} tokens; use 1 to {length - 1}.")
    total = 0.0
    with _evaluating(model):
        output = model(ids[:, :prefix], use_cache=True)
        total += _nll(output.logits[0, -1:], ids[0, prefix : prefix + 1]).item()
        for start in progress(range(prefix, length - 1, step), "decoding"):
            stop = min(start + step, length - 1)
            output = model(ids[:, start:stop], use_cache=True, **{cache_argument(): cache_of(output)})
            total += _nll(output.logits[0], ids[0, start + 1 : stop + 1]).item()
    return _evaluation(total, length - prefix)


def compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    block: int | None = None,
    max_tokens: int | None = None,
    progress: Progress = no_progress,
) -> Comparison:
    """Distance of a model from a reference, position by position of a text.

    `1/T sum_t sum_w p_ref(w | x_<=t) (log p_ref(w | x_<=t) - log p(w | x_<=t))`, on the positions that
    `perplexity` counts; log-softmax in float32, sums in float64.

    Args:
        model: the model.
        reference: the model it is compared with, of the same vocabulary.
        tokenizer: the tokenizer of both.
        text: the text.
        block: tokens a block; by default 2048, or the shorter context of the two if that is shorter.
        max_tokens: use only so many tokens of the text.
        progress: wraps the loop over blocks; called with an iterable and a description.

    Returns:
        Mean KL divergence in nats, fraction of equal most probable tokens, and both perplexities.

    Raises:
        ValueError: the vocabularies differ, the block exceeds a context, or logits are not finite.
    """
    block = min(_block(model, block), _block(reference, block))
    kl, nll, reference_nll, equal, tokens = 0.0, 0.0, 0.0, 0, 0
    with _evaluating(model), _evaluating(reference):
        for ids in progress(_blocks(model, tokenizer, text, block, max_tokens), "comparison"):
            logits = model(ids.to(model.device), use_cache=False).logits[0, :-1]
            wanted = reference(ids.to(reference.device), use_cache=False).logits[0, :-1].to(logits.device)
            if logits.shape != wanted.shape:
                raise ValueError(
                    f"model has {logits.shape[-1]} words, reference {wanted.shape[-1]}: not one vocabulary."
                )
            targets = ids[0, 1:].to(logits.device)
            nll += _nll(logits, targets).item()
            reference_nll += _nll(wanted, targets).item()
            for rows, wanted_rows in zip(logits.split(_ROWS), wanted.split(_ROWS), strict=True):
                log_p, log_q = _log_softmax(wanted_rows), _log_softmax(rows)
                kl += (log_p.exp() * (log_p - log_q)).sum(-1).sum(dtype=torch.float64).item()
                equal += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            tokens += targets.numel()
    return Comparison(
        kl=kl / tokens,
        agreement=equal / tokens,
        tokens=tokens,
        model=_evaluation(nll, tokens),
        reference=_evaluation(reference_nll, tokens),
    )


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 64
) -> str:
    """Returns the greedy continuation of a prompt, without the prompt and without special tokens."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    return tokenizer.decode(_greedy(model, ids, max_new_tokens)[0, ids.shape[1] :], skip_special_tokens=True)


def token_agreement(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
) -> float:
    """Fraction of the reference's greedy tokens that the model would have chosen too.

    The reference continues each prompt greedily; the model reads prompt and continuation in one pass, and its
    most probable token is compared at every position of the continuation. One early difference counts once,
    unlike in a comparison of two free continuations.

    Args:
        model: the model.
        reference: the model whose greedy continuations are read.
        tokenizer: the tokenizer of both.
        prompts: at least one prompt.
        max_new_tokens: longest continuation.

    Raises:
        ValueError: no prompts.
    """
    if not prompts:
        raise ValueError("prompts is empty; give at least one.")
    equal, tokens = 0, 0
    with _evaluating(model), _evaluating(reference):
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids.to(reference.device)
            written = _greedy(reference, ids, max_new_tokens).to(model.device)
            chosen = model(written[:, :-1], use_cache=False).logits[0, ids.shape[1] - 1 :].argmax(-1)
            continuation = written[0, ids.shape[1] :]
            equal += int((chosen == continuation).sum())
            tokens += continuation.numel()
    return equal / tokens


def cache_bytes(cache: Cache) -> int:
    """Returns the bytes of what a transformers cache holds: keys, values and other states of every layer.

    Counted are the tensors of the layers, but for scalars (lengths and counters), each once, even where one
    tensor serves as keys and as values.
    """
    held: dict[tuple[int, tuple[int, ...]], int] = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            if tensor.ndim and tensor.numel():
                held[tensor.data_ptr(), tuple(tensor.shape)] = tensor.numel() * tensor.element_size()
    return sum(held.values())


def cache_bytes_per_token(model: PreTrainedModel) -> float:
    """Returns by how many bytes a token of one sequence makes the model's cache grow.

    Measured: the cache is filled with 64 and with 128 tokens (half and whole of a shorter context). What does
        not
    grow, such as a recurrent state or a window of fewer than 64 tokens, counts nothing.
    """
    longer = min(128, _context(model))
    shorter = longer // 2
    ids = torch.arange(longer, device=model.device)[None] % model.get_input_embeddings().weight.shape[0]
    with _evaluating(model):
        caches = [cache_of(model(ids[:, :length], use_cache=True)) for length in (shorter, longer)]
    sizes = [cache_bytes(cache) for cache in caches]
    return (sizes[1] - sizes[0]) / (longer - shorter)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode without gradients; the model's own mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _context(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().max_position_embeddings)


def _block(
    model: PreTrainedModel, block: int | None, argument: str = "block", default: int = DEFAULT_BLOCK
) -> int:
    context = _context(model)
    if block is None:
        return min(default, context)
    if block > context:
        raise ValueError(f"{argument}={block} exceeds the model's context; use at most {context}.")
    return block


def _blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    block: int | None,
    max_tokens: int | None,
) -> list[Tensor]:
    return token_blocks(tokenizer, text, _block(model, block), max_tokens)


def _log_softmax(logits: Tensor) -> Tensor:
    # A float64 model is evaluated in float64.
    log_probabilities = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    if not torch.isfinite(log_probabilities).all():
        raise ValueError("the model's logits are not finite; its weights or its arithmetic overflow.")
    return log_probabilities


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the negative log-likelihoods of `targets` `[T]` under `logits` `[T, words]`, float64."""
    parts = zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
    sums = [_log_softmax(rows).gather(-1, ids[:, None]).sum(dtype=torch.float64) for rows, ids in parts]
    return -torch.stack(sums).sum()


def _evaluation(total: float, tokens: int) -> Evaluation:
    nll = total / tokens
    # Not math.exp: it raises where a useless model's perplexity overflows to infinity.
    return Evaluation(perplexity=torch.tensor(nll, dtype=torch.float64).exp().item(), nll=nll, tokens=tokens)


def _greedy(model: PreTrainedModel, ids: Tensor, max_new_tokens: int) -> Tensor:
    from transformers import GenerationConfig

    # A fresh config: the checkpoint's own may sample.
    end = model.generation_config.eos_token_id if model.generation_config is not None else None
    padding = end[0] if isinstance(end, list) else end
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=end, pad_token_id=padding
    )
    with _evaluating(model):
        return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
