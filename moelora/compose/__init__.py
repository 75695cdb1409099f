"""Life after training: mixtures of LoRAs that exist already."""

from moelora.compose.assemble import from_loras
from moelora.compose.choose import Chosen, choose
from moelora.compose.xlora_folders import read_xlora, write_xlora

__all__ = ["Chosen", "choose", "from_loras", "read_xlora", "write_xlora"]
