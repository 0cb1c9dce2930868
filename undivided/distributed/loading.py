"""Loading a checkpoint over ranks: each reads from disk only the parts it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from undivided.distributed.attention import RankLatentAttention
from undivided.distributed.collectives import Collectives
from undivided.distributed.layout import Layout
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.checkpoint import check_folder
from undivided.models.configuration import UndividedConfig
from undivided.models.registration import MODEL_TYPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RankMLP(nn.Module):
    """One rank's columns of a gated MLP, summed over ranks: one more all-reduce a layer.

    Args:
        mlp: a native MLP with `gate_proj`, `up_proj` and `down_proj`; its projections are narrowed in place.
        rank, world_size: of this process; `world_size` divides the MLP's width.
        collectives: the sums over ranks.
        layer_idx: index of the layer.
    """

    def __init__(
        self, mlp: nn.Module, rank: int, world_size: int, collectives: Collectives, layer_idx: int
    ) -> None:
        super().__init__()
        width = mlp.down_proj.in_features
        if width % world_size:
            raise ValueError(
                f"world_size={world_size} does not divide the MLP's width {width}; leave shard_mlp off."
            )
        self.rows = slice(rank * (width // world_size), (rank + 1) * (width // world_size))
        self.mlp = mlp
        self.collectives = collectives
        self.layer_idx = layer_idx
        hidden, local = mlp.down_proj.out_features, width // world_size
        for name in ("gate_proj", "up_proj"):
            setattr(mlp, name, nn.Linear(hidden, local, bias=False))
        mlp.down_proj = nn.Linear(local, hidden, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.collectives.sum_over_world(self.mlp(hidden_states), "mlp", self.layer_idx)

    def slices(self) -> dict[str, list[tuple[slice, ...]]]:
        """Returns which parts of each tensor of the whole MLP make this rank's."""
        return {
            "gate_proj.weight": [(self.rows,)],
            "up_proj.weight": [(self.rows,)],
            "down_proj.weight": [(slice(None), self.rows)],
        }


def open_distributed(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    shard_mlp: bool = False,
) -> tuple[UndividedForCausalLM, PreTrainedTokenizerBase]:
    """Checks a converted checkpoint folder and loads this rank's part of the model, and the tokenizer.

    Arguments, results and errors are those of `load_distributed`; a folder that is damaged, or that holds a native
    model, is refused with a sentence before anything is loaded.
    """
    config, tokenizer = open_folder(path)
    return load_distributed(path, dtype=dtype, device=device, shard_mlp=shard_mlp, config=config), tokenizer


