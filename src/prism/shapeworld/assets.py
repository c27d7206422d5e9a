"""What ships with the package: the generator's weights, labelled candidates, a trained head. Found by name, checked by
hash.
"""

from __future__ import annotations

from pathlib import Path

from prism import files
from prism.errors import PrismError

ROOT = Path(__file__).parent / "assets"
MANIFEST = "manifest.json"


def asset_folder(name: str) -> Path:
    """The folder of an asset: `pipeline` and its weaker kin `early` and `small`, `candidates`, `head`, `pixel`, ...

    Raises PrismError where a file that its manifest lists is missing or differs from what was shipped.
    """
    folder = ROOT / name
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise PrismError(f"The embedded asset {manifest} is missing; install the package again.")
    for relative, digest in files.read_json(manifest).items():
        path = folder / relative
        if not path.is_file():
            raise PrismError(f"The embedded asset {path} is missing; install the package again.")
        if files.sha256(path) != digest:
            raise PrismError(f"The embedded asset {path} was altered; install the package again.")
    return folder


def write_manifest(folder: Path) -> None:
    """List every data file of an asset with its SHA-256."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (MANIFEST, "README.md"))
    files.write_json(folder / MANIFEST, {str(path.relative_to(folder)): files.sha256(path) for path in paths})
