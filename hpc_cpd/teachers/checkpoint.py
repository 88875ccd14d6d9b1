"""The unfinished teacher on disk: plain tensors and JSON, the newest two kept.

Each checkpoint is a folder of its own name, made by one rename, and an older one goes only when the newer
stands: whenever the power fails, a whole checkpoint is there.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from hpc_cpd.errors import UserError
from hpc_cpd.run.publish import atomic_folder, read_json, sha256, write_bytes, write_json

SCHEMA_VERSION = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"
_NAME = re.compile(r"\d{10}")
_KEPT = 2


@dataclass
class Checkpoint:
    """`tensors` by name, and `state`, plain JSON values."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write ``folder/STEP`` and remove all but the newest two."""
    target = folder / f"{step:010d}"
    with atomic_folder(target) as temporary:
        tensors = {name: value.detach().clone().contiguous() for name, value in checkpoint.tensors.items()}
        write_bytes(temporary / TENSORS, save(tensors))
        state = {"schema_version": SCHEMA_VERSION, "sha256": sha256(temporary / TENSORS), **checkpoint.state}
        write_json(temporary / STATE, state)
    for old in _checkpoints(folder)[:-_KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint; a damaged one is reported and passed over. None: there is none."""
    for path in reversed(_checkpoints(folder)):
        try:
            state = read_json(path / STATE)
            if state.get("schema_version") != SCHEMA_VERSION:
                raise UserError(f"it has schema_version {state.get('schema_version')}, not {SCHEMA_VERSION}")
            data = (path / TENSORS).read_bytes()
            if sha256(path / TENSORS) != state["sha256"]:
                raise UserError("its weights are damaged")
            return Checkpoint(load(data), state)
        except (UserError, OSError, SafetensorError, AttributeError, KeyError) as error:
            print(f"warning: {path} is passed over: {error}", file=sys.stderr, flush=True)
    return None


def adam_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Adam's moments and step counts as tensors named after the parameters of `module`."""
    return {
        f"{name}/{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_adam(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a fresh Adam the moments that `adam_tensors` took."""
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        optimizer.state[parameters[name]][moment] = value.clone()


def _checkpoints(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
