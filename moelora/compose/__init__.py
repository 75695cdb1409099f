"""Life after training: mixtures of LoRAs that exist already."""

from moelora.compose.assemble import from_loras

__all__ = ["from_loras"]
