"""What each rank runs in test_loading: loads its part of every folder and reports what it saw as JSON lines."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import DynamicCache

import undivided  # noqa: F401
from undivided.distributed import open_distributed
from undivided.models.evaluation import cache_bytes


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ids = torch.load(folder / "ids.pt", weights_only=True)
    for path in sorted(p for p in folder.iterdir() if p.is_dir()):
        for shard_mlp in (False, True):
            model, _ = open_distributed(path, shard_mlp=shard_mlp)
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                logits = model(ids, past_key_values=cache).logits
                prefill = dict(model.collectives.counts)
                model.collectives.counts.clear()
                step = model(ids[:, :1], past_key_values=cache)
                decode = dict(model.collectives.counts)
                tokens = model.generate(ids[:1, :7], max_new_tokens=12, do_sample=False)
            attention = sum(p.numel() for layer in model.attention_layers() for p in layer.parameters())
            found = {
                "name": path.name, "rank": dist.get_rank(), "shard_mlp": shard_mlp, "logits": logits.tolist(),
                "step": step.logits.tolist(), "prefill": prefill, "decode": decode, "tokens": tokens.tolist(),
                "cache_bytes": cache_bytes(cache), "attention_numbers": attention,
                "all_numbers": sum(p.numel() for p in model.parameters()),
            }  # fmt: skip
            (folder / f"{path.name}-{dist.get_rank()}-{int(shard_mlp)}.json").write_text(json.dumps(found))
            dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
