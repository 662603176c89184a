"""Errors for users, apart from assertions for invariants."""

# Notes on errors in a run of several processes
RAISED_ELSEWHERE = "raised in another process of the run"  # which tells of it
RAISED_HERE = "raised in this process of the run"  # without it all processes have raised the same, and the first tells


class UserError(Exception):
    """Something a user can mend: shown as one line, without a traceback."""
