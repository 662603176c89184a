"""Errors for users, apart from assertions for invariants."""


class UserError(Exception):
    """Something a user can mend: shown as one line, without a traceback."""
