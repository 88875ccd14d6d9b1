"""Canonical checkpoints: one tensor per parameter and per expert, nothing that depends on the number of ranks.

    FOLDER/dense.safetensors                    everything outside the experts, written by rank 0
    FOLDER/mixture-0-expert-0007.safetensors    one expert, written by the rank of the first group that holds it
    FOLDER/index.json                           sizes, position and the SHA-256 of each file, written last

Keys are parameter names; the optimizer's state of a parameter stands beside it as ``NAME|exp_avg`` and so on.

A file never changes once it is there: what a checkpoint before, or the student that the stage began with, has already
is not written again but linked. A copy of a run that keeps no hard links has files of its own instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch import distributed as dist

from hpc_cpd.distributed.torch import gather, run_on_all_ranks, run_on_rank
from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import atomic_folder, read_json, write_json
from hpc_cpd.student.moe.mixture import this_rank
from hpc_cpd.student.network import Student, expert_of, expert_place

CHECKPOINT_SCHEMA_VERSION = 3
METHOD_PREFIX = "method:"
DENSE_FILE = "dense.safetensors"
INDEX_FILE = "index.json"
_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}
_TYPES |= {torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
AGAIN = "delete its folder and run the command that makes it again"
Tensors = Mapping[str, Tensor]
Moments = Mapping[str, Tensors]
"""Parameter name -> MOMENTS: AdamW's state of the parameters that this rank holds and that learn."""


@dataclass(frozen=True)
class MethodState:
    """What the method called `method` keeps from stage to stage; only that knows what the tensors mean."""

    method: str
    tensors: dict[str, Tensor]


class PendingCheckpoint:
    """A checkpoint whose files are being written by a thread of every rank, while training goes on."""

    def __init__(
        self,
        folder: Path,
        student: Student,
        moments: Moments,
        position: Mapping[str, Any],
        method_state: Tensors,
        earlier: Iterable[Path] = (),
    ) -> None:
        """Copy what moves of `student`, its optimizer's `moments`, `position` (plain JSON) and the method's state.

        Begin to write the files that the checkpoints and students whose lists are `earlier` (`write_tensors`) do not
        have. A collective.
        """
        self.folder = folder
        self._stack = ExitStack()
        self._temporary = Path(run_on_rank(lambda: str(self._stack.enter_context(atomic_folder(folder)))))
        self._index = {
            "schema_version": CHECKPOINT_SCHEMA_VERSION,
            "shape": student.shape.model_dump(),
            "experts_by_stage": student.experts_by_stage,
            "position": dict(position),
        }
        files = _files_of(student, moments, method_state)
        writer = ThreadPoolExecutor(1, "checkpoint")
        self._written = writer.submit(write_tensors, self._temporary, files, tuple(earlier))
        writer.shutdown(wait=False)

    def written(self) -> bool:
        """Whether this rank's files are on the disk, or cannot be written."""
        return self._written.done()

    def publish(self) -> None:
        """Wait for the files of all ranks and let `folder` appear, whole. A collective.

        When any rank cannot write, every rank raises and nothing is left.
        """
        with self._stack as stack:
            mine = run_on_all_ranks(self._written.result)
            hashes = {name: digest for part in gather(mine) for name, digest in part.items()}
            index = {**self._index, "files": dict(sorted(hashes.items()))}
            run_on_rank(lambda: write_json(self._temporary / INDEX_FILE, index))
            run_on_rank(stack.pop_all().close)  # rank 0 fsyncs and renames; the others see it published


def load_checkpoint(folder: Path, student: Student) -> tuple[dict[str, Any], Moments, dict[str, Tensor]]:
    """Load into `student`, on any number of ranks; return position, moments and the method's state. A collective.

    Raises UserError on every rank when the checkpoint is damaged, has another schema, or holds another student.
    """
    return run_on_all_ranks(lambda: _load(folder, student))


def gather_state(student: Student) -> dict[str, Tensor]:
    """The canonical state on the CPU, complete on every rank. A collective when the experts are spread over ranks."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in student.state_dict().items()}
    mine = [(name, tensor.shape) for name, tensor in state.items() if expert_of(name) is not None]
    layout = gather(mine) if student.expert_parallel_size > 1 else []
    device = next(student.parameters()).device
    for owner, names in enumerate(layout[: student.expert_parallel_size]):
        if names:
            sizes = [shape.numel() for _, shape in names]
            flat = torch.empty(sum(sizes), device=device)
            if dist.get_rank() == owner:
                flat.copy_(torch.cat([state[name].flatten() for name, _ in names]))
            dist.broadcast(flat, src=owner)
            for (name, shape), values in zip(names, flat.cpu().split(sizes), strict=True):
                state[name] = values.view(shape).clone()
    return dict(sorted(state.items()))


def gather_method_state(tensors: Tensors) -> dict[str, Tensor]:
    """A method's state on the CPU, with what belongs to the experts of all ranks, on every rank. A collective."""
    mine = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    spread = {key: tensor for key, tensor in mine.items() if expert_of(_parameter_of(key)) is not None}
    return dict(sorted((mine | {key: tensor for part in gather(spread) for key, tensor in part.items()}).items()))


def of_this_rank(tensors: Tensors, expert_parallel_size: int) -> dict[str, Tensor]:
    """A method's state without what belongs to experts that live on other ranks."""
    experts = {key: expert_of(_parameter_of(key)) for key in tensors}
    elsewhere = {key for key, e in experts.items() if e is not None and (e - this_rank()) % expert_parallel_size}
    return {key: tensor for key, tensor in tensors.items() if key not in elsewhere}


