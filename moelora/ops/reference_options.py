"""Naive references of the options on the axes, as those of `reference`: loops over tokens and experts, in fp32.

Shape suffixes: T tokens, D input features, F features of a sphere, E experts, R rank of one expert, K chosen experts of
a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from moelora.ops.reference import softmax_top_k


def _high(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def top_k_beside_null(logits_TE: Tensor, top_k: int, num_null: int) -> Tensor:
    """AdaMoE's gate (arXiv 2406.13233): the `top_k` of a softmax, divided by the sum over those that are not null.

    Args:
        logits_TE: Output of the router's linear, the null experts last.
        top_k: K.
        num_null: How many are null. Those of a token that chose no other are divided by their own sum.

    Returns:
        weights_TE.
    """
    first_null = logits_TE.shape[1] - num_null
    raw_TK, ids_TK = softmax_top_k(logits_TE, top_k, renormalize=False)
    rows = []
    for raw_K, ids_K in zip(raw_TK, ids_TK, strict=True):
        chosen = dict(zip(ids_K.tolist(), raw_K, strict=True))
        kept = {e: w for e, w in chosen.items() if e < first_null} or chosen
        total = torch.stack(list(kept.values())).sum()
        rows.append(torch.stack([kept[e] / total if e in kept else total * 0 for e in range(logits_TE.shape[1])]))
    return torch.stack(rows)


def sparse_mixer(logits_TE: Tensor, ids_T: Tensor, is_whole_T: Tensor, jitter: float) -> Tensor:
    """SparseMixer's weights of choices that were drawn (arXiv 2310.00811, 2409.12136): `m p_e`, in gradient `p_e`.

    Args:
        logits_TE: Output of the router's linear.
        ids_T: The expert of each token.
        is_whole_T: Whether m is 1, else 1/3.
        jitter: How far below the highest a logit may be, see `SparseMixer`.
    """
    weights = []
    for logits_E, e, is_whole in zip(_high(logits_TE), ids_T.tolist(), is_whole_T.tolist(), strict=True):
        high = logits_E.max().item()
        near = [z for z in logits_E if (high - z.item()) / max(abs(z.item()), high) <= 2 * jitter]
        p = 1 / torch.stack([torch.exp(z - logits_E[e]) for z in near]).sum()
        weights.append(p if is_whole else p - 2 / 3 * p.detach())
    return torch.stack(weights)


def noisy_logits(logits_TE: Tensor, spread_logits_TE: Tensor, draws_TE: Tensor) -> Tensor:
    """Noisy top-k's logits (arXiv 1701.06538, Eq. 4): `z + n (softplus(s) + 0.01)`, with n drawn from N(0, 1).

    Args:
        logits_TE: z, the output of the router's linear.
        spread_logits_TE: s, the output of the noise's.
        draws_TE: n.
    """
    rows = []
    for logits_E, spread_E, draws_E in zip(_high(logits_TE), _high(spread_logits_TE), draws_TE, strict=True):
        each = zip(logits_E, spread_E, draws_E, strict=True)
        rows.append(torch.stack([z + n * (torch.log(1 + torch.exp(s)) + 0.01) for z, s, n in each]))
    return torch.stack(rows)


def cosine_logits(
    x_TD: Tensor, projection_FD: Tensor, places_EF: Tensor, log_scale: Tensor, temperature: float
) -> Tensor:
    """X-MoE's logits (arXiv 2204.09179): `cos(P x, c_e) / tau` with `1 / tau = min(100, exp(t) / temperature)`.

    Args:
        x_TD: Tokens.
        projection_FD: P.
        places_EF: c of each expert.
        log_scale: t, one number.
        temperature: tau at t = 0.
    """
    scale = torch.exp(_high(log_scale).reshape(())) / temperature
    scale = scale if scale < 100 else torch.full_like(scale, 100.0)
    rows = []
    for x_D in _high(x_TD):
        p_F = _high(projection_FD) @ x_D
        rows.append(torch.stack([scale * (p_F @ c_F) / (p_F.norm() * c_F.norm()) for c_F in _high(places_EF)]))
    return torch.stack(rows)


def entropy_loss(probs_TE: Tensor, valid_T: Tensor) -> Tensor:
    """The dynamic loss of arXiv 2403.07652: the mean of `-sum_e p_e log p_e` over the valid tokens."""
    values = [sum(-p * torch.log(p) for p in _high(probs_TE)[t]) for t in range(len(valid_T)) if valid_T[t]]
    return torch.stack(values).mean()


def cv_squared_loss(gates_TE: Tensor, valid_T: Tensor) -> Tensor:
    """The importance loss of arXiv 1701.06538: the squared coefficient of variation of the experts' summed weights."""
    tokens = [t for t in range(len(valid_T)) if valid_T[t]]
    sums = [torch.stack([_high(gates_TE)[t, e] for t in tokens]).sum() for e in range(gates_TE.shape[1])]
    mean = torch.stack(sums).mean()
    variance = torch.stack([(s - mean) ** 2 for s in sums]).sum() / (len(sums) - 1)
    return variance / (mean**2 + 1e-10)


def chance_of_top(clean_E: Tensor, noisy_E: Tensor, spread_E: Tensor, k: int) -> Tensor:
    """How likely each expert is among the `k` best if its own noise is drawn anew (arXiv 1701.06538, Eq. 8 and 9)."""
    chances = []
    for e in range(len(clean_E)):
        others = sorted((float(noisy_E[i]) for i in range(len(noisy_E)) if i != e), reverse=True)
        chances.append(0.5 * (1 + torch.erf((clean_E[e] - others[k - 1]) / spread_E[e] / math.sqrt(2))))
    return torch.stack(chances)


def orthogonal_loss(a_ERD: Tensor) -> Tensor:
    """O-LoRA's penalty (arXiv 2310.14152) between experts: squared cosines of rows of A, summed over those of another.

    Args:
        a_ERD: A of each expert.

    Returns:
        The mean over the rows and the other experts.
    """
    E, R, _ = a_ERD.shape
    total = _high(a_ERD).new_zeros(())
    for e in range(E):
        for f in range(E):
            for i in range(R if e != f else 0):
                for j in range(R):
                    a, b = _high(a_ERD)[e, i], _high(a_ERD)[f, j]
                    total = total + (a @ b / (a.norm() * b.norm())) ** 2
    return total / (E * (E - 1) * R)
