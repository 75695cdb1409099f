"""The errors moelora raises. Every message says what is wrong, the value, the allowed values and the likely fix."""

from __future__ import annotations


class MoeLoraError(ValueError):
    """Base of every error raised on purpose by moelora."""


class ConfigError(MoeLoraError):
    """A configuration value is unknown, out of range, or contradicts another one."""


class TargetError(MoeLoraError):
    """No module of the base model fits the targets, or a targeted module has no form moelora can adapt."""


class AdapterNameError(MoeLoraError):
    """An adapter name is unknown, already taken, or unusable as a folder or module name."""


class MergeError(MoeLoraError, NotImplementedError):
    """Merging was asked for; a routed mixture depends on its input and cannot be folded into the base weights."""


class FormatVersionError(MoeLoraError):
    """An adapter was written in a format newer than this version of moelora can read."""


class AdapterFileError(MoeLoraError):
    """The files of an adapter are missing, damaged, or hold what no adapter can."""


class RegistrationError(MoeLoraError):
    """PEFT's method tables already hold another package's MOELORA."""


class ComposeError(MoeLoraError):
    """LoRAs cannot be put together to a mixture, or its experts cannot be edited as asked for."""


class HubError(MoeLoraError):
    """An adapter could not be read from, or uploaded to, the Hugging Face Hub."""


class ReportError(MoeLoraError):
    """A folder holds nothing that a report could show, or what makes the page is not installed."""


class RunError(MoeLoraError):
    """A program cannot start what it was asked for, or cannot resume it."""


class TrainingError(MoeLoraError):
    """Training went wrong: its loss, a gradient or a weight is no number."""


class ExportError(MoeLoraError):
    """An adapter cannot be exported: the target cannot express it, its base does not fit, or there is no place."""
