"""Errors for users, apart from assertions for invariants."""

# Notes on errors in a run of several processes
RAISED_ELSEWHERE = "raised in another process of the run"  # that one prints it
RAISED_HERE = "raised in this process of the run"  # it prints it; with neither note, process 0 prints what all raise


class UserError(Exception):
    """Something a user can mend: shown as one line, without a traceback."""
