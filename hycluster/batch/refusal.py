"""Why a row gets no result: the few names that stand in the quarantine's ``error_type``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hycluster.errors import InvalidInput, PromptTooLong, SettingsError, kind_name, one_line


class Reason(StrEnum):
    """Values of ``error_type``.

    Attributes:
        UNREADABLE_FILE: the file is no Parquet file or can't be opened; one row stands for all of it.
        UNREADABLE_ROWS: the file's footer is right, these rows' data can't be decoded.
        MISSING_COLUMN: the file has no column of the name that the job reads.
        WRONG_TYPE: the file's column has a type that the job can't read.
        NULL_VALUE: a value that the prompt needs is null.
        EMPTY_VALUE: it is empty, or the whole prompt would be.
        INVALID_UTF8: a text's bytes are not UTF-8.
        INVALID_MESSAGES: the value is not a chat.
        PROMPT_TOO_LONG: the prompt leaves no room for an output in the model's context.
        INVALID_OUTPUT: the output is not the object whose fields are to be written into columns.
        REFUSED: the model's front end or its engine refuses this request; the message says why.
        POISON: replica after replica died soon after it got this row; see ``docs/failover.md``.
    """

    UNREADABLE_FILE = "UnreadableFile"
    UNREADABLE_ROWS = "UnreadableRows"
    MISSING_COLUMN = "MissingColumn"
    WRONG_TYPE = "WrongType"
    NULL_VALUE = "NullValue"
    EMPTY_VALUE = "EmptyValue"
    INVALID_UTF8 = "InvalidUtf8"
    INVALID_MESSAGES = "InvalidMessages"
    PROMPT_TOO_LONG = "PromptTooLong"
    INVALID_OUTPUT = "InvalidOutput"
    REFUSED = "Refused"
    POISON = "Poison"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the quarantine says of a row; ``error_type`` is a :class:`Reason`'s value."""

    error_type: str
    error_message: str


class RowRefused(InvalidInput):
    """This row can't be answered, for a reason that has a name of its own."""

    reason: Reason

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowRefused], tuple[Reason, str]]:
        return type(self), (self.reason, self.message)


class ColumnRefused(SettingsError):
    """The rows of this file can't be asked: a column is missing or of the wrong type. Other files may be right."""

    reason: Reason

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ColumnRefused], tuple[Reason, str]]:
        return type(self), (self.reason, self.message)


def refusal_of(error: Exception) -> Refusal:
    """What to write of a row that raised this, whatever it is: a row that trips something over ends no job."""
    if isinstance(error, RowRefused):
        return Refusal(error.reason.value, error.message)
    if isinstance(error, UnicodeError):
        return Refusal(Reason.INVALID_UTF8.value, str(error))
    if not isinstance(error, InvalidInput):
        return Refusal(Reason.REFUSED.value, f"{kind_name(error)}: {one_line(error)}")
    reason = Reason.PROMPT_TOO_LONG if isinstance(error, PromptTooLong) else Reason.REFUSED
    return Refusal(reason.value, error.message)
