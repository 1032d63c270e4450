"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend; scripts show it as two lines and exit with 1.

    Line breaks and control characters, which names from a file may hold, are escaped.

    Args:
        problem: What is wrong, with the offending value; lower case, no full stop.
        hint: What to do about it.
    """

    def __init__(self, problem: str, *, hint: str) -> None:
        self.problem, self.hint = printable(problem), printable(hint)
        super().__init__(self.problem)


def printable(text: str) -> str:
    """At most 1,000 characters on one line that leave a terminal as it is."""
    shown = text[:1000]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
