"""The exceptions of ferrum; the native core's error kinds map onto these classes in `_native.pyx`."""


class FerrumError(Exception):
    """Base of every error that ferrum raises on purpose."""


class ModelFileError(FerrumError):
    """A model file is missing, damaged or not what it claims to be."""


class UnsupportedModelError(ModelFileError):
    """A model file is sound, but asks for something this version does not run."""


class SessionFileError(FerrumError):
    """A file of a saved session is missing, damaged, or of another model, other options or a newer version."""


class KVPoolExhausted(FerrumError):
    """The KV pool has too few free blocks for a step; no sequence advanced."""


class ContextFull(FerrumError):
    """A sequence would grow past the context length of the model; no sequence advanced."""


class UnknownSequence(FerrumError, KeyError):
    """A sequence id is not live in this engine."""

    __str__ = Exception.__str__  # KeyError would show the repr of the message


class LogitRowsExceeded(FerrumError, ValueError):
    """A step asks for more rows of logits than max_logit_rows."""


class StaleLogits(FerrumError):
    """Logits are read after a later step has overwritten them."""


class Cancelled(FerrumError):
    """A running prefill was cancelled; its sequence is as before the call."""


class EngineClosed(FerrumError):
    """The engine was closed before this call."""


class DeviceError(FerrumError):
    """The compute device failed or is not available."""


class OutOfMemory(FerrumError, MemoryError):
    """An allocation does not fit the device or the memory budget."""


class OptionError(FerrumError, ValueError):
    """An option has a value it cannot have, or contradicts another."""


class BatchError(FerrumError):
    """A batch job cannot begin or go on; the rows that it has finished are kept."""


class ChatTemplateError(FerrumError, ValueError):
    """A chat template cannot be read, or refuses or fails on what it was given.

    `reason` is the template's own message, `line` the line of the template (from 1), where they are known.
    """

    reason: str = ""
    line: int | None = None
