from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from undivided.data import wheels


def test_cache_folder_is_the_argument_or_lies_in_the_hugging_face_cache(run_python, tmp_path: Path) -> None:
    assert wheels.cache_folder("/given") == Path("/given")
    # HF_HOME is read when huggingface_hub is imported.
    found = run_python(
        "import os, sys; os.environ['HF_HOME'] = sys.argv[1]\n"
        "from undivided.data.wheels import cache_folder; print(cache_folder())",
        str(tmp_path),
    )
    assert found.stdout.strip() == str(tmp_path / "assets" / "undivided" / "data" / "demo")


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Stands in for `pip download`: puts a wheel of one package into the folder; returns the calls."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some_data-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("some_data/__init__.py", "")
            archive.writestr("some_data/data/text.txt", "text")
            archive.writestr("some_data-1.0.dist-info/METADATA", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", run)
    return calls


def test_downloads_the_wheel_alone_and_leaves_nothing_behind(pip: list[list[str]]) -> None:
    said: list[str] = []
    with wheels.package_files("some-data==1.0", "some_data", "data/*.txt", said.append) as folder:
        assert (folder / "data" / "text.txt").read_text() == "text"
        assert not (folder.parent / "some_data-1.0.dist-info").exists()
    assert not folder.exists()
    assert said == ["downloading some-data==1.0"]
    (command,) = pip
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "some-data==1.0"


def test_wheel_without_the_files_is_refused(pip: list[list[str]]) -> None:
    with (
        pytest.raises(OSError, match=r"the wheel of some-data==1.0 holds no some_data/\*.gguf"),
        wheels.package_files("some-data==1.0", "some_data", "*.gguf", print),
    ):
        pass


def test_installed_package_comes_first(
    pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_data"
    package.mkdir()
    (package / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with wheels.package_files("some-data==1.0", "some_data", "*.gguf", print) as folder:
        assert folder == package
    assert pip == []
    # A package of that name without the files is another one.
    with wheels.package_files("some-data==1.0", "some_data", "data/*.txt", print) as folder:
        assert folder != package
    assert (package / "weights.gguf").exists()


def test_reason_of_pip_is_passed_on_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real pip, without an index to ask.
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with (
        pytest.raises(
            OSError,
            match=r"pip could not download no-such-thing==1.0: No matching distribution.*"
            r"Where no-such-thing==1.0 is installed \(pip install --no-deps\), it is used from there\.",
        ),
        wheels.package_files("no-such-thing==1.0", "no_such_thing", "*", lambda sentence: None),
    ):
        pass
