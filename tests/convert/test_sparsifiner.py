from __future__ import annotations

import math

import pytest
import torch

timm = pytest.importorskip("timm")

from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from undivided.convert.sparsifiner import (  # noqa: E402
    SparsifinerLoss,
    basis_loss,
    reconstruction_loss,
    set_phase,
    sparse_layers,
    sparsify,
    two_phase_schedule,
)


def vit(**options):
    torch.manual_seed(0)
    sizes = dict(img_size=16, patch_size=4, in_chans=1, num_classes=5, embed_dim=16, depth=3, num_heads=2)
    model = VisionTransformer(**{**sizes, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(count=4):
    return torch.randn(count, 1, 16, 16)


SMALL = {"reduce_n": 3, "coef_topk": 3}


def test_with_all_keys_the_model_is_that_it_came_from():
    model = vit()
    sparse, report = sparsify(model, keep=1.0, **SMALL)
    x = images()
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-5)
    assert report.method == "sparsifiner" and report.approximations == []
    assert type(model.blocks[0].attn).__name__ == "Attention"


def test_the_report_has_both_stages_and_what_is_left_out():
    sparse, report = sparsify(vit(), keep=0.25, evaluate=lambda model: model(images(1)).sum().item(), **SMALL)
    assert list(report.perplexity) == ["original", "sparse"]
    assert report.approximations[0].startswith("each query but the class token's attends to 5 of 17 keys")


def test_thresholds_reach_every_layer_and_the_report():
    sparse, report = sparsify(vit(), coef_threshold=5e-2, score_threshold=1e-4, **SMALL)
    predictors = [layer.predictor for layer in sparse_layers(sparse)]
    assert {(p.coef_threshold, p.score_threshold) for p in predictors} == {(5e-2, 1e-4)}
    assert report.approximations == [
        "each query but the class token's attends to keys of a score above 0.0001"
    ]
    assert sparse(images()).isfinite().all()


def test_phase_one_changes_predictors_alone_and_phase_two_all_else():
    model = vit()
    sparse, _ = sparsify(model, keep=0.3, **SMALL)
    sparse.train()
    criterion = SparsifinerLoss(model)
    x, labels = images(), torch.tensor([0, 1, 2, 3])
    for phase in two_phase_schedule((1, 1)):
        set_phase(sparse, phase.name)
        before = {name: value.clone() for name, value in sparse.state_dict().items()}
        optimiser = torch.optim.AdamW([p for p in sparse.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            if phase.name == "reconstruct":
                sparse(x)
                loss = reconstruction_loss(sparse)
            else:
                loss = criterion(sparse, x, labels)
            loss.backward()
            optimiser.step()
        changed = {
            name for name, value in sparse.state_dict().items() if not torch.equal(value, before[name])
        }
        predictors = {name for name in before if ".predictor." in name}
        others = set(before) - predictors - {"cls_token", "pos_embed"}
        assert changed == (predictors if phase.name == "reconstruct" else others)
    assert all(not p.requires_grad for p in model.parameters())


def test_reconstruction_falls_when_predictors_are_trained():
    sparse, _ = sparsify(vit(), **SMALL)
    set_phase(sparse, "reconstruct")
    optimiser = torch.optim.Adam([p for p in sparse.parameters() if p.requires_grad], lr=1e-2)
    x, losses = images(), []
    for _ in range(30):
        sparse(x)
        loss = reconstruction_loss(sparse)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_is_classes_teacher_and_tokens():
    model = vit()
    sparse, _ = sparsify(model, keep=0.2, **SMALL)
    x, labels = images(), torch.tensor([0, 1, 2, 3])
    teacher, student = model.forward_features(x), sparse.forward_features(x)
    log_t, log_s = (m.forward_head(f).log_softmax(-1) for m, f in ((model, teacher), (sparse, student)))
    ce = -log_s[torch.arange(4), labels].mean()
    kl = (log_t.exp() * (log_t - log_s)).sum() / 4
    mse = (student - teacher)[:, 1:].square().mean()
    torch.testing.assert_close(SparsifinerLoss(model)(sparse, x, labels), ce + 0.5 * kl + 0.5 * mse)
    assert mse > 0 and kl > 0
    soft = torch.eye(5)[labels]
    torch.testing.assert_close(SparsifinerLoss(model, (1, 0, 0))(sparse, x, soft), ce)


def test_tokens_may_be_compared_as_distributions():
    model = vit()
    sparse, _ = sparsify(model, keep=0.2, **SMALL)
    x, labels = images(), torch.tensor([0, 1, 2, 3])
    theirs, ours = (m.forward_features(x)[:, 1:].log_softmax(-1).flatten(0, 1) for m in (model, sparse))
    want = torch.nn.functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    torch.testing.assert_close(SparsifinerLoss(model, (0, 0, 1), "kl")(sparse, x, labels), want)


def test_both_are_trained_at_once_by_the_map_that_chooses():
    sparse, _ = sparsify(vit(), keep=0.3, **SMALL)
    set_phase(sparse, "joint")
    x = images()
    out = sparse(x)
    loss = reconstruction_loss(sparse, 0.002)
    (loss + out.square().sum()).backward()
    for name, parameter in sparse.named_parameters():
        assert (parameter.grad is None) == (name in ("cls_token", "pos_embed"))
    layer = sparse_layers(sparse)[0]
    query, key, _ = layer.heads(sparse.blocks[0].norm1(sparse._pos_embed(sparse.patch_embed(x))))
    weights = (layer.scale * query @ key.transpose(-2, -1)).softmax(-1)[:, :, 1:]
    want = (layer.predictor(query, key).approximation - weights).square().sum()
    torch.testing.assert_close(layer.reconstruction_error, want)
    set_phase(sparse, "sparse")
    torch.testing.assert_close(sparse(x), out)


def test_the_loss_of_the_bases_is_the_sum_of_their_entries():
    sparse, _ = sparsify(vit(), **SMALL)
    want = sum(layer.predictor.up.abs().sum() for layer in sparse_layers(sparse))
    torch.testing.assert_close(basis_loss(sparse, 0.1), 0.1 * want)


def test_pruned_tokens_are_zero_after_every_block_and_counted():
    sparse, report = sparsify(vit(depth=4), keep=0.5, prune_after=(0, 2), token_keep=0.6, **SMALL)
    outputs = []
    for block in sparse.blocks:
        block.register_forward_hook(lambda module, given, out: outputs.append(out))
    assert sparse(images()).isfinite().all()
    alive = [int((out[:, 1:].abs().sum(-1) > 0).sum(1).unique()) for out in outputs]
    assert alive == [math.ceil(0.6 * 16)] * 2 + [math.ceil(0.36 * 16)] * 2
    assert "patches are dropped after blocks 0, 2" in report.approximations
    first = sparse(images(2))
    assert torch.equal(first, first) and sparse(images(3)).shape == (3, 5)
    loss = SparsifinerLoss(vit(depth=4))(sparse, images(), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    assert loss.isfinite()


def test_rates_rise_and_fall_as_the_authors_have_them():
    first, second = two_phase_schedule()
    assert (first.epochs, second.epochs) == (5, 45)
    assert first.rate(3) == 3e-4 and math.isclose(first.rate(5), 2e-4)
    assert second.rate(0) < second.rate(2) < second.rate(3) == 8e-5
    assert math.isclose(second.rate(45), 2e-6)


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="vit is a VisionTransformer with 0 tokens before the patches"):
        sparsify(vit(class_token=False, global_pool="avg"))
    with pytest.raises(ValueError, match="vit is a Linear with 0 tokens"):
        sparsify(torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"blocks\[0\].attn is a Attention; it must be timm's Attention without qk"
    ):
        sparsify(vit(qk_norm=True))
    with pytest.raises(ValueError, match="prune_after has 3, but vit has 3 blocks"):
        sparsify(vit(), prune_after=(1, 3))
    with pytest.raises(ValueError, match="token_keep=0 must be above 0"):
        sparsify(vit(), token_keep=0)
    with pytest.raises(
        ValueError, match="model is a VisionTransformer without SparsifinerAttention; use sparsify"
    ):
        sparse_layers(vit())
    sparse, _ = sparsify(vit(), **SMALL)
    with pytest.raises(ValueError, match="phase='train' is not one of"):
        set_phase(sparse, "train")
    with pytest.raises(ValueError, match="no reconstruction error is known"):
        reconstruction_loss(sparse)
    with pytest.raises(ValueError, match="tokens='cosine' is not one of 'mse', 'kl'"):
        SparsifinerLoss(vit(), tokens="cosine")
    with pytest.raises(ValueError, match=r"weights=\(1, 2\) must be three"):
        SparsifinerLoss(vit(), (1, 2))
    with pytest.raises(ValueError, match=r"epochs=\(0, 4\) must be two numbers"):
        list(two_phase_schedule((0, 4)))
