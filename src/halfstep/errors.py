"""The faults a user can mend: their sentence is all that is printed."""


class HalfstepError(ValueError):
    """One clear sentence: the key or file, what was found, what was expected, what to do."""
