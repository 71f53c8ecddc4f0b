"""Every error cascadevlm raises.

::

    CascadeError
    ├── InputError                    the call was wrong; nothing has run (exit code 2)
    │   ├── LabelError                a label set that is empty, ambiguous or unreadable
    │   ├── ImageError                a file or array that is no usable image
    │   ├── PolicyError               a policy that cannot be parsed or answers in the wrong shape
    │   ├── PromptError               a template that is missing or names unknown variables
    │   ├── DataError                 labelled data, or a record of a run, that is incomplete or contradicts itself
    │   ├── ConfigError               a configuration that does not validate
    │   └── BackendError              a backend that is unknown, not installed or misconfigured
    ├── RunError                      a bulk run that cannot go on; all that it did is kept
    └── JudgeError                    the judge gave no usable answer
        ├── RateLimited               too many requests; says how long to wait, if the provider did
        ├── TransientError            a server, connection or time-out error that may pass
        ├── PermanentError            this question will never be answered
        ├── BudgetExhausted           it was not asked, for want of money
        └── FatalError                no question will be answered (authentication, exhausted quota); stops the run

A ``retryable`` error may be raised again by the same question and not by the next attempt: the retry wrapper decides when
to ask again. ``hint`` says what to do about it.
"""

from typing import ClassVar


class CascadeError(Exception):
    """Base of all errors of cascadevlm; ``hint`` is the fix, in words."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.hint}" if self.hint else message


class InputError(CascadeError):
    """The call was wrong."""


class LabelError(InputError):
    """A label set that is empty, ambiguous or unreadable."""


class ImageError(InputError):
    """A source that is no usable image."""


class PolicyError(InputError):
    """A policy that cannot be parsed or answers in the wrong shape."""


class PromptError(InputError):
    """A prompt template that is missing or names unknown variables."""


class DataError(InputError):
    """Labelled data, or a record of a run, that is incomplete or contradicts itself."""


class ConfigError(InputError):
    """A configuration that does not validate."""


class BackendError(InputError):
    """A backend that is unknown, not installed or misconfigured."""


class RunError(CascadeError):
    """A bulk run cannot go on; all that it did is kept."""


class JudgeError(CascadeError):
    """The judge gave no usable answer.

    Attributes:
        may_be_billed: whether the provider may charge for the request all the same, as when the connection broke off.
    """

    def __init__(self, message: str, *, hint: str = "", may_be_billed: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.may_be_billed = may_be_billed


class RateLimited(JudgeError):
    """The judge wants fewer requests; ``retry_after`` seconds from now, where it says so."""

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class TransientError(JudgeError):
    """A server, connection or time-out error that may pass."""

    retryable = True


class PermanentError(JudgeError):
    """This question will never be answered, other questions may."""


class Refused(PermanentError):
    """The provider will not answer this question, as its content filter or moderation says; it may answer others."""


class BudgetExhausted(JudgeError):
    """The question was not asked: what it may cost is more than is left."""


class FatalError(JudgeError):
    """No question will be answered: the key, the account, the model or the address is wrong, or the quota is exhausted."""
