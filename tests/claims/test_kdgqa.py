from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from undivided.claims import kdgqa as claim
from undivided.claims import load
from undivided.claims._tiny_vit import Trainer, accuracy, augmented, normalised, tiny_vit
from undivided.data.images import ImageSet
from undivided.layers.kdgqa import KeyDrivenGQA


def stripes(count=200, size=8):
    """Noisy images of upright or level stripes: a class that a network learns in a few steps."""
    labels = torch.arange(count) % 2
    images = torch.randint(60, (count, 1, size, size), dtype=torch.uint8)
    images[labels == 0, :, :, ::2] += 150
    images[labels == 1, :, ::2] += 150
    return ImageSet("stripes", images, labels, images[:50], labels[:50])


SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 4}


def study(**changes):
    fields = dict(
        images=stripes(), sizes=SIZES, patch_size=4, groups=(2,), seeds=(0, 1), batch_size=20, steps=15,
        learning_rate=5e-3, more_steps=7, more_learning_rate=1e-3, window=3,
    )  # fmt: skip
    return claim.Study(**{**fields, **changes})


def test_the_loop_over_groups_is_the_released_layer():
    layer = KeyDrivenGQA(32, 8, 4, variant="released").double()
    loop = claim.GroupLoop(32, 8, 4).double()
    loop.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    assert 0 in layer.allocation(x).tolist()
    torch.testing.assert_close(loop(x), layer(x), rtol=1e-10, atol=1e-10)


def run_study(given):
    sources = claim.train_sources(given)
    return sources, {name: claim.run_arm(given, sources, 2, name) for name in claim.ARMS}


def test_every_arm_goes_on_from_the_same_weights_and_order():
    sources, arms = run_study(study())
    assert len(sources.accuracies) == 2 and min(sources.accuracies) > 60
    for name, arm in arms.items():
        assert len(arm.before) == len(arm.after) == 2
        assert (len(arm.moved) == 2) == name.startswith("DGQA"), name
    # They start from the uniform map.
    assert arms["DGQA-diff"].before == arms["DGQA-ema"].before == arms["GQA"].before
    for name, arm in run_study(study(seeds=(0,)))[1].items():
        if "released" not in name and name != "PGQA":
            assert arm.after == arms[name].after[:1], name


def test_rows_say_which_arm_and_what_it_is_compared_with():
    rows = list(claim._quality(study(seeds=(0,))))
    after = [row for row in rows if "7 steps more" in row.shape and row.unit == "%"]
    assert len(after) == len(claim.ARMS)
    assert all((row.baseline_name is None) == row.what.endswith("of GQA") for row in after)
    assert all(row.required is None for row in rows)
    assert len({(row.what, row.shape) for row in rows}) == len(rows)


def test_the_sizes_of_the_claim_fit_their_images():
    quick, full = claim._study("cpu", True), claim._study("cpu", False)
    assert len(quick.seeds) == 1 and len(full.seeds) == 3
    model = tiny_vit(full.images, patch_size=full.patch_size, **full.sizes)
    assert model(normalised(full.images.test_images[:2])).shape == (2, 10)
    assert all(full.sizes["num_heads"] % groups == 0 for groups in full.groups)


def test_a_trainer_learns_and_starts_again_from_what_it_is_given():
    images = stripes()
    model = tiny_vit(images, 0, patch_size=4, **SIZES)
    start = copy.deepcopy(model.state_dict())
    trainer = Trainer(model, images, batch_size=20)
    results = []
    for seed in (0, 0, 1):
        trainer.reset(start)
        trainer.run(steps=12, learning_rate=5e-3, seed=seed)
        results.append(model.head.weight.detach().clone())
    assert accuracy(model, images) > 80
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert model.training


def test_images_are_moved_and_mirrored_as_a_whole():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(60, 1, 1, 1) + 100
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augmented(images, generator), normalised(images))
    moved = augmented(images, generator, shift=1, flip=True)
    row = ((moved + 1) * 127.5).round().int()
    centres = {tuple(one[0, 4, 3:5].tolist()) for one in row}
    # Nine places, twice: neighbours in a row differ by one, upwards or, mirrored, downwards.
    assert len(centres) > 12 and {b - a for a, b in centres} == {1, -1}


def test_the_gate_passes_and_can_fail(monkeypatch):
    claim.gate("cpu")
    right = claim.dense_attention
    monkeypatch.setattr(
        claim,
        "dense_attention",
        lambda *a, backend, **o: right(*a, backend=backend, **o) * (1.01 if backend == "auto" else 1),
    )
    with pytest.raises(AssertionError, match="error above 2 x eager"):
        claim.gate("cpu")


@pytest.mark.gpu
def test_only_the_loop_makes_the_host_wait():
    layers = claim.timed_layers()
    x = torch.randn(2, 50, claim.WIDTH, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        counted = {name: claim.waits(lambda layer=layer: layer(x)) for name, layer in layers.items()}
    assert counted.pop(claim.LOOP) > 0
    assert set(counted.values()) == {0}


def test_the_claim_is_the_one_of_its_slug():
    assert load("kdgqa").slug == "kdgqa"
    assert dataclasses.is_dataclass(load("kdgqa"))
