"""The one exception that a user is meant to read."""


class AgqError(Exception):
    """A mistake of the user, a bad file or a missing tool.

    The message is one sentence that says what is wrong, where, and what to do. The command line prints it
    without a stack trace and exits with code 2.
    """
