"""Naive references: every operation as a loop over tokens and experts in plain functions of tensors.

They are the oracle of the tests and readable statements of the equations; nothing here is fast. Computed in fp32 (fp64
inputs stay fp64), differentiable by autograd.

Shape suffixes: B sequences, S tokens of a sequence, T tokens, D input features, F inner features of a feed-forward
block, O output features, E experts, R rank of one expert, K chosen experts of a token, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
from torch import Tensor


def _high(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def lora(x_D: Tensor, a_RD: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """One expert on one token: `scaling * B A x`."""
    return scaling * (_high(b_OR) @ (_high(a_RD) @ _high(x_D)))


def mixture_linear(x_TD: Tensor, a_ERD: Tensor, b_EOR: Tensor, gates_TE: Tensor | None, scaling: float) -> Tensor:
    """What a mixture on one linear adds to it: `sum_e g_te * scaling * B_e A_e x_t`.

    Args:
        x_TD: Tokens.
        a_ERD, b_EOR: The experts; A [1, R, D] if they share it.
        gates_TE: Weights of the experts; None for un-routed LoRA (E = 1, weight 1).
        scaling: LoRA's scaling.

    Returns:
        delta_TO, fp32.
    """
    num_experts = b_EOR.shape[0]
    rows = []
    for t in range(x_TD.shape[0]):
        row_O = _high(x_TD).new_zeros(b_EOR.shape[1])
        for e in range(num_experts):
            gate = 1.0 if gates_TE is None else _high(gates_TE)[t, e]
            a_RD = a_ERD.expand(num_experts, -1, -1)[e]
            row_O = row_O + gate * lora(x_TD[t], a_RD, b_EOR[e], scaling)
        rows.append(row_O)
    return torch.stack(rows) if rows else _high(x_TD).new_zeros(0, b_EOR.shape[1])


def dora(x_D: Tensor, weight_OD: Tensor, a_RD: Tensor, b_OR: Tensor, magnitude_O: Tensor, scaling: float) -> Tensor:
    """One DoRA on one token (arXiv 2402.09353): `m V x / ||V||`, `V = W + scaling B A`; no gradient by the norms."""
    v_OD = _high(weight_OD) + scaling * _high(b_OR) @ _high(a_RD)
    norms_O = torch.stack([row_D.detach().square().sum().sqrt() for row_D in v_OD])
    return _high(magnitude_O) / norms_O * (v_OD @ _high(x_D))


def dora_linear(
    x_TD: Tensor,
    weight_OD: Tensor,
    a_ERD: Tensor,
    b_EOR: Tensor,
    magnitude_EO: Tensor,
    gates_TE: Tensor | None,
    scaling: float,
) -> Tensor:
    """What a mixture of DoRAs on one linear adds to it: `sum_e g_te (DoRA_e(x_t) - W x_t)`.

    Args:
        x_TD: Tokens.
        weight_OD: The frozen W.
        a_ERD, b_EOR, magnitude_EO: The experts.
        gates_TE: Weights of the experts; None for one without a router.
        scaling: LoRA's scaling.

    Returns:
        delta_TO, fp32.
    """
    rows = []
    for t, x_D in enumerate(x_TD):
        row_O = _high(x_TD).new_zeros(b_EOR.shape[1])
        for e in range(len(b_EOR)):
            gate = 1.0 if gates_TE is None else _high(gates_TE)[t, e]
            y_O = dora(x_D, weight_OD, a_ERD[e], b_EOR[e], magnitude_EO[e], scaling)
            row_O = row_O + gate * (y_O - _high(weight_OD) @ _high(x_D))
        rows.append(row_O)
    return torch.stack(rows) if rows else _high(x_TD).new_zeros(0, b_EOR.shape[1])


def mixture_of_vectors(a_TF: Tensor, vectors_EF: Tensor, weight_EH: Tensor) -> Tensor:
    """MoV's activation (arXiv 2309.05444): `a * sum_e p_e l_e` at each head of H features, `p = softmax(W_r a)`.

    Args:
        a_TF: The activation.
        vectors_EF: The experts.
        weight_EH: W_r; H is F where heads are not told apart.
    """
    H = weight_EH.shape[1]
    rows = []
    for a_F in _high(a_TF):
        heads = []
        for start in range(0, len(a_F), H):
            a_H = a_F[start : start + H]
            exps = [torch.exp(_high(w_H) @ a_H) for w_H in weight_EH]
            probs = [x / torch.stack(exps).sum() for x in exps]
            pairs = zip(probs, _high(vectors_EF)[:, start : start + H], strict=True)
            heads.append(a_H * torch.stack([p * l_H for p, l_H in pairs]).sum(0))
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def poly_linear(x_TD: Tensor, a_QSRD: Tensor, b_QSOR: Tensor, gates_TQS: Tensor) -> Tensor:
    """What Polytropon (arXiv 2202.13914) and MHR (arXiv 2211.03831) add to a linear: `B_t A_t x_t / r`.

    Args:
        x_TD: Tokens.
        a_QSRD, b_QSOR: The slices of A and B of each skill, by split.
        gates_TQS: Weights of the skills in each split.

    Returns:
        delta_TO, fp32.
    """
    splits, skills, rank = a_QSRD.shape[:3]
    rows = []
    for t in range(x_TD.shape[0]):
        a_slices, b_slices = [], []
        for q in range(splits):
            a_slices.append(sum(gates_TQS[t, q, s] * _high(a_QSRD[q, s]) for s in range(skills)))
            b_slices.append(sum(gates_TQS[t, q, s] * _high(b_QSOR[q, s]) for s in range(skills)))
        a_RD, b_OR = torch.cat(a_slices, 1), torch.cat(b_slices, 0)  # type: ignore[arg-type]
        rows.append(b_OR @ (a_RD @ _high(x_TD[t])) / rank)
    return torch.stack(rows)


def grid_of_pairs(
    x_TD: Tensor, a_ID: Tensor, b_OJ: Tensor, weights_TIJ: Tensor, gate: Tensor, *, diagonal: bool = False
) -> Tensor:
    """What MoR1E adds to its linear (arXiv 2404.08985): `sigmoid(100 w) sum_ij R_ij b_j (a_i . x)`.

    Args:
        x_TD: Tokens.
        a_ID, b_OJ: The rows and the columns.
        weights_TIJ: R of each token.
        gate: w.
        diagonal: Whether only pairs of equal numbers count.
    """
    scale = 1 / (1 + torch.exp(-100 * _high(gate)))
    rows = []
    for x_D, weights_IJ in zip(_high(x_TD), _high(weights_TIJ), strict=True):
        row_O = x_D.new_zeros(len(b_OJ))
        for i, a_D in enumerate(_high(a_ID)):
            for j, b_O in enumerate(_high(b_OJ).t()):
                if i == j or not diagonal:
                    row_O = row_O + scale * weights_IJ[i, j] * b_O * (a_D @ x_D)
        rows.append(row_O)
    return torch.stack(rows)


def intuition_weights(
    logits_E: Tensor, omega: Tensor, embedding_H: Tensor, centroids_CH: Tensor, map_EC: Tensor | None = None
) -> Tensor:
    """MoR1E's weights of one token (arXiv 2404.08985): `32 omega softmax(z) + 4 (1 - omega) c`."""
    share = 1 / (1 + torch.exp(-100 * _high(omega)))
    h_H = _high(embedding_H) / _high(embedding_H).norm()
    cosines = torch.stack([h_H @ c_H / c_H.norm() for c_H in _high(centroids_CH)])
    if map_EC is not None:
        cosines = _high(map_EC) @ cosines
    exps = torch.exp(_high(logits_E) - logits_E.max())
    return 32 * share * exps / exps.sum() + 4 * (1 - share) * cosines


