"""Analytic cost of attention on the CPU: cache bytes, FLOPs and rooflines, from a model's shape alone.

`plan("DeepSeek-V3", "h200", context=32768, batch=64, world_size=8)` compares the ways to spread a model's
attention over devices; the formulas of each are pure functions in `undivided.cost.attention`, the devices'
nominal figures are in `undivided.cost.devices`. `undivided plan` prints the comparison. No weights, no torch.
"""

from undivided.cost.arrangements import OWN, TRAINED
from undivided.cost.attention import (
    AttentionShape,
    GroupedShape,
    LatentShape,
    RankAttention,
    grouped_context_parallel,
    grouped_data_parallel,
    grouped_tensor_parallel,
    key_value_heads_per_rank,
    latent_context_parallel,
    latent_data_parallel,
    latent_grouped,
    latent_sharded,
    latent_tensor_parallel,
    to_latent,
)
from undivided.cost.config import load_model, model_from_config
from undivided.cost.devices import DEVICES, ITEMSIZE, Device, get_device
from undivided.cost.plan import ASSUMPTIONS, RESERVED, PlanRow, num_parameters, plan
from undivided.cost.presets import PRESETS, ExpertShape, ModelShape

__all__ = [
    "ASSUMPTIONS",
    "DEVICES",
    "ITEMSIZE",
    "OWN",
    "PRESETS",
    "RESERVED",
    "TRAINED",
    "AttentionShape",
    "Device",
    "ExpertShape",
    "GroupedShape",
    "LatentShape",
    "ModelShape",
    "PlanRow",
    "RankAttention",
    "get_device",
    "grouped_context_parallel",
    "grouped_data_parallel",
    "grouped_tensor_parallel",
    "key_value_heads_per_rank",
    "latent_context_parallel",
    "latent_data_parallel",
    "latent_grouped",
    "latent_sharded",
    "latent_tensor_parallel",
    "load_model",
    "model_from_config",
    "num_parameters",
    "plan",
    "to_latent",
]
