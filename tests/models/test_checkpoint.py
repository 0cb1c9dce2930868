from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import MODEL_TYPES, tiny_llama, tiny_model, tiny_tokenizer
from undivided.data.demo import DEMO_MODEL
from undivided.models.checkpoint import open_checkpoint, provenance, save_checkpoint

Edit = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with nothing wrong."""
    return save_checkpoint(
        tiny_llama(), tiny_tokenizer(), tmp_path_factory.mktemp("whole") / "tiny", {"method": "none"}
    )


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "tiny"))


def refusal(src: str | Path, **options: Any) -> str:
    """The sentence with which `open_checkpoint` refuses."""
    with pytest.raises(ValueError) as caught:
        open_checkpoint(src, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_opens_what_was_saved(model_type: str, tmp_path: Path) -> None:
    model, ids = tiny_model(model_type), torch.arange(20)[None]
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "tiny", {})
    opened = open_checkpoint(tmp_path / "tiny")
    assert torch.equal(opened.model(ids).logits, model(ids).logits)
    assert opened.tokenizer("naïve").input_ids == tiny_tokenizer()("naïve").input_ids
    assert (opened.path, opened.name) == (tmp_path / "tiny", "tiny")
    assert not opened.model.training


def test_opens_in_the_asked_type_or_that_of_the_checkpoint(folder: Path) -> None:
    assert open_checkpoint(folder).model.dtype == torch.float32
    assert open_checkpoint(str(folder), dtype=torch.float64).model.dtype == torch.float64
    save_checkpoint(tiny_llama(dtype=torch.bfloat16), tiny_tokenizer(), folder, {}, overwrite=True)
    assert open_checkpoint(folder).model.dtype == torch.bfloat16


def test_opens_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    model = tiny_llama()
    model.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").exists()
    opened = open_checkpoint(folder).model
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in model.state_dict().items())


def test_opens_a_converted_model(tmp_path: Path) -> None:
    from undivided.models.causal_lm import UndividedForCausalLM

    model, ids = UndividedForCausalLM.from_native(tiny_llama()), torch.arange(20)[None]
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "tiny", {})
    opened = open_checkpoint(tmp_path / "tiny").model
    assert isinstance(opened, UndividedForCausalLM)
    assert torch.equal(opened(ids).logits, model(ids).logits)


def test_a_local_folder_is_opened_without_the_network(folder: Path, run_python) -> None:
    code = """
import os, socket, sys
for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)
def refuse(*arguments):
    raise SystemExit("asked the network")
