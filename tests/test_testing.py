"""The yardstick itself: it must pass sound low-precision code and fail code that is slightly wrong."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch

from undivided.testing import (
    assert_as_accurate,
    compare_op,
    error_report,
    poison_buffer,
    poison_padding,
    poison_surroundings,
    poison_tail,
    poisoned_empty,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def attention(query, key, value):
    scores = query.shape[-1] ** -0.5 * query @ key.mT
    lse_type = torch.promote_types(query.dtype, torch.float32)
    return scores.softmax(-1) @ value, scores.to(lse_type).logsumexp(-1)


def fast_attention(query, key, value, scale_error=0.0, dropped_keys=0):
    """Scores and sums in float32, as a fused kernel does; with the faults a kernel may have."""
    scores = query.shape[-1] ** -0.5 * (1 + scale_error) * query.float() @ key.float().mT
    if dropped_keys:
        scores = scores[..., :-dropped_keys]
        value = value[..., :-dropped_keys, :]
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ value.float()
    return out.to(query.dtype), lse


def draw(length=33, head_dim=32):
    generator = torch.Generator().manual_seed(1)
    names = ("query", "key", "value")
    return {
        name: torch.randn(2, 3, length, head_dim, generator=generator, dtype=torch.float64) for name in names
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 33, 128])
def test_sound_kernel_passes_with_gradients(dtype, length):
    reports = compare_op(fast_attention, attention, attention, draw(length), dtype)
    assert [report.name for report in reports] == [
        "output[0]",
        "output[1]",
        "grad(query)",
        "grad(key)",
        "grad(value)",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_forgotten_key_fails(dtype):
    with pytest.raises(AssertionError, match=r"output\[0\], output\[1\], grad\(query\)"):
        compare_op(lambda **kw: fast_attention(**kw, dropped_keys=1), attention, attention, draw(128), dtype)


@pytest.mark.parametrize(("dtype", "scale_error"), [(torch.float32, 1e-5), (torch.float16, 1e-2)])
def test_slightly_wrong_scale_fails(dtype, scale_error):
    with pytest.raises(AssertionError, match="error above 2 x eager in the same precision"):
        compare_op(
            lambda **kw: fast_attention(**kw, scale_error=scale_error), attention, attention, draw(), dtype
        )


class _WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 1.02


def test_gradient_wrong_by_two_percent_fails_and_is_named():
    def faulty(query, key, value):
        return fast_attention(query, key, _WrongBackward.apply(value))

    with pytest.raises(AssertionError, match=r"^grad\(value\): error above"):
        compare_op(faulty, attention, attention, draw(), torch.float16)


def test_missing_gradient_counts_as_zero_and_fails():
    with pytest.raises(AssertionError, match=r"^grad\(key\): error above"):
        compare_op(
            lambda query, key, value: query + key.detach(),
            lambda query, key, value: query + key,
            lambda query, key, value: query + key,
            draw(),
            torch.float32,
        )


def test_all_three_see_the_same_rounded_values():
    seen = {}

    def record(name):
        def function(value):
            seen[name] = value.detach().double()
            return value * 1.0

        return function

    compare_op(record("fast"), record("eager"), record("reference"), [torch.rand(7).double()], torch.float16)
    assert torch.equal(seen["fast"], seen["reference"])
    assert torch.equal(seen["eager"], seen["reference"])


def test_other_inputs_pass_untouched_and_get_no_gradient():
    mask = torch.tensor([True, False, True])

    def masked(value, keep, scale):
        return value.masked_fill(~keep, 0.0) * scale

    reports = compare_op(masked, masked, masked, [torch.ones(3), mask, 2], torch.float16)
    assert [report.name for report in reports] == ["output", "grad(0)"]
    with pytest.raises(ValueError, match=r"grad_inputs has 1, which is no floating input; allowed: \[0\]\."):
        compare_op(masked, masked, masked, [torch.ones(3), mask, 2], torch.float16, grad_inputs=[1])


def test_strides_of_inputs_are_kept_and_their_surroundings_poisoned():
    def check(value):
        assert value.stride() == (12, 1)
        assert value.detach().as_strided((2, 12), (12, 1)).isnan().sum() == 2 * 8
        return value * 1.0

    compare_op(check, check, check, [poison_surroundings(torch.rand(3, 4), margin=4)], torch.float16)


def test_lse_of_an_empty_row_is_matched_and_has_no_gradient():
    def masked(query, key, value):
        scores = query @ key.mT
        keep = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).tril(-1)
        scores = scores.masked_fill(~keep, -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
        return weights @ value, lse

    compare_op(masked, masked, masked, draw(5), torch.float32)
    with pytest.raises(AssertionError, match=r"output\[1\].*\n.*\n.*\n.*inf.*\n.*NaN or infinite"):
        compare_op(
            lambda **kw: (masked(**kw)[0], masked(**kw)[1].clamp_min(-1e30)),
            masked,
            masked,
            draw(5),
            torch.float32,
        )


def test_nan_never_passes():
    exact = torch.ones(4, dtype=torch.float64)
    fast = torch.tensor([1.0, 1.0, torch.nan, 1.0])
    with pytest.raises(AssertionError, match=r"at \[2\]: fast nan.*1 of 4 elements are NaN or infinite"):
        assert_as_accurate(fast, exact.float(), exact, factor=float("inf"))
    with pytest.raises(ValueError, match=r"out of eager has NaN at \[2\], so there is no yardstick"):
        assert_as_accurate(exact.float(), fast, exact, name="out")
    with pytest.raises(ValueError, match=r"out of the reference has NaN at \[2\]"):
        assert_as_accurate(exact.float(), exact.float(), fast.double(), name="out")


def test_message_has_both_errors_and_their_ratio():
    exact = torch.full((2, 2), 3.0, dtype=torch.float64)
    eager, fast = exact.float() + 0.25, exact.float()
    fast[1, 0] += 2.0
    with pytest.raises(AssertionError) as caught:
        assert_as_accurate(fast, eager, exact, name="out")
    text = str(caught.value)
    assert "out [2, 2]   |fast - float64|   |eager - float64|   ratio   allowed" in text
    assert "max            2.000e+00           2.500e-01     8.00" in text
    assert "worst at [1, 0]: fast 5, eager 3.25, float64 3" in text


def test_reports_carry_the_ratios():
    exact = torch.full((8,), 3.0, dtype=torch.float64)
    (report,) = error_report(exact.float() + 0.5, exact.float() + 0.25, exact)
    assert report.holds
    assert (report.ratio_mean, report.ratio_max) == (2.0, 2.0)


class _Output(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor | None


def test_structures_are_named_and_compared_part_by_part():
    exact = torch.ones(3, dtype=torch.float64)
    named = _Output(exact.float(), None)
    reports = assert_as_accurate(
        {"a": named, "b": [exact.half()]},
        {"a": named, "b": [exact.half()]},
        {"a": _Output(exact, None), "b": [exact]},
    )
    assert [report.name for report in reports] == ["out", "b[0]"]
    with pytest.raises(TypeError, match="output differs in structure"):
        assert_as_accurate(named, _Output(exact.float(), exact.float()), _Output(exact, exact))
    with pytest.raises(TypeError, match="output is a str; allowed"):
        assert_as_accurate("out", named, named)


def test_unlike_shapes_and_types_are_refused():
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"out differs in shape: fast \[3\], eager \[2\], reference \[3\]"):
        assert_as_accurate(exact.float(), exact[:2].float(), exact, name="out")
    with pytest.raises(ValueError, match="output is torch.float32 from fast, but torch.float16 from eager"):
        assert_as_accurate(exact.float(), exact.half(), exact)
    with pytest.raises(TypeError, match="reference is torch.float32; it must be torch.float64"):
        assert_as_accurate(exact.half(), exact.half(), exact.float())


def test_integers_must_be_equal():
    index = torch.tensor([3, 1, 2])
    assert_as_accurate(index, index, index)
    with pytest.raises(AssertionError, match=r"worst at \[1\]: fast 0"):
        assert_as_accurate(torch.tensor([3, 0, 2]), index, index)


def test_empty_tensors_pass():
    empty = torch.empty(0, 4, dtype=torch.float64)
    assert_as_accurate(empty.half(), empty.half(), empty)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int32])
def test_poisoned_empty_fills_every_kind_of_empty(dtype):
    like = torch.zeros(2, 2, dtype=dtype)
    with poisoned_empty():
        made = [
            torch.empty(2, 2, dtype=dtype),
            torch.empty_like(like),
            like.new_empty(2, 2),
            torch.empty_strided((2, 2), (2, 1), dtype=dtype),
        ]
    for tensor in made:
        poisoned = tensor.isnan() if dtype.is_floating_point else tensor == torch.iinfo(dtype).max
        assert poisoned.all()


def test_poisoned_empty_reaches_custom_ops_and_backward():
    class Forgetful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.empty_like(gradient)

    leaf = torch.ones(3, requires_grad=True)
    with poisoned_empty():
        (gradient,) = torch.autograd.grad(Forgetful.apply(leaf).sum(), leaf)
    assert gradient.isnan().all()


def test_poisoned_empty_restores_the_switches_and_filters_after_an_error():
    before = torch.are_deterministic_algorithms_enabled()
    filters = list(warnings.filters)
    with pytest.raises(KeyError), poisoned_empty():
        raise KeyError
    assert torch.are_deterministic_algorithms_enabled() == before
    assert warnings.filters == filters


def test_poison_tail_takes_one_length_or_one_a_row():
    cache = torch.zeros(2, 3, 4, 5)
    tail = poison_tail(cache, [1, 4]).isnan()
    assert not tail[0, :, :1].any() and tail[0, :, 1:].all() and not tail[1].any()
    assert torch.equal(poison_tail(cache, 2, dim=2).isnan()[1, 0, :, 0], torch.tensor([0, 0, 1, 1]).bool())
    with pytest.raises(ValueError, match="lengths has 3 entries, but batch is 2; give 1 or as many"):
        poison_tail(cache, [1, 2, 3])
    with pytest.raises(ValueError, match="lengths has 5, but axis -2 has 4 entries; allowed: 0 to 4"):
        poison_tail(cache, 5)
    with pytest.raises(ValueError, match="dim=0 is the batch axis; give the length axis, 1 to 3"):
        poison_tail(cache, 1, dim=0)


def test_poison_padding_follows_the_mask():
    keep = torch.tensor([[True, False]])
    assert torch.equal(poison_padding(torch.zeros(3, 2), keep).isnan(), ~keep.expand(3, 2))


def test_poison_surroundings_keeps_values_and_encloses_them():
    value = torch.rand(2, 3)
    view = poison_surroundings(value)
    assert torch.equal(view, value)
    assert not view.is_contiguous()
    enclosing = view.as_strided((4, 5), (5, 1), 0)
    assert enclosing.isnan().sum() == 20 - 6


def test_poison_buffer_is_nan_or_the_largest_integer():
    assert poison_buffer(2, 3).isnan().all()
    assert (poison_buffer(4, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fused_attention_of_pytorch_passes_on_cuda(dtype):
    def fused(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    def eager(query, key, value):
        return attention(query, key, value)[0]

    inputs = {name: tensor.cuda() for name, tensor in draw(64).items()}
    compare_op(fused, eager, eager, inputs, dtype)
    with pytest.raises(AssertionError, match=r"output, grad\(query\), grad\(key\)"):
        compare_op(lambda query, key, value: fused(query * 1.05, key, value), eager, eager, inputs, dtype)


@pytest.mark.gpu
def test_poisoned_empty_reaches_cuda_and_lets_fused_attention_run():
    leaf = torch.randn(2, 3, 64, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    with poisoned_empty():
        assert torch.empty_like(leaf).isnan().all()
        out = torch.nn.functional.scaled_dot_product_attention(leaf, leaf, leaf)
        (gradient,) = torch.autograd.grad(out.sum(), leaf)
    assert not out.isnan().any()
    assert not gradient.isnan().any()