def feed_forward(
    x_D: Tensor, linear: Callable[[str, Tensor], Tensor], kind: str, activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """A feed-forward block on one token, `linear(name, x_D)`; `kind` and `activation` as in `feed_forward_expert`."""
    if kind == "gated":
        hidden_F = activation(linear("gate", x_D)) * linear("up", x_D)
    elif kind == "fused":
        gate_F, up_F = linear("up", x_D).chunk(2, dim=-1)
        hidden_F = activation(gate_F) * up_F
    else:
        hidden_F = activation(linear("up", x_D))
    return linear("down", hidden_F)


def feed_forward_expert(
    x_D: Tensor,
    expert: int,
    linears: Mapping[str, tuple[Tensor, Tensor | None]],
    loras: Mapping[str, tuple[Tensor, Tensor, float]],
    kind: str,
    activation: Callable[[Tensor], Tensor],
    magnitudes: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One whole feed-forward expert on one token (MixLoRA, arXiv 2404.15159, Eq. 5-6).

    Args:
        x_D: The token.
        expert: Index e.
        linears: Frozen (weight [out, in], bias or None) of "up", "down" and, if `kind` is "gated", "gate".
        loras: (A [E, R, in] or [1, R, in], B [E, out, R], LoRA's scaling) of those linears that have experts.
        kind: "gated": `down(act(gate x) * up x)`; "plain": `down(act(up x))`; "fused": up gives gate and up halves.
        activation: act.
        magnitudes: Of experts that are DoRAs, m [E, out] of the linears in `loras`.

    Returns:
        y_D, fp32.
    """

    def linear(role: str, x: Tensor) -> Tensor:
        weight, bias = linears[role]
        y = _high(weight) @ _high(x)
        if role in loras:
            a, b, scaling = loras[role]
            a_RD, b_OR = a.expand(b.shape[0], -1, -1)[expert], b[expert]
            if magnitudes is None:
                y = y + lora(x, a_RD, b_OR, scaling)
            else:
                y = dora(x, weight, a_RD, b_OR, magnitudes[role][expert], scaling)
        return y if bias is None else y + _high(bias)

    return feed_forward(x_D, linear, kind, activation)


def mixture_feed_forward(
    x_TD: Tensor,
    gates_TE: Tensor,
    linears: Mapping[str, tuple[Tensor, Tensor | None]],
    loras: Mapping[str, tuple[Tensor, Tensor, float]],
    kind: str,
    activation: Callable[[Tensor], Tensor],
    magnitudes: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """A mixture of whole feed-forward experts: `sum_e g_te E_e(x_t)`, evaluated where the gate is not 0.

    Args:
        x_TD: Tokens.
        gates_TE: Weights of the experts; 0 where an expert was not chosen.
        linears, loras, kind, activation, magnitudes: As in `feed_forward_expert`.

    Returns:
        y_TD, fp32.
    """
    rows = []
    for t in range(x_TD.shape[0]):
        row_D = _high(x_TD).new_zeros(linears["down"][0].shape[0])
        for e in range(gates_TE.shape[1]):
            if gates_TE[t, e] != 0:
                y_D = feed_forward_expert(x_TD[t], e, linears, loras, kind, activation, magnitudes)
                row_D = row_D + _high(gates_TE)[t, e] * y_D
        rows.append(row_D)
    return torch.stack(rows) if rows else _high(x_TD).new_zeros(0, linears["down"][0].shape[0])


def softmax_top_k(logits_TE: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Softmax, the `top_k` largest, with `renormalize` divided by their sum.

    Returns:
        weights_TK and ids_TK, best first.
    """
    weights, ids = [], []
    for logits_E in _high(logits_TE):
        exps = [torch.exp(z - logits_E.max()) for z in logits_E]
        total = torch.stack(exps).sum()
        probs = [x / total for x in exps]
        best = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:top_k]
        chosen = torch.stack([probs[e] for e in best])
        weights.append(chosen / chosen.sum() if renormalize else chosen)
        ids.append(torch.tensor(best, device=logits_TE.device))
    return torch.stack(weights), torch.stack(ids)


def softmax_top_p(logits_TE: Tensor, top_p: float, renormalize: bool) -> Tensor:
    """MixLoRA-Dynamic's gate: softmax, the largest until their sum is above `top_p`; `renormalize` divides by it.

    Returns:
        weights_TE, 0 where an expert was not kept.
    """
    rows = []
    for logits_E in _high(logits_TE):
        exps = [torch.exp(z - logits_E.max()) for z in logits_E]
        total = torch.stack(exps).sum()
        probs = [x / total for x in exps]
        kept: list[int] = []
        for e in sorted(range(len(probs)), key=lambda e: -probs[e].item()):
            kept.append(e)
            if top_p < 1 and sum(probs[e].item() for e in kept) > top_p:
                break
        weights_E = torch.stack([probs[e] if e in kept else torch.zeros_like(total) for e in range(len(probs))])
        rows.append(weights_E / weights_E.sum() if renormalize else weights_E)
    return torch.stack(rows)


def sigmoid_top_k(logits_TE: Tensor, bias_E: Tensor, top_k: int, bias_weighs: bool = True) -> tuple[Tensor, Tensor]:
    """SMoRA's gate (arXiv 2501.15103): `v = sigmoid(z) + b`, the `top_k` largest divided by their sum.

    Without `bias_weighs` that of DeepSeek-V3 (arXiv 2412.19437): those are chosen, and weighed by sigmoid(z) alone.

    Returns:
        weights_TK and ids_TK, best first.
    """
    weights, ids = [], []
    for logits_E in _high(logits_TE):
        plain = [1 / (1 + torch.exp(-z)) for z in logits_E]
        values = [v + b for v, b in zip(plain, bias_E, strict=True)]
        best = sorted(range(len(values)), key=lambda e: -values[e].item())[:top_k]
        chosen = torch.stack([(values if bias_weighs else plain)[e] for e in best])
        weights.append(chosen / chosen.sum())
        ids.append(torch.tensor(best, device=logits_TE.device))
    return torch.stack(weights), torch.stack(ids)


def learned_threshold(logits_TE: Tensor, threshold_logits_T: Tensor, max_threshold: float) -> tuple[Tensor, Tensor]:
    """AdaMoLE's gate (arXiv 2405.00361): softmax scores less a threshold of each token, divided by their sum.

    Args:
        logits_TE: Output of the router's linear.
        threshold_logits_T: Output of the threshold's linear; the threshold is `max_threshold * sigmoid` of it.
        max_threshold: tau_max; 1 / E in the paper.

    Returns:
        weights_TE and thresholds_T.
    """
    weights, thresholds = [], []
    for logits_E, logit in zip(_high(logits_TE), _high(threshold_logits_T), strict=True):
        threshold = max_threshold / (1 + torch.exp(-logit))
        exps = [torch.exp(z - logits_E.max()) for z in logits_E]
        total = torch.stack(exps).sum()
        margins = [x / total - threshold for x in exps]
        passed = torch.stack([a if a >= 0 else torch.zeros_like(a) for a in margins])
        weights.append(passed / passed.sum() if passed.sum() > 0 else passed)
        thresholds.append(threshold)
    return torch.stack(weights), torch.stack(thresholds)


def bias_update(bias_E: Tensor, ids_TK: Tensor, rate: float) -> Tensor:
    """SMoRA's balancing step: `b + rate * sign(mean(n) - n)` with n the number of tokens of each expert."""
    counts = [int((ids_TK == e).sum()) for e in range(len(bias_E))]
    mean = sum(counts) / len(counts)
    return torch.stack(
        [b + rate * ((mean > n) - (mean < n)) for b, n in zip(bias_E, counts, strict=True)],
    )


def capacity_kept(ids_BSK: Tensor, num_experts: int, capacity_factor: float, valid_BS: Tensor) -> Tensor:
    """Which choices find room under a capacity: for each sequence all first choices in token order, then the second.

    Returns:
        Boolean kept_BSK; an expert takes `capacity_factor * K * valid tokens / num_experts` of them, rounded up.
    """
    B, S, K = ids_BSK.shape
    factor = Fraction(capacity_factor).limit_denominator(10_000)  # 1.1 is 11/10
    kept_BSK = torch.zeros(B, S, K, dtype=torch.bool, device=ids_BSK.device)
    for b in range(B):
        capacity = math.ceil(factor * K * int(valid_BS[b].sum()) / num_experts)
        taken = [0] * num_experts
        for k in range(K):
            for s in range(S):
                if valid_BS[b, s]:
                    expert = int(ids_BSK[b, s, k])
                    taken[expert] += 1
                    kept_BSK[b, s, k] = taken[expert] <= capacity
    return kept_BSK


def switch_balance_loss(probs_TE: Tensor, load_TE: Tensor, valid_T: Tensor) -> Tensor:
    """`E * sum_e f_e P_e` (Switch, arXiv 2101.03961, Eq. 4) over the valid tokens; 1 at perfect balance.

    Args:
        probs_TE: Router probabilities.
        load_TE: 1 where an expert was among a token's choices.
        valid_T: True where a token counts.
    """
    E = probs_TE.shape[1]
    tokens = [t for t in range(len(valid_T)) if valid_T[t]]
    total = sum(float(load_TE[t, e]) for t in tokens for e in range(E))
    loss = _high(probs_TE).new_zeros(())
    for e in range(E):
        f_e = sum(float(load_TE[t, e]) for t in tokens) / total
        p_e = sum((_high(probs_TE)[t, e] for t in tokens), start=_high(probs_TE).new_zeros(())) / len(tokens)
        loss = loss + E * f_e * p_e
    return loss


def mixtral_balance_loss(logits_LTE: Tensor, top_k: int, valid_T: Tensor) -> Tensor:
    """The pooled form of Mixtral's and MixLoRA's code: all layers' tokens together, `E * sum_ke f_ke P_e`.

    Args:
        logits_LTE: Router logits of all layers.
        top_k: K.
        valid_T: True where a token counts.

    Returns:
        The loss; K at perfect balance.
    """
    L, _, E = logits_LTE.shape
    probs_NE = _high(logits_LTE).softmax(-1).flatten(0, 1)
    valid_N = valid_T.repeat(L)
    ids_NK = probs_NE.topk(top_k, -1).indices
    loss = probs_NE.new_zeros(())
    count = int(valid_N.sum())
    for e in range(E):
        p_e = probs_NE[valid_N, e].sum() / count
        for k in range(top_k):
            loss = loss + E * p_e * (int((ids_NK[valid_N, k] == e).sum()) / count)
    return loss


def threshold_balance_loss(probs_TE: Tensor, thresholds_T: Tensor, valid_T: Tensor) -> Tensor:
    """AdaMoLE's `E * sum_e (mean_t m_te) (mean_t a_te)` over the valid tokens, a = p - tau and m = 1[a >= 0].

    Args:
        probs_TE: Router probabilities.
        thresholds_T: The threshold of each token.
        valid_T: True where a token counts.
    """
    E = probs_TE.shape[1]
    tokens = [t for t in range(len(valid_T)) if valid_T[t]]
    loss = _high(probs_TE).new_zeros(())
    for e in range(E):
        margins = [_high(probs_TE)[t, e] - _high(thresholds_T)[t] for t in tokens]
        share = sum(float(a >= 0) for a in margins) / len(tokens)
        loss = loss + E * share * sum(margins, start=_high(probs_TE).new_zeros(())) / len(tokens)
    return loss


def consistency_loss(first_NV: Tensor, second_NV: Tensor) -> Tensor:
    """THOR's `(KL(p || q) + KL(q || p)) / 2` (arXiv 2110.04260), the mean over N positions of V words.

    Args:
        first_NV, second_NV: Logits of two forwards.
    """
    values = []
    for first_V, second_V in zip(_high(first_NV), _high(second_NV), strict=True):
        p_V, q_V = (torch.exp(z_V) / torch.exp(z_V).sum() for z_V in (first_V, second_V))
        forth = [p * torch.log(p / q) for p, q in zip(p_V, q_V, strict=True)]
        back = [q * torch.log(q / p) for p, q in zip(p_V, q_V, strict=True)]
        values.append((torch.stack(forth).sum() + torch.stack(back).sum()) / 2)
    return torch.stack(values).mean()


def z_loss(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
    """Router z-loss (ST-MoE, arXiv 2202.08906, Eq. 5): the mean of `logsumexp(z)^2` over the valid tokens."""
    values = [torch.log(torch.exp(_high(logits_TE)[t]).sum()) ** 2 for t in range(len(valid_T)) if valid_T[t]]
    return torch.stack(values).mean()
