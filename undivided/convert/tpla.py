"""TPLA: the latent of a checkpoint with multi-head latent attention is cut into shards, without training.

The steps are the paper's: the weight of the latent's normalisation is folded away and the latent rotated to
axes that can be cut (`latent_rotations`, `reparameterise`, exact), then cut (`slice_latent`), with constants
that make a shard stand for the whole: how much of the energy it holds (`energy_shares`) and how its logits
relate to the full ones (`fit_logit_scales`). `mla_to_gla` is the baseline that cuts the latent among the
heads.

Source: TPLA (arXiv 2508.15881).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from undivided.convert._latent import rotate_latent
from undivided.convert._mla import exchange_layer, latent_fingerprint, mla_host, mla_options, mla_sizes
from undivided.convert._moments import Progress, no_progress, observe, principal_axes, second_moments
from undivided.convert._report import ConversionLog, Report
from undivided.layers.gla import GLAttention
from undivided.layers.latent import LatentNorm
from undivided.layers.tpla import TPLAttention, check_shards
from undivided.models.causal_lm import UndividedForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undivided.models.checkpoint import WorkFolder

TRANSFORMS = ("pca", "hadamard", "random", "none")
LOGIT_SCALES = ("lstsq", "inverse", "literal", "one")
# A shard with a smaller share of the energy is noise; its logits are left as they are.
_EMPTY = 1e-12


def convert_tpla(
    model: PreTrainedModel,
    *,
    num_shards: int = 2,
    transform: str = "pca",
    calibration: Tensor | None = None,
    norm: str = "local",
    softmax: str = "local",
    prefill: str = "sliced",
    logit_scale: str = "lstsq",
    seed: int = 0,
    evaluate: Callable[[Any], float] | None = None,
    work: WorkFolder | None = None,
    progress: Progress = no_progress,
) -> tuple[UndividedForCausalLM, Report]:
    """Converts multi-head latent attention to tensor-parallel latent attention, without training.

    Each of `num_shards` ranks then caches `latent_dim / num_shards + rope_dim` numbers a token and layer in
    place of `latent_dim + rope_dim`. The model given stays as it is; all but its attention is shared with the
    result.

    Args:
        model: a DeepSeek-V2 or V3 model, or an `UndividedForCausalLM` with MLA in every layer.
        num_shards: shards g of the latent, a divisor of its width R.
        transform: axes of the latent before it is cut: "pca", its principal axes, the first shard having the
            largest; "hadamard", balanced axes `D H / sqrt(R)`, for R a power of two; "random", a random
            rotation; "none".
        calibration: token ids `[samples, length]` without padding; needed for "pca" and "lstsq". Without it
            every shard is taken to hold an equal share of the energy.
        norm: "local" or "exact", as in `TPLAttention`.
        softmax: "local" or "exact", as in `TPLAttention`.
        prefill: "sliced" or "exact", as in `TPLAttention`.
        logit_scale: factor of the content logits of a shard with the share rho of the energy: "lstsq", for
            each head the least squares of the full logit on the shard's over causal pairs of the calibration;
            "inverse", `1 / rho`; "literal", `rho`, as equation 25 of the paper has it; "one".
        seed: of the signs of "hadamard" and of "random".
        evaluate: returns the perplexity of a model; it fills the report.
        work: keeps the passes over the calibration, so that a killed conversion resumes.
        progress: wraps the long loops; called with an iterable and a description.

    Returns:
        The converted model and the report. Its stages are "original" ("mla" where that is a conversion
        itself), "reparameterised", "local_norm" (where the layers normalise their latents) and "tpla". With
        `prefill="exact"` too the last is the perplexity of sliced prompts: exact ones are MLA's.

    Raises:
        ValueError: an option is unknown, the sizes do not fit, the calibration is missing, or a layer of the
            model has no MLA.

    Source: TPLA (arXiv 2508.15881).
    """
    widths = {sizes["latent_dim"] for sizes in mla_sizes(model)}
    modes = {"norm": norm, "softmax": softmax, "prefill": prefill}
    check_options(widths, num_shards=num_shards, transform=transform, logit_scale=logit_scale, **modes)
    needs = {"transform": transform, "logit_scale": logit_scale if softmax == "local" else "one"}
    for name, value in needs.items():
        if value in ("pca", "lstsq") and calibration is None:
            raise ValueError(f'calibration is None, but {name}="{value}" needs one; give token ids.')

    log = ConversionLog(evaluate, work, progress)
    log.evaluate("mla" if isinstance(model, UndividedForCausalLM) else "original", model)
    key: dict[str, Any] = {} if work is None else {"weights": latent_fingerprint(model)}
    moments = None
    if calibration is not None:
        moments = log.keep("tpla-moments", key, lambda: latent_moments(model, calibration, progress))
    rotations = latent_rotations(model, transform, moments, seed)
    shares = energy_shares(model, num_shards, rotations, moments)
    host = reparameterise(model, rotations, progress)
    log.evaluate("reparameterised", host)

    slice_latent(host, num_shards, shares, norm=norm, softmax="exact")
    normalises = any(isinstance(layer.kv_a_layernorm, LatentNorm) for layer in host.attention_layers())
    if norm == "local" and normalises and num_shards > 1:
        log.evaluate("local_norm", host)
        log.approximate("a shard normalises its latent by its own energy")
    if softmax == "local":
        if logit_scale == "lstsq":
            key |= {"num_shards": num_shards, "transform": transform, "norm": norm, "seed": seed}
            scales = log.keep("tpla-logits", key, lambda: fit_logit_scales(host, calibration, progress))
        else:
            scales = _logit_scales(shares, logit_scale)
        set_logit_scales(host, scales, shares)
        _set_modes(host, softmax="local")
    log.evaluate("tpla", host)
    if softmax == "local" and num_shards > 1:
        log.approximate(f"each of {num_shards} shards weighs the keys by its own logits")
    if prefill == "exact":
        _set_modes(host, prefill="exact")
        if log.perplexity:
            log.approximations.append("prompts are read exactly; the perplexities are those of sliced ones")

    layers = host.attention_layers()
    cached = sum(layer.latent_dim // num_shards + layer.rope_dim for layer in layers)
    options = {
        "num_shards": num_shards,
        "transform": transform,
        "norm": norm,
        "softmax": softmax,
        "prefill": prefill,
        "logit_scale": logit_scale,
        "seed": seed,
    }
    return host, log.report("tpla", options, cached * layers[0].kv_b_proj.weight.element_size())


def check_options(
    widths: Iterable[int],
    *,
    num_shards: int = 2,
    transform: str = "pca",
    norm: str = "local",
    softmax: str = "local",
    prefill: str = "sliced",
    logit_scale: str = "lstsq",
) -> None:
    """Raises a ValueError unless latents of these widths can be cut with these options of `convert_tpla`.

    It needs no model, so that a refusal can come before the conversion that makes the latents.
    """
    for name, value, allowed in (
        ("transform", transform, TRANSFORMS),
        ("logit_scale", logit_scale, LOGIT_SCALES),
        ("norm", norm, ("local", "exact")),
        ("softmax", softmax, ("local", "exact")),
        ("prefill", prefill, ("sliced", "exact")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}.")
    for width in widths:
        check_shards(num_shards, width)
        if transform == "hadamard":
            _check_power_of_two(width)


def latent_moments(
    model: PreTrainedModel, calibration: Tensor, progress: Progress = no_progress
) -> dict[str, Tensor]:
    """Returns `E[c c^T]` of every layer's latent after its normalisation and before the weight of that.

    Args:
        model: as `convert_tpla` takes it.
        calibration: token ids `[samples, length]`.
        progress: wraps the loop over the samples.

    Returns:
        Layer index, as a string, to `[latent_dim, latent_dim]`, uncentred, float64.
    """
    host = mla_host(model)
    norms = {str(index): layer.kv_a_layernorm for index, layer in enumerate(host.attention_layers())}
    return second_moments(host, norms, calibration, progress=progress, description="calibrating the latents")


def latent_rotations(
    model: PreTrainedModel, transform: str, moments: dict[str, Tensor] | None = None, seed: int = 0
) -> list[Tensor]:
    """Returns orthogonal axes of every layer's latent, the columns of `[latent_dim, latent_dim]`, float64.

    Args:
        model: as `convert_tpla` takes it.
        transform: as in `convert_tpla`.
        moments: of `latent_moments`; needed for "pca".
        seed: as in `convert_tpla`.

    Raises:
        ValueError: `moments` are missing for "pca", or a width is no power of two, which "hadamard" needs.
    """
    if transform == "pca" and moments is None:
        raise ValueError('moments is None, but transform="pca" needs those of latent_moments.')
    known = moments or {}
    generator = torch.Generator().manual_seed(seed)
    makers: dict[str, Callable[[int, int], Tensor]] = {
        "pca": lambda index, width: principal_axes(known[str(index)])[0],
        "hadamard": lambda index, width: hadamard_rotation(width, generator),
        "random": lambda index, width: random_rotation(width, generator),
        "none": lambda index, width: torch.eye(width, dtype=torch.float64),
    }
    return [makers[transform](index, sizes["latent_dim"]) for index, sizes in enumerate(mla_sizes(model))]


def hadamard_rotation(width: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns `D H / sqrt(width)`, with H the Sylvester matrix of +-1 and D random signs; float64.

    Every new axis is an equal mixture of all old ones, so that equal shards have about equal energy.

    Raises:
        ValueError: `width` is no power of two.
    """
    from scipy.linalg import hadamard

    _check_power_of_two(width)
    signs = torch.randint(2, (width, 1), generator=generator).double() * 2 - 1
    return signs * torch.from_numpy(hadamard(width)).double() / width**0.5