def open_folder(path: str | Path) -> tuple[UndividedConfig, PreTrainedTokenizerBase]:
    """Checks a converted checkpoint folder and returns its config and tokenizer.

    Raises:
        ValueError: the folder is damaged, or holds a native model.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = Path(path)
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder; over ranks only a converted checkpoint folder can be loaded."
        )
    check_folder(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if config.model_type != MODEL_TYPE:
        raise ValueError(f"{path} holds a native {config.model_type} model; convert it to mla or tpla first.")
    return config, AutoTokenizer.from_pretrained(path, local_files_only=True)


def load_distributed(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    shard_mlp: bool = False,
    config: UndividedConfig | None = None,
    collectives: Collectives | None = None,
) -> UndividedForCausalLM:
    """Loads this rank's part of a checkpoint whose layers are MLA, GLA or TPLA.

    Every rank holds its shard of the latent (weights and cache), its run of the heads, and the rest of the model
    whole; a rank that is alone holds the model as one process would. A layer costs one all-reduce a forward (two
    with `shard_mlp`). `torch.distributed` must be initialised.

    Args:
        path: a folder written by a converter.
        dtype: of the loaded weights; by default the checkpoint's.
        device: where they go.
        shard_mlp: also split the MLPs over the ranks.
        config: how the weights are read; by default as the folder's config says.
        collectives: of the ranks that hold the model together; by default those of all ranks.

    Returns:
        The model; `model.collectives` counts what crossed the ranks.

    Raises:
        ValueError: the world size does not fit shards and heads (the message says which would), a layer has no
            latent attention, or a tensor is missing from the files.
        LostPeerError: one of the ranks is lost.
    """
    from accelerate import init_empty_weights

    path = Path(path)
    config = UndividedConfig.from_pretrained(path) if config is None else config
    members = list(range(dist.get_world_size())) if collectives is None else collectives.ranks
    alone = len(members) == 1
    layouts = [] if alone else rank_layouts(config, members.index(dist.get_rank()), len(members))
    if collectives is None:
        collectives = Collectives(1 if alone else layouts[0].num_shards)
    # Buffers are real from the start: rotary tables are computed, not loaded.
    with init_empty_weights(include_buffers=False):
        model = UndividedForCausalLM(config)
    slices: dict[str, list[tuple[slice, ...]]] = {}
    for index, (layer, layout) in enumerate(zip(model.decoder_layers, layouts, strict=not alone)):
        prefix = next(name for name, module in model.named_modules() if module is layer)
        with init_empty_weights(include_buffers=False):
            part = RankLatentAttention(layer.self_attn, layout, collectives)
            slices |= {f"{prefix}.self_attn.{k}": v for k, v in part.slices(layer.self_attn).items()}
            layer.self_attn = part
            if shard_mlp:
                if not hasattr(layer.mlp, "down_proj"):
                    raise ValueError(
                        f"shard_mlp=True, but the MLP of layer {index} is a {type(layer.mlp).__name__}."
                    )
                mlp = RankMLP(layer.mlp, layout.rank, layout.world_size, collectives, index)
                slices |= {f"{prefix}.mlp.{k}": v for k, v in mlp.slices().items()}
                layer.mlp = mlp
    _read_parts(model, path, slices, dtype or config.dtype or torch.float32)
    model.to(device).eval()
    model.collectives = collectives
    # A step ends with a copy to the host, which would wait for a lost rank for ever.
    model.register_forward_hook(lambda *_: collectives.settle())
    return model


def rank_layouts(config: UndividedConfig, rank: int, world_size: int) -> list[Layout]:
    """Returns the layout of every layer for one rank.

    Raises:
        ValueError: a layer is native (nothing to spread), or layers differ in their shards, or the world size does
            not fit.
    """
    layouts = []
    for index, entry in enumerate(config.attention or []):
        if entry is None:
            raise ValueError(
                f"layer {index} has its native attention, which is not spread over ranks; convert it first."
            )
        layouts.append(Layout.of_entry(entry, config.get_text_config().num_attention_heads, rank, world_size))
    if len({layout.num_shards for layout in layouts}) > 1:
        raise ValueError("the layers differ in their number of shards; ranks can hold only one grid.")
    return layouts


def _read_parts(
    model: UndividedForCausalLM, path: Path, slices: dict[str, list[tuple[slice, ...]]], dtype: torch.dtype
) -> None:
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    wanted = {_stored_name(name): name for name in model.state_dict()}
    for file, names in _files(path).items():
        with safe_open(path / file, framework="pt") as opened:
            for stored in names:
                if stored in wanted:
                    tensors[wanted[stored]] = _read(opened, stored, slices.get(stored)).to(dtype)
    missing, _ = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    still_missing = [name for name in missing if model.get_parameter(name).is_meta] if missing else []
    if still_missing:
        raise ValueError(
            f"{path} lacks {', '.join(still_missing[:3])}{' and more' if len(still_missing) > 3 else ''}."
        )


def _stored_name(name: str) -> str:
    # A sharded MLP stands one module deeper than the one it wraps.
    return name.replace(".mlp.mlp.", ".mlp.")


def _read(opened: Any, name: str, parts: list[tuple[slice, ...]] | None) -> torch.Tensor:
    if parts is None:
        return opened.get_tensor(name)
    view = opened.get_slice(name)
    return torch.cat([view[part] for part in parts]) if len(parts) > 1 else view[parts[0]]


def _files(path: Path) -> dict[str, list[str]]:
    """Returns the safetensors files of a folder, each with the tensors it holds."""
    from safetensors import safe_open

    index = path / "model.safetensors.index.json"
    if index.exists():
        files: dict[str, list[str]] = {}
        for name, file in json.loads(index.read_text())["weight_map"].items():
            files.setdefault(file, []).append(name)
        return files
    with safe_open(path / "model.safetensors", framework="pt") as opened:
        return {"model.safetensors": list(opened.keys())}
