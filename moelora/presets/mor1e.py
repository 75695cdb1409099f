"""MoR1E."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset


@preset(paper="2404.08985", verified="official code's formula")
def mor1e(
    *,
    rows: int = 4,
    columns: int = 8,
    diagonal: bool = False,
    lora_dropout: float = 0.0,
    num_centroids: int = 32,
    embedding: str = "input",
    embedding_features: int | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MoR1E / T-REX (arXiv 2404.08985): all pairs of `rows` a_i and `columns` b_j as rank-1 experts, with an intuition.

        R = 32 omega softmax(W_g x) + 4 (1 - omega) c,   omega = sigmoid(100 w)
        y = W0 x + sg B (R^T (A x)),                     sg = sigmoid(100 w')

    c is the cosines of the sequence's embedding with centroids, w and w' are scalars of each layer that start at 0, W_g
    starts at 0, A kaiming, B at 0. There is no alpha, no top-k and no balance loss. Defaults are the released ones, 32
    pairs and 32 centroids; `diagonal=True` with `rows == columns` is the paper's first form.

    Before training, `moelora.fit_centroids(model, examples)` finds the centroids by k-means on the training set; they
    are saved with the adapter, once for all layers. The embedding is given per sequence (`instance_embedding`, with
    `embedding_features`), or it is the mean over the prompt of the base model's own embeddings (`embedding="input"`, or
    "hidden" for its last hidden states).

    Deviations: the authors embed with nomic-embed-text-v1 and adapt with its 32 centroids; the mean of the base's own
    embeddings is ours. With another number of centroids than of pairs a linear map without bias is between them.
    """
    return MoeLoraConfig(
        experts={
            "kind": "grid",
            "num_experts": rows if diagonal else rows * columns,
            "rows": rows,
            "columns": columns,
            "diagonal": diagonal,
            "lora_dropout": lora_dropout,
        },
        scores={
            "kind": "intuition",
            "num_centroids": num_centroids,
            "embedding": embedding,
            "features": embedding_features,
        },
        selection="dense",
        **peft_words,
    )
