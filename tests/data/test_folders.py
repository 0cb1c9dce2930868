from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from undivided.data.folders import WorkFolder, prepare_target, write_folder

# Writes a folder of two files and dies by SIGKILL at the named moment.
KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from undivided.data import folders

target, moment, overwrite = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
reached = []

def pass_by(name):
    reached.append(name)
    if name == moment:
        os.kill(os.getpid(), signal.SIGKILL)

real_rename = os.rename
def rename(source, destination):
    number = sum(name.startswith("before rename") for name in reached) + 1
    pass_by(f"before rename {number}")
    real_rename(source, destination)
    pass_by(f"after rename {number}")
os.rename = rename

def writer(folder):
    pass_by("nothing written")
    with open(folder / "weights", "w") as file:
        file.write("new half,")
        file.flush()
        pass_by("half a file written")
        file.write(" other half")
    (folder / "config.json").write_text("{}")
    pass_by("all written")

folders.write_folder(target, writer, overwrite=overwrite)
"""


def content(target: Path) -> str | None:
    return (target / "weights").read_text() if target.exists() else None


def write(text: str) -> Callable[[Path], None]:
    def writer(folder: Path) -> None:
        (folder / "weights").write_text(text)
        (folder / "config.json").write_text("{}")

    return writer


def beside(target: Path) -> list[str]:
    """Names in the target's folder, but its own."""
    return sorted(path.name for path in target.parent.iterdir() if path != target)


WITHOUT_OLD = {
    "nothing written": None,
    "half a file written": None,
    "all written": None,
    "before rename 1": None,
    "after rename 1": "new half, other half",
}
WITH_OLD = {
    "nothing written": "old",
    "half a file written": "old",
    "all written": "old",
    "before rename 1": "old",
    # Moved aside and not yet replaced: the next run puts it back.
    "after rename 1": None,
    "before rename 2": None,
    "after rename 2": "new half, other half",
}


@pytest.mark.parametrize(
    ("moment", "left", "overwrite"),
    [(moment, left, False) for moment, left in WITHOUT_OLD.items()]
    + [(moment, left, True) for moment, left in WITH_OLD.items()],
)
def test_killed_run_leaves_old_or_new_or_none(
    tmp_path: Path, run_python, moment: str, left: str | None, overwrite: bool
) -> None:
    target = tmp_path / "model"
    if overwrite:
        write_folder(target, write("old"))
    killed = run_python(KILLED_WRITER, str(target), moment, str(overwrite), check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert content(target) == left
    # What the next run with this target does first.
    prepare_target(target, overwrite=True)
    assert content(target) == (left or ("old" if overwrite else None))
    assert beside(target) == []
    write_folder(target, write("newer"), overwrite=True)
    assert content(target) == "newer"
    assert beside(target) == []


def test_living_run_is_not_cleaned_away(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def writer(folder: Path) -> None:
        prepare_target(target)
        write("new")(folder)

    write_folder(target, writer)
    assert content(target) == "new"


def test_partial_folder_of_a_target_with_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / ".model.partial-x.partial-01234567"
    other.mkdir()
    (other / "lock").touch()
    prepare_target(tmp_path / "model")
    assert other.exists()


def test_existing_target_is_refused(tmp_path: Path) -> None:
    target = write_folder(tmp_path / "model", write("old"))
    with pytest.raises(ValueError, match=r"target=.*model exists; choose another or allow overwriting"):
        write_folder(target, write("new"))
    assert content(target) == "old"


def test_empty_target_is_filled(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    write_folder(target, write("new"))
    assert content(target) == "new"


def test_overwriting_replaces_checkpoints_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"has no config.json: only a checkpoint folder is overwritten"):
        write_folder(home, write("new"), overwrite=True)
    assert (home / "thesis.tex").exists()
    file = tmp_path / "notes.txt"
    file.write_text("notes")
    with pytest.raises(ValueError, match=r"notes.txt is a file; choose the name of a folder"):
        write_folder(file, write("new"), overwrite=True)


def test_overwriting_through_a_link_replaces_what_it_points_to(tmp_path: Path) -> None:
    real = write_folder(tmp_path / "real", write("old"))
    link = tmp_path / "link"
    link.symlink_to(real)
    assert write_folder(link, write("new"), overwrite=True) == real
    assert link.is_symlink()
    assert content(real) == "new"


def test_failing_writer_changes_nothing(tmp_path: Path) -> None:
    target = write_folder(tmp_path / "model", write("old"))

    def writer(folder: Path) -> None:
        write("new")(folder)
        raise ZeroDivisionError("the writer's own error")

    with pytest.raises(ZeroDivisionError, match="the writer's own error"):
        write_folder(target, writer, overwrite=True)
    assert content(target) == "old"
    assert beside(target) == []


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "model"

    def writer(folder: Path) -> None:
        write("new")(folder)
        # The device that is always full.
        with open("/dev/full", "w") as file:
            file.write("more")

    with pytest.raises(OSError, match=r"could not write .*model: No space left on device; nothing") as caught:
        write_folder(target, writer)
    assert caught.value.errno == 28
    assert list(tmp_path.iterdir()) == []


def test_rusts_report_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    def writer(folder: Path) -> None:
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match=r"could not write .*model: .*No space left on device"):
        write_folder(tmp_path / "model", writer)


def test_place_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"could not write .*model: .*file is a file, not a folder"):
        prepare_target(tmp_path / "file" / "model")


