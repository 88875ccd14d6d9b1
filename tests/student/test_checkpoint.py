"""A checkpoint loads on any number of ranks, continues exactly, and is refused when it is not whole."""

from __future__ import annotations

import errno
import json
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_cpd.errors import UserError
from hpc_cpd.student.checkpoint import INDEX_FILE, PendingCheckpoint, load_checkpoint
from hpc_cpd.student.embeddings.one_hot import OneHotSettings
from hpc_cpd.student.network import Student, expert_of
from hpc_cpd.student.policy import JSON_FILE, StudentParts, load_student_parts, save_student
from tests.student.rank_checkpoint import DEEP
from tests.student.ranks import run_ranks
from tests.student.reference import make_student, small_shape

STEPS, SAVE_AT = 6, 3
EXPERTS = [[0, 1, 2], [3, 4]]


SAVES = {
    "dense": {"top_k": 0},
    "top-2": {"top_k": 2},
    "ZeRO 1": {"top_k": 0, "zero": 1},
    "ZeRO 2": {"top_k": 2, "zero": 2},
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """What two ranks that share five experts did: train with a save in the middle, then fail to save.

    One start of the ranks for all of it: starting takes longer than the work.
    """
    folder = tmp_path_factory.mktemp("two_ranks")
    PendingCheckpoint(
        folder / "damaged", make_student(small_shape(0, **DEEP), EXPERTS, for_training=False), {}, {"step": 0}, {}
    ).publish()
    with open(folder / "damaged" / "mixture-0-expert-0001.safetensors", "r+b") as file:
        file.seek(200)
        file.write(b"\x00\x01\x02\x03")
    spread = {"expert_parallel_size": 2}
    wishes: list[dict[str, Any]] = [
        {**spread, "mode": "train", **SAVES[name], "steps": STEPS, "save": str(folder / name), "save_at": SAVE_AT}
        for name in SAVES
    ]
    wishes.append({**spread, "mode": "train", "top_k": 0, "steps": 1, "save": str(folder / "first"), "save_at": 0})
    wishes.append({**spread, "mode": "full disk", "save": str(folder / "new")})
    wishes.append({**spread, "mode": "damaged", "load": str(folder / "damaged")})
    return folder, run_ranks("rank_checkpoint.py", 2, folder, {"wishes": wishes})


@pytest.mark.parametrize(("world_size", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 3]), (4, [1, 2, 4])])
def test_another_number_of_ranks_or_another_zero_stage_goes_on_with_the_same_losses(
    two_ranks: tuple[Path, list[Any]], world_size: int, sizes: list[int], tmp_path: Path
) -> None:
    folder, whole = two_ranks
    tried = [
        (name, size, zero)
        for name, size, zero in product(SAVES, sizes, (0, 1, 2))
        if size == sizes[-1] or zero == SAVES[name].get("zero", 0)
    ]
    wishes = [
        {**SAVES[name], "mode": "train", "expert_parallel_size": size, "steps": STEPS, "load": str(folder / name)}
        | {"zero": zero}
        for name, size, zero in tried
    ]
    resumed = run_ranks("rank_checkpoint.py", world_size, tmp_path, {"wishes": wishes})
    for (name, size, zero), wish, answer in zip(tried, wishes, resumed, strict=True):
        expected = whole[list(SAVES).index(name)]
        assert answer["losses"] == pytest.approx(expected["losses"][SAVE_AT:], abs=1e-6, rel=0), wish
        assert answer["names"] == expected["names"]
        if (world_size, size, zero) == (2, 2, SAVES[name].get("zero", 0)):
            assert answer["digest"] == expected["digest"], "the same topology must go on to the last bit"
            assert answer["losses"] == expected["losses"][SAVE_AT:]


def test_the_files_do_not_depend_on_who_wrote_them(two_ranks: tuple[Path, list[Any]], tmp_path: Path) -> None:
    alone = make_student(small_shape(0, **DEEP), EXPERTS, for_training=False)
    PendingCheckpoint(tmp_path / "alone", alone, {}, {"step": 0, "phase": 1}, {}).publish()
    first, second = (
        {p.name: p.read_bytes() for p in f.iterdir()} for f in (tmp_path / "alone", two_ranks[0] / "first")
    )
    assert sorted(first) == [
        "dense.safetensors",
        "index.json",
        *(f"mixture-{mixture}-expert-000{expert}.safetensors" for mixture in (0, 1) for expert in range(5)),
    ]
    assert sorted(second) == sorted(first)
    for name, data in first.items():
        assert second[name] == data, name


def test_a_rank_that_cannot_write_stops_all_ranks_and_leaves_nothing(two_ranks: tuple[Path, list[Any]]) -> None:
    folder, answers = two_ranks
    raised = answers[-2]
    assert [kind for kind, _, _ in raised] == ["OSError", "OSError"]
    assert raised[0][1] == raised[1][1] is not None
    assert not (folder / "new").exists()
    assert not list(folder.glob(".new.*"))


def test_a_rank_that_cannot_read_stops_all_ranks(two_ranks: tuple[Path, list[Any]]) -> None:
    raised = two_ranks[1][-1]
    assert [kind for kind, _, _ in raised] == ["UserError", "UserError"]
    assert "mixture-0-expert-0001.safetensors is damaged" in raised[0][2]


