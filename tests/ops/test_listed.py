from __future__ import annotations

import pytest
import torch

from undivided.ops import listed_attention
from undivided.testing import assert_as_accurate, poison_surroundings, poisoned_empty


def inputs(queries=5, keys=9, entries=4, dim=8, value_dim=6, dtype=torch.float64, device="cpu"):
    def draw(length, width):
        return torch.randn(2, 3, length, width, dtype=dtype, device=device)

    lists = torch.stack([torch.randperm(keys)[:entries] for _ in range(2 * 3 * queries)])
    return {
        "query": draw(queries, dim),
        "key": draw(keys, dim),
        "value": draw(keys, value_dim),
        "indices": lists.view(2, 3, queries, entries).to(device),
    }


def loop(query, key, value, indices, scale):
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            for n in range(query.shape[2]):
                rows = indices[b, h, n]
                weights = (scale * key[b, h, rows] @ query[b, h, n]).softmax(0)
                out[b, h, n] = weights @ value[b, h, rows]
    return out


def test_is_a_softmax_over_the_list():
    x = inputs()
    torch.testing.assert_close(listed_attention(**x, scale=0.7), loop(**x, scale=0.7))
    torch.testing.assert_close(listed_attention(**x), loop(**x, scale=8**-0.5))


def test_gradients_are_those_of_finite_differences():
    x = inputs(queries=2, keys=4, entries=3, dim=3, value_dim=2)
    leaves = [x[name].requires_grad_() for name in ("query", "key", "value")]
    assert torch.autograd.gradcheck(lambda *t: listed_attention(*t, x["indices"]), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("entries", [1, 16, 19])
def test_triton_is_as_accurate_as_the_reference(dtype, entries, device):
    x = inputs(queries=2, keys=21, entries=entries, dim=16, value_dim=20, dtype=dtype, device=device)
    exact = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    found, want = (listed_attention(**x, backend=backend) for backend in ("triton", "reference"))
    assert_as_accurate(found, want, listed_attention(**exact, backend="reference"))


def test_triton_reads_views_only_where_they_are_and_writes_all_of_its_output(device):
    x = inputs(queries=2, dtype=torch.float32, device=device)
    views = {name: poison_surroundings(t) if name != "indices" else t for name, t in x.items()}
    with poisoned_empty():
        found = listed_attention(**views, backend="triton")
    torch.testing.assert_close(found, listed_attention(**x, backend="reference"))


def test_the_operator_is_registered_and_compiles_into_one_graph(device):
    x = inputs(queries=2, dtype=torch.float32, device=device)
    torch.library.opcheck(torch.ops.undivided.listed_forward.default, (*x.values(), 0.5))
    torch._dynamo.reset()

    def run(**t):
        return listed_attention(**t, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**x), run(**x))


COMPILES = """
import torch
from tests.ops.ahead_of_time import compile_only, name_and_shared

compile_only(name_and_shared)
from undivided.ops.listed import triton

x = torch.empty(1, 2, 197, 64, dtype=torch.bfloat16)
triton.forward(x, x, x, torch.zeros(1, 2, 197, 20, dtype=torch.int64), 0.1)
"""


def test_the_kernel_compiles_for_hopper(run_python):
    assert run_python(COMPILES).stdout.split()[0] == "_kernel"


def test_wrong_input_is_refused():
    x = inputs()
    with pytest.raises(
        ValueError, match=r"indices has shape \[2, 3, 4, 4\]; it must be \[batch, heads, queries"
    ):
        listed_attention(**x | {"indices": x["indices"][:, :, :4]})
    with pytest.raises(ValueError, match="with at least one entry"):
        listed_attention(**x | {"indices": x["indices"][..., :0]})
    with pytest.raises(ValueError, match="indices has 9, but there are 9 keys"):
        listed_attention(**x | {"indices": torch.full_like(x["indices"], 9)})
    with pytest.raises(TypeError, match="indices has dtype torch.float64; use int32 or int64"):
        listed_attention(**x | {"indices": x["indices"].double()})
    with pytest.raises(ValueError, match=r"key .* and value .* must share \[batch, heads, keys\]"):
        listed_attention(**x | {"value": x["value"][:, :, :3]})
    x["query"].requires_grad_()
    with pytest.raises(ValueError, match="a gradient is needed .the kernel has no backward."):
        listed_attention(
            **{n: t.float() if t.is_floating_point() else t for n, t in x.items()}, backend="triton"
        )
