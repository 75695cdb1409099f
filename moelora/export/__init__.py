"""Adapters in other formats: ordinary LoRAs, and the folders of the authors of MixLoRA."""

from moelora.export.distill import distill_lora
from moelora.export.plain_loras import export_loras
from moelora.export.tudb.read import read_mixlora
from moelora.export.tudb.write import write_mixlora

__all__ = ["distill_lora", "export_loras", "read_mixlora", "write_mixlora"]
