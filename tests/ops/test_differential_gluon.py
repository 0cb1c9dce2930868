"""The Hopper kernel: compiled on a GPU of that kind, elsewhere run as Python (`gluon_on_cpu.py`)."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from tests.ops import gluon_on_cpu
from tests.ops.test_differential import inputs
from undivided.ops import differential_attention
from undivided.testing import compare_op, error_report, poison_surroundings, poisoned_empty

pytest.importorskip("triton")

SHAPES = {
    "one tile": dict(queries=100, keys=100),
    "several tiles": dict(queries=300, keys=300, batch=1),
    "a prompt behind a cache": dict(queries=70, keys=333, batch=1),
    "queries that see nothing": dict(queries=150, keys=40, batch=1),
    "more blocks of keys than are kept": dict(queries=40, keys=1300, batch=1),
    "one query": dict(queries=1, keys=200),
    "symmetric": dict(heads=2, noise_heads=2, queries=129, keys=129, batch=1),
    "several signal keys a noise key": dict(heads=8, key_heads=4, queries=65, keys=65, batch=1),
    "head_dim 128": dict(head_dim=128, value_dim=256, queries=140, keys=270, batch=1),
}


class Descriptor:
    """What the copy engine reads in boxes of any rank, with zeros outside."""

    def __init__(self, base, shape, strides, block_shape, layout):
        self.tensor, self.dtype = torch.as_strided(base, shape, strides, base.storage_offset()), base.dtype
        self.block_shape, self.layout = block_shape, layout


def bulk_copy(descriptor, coordinate, barrier, target):
    delay = gluon_on_cpu._thread.run.random.choice((0.0, 1e-3))

    def land():
        time.sleep(delay)
        box = tuple(
            slice(start, start + size) for start, size in zip(coordinate, descriptor.block_shape, strict=True)
        )
        part = descriptor.tensor[box]
        target.value.zero_()
        target.value[tuple(slice(0, size) for size in part.shape)] = part
        barrier.land(target.value.numel() * target.value.element_size())

    threading.Thread(target=land, daemon=True).start()


@pytest.fixture(scope="module")
def on_cpu():
    """The module of the kernel, on an emulator that also knows boxes of four axes, reshaped tiles and roots."""
    language = gluon_on_cpu._language

    def with_root():
        gl = language()
        gl.sqrt = gluon_on_cpu._mapped(torch.sqrt)
        return gl

    shared = gluon_on_cpu.Shared
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gluon_on_cpu, "Descriptor", Descriptor)
        patch.setattr(gluon_on_cpu, "_bulk_copy", bulk_copy)
        patch.setattr(gluon_on_cpu, "_language", with_root)
        patch.setattr(shared, "reshape", lambda tile, shape: shared(tile.value.view(shape)), raising=False)
        patch.setattr(shared, "shape", property(lambda tile: tile.value.shape), raising=False)
        yield gluon_on_cpu.load("undivided.ops.differential.gluon")


@pytest.fixture
def forward(device, request):
    """`forward` of the kernel, with the arguments of the operator."""
    if device.type == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    if device.type == "cuda":
        from undivided.ops.differential import gluon as module
    else:
        module = request.getfixturevalue("on_cpu")

    def run(*, query, lam, norm_weight, with_mixed=False, is_causal=True, **x):
        options = (1e-5, 0.8, is_causal, query.shape[3] ** -0.5)
        lam = lam.float().expand(query.shape[:3])
        return module.forward(query, *x.values(), lam, norm_weight, *options, with_mixed=with_mixed)

    return run


def hopper_inputs(device, head_dim=64, value_dim=128, **shape):
    x = inputs(head_dim=head_dim, value_dim=value_dim, **shape, device=device)
    # Both keys of a head in one row, as a cache holds them.
    rows = torch.cat([x["key"], x["noise_key"]], -1) if x["key"].shape == x["noise_key"].shape else None
    if rows is not None:
        x |= {"key": rows[..., :head_dim], "noise_key": rows[..., head_dim:]}
    return x


def reference(is_causal=True):
    return lambda **x: differential_attention(**x, is_causal=is_causal, out_scale=0.8, backend="reference")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_accurate_as_the_reference_and_writes_everything(shape, forward, device):
    x = hopper_inputs(device, **shape)
    with poisoned_empty():
        compare_op(lambda **x: forward(**x)[0], reference(), reference(), x, torch.float16, grad_inputs=())


@pytest.mark.parametrize("norm", [True, False])
def test_not_causal_and_without_the_norm(norm, forward, device):
    x = hopper_inputs(device, queries=130, keys=70, batch=1) | ({} if norm else {"norm_weight": None})
    fast = lambda **x: forward(**x, is_causal=False)[0]  # noqa: E731
    compare_op(fast, reference(False), reference(False), x, torch.float16, grad_inputs=())


def test_keeps_for_the_backward_what_the_portable_kernel_keeps(forward, device):
    from undivided.ops.differential import triton

    x = {
        name: tensor.half() for name, tensor in hopper_inputs(device, queries=150, keys=100, batch=1).items()
    }
    ours = forward(**x, with_mixed=True)
    query, lam, weight = x.pop("query"), x.pop("lam").float(), x.pop("norm_weight")
    options = (1e-5, 0.8, True, query.shape[3] ** -0.5)
    theirs = triton.forward(query, *x.values(), lam, weight, *options, with_mixed=True)
    for name, own, other in zip(("out", "mixed", "noise", "lse", "noise lse"), ours, theirs, strict=True):
        assert own.shape == other.shape and own.stride() == other.stride(), name
        # The weights are half precision inside, in blocks of other sizes, and so are these.
        own, other = own.half(), other.half()
        assert all(report.holds for report in error_report(own, other, other.double())), name


def test_strides_and_surroundings_do_not_matter(forward, device):
    x = {name: tensor.half() for name, tensor in hopper_inputs(device, queries=70, keys=70).items()}
    expected = forward(**x)[0]
    names = ("query", "noise_query", "key", "noise_key", "value")
    # A margin of 8 elements keeps the steps of the copy engine, one of 1 does not and is copied.
    for margin in (8, 1):
        strided = {name: poison_surroundings(x[name], margin) for name in names}
        assert torch.equal(forward(**(x | strided))[0], expected)
    turned = {name: x[name].transpose(1, 2).contiguous().transpose(1, 2) for name in names}
    assert torch.equal(forward(**(x | turned))[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operator_and_gradients_are_as_accurate_as_eager(shape, dtype, forward, device):
    fused = lambda **x: differential_attention(**x, is_causal=True, out_scale=0.8, backend="gluon")  # noqa: E731
    compare_op(fused, reference(), reference(), hopper_inputs(device, **shape), dtype)


COMPILE = """
import re
import torch
from tests.ops.ahead_of_time import compile_only, ptxas