def saved(folder: Path) -> tuple[Path, Student]:
    student = make_student(small_shape(0), [[0, 1], [2]], for_training=False)
    PendingCheckpoint(folder / "one", student, {}, {"step": 7, "phase": 2}, {}).publish()
    return folder / "one", student


def test_one_process_reads_back_what_it_wrote(tmp_path: Path) -> None:
    folder, student = saved(tmp_path)
    other = Student(student.shape, student.experts_by_stage, seed=99, for_training=False)
    assert load_checkpoint(folder, other) == ({"step": 7, "phase": 2}, {}, {})
    for name, tensor in student.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_damage_is_named(tmp_path: Path) -> None:
    folder, student = saved(tmp_path)
    changed = shutil.copytree(folder, tmp_path / "missing")
    (changed / "mixture-0-expert-0002.safetensors").unlink()
    with pytest.raises(UserError, match=r"mixture-0-expert-0002\.safetensors is missing"):
        load_checkpoint(changed, student)
    changed = shutil.copytree(folder, tmp_path / "short")
    whole = (changed / "dense.safetensors").read_bytes()
    (changed / "dense.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"dense\.safetensors is damaged"):
        load_checkpoint(changed, student)
    for key, value, expected in (
        ("schema_version", 99, "schema_version 99"),
        ("experts_by_stage", [[0, 1, 2]], "another student"),
        ("shape", {**student.shape.model_dump(), "width": 99}, "another student"),
        ("files", {}, r"dense\.safetensors is damaged"),
    ):
        index = json.loads((folder / "index.json").read_text())
        index[key] = value
        changed = shutil.copytree(folder, tmp_path / f"wrong-{key}")
        (changed / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=expected):
            load_checkpoint(changed, student)
    with pytest.raises(UserError, match=r"index\.json is missing"):
        load_checkpoint(tmp_path / "nowhere", student)


NEW = "mixture-0-expert-0002.safetensors"


def moves(student: Student) -> None:
    """A gradient step in which the newest expert alone learns."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(expert_of(name) == 2)
        if parameter.requires_grad:
            parameter.data.add_(1.0)


def publish(folder: Path, student: Student, before: Path | None = None) -> None:
    state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    save_student(folder, StudentParts(state, student.shape, student.experts_by_stage, {}, {}, OneHotSettings()), before)


@pytest.fixture
def chain(tmp_path: Path) -> tuple[Path, Student]:
    """A published student, two checkpoints of a stage that goes on from it, and the student that it ends with."""
    student = make_student(small_shape(0), [[0, 1], [2]], for_training=False)
    publish(tmp_path / "before", student)
    for name in ("first", "second"):
        moves(student)
        lists = [tmp_path / "before" / JSON_FILE, tmp_path / "first" / INDEX_FILE]
        PendingCheckpoint(tmp_path / name, student, {}, {"step": 7}, {}, lists).publish()
    moves(student)
    publish(tmp_path / "after", student, tmp_path / "before")
    return tmp_path, student


def files_in(folder: Path) -> dict[str, int]:
    """Name -> inode."""
    return {path.name: path.stat().st_ino for path in folder.glob("*.safetensors")}


def test_only_what_moved_is_written(chain: tuple[Path, Student]) -> None:
    folder, _ = chain
    seen: set[int] = set()
    written = []
    for name in ("before", "first", "second", "after"):
        files = files_in(folder / name)
        written.append({file for file, inode in files.items() if inode not in seen})
        seen.update(files.values())
    experts = {f"mixture-0-expert-000{expert}.safetensors" for expert in range(3)}
    # all that belongs to no expert is in one file, which is another for a checkpoint than for a published student
    assert written == [{"model.safetensors", *experts}, {"dense.safetensors", NEW}, {NEW}, {NEW}]


@pytest.mark.parametrize("gone", ["before", "first"])
def test_what_is_shared_outlives_those_who_wrote_it(chain: tuple[Path, Student], gone: str) -> None:
    folder, student = chain
    shutil.rmtree(folder / gone)
    other = Student(student.shape, student.experts_by_stage, seed=99, for_training=False)
    load_checkpoint(folder / "second", other)
    published = load_student_parts(folder / "after").state
    for name, tensor in student.state_dict().items():
        assert torch.equal(published[name], tensor)
        assert torch.equal(other.state_dict()[name], tensor) == (expert_of(name) != 2)  # it moved once more


def test_a_damaged_file_is_found_by_all_who_share_it_and_named(chain: tuple[Path, Student]) -> None:
    folder, student = chain
    with open(folder / "before" / "mixture-0-expert-0001.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x00\x01\x02\x03")
    for name in ("first", "second"):
        with pytest.raises(UserError, match=rf"{name}/mixture-0-expert-0001\.safetensors is damaged"):
            load_checkpoint(folder / name, student)
    for name in ("before", "after"):
        with pytest.raises(UserError, match=rf"{name}/mixture-0-expert-0001\.safetensors is damaged"):
            load_student_parts(folder / name)


def test_where_nothing_can_be_linked_everything_is_written(
    chain: tuple[Path, Student], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, student = chain

    def refuse(*paths: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("hpc_cpd.student.checkpoint.os.link", refuse)
    publish(folder / "elsewhere", student, folder / "before")
    linked, written = files_in(folder / "after"), files_in(folder / "elsewhere")
    assert linked.keys() == written.keys() and not set(linked.values()) & set(written.values())
    for name in linked:
        assert (folder / "after" / name).read_bytes() == (folder / "elsewhere" / name).read_bytes()
