"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake the user can correct; scripts show it as two lines and exit with 1.

    Line breaks and control characters, which names from a file may hold, are escaped.

    Args:
        problem: What is wrong, with the offending value; lower case, without a period.
        hint: What to do about it.
    """

    def __init__(self, problem: str, *, hint: str) -> None:
        self.problem, self.hint = printable(problem), printable(hint)
        super().__init__(self.problem)


def printable(text: str) -> str:
    """One line of the first 1,000 characters, with those escaped that would move a cursor."""
    shown = text[:1000]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
