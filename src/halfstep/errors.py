"""The faults a user can mend: their sentence is all that is printed."""


class HalfstepError(ValueError):
    """One clear sentence: the key or file, what was found, what was expected, what to do."""


def reason(error: BaseException) -> str:
    """The first line of what a library says, at most 200 characters; "" where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0][:200]
