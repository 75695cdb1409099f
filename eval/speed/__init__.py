"""What a mixture costs beside a LoRA: `python -m eval.speed`, and `python -m eval.speed.profile`."""
