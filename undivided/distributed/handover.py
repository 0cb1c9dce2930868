"""Separated prefill and decoding: MLA reads a prompt on some ranks, TPLA goes on with its cache on others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from undivided.distributed.ragged import RaggedBatch
from undivided.distributed.separation import Separation
from undivided.models.causal_lm import UndividedForCausalLM


@torch.no_grad()
def prefill_and_send(
    model: UndividedForCausalLM,
    separation: Separation,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """Reads prompts exactly and hands them over to the decode ranks, each layer as soon as its attention is computed.

    A decode rank is sent, for each layer and each token of a prompt, `latent_dim / num_shards + rope_dim` numbers: its
    columns of the latent, and the rotary key. Padding is not sent. The layer's MLP and the next layers are computed
    meanwhile; the call returns when everything has been taken. All prefill ranks make the same call.

    Args:
        model: of `Separation.open`, on a prefill rank.
        separation: the context.
        prompts: token ids, one list a prompt, of any lengths.
        max_new_tokens: longest continuation, in tokens.
        temperature: 0 takes the most probable token; above, samples.
        seed: of the sampling.

    Returns:
        The first new token of each prompt, which was handed over too.

    Raises:
        ValueError: a prompt is empty, an argument is out of range, or this rank decodes.
        LostPeerError: another rank was lost; the message names it and the layer.

    Source: TPLA (arXiv 2508.15881).
    """
    if not separation.prefills:
        raise ValueError(f"rank {separation.rank} decodes; it calls receive_and_decode.")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts has an empty prompt, or none; give at least one token each.")
    if max_new_tokens < 1 or temperature < 0:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} must be at least 1, and temperature={temperature} at least 0."
        )
    device = model.device
    batch = RaggedBatch([len(prompt) for prompt in prompts], device)
    request, receivers = separation.requests, separation.roles.receivers(separation.rank)
    separation.requests += 1
    # The temperature's bits, so that the decode ranks draw from the same distribution.
    bits = torch.tensor(temperature, dtype=torch.float64).view(torch.int64)
    header = torch.tensor([len(prompts), max_new_tokens, int(bits), seed])
    for rank in receivers:
        separation.send(header, rank, "header", f"to take request {request}")
        separation.send(batch.lengths.cpu(), rank, "header", f"to take request {request}")

    cache = DynamicCache()
    layers = model.attention_layers()

    def hand_over(index: int) -> None:
        rows = cache.layers[index]
        for rank in receivers:
            columns = separation.columns(index, layers[index].latent_dim, rank)
            packed = batch.pack(rows.keys[..., columns], rows.values)
            separation.send(packed, rank, "cache", f"to take layer {index} of request {request}")

    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    with _after_each(layers, hand_over):
        logits = model(
            batch.unpack(tokens[:, None]).flatten(1),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            past_key_values=cache,
            logits_to_keep=1,
        ).logits[:, -1]
    first = _Choice(temperature, seed, device)(logits).cpu()
    for rank in receivers:
        separation.send(first, rank, "token", f"to take the first tokens of request {request}")
    separation.flush()
    separation.steps_ahead = max_new_tokens
    return first.tolist()


@torch.no_grad()
def receive_and_decode(model: UndividedForCausalLM, separation: Separation) -> list[list[int]]:
    """Takes this rank's part of the cache of a request, and goes on from it together with the other decode ranks.

    All decode ranks make the same call, one for each call of `prefill_and_send`.

    Args:
        model: of `Separation.open`, on a decode rank.
        separation: the context.

    Returns:
        The new tokens of each prompt, the first of them chosen by the prefill ranks; up to and with the end token where
        there is one. They are those of one process with `prefill="exact"`.

    Raises:
        ValueError: this rank reads prompts.
        LostPeerError: another rank was lost; the message names it and the layer.

    Source: TPLA (arXiv 2508.15881).
    """
    if separation.prefills:
        raise ValueError(f"rank {separation.rank} reads prompts; it calls prefill_and_send.")
    device, dtype = model.device, model.dtype
    request, sender = separation.requests, separation.roles.sender(separation.rank)
    separation.requests += 1

    def begin(tensor: torch.Tensor, purpose: str, what: str) -> tuple[torch.Tensor, Callable[[], None]]:
        work = separation.receive(tensor, sender, purpose, what)
        return tensor, lambda: separation.wait(work, sender, what)

    def take(length: int, purpose: str, what: str) -> list[int]:
        tensor, arrived = begin(torch.empty(length, dtype=torch.int64), purpose, what)
        arrived()
        return tensor.tolist()

    num_prompts, max_new_tokens, bits, seed = take(4, "header", f"to announce request {request}")
    batch = RaggedBatch(take(num_prompts, "header", f"to announce request {request}"), device)

    layers = model.attention_layers()
    coming = []
    for index, layer in enumerate(layers):
        rows = torch.empty(batch.num_tokens, layer.latent_dim + layer.rope_dim, dtype=dtype, device=device)
        coming.append(begin(rows, "cache", f"to hand over layer {index} of request {request}"))
    first, first_arrived = begin(
        torch.empty(num_prompts, dtype=torch.int64),
        "token",
        f"to hand over the first tokens of request {request}",
    )
    cache = DynamicCache()
    for index, (layer, (rows, arrived)) in enumerate(zip(layers, coming, strict=True)):
        arrived()
        latent, rope_key = batch.unpack(rows).split([layer.latent_dim, layer.rope_dim], dim=-1)
        cache.update(latent, rope_key, index)
    first_arrived()

    choose = _Choice(float(torch.tensor(bits).view(torch.float64)), seed, device)
    if choose.temperature > 0:
        # The first tokens were drawn elsewhere; a draw of that size puts the generator where it stands there.
        choose(torch.zeros(num_prompts, model.config.get_text_config().vocab_size, device=device))
    return _decode(model, cache, batch, first.to(device), max_new_tokens, choose)


def generate_separated(
    path: str | Path,
    prompts: Sequence[str],
    *,
    prefill_ranks: int | Sequence[int] = 1,
    decode_ranks: Sequence[int] | None = None,
    timeout: timedelta = timedelta(minutes=2),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    chat: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    shard_mlp: bool = False,
) -> list[str] | None:
    """Continues prompts with prefill and decoding on separate ranks; every rank of the process group calls it alike.

    Args:
        path: a folder written by a converter, MLA or TPLA.
        prompts: texts.
        prefill_ranks, decode_ranks, timeout: as in `Separation`.
        max_new_tokens, temperature, seed: as in `prefill_and_send`.
        batch_size: prompts in a request; by default all in one. While one is decoded the next is read.
        chat: put every prompt into the model's chat template.
        dtype, device, shard_mlp: as in `load_distributed`.

    Returns:
        The continuations on a decode rank, None on a prefill rank.

    Raises:
        ValueError: the folder is damaged, the groups do not fit, or an argument is out of range.
        LostPeerError: another rank was lost; the message names it and the layer.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is too small; use at least 1.")
    size = batch_size or len(prompts)
    with Separation(prefill_ranks, decode_ranks, timeout=timeout) as separation:
        model, tokenizer = separation.open(path, dtype=dtype, device=device, shard_mlp=shard_mlp)
        if chat:
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            prompts = [
                tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
                for message in messages
            ]
        texts: list[str] = []
        for start in range(0, len(prompts), size):
            if separation.prefills:
                ids = [tokenizer(prompt).input_ids for prompt in prompts[start : start + size]]
                prefill_and_send(
                    model, separation, ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
                )
            else:
                tokens = receive_and_decode(model, separation)
                texts += [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
    return None if separation.prefills else texts


def _decode(
    model: UndividedForCausalLM,
    cache: DynamicCache,
    batch: RaggedBatch,
    token: torch.Tensor,
    max_new_tokens: int,
    choose: _Choice,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, `token [batch]` first."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    end_tokens = torch.tensor(ends, dtype=torch.int64, device=token.device)
    mask, position = batch.mask, batch.lengths
    tokens, ended = [token], torch.isin(token, end_tokens)
    while len(tokens) < max_new_tokens and not ended.all():
        mask = F.pad(mask, (0, 1), value=1)
        out = model(
            token[:, None], attention_mask=mask, position_ids=position[:, None], past_key_values=cache
        )
        token, position = choose(out.logits[:, -1]), position + 1
        tokens.append(token)
        ended = ended | torch.isin(token, end_tokens)
    found = []
    for row in torch.stack(tokens, dim=1).tolist():
        end = next((place for place, number in enumerate(row) if number in ends), len(row))
        found.append(row[: end + 1])
    return found


class _Choice:
    """The next token from logits `[batch, vocabulary]`; two with one seed draw alike."""

    def __init__(self, temperature: float, seed: int, device: torch.device) -> None:
        self.temperature = temperature
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        probabilities = torch.softmax(logits.float() / self.temperature, dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(-1)


@contextmanager
def _after_each(layers: Sequence[torch.nn.Module], action: Callable[[int], None]) -> Iterator[None]:
    """Calls `action` with a layer's index when its forward has ended."""
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: action(index))
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
