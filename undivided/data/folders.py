"""Folders that are there whole or not at all, and the stages a killed conversion resumes from."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from torch import Tensor


def prepare_target(target: str | Path, *, overwrite: bool = False) -> Path:
    """Cleans up after killed runs and checks that `write_folder` could write the target.

    Call it before hours of work, so that a refusal comes first and not last.

    Args:
        target: folder to be written. It may be absent or empty.
        overwrite: allow a target that holds a checkpoint; it is replaced.

    Returns:
        The absolute path of the target.

    Raises:
        ValueError: the target exists and may not be replaced.
        OSError: the place of the target cannot be written.
    """
    target = Path(target).expanduser().resolve()
    place = next((parent for parent in target.parents if parent.exists()), target)
    if not place.is_dir():
        raise NotADirectoryError(f"could not write {target}: {place} is a file, not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"could not write {target}: no permission to write in {place}.")
    # Eight characters exactly: the partial folders of a target called NAME.partial-... are not ours.
    for partial in target.parent.glob(f".{glob.escape(target.name)}.partial-????????"):
        _discard_if_dead(partial, target)
    if not target.exists():
        return target
    if not target.is_dir():
        raise ValueError(f"target={target} is a file; choose the name of a folder.")
    if not any(target.iterdir()):
        return target
    if not overwrite:
        raise ValueError(f"target={target} exists; choose another or allow overwriting (overwrite=True).")
    if not (target / "config.json").is_file():
        raise ValueError(
            f"target={target} has no config.json: only a checkpoint folder is overwritten, choose another."
        )
    return target


def write_folder(target: str | Path, writer: Callable[[Path], None], *, overwrite: bool = False) -> Path:
    """Writes a folder so that a run killed at any moment leaves the old one, the whole new one, or none.

    The writer fills a hidden folder beside the target; its files are then flushed to the disk and the folder
    is renamed. An old target stands until the new one is complete. If the run dies between the two renames,
    the next `prepare_target` or `write_folder` with the same target puts the old one back.

    Args:
        target: folder to be written, absent or empty unless `overwrite`; parents are created.
        writer: called with the path of an empty folder to fill.
        overwrite: replace a target that holds a checkpoint.

    Returns:
        The absolute path of the target.

    Raises:
        ValueError: the target exists and may not be replaced.
        OSError: disk full or target not writable. Nothing was changed.
    """
    target = prepare_target(target, overwrite=overwrite)
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    new, old = partial / "new", partial / "old"
    try:
        partial.mkdir(parents=True)
        # The lock tells other runs that this one lives; the system drops it when the process dies.
        with FileLock(partial / "lock", timeout=0):
            try:
                new.mkdir()
                writer(new)
                _flush(new)
                if overwrite and target.exists():
                    os.rename(target, old)
                os.rename(new, target)
                _fsync(target.parent)
            finally:
                _discard(partial, target)
    except Exception as error:
        if not _is_system_error(error):
            raise
        raise _write_error(target, error) from error
    return target


class WorkFolder:
    """Finished stages of a conversion, kept beside its target until the conversion has succeeded.

    ```
    with WorkFolder(target, {"source": fingerprint}) as work:
        moments = work.stage("moments", {"tokens": 65536}, collect_moments)
        ...
        save_checkpoint(model, tokenizer, target, conversion)
    ```

    A stage is stored as `.<target name>.work/<stage>-<sha256 of name and key>.safetensors`. Leaving the
    `with` block without an error removes the folder; a run that fails or is killed leaves it, and the next
    run loads what is there.

    Args:
        target: the folder the conversion will write.
        key: what all stages depend on (source fingerprint, hash of the text), as JSON types.

    Attributes:
        path: the folder of the stages.
        resumed: names of the stages that this run loaded instead of computing.
    """

    def __init__(self, target: str | Path, key: dict[str, Any] | None = None) -> None:
        target = Path(target).expanduser().resolve()
        self.target = target
        self.key = key or {}
        self.path = target.parent / f".{target.name}.work"
        self.resumed: list[str] = []
        self._lock = FileLock(self.path / "lock", timeout=0)

    def __enter__(self) -> Self:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise BlockingIOError(
                f"another run is working on {self.target}; wait for it or end it."
            ) from error
        except OSError as error:
            raise _write_error(self.path, error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def stage(
        self, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Returns the tensors of a stage: an earlier run's with the same key, or freshly computed ones.

        Args:
            name: the stage's name; letters, digits, `-`, `_` and `.`.
            key: everything else the result depends on (options, earlier choices), as JSON types.
            compute: computes the stage.

        Returns:
            The tensors on the CPU, in both cases.

        Raises:
            ValueError: the name is not a file name, or the folder was not entered.
            TypeError: the key is not made of JSON types, or the result holds something else than tensors.
            OSError: the stage could not be stored.
        """
        from safetensors.torch import load_file, save_file

        if not self._lock.is_locked:
            raise ValueError(f"stage {name!r} needs the work folder open: `with WorkFolder(target) as work`.")
        if not name or not all(letter.isalnum() or letter in "-_." for letter in name):
            raise ValueError(f"name={name!r} is not a stage name; use letters, digits, '-', '_' and '.'.")
        try:
            described = json.dumps([name, self.key, key], sort_keys=True)
        except TypeError as error:
            raise TypeError(f"key of stage {name!r} must be made of JSON types: {error}.") from error
        file = self.path / f"{name}-{hashlib.sha256(described.encode()).hexdigest()[:32]}.safetensors"
        if file.exists():
            self.resumed.append(name)
            return load_file(file)
        tensors = _own_storage(name, compute())
        # A fixed name: the next run overwrites what a killed one left.
        partial = file.with_suffix(".partial")
        try:
            save_file(tensors, partial, metadata={"stage": described})
            _fsync(partial)
            os.rename(partial, file)
            _fsync(self.path)
        except Exception as error:
            partial.unlink(missing_ok=True)
            if not _is_system_error(error):
                raise
            raise _write_error(self.path, error) from error
        return tensors


def _own_storage(stage: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, none sharing memory with another: what safetensors can store."""
    import torch

    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"stage {stage!r} gave {type(tensor).__name__} for {name!r}; only tensors are kept."
            )
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    return stored


def _discard_if_dead(partial: Path, target: Path) -> None:
    """Removes a partial folder unless the run that made it is alive."""
    # Without a lock file the run has only just begun.
    if (partial / "lock").exists():
        try:
            with FileLock(partial / "lock", timeout=0):
                _discard(partial, target)
        except Timeout:
            return


def _discard(partial: Path, target: Path) -> None:
    """Removes a partial folder; a target that was moved into it and never replaced goes back first."""
    old = partial / "old"
    if old.exists() and not target.exists():
        os.rename(old, target)
    shutil.rmtree(partial, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Flushes a folder to the disk, its files as readable as itself (safetensors makes them private)."""
    mode = folder.stat().st_mode & 0o666
    for path in [*folder.rglob("*"), folder]:
        if path.is_file():
            path.chmod(mode)
        _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_system_error(error: Exception) -> bool:
    # safetensors and tokenizers raise their own exceptions, with the text of Rust's io::Error.
    return isinstance(error, OSError) or "(os error " in str(error)


def _write_error(target: Path, error: Exception) -> OSError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    failure = OSError(f"could not write {target}: {reason}; nothing was changed.")
    failure.errno = error.errno if isinstance(error, OSError) else None
    return failure
