from __future__ import annotations

import pytest
import torch

from undivided.ops.transport import (
    COLUMN_BACKENDS,
    SINKHORN_BACKENDS,
    column_attention,
    sinkhorn_attention,
)
from undivided.testing import compare_op, poison_surroundings, poisoned_empty

# Rounding adds up over 2 * sweeps + 1 half-steps, in the kernels as in eager, but in another order.
FACTOR = 4.0


def inputs(batch=1, heads=2, key_heads=2, queries=40, keys=40, head_dim=16, value_dim=16, device="cpu"):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, device=device)

    return {
        "query": 2 * draw(batch, heads, queries, head_dim),
        "key": draw(batch, key_heads, keys, head_dim),
        "value": draw(batch, key_heads, keys, value_dim),
    }


def sinkhorn(backend, **options):
    return lambda query, key, value: sinkhorn_attention(query, key, value, backend=backend, **options)


def column(backend, **options):
    return lambda query, key, value: column_attention(query, key, value, backend=backend, **options)


SHAPES = [
    (dict(), dict()),
    (dict(), dict(is_causal=True)),
    (dict(heads=4, queries=33, keys=50), dict(is_causal=True)),
    (dict(batch=2, key_heads=1, queries=37, keys=45, head_dim=20, value_dim=24), dict(scale=0.2)),
    (dict(queries=1, keys=1), dict()),
    (dict(queries=1, keys=70), dict(is_causal=True)),
    (dict(queries=65, keys=3), dict()),
]


@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_sinkhorn_kernel_is_as_accurate_as_eager(shape, options, device):
    x = inputs(**shape, device=device)
    with poisoned_empty():
        compare_op(
            sinkhorn("triton", num_iterations=2, **options),
            sinkhorn("reference", num_iterations=2, **options),
            sinkhorn("reference", num_iterations=2, **options),
            x, torch.float32, factor=FACTOR,
        )  # fmt: skip


