"""Every error that Lownibble raises on purpose.

    LownibbleError
    ├── InputError            the request cannot be carried out as given: exit code 2
    │   ├── ConfigError       an option: unknown key, wrong type, value out of range
    │   ├── DataError         a data file or a row of it (file and line are in the message)
    │   ├── ModelError        a model folder, checkpoint or download that is missing, damaged or unsupported
    │   ├── TargetError       a target pattern that matches nothing, or something that cannot be adapted
    │   ├── QuantizationError a tensor that cannot be quantised (its name is in the message)
    │   ├── AdapterError      adapter files that are missing, damaged or made for another model
    │   └── OutputError       an output folder that cannot be used (it holds another run, is not writable)
    ├── BackendError          a kernel backend was requested and cannot run here (the reason is in the message)
    ├── HubError              the hub did not take an upload (why, and what to do, is in the message)
    └── TrainingError         training started and could not continue

A message says what is wrong, with the value, and then one remedy. Each class also derives from the built-in exception that
a caller would expect (`ValueError`, `RuntimeError`), so `except ValueError` keeps working.
"""


class LownibbleError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        leaves_threads: threads of a library wait for ever, which would abort the process as it ends in peace.
    """

    leaves_threads = False


class InputError(LownibbleError, ValueError):
    """The request cannot be carried out as given; the command line exits with 2."""


class ConfigError(InputError):
    """An option is unknown, has the wrong type or is out of range."""


class DataError(InputError):
    """A data file, or a row of it, cannot be used."""


class ModelError(InputError):
    """A model source is missing, damaged or not supported."""


class TargetError(InputError):
    """LoRA targets match nothing, or match something that cannot be adapted."""


class QuantizationError(InputError):
    """A tensor cannot be quantised."""


class AdapterError(InputError):
    """Adapter files are missing, damaged or belong to another model."""


class OutputError(InputError):
    """The output folder cannot be used."""


class BackendError(LownibbleError, RuntimeError):
    """A kernel backend was requested by name and cannot run here."""


class HubError(LownibbleError, RuntimeError):
    """The hub cannot be reached, or did not take an upload."""


class TrainingError(LownibbleError, RuntimeError):
    """Training started and could not continue."""
