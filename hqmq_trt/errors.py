"""The one exception type users see: a one-line message that says what to do."""

from __future__ import annotations


class HqmqError(Exception):
    """A mistake in the input or the environment that the user can mend.

    The command line prints ``str(error)`` as one line and exits with code 2.
    """
