from __future__ import annotations

import pytest
import torch

pytest.importorskip("timm")

from undivided.convert.sparsifiner import SparsifinerLoss, sparse_layers, sparsify  # noqa: E402
from undivided.models.vision.lvvit import LVViT  # noqa: E402


def small():
    torch.manual_seed(0)
    model = LVViT(32, 8, 1, 5, embed_dim=12, depth=2, num_heads=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images():
    return torch.randn(3, 1, 32, 32)


def test_parameters_are_those_of_lv_vit_s():
    with torch.device("meta"):
        assert sum(p.numel() for p in LVViT().parameters()) == 26_151_824


def test_branches_are_halved_and_patches_have_their_say_in_evaluation():
    model, x = small(), images()
    block, tokens = model.blocks[0], torch.randn(2, 17, 12)
    middle = tokens + block.attn(block.norm1(tokens)) / 2
    torch.testing.assert_close(block(tokens), middle + block.mlp(block.norm2(middle)) / 2)
    features = model.forward_features(x)
    cls, patches = model.head(features[:, 0]), model.aux_head(features[:, 1:])
    torch.testing.assert_close(model(x), cls + patches.max(1).values / 2)
    model.patch_embed.eval()
    model.training = True
    torch.testing.assert_close(model(x), cls)


def test_sparsifiner_is_made_from_it_and_distils_the_classes_of_patches():
    model, x = small(), images()
    sparse, _ = sparsify(model, keep=1.0, reduce_n=2)
    assert len(sparse_layers(sparse)) == 2
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)
    sparse, _ = sparsify(model, keep=0.2, reduce_n=2)
    theirs, ours = (m.aux_head(m.forward_features(x)[:, 1:]) for m in (model, sparse))
    found = SparsifinerLoss(model, (0, 0, 1))(sparse, x, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(found, (ours - theirs).square().mean())
    assert found > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="patch_size=8 must be even and divide img_size=30"):
        LVViT(30, 8)
    with pytest.raises(
        ValueError, match="state_dict and the model differ in 1 names, the first 'aux_head.bias'"
    ):
        small().load_official({k: v for k, v in small().state_dict().items() if k != "aux_head.bias"})
