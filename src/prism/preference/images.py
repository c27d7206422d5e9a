"""Conditioning images of a store's videos: each kept once, as images/SHA256.ENDING, with the file's own bytes.

The name is the checksum, so that several processes may keep one image at once, and a flipped byte is found.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from pathlib import Path

from PIL import Image

from prism import files
from prism.errors import PrismError, quoted
from prism.preference.pairs import named

FOLDER = "images"
LARGEST = 1 << 28
"""Bytes of an image file."""
NAME = re.compile(r"([0-9a-f]{64})\.[a-z0-9]{1,8}")


def keep(store: Path, source: str | os.PathLike[str]) -> str:
    """Copy an image into a store's folder, unless it is there; it appears whole, or not at all.

    Args:
        store: the store's folder.
        source: a picture that Pillow reads; nothing else of the file than its bytes is kept.

    Returns:
        Its name below images/: the SHA-256 of its bytes, and the ending of its format.

    Raises:
        PrismError: for a file that is missing, no picture, or damaged.
    """
    content = _content(Path(source))
    name = f"{hashlib.sha256(content).hexdigest()}.{_ending(content, source)}"
    path = store / FOLDER / name
    if not is_whole(path):
        try:
            path.parent.mkdir(exist_ok=True)
            with files.new_file(path) as work:
                work.write_bytes(content)
                files.sync_tree(work.parent)
        except OSError as error:
            raise PrismError(
                f"The image {named(path)} cannot be written ({quoted(error.strerror or error, 120)}); free disk space "
                "or give write permission, then start again with --resume."
            ) from error
    return name


def path_of(store: Path, name: str) -> Path:
    """The file of an image in a store's folder. Raises PrismError for a name that `keep` does not give."""
    if not NAME.fullmatch(name):
        raise PrismError(
            f"The image {quoted(name, 100)} of the store {named(store)} is no SHA-256 with an ending; the store's "
            "tables were altered."
        )
    return store / FOLDER / name


def check(path: Path) -> None:
    """Refuse an image of a store that is missing or has other bytes than its name says."""
    if not is_whole(path):
        problem = "is not the one that was written: its name has another SHA-256" if path.is_file() else "is missing"
        raise PrismError(f"The image {named(path)} {problem}. Copy the store again, or the image into it.")


def is_whole(path: Path) -> bool:
    """True if the file of an image is there with the bytes that its name says."""
    try:
        return path.is_file() and files.sha256(path) == path.name.partition(".")[0]
    except OSError:
        return False


def _content(source: Path) -> bytes:
    try:
        files.check_regular(source)
        if source.stat().st_size > LARGEST:
            raise PrismError(f"The image {named(source)} has more than {LARGEST >> 20} MiB; give a smaller one.")
        return source.read_bytes()
    except (OSError, ValueError) as error:
        reason = quoted(getattr(error, "strerror", None) or error, 120)
        raise PrismError(f"The image {named(source)} cannot be read ({reason}).") from error


def _ending(content: bytes, source: str | os.PathLike[str]) -> str:
    """The ending of a picture's format, such as png; the picture is decoded, so that a damaged one is refused."""
    try:
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            form = str(picture.format).lower()
    except Exception as error:  # Pillow's readers raise errors of any kind on broken files
        raise PrismError(f"The image {named(Path(source))} is no whole picture ({quoted(error, 120)}).") from error
    return "jpg" if form in ("jpeg", "mpo") else re.sub("[^a-z0-9]", "", form)[:8] or "image"
