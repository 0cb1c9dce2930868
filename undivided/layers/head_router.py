"""The router of a mixture of heads: which heads a token uses, and how much each of them counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

ROUTERS = ("linear", "query_norm")
GATE_MODES = ("released", "paper", "binary")


class Routing(NamedTuple):
    """What a router decides.

    Attributes:
        gates: `[B, H, N]`, at least float32; exactly zero where a head is not selected.
        selected: boolean `[B, H, N]`; always true for shared heads.
        probabilities: `[B, N, routed heads]` before the choice, which the balance loss needs; None where nothing is
            routed.
    """

    gates: torch.Tensor
    selected: torch.Tensor
    probabilities: torch.Tensor | None


class HeadRouter(nn.Module):
    """Chooses `top_k` of the routed heads for each token, beside the shared heads, which every token uses.

    With p = softmax of the routed heads' logits, s = softmax of the shared heads', w = softmax of two logits (all of
    them linear in x), and M the `top_k` heads of largest p:

    - "released": `g_i = 2 w_0 h_s s_i` for shared heads, `g_i = 2 w_1 K p_i / sum_M p` for i in M. The mean gate of
      what is active is about 1, so that a model starts near plain attention.
    - "paper": `g_i = w_0 s_i` and `g_i = w_1 p_i`. The output starts several times smaller than plain attention's.
    - "binary": `g_i = 1` for shared heads and for i in M. The gradient of such a gate goes to p_i, for i in M.

    With one routed head a token, a "released" routed gate is `2 w_1`: p learns from the balance loss alone. With one
    shared head s is 1. Without routed heads (`top_k=0`) all heads are shared and weighed by s alone.

    Args:
        hidden_size: width of x.
        num_heads: heads H.
        shared_heads: h_s, the first heads; every token uses them.
        top_k: routed heads K that a token uses; 0 only if all heads are shared.
        router: "linear"; or "query_norm", without parameters: logits are the norms of the token's queries over their
            standard deviation among the routed heads, and shared gates are 1.
        gate_mode: "released" (what the authors' code for images computes), "paper" or "binary".
        two_stage: with False w is left out: shared gates are `h_s s_i`, routed ones `K p_i / sum_M p`.

    Raises:
        ValueError: counts that do not fit, or options that do not go together; the message says which.

    Source: MoH (arXiv 2410.11842), equations 5 and 6; quantised gates: section on continue-tuning.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        shared_heads: int,
        top_k: int,
        *,
        router: str = "linear",
        gate_mode: str = "released",
        two_stage: bool = True,
    ) -> None:
        super().__init__()
        _check(num_heads, shared_heads, top_k, router, gate_mode)
        self.num_heads = num_heads
        self.shared_heads = shared_heads
        self.routed_heads = num_heads - shared_heads
        self.top_k = top_k
        self.router = router
        self.gate_mode = gate_mode
        learned = router == "linear"
        weighed = learned and gate_mode != "binary"
        linear = lambda count: nn.Linear(hidden_size, count, bias=False)  # noqa: E731
        self.routed = linear(self.routed_heads) if learned and top_k else None
        self.shared = linear(shared_heads) if weighed and shared_heads > 1 else None
        self.kind = linear(2) if weighed and two_stage and shared_heads and top_k else None

    @property
    def active_share(self) -> float:
        """The share of the heads that a token uses."""
        return (self.shared_heads + self.top_k) / self.num_heads

    def forward(self, hidden_states: torch.Tensor, query: torch.Tensor) -> Routing:
        """Returns the routing of each token.

        Args:
            hidden_states: x, `[B, N, C]`.
            query: `[B, H, N, head_dim]`, before or after rotary positions, which keep the norm.
        """
        released = self.gate_mode == "released"
        shared = self._shared_gates(hidden_states, query)
        if not self.top_k:
            gates = shared.transpose(1, 2)
            return Routing(gates, torch.ones_like(gates, dtype=torch.bool), None)
        logits = self._logits(hidden_states, query)
        probabilities = logits.softmax(dim=-1)
        best = logits.topk(self.top_k, dim=-1).indices
        # Not one_hot, which waits for the device to check the indices.
        chosen = torch.zeros_like(probabilities).scatter(-1, best, 1.0)
        routed = probabilities * chosen
        if released:
            total = routed.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(routed.dtype).eps)
            routed = self.top_k * routed / total
        elif self.gate_mode == "binary":
            # The value is exactly 1, the gradient that of the probability.
            routed = chosen + (routed - routed.detach())
        if self.kind is not None:
            weights = _in_float(self.kind(hidden_states)).softmax(dim=-1) * (2 if released else 1)
            shared, routed = shared * weights[..., :1], routed * weights[..., 1:]
        selected = torch.cat([torch.ones_like(shared), chosen], dim=-1) > 0
        gates = torch.cat([shared, routed], dim=-1)
        return Routing(gates.transpose(1, 2), selected.transpose(1, 2), probabilities)

    def _shared_gates(self, hidden_states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """`[B, N, shared heads]`, before the weight of their kind."""
        if self.shared is None:
            dtype = torch.promote_types(hidden_states.dtype, torch.float32)
            return hidden_states.new_ones((*hidden_states.shape[:2], self.shared_heads), dtype=dtype)
        factor = self.shared_heads if self.gate_mode == "released" else 1
        return factor * _in_float(self.shared(hidden_states)).softmax(dim=-1)

    def _logits(self, hidden_states: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """`[B, N, routed heads]`."""
        if self.routed is not None:
            return _in_float(self.routed(hidden_states))
        norms = torch.linalg.vector_norm(_in_float(query[:, self.shared_heads :]), dim=-1).transpose(1, 2)
        # The softmax does not see the mean; without it equal norms, whose deviation is 0, are equal logits.
        spread = norms.std(dim=-1, keepdim=True).clamp(min=torch.finfo(norms.dtype).eps)
        return (norms - norms.mean(dim=-1, keepdim=True)) / spread


def balance_loss(routing: Routing, valid: torch.Tensor | None = None, *, scaled: bool = True) -> torch.Tensor:
    """Returns the load-balance loss of one layer, `h_r * sum_i P_i f_i`, which is top_k where all heads are used alike.

    P_i is the mean probability of routed head i over the tokens, f_i the share of the tokens that selected it; the
    gradient flows through P alone.

    Args:
        routing: what the router decided.
        valid: boolean `[B, N]`, False for padding, which does not count; None if there is none.
        scaled: with False the factor h_r is left out, as in the paper's equation.

    Raises:
        ValueError: nothing is routed.

    Source: MoH (arXiv 2410.11842), equations 7 and 8; the factor: the authors' code.
    """
    if routing.probabilities is None:
        raise ValueError("routing.probabilities is None: without routed heads there is no load to balance.")
    heads = routing.probabilities.shape[-1]
    chosen = routing.selected.transpose(1, 2)[..., -heads:].to(routing.probabilities.dtype)
    if valid is None:
        probability, load = (x.mean(dim=(0, 1)) for x in (routing.probabilities, chosen))
    else:
        weight = valid.to(chosen.dtype)[..., None]
        count = weight.sum().clamp(min=1)
        probability, load = ((x * weight).sum(dim=(0, 1)) / count for x in (routing.probabilities, chosen))
    return (probability * load).sum() * (heads if scaled else 1)


def _in_float(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check(num_heads: int, shared_heads: int, top_k: int, router: str, gate_mode: str) -> None:
    if router not in ROUTERS:
        raise ValueError(f"router={router!r} is not one of {', '.join(map(repr, ROUTERS))}.")
    if gate_mode not in GATE_MODES:
        raise ValueError(f"gate_mode={gate_mode!r} is not one of {', '.join(map(repr, GATE_MODES))}.")
    if not 0 <= shared_heads <= num_heads:
        raise ValueError(f"shared_heads={shared_heads} must be 0 to the {num_heads} heads there are.")
    routed = num_heads - shared_heads
    if not 0 <= top_k <= routed:
        raise ValueError(
            f"top_k={top_k} must be 0 to {routed}: of {num_heads} heads {shared_heads} are shared."
        )
    if top_k == 0 and routed:
        raise ValueError(
            f"top_k=0 leaves {routed} of {num_heads} heads that no token could use; share all heads "
            f"(shared_heads={num_heads}) or choose top_k from 1 on."
        )
    if router == "query_norm" and top_k and routed < 2:
        raise ValueError(
            f'router="query_norm" compares routed heads, and shared_heads={shared_heads} leaves 1 of {num_heads}; '
            "share fewer."
        )
    if router == "query_norm" and gate_mode == "paper":
        raise ValueError(
            'gate_mode="paper" weighs shared heads by learned scores, which router="query_norm" has not; use '
            'gate_mode="binary" or "released", or router="linear".'
        )
