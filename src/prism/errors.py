"""What a user did wrong, said in one sentence."""

from __future__ import annotations


class PrismError(Exception):
    """A mistake of the user. `str(error)` names the file, field or flag, says what was found and what to do.

    The command line prints the sentence on stderr and exits with code 2; every other exception is a bug of ours.
    """
