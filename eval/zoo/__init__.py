"""Every preset, trained for a few steps: what it has, what it costs beside a LoRA, and whether it learns."""
