"""Files of prompts: a text file with one a line, or a table with a column prompt, such as VBench's full-info JSON."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from prism import files
from prism.errors import PrismError, quoted
from prism.preference.pairs import SPLITS, named, prompt_key
from prism.preference.sources import PICKLES, TABLES, Place, Row, open_source, read_text

COLUMNS = ("prompt", "prompt_en")


class Prompt(NamedTuple):
    """A prompt, where it stood, and where the file names them its split and the image that its videos start from."""

    text: str
    place: Place
    split: str | None = None
    image: str | None = None


def read_prompts(path: str | os.PathLike[str], encoding: str | None = None) -> list[Prompt]:
    """The prompts of a file, each once (with each of its images), in its order; how many recur is a warning.

    Args:
        path: a table (.csv, .tsv, .json, .jsonl, .ndjson, .parquet) with a column prompt or prompt_en, and optionally
            split (train, validation, test, unseen) and image (a path relative to the file); any other file is text with
            a prompt a line.
        encoding: of text; None: by the byte order mark, else UTF-8.

    Raises:
        PrismError: for a file without prompts, of another encoding, without such a column, with a prompt that is no
            text or in two splits, or an image that is no file.
    """
    file = Path(path)
    files.check_regular(file)
    rows = _rows(file, encoding) if file.suffix.lower() in TABLES else _lines(file, encoding)
    prompts: dict[tuple[str, str | None], Prompt] = {}
    splits: dict[str, str | None] = {}
    repeated: list[Prompt] = []
    for prompt in rows:
        if prompt.split is not None and prompt.split not in SPLITS:
            raise PrismError(
                f"The column split in {prompt.place} must hold one of {', '.join(SPLITS)}; found "
                f"{quoted(prompt.split, 60)}."
            )
        if splits.setdefault(prompt_key(prompt.text), prompt.split) != prompt.split:
            raise PrismError(
                f'The prompt "{quoted(prompt.text, 120)}" in {prompt.place} is in two splits; a prompt belongs to one.'
            )
        if prompts.setdefault((prompt.text, prompt.image), prompt) is not prompt:
            repeated.append(prompt)
    if repeated:
        warnings.warn(
            f"{len(repeated):,} of {len(rows):,} prompts in {named(file)} stand there before, and are taken once: "
            f'"{quoted(repeated[0].text, 80)}" in {repeated[0].place}{" ..." if len(repeated) > 1 else ""}',
            stacklevel=2,
        )
    if not prompts:
        raise PrismError(f"The file {named(file)} holds no prompt; write one a line.")
    return list(prompts.values())


def _rows(file: Path, encoding: str | None) -> list[Prompt]:
    source = open_source(file, file.absolute().parent, encoding)
    column = next((name for name in COLUMNS if name in source.columns), None)
    if column is None:
        raise PrismError(
            f"The file {named(file)} has the columns {quoted(', '.join(source.columns), 120) or 'none'}; one named "
            f"{' or '.join(COLUMNS)} is needed."
        )
    return [
        Prompt(text.strip(), Place(file.name, row.place.row), row.text("split"), _image(file, row))
        for row in source
        if (text := row.text(column))
    ]


def _image(file: Path, row: Row) -> str | None:
    """The absolute path of a row's image, which must be a file."""
    image = row.text("image")
    if image is None:
        return None
    path = os.path.abspath(file.absolute().parent / image.strip())
    if "\0" in path or not os.path.isfile(path):
        raise PrismError(
            f"The image {quoted(image, 120)} in {row.place} is no file; give a path relative to "
            f"{quoted(str(file.absolute().parent), 120)}."
        )
    return path


def _lines(file: Path, encoding: str | None) -> list[Prompt]:
    if file.suffix.lower() in PICKLES:
        raise PrismError(f"The file {named(file)} is no list of prompts by its ending; write a text file, one a line.")
    text = read_text(file, encoding)
    if "\0" in text:
        raise PrismError(f"The file {named(file)} holds null characters and is no text; write a prompt a line.")
    prompts = []
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n")):
        row = Row({"prompt": line}, Place(file.name, number))
        if row.text("prompt"):
            prompts.append(Prompt(line.strip(), row.place))
    return prompts
