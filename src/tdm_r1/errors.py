"""Errors for users, apart from assertions for invariants."""

RAISED_ELSEWHERE = "raised in another process of the run"  # a note on an error that is told there


class UserError(Exception):
    """Something a user can mend: shown as one line, without a traceback."""
