from __future__ import annotations

import json

from tests.cli.conversion import prepare, run


def test_the_demo_measures_every_form_and_writes_its_figure(capsys, tmp_path):
    here = prepare(tmp_path)
    sizes = ("--latent-dim", "16", "--rope-dim", "4", "--samples", "8", "--evaluation-tokens", "200")
    status, printed, noted = run(
        capsys, "demo", here / "source", "--calibration", here / "text.txt", "--output", here / "demo", *sizes
    )
    assert status == 0, noted
    result = json.loads((here / "demo" / "demo.json").read_text())
    perplexity = result["perplexity"]
    assert list(perplexity) == [
        "original", "lossless", "partial_rope", "mla", "tpla", "reparameterised", "separated",
    ]  # fmt: skip
    assert list(perplexity["tpla"]) == ["none", "hadamard", "pca"]
    assert abs(perplexity["lossless"] / perplexity["original"] - 1) < 1e-4
    assert abs(perplexity["reparameterised"] / perplexity["mla"] - 1) < 1e-4
    # Two layers of four-byte numbers: two heads of keys and values of 8; latent and rope; half the latent and rope.
    expected = {"original": 2 * 2 * 2 * 8 * 4, "mla": 2 * (16 + 4) * 4, "tpla": 2 * (8 + 4) * 4}
    assert result["cache_bytes_per_token_per_rank"] == expected
    assert set(result["agreement"]) == {"mla", "tpla"} and all(
        0 <= x <= 1 for x in result["agreement"].values()
    )
    assert set(result["tokens_per_second"]) == {"original", "mla", "tpla"} and result["seconds"] > 0
    assert (here / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "tokens/s" in printed and "TPLA, pca" in printed
    assert not list((here / "demo").glob(".*"))
