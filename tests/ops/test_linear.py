from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from undivided.ops import linear_attention
from undivided.ops.linear import FEATURE_MAPS, key_value_buffer
from undivided.ops.linear.features import feature
from undivided.testing import compare_op, poison_surroundings

EXACT = {"rtol": 1e-12, "atol": 1e-12}
BACKENDS = ("composed", "reference")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
positive_map = pytest.mark.parametrize("feature_map", [name for name in FEATURE_MAPS if name != "identity"])


def inputs(batch=2, heads=3, tokens=49, dim=8, value_dim=8, dtype=torch.float64):
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    return {
        "query": draw(batch, heads, tokens, dim),
        "key": draw(batch, heads, tokens, dim),
        "value": draw(batch, heads, tokens, value_dim),
    }


def everything(**sizes):
    """Inputs with rotations, a local term and a modulation."""
    x = inputs(**sizes)
    batch, heads, tokens, dim = x["query"].shape
    angles = torch.randn(tokens, dim // 2, dtype=x["query"].dtype)
    return x | {
        "cos": angles.cos(),
        "sin": angles.sin(),
        "local": torch.randn_like(x["value"]),
        "modulation": torch.randn_like(x["value"]),
    }


def call(backend, **options):
    return lambda **x: linear_attention(backend=backend, **options, **x)


def rotation(angles):
    """The matrices that turn channels (2p, 2p + 1) of each token, `[tokens, dim, dim]`."""
    blocks = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1).view(
        *angles.shape, 2, 2
    )
    return torch.stack([torch.block_diag(*token) for token in blocks])


# -- what it is


@every_backend
def test_without_anything_it_is_plain_normalised_linear_attention(backend):
    x = inputs(value_dim=5)
    q, k = F.elu(x["query"]) + 1, F.elu(x["key"]) + 1
    sums = q @ k.mean(2)[..., None] + 1e-6
    want = q @ (k.transpose(-2, -1) @ x["value"] / 49) / sums
    torch.testing.assert_close(call(backend)(**x), want, **EXACT)


@every_backend
def test_equals_the_matrix_of_all_pairs_by_loops(backend):
    x = everything(batch=1, heads=2, tokens=7)
    turn = rotation(torch.atan2(x["sin"], x["cos"]))
    for head in range(2):
        q, k = (F.elu(x[name][0, head]) + 1 for name in ("query", "key"))
        logits = torch.stack([8**-0.5 * q.mean(0) @ k[j] for j in range(7)])
        a = logits.exp() / logits.exp().sum()
        matrix = torch.empty(7, 7, dtype=torch.float64)
        for i in range(7):
            denominator = sum(a[j] * q[i] @ k[j] for j in range(7)) + 1e-6
            for j in range(7):
                matrix[i, j] = a[j] * (turn[i] @ q[i]) @ (turn[j] @ k[j]) / denominator
        want = x["modulation"][0, head] * (matrix @ x["value"][0, head] + x["local"][0, head])
        found = call(backend, key_weight="context")(**x)[0, head]
        torch.testing.assert_close(found, want, **EXACT)


