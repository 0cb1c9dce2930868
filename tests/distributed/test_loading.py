"""The ranks of a real process group against one process, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from tests.tiny import tiny_config, tiny_tokenizer
from undivided.distributed import Collectives, LostPeerError, open_distributed
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig
from undivided.models.evaluation import cache_bytes

SIZES = dict(latent_dim=16, rope_dim=8, nope_dim=8, value_dim=8)
# name -> base model, entry of each layer
FORMS = {
    "mla": ("deepseek_v3", {"mechanism": "mla"}),
    "gla": ("deepseek_v3", {"mechanism": "gla", "num_latent_heads": 2}),
    "tpla": ("deepseek_v2", {"mechanism": "tpla", "num_shards": 2}),
    "tpla-exact-norm": ("deepseek_v3", {"mechanism": "tpla", "norm": "exact"}),
    "tpla-exact-softmax": ("deepseek_v3", {"mechanism": "tpla", "softmax": "exact"}),
    "tpla-separated": ("deepseek_v3", {"mechanism": "tpla", "prefill": "exact"}),
    "tpla-converted": ("gemma2", {"mechanism": "tpla", "latent_norm": False, "rope_stride": 2, **SIZES}),
    "tpla-query-bias": ("qwen2", {"mechanism": "tpla", "latent_norm": False, "query_bias": True, **SIZES}),
}
EXTRA = {
    "tpla-exact-norm": {"norm": 2},
    "tpla-exact-softmax": {"logits": 2},
    "tpla-separated": {"norm": 2, "logits": 2},
}
# The sums over shards that an exact mode needs are not made by MLA and GLA, whose ranks have nothing to share.
DECODE_EXTRA = {name: counts for name, counts in EXTRA.items() if name != "tpla-separated"}


def random_model(base: str, entry: dict) -> UndividedForCausalLM:
    torch.manual_seed(3)
    model = UndividedForCausalLM(UndividedConfig(base_config=tiny_config(base), attention=[entry] * 2)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for layer in model.attention_layers():
        for name, (low, high) in {"logit_scale": (0.5, 1.5), "norm_scale": (1.0, 3.0)}.items():
            if hasattr(layer, name):
                getattr(layer, name).uniform_(low, high)
    return model


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """Runs every form on 2 and on 4 ranks; returns world size, token ids, and for each form the ranks' reports."""
    folder = tmp_path_factory.mktemp(f"ranks{request.param}")
    ids = torch.randint(1, 256, (2, 11), generator=torch.Generator().manual_seed(5))
    torch.save(ids, folder / "ids.pt")
    for name, (base, entry) in FORMS.items():
        random_model(base, entry).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    script = str(Path(__file__).with_name("ranks.py"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={request.param}",
        script,
    ]
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    reports = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return request.param, ids, reports


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_ranks_equal_one_process(name, ranks):
    world_size, ids, reports = ranks
    model = random_model(*FORMS[name])
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache).logits
    step = model(ids[:, :1], past_key_values=cache).logits
    tokens = model.generate(ids[:1, :7], max_new_tokens=12, do_sample=False).tolist()
    mine = [report for report in reports if report["name"] == name]
    assert len(mine) == 2 * world_size
    for report in mine:
        torch.testing.assert_close(torch.tensor(report["logits"]), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.tensor(report["step"]), step, rtol=1e-5, atol=1e-5)
        assert report["tokens"] == tokens


@pytest.mark.parametrize("name", FORMS)
def test_one_collective_a_layer_and_what_exactness_adds(name, ranks):
    _, _, reports = ranks
    for report in (r for r in reports if r["name"] == name):
        mlp = {"mlp": 2} if report["shard_mlp"] else {}
        assert report["prefill"] == {"output": 2, **EXTRA.get(name, {}), **mlp}
        assert report["decode"] == {"output": 2, **DECODE_EXTRA.get(name, {}), **mlp}


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_a_rank_caches_its_shard_and_the_rope_key(name, ranks):
    world_size, ids, reports = ranks
    model = random_model(*FORMS[name])
    layer = model.attention_layers()[0]
    shards = 1 if name == "mla" else 2
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    model(ids[:, :1], past_key_values=cache)
    whole = cache_bytes(cache)
    share = (layer.latent_dim / shards + layer.rope_dim) / (layer.latent_dim + layer.rope_dim)
    for report in (r for r in reports if r["name"] == name):
        assert report["cache_bytes"] == whole * share


def test_a_rank_holds_its_slice_of_the_weights(ranks):
    world_size, _, reports = ranks
    whole = random_model(*FORMS["tpla"])
    attention = sum(p.numel() for layer in whole.attention_layers() for p in layer.parameters())
    for report in (r for r in reports if r["name"] == "tpla"):
        # Queries and values of a TPLA rank are those of its heads; the latent's columns are halved.
        assert report["attention_numbers"] < attention
        if report["shard_mlp"]:
            assert report["all_numbers"] < sum(p.numel() for p in whole.parameters()) - attention / 3


def test_a_native_folder_is_refused_before_loading(tmp_path):
    from tests.tiny import tiny_model

    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a native llama model; convert it to mla or tpla first"):
        open_distributed(tmp_path)


def test_sums_that_do_not_end_on_the_device_name_who_is_waited_for():
    sums = object.__new__(Collectives)
    sums.rank, sums.ranks, sums.timeout = 1, [0, 1], timedelta(seconds=0.05)
    ended = iter([False, False, True])
    sums._made = SimpleNamespace(query=lambda: next(ended))
    sums.settle()
    sums._made = SimpleNamespace(query=lambda: False)
    text = "rank 1 waited for rank 0 to make the sums of a step; nothing came within 0.04 s"
    with pytest.raises(LostPeerError, match=text):
        sums.settle()
    # Without a timeout of its own the process group's decides, and on the host nothing is under way.
    sums.timeout = None
    sums.settle()
