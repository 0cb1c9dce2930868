"""`undivided generate`: the continuation of a prompt, in one process or over ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch


def command(
    src: Annotated[
        str, typer.Argument(help="Checkpoint folder, smollm2-135m, or a name on the Hub (org/name).")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most probable token; above, samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16 [as the checkpoint].")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [cuda where there is one].")] = None,
    shard_mlp: Annotated[
        bool,
        typer.Option("--shard-mlp", help="Over ranks: split the MLPs too, for one more all-reduce a layer."),
    ] = False,
    prefill_ranks: Annotated[
        int, typer.Option(help="Over ranks: so many of them read the prompt, exactly; the others decode.")
    ] = 0,
    attention: Annotated[
        str | None,
        typer.Option(help="Another attention that takes the weights as they are: dhsa or core_context."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="Of that attention, such as budget=2048; may be repeated.")
    ] = None,
) -> None:
    """Generate text with a checkpoint; on stdout the continuation alone.

    With --attention the checkpoint is read with another attention, which changes no weight: dhsa reads long prompts
    in part (--option boundaries=fixed, or a checkpoint of undivided convert --to dhsa, which learns where to cut).

    On CUDA a model with latent attention is decoded by this library's engine, and its tokens are printed as they
    come; any other model is decoded by transformers.

    Under `torchrun --nproc-per-node N -m undivided generate ...` every rank holds only its part of the latent cache
    and of the attention's weights; the first rank prints, with --prefill-ranks the first that decodes.
    """
    import torch

    from undivided.cli._options import dtype_of

    if not prompt:
        raise ValueError("PROMPT is empty; give some text to continue.")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {max_new_tokens} is too small; use at least 1.")
    if temperature < 0:
        raise ValueError(f"--temperature {temperature} is negative; use 0 or more.")
    if option and attention is None:
        raise ValueError(f"--option {option[0]} belongs to an attention; name it with --attention.")
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with _process_group(place) as rank:
        if prefill_ranks:
            if rank is None:
                raise ValueError("--prefill-ranks needs several ranks; start with torchrun.")
            if attention is not None:
                raise ValueError("--attention and --prefill-ranks do not go together.")
            from undivided.distributed import generate_separated

            texts = generate_separated(
                src, [prompt], prefill_ranks=prefill_ranks, max_new_tokens=max_new_tokens, temperature=temperature,
                seed=seed, chat=chat, dtype=dtype_of(dtype), device=place, shard_mlp=shard_mlp,
            )  # fmt: skip
            if texts is not None and rank == prefill_ranks:
                typer.echo(texts[0])
            return
        model, tokenizer = _load(src, dtype_of(dtype), place, rank, shard_mlp)
        if attention is not None:
            if rank is not None:
                raise ValueError("--attention runs in one process; start without torchrun.")
            from undivided.convert import attach

            model = attach(model, attention, **_options(option or []))
        if chat:
            message = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        if rank is None and place.type == "cuda" and _is_latent(model):
            pieces = _by_engine(model, tokenizer, prompt, max_new_tokens, temperature, seed)
        else:
            pieces = _by_transformers(model, tokenizer, prompt, max_new_tokens, temperature, seed)
        for piece in pieces:
            if rank in (None, 0):
                typer.echo(piece, nl=False)
        if rank in (None, 0):
            typer.echo()


def _options(given: list[str]) -> dict[str, Any]:
    """Reads `name=value`, where a value is a number, true, false or a word."""
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--option {text} is not of the form name=value, such as budget=2048.")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _is_latent(model: Any) -> bool:
    from undivided.engine import has_latent_layers

    return has_latent_layers(model)


def _by_engine(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    from undivided.engine import Engine

    ids = tokenizer(prompt).input_ids
    engine = Engine(model, tokenizer, max_tokens=len(ids) + max_new_tokens, max_batch=1)
    for event in engine.stream([ids], max_new_tokens=max_new_tokens, temperature=temperature, seed=seed):
        yield event.text


def _by_transformers(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float, seed: int
) -> Iterator[str]:
    import torch

    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling |= {"do_sample": True, "temperature": temperature}
    # The same seed on every rank: all of them draw the same token from the same logits.
    torch.manual_seed(seed)
    with torch.no_grad():
        ids = model.generate(
            **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.eos_token_id, **sampling
        )
    yield tokenizer.decode(ids[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@contextmanager
def _process_group(device: torch.device) -> Iterator[int | None]:
    """Joins the other ranks where torchrun has started several; yields this process's rank, or None if it is alone."""
    import torch
    import torch.distributed as dist

    if not dist.is_torchelastic_launched():
        yield None
        return
    # Imported later, it would keep the process group, as a default argument, beyond its destruction; gloo's threads
    # would then run into the end of the interpreter, and now and then abort it.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        if device.type == "cuda":
            torch.cuda.set_device(dist.get_node_local_rank())
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def _load(
    src: str, dtype: torch.dtype | None, device: torch.device, rank: int | None, shard_mlp: bool
) -> tuple[Any, Any]:
    from undivided.cli._console import note
    from undivided.models.checkpoint import open_checkpoint

    if rank is None:
        if shard_mlp:
            raise ValueError("--shard-mlp needs several ranks; start with torchrun.")
        checkpoint = open_checkpoint(src, dtype=dtype, device=device, progress=note)
        return checkpoint.model, checkpoint.tokenizer
    from undivided.distributed import open_distributed

    return open_distributed(Path(src), dtype=dtype, device=device, shard_mlp=shard_mlp)
