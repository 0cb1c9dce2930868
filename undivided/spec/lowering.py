"""Lowering: from a specification to the fastest operator that provably computes it.

A target names its operator by a string and imports it when it runs, so that this package needs no other. Its
`reasons` say why it cannot compute a specification (empty when it can): the same check chooses and refuses.
That it computes the same function is proved by test: `Lowered.verify` runs it beside the interpreter.
"""

from __future__ import annotations

import functools
import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from undivided.spec.carrier import Causal, DefaultPayload, NullSource, Refuse, Window
from undivided.spec.evaluation import (
    HeadExpansion,
    Inputs,
    Tensors,
    carrier_mask,
    dot_scale,
    log_baseline,
    mapped_key,
)
from undivided.spec.evidence import Cosine, Dot, Exp, KeyBias
from undivided.spec.interpreter import (
    apply_updates,
    check_inputs,
    check_rows,
    coefficient_of,
    interpret,
    merged_sources,
    to_group,
)
from undivided.spec.regime import ColumnSum, Plan, RowSum, Sinkhorn
from undivided.spec.specification import AttentionSpec, RmsNorm, Scale, Source, Term


@dataclass(frozen=True)
class Target:
    """Something a specification can be lowered to.

    Args:
        name: what the user passes as `target=`.
        op: the operator, "module:function".
        reasons: sentences that say why it cannot compute a specification; empty when it can.
        run: (spec, inputs, attention_mask, operator) -> the aggregate of one term; or, of a `whole` target,
            (spec, tensors, attention_mask, operator) -> the output.
        whole: whether it computes mix and update as well.
    """

    name: str
    op: str
    reasons: Callable[[AttentionSpec], list[str]]
    run: Callable[..., torch.Tensor]
    whole: bool = False


