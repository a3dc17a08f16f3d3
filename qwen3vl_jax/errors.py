"""Everything that can go wrong for a reason outside our code, as one tree.

* Qwen3VLError                 exit code 1; never raised itself
  + UsageError                 2: the call or the command line is wrong
  + BadInputError              4: something given to us is malformed or corrupt
    - ConfigError                 a config.json that we cannot honour
    - WeightError                 a checkpoint: missing, unmapped, duplicate, misshapen or damaged
    tensors - MediaError                  a picture or a video - PromptError                 a
    conversation, a chat template or a tokenizer
  + StorageError               5: the file system refused (disk full, read error)

Every message is one line: the object, the rule, the numbers found and wanted, the way out.
"""


class Qwen3VLError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 1


class UsageError(Qwen3VLError, ValueError):
    """An argument or a command line that does not make sense."""

    exit_code = 2


class BadInputError(Qwen3VLError, ValueError):
    """A file or an array from outside that breaks a rule."""

    exit_code = 4


class ConfigError(BadInputError):
    """A config.json with a value out of range, or a setting that is not computed here."""


class WeightError(BadInputError):
    """A checkpoint whose tensors are missing, unknown, duplicate, misshapen or damaged."""


class MediaError(BadInputError):
    """A picture or a video that cannot be read, or is larger than allowed."""


class PromptError(BadInputError):
    """A conversation, chat template or tokenizer that cannot be turned into tokens."""


class StorageError(Qwen3VLError, OSError):
    """The file system refused: disk full, read error, no permission."""

    exit_code = 5