def test_place_that_the_system_refuses_is_one_sentence() -> None:
    # No one may create folders here, not even root.
    with pytest.raises(OSError, match=r"could not write /proc/model: .*"):
        write_folder("/proc/model", write("new"))


def test_parents_are_created(tmp_path: Path) -> None:
    assert content(write_folder(tmp_path / "a" / "b" / "model", write("new"))) == "new"


def test_files_get_the_modes_of_the_folder(tmp_path: Path) -> None:
    def writer(folder: Path) -> None:
        os.close(os.open(folder / "private", os.O_CREAT | os.O_WRONLY, 0o600))

    target = write_folder(tmp_path / "model", writer)
    assert (target / "private").stat().st_mode & 0o666 == target.stat().st_mode & 0o666


KILLED_CONVERSION = """
import os, signal, sys, torch
from undivided.data import folders

moment = sys.argv[2]
def die():
    os.kill(os.getpid(), signal.SIGKILL)

with folders.WorkFolder(sys.argv[1]) as work:
    work.stage("first", {"rank": 8}, lambda: {"x": torch.arange(3.0, dtype=torch.float64)})
    if moment == "while storing":
        os.rename = lambda *names: die()
        work.stage("second", {"rank": 8}, lambda: {"y": torch.ones(2)})
    work.stage("second", {"rank": 8}, die)
"""


def never() -> dict[str, torch.Tensor]:
    raise AssertionError("computed again")


@pytest.mark.parametrize("moment", ["while computing", "while storing"])
def test_killed_conversion_resumes_after_its_last_stage(tmp_path: Path, run_python, moment: str) -> None:
    target = tmp_path / "model"
    killed = run_python(KILLED_CONVERSION, str(target), moment, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with WorkFolder(target) as work:
        first = work.stage("first", {"rank": 8}, never)
        assert torch.equal(first["x"], torch.arange(3.0, dtype=torch.float64))
        second = work.stage("second", {"rank": 8}, lambda: {"y": torch.zeros(2)})
        assert torch.equal(second["y"], torch.zeros(2))
        assert work.resumed == ["first"]
    assert list(tmp_path.iterdir()) == []


def test_stage_of_another_key_is_computed(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "model") as work:
        work.stage("s", {"rank": 8, "text": "abc"}, lambda: {"x": torch.zeros(1)})
        work.stage("s", {"text": "abc", "rank": 8}, never)
        assert work.stage("s", {"rank": 9, "text": "abc"}, lambda: {"x": torch.ones(1)})["x"] == 1
        assert work.stage("other", {"rank": 8, "text": "abc"}, lambda: {"x": torch.ones(1)})["x"] == 1
        assert work.resumed == ["s"]


def test_stages_of_another_source_are_not_taken(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), WorkFolder(target, {"source": "abc"}) as work:
        work.stage("s", {}, lambda: {"x": torch.zeros(1)})
        raise ZeroDivisionError
    with WorkFolder(target, {"source": "abd"}) as work:
        assert work.stage("s", {}, lambda: {"x": torch.ones(1)})["x"] == 1
        assert work.resumed == []


def test_stored_stage_equals_the_computed_one(tmp_path: Path) -> None:
    base = torch.randn(4, 6, dtype=torch.float64)
    tensors = {
        "whole": base,
        "shared": base,
        "view": base[1:3],
        "transposed": base.T,
        "half": base.bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 5),
    }
    with WorkFolder(tmp_path / "model") as work:
        computed = work.stage("s", {}, lambda: tensors)
        loaded = work.stage("s", {}, never)
    assert computed.keys() == loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for got in (computed[name], loaded[name]):
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor), name


def test_stages_survive_a_failure_and_go_with_success(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with pytest.raises(ZeroDivisionError), WorkFolder(target) as work:
        work.stage("s", {}, lambda: {"x": torch.ones(1)})
        raise ZeroDivisionError
    assert (tmp_path / ".model.work").is_dir()
    with WorkFolder(target) as work:
        work.stage("s", {}, never)
    assert not (tmp_path / ".model.work").exists()


def test_stage_says_what_it_holds(tmp_path: Path) -> None:
    from safetensors import safe_open

    with WorkFolder(tmp_path / "model", {"source": "abc"}) as work:
        work.stage("moments", {"rank": 8}, lambda: {"x": torch.ones(1)})
        (file,) = work.path.glob("moments-*.safetensors")
        with safe_open(file, framework="pt") as opened:
            assert json.loads(opened.metadata()["stage"]) == ["moments", {"source": "abc"}, {"rank": 8}]


def test_two_runs_do_not_share_a_work_folder(tmp_path: Path) -> None:
    with (
        WorkFolder(tmp_path / "model"),
        pytest.raises(BlockingIOError, match=r"another run is working on .*model; wait for it or end it"),
        WorkFolder(tmp_path / "model"),
    ):
        pass


def test_bad_stages_are_refused(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "model")
    with pytest.raises(ValueError, match=r"stage 's' needs the work folder open"):
        work.stage("s", {}, never)
    with work:
        with pytest.raises(ValueError, match=r"name='a/b' is not a stage name"):
            work.stage("a/b", {}, never)
        with pytest.raises(TypeError, match=r"key of stage 's' must be made of JSON types: .*Tensor"):
            work.stage("s", {"x": torch.ones(1)}, never)
        with pytest.raises(TypeError, match=r"stage 's' gave float for 'x'; only tensors are kept"):
            work.stage("s", {}, lambda: {"x": 1.0})


def test_work_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OSError, match=r"could not write .*\.model\.work: .*"),
        WorkFolder(tmp_path / "file" / "model"),
    ):
        pass
