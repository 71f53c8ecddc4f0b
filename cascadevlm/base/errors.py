"""Every error cascadevlm raises.

::

    CascadeError
    ├── InputError                    the input is wrong (exit code 2)
    │   ├── LabelError                a label set is empty, ambiguous or unreadable
    │   ├── ImageError                a file or array is not a usable image
    │   ├── PolicyError               a policy cannot be parsed, or returns a wrong array
    │   ├── PromptError               a template is missing, or contains unknown variables
    │   ├── DataError                 labelled data or a record is incomplete or contradicts itself
    │   ├── ConfigError               a configuration is not valid
    │   └── BackendError              a backend is unknown, not installed or misconfigured
    ├── RunError                      a bulk run cannot continue; its results are kept
    └── JudgeError                    the judge gave no usable answer
        ├── RateLimited               too many requests; contains the time to wait, if the provider states a time
        ├── TransientError            a temporary error of the server or the connection, or a time-out
        ├── PermanentError            this question will never be answered; other questions may be
        │   └── Refused               the provider's content filter or moderation refused this question
        ├── BudgetExhausted           the question was not asked, because too little money is left
        ├── Waiting                   the question is in a batch that has no results yet
        └── FatalError                no question will be answered (wrong key, exhausted quota); stops the run

If an error is ``retryable``, the same question may succeed later; the retry wrapper decides when to ask again. ``hint`` says
how to solve the problem.
"""

from typing import ClassVar


class CascadeError(Exception):
    """Base class of all errors of cascadevlm. ``hint`` says how to solve the problem; it may be empty."""

    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} {self.hint}" if self.hint else message


class InputError(CascadeError):
    """The input is wrong: an argument, an option, a file or a configuration."""


class LabelError(InputError):
    """A label set is empty, ambiguous or unreadable."""


class ImageError(InputError):
    """A file or array is not a usable image."""


class PolicyError(InputError):
    """A policy cannot be parsed, or returns an array of the wrong shape or type."""


class PromptError(InputError):
    """A prompt template is missing, or contains unknown variables."""


class DataError(InputError):
    """Labelled data or a record is incomplete or contradicts itself."""


class ConfigError(InputError):
    """A configuration is not valid."""


class BackendError(InputError):
    """A backend is unknown, not installed or misconfigured."""


class RunError(CascadeError):
    """A bulk run cannot continue. Its results so far are kept."""


class JudgeError(CascadeError):
    """The judge gave no usable answer.

    Attributes:
        may_be_billed: True if the provider may still charge for the request, for example after a lost connection.
    """

    def __init__(self, message: str, *, hint: str = "", may_be_billed: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.may_be_billed = may_be_billed


class RateLimited(JudgeError):
    """The judge received too many requests.

    Attributes:
        retry_after: seconds to wait before the next request; None if the judge does not say.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class TransientError(JudgeError):
    """A temporary error of the server or the connection, or a time-out."""

    retryable = True


class PermanentError(JudgeError):
    """This question will never be answered. Other questions may still be answered."""


class Refused(PermanentError):
    """The provider's content filter or moderation refused this question. Other questions may still be answered."""


class BudgetExhausted(JudgeError):
    """The question was not asked, because it may cost more than the budget has left."""


class Waiting(JudgeError):
    """The question is in a batch that has no results yet. What depends on its answer is decided in a later pass."""


class FatalError(JudgeError):
    """No question will be answered: the key, the account, the model or the address is wrong, or the quota is exhausted."""
