"""Everything that can go wrong for a reason outside our code.

* MemschedError         exit code 1; never raised itself
  + ProgramError        2: a function that cannot be planned, or an argument out of range
  + DoesNotFitError     3: no plan keeps within the budgets
  + PlanError           4: a plan that breaks a rule, or belongs to something else
  + CodecError          4: an array that a codec cannot hold
  + DamagedError        4: data on disk that are missing, cut or changed
  + StoreError          5: the file system refused (disk full, read error)

Every message is one line: the object, the rule, the numbers found and wanted, the way out.
"""

from collections.abc import Mapping


class MemschedError(Exception):
    """Base of all errors that a user can cause and mend."""

    exit_code = 1


class ProgramError(MemschedError, ValueError):
    """A function that cannot be traced, or an argument that makes no sense."""

    exit_code = 2


class DoesNotFitError(MemschedError):
    """No plan keeps within the budgets.

    `smallest` says, for each tier that was too small, how many bytes would have been enough.
    """

    exit_code = 3

    def __init__(self, message: str, smallest: Mapping[str, int]) -> None:
        super().__init__(message)
        self.smallest = dict(smallest)


class PlanError(MemschedError, ValueError):
    """A plan that breaks a rule, or that was made for another program or machine."""

    exit_code = 4


class CodecError(MemschedError, ValueError):
    """An array that a codec cannot hold: NaN, infinite or too large numbers."""

    exit_code = 4


class DamagedError(MemschedError):
    """Data on disk that are missing, cut short or changed."""

    exit_code = 4


class StoreError(MemschedError, OSError):
    """The file system refused: disk full, read error, no permission."""

    exit_code = 5
