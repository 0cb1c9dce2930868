"""The error yardstick of the tests and of the gates before every benchmark.

No tolerance is typed by hand. A fast implementation is measured against a float64 reference, and so is plain
eager PyTorch in the *same low precision*; the fast one may err at most `factor` times as much, in the mean
and at the worst element. What the precision itself costs is thus measured on the same inputs and never
guessed.

    compare_op(fast, reference, reference, {"query": q, "key": k, "value": v}, dtype=torch.float16)
    assert_as_accurate(fast_out, eager_out, out_in_float64, name="out")

`poison_buffer`, `poison_tail`, `poison_padding`, `poison_surroundings` and `poisoned_empty` put NaN wherever
an implementation must not read or must have written.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Slack on top of factor x eager, in eps of the dtype: eager may be exact by luck where a sound kernel rounds
# once more. Half an eps of the mean magnitude is one rounding of every element; two eps of the largest is
# four of one.
_MEAN_SLACK = 0.5
_MAX_SLACK = 2.0
# A gradient is a difference of terms about as large as the largest of the gradients, and inherits their
# rounding error when they cancel: its slack is taken from that one, up to this many times its own magnitude.
_CANCELLATION = 8.0
# If they cancel altogether (one key: nothing to choose), it is held against this many eps of the largest
# gradient.
_VANISHING_SLACK = 16.0


@dataclass(frozen=True)
class ErrorReport:
    """Absolute errors of one tensor against float64, and what was allowed.

    Args:
        name: where the tensor stands in the output, such as `out`, `output[1]` or `grad(query)`.
        shape: its shape.
        fast_mean: mean absolute error of the fast implementation; infinite at a NaN or a wrong infinity.
        fast_max: largest absolute error of the fast implementation.
        eager_mean: mean absolute error of eager PyTorch in the same precision.
        eager_max: largest absolute error of eager PyTorch in the same precision.
        allowed_mean: the bound on `fast_mean`.
        allowed_max: the bound on `fast_max`.
        worst: `at [...]: fast ..., eager ..., float64 ...` of the worst element, or what is not finite.
    """

    name: str
    shape: tuple[int, ...]
    fast_mean: float
    fast_max: float
    eager_mean: float
    eager_max: float
    allowed_mean: float
    allowed_max: float
    worst: str

    @property
    def ratio_mean(self) -> float:
        """Mean error of fast over mean error of eager; 1 where both are exact."""
        return _ratio(self.fast_mean, self.eager_mean)

    @property
    def ratio_max(self) -> float:
        """Largest error of fast over largest error of eager; 1 where both are exact."""
        return _ratio(self.fast_max, self.eager_max)

    @property
    def holds(self) -> bool:
        """Whether both errors are within their bounds; False for NaN."""
        return self.fast_mean <= self.allowed_mean and self.fast_max <= self.allowed_max

    def __str__(self) -> str:
        rows = (
            ("mean", self.fast_mean, self.eager_mean, self.ratio_mean, self.allowed_mean),
            ("max", self.fast_max, self.eager_max, self.ratio_max, self.allowed_max),
        )
        lines = [f"{self.name} {list(self.shape)}   |fast - float64|   |eager - float64|   ratio   allowed"]
        lines += [
            f"  {which:<5} {fast:>18.3e} {eager:>19.3e} {ratio:>8.2f} {allowed:>10.3e}"
            for which, fast, eager, ratio, allowed in rows
        ]
        return "\n".join([*lines, f"  worst {self.worst}"])


def error_report(
    fast: Any,
    eager_same_dtype: Any,
    reference_float64: Any,
    factor: float = 2.0,
    name: str = "output",
) -> list[ErrorReport]:
    """Measure `fast` and `eager_same_dtype` against `reference_float64`; raises nothing on inaccuracy.

    `allowed = factor * error(eager) + slack`. The slack is half an eps of the reference's mean magnitude for
    the mean error, and two eps of its largest magnitude for the largest error.

    Args:
        fast: a tensor, or tuple, list, NamedTuple or dict of tensors, of the implementation under test.
        eager_same_dtype: the same structure from plain PyTorch, with the same shapes and dtypes as `fast`.
        reference_float64: the same structure and shapes in float64. Infinities (the lse of an empty row) must
            be met exactly. Integer and boolean tensors must be equal in all three.
        factor: how many times eager's error is allowed.
        name: the name printed for a single tensor, and the stem of the names in a structure.

    Returns:
        One `ErrorReport` for each tensor, in order.

    Raises:
        TypeError: if the structures differ, or the reference is not float64.
        ValueError: if shapes or dtypes differ, or eager or the reference has NaN: then there is no yardstick.
    """
    fast_tensors = _flatten(fast, name)
    eager_tensors = _flatten(eager_same_dtype, name)
    reference_tensors = _flatten(reference_float64, name)
    if not list(fast_tensors) == list(eager_tensors) == list(reference_tensors):
        raise TypeError(
            f"{name} differs in structure: fast has {list(fast_tensors)}, eager {list(eager_tensors)}, "
            f"the reference {list(reference_tensors)}."
        )
    return [
        _report(key, fast_tensors[key], eager_tensors[key], reference_tensors[key], factor)
        for key in fast_tensors
    ]


def assert_as_accurate(
    fast: Any,
    eager_same_dtype: Any,
    reference_float64: Any,
    factor: float = 2.0,
    name: str = "output",
) -> list[ErrorReport]:
    """Assert that `fast` errs at most `factor` times as much as eager PyTorch in the same precision.

    Both are measured against float64, in the mean and at the worst element; see `error_report` for the bound
    and the arguments. NaN never passes.

    Returns:
        The reports, so that a test or a benchmark can print the ratios.

    Raises:
        AssertionError: naming each tensor that is too far off, with both errors, their ratio and the worst
            element.
    """
    reports = error_report(fast, eager_same_dtype, reference_float64, factor, name)
    _raise_on_failure(reports, factor)
    return reports


def compare_op(
    fast_fn: Callable[..., Any],
    eager_fn: Callable[..., Any],
    reference_fn: Callable[..., Any],
    inputs: Mapping[str, Any] | Sequence[Any],
    dtype: torch.dtype,
    grad_inputs: Sequence[str | int] | None = None,
    factor: float = 2.0,
    seed: int = 0,
) -> list[ErrorReport]:
    """Hold an op's outputs and gradients against the yardstick.

    The inputs are rounded to `dtype` once; `fast_fn` and `eager_fn` get them so, `reference_fn` gets the same
    values in float64. All three then run backward from the same random cotangents, one for each floating
    output.

    Args:
        fast_fn: the implementation under test.
        eager_fn: plain PyTorch; usually the op's reference, which accepts any float type.
        reference_fn: usually the same function; called with float64.
        inputs: by keyword (a mapping) or by position (a sequence). Floating tensors are rounded to `dtype`
            and keep their strides; everything else is passed as it is.
        dtype: the precision to test, such as `torch.float16`.
        grad_inputs: names or positions of the inputs whose gradients are compared; all floating tensors by
            default, none for `()`. A gradient that does not arrive counts as zero.
        factor: how many times eager's error is allowed.
        seed: of the cotangents.

    Returns:
        One report for each output (`output`, or `output[i]`, or its field's name) and gradient
        (`grad(name)`).

    Raises:
        AssertionError: if an output or a gradient is too far off.
        ValueError: if `grad_inputs` names an input that is no floating tensor.
    """
    named = dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    floating = [key for key, value in named.items() if _is_floating(value)]
    if grad_inputs is None:
        grad_inputs = floating
    for key in grad_inputs:
        if key not in floating:
            raise ValueError(f"grad_inputs has {key!r}, which is no floating input; allowed: {floating}.")

    rounded = {key: _cast(value, dtype) if key in floating else value for key, value in named.items()}
    exact = {key: _cast(value, torch.float64) if key in floating else value for key, value in rounded.items()}

    cotangents: dict[str, Tensor] = {}
    by_keyword = isinstance(inputs, Mapping)
    reference = _run(reference_fn, exact, by_keyword, grad_inputs, cotangents, seed)
    eager = _run(eager_fn, rounded, by_keyword, grad_inputs, cotangents, seed)
    fast = _run(fast_fn, rounded, by_keyword, grad_inputs, cotangents, seed)

    reports = error_report(fast[0], eager[0], reference[0], factor)
    magnitudes = [_magnitude(gradient) for gradient in reference[1].values()]
    largest = (
        max((mean for mean, _ in magnitudes), default=0.0),
        max((top for _, top in magnitudes), default=0.0),
    )
    for key in grad_inputs:
        gradients = fast[1][key], eager[1][key], reference[1][key]
        reports.append(_report(f"grad({key})", *gradients, factor, largest))
    _raise_on_failure(reports, factor)
    return reports


def poison_buffer(
    *shape: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor of NaN (integers: the largest value, booleans: True), to be written before it is read."""
    return torch.full(shape, _poison_value(dtype), dtype=dtype, device=device)


def poison_tail(tensor: Tensor, lengths: int | Sequence[int] | Tensor, dim: int = -2) -> Tensor:
    """A copy whose entries from `lengths` on, along `dim`, are NaN: the unused tail of a cache.

    Args:
        tensor: `[batch, ...]`.
        lengths: valid entries, for all or one number for each batch row.
        dim: the length axis, not the batch axis.

    Returns:
        A tensor of the same shape, contiguous.

    Raises:
        ValueError: if `dim` is the batch axis, if there are neither one nor `batch` lengths, or one is not in
            0 .. size of the axis.
    """
    if dim % tensor.dim() == 0:
        raise ValueError(f"dim={dim} is the batch axis; give the length axis, 1 to {tensor.dim() - 1}.")
    size = tensor.shape[dim]
    rows = torch.as_tensor(lengths).reshape(-1).tolist()
    if len(rows) not in (1, tensor.shape[0]):
        raise ValueError(
            f"lengths has {len(rows)} entries, but batch is {tensor.shape[0]}; give 1 or as many."
        )
    for length in rows:
        if not 0 <= length <= size:
            raise ValueError(
                f"lengths has {length}, but axis {dim} has {size} entries; allowed: 0 to {size}."
            )
    poisoned = tensor.detach().clone(memory_format=torch.contiguous_format)
    for index, row in enumerate(poisoned):
        length = rows[index if len(rows) > 1 else 0]
        row.narrow(dim % tensor.dim() - 1, length, size - length).fill_(_poison_value(tensor.dtype))
    return poisoned


def poison_padding(tensor: Tensor, keep: Tensor) -> Tensor:
    """A copy that is NaN wherever the boolean `keep`, broadcast to `tensor`, is False."""
    return torch.where(keep, tensor.detach(), torch.full_like(tensor, _poison_value(tensor.dtype)))


def poison_surroundings(tensor: Tensor, margin: int = 1) -> Tensor:
    """The same values as a non-contiguous view into a buffer of NaN: every step outside reads NaN.

    Args:
        tensor: any shape with at least one axis.
        margin: entries of NaN before and after each axis.

    Returns:
        A view of the same shape and values; its last axis has stride 1.
    """
    buffer = poison_buffer(
        *(size + 2 * margin for size in tensor.shape), dtype=tensor.dtype, device=tensor.device
    )
    view = buffer[tuple(slice(margin, margin + size) for size in tensor.shape)]
    view.copy_(tensor.detach())
    return view


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within this context `torch.empty` and its relatives return NaN (the largest value for integers).

    A kernel that does not write all of its output then fails loudly. It holds for every allocation that goes
    through `empty`, `empty_like`, `empty_strided` and `new_empty`, in Python, in C++ and in the threads of
    autograd, by PyTorch's own `torch.utils.deterministic.fill_uninitialized_memory`. That switch works only
    together with deterministic algorithms, so these are on too; operations that have none run as usual.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _run(
    function: Callable[..., Any],
    inputs: Mapping[Any, Any],
    by_keyword: bool,
    grad_inputs: Sequence[str | int],
    cotangents: dict[str, Tensor],
    seed: int,
) -> tuple[Any, dict[Any, Tensor]]:
    """Outputs and gradients of one implementation; the first call (the reference) fills `cotangents`."""
    leaves = dict(inputs)
    for key in grad_inputs:
        leaves[key] = leaves[key].detach().requires_grad_()
    output = function(**leaves) if by_keyword else function(*leaves.values())
    outputs = {key: value for key, value in _flatten(output, "output").items() if value.is_floating_point()}
    if not cotangents:
        generator = torch.Generator().manual_seed(seed)
        for key, value in outputs.items():
            drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
            # bfloat16 has the fewest bits of the types in use: its values are exact in all of them.
            drawn = drawn.to(torch.bfloat16).double()
            # The lse of an empty row is -inf and has no gradient.
            cotangents[key] = drawn.masked_fill(~value.detach().isfinite(), 0.0)
    gradients: dict[Any, Tensor] = {}
    differentiable = [key for key, value in outputs.items() if value.requires_grad and key in cotangents]
    if grad_inputs:
        found: Sequence[Tensor | None] = [None] * len(grad_inputs)
        if differentiable:
            found = torch.autograd.grad(
                [outputs[key] for key in differentiable],
                [leaves[key] for key in grad_inputs],
                [cotangents[key].to(outputs[key].dtype) for key in differentiable],
                allow_unused=True,
            )
        for key, gradient in zip(grad_inputs, found, strict=True):
            gradients[key] = torch.zeros_like(leaves[key]) if gradient is None else gradient
    return output, gradients


def _report(
    name: str,
    fast: Tensor,
    eager: Tensor,
    reference: Tensor,
    factor: float,
    largest: tuple[float, float] | None = None,
) -> ErrorReport:
    """One tensor's report; `largest` is the mean and maximal magnitude of the largest gradient beside it."""
    if not fast.shape == eager.shape == reference.shape:
        raise ValueError(
            f"{name} differs in shape: fast {list(fast.shape)}, eager {list(eager.shape)}, "
            f"reference {list(reference.shape)}."
        )
    if fast.dtype != eager.dtype:
        raise ValueError(
            f"{name} is {fast.dtype} from fast, but {eager.dtype} from eager; compare like with like."
        )
    fast, eager, reference = (tensor.detach().cpu() for tensor in (fast, eager, reference))
    if not fast.is_floating_point():
        return _equality_report(name, fast, reference)
    if reference.dtype != torch.float64:
        raise TypeError(f"{name} of the reference is {reference.dtype}; it must be torch.float64.")
    for who, tensor in (("the reference", reference), ("eager", eager)):
        if tensor.isnan().any():
            raise ValueError(
                f"{name} of {who} has NaN at {_first(tensor.isnan())}, so there is no yardstick."
            )

    fast_error, eager_error = _absolute_error(fast, reference), _absolute_error(eager, reference)
    mean, top = _magnitude(reference)
    eps = torch.finfo(fast.dtype).eps
    if largest is not None and top < eps * largest[1]:
        mean_slack = max_slack = _VANISHING_SLACK * eps * largest[1]
    else:
        if largest is not None:
            mean, top = min(largest[0], _CANCELLATION * mean), min(largest[1], _CANCELLATION * top)
        mean_slack, max_slack = _MEAN_SLACK * eps * mean, _MAX_SLACK * eps * top
    return ErrorReport(
        name=name,
        shape=tuple(fast.shape),
        fast_mean=_mean(fast_error),
        fast_max=_max(fast_error),
        eager_mean=_mean(eager_error),
        eager_max=_max(eager_error),
        allowed_mean=factor * _mean(eager_error) + mean_slack,
        allowed_max=factor * _max(eager_error) + max_slack,
        worst=_worst(fast, eager, reference, fast_error),
    )


def _equality_report(name: str, fast: Tensor, reference: Tensor) -> ErrorReport:
    differs = (fast != reference).double()
    worst = _worst(fast, fast, reference, differs)
    return ErrorReport(name, tuple(fast.shape), _mean(differs), _max(differs), 0.0, 0.0, 0.0, 0.0, worst)


def _absolute_error(tensor: Tensor, reference: Tensor) -> Tensor:
    """`|tensor - reference|`; zero at equal infinities, infinite at NaN and at any other infinity."""
    tensor = tensor.double()
    error = (tensor - reference).abs()
    error = torch.where(tensor == reference, torch.zeros_like(error), error)
    return torch.where(error.isnan(), torch.full_like(error, torch.inf), error)


def _worst(fast: Tensor, eager: Tensor, reference: Tensor, error: Tensor) -> str:
    if error.numel() == 0:
        return "none (empty)"
    index = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    at = tuple(index)
    text = f"at {index}: fast {fast[at]:.6g}, eager {eager[at]:.6g}, float64 {reference[at]:.6g}"
    broken = int(error.isinf().sum())
    return f"{text} ({broken} of {error.numel()} elements are NaN or infinite)" if broken else text


def _raise_on_failure(reports: Sequence[ErrorReport], factor: float) -> None:
    failed = [report for report in reports if not report.holds]
    if failed:
        names = ", ".join(report.name for report in failed)
        details = "\n".join(str(report) for report in failed)
        raise AssertionError(f"{names}: error above {factor:g} x eager in the same precision.\n{details}")


def _flatten(value: Any, name: str) -> dict[str, Tensor]:
    if value is None:
        return {}
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, Mapping):
        parts = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        parts = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        parts = [(f"{name}[{index}]", item) for index, item in enumerate(value)]
    else:
        raise TypeError(
            f"{name} is a {type(value).__name__}; allowed: tensors, tuples, lists and dicts of them."
        )
    return {key: tensor for part, item in parts for key, tensor in _flatten(item, part).items()}


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Another precision on the same strides; what surrounds a view in its buffer becomes NaN."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.is_contiguous() or tensor.numel() == 0 or span < tensor.numel():
        # Dense, or an expanded view, whose entries share memory and so cannot be copied into.
        return tensor.detach().to(dtype)
    buffer = poison_buffer(span, dtype=dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, tensor.stride()).copy_(tensor.detach())


def _poison_value(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return torch.nan if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).max


def _magnitude(reference: Tensor) -> tuple[float, float]:
    """Mean and largest magnitude, without the infinities that mark empty rows."""
    magnitude = reference.detach().abs()
    magnitude = magnitude.masked_fill(magnitude.isinf(), 0.0)
    return _mean(magnitude), _max(magnitude)


def _ratio(fast: float, eager: float) -> float:
    if fast == eager:
        return 1.0
    return fast / eager if eager else torch.inf


def _mean(tensor: Tensor) -> float:
    return tensor.mean().item() if tensor.numel() else 0.0


def _max(tensor: Tensor) -> float:
    return tensor.max().item() if tensor.numel() else 0.0


def _first(mask: Tensor) -> list[int]:
    return mask.nonzero()[0].tolist()
