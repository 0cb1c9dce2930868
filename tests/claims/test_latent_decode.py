from __future__ import annotations

import pytest
import torch

from undivided.claims import _latent_decode
from undivided.claims._latent_decode import Model, Rank, decode_rows, gate

SMALL = Model("small", Rank(4, 32), Rank(8, 16), 1.6)


def test_a_wrong_operator_is_not_timed(monkeypatch):
    def wrong(*inputs, scale, backend):
        found = right(*inputs, scale=scale, backend=backend)
        # One element of the last sequence, by a percent, where a kernel's own rounding is 1e-7.
        if backend == "auto":
            found[-1, 0, 0, 0] *= 1.01
        return found

    def timed(*arguments, **options):
        raise RuntimeError("timed")

    right = _latent_decode.latent_attention
    monkeypatch.setattr(_latent_decode, "latent_attention", wrong)
    monkeypatch.setattr(_latent_decode, "time_rivals", timed)
    monkeypatch.setattr(_latent_decode, "POINTS", ((3, 64),))
    with pytest.raises(AssertionError, match="MLA, small|TPLA, small"):
        next(decode_rows("cpu", True, (SMALL,), torch.float32))


@pytest.mark.parametrize("rank", [SMALL.mla, SMALL.tpla])
def test_the_right_operator_passes_the_gate(rank):
    gate(rank.inputs(3, 50, "cpu", torch.float32), "small")
