"""Checkpoint folders: opened with a sentence for whatever is wrong with them, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from undivided.data.demo import DEMO_MODEL, demo_model
from undivided.data.folders import WorkFolder, prepare_target, write_folder
from undivided.models.bases import check_supported, keep_softcap
from undivided.models.registration import MODEL_TYPE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Checkpoint",
    "WorkFolder",
    "check_folder",
    "open_checkpoint",
    "prepare_target",
    "provenance",
    "save_checkpoint",
    "write_folder",
]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        model: the causal language model, in eval mode.
        tokenizer: its tokenizer.
        path: the folder it was read from.
        name: the folder's name, or the name of the demo or Hub model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    path: Path
    name: str

    def fingerprint(self) -> str:
        """Returns a hash of the files' names, sizes and modification times, for the keys of stages."""
        described = hashlib.sha256()
        for path in sorted(self.path.iterdir()):
            stat = path.stat()
            described.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return described.hexdigest()


def open_checkpoint(
    src: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[str], None] = lambda sentence: None,
) -> Checkpoint:
    """Opens a causal language model with its tokenizer.

    Only safetensors are read. Everything that can be checked is checked before the weights are loaded, and
    weights that are missing or of another shape than the config says are an error, not a random
    initialisation.

    Args:
        src: a checkpoint folder; or "smollm2-135m", the demo model; or a name on the Hugging Face Hub
            ("org/name"), which is fetched into the Hub's own cache. A folder of that name comes first.
        dtype: floating-point type of the weights; by default that of the checkpoint.
        device: where to put the model; by default the CPU.
        cache_dir: where the demo model is kept.
        progress: called with a sentence before each slow step.

    Returns:
        Model, tokenizer, folder and name.

    Raises:
        ValueError: there is no such checkpoint or device, it is damaged, or its kind is not supported.
        OSError: the demo model could not be fetched.
    """
    if device is not None:
        _check_device(device)
    path, name = _find(src, cache_dir, progress)
    check_folder(path)
    progress(f"loading {name}")
    with _only_errors_logged():
        model, tokenizer = _load(path, dtype)
    if device is not None:
        model.to(device)
    return Checkpoint(model=model.eval(), tokenizer=tokenizer, path=path, name=name)


