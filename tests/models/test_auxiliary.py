from __future__ import annotations

import threading

import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_config
from undivided.layers._base import CausalAttention
from undivided.layers.moh import MoHAttention
from undivided.models.causal_lm import UndividedForCausalLM
from undivided.models.configuration import UndividedConfig

ENTRY = {"mechanism": "moh", "shared_heads": 1, "top_k": 2}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def model(*entries, **overrides):
    torch.manual_seed(0)
    config = UndividedConfig(
        base_config=tiny_config(num_hidden_layers=len(entries), **overrides), attention=list(entries)
    )
    return UndividedForCausalLM(config).double().train()


def ids(batch=2, length=9):
    return torch.randint(1, VOCAB_SIZE, (batch, length))


def of_layers(host, tokens):
    """The balance loss of each layer, asked of the layers themselves."""
    states, found = host.get_input_embeddings()(tokens), []
    tables = host.get_decoder().rotary_emb(states, torch.arange(tokens.shape[1])[None])
    for layer in host.decoder_layers:
        _, losses = layer.self_attn(layer.input_layernorm(states), tables)
        found += [losses["balance"]] if losses else []
        states = layer(states, position_embeddings=tables)
    return found


def test_the_output_has_the_mean_over_layers_and_the_loss_its_share():
    host, tokens = model(ENTRY, None, ENTRY | {"top_k": 1}), ids()
    output = host(tokens, labels=tokens)
    expected = torch.stack(of_layers(host, tokens))
    assert len(expected) == 2 and set(output.aux_losses) == {"balance"}
    torch.testing.assert_close(output.aux_losses["balance"], expected.mean(), **EXACT)
    host.eval()
    without = host(tokens, labels=tokens).loss
    torch.testing.assert_close(output.loss, without + 0.01 * expected.mean(), **EXACT)


def test_each_layer_has_its_coefficient():
    entries = [ENTRY | {"balance_coeff": coefficient} for coefficient in (0.0, 3.0)]
    host, tokens = model(*entries), ids()
    loss, balance = host(tokens, labels=tokens).loss, of_layers(host, tokens)
    torch.testing.assert_close(loss - host.eval()(tokens, labels=tokens).loss, 1.5 * balance[1], **EXACT)


def test_without_labels_only_the_output_tells():
    output = model(ENTRY, ENTRY)(ids())
    assert output.loss is None
    assert output.aux_losses["balance"].requires_grad


def test_a_tuple_has_it_in_its_loss():
    host, tokens = model(ENTRY, ENTRY), ids()
    loss, logits, *_ = host(tokens, labels=tokens, return_dict=False)
    expected = host(tokens, labels=tokens)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)
    assert isinstance(host(tokens, return_dict=False)[0], torch.Tensor)


def test_evaluation_and_plain_layers_return_what_the_base_model_returns():
    tokens = ids()
    for host in (model(ENTRY, ENTRY).eval(), model(None, {"mechanism": "gqa"})):
        assert type(host(tokens, labels=tokens)) is type(host.native(tokens, labels=tokens))


def test_the_router_learns_from_the_balance_loss():
    host, tokens = model(ENTRY | {"balance_coeff": 1.0}, None), ids()
    host(tokens).aux_losses["balance"].backward()
    router = host.attention_layers()[0].router
    assert router.routed.weight.grad.abs().max() > 0
    assert router.shared is None and router.kind.weight.grad is None


def gradients(host, tokens):
    host.zero_grad()
    output = host(tokens, labels=tokens, use_cache=False)
    output.loss.backward()
    return output.loss, {name: p.grad.clone() for name, p in host.named_parameters()}


def checkpoint(host, use_reentrant):
    # Transformers 5.23 has renamed it and warns at the old name.
    name = "activation_checkpointing_enable"
    enable = getattr(host, name if hasattr(host, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": use_reentrant})


def test_checkpointed_layers_have_the_same_losses_and_gradients():
    host, tokens = model(ENTRY | {"balance_coeff": 1.0}, ENTRY), ids()
    loss, expected = gradients(host, tokens)
    checkpoint(host, use_reentrant=False)
    checkpointed, found = gradients(host, tokens)
    torch.testing.assert_close(checkpointed, loss, **EXACT)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, **EXACT)


def test_a_reentrant_checkpoint_is_refused():
    host, tokens = model(ENTRY, ENTRY), ids()
    checkpoint(host, use_reentrant=True)
    host.enable_input_require_grads()
    with pytest.raises(ValueError, match="the losses of MoHAttention have no gradient: checkpoints of"):
        host(tokens, labels=tokens, use_cache=False)


def test_threads_that_share_a_model_do_not_mix_their_losses():
    host = model(ENTRY, ENTRY)
    batches = [ids(length=length) for length in (5, 9, 14, 20)]
    expected = [host(batch).aux_losses["balance"].item() for batch in batches]
    start, found = threading.Barrier(len(batches)), [[] for _ in batches]

    def run(index):
        start.wait()
        found[index] += [host(batches[index]).aux_losses["balance"].item() for _ in range(20)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, value in zip(found, expected, strict=True):
        assert own == pytest.approx([value] * 20, rel=1e-12)


def test_nothing_is_left_behind():
    host, tokens = model(ENTRY, ENTRY), ids()

    def state():
        return [
            (sorted(vars(layer)), len(layer._forward_hooks), sorted(vars(type(layer))))
            for layer in host.attention_layers()
        ]

    before = state()
    host(tokens, labels=tokens)
    assert state() == before
    with pytest.raises(IndexError):
        host(torch.tensor([[VOCAB_SIZE]]))
    assert state() == before


def test_padding_does_not_count():
    host, tokens = model(ENTRY, ENTRY), ids(batch=1)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), tokens], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones_like(tokens)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for implementation in ("sdpa", "eager"):
        host.set_attn_implementation(implementation)
        output = host(padded, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(output.aux_losses["balance"], host(tokens).aux_losses["balance"], **EXACT)


def test_a_host_without_such_layers_compiles_into_one_graph_when_training():
    host, tokens = model({"mechanism": "gqa"}), ids()
    expected = host(tokens, labels=tokens, use_cache=False).loss
    torch._dynamo.reset()
    compiled = torch.compile(host, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens, labels=tokens, use_cache=False).loss, expected, **EXACT)


def test_the_base_class_has_none():
    assert not CausalAttention.has_auxiliary and MoHAttention.has_auxiliary