def random_rotation(width: int, generator: torch.Generator | None = None) -> Tensor:
    """Returns a random orthogonal matrix `[width, width]`, uniformly distributed; float64."""
    drawn = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    # QR is unique, and its q uniform, only with a positive diagonal of r.
    return q * r.diagonal().sign()


def reparameterise(
    model: PreTrainedModel, rotations: Sequence[Tensor], progress: Progress = no_progress
) -> UndividedForCausalLM:
    """Returns the model with every latent written in other axes: an MLA model that computes the same.

    `kv_a <- U^T kv_a`, `kv_b <- kv_b diag(w) U`, `w <- 1`, with w the weight of the normalisation.

    Args:
        model: as `convert_tpla` takes it; it is not changed.
        rotations: for every layer its U, `[latent_dim, latent_dim]`, orthogonal.
        progress: wraps the loop over the layers.

    Raises:
        ValueError: a layer of the model has no MLA, or a rotation is not of the size of its latent.

    Source: TPLA (arXiv 2508.15881).
    """
    host = mla_host(model)
    layers = list(zip(host.attention_layers(), rotations, strict=True))
    for layer, rotation in progress(layers, "rotating the latents"):
        rotate_latent(layer, rotation)
    return host


def energy_shares(
    model: PreTrainedModel, num_shards: int, rotations: Sequence[Tensor], moments: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Returns `rho_j = E|c_j|^2 / E|c|^2`, `[num_shards]`, of every layer; equal ones without moments."""
    shares = {}
    for index, (sizes, rotation) in enumerate(zip(mla_sizes(model), rotations, strict=True)):
        energy = torch.ones(sizes["latent_dim"], dtype=torch.float64)
        if moments is not None:
            moment = moments[str(index)].to(rotation)
            # Rounding must not make the energy of an empty axis negative.
            energy = torch.einsum("ik,ij,jk->k", rotation, moment, rotation).clamp(min=0.0)
        shards = energy.unflatten(0, (num_shards, -1)).sum(dim=1)
        total = shards.sum()
        shards = shards / total if total > 0 else torch.full_like(shards, 1 / num_shards)
        shares[str(index)] = shards.cpu()
    return shares


def slice_latent(
    host: UndividedForCausalLM,
    num_shards: int,
    shares: dict[str, Tensor],
    *,
    norm: str = "local",
    softmax: str = "local",
    prefill: str = "sliced",
) -> None:
    """Exchanges the MLA of every layer for TPLA with the same weights, in place.

    A shard's energy is multiplied by `1 / rho_j` in its normalisation; its logits are left as they are.

    Args:
        host: of `reparameterise`.
        num_shards: shards of the latent.
        shares: of `energy_shares`.
        norm: mode of `TPLAttention`.
        softmax: mode of `TPLAttention`.
        prefill: mode of `TPLAttention`.
    """
    modes = {"num_shards": num_shards, "norm": norm, "softmax": softmax, "prefill": prefill}
    for index, (layer, options) in enumerate(zip(host.attention_layers(), mla_options(host), strict=True)):
        weights = dict(layer.state_dict())
        dtype = layer.kv_b_proj.weight.dtype
        # An empty shard has no inverse; a tiny one may have none in float16.
        scale = (1.0 / shares[str(index)].clamp(min=1e-30)).clamp(max=torch.finfo(dtype).max)
        weights["norm_scale"] = scale.to(layer.kv_b_proj.weight)
        weights["logit_scale"] = layer.kv_b_proj.weight.new_ones(num_shards, layer.num_heads)
        exchange_layer(host, index, TPLAttention, weights, options | modes)


def set_logit_scales(
    host: UndividedForCausalLM, scales: dict[str, Tensor], shares: dict[str, Tensor] | None = None
) -> None:
    """Sets the factors of the content logits in every layer, in place.

    Args:
        host: a model with TPLA in every layer.
        scales: layer index, as a string, to `[num_shards, num_attention_heads]` or `[num_shards, 1]`.
        shares: of `energy_shares`; the logits of an empty shard are noise, and their factor stays 1.
    """
    for index, layer in enumerate(host.attention_layers()):
        scale = scales[str(index)]
        if shares is not None:
            scale = scale.masked_fill(shares[str(index)][:, None] < _EMPTY, 1.0)
        layer.logit_scale.copy_(scale)


@torch.no_grad()
def fit_logit_scales(
    host: UndividedForCausalLM, calibration: Tensor, progress: Progress = no_progress
) -> dict[str, Tensor]:
    """Returns the least squares of the full content logits on those of each shard, for each layer and head.

    `m_jh = sum t_h t_jh / sum t_jh^2` over all pairs of a query and a key it may see, `t_h = q_h . U_h c`
    with the exact normalisation and `t_jh = q_h . U_jh c_j` with that of the layer, on activations of the
    exact model.

    Args:
        host: a model with TPLA in every layer.
        calibration: token ids `[samples, length]`.
        progress: wraps the loop over the samples.

    Returns:
        Layer index, as a string, to `[num_shards, num_attention_heads]`, float64; 1 where a shard has no
        logits.
    """
    layers: list[TPLAttention] = host.attention_layers()
    queries: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}

    def receive(name: str, output: Tensor) -> None:
        index, what = name.split()
        layer = layers[int(index)]
        if what == "query":
            queries[index] = output.unflatten(-1, (layer.num_heads, -1))[..., : layer.nope_dim]
            return
        found = _logit_products(layer, queries.pop(index), output[..., : layer.latent_dim])
        sums[index] = found + sums.get(index, 0.0)

    modules = {}
    for layer_idx, layer in enumerate(layers):
        modules[f"{layer_idx} query"] = layer.q_proj if hasattr(layer, "q_proj") else layer.q_b_proj
        modules[f"{layer_idx} latent"] = layer.kv_a_proj_with_mqa
    prefill = [layer.prefill for layer in layers]
    # Without a cache every forward is then an exact prefill: the activations are MLA's.
    _set_modes(host, prefill="exact")
    try:
        observe(host, modules, calibration, receive, progress=progress, description="calibrating the logits")
    finally:
        for layer, mode in zip(layers, prefill, strict=True):
            layer.prefill = mode
            host.config.attention[layer.layer_idx]["prefill"] = mode
    scales = {}
    for index, found in sums.items():
        product, square = found.cpu()
        scales[index] = torch.where(square > 0, product / square.clamp(min=1e-300), 1.0)
    return scales


def mla_to_gla(model: PreTrainedModel, num_groups: int) -> UndividedForCausalLM:
    """Returns the model with grouped latent attention: a group of heads keeps one part of the latent alone.

    Of the TPLA of as many shards only the diagonal blocks are kept: head group j reads shard j, and what the
    others hold for its heads is dropped. It needs no sum over shards but the output's, and is the baseline
    that TPLA has to beat. The model given stays as it is.

    Args:
        model: as `convert_tpla` takes it.
        num_groups: groups of heads, a divisor of `latent_dim` and of the number of heads.

    Raises:
        ValueError: a layer of the model has no MLA, or `num_groups` does not divide its sizes.

    Source: TPLA (arXiv 2508.15881).
    """
    host = mla_host(model)
    for index, (layer, options) in enumerate(zip(host.attention_layers(), mla_options(host), strict=True)):
        options = options | {"num_latent_heads": num_groups}
        with torch.device("meta"):
            GLAttention.from_config(host.config.base_config, index, **options)
        weights = dict(layer.state_dict())
        blocks = weights["kv_b_proj.weight"].unflatten(0, (num_groups, -1)).unflatten(-1, (num_groups, -1))
        weights["kv_b_proj.weight"] = torch.cat([blocks[group, :, group] for group in range(num_groups)])
        exchange_layer(host, index, GLAttention, weights, options)
    return host


def _set_modes(host: UndividedForCausalLM, **modes: str) -> None:
    """Sets modes of TPLA in every layer and in the config."""
    for layer, entry in zip(host.attention_layers(), host.config.attention, strict=True):
        for name, value in modes.items():
            setattr(layer, name, value)
            entry[name] = value


def _logit_scales(shares: dict[str, Tensor], logit_scale: str) -> dict[str, Tensor]:
    """Returns the scales that follow from the shares of energy, `[num_shards, 1]`."""
    scale_of: dict[str, Callable[[Tensor], Tensor]] = {
        "inverse": lambda share: 1.0 / share.clamp(min=_EMPTY),
        "literal": lambda share: share,
        "one": torch.ones_like,
    }
    return {index: scale_of[logit_scale](share)[:, None] for index, share in shares.items()}


def _logit_products(layer: TPLAttention, query: Tensor, latent: Tensor) -> Tensor:
    """Returns `sum t_h t_jh` and `sum t_jh^2`, `[2, num_shards, H]`, over the causal pairs of `[B, N, .]`."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    whole, cut = (layer.normalise(latent, exact=exact).to(dtype) for exact in (True, False))
    up_key = layer.up_projections()[0].to(dtype)
    sums = query.new_zeros(2, layer.num_shards, layer.num_heads, dtype=torch.float64)
    # One head at a time: the logits of all would be the largest tensor of the conversion.
    for head in range(layer.num_heads):
        rows = query[:, :, head].to(dtype)
        full = rows @ (whole @ up_key[head].T).transpose(1, 2)
        shards = zip(
            cut.chunk(layer.num_shards, dim=-1), up_key[head].chunk(layer.num_shards, dim=-1), strict=True
        )
        for shard, (part, up) in enumerate(shards):
            own = (rows @ (part @ up.T).transpose(1, 2)).tril()
            sums[0, shard, head] = (full * own).sum(dtype=torch.float64)
            sums[1, shard, head] = own.pow(2).sum(dtype=torch.float64)
    return sums


def _check_power_of_two(width: int) -> None:
    if width < 1 or width & (width - 1):
        raise ValueError(
            f'latent_dim={width} is not a power of two, as transform="hadamard" needs; '
            'transform="random" works for every width.'
        )