def check_folder(path: Path) -> None:
    """Raises a ValueError unless a folder has a supported config, undamaged weights and a tokenizer."""
    _check_config(path)
    _check_weights(path)
    if not any((path / file).is_file() for file in _TOKENIZERS):
        raise ValueError(f"{path} has no tokenizer; it needs one of {', '.join(_TOKENIZERS)}.")


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    target: str | Path,
    conversion: dict[str, Any],
    *,
    files: Mapping[str, str | bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes model, tokenizer and the report of a conversion as one checkpoint folder, whole or not at all.

    The report goes to `conversion.json`, with the date and the versions of the libraries. It is not repeated
    in the metadata of the safetensors files: `save_pretrained` (transformers 5.17 to 5.24) writes only its
    own there.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        target: folder to be written, absent or empty unless `overwrite`.
        conversion: the report (perplexity per stage, cache bytes, `provenance`, ...), made of JSON types.
        files: other files of the folder, by name, such as a figure.
        overwrite: replace a target that holds a checkpoint.

    Returns:
        The absolute path of the target.

    Raises:
        TypeError: the report is not made of JSON types.
        ValueError: the target exists and may not be replaced, or the report holds a number that is not
            finite.
        OSError: disk full or target not writable. Nothing was changed.
    """
    written = {**conversion, "date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": _versions()}
    try:
        report = json.dumps(written, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"conversion cannot be written as JSON: {error}.") from error

    def writer(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for name, content in {"conversion.json": report + "\n", **(files or {})}.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return write_folder(target, writer, overwrite=overwrite)


def provenance(
    source: Checkpoint, method: str, options: dict[str, Any], calibration: str | None = None
) -> dict[str, Any]:
    """Returns where a converted checkpoint comes from, for its `conversion.json`.

    Args:
        source: the checkpoint that was converted.
        method: name of the method.
        options: the method's options, as JSON types.
        calibration: the calibration text; its SHA-256 and length are noted, not the text.
    """
    return {
        "source": source.name,
        "source_path": str(source.path),
        "method": method,
        "options": options,
        "calibration_sha256": None
        if calibration is None
        else hashlib.sha256(calibration.encode()).hexdigest(),
        "calibration_characters": None if calibration is None else len(calibration),
    }


def _check_device(device: torch.device | str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f'device="{device}" is not a device; use "cpu", "cuda" or "cuda:0".') from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'device="{device}" needs a GPU, and torch finds none; use "cpu".')


def _find(src: str | Path, cache_dir: str | Path | None, progress: Callable[[str], None]) -> tuple[Path, str]:
    """The folder and the name of a checkpoint, fetched if the name asks for it."""
    path = Path(src).expanduser()
    if path.is_dir():
        return path.resolve(), path.resolve().name
    if path.exists():
        raise ValueError(f"{src} is a file; give the folder of a checkpoint.")
    if src == DEMO_MODEL:
        return demo_model(cache_dir, progress=progress), DEMO_MODEL
    # "results/model" with a folder "results" here is a mistyped path, not an organisation's model.
    if isinstance(src, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", src) and not path.parent.exists():
        return _fetch(src, progress), src
    raise ValueError(
        f"{src} does not exist; give a checkpoint folder, the name of the demo model ({DEMO_MODEL}), "
        "or a name on the Hugging Face Hub (org/name)."
    )


def _fetch(name: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    progress(f"fetching {name} from the Hugging Face Hub")
    try:
        # No pickles, no code, no second copy of the weights in another layout.
        folder = snapshot_download(
            name,
            allow_patterns=["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"],
            ignore_patterns=["*/*", "consolidated*"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"{name} is no folder, and the Hub did not give it: {_line(error)}") from error
    return Path(folder)


def _check_config(path: Path) -> None:
    """Raises a ValueError unless config.json is there and names a supported, unquantised model."""
    file = path / "config.json"
    if not file.is_file():
        names = sorted(entry.name for entry in path.iterdir())
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise ValueError(f"{path} is not a checkpoint: no config.json; it has {shown or 'no files'}.")
    config = _read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f'{file} has no "model_type"; transformers cannot tell what model it is.')
    if config["model_type"] != MODEL_TYPE:
        try:
            check_supported(SimpleNamespace(model_type=config["model_type"]))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if config.get("quantization_config"):
        raise ValueError(
            f"{path} holds quantised weights ({config['quantization_config']}); give them in floating point."
        )


def _check_weights(path: Path) -> None:
    """Raises a ValueError unless the weights are whole safetensors files."""
    if (path / _INDEX).is_file():
        _check_shards(path)
    elif (path / _WEIGHTS).is_file():
        _tensor_names(path / _WEIGHTS)
    else:
        pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"{path} holds its weights as pickle ({pickles[0]}), which can run code when it is opened; "
                "convert it once with transformers: "
                f'AutoModelForCausalLM.from_pretrained("{path}").save_pretrained("NEW").'
            )
        others = sorted(entry.name for entry in path.glob("*.safetensors"))
        found = f"; it has {', '.join(others[:4])}" if others else ""
        raise ValueError(f"{path} has no {_WEIGHTS}{found}.")


def _check_shards(path: Path) -> None:
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{path / _INDEX} has no "weight_map"; save the checkpoint again.')
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        raise ValueError(
            f"{path} lacks {len(missing)} of the {len(shards)} files that its index names: {missing[0]}."
        )
    held = {name: shard for shard in shards for name in _tensor_names(path / shard)}
    for name, shard in weight_map.items():
        if name not in held:
            raise ValueError(f"{path / shard} lacks the tensor {name}, which {_INDEX} says it holds.")


def _tensor_names(file: Path) -> list[str]:
    """The names of a safetensors file's tensors; a ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` there.")
        length = int.from_bytes(start, "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{file} is damaged: it has {size} bytes, its header alone announces more.")
        header = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        announced = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: its header is not that of a safetensors file.") from error
    if size != announced:
        raise ValueError(f"{file} is damaged: it has {size} bytes, its header announces {announced}.")
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {_line(error)}.") from error


def _load(path: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / 'config.json'} is not valid: {_line(error)}") from error
    model, found = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype="auto" if dtype is None else dtype,
        use_safetensors=True,
        local_files_only=True,
        # Both are reported below, in a sentence.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    keep_softcap(model)
    for key in sorted(found["mismatched_keys"])[:1]:
        name, stored, expected = key
        raise ValueError(
            f"{path}: tensor {name} has shape {list(stored)}, but config.json asks for {list(expected)}."
        )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} tensors of its config.json, such as {missing[0]}.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"the tokenizer in {path} cannot be read: {_line(error)}") from error
    rows = model.get_input_embeddings().weight.shape[0]
    # Without added tokens: many good checkpoints have one that is never embedded, to pad with.
    if tokenizer.vocab_size > rows:
        raise ValueError(f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, the model embeds {rows}.")
    return model, tokenizer


@contextmanager
def _only_errors_logged() -> Iterator[None]:
    """Keeps transformers from logging a table of what `_load` says in a sentence."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {_line(error)}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object.")
    return content


def _versions() -> dict[str, str]:
    import torch
    import transformers

    import undivided

    return {
        "undivided": undivided.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
