"""Models without masks: nothing is built while a graph is captured, and what was set before is set again."""

from __future__ import annotations

import pytest
import torch
import transformers.masking_utils

from tests.tiny import tiny_llama
from undivided.convert.x_ecomla import convert_x_ecomla
from undivided.models.bases import attention_layers, cache_argument, cache_of
from undivided.models.masks import without_masks


@pytest.mark.parametrize("host", [False, True])
def test_no_mask_is_built_while_a_graph_is_captured(monkeypatch, host):
    model = tiny_llama()
    if host:
        model = convert_x_ecomla(model, latent_dim=8, rope_dim=4)[0]
    # Written for transformers 5.17 to 5.23: under a capture nothing can be read, as under any tracing.
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda tensor=None: True)
    masks = []
    for layer in attention_layers(model):
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    ids = torch.arange(12)[None]
    with torch.no_grad():
        masked = model(ids, use_cache=False).logits
        assert all(isinstance(mask, torch.Tensor) for mask in masks)
        masks.clear()
        with without_masks(model):
            plain = model(ids, use_cache=False).logits
        assert masks and all(mask is None for mask in masks)
    torch.testing.assert_close(plain, masked)
    assert model.config._attn_implementation == "sdpa"
    # Behind a cache the model's own masks are needed again.
    with torch.no_grad():
        whole = model(ids, use_cache=True)
        cache = cache_of(model(ids[:, :6], use_cache=True))
        rest = model(ids[:, 6:], use_cache=True, **{cache_argument(): cache}).logits
    torch.testing.assert_close(rest, whole.logits[:, 6:])


def test_other_modules_are_left_as_they_are():
    with without_masks(torch.nn.Linear(2, 2)):
        pass