@pytest.mark.parametrize("options", [dict(num_iterations=0), dict(num_iterations=5), dict(relaxation=0.6)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sweeps_and_relaxation(options, is_causal, device):
    functions = [sinkhorn(b, is_causal=is_causal, **options) for b in ("triton", "reference", "reference")]
    compare_op(*functions, inputs(queries=35, keys=35, device=device), torch.float32, factor=FACTOR)


@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_column_kernel_is_as_accurate_as_eager(shape, options, device):
    functions = [column(b, **options) for b in ("triton", "reference", "reference")]
    with poisoned_empty():
        compare_op(*functions, inputs(**shape, device=device), torch.float32, factor=FACTOR)


@pytest.mark.parametrize("make", [sinkhorn, column])
def test_half_precision(make, device):
    functions = [make(b, is_causal=True) for b in ("triton", "reference", "reference")]
    compare_op(*functions, inputs(queries=35, keys=35, device=device), torch.float16, factor=FACTOR)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [sinkhorn, column])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bfloat16_on_a_gpu(make, head_dim, device):
    x = inputs(2, 4, 2, 300, 333, head_dim, head_dim, device)
    functions = [make(b, is_causal=True) for b in ("triton", "reference", "reference")]
    compare_op(*functions, x, torch.bfloat16, factor=FACTOR)


def test_plan_has_its_marginals():
    x = inputs(queries=9, keys=12)
    rows = torch.rand(2, 9, dtype=torch.float64) + 0.2
    columns = torch.rand(2, 12, dtype=torch.float64) + 0.2
    columns = columns * (rows.sum(-1) / columns.sum(-1))[:, None]
    # With the identity for values, the output is the plan.
    x["value"] = torch.eye(12, dtype=torch.float64).expand(1, 2, 12, 12)
    plan = sinkhorn_attention(**x, row_marginal=rows, column_marginal=columns, num_iterations=3000)
    torch.testing.assert_close(plan.sum(-1)[0], rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plan.sum(-2)[0], columns, rtol=1e-5, atol=1e-5)


def test_causal_default_marginals_can_be_met():
    x = inputs(queries=8, keys=8)
    x["value"] = torch.eye(8, dtype=torch.float64).expand(1, 2, 8, 8)
    plan = sinkhorn_attention(**x, is_causal=True, num_iterations=3000)
    wanted = [sum(1 / (n + 1) for n in range(m, 8)) for m in range(8)]
    wanted = torch.tensor(wanted, dtype=torch.float64).expand(1, 2, 8)
    torch.testing.assert_close(plan.sum(-2), wanted, rtol=1e-4, atol=1e-4)
    assert (plan.triu(1) == 0).all()


def test_no_sweep_is_softmax_attention():
    x = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(x["query"], x["key"], x["value"])
    torch.testing.assert_close(sinkhorn_attention(**x, num_iterations=0), expected, rtol=1e-12, atol=1e-12)


def test_fields_of_row_and_column_vanish_in_the_limit():
    x = inputs(queries=10, keys=12)
    base = sinkhorn_attention(**x, num_iterations=500)
    # One more channel adds a row field and a column field to the scores.
    extra_query = torch.cat([torch.randn(1, 2, 10, 1), torch.ones(1, 2, 10, 1)], -1).double()
    extra_key = torch.cat([torch.ones(1, 2, 12, 1), torch.randn(1, 2, 12, 1)], -1).double()
    shifted = {
        "query": torch.cat([x["query"], extra_query], -1),
        "key": torch.cat([x["key"], extra_key], -1),
        "value": x["value"],
    }
    out = sinkhorn_attention(**shifted, num_iterations=500, scale=0.25)
    torch.testing.assert_close(out, base, rtol=1e-7, atol=1e-8)


def test_columns_of_column_attention_sum_to_one(device):
    x = {name: tensor.float() for name, tensor in inputs(queries=40, keys=16, device=device).items()}
    x["value"] = torch.eye(16, device=device).expand(1, 2, 16, 16)
    plan = column_attention(**x, backend="triton")
    torch.testing.assert_close(plan.sum(-2), torch.ones(1, 2, 16, device=device), rtol=1e-5, atol=1e-5)


def test_potentials_make_the_plan(device):
    x = {name: tensor.float() for name, tensor in inputs(queries=20, keys=24, device=device).items()}
    scores = 0.25 * x["query"] @ x["key"].mT
    for backend in ("triton", "reference"):
        out, f, g = sinkhorn_attention(**x, backend=backend, return_potentials=True)
        plan = (scores + f[..., None] + g[..., None, :]).exp()
        torch.testing.assert_close(plan @ x["value"], out, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(plan.sum(-1), torch.ones_like(f), rtol=1e-4, atol=1e-4)
        assert not f.requires_grad and not g.requires_grad


@pytest.mark.parametrize("make", [sinkhorn, column])
def test_strided_inputs_are_read_in_place(make, device):
    x = {name: tensor.float() for name, tensor in inputs(heads=2, queries=33, keys=33, device=device).items()}
    strided = {
        name: poison_surroundings(t.transpose(1, 2).contiguous()).transpose(1, 2) for name, t in x.items()
    }
    torch.testing.assert_close(make("triton")(**strided), make("triton")(**x), rtol=0, atol=0)


@pytest.mark.parametrize("make", [sinkhorn, column])
def test_a_sample_gives_the_same_bits_alone_and_in_a_batch(make, device):
    x = {name: tensor.float() for name, tensor in inputs(batch=3, queries=33, keys=40, device=device).items()}
    alone = {name: tensor[1:2] for name, tensor in x.items()}
    assert torch.equal(make("triton")(**x)[1:2], make("triton")(**alone))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradcheck_of_the_reference(is_causal):
    x = [t.requires_grad_() for t in inputs(queries=4, keys=5, head_dim=3, value_dim=2).values()]
    assert torch.autograd.gradcheck(sinkhorn("reference", is_causal=is_causal, num_iterations=2), x)
    assert torch.autograd.gradcheck(column("reference", is_causal=is_causal), x)


def test_large_scores_neither_overflow_nor_lose_early_sweeps(device):
    x = inputs(queries=40, keys=40, device=device)
    x["query"] = 20 * x["query"]
    functions = [sinkhorn(b, num_iterations=3) for b in ("triton", "reference", "reference")]
    compare_op(*functions, x, torch.float32, factor=FACTOR)


@pytest.mark.parametrize("make", [sinkhorn, column])
def test_operators_pass_opcheck_and_compile_whole(make, device):
    from undivided.ops.transport import autograd  # noqa: F401  (defines the operators)

    x = [t.float() for t in inputs(queries=17, keys=17, device=device).values()]
    masses = [torch.ones(1, 2, 17, device=device)] * 2
    options = (True, 0.25, 0 if make is column else 2, 1.0, make is column)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(
        torch.ops.undivided.transport_forward.default, (*x, *masses, *options), test_utils=checks
    )
    out, *lses = torch.ops.undivided.transport_forward(*x, *masses, *options)
    backward = (torch.randn_like(out), *x, out, *masses, *lses, *options)
    torch.library.opcheck(torch.ops.undivided.transport_backward.default, backward, test_utils=checks)

    compiled = torch.compile(make("triton", is_causal=True), fullgraph=True, backend="aot_eager")
    leaves = [t.clone().requires_grad_() for t in x]
    compiled(*leaves).sum().backward()
    plain = [t.clone().requires_grad_() for t in x]
    make("triton", is_causal=True)(*plain).sum().backward()
    for left, right in zip(leaves, plain, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile what they run")
def test_every_kernel_compiles_for_hopper(run_python):
    done = run_python(AHEAD_OF_TIME)
    assert done.stdout.split() == ["compiled", "20"]


AHEAD_OF_TIME = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from undivided.ops.transport import triton as transport

LOGARITHMS = {
    "Y_FIELD", "X_FIELD", "COL_FIELD", "ROW_FIELD", "ROW_MASS", "ROW_LSE", "WEIGHT", "ROW_DELTA", "GAMMA",
    "X_DELTA", "Y_DELTA", "X_FIRST", "Y_FIRST", "X_SECOND", "Y_SECOND", "WEIGHT_FIRST", "WEIGHT_SECOND",
}
KERNELS = {
    "lse": {"HAS_FIELD": True, "DIRECTION": 2},
    "output": {"HAS_FIELD": True, "NORMALIZE": True, "DIRECTION": 1},
    "transfer": {"DIRECTION": 1},
    "value_gradient": {"DIRECTION": 2},
    "logit_gradient": {"DIRECTION": 2},
}
count = 0
for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
    for dim in (64, 128):
        for kernel, flags in KERNELS.items():
            function = getattr(transport, f"_{kernel}_kernel")
            sizes = transport.block_sizes(kernel, dim, dim, dtype)
            launch = {key: sizes.pop(key) for key in ("num_warps", "num_stages")}
            constants = {**transport._dims(dim, dim), **sizes, **flags, "EVEN": dim == 64, "INTERPRET": False}
            signature = {}
            for parameter in function.params:
                key = parameter.name
                if parameter.is_constexpr:
                    signature[key] = "constexpr"
                elif key in LOGARITHMS or (key == "OUT" and kernel in ("lse", "transfer")):
                    signature[key] = "*fp32"
                elif key.isupper():
                    signature[key] = f"*{name}"
                else:
                    signature[key] = "fp32" if key in ("scale", "factor") else "i32"
            constants = {key: value for key, value in constants.items() if key in signature}
            source = ASTSource(fn=function, signature=signature, constexprs=constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch)
            limit = 227 * 1024
            if compiled.metadata.shared > limit:
                raise SystemExit(f"{kernel} {dim} {name} takes {compiled.metadata.shared} bytes")
            count += 1
print("compiled", count)
"""


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda x: sinkhorn_attention(**x, num_iterations=-1),
            ValueError,
            "num_iterations=-1 must be 0 or more",
        ),
        (
            lambda x: sinkhorn_attention(**x, relaxation=0.0),
            ValueError,
            r"relaxation=0.0 must lie in \(0, 1\]",
        ),
        (
            lambda x: sinkhorn_attention(**x, row_marginal=torch.full((6,), 2.0)),
            ValueError,
            "row_marginal adds up to 12, but column_marginal to 6; give both the same mass",
        ),
        (
            lambda x: sinkhorn_attention(**x, column_marginal=torch.tensor([3.0, 3.0, 0.0])),
            ValueError,
            "column_marginal has 0; it must be positive everywhere",
        ),
        (
            lambda x: sinkhorn_attention(**x, column_marginal=torch.ones(5)),
            ValueError,
            r"column_marginal has shape \[5\]; it must broadcast to \[1, 2, 3\]",
        ),
        (
            lambda x: sinkhorn_attention(**x, column_marginal=torch.ones(3, dtype=torch.long)),
            TypeError,
            "column_marginal has dtype torch.int64",
        ),
        (
            lambda x: sinkhorn_attention(**x, attn_mask=torch.ones(6, 3, dtype=torch.bool)),
            ValueError,
            "attn_mask needs a column_marginal",
        ),
        (
            lambda x: sinkhorn_attention(
                **x, attn_mask=torch.zeros(6, 3, dtype=torch.bool), column_marginal=torch.full((3,), 2.0)
            ),
            ValueError,
            "attn_mask leaves a query without a key or a key without a query",
        ),
        (lambda x: column_attention(**x, attn_mask=torch.zeros(6, 3)), TypeError, "use bool"),
        (
            lambda x: column_attention(**x, is_causal=True),
            ValueError,
            "is_causal with 6 queries and 3 keys leaves the first 3 queries without a key",
        ),
        (
            lambda x: column_attention(**x, backend="triton"),
            ValueError,
            'backend "triton" cannot run this: query is float64. Able: "reference"',
        ),
        (
            lambda x: column_attention(**x, attn_mask=torch.ones(6, 3, dtype=torch.bool), backend="triton"),
            ValueError,
            r"attn_mask is given \(the kernels know is_causal only\)",
        ),
        (
            lambda x: column_attention(x["query"], x["key"][..., :4], x["value"]),
            ValueError,
            "key has head_dim 4",
        ),
        (
            lambda x: column_attention(x["query"][:, :1], x["key"], x["value"]),
            ValueError,
            "key has 2 heads, which does",
        ),
        (
            lambda x: column_attention(x["query"], x["key"][:, :, :0], x["value"][:, :, :0]),
            ValueError,
            "both need at",
        ),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, error, message):
    with pytest.raises(error, match=message):
        call(inputs(queries=6, keys=3, head_dim=8))


def test_masked_reference_is_the_masked_plan():
    x = inputs(queries=6, keys=6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    wanted = torch.tensor([sum(1 / (n + 1) for n in range(m, 6)) for m in range(6)], dtype=torch.float64)
    by_mask = sinkhorn_attention(**x, attn_mask=mask, column_marginal=wanted)
    torch.testing.assert_close(by_mask, sinkhorn_attention(**x, is_causal=True), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        column_attention(**x, attn_mask=mask), column_attention(**x, is_causal=True), rtol=1e-12, atol=1e-12
    )


def test_backends_are_tried_in_order_of_speed():
    assert [backend.name for backend in SINKHORN_BACKENDS] == ["triton", "reference"]
    assert [backend.name for backend in COLUMN_BACKENDS] == ["triton", "reference"]
