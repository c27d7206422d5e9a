"""What a user did wrong, said in one sentence."""

from __future__ import annotations

import re

LONGEST = 500  # characters of a sentence, whatever it quotes


class PrismError(Exception):
    """A mistake of the user. `str(error)` names the file, field or flag, says what was found and what to do.

    The command line prints the sentence on stderr and exits with code 2; every other exception is a bug of ours.
    It is one line of at most `LONGEST` characters: what foreign texts would add is cut out of its middle.
    """

    def __init__(self, sentence: str = ""):
        line = re.sub(r"\s*[^\S ]\s*", " ", str(sentence)).strip()  # quoted prompts keep their spaces
        line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
        end = LONGEST // 3
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST - end - 5]} ... {line[-end:]}")
