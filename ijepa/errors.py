"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend; scripts show it as two lines and exit with 1.

    Args:
        problem: What is wrong, with the offending value; lower case, no full stop.
        hint: What to do about it.
    """

    def __init__(self, problem: str, *, hint: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint
