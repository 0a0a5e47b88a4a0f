"""Faults that the user can fix: the command line prints their sentence and no traceback."""

import reprlib

from halfstep.sanitize import one_line, shorten

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


class ConfigError(ValueError):
    """Faults of a configuration, one line each, without secrets and control characters."""

    def __str__(self) -> str:
        return "\n".join(map(one_line, super().__str__().split("\n")))


class HalfstepError(ValueError):
    """A fault in one sentence: the key or file, what was found, what was expected, what to do.

    Its text is one line, without secrets and control characters.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


def reason(error: BaseException) -> str:
    """The first line of a library's message, at most 200 characters; "" if it has none."""
    return one_line((str(error).strip().splitlines() or [""])[0])[:200]


def excerpt(value: object) -> str:
    """The repr of a value that came from a file, cut to a few words."""
    try:
        return shorten(_SHORT.repr(value), 200)
    except ValueError:  # a number of more than 4,300 digits
        return f"a {type(value).__name__} that is too large to print"