socket.socket.connect = socket.getaddrinfo = refuse
from undivided.models.checkpoint import open_checkpoint
open_checkpoint(sys.argv[1])
"""
    run_python(code, str(folder))


def test_quiet_about_what_it_says_itself(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, num_hidden_layers=3)
    refusal(folder)
    assert caplog.text == ""


def test_fingerprint_changes_with_any_file(folder: Path) -> None:
    opened = open_checkpoint(folder)
    before = opened.fingerprint()
    assert opened.fingerprint() == before
    (folder / "model.safetensors").touch()
    touched = opened.fingerprint()
    (folder / "extra.json").write_text("{}")
    assert len({before, touched, opened.fingerprint()}) == 3


def test_missing_folder_lists_what_could_be_given(tmp_path: Path) -> None:
    sentence = refusal(tmp_path / "nowhere")
    assert sentence == (
        f"{tmp_path / 'nowhere'} does not exist; give a checkpoint folder, the name of the demo model "
        "(smollm2-135m), or a name on the Hugging Face Hub (org/name)."
    )


def test_mistyped_path_is_not_asked_of_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path.parent)
    assert "does not exist" in refusal(f"{tmp_path.name}/tinny")
    assert open_checkpoint(f"{tmp_path.name}/tiny").path == folder


def test_hub_name_is_fetched_without_pickles_and_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    opened = open_checkpoint("some-org/tiny")
    assert (opened.name, opened.path) == ("some-org/tiny", folder)
    assert asked["name"] == "some-org/tiny"
    assert not any(pattern in ("*", "*.bin", "*.pt", "*.py") for pattern in asked["allow_patterns"])


def test_hub_name_that_cannot_be_fetched_is_one_sentence() -> None:
    # The test run is offline.
    assert refusal("some-org/no-such-model").startswith(
        "some-org/no-such-model is no folder, and the Hub did not give it: "
    )


def test_demo_name_opens_the_demo_model(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(folder, cache / DEMO_MODEL)
    opened = open_checkpoint(DEMO_MODEL, cache_dir=cache)
    assert (opened.name, opened.path) == (DEMO_MODEL, cache / DEMO_MODEL)


def test_device_that_is_not_here_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refusal(folder, device="cuda:1") == 'device="cuda:1" needs a GPU, and torch finds none; use "cpu".'
    assert refusal(folder, device="gpu") == ('device="gpu" is not a device; use "cpu", "cuda" or "cuda:0".')
    assert open_checkpoint(folder, device="cpu").model.device.type == "cpu"


def test_file_is_not_a_folder(folder: Path) -> None:
    assert (
        refusal(folder / "config.json") == f"{folder}/config.json is a file; give the folder of a checkpoint."
    )


def test_folder_without_config_says_what_it_has(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} is not a checkpoint: no config.json; it has no files."
    (tmp_path / "notes.txt").touch()
    (tmp_path / "model.safetensors").touch()
    assert refusal(tmp_path).endswith("no config.json; it has model.safetensors, notes.txt.")
    for number in range(9):
        (tmp_path / f"z{number}").touch()
    assert refusal(tmp_path).endswith("z0, z1, z2, z3, z4, z5 and 3 more.")


CONFIGS = {
    "{": r"tiny/config.json is not JSON: Expecting property name .*\.",
    "\xff": r"tiny/config.json is not JSON: 'utf-8' codec .*\.",
    "[]": r"tiny/config.json holds a JSON list, not an object\.",
    "{}": r'tiny/config.json has no "model_type"; transformers cannot tell what model it is\.',
    '{"model_type": "qwen3"}': r'tiny: model_type "qwen3" is not supported: it normalises query and key .* '
    r"Supported: llama, qwen2, mistral, gemma2, deepseek_v2, deepseek_v3\.",
    '{"model_type": "gemma3_text"}': r'tiny: model_type "gemma3_text" is not supported: it normalises .*',
    '{"model_type": "bert"}': r'tiny: model_type "bert" is not supported: .*',
    '{"model_type": ["llama"]}': r'tiny/config.json has no "model_type".*',
}


@pytest.mark.parametrize(("content", "sentence"), CONFIGS.items())
def test_bad_config_is_named(folder: Path, content: str, sentence: str) -> None:
    (folder / "config.json").write_text(content, encoding="latin-1")
    assert re.search(sentence + "$", refusal(folder))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": "wide"}, r"config.json is not valid: .*'hidden_size' expected int, got str.*"),
        (
            {"num_attention_heads": 5},
            r"config.json is not valid: .*not a multiple of the number of attention.*",
        ),
        ({"num_hidden_layers": 3}, r"tiny lacks 9 tensors of its config.json, such as model.layers.2.*\."),
        (
            {"intermediate_size": 64},
            r"tensor model.layers.0.mlp.down_proj.weight has shape \[32, 48\], .* asks for \[32, 64\]\.",
        ),
        (
            {"vocab_size": 255},
            r"tensor lm_head.weight has shape \[256, 32\], but config.json asks for \[255, 32\]\.",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"tiny holds quantised weights .*gptq.*; give .*\.",
        ),
    ],
)
def test_config_that_does_not_fit_is_named(folder: Path, fields: dict[str, Any], sentence: str) -> None:
    edit_config(folder, **fields)
    assert re.search(sentence + "$", refusal(folder))


def cut(end: int) -> Edit:
    return lambda file: file.write_bytes(file.read_bytes()[:end])


DAMAGES: dict[str, tuple[Edit, str]] = {
    "no bytes": (cut(0), r"model.safetensors is damaged: it has 0 bytes, its header alone announces more\."),
    "cut in the header": (cut(300), r"model.safetensors is damaged: it has 300 bytes, its header alone .*\."),
    "cut in a tensor": (
        cut(-100),
        r"model.safetensors is damaged: it has \d+ bytes, its header announces \d+\.",
    ),
    "too long": (
        lambda file: file.write_bytes(file.read_bytes() + b"x"),
        r"model.safetensors is damaged: it has \d+ bytes, its header announces \d+\.",
    ),
    "noise": (
        lambda file: file.write_bytes(bytes([255, 1, 0, 0, 0, 0, 0, 0]) + b"\x07" * 5000),
        r"model.safetensors is damaged: its header is not that of a safetensors file\.",
    ),
    "unknown type": (
        lambda file: file.write_bytes(file.read_bytes().replace(b'"F32"', b'"F3X"', 1)),
        r"model.safetensors is damaged: .*F3X.*\.",
    ),
    "pointer": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"model.safetensors is a Git LFS pointer, not the weights; run `git lfs pull` there\.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_named(folder: Path, damage: str) -> None:
    edit, sentence = DAMAGES[damage]
    edit(folder / "model.safetensors")
    assert re.search(sentence + "$", refusal(folder))


@pytest.fixture
def sharded(folder: Path) -> Path:
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="40KB")
    return folder


def test_missing_shard_is_named(sharded: Path) -> None:
    shards = sorted(sharded.glob("model-*.safetensors"))
    shards[1].unlink()
    assert refusal(sharded) == (
        f"{sharded} lacks 1 of the {len(shards)} files that its index names: {shards[1].name}."
    )


def test_damaged_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    cut(-1)(shard)
    assert refusal(sharded).startswith(f"{shard} is damaged: ")


def test_index_that_does_not_match_is_named(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = content["weight_map"]["lm_head.weight"]
    content["weight_map"]["lm_foot.weight"] = shard
    index.write_text(json.dumps(content))
    assert refusal(sharded) == (
        f"{sharded / shard} lacks the tensor lm_foot.weight, "
        "which model.safetensors.index.json says it holds."
    )
    index.write_text("{}")
    assert refusal(sharded) == f'{index} has no "weight_map"; save the checkpoint again.'
    index.write_text("")
    assert refusal(sharded).startswith(f"{index} is not JSON: ")


def test_pickle_is_refused_with_the_way_out(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert refusal(folder) == (
        f"{folder} holds its weights as pickle (pytorch_model.bin), which can run code when it is opened; "
        "convert it once with transformers: "
        f'AutoModelForCausalLM.from_pretrained("{folder}").save_pretrained("NEW").'
    )


def test_weights_of_another_name_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    assert refusal(folder) == f"{folder} has no model.safetensors; it has adapter_model.safetensors."
    (folder / "adapter_model.safetensors").unlink()
    assert refusal(folder) == f"{folder} has no model.safetensors."


def test_missing_or_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    assert refusal(folder).startswith(f"the tokenizer in {folder} cannot be read: ")
    (folder / "tokenizer.json").unlink()
    assert refusal(folder) == (
        f"{folder} has no tokenizer; it needs one of tokenizer.json, tokenizer.model, vocab.json, vocab.txt."
    )


def test_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    save_checkpoint(tiny_llama(vocab_size=200), tiny_tokenizer(), tmp_path / "tiny", {})
    assert refusal(tmp_path / "tiny") == (
        f"{tmp_path / 'tiny'}: the tokenizer has 256 tokens, the model embeds 200."
    )


def test_report_is_written_with_date_and_versions(tmp_path: Path) -> None:
    report = {"perplexity": {"source": 20.5, "converted": 21.0}, "method": "transmla"}
    target = save_checkpoint(tiny_llama(), tiny_tokenizer(), tmp_path / "tiny", report)
    written = json.loads((target / "conversion.json").read_text())
    assert {name: written[name] for name in report} == report
    assert written["versions"]["torch"] == torch.__version__
    assert set(written["versions"]) == {"undivided", "python", "torch", "transformers"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", written["date"])


def test_provenance_names_source_method_options_and_text(folder: Path) -> None:
    source = open_checkpoint(folder)
    assert provenance(source, "tpla", {"num_shards": 2}, "abc") == {
        "source": "tiny",
        "source_path": str(folder),
        "method": "tpla",
        "options": {"num_shards": 2},
        "calibration_sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "calibration_characters": 3,
    }
    assert provenance(source, "tpla", {})["calibration_sha256"] is None


def test_report_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for report, kind, sentence in (
        ({"x": torch.ones(1)}, TypeError, r"conversion cannot be written as JSON: .*Tensor is not JSON"),
        ({"x": float("nan")}, ValueError, r"conversion cannot be written as JSON: .*not JSON compliant"),
    ):
        with pytest.raises(kind, match=sentence):
            save_checkpoint(tiny_llama(), tiny_tokenizer(), tmp_path / "tiny", report)
    assert list(tmp_path.iterdir()) == []


def test_existing_checkpoint_is_replaced_only_when_asked(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"target=.*tiny exists; choose another"):
        save_checkpoint(tiny_llama(seed=1), tiny_tokenizer(), folder, {})
    model = tiny_llama(seed=1)
    save_checkpoint(model, tiny_tokenizer(), folder, {}, overwrite=True)
    opened = open_checkpoint(folder).model
    assert torch.equal(opened.lm_head.weight, model.lm_head.weight)


def test_a_checkpoint_can_be_written_over_the_one_it_was_read_from(folder: Path) -> None:
    # Its weights may still be mapped from the file that goes away.
    source = open_checkpoint(folder)
    before = {name: value.clone() for name, value in source.model.state_dict().items()}
    save_checkpoint(source.model, source.tokenizer, folder, {}, overwrite=True)
    after = open_checkpoint(folder).model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


FULL_DISK = """
import resource, sys
from tests.tiny import tiny_llama, tiny_tokenizer
from undivided.models.checkpoint import save_checkpoint

model, tokenizer = tiny_llama(), tiny_tokenizer()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
# No file may grow beyond so many bytes. The weights have 127 KB, the tokenizer 12, the config less than 1.
for limit in (50_000, 5_000, 100):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        save_checkpoint(model, tokenizer, sys.argv[1], {})
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        print(error)
"""


def test_files_that_do_not_fit_on_the_disk_leave_nothing(tmp_path: Path, run_python) -> None:
    sentences = run_python(FULL_DISK, str(tmp_path / "tiny")).stdout.splitlines()
    expected = rf"could not write {tmp_path}/tiny: .*File too large.*; nothing was changed\."
    assert len(sentences) == 3
    assert all(re.fullmatch(expected, sentence) for sentence in sentences), sentences
    assert list(tmp_path.iterdir()) == []
