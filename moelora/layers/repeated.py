"""What is said of a layer that gradient checkpointing runs again, where that cannot be exact."""

from __future__ import annotations


def not_repeatable(name: str) -> str:
    """Of a layer that is run again without its place in the first run.

    Args:
        name: Name of the layer.
    """
    return (
        f"{name!r} is run again in the backward pass by other means than transformers' gradient "
        "checkpointing, and its routing depends on the first run (a capacity, a bias that moves, given facts); "
        "allowed: model.gradient_checkpointing_enable(), or none."
    )


def not_reentrant(name: str) -> str:
    """Of a layer whose router decides before the layers run.

    Args:
        name: Name of the layer.
    """
    return (
        f"{name!r} runs without gradients in a forward that has them, as under reentrant gradient "
        "checkpointing, and its router decides before the layers run, so that its gradient would be lost; allowed: "
        "gradient_checkpointing_kwargs={'use_reentrant': False}, or none."
    )