@positive_map
@pytest.mark.parametrize("key_weight", [None, "context", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_linear_cost_changes_neither_output_nor_gradients(feature_map, key_weight, dtype):
    x = everything(tokens=37, value_dim=6)
    if key_weight == "given":
        x["key_weight"] = torch.rand(2, 1, 37, dtype=torch.float64)
    options = {"feature_map": feature_map} | ({"key_weight": key_weight} if key_weight != "given" else {})
    fast, slow = (call(backend, **options) for backend in BACKENDS)
    compare_op(fast, slow, slow, x, dtype)


@every_backend
def test_identity_is_taken_without_a_denominator_alone(backend):
    x = inputs()
    found = call(backend, feature_map="identity", normalize=False)(**x)
    torch.testing.assert_close(found, x["query"] @ (x["key"].transpose(-2, -1) @ x["value"]) / 49, **EXACT)
    with pytest.raises(ValueError, match=r'"identity" gives weights of both signs, .* use normalize=False'):
        call(backend, feature_map="identity")(**x)


@every_backend
def test_queries_may_be_more_or_fewer_than_keys(backend):
    x = inputs()
    few = x | {"query": x["query"][:, :, :5]}
    torch.testing.assert_close(call(backend)(**few), call(backend)(**x)[:, :, :5], **EXACT)
    assert call(backend, key_weight="context")(**few).shape == (2, 3, 5, 8)


def test_one_token_sees_itself():
    x = inputs(tokens=1)
    torch.testing.assert_close(linear_attention(**x, key_weight="context", eps=0.0), x["value"])


# -- weights of tokens


def test_context_weights_are_a_distribution_times_the_number_of_keys():
    x = inputs() | {"value": torch.ones(2, 3, 49, 1, dtype=torch.float64)}
    # With one constant feature the buffer is the mean weight.
    ones = {"key": torch.ones(2, 3, 49, 1, dtype=torch.float64), "query": x["query"][..., :1]}
    mean = key_value_buffer(**{**x, **ones}, feature_map="identity", key_weight="context")
    torch.testing.assert_close(mean, torch.ones_like(mean), **EXACT)


def test_context_weights_are_those_given_as_numbers():
    x = everything()
    q, k = F.elu(x["query"]) + 1, F.elu(x["key"]) + 1
    weight = 49 * torch.softmax(0.3 * (q.mean(2, keepdim=True) @ k.transpose(-2, -1)).squeeze(2), -1)
    assert weight.std() > 0.1
    found = linear_attention(**x, key_weight="context", scale=0.3)
    torch.testing.assert_close(found, linear_attention(**x, key_weight=weight), **EXACT)


def test_a_factor_of_all_weights_changes_nothing():
    x = inputs()
    weight = torch.rand(2, 3, 49, dtype=torch.float64)
    one, other = (linear_attention(**x, key_weight=c * weight, eps=0.0) for c in (1.0, 7.0))
    torch.testing.assert_close(one, other, **EXACT)


def test_equal_logits_are_no_weights():
    x = inputs()
    flat = linear_attention(**x, key_weight="context", scale=0.0)
    torch.testing.assert_close(flat, linear_attention(**x), **EXACT)


@every_backend
def test_a_shift_of_all_logits_changes_nothing(backend):
    # A feature that all keys share shifts the logits by a constant; its part of the output is taken away again.
    x = inputs(batch=1, heads=1)
    same = torch.full((1, 1, 49, 1), 4.0, dtype=torch.float64)
    shifted = {name: torch.cat([x[name], same], -1) for name in ("query", "key")} | {"value": x["value"]}
    run = call(backend, feature_map="softplus", key_weight="context", scale=0.2, normalize=False)
    part = F.softplus(same)[..., :1] ** 2 * weighted_mean(x, 0.2)
    torch.testing.assert_close(run(**shifted) - part, run(**x), **EXACT)


def weighted_mean(x, scale):
    q, k = F.softplus(x["query"]), F.softplus(x["key"])
    return torch.softmax(scale * q.mean(2, keepdim=True) @ k.transpose(-2, -1), -1) @ x["value"]


# -- denominators


@every_backend
@pytest.mark.parametrize("key_weight", [None, "context"])
def test_a_constant_value_is_returned_without_rotations_and_not_with_them(backend, key_weight):
    x = everything()
    del x["local"], x["modulation"]
    x["value"] = torch.tensor([1.5, -2.0], dtype=torch.float64).expand(2, 3, 49, 2)
    plain = {name: tensor for name, tensor in x.items() if name not in ("cos", "sin")}
    run = call(backend, key_weight=key_weight, eps=0.0)
    torch.testing.assert_close(run(**plain), x["value"].contiguous(), **EXACT)
    assert (run(**x) - x["value"]).abs().mean() > 0.1


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_very_negative_queries_and_keys_still_have_a_mean(backend, dtype):
    # In bfloat16 elu(-8) + 1 is zero, in float32 elu(-20) + 1.
    x = {name: tensor.to(dtype) for name, tensor in inputs(tokens=6).items()}
    for name in ("query", "key"):
        x[name] = torch.full_like(x[name], -20.0)
    assert (F.elu(x["key"]) + 1 == 0).all() and (feature(x["key"].float(), "elu1") > 0).all()
    found = call(backend, eps=0.0)(**x).float()
    torch.testing.assert_close(
        found, x["value"].float().mean(2, keepdim=True).expand_as(found), rtol=0.02, atol=0.02
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_denominator_gives_zero_and_finite_gradients(backend, dtype):
    x = {name: tensor.to(dtype).requires_grad_() for name, tensor in inputs(tokens=5).items()}
    with torch.no_grad():
        x["query"][:, :, 2] = -1.0
    out = call(backend, feature_map="relu")(**x)
    assert not out[:, :, 2].any() and out[:, :, 1].any()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in x.values())


def test_gradients_of_features_are_finite_where_exponentials_overflow():
    x = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], requires_grad=True)
    feature(x, "elu1").sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 0.36787944, 1.0, 1.0, 1.0]))
    torch.testing.assert_close(feature(x, "elu1"), F.elu(x) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_many_tokens_neither_overflow_nor_stagnate_in_half_precision(dtype):
    # Sums of 65,536 products of 900 are far beyond 65,504, and half precision adds no 1 to 2048 (256 in bfloat16).
    tokens = 65_536
    query = torch.full((1, 1, tokens, 4), 30.0, dtype=dtype)
    value = torch.ones(1, 1, tokens, 4, dtype=dtype)
    value[:, :, tokens // 2 :] = 3.0
    for key_weight in (None, "context"):
        out = linear_attention(query, query, value, key_weight=key_weight)
        torch.testing.assert_close(out, torch.full_like(value, 2.0))


def test_autocast_does_not_touch_the_sums():
    x = inputs(tokens=300, dtype=torch.float32)
    want = linear_attention(**x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_attention(**x), want)


# -- masks


@every_backend
@pytest.mark.parametrize("key_weight", [None, "context", "given"])
def test_hidden_tokens_are_as_if_they_were_not_there(backend, key_weight):
    x = everything()
    keep = torch.ones(2, 49, dtype=torch.bool)
    keep[:, 20:] = False
    weight = torch.rand(2, 3, 49, dtype=torch.float64) if key_weight == "given" else key_weight
    short = {name: t[:20] if name in ("cos", "sin") else t[:, :, :20] for name, t in x.items()}
    want = linear_attention(**short, key_weight=weight[..., :20] if key_weight == "given" else weight)
    for name in ("query", "key", "value"):
        x[name] = x[name].clone()
        x[name][:, :, 20:] = torch.nan
    if key_weight == "given":
        weight[..., 20:] = torch.nan
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    out = call(backend, key_weight=weight, token_mask=keep)(**leaves)
    torch.testing.assert_close(out[:, :, :20], want, **EXACT)
    assert not out[:, :, 20:].any()
    out.square().sum().backward()
    for name in ("query", "key", "value"):
        assert not leaves[name].grad[:, :, 20:].any()
        assert leaves[name].grad[:, :, :20].isfinite().all()


@every_backend
@pytest.mark.parametrize("key_weight", [None, "context"])
def test_a_sample_without_tokens_is_zero(backend, key_weight):
    x = {name: tensor.requires_grad_() for name, tensor in inputs().items()}
    mask = torch.ones(2, 49, dtype=torch.bool)
    mask[1] = False
    out = call(backend, key_weight=key_weight, token_mask=mask)(**x)
    assert not out[1].any() and out[0].all()
    out.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in x.values())


# -- ranks


def test_rank_of_a_head_is_at_most_its_width_and_modulation_lifts_it():
    x = everything(batch=1, heads=2, tokens=40, dim=4, value_dim=8)
    run = lambda **x: linear_attention(**x).transpose(1, 2).flatten(2)[0]  # noqa: E731
    plain = {name: tensor for name, tensor in x.items() if name not in ("local", "modulation")}
    assert torch.linalg.matrix_rank(linear_attention(**plain)).tolist() == [[4, 4]]
    assert torch.linalg.matrix_rank(run(**plain)) == 8
    assert torch.linalg.matrix_rank(run(**plain, modulation=x["modulation"])) == 16


def test_the_buffer_of_equal_tokens_has_rank_one_with_any_weights():
    x = inputs(batch=1, heads=1)
    same = {name: tensor[:, :, :1].expand(-1, -1, 49, -1) for name, tensor in x.items()}
    one, other = (key_value_buffer(**same, key_weight=w) for w in (None, "context"))
    torch.testing.assert_close(one, other, **EXACT)
    assert torch.linalg.matrix_rank(one).item() == 1


def test_weights_raise_the_rank_where_the_mean_query_prefers_what_is_rare():
    # 2000 tokens of one background, and 16 with a channel of their own whose keys answer the mean query more.
    x = inputs(batch=1, heads=1, tokens=2016, dim=16, value_dim=16)
    x["query"].fill_(1.0)
    x["value"][:, :, :2000] = x["value"][:, :, :1]
    x["key"][:, :, :2000] = -1.0
    x["key"][:, :, 2000:] = 12 * torch.eye(16, dtype=torch.float64) - 1

    def effective_rank(key_weight):
        values = torch.linalg.svdvals(key_value_buffer(**x, key_weight=key_weight))[0, 0]
        return torch.special.entr(values / values.sum()).sum().exp().item()

    assert effective_rank("context") > 2 * effective_rank(None)
    # Where the background answers more, the same weights take from the rank.
    x["key"][:, :, :2000] = 2.0
    assert effective_rank("context") < effective_rank(None)


def test_the_buffer_is_what_queries_read():
    x = everything()
    arguments = {name: x[name] for name in ("query", "key", "value", "cos", "sin")}
    buffer = key_value_buffer(**arguments, key_weight="context")
    assert buffer.shape == (2, 3, 8, 8)
    turned = (rotation(torch.atan2(x["sin"], x["cos"])) @ (F.elu(x["query"]) + 1)[..., None])[..., 0]
    found = linear_attention(**arguments, key_weight="context", normalize=False)
    torch.testing.assert_close(found, turned @ buffer, **EXACT)


# -- as an operator


@pytest.mark.parametrize("key_weight", [None, "context"])
def test_no_tensor_of_all_pairs_exists(key_weight):
    class Largest(TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.found = max(self.found, out.numel())
            return out

    x = everything(batch=1, heads=1, tokens=4096)
    leaves = {name: tensor.requires_grad_() for name, tensor in x.items()}
    with Largest() as largest:
        linear_attention(**leaves, key_weight=key_weight).sum().backward()
    assert largest.found <= 4 * 4096 * 8


@every_backend
def test_a_sample_does_not_depend_on_its_batch_mates(backend):
    x = inputs(batch=3)
    alone = {name: tensor[1:2] for name, tensor in x.items()}
    run = call(backend, key_weight="context")
    torch.testing.assert_close(run(**x)[1:2], run(**alone), **EXACT)


@every_backend
def test_strided_inputs_are_read_in_place(backend):
    x = inputs()
    strided = {
        name: poison_surroundings(t.transpose(1, 2).contiguous()).transpose(1, 2) for name, t in x.items()
    }
    run = call(backend, key_weight="context")
    torch.testing.assert_close(run(**strided), run(**x), **EXACT)


@every_backend
@pytest.mark.parametrize("feature_map", ["elu1", "softplus"])
def test_gradients_are_those_of_finite_differences(backend, feature_map):
    x = everything(batch=1, heads=1, tokens=3, dim=4, value_dim=2)
    names, tensors = list(x), [tensor.requires_grad_() for tensor in x.values()]
    run = call(backend, feature_map=feature_map, key_weight="context")
    assert torch.autograd.gradcheck(lambda *given: run(**dict(zip(names, given, strict=True))), tensors)


def test_compiles_whole():
    x = everything(tokens=9)
    mask = torch.rand(2, 9) > 0.3
    run = call("auto", key_weight="context", token_mask=mask)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**x), run(**x), **EXACT)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(feature_map="gelu"), ValueError, "feature_map='gelu' is not one of elu1, softplus, relu, identity"),
        (dict(key_weight="mean"), ValueError, "key_weight='mean' must be a tensor, \"context\" or None"),
        (dict(key_weight=torch.ones(5)), ValueError, r"key_weight has shape \[5\]; it must broadcast to \[2, 3, 6\]"),
        (dict(key_weight=torch.ones(6, dtype=torch.long)), TypeError, "key_weight has dtype torch.int64"),
        (dict(eps=-1.0), ValueError, "eps=-1.0 must be 0 or more"),
        (dict(cos=torch.ones(6, 4)), ValueError, "cos and sin belong together; give both or neither"),
        (
            dict(cos=torch.ones(6, 8), sin=torch.ones(6, 8)),
            ValueError,
            r"cos has shape \[6, 8\]; with 6 queries, 6 keys and head_dim 8 it needs \[tokens, head_dim // 2\]",
        ),
        (dict(token_mask=torch.ones(2, 6)), TypeError, "token_mask has dtype torch.float32; use bool"),
        (
            dict(token_mask=torch.ones(6, dtype=torch.bool)),
            ValueError,
            r"token_mask has shape \[6\]; it must be \[batch, tokens\] = \[2, 6\]",
        ),
        (
            dict(local=torch.ones(2, 3, 6, 4, dtype=torch.float64)),
            ValueError,
            r"local has shape \[2, 3, 6, 4\]; it must be \[batch, heads, queries, value_dim\] = \[2, 3, 6, 8\]",
        ),
        (dict(modulation=torch.ones(2, 3, 6, 8)), TypeError, "modulation has dtype torch.float32"),
        (dict(key=torch.ones(2, 3, 6, 4, dtype=torch.float64)), ValueError, "key has head_dim 4, but query has 8"),
        (dict(key=torch.ones(2, 1, 6, 8, dtype=torch.float64)), ValueError, r"must share \[batch, heads\]"),
        (dict(query=torch.ones(3, 6, 8, dtype=torch.float64)), ValueError, "query has shape .* needs 4 axes"),
        (dict(backend="flex"), ValueError, 'backend=\'flex\' is not one of "auto", "triton", "composed"'),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_sentence(change, error, message):
    with pytest.raises(error, match=message):
        linear_attention(**(inputs(tokens=6) | change))


def test_other_queries_take_no_mask_and_nothing_is_empty():
    x = inputs(tokens=6)
    few = x | {"query": x["query"][:, :, :2], "token_mask": torch.ones(2, 6, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"with as many queries \(2\) as keys \(6\)"):
        linear_attention(**few)
    with pytest.raises(ValueError, match="query has 0 and key 6 positions; both need at least one"):
        linear_attention(**x | {"query": x["query"][:, :, :0]})