def report(name, kernel, options):
    said = ptxas(kernel)
    spilled = re.search(r"(\\d+) bytes spill stores", said).group(1)
    return kernel.metadata.shared, options["IS_NOISE"], spilled, int("serialized" in said)

compile_only(report)
from undivided.ops.differential import gluon

for head_dim in (64, 128):
    draw = lambda heads, width: torch.empty(1, heads, 512, width, dtype=torch.bfloat16)
    keys = draw(8, 2 * head_dim)
    inputs = (draw(32, head_dim), draw(8, head_dim), keys[..., :head_dim], keys[..., head_dim:], draw(8, 2 * head_dim))
    lam, weight = torch.ones(()).expand(1, 32, 512), torch.ones(2 * head_dim, dtype=torch.bfloat16)
    gluon.forward(*inputs, lam, weight, 1e-5, 0.8, True, 0.1, with_mixed=True)
"""


def test_compiles_for_hopper_without_spills_in_the_loops_or_serialized_products(run_python):
    lines = [line.split() for line in run_python(COMPILE).stdout.splitlines()]
    assert len(lines) == 4
    for shared, is_noise, spilled, serialized in lines:
        assert int(shared) <= 227 * 1024
        assert serialized == "0"
        # Noise heads have the same loops; what signal heads may spill, about a hundred registers at most, is theirs
        # after the loops, where the noise head's output comes in.
        assert int(spilled) == 0 if is_noise == "True" else int(spilled) <= 512
