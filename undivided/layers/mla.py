"""Multi-head latent attention."""

from __future__ import annotations

from undivided.layers.latent import LatentAttention


class MLAttention(LatentAttention):
    """Multi-head latent attention: all heads read one latent and one rotary key.

    `c = norm(x W_DKV)`, `k = RoPE(x W_KR)`, `s_h = scale * (q_h . U_h c + RoPE(r_h) . k)`,
    `y = concat_h(softmax(s_h) V_h c) W_O`. Cached a token: `latent_dim + rope_dim` numbers. The arguments are those
    of `LatentAttention`. With `rope_dim = G * head_dim` and `nope_dim = 0` any grouped-query attention is one of
    these.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; TransMLA (arXiv 2502.07864).
    """

    mechanism = "mla"