@dataclass(frozen=True)
class Lowered:
    """A specification and the target that computes it; call it with the tensors `spec.inputs` names."""

    spec: AttentionSpec
    target: Target

    def __call__(
        self, tensors: Tensors, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> torch.Tensor:
        """Returns the output in the dtype of the inputs; `options` (such as `backend`) go to the operator."""
        check_inputs(self.spec, tensors)
        module, name = self.target.op.split(":")
        op = getattr(importlib.import_module(module), name)

        def call(*args: torch.Tensor, **kwargs: Any) -> Any:
            return op(*args, **kwargs, **options)

        if self.target.whole:
            return self.target.run(self.spec, tensors, attention_mask, call)
        parts = [
            self.target.run(self.spec, Inputs(tensors, term), attention_mask, call) for term in self.spec.mix
        ]
        summands = [
            _weighted(term, tensors, to_group(part, parts[0].shape[1]))
            for term, part in zip(self.spec.mix, parts, strict=True)
        ]
        # Beside one fast kernel every further pass over the output is seen: no sum of one, no product with 1.
        total = functools.reduce(operator.add, summands)
        return apply_updates(self.spec.update, total, tensors)

    def verify(self, tensors: Tensors, attention_mask: torch.Tensor | None = None) -> float:
        """Largest difference from the interpreter, both in float64, relative to the largest output."""
        exact = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
        expected = interpret(self.spec, exact, attention_mask=attention_mask).out
        difference = self(exact, attention_mask).double() - expected
        return float(difference.abs().max() / expected.abs().max().clamp(min=1e-300))


def lower(spec: AttentionSpec, target: str = "auto") -> Lowered:
    """Chooses what computes a specification.

    Args:
        spec: the operator.
        target: "auto" (the first able one) or "latent", "differential", "dense", "column", "sinkhorn",
            "interpreter". "latent" keeps the latent as key and value (for decoding); "auto" never takes it.

    Returns:
        A callable.

    Raises:
        ValueError: no target has that name, or it cannot compute this specification (the message says why).
    """
    if target == "auto":
        able = [each for each in TARGETS if each.name != "latent" and not each.reasons(spec)]
        return Lowered(spec, able[0])
    for each in TARGETS:
        if each.name == target:
            reasons = each.reasons(spec)
            if not reasons:
                return Lowered(spec, each)
            names = ", ".join(f'"{other.name}"' for other in TARGETS if not other.reasons(spec))
            raise ValueError(f'target "{target}" cannot compute this: {"; ".join(reasons)}. Able: {names}.')
    names = ", ".join(f'"{each.name}"' for each in TARGETS)
    raise ValueError(f'target={target!r} is not one of "auto", {names}.')


def attend(
    spec: AttentionSpec,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    tensors: Tensors | None = None,
    target: str = "auto",
) -> torch.Tensor:
    """Runs a specification of query, key and value by its fastest target.

    Args:
        spec: the operator.
        query: `[batch, heads, receivers, head_dim]`.
        key: `[batch, key heads, sources, head_dim]`.
        value: `[batch, key heads, sources, value_dim]`.
        attention_mask: a further mask: boolean (True = admissible) or additive.
        tensors: further inputs by name.
        target: as in `lower`.

    Returns:
        `[batch, heads, receivers, value_dim]`, in the dtype of `query`.
    """
    named = {"query": query, "key": key, "value": value, **(tensors or {})}
    return lower(spec, target)(named, attention_mask)


def _weighted(term: Term, tensors: Tensors, part: torch.Tensor) -> torch.Tensor:
    plain = term.times is None and term.coefficient == 1
    return part if plain else coefficient_of(term, tensors, part) * part


class _Pairs(NamedTuple):
    """One dot product that stands for the whole chart."""

    query: torch.Tensor
    key: torch.Tensor
    scale: float


def _chart_reasons(spec: AttentionSpec) -> list[str]:
    found = []
    if not isinstance(spec.evidence.link, Exp):
        found.append(f"the link is {spec.evidence.link}, not exp")
    if spec.evidence.factor is not None:
        found.append("the evidence has a second factor")
    terms = spec.evidence.chart.terms
    odd = [term for term in terms if not isinstance(term, Dot | Cosine | KeyBias)]
    odd += [term for term in terms if isinstance(term, Dot) and term.feature is not None]
    found += [f"the chart has the term {term}" for term in odd]
    if not any(isinstance(term, Dot | Cosine) for term in terms):
        found.append("the chart has no dot product")
    if spec.evidence.chart.softcap is not None and any(isinstance(term, KeyBias) for term in terms):
        found.append("the cap stands over a key bias")
    if not isinstance(spec.payload, Source):
        found.append(f"the payload is {spec.payload}")
    return found


def _pairs(spec: AttentionSpec, inputs: Inputs) -> _Pairs:
    """Writes a sum of dot products as one of concatenated vectors, with the scale of the first."""
    to_heads = HeadExpansion(spec, inputs)
    expand = len(spec.evidence.chart.terms) > 1 or spec.carrier.heads.assignment is not None
    queries, keys, scales = [], [], []
    for term in spec.evidence.chart.terms:
        if isinstance(term, Cosine):
            query, key = F.normalize(inputs[term.query], dim=-1), F.normalize(inputs[term.key], dim=-1)
            if term.temperature is not None:
                key = key * inputs[term.temperature].to(key).reshape(1, -1, 1, 1)
            keys.append(to_heads(key) if expand else key)
            scales.append(query.shape[-1] ** 0.5 if term.scale is None else term.scale)
        elif isinstance(term, Dot):
            query = inputs[term.query]
            mapped = expand or term.key_map is not None
            keys.append(mapped_key(term, inputs, to_heads) if mapped else inputs[term.key])
            scales.append(dot_scale(term, query))
        else:
            continue
        queries.append(query)
    first = scales[0]
    queries = [x if scale == first else x * (scale / first) for x, scale in zip(queries, scales, strict=True)]
    return _Pairs(_side_by_side(queries), _side_by_side(keys), first)


def _side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    # torch.cat copies a single tensor too.
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _values(spec: AttentionSpec, inputs: Inputs, pairs: _Pairs) -> tuple[_Pairs, torch.Tensor]:
    """Returns pairs and value with the same number of key heads: as they are, or both at the query heads."""
    payload, heads = spec.payload, spec.carrier.heads
    value = inputs[payload.tensor]  # type: ignore[attr-defined]
    value_map = payload.value_map  # type: ignore[attr-defined]
    assigned = heads.assignment is not None or heads.value_assignment is not None
    if value_map is None and not assigned and value.shape[1] == pairs.key.shape[1]:
        return pairs, value
    value = HeadExpansion(spec, inputs, values=True)(value)
    if value_map is not None:
        value = torch.einsum("hrv,bhmr->bhmv", inputs[value_map], value)
    key = pairs.key
    if key.shape[1] != value.shape[1]:
        key = key.repeat_interleave(value.shape[1] // key.shape[1], dim=1)
    return pairs._replace(key=key), value


# --- dense ---


def _dense_reasons(spec: AttentionSpec) -> list[str]:
    found = _chart_reasons(spec)
    if not isinstance(spec.anchor, RowSum):
        found.append(f"the anchor is {spec.anchor}")
    if isinstance(spec.carrier.empty_row, DefaultPayload):
        found.append(f"{spec.carrier.empty_row}")
    return found


def _run_dense(spec, inputs, attention_mask, op) -> torch.Tensor:
    inputs, log_count = merged_sources(spec, inputs)
    pairs, value = _values(spec, inputs, _pairs(spec, inputs))
    temperature = spec.evidence.link.temperature
    cap = spec.evidence.chart.softcap
    options: dict[str, Any] = {"scale": pairs.scale / temperature}
    if cap is not None:
        # cap * tanh(s / cap) / tau is the cap of s / tau at cap / tau.
        options["softcap"] = cap / temperature
    options |= _dense_mask(spec, inputs, pairs, attention_mask, log_count)
    null = spec.carrier.empty_row
    if not isinstance(null, NullSource):
        return op(pairs.query, pairs.key, value, **options)
    out, lse = op(pairs.query, pairs.key, value, return_lse=True, **options)
    logit = inputs[null.logit] if isinstance(null.logit, str) else torch.tensor(null.logit)
    # One more source of payload zero scales the row by Z / (Z + e^logit).
    return out * torch.sigmoid(lse - logit.to(lse).reshape(1, -1, 1))[..., None].to(out.dtype)


def _dense_mask(spec, inputs, pairs, attention_mask, log_count) -> dict[str, Any]:
    """The operator's `attn_mask`, `is_causal` and `window` for carrier, baseline and key bias together."""
    num_rows, num_columns = pairs.query.shape[2], pairs.key.shape[2]
    device, options = pairs.query.device, {}
    rest = list(spec.carrier.masks)
    windows = [mask.before + 1 for mask in rest if isinstance(mask, Window) and mask.after == 0]
    if windows or any(isinstance(mask, Causal) for mask in rest):
        options = {"is_causal": True, "window": min(windows) if windows else None}
        rest = [m for m in rest if not (isinstance(m, Causal) or (isinstance(m, Window) and m.after == 0))]
    mask = carrier_mask(tuple(rest), num_rows, num_columns, inputs, device) if rest else None
    bias: torch.Tensor | None = None
    if spec.evidence.baseline:
        bias = log_baseline(spec.evidence.baseline, num_rows, num_columns, inputs, pairs.query)
    extra = [] if log_count is None else [log_count]
    for term in spec.evidence.chart.terms:
        if isinstance(term, KeyBias):
            key_bias = HeadExpansion(spec, inputs)(inputs[term.tensor])[:, :, None, :]
            extra.append(key_bias / spec.evidence.link.temperature)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask if mask is None else mask & attention_mask
    elif attention_mask is not None:
        extra.append(attention_mask)
    for part in extra:
        bias = part if bias is None else bias + part
    _refuse_empty_rows(spec, inputs, attention_mask, pairs.query, num_columns)
    if bias is not None:
        bias = bias.to(pairs.query.dtype)
        options["attn_mask"] = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        options["attn_mask"] = mask
    return options


def _refuse_empty_rows(spec, inputs, attention_mask, query, num_columns) -> None:
    """What the interpreter refuses must not come out as zeros. Waits for the device if a mask is given."""
    batch, heads, num_rows = query.shape[:3]
    given = [mask for mask in spec.carrier.masks if not isinstance(mask, Causal | Window)]
    if not isinstance(spec.carrier.empty_row, Refuse):
        return
    if not given and attention_mask is None and num_rows <= num_columns:
        return
    mask = carrier_mask(spec.carrier.masks, num_rows, num_columns, inputs, query.device)
    if attention_mask is not None:
        seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask > float("-inf")
        mask = mask & seen
    check_rows(mask.expand(batch, heads, num_rows, num_columns))


# --- latent ---


def _latent_reasons(spec: AttentionSpec) -> list[str]:
    found = _dense_reasons(spec)
    dots = [term for term in spec.evidence.chart.terms if isinstance(term, Dot)]
    if len(dots) != len(spec.evidence.chart.terms) or len(dots) > 2 or not dots or dots[0].key_map is None:
        found.append("the chart is not a mapped latent, with or without a rope term")
    elif len(dots) == 2 and (dots[1].key_map is not None or dots[1].scale != dots[0].scale):
        found.append("the rope term has a map or a scale of its own")
    elif dots[0].key != getattr(spec.payload, "tensor", None):
        found.append("the payload is not the latent of the chart")
    if dots and dots[0].scale is None and len(dots) == 2:
        found.append("the scale is not given (it belongs to both terms)")
    if any(not isinstance(mask, Causal) for mask in spec.carrier.masks):
        found.append("the carrier has a mask other than causal")
    if spec.evidence.baseline or spec.carrier.source_map is not None:
        found.append("the evidence has a baseline")
    if isinstance(spec.carrier.empty_row, NullSource) or spec.carrier.heads.assignment is not None:
        found.append("the carrier has a null source or a head map")
    return found


def _run_latent(spec, inputs, attention_mask, op) -> torch.Tensor:
    dots = spec.evidence.chart.terms
    query, latent = inputs[dots[0].query], inputs[dots[0].key]
    _refuse_empty_rows(spec, inputs, attention_mask, query, latent.shape[2])
    absorbed = torch.einsum("bhnd,hdr->bhnr", query, inputs[dots[0].key_map])
    rope = (inputs[dots[1].query], inputs[dots[1].key]) if len(dots) == 2 else (None, None)
    temperature, cap = spec.evidence.link.temperature, spec.evidence.chart.softcap
    out = op(
        absorbed,
        rope[0],
        latent,
        rope[1],
        scale=dot_scale(dots[0], query) / temperature,
        softcap=None if cap is None else cap / temperature,
        attn_mask=attention_mask,
        is_causal=bool(spec.carrier.masks),
    )
    return (
        out
        if spec.payload.value_map is None
        else torch.einsum("bhnr,hrv->bhnv", out, inputs[spec.payload.value_map])
    )


# --- differential ---


def _differential_reasons(spec: AttentionSpec) -> list[str]:
    found = _dense_reasons(spec)
    if len(spec.mix) != 2 or spec.mix[0] != Term() or spec.mix[1].coefficient >= 0:
        return [*found, "the mix is not one map minus another"]
    renamed = {name for name, _ in spec.mix[1].tensors}
    dot = spec.evidence.chart.terms[0]
    if len(spec.evidence.chart.terms) > 1 or not isinstance(dot, Dot) or dot.key_map is not None:
        found.append("the chart is not one plain dot product")
    elif renamed != {dot.query, dot.key}:
        found.append("the maps do not differ in query and key alone")
    if any(
        not isinstance(m, Causal) and not (isinstance(m, Window) and m.after == 0) for m in spec.carrier.masks
    ):
        found.append("the carrier has a mask other than causal or a window")
    if spec.evidence.baseline or spec.carrier.source_map is not None:
        found.append("the evidence has a baseline")
    plain_heads = spec.carrier.heads.assignment is None and spec.carrier.heads.value_assignment is None
    if not plain_heads or getattr(spec.payload, "value_map", None) is not None:
        found.append("the carrier has a head map or the payload a map")
    if isinstance(spec.carrier.empty_row, NullSource):
        found.append("the carrier has a null source")
    return found


def _run_differential(spec, tensors, attention_mask, op) -> torch.Tensor:
    signal, noise = (Inputs(tensors, term) for term in spec.mix)
    dot, temperature, cap = (
        spec.evidence.chart.terms[0],
        spec.evidence.link.temperature,
        spec.evidence.chart.softcap,
    )
    query, key = signal[dot.query], signal[dot.key]
    _refuse_empty_rows(spec, signal, attention_mask, query, key.shape[2])
    options: dict[str, Any] = {"scale": dot_scale(dot, query) / temperature, "attn_mask": attention_mask}
    windows = [mask.before + 1 for mask in spec.carrier.masks if isinstance(mask, Window)]
    options |= {"is_causal": bool(spec.carrier.masks), "window": min(windows) if windows else None}
    if cap is not None:
        options["softcap"] = cap / temperature
    steps = list(spec.update)
    if steps and isinstance(steps[0], RmsNorm) and steps[0].weight is not None:
        # The norm and a constant factor behind it are the operator's epilogue.
        norm = steps.pop(0)
        options |= {"norm_weight": tensors[norm.weight], "norm_eps": norm.eps}
        if steps and isinstance(steps[0], Scale):
            options["out_scale"] = steps.pop(0).factor
    factor = -coefficient_of(spec.mix[1], tensors, query)[..., 0]
    out = op(query, noise[dot.query], key, noise[dot.key], signal[spec.payload.tensor], factor, **options)
    return apply_updates(tuple(steps), out, tensors)


# --- transport ---


def _transport_reasons(spec: AttentionSpec) -> list[str]:
    found = _chart_reasons(spec)
    if any(isinstance(term, KeyBias) for term in spec.evidence.chart.terms):
        found.append("the chart has a key bias")
    if spec.evidence.chart.softcap is not None:
        found.append("the chart has a cap")
    if spec.evidence.baseline or spec.carrier.source_map is not None:
        found.append("the evidence has a baseline")
    if any(not isinstance(mask, Causal) for mask in spec.carrier.masks):
        found.append("the carrier has a mask other than causal")
    if not isinstance(spec.carrier.empty_row, Refuse):
        found.append(f"{spec.carrier.empty_row}")
    return found


def _column_reasons(spec: AttentionSpec) -> list[str]:
    found = _transport_reasons(spec)
    if not isinstance(spec.anchor, ColumnSum):
        found.append(f"the anchor is {spec.anchor}")
    return found


def _sinkhorn_reasons(spec: AttentionSpec) -> list[str]:
    found = _transport_reasons(spec)
    if not isinstance(spec.anchor, Sinkhorn):
        found.append(f"the anchor is {spec.anchor}")
    elif spec.anchor.tolerance is not None:
        found.append(f"tolerance is {spec.anchor.tolerance:g}, which asks for a check of the plan")
    return found


def _run_transport(spec, inputs, attention_mask, op) -> torch.Tensor:
    pairs, value = _values(spec, inputs, _pairs(spec, inputs))
    options: dict[str, Any] = {
        "scale": pairs.scale / spec.evidence.link.temperature,
        "is_causal": bool(spec.carrier.masks),
        "attn_mask": attention_mask,
    }
    if isinstance(spec.probe, Plan):
        options |= {"num_iterations": spec.anchor.num_iterations, "relaxation": spec.anchor.relaxation}
        for argument, name in (
            ("row_marginal", spec.probe.row_sums),
            ("column_marginal", spec.probe.column_sums),
        ):
            if name is not None:
                options[argument] = inputs[name]
    return op(pairs.query, pairs.key, value, **options)


def _run_interpreter(spec, tensors, attention_mask, op) -> torch.Tensor:
    dtype = next(x.dtype for x in (tensors[name] for name in spec.inputs) if x.is_floating_point())
    return op(spec, tensors, attention_mask=attention_mask).out.to(dtype)


def _able(spec: AttentionSpec) -> list[str]:
    return []


TARGETS: tuple[Target, ...] = (
    Target("latent", "undivided.ops:latent_attention", _latent_reasons, _run_latent),
    Target(
        "differential",
        "undivided.ops:differential_attention",
        _differential_reasons,
        _run_differential,
        whole=True,
    ),
    Target("dense", "undivided.ops:dense_attention", _dense_reasons, _run_dense),
    Target("column", "undivided.ops:column_attention", _column_reasons, _run_transport),
    Target("sinkhorn", "undivided.ops:sinkhorn_attention", _sinkhorn_reasons, _run_transport),
    Target("interpreter", "undivided.spec.interpreter:interpret", _able, _run_interpreter, whole=True),
)