def _parameter_of(key: str) -> str:
    # of a key of a method's state that belongs to no parameter: "", which lives on every rank like shared ones
    return key.partition("|")[0] if "|" in key else ""


def file_of(name: str, dense: str = DENSE_FILE) -> str:
    """The file that a parameter of the student is in; `dense`: that of all which belong to no expert."""
    place = expert_place(name)
    return dense if place is None else f"mixture-{place[0]}-expert-{place[1]:04d}.safetensors"


def _files_of(student: Student, moments: Moments, method_state: Tensors) -> dict[str, dict[str, Tensor]]:
    """What this rank has to write: dense things on rank 0, experts in the first group that holds them.

    Copies, but of what is frozen: that stays as it is until the checkpoint is published.
    """
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    found = [(name, name, tensor) for name, tensor in student.state_dict().items()]
    found += [(name, f"{name}|{key}", value) for name, _, _ in found for key, value in moments.get(name, {}).items()]
    found += [(_parameter_of(key), METHOD_PREFIX + key, tensor) for key, tensor in method_state.items()]
    files: dict[str, dict[str, Tensor]] = {}
    for name, key, tensor in found:
        if this_rank() < (student.expert_parallel_size if expert_of(name) is not None else 1):
            files.setdefault(file_of(name), {})[key] = tensor.detach().to("cpu", copy=key not in frozen).contiguous()
    return files


def write_tensors(folder: Path, files: Mapping[str, Tensors], earlier: Iterable[Path]) -> dict[str, str]:
    """Write `files` of CPU tensors in the format of safetensors and fsync; return each file's SHA-256.

    A file that one of the folders has whose lists (JSON with ``files``) are `earlier`, by the SHA-256 in that list, is
    linked; where that cannot be (another file system, too many links), it is written.
    """
    there: dict[str, Path] = {}
    for path in earlier:
        with suppress(UserError):  # rank 0 may have removed an older checkpoint meanwhile
            there |= {digest: path.parent / name for name, digest in read_json(path)["files"].items()}
    hashes = {}
    for name, tensors in files.items():
        digest = hashlib.sha256()
        for piece in _pieces(tensors):
            digest.update(piece)
        hashes[name] = digest.hexdigest()
        with suppress(KeyError, OSError):
            os.link(there[hashes[name]], folder / name)
            continue
        try:
            with open(folder / name, "xb") as file:
                file.writelines(_pieces(tensors))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder / name)) from None
    return hashes


def _pieces(tensors: Tensors) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: the length of the header, the header, the contiguous CPU tensors.

    Piece by piece: safetensors' own `save` copies everything twice, and no other thread runs meanwhile. Sorted so that
    each tensor is aligned, and the same tensors give the same bytes.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in ordered.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in ordered.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data


def read_description(path: Path, version: int, keys: Iterable[str], remedy: str) -> dict[str, Any]:
    """The JSON object that describes a published folder, which has these `keys`.

    Raises UserError when it is missing, of another schema `version` (for which there is a `remedy`), or damaged.
    """
    found = read_json(path)
    given = found.get("schema_version") if isinstance(found, dict) else None
    if given != version:
        raise UserError(f"{path} has schema_version {given}, but this version of hpc_cpd reads {version}; {remedy}")
    if missing := [key for key in keys if key not in found]:
        raise UserError(f"{path} is damaged: it lacks {', '.join(missing)}; {AGAIN}")
    return dict(found)


def read_tensors(path: Path, expected_sha256: str | None) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose SHA-256 must be the expected one. Raises UserError naming the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {AGAIN}") from None
    damaged = f"{path} is damaged (%s); {AGAIN}"
    if hashlib.sha256(data).hexdigest() != expected_sha256:
        raise UserError(damaged % "its SHA-256 is not the recorded one")
    try:
        # load() returns views of one buffer at any offset; copies are aligned alike on every run
        return {key: value.clone() for key, value in safetensors.torch.load(data).items()}
    except SafetensorError as error:
        raise UserError(damaged % error) from None


def _load(folder: Path, student: Student) -> tuple[dict[str, Any], Moments, dict[str, Tensor]]:
    path, keys = folder / INDEX_FILE, ("shape", "experts_by_stage", "position", "files")
    index = read_description(path, CHECKPOINT_SCHEMA_VERSION, keys, "delete the checkpoint to start the stage again")
    if not isinstance(index["position"], dict):
        raise UserError(f"{path} is damaged: its position is not an object; delete the checkpoint")
    for what, wanted in (("shape", student.shape.model_dump()), ("experts_by_stage", student.experts_by_stage)):
        if index[what] != wanted:
            raise UserError(f"{path} holds another student: its {what} is {index[what]}, wanted {wanted}")
    tensors: dict[str, Tensor] = {}
    for name in sorted({file_of(name) for name in student.state_dict()}):
        tensors |= read_tensors(folder / name, index["files"].get(name))
    try:
        student.load_canonical(tensors)
    except ValueError as error:
        raise UserError(f"{folder} does not hold this student: {error}") from None
    moments = {
        name: {moment: tensors[f"{name}|{moment}"] for moment in MOMENTS}
        for name, _ in student.named_parameters()
        if f"{name}|{MOMENTS[0]}" in tensors
    }
    kept = {key.removeprefix(METHOD_PREFIX): t for key, t in tensors.items() if key.startswith(METHOD_PREFIX)}
    return index["position"], moments, kept
