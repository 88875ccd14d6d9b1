"""The unfinished teacher on disk: plain tensors and JSON, the newest two kept.

Each checkpoint is a folder of its own name, made by one rename, and an older one goes only when the newer
stands: whenever the power fails, a whole checkpoint is there.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
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


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` and `state` (plain JSON values) to ``folder/STEP`` and remove all but the newest two."""
    with atomic_folder(folder / f"{step:010d}") as temporary:
        write_bytes(temporary / TENSORS, save({name: x.detach().clone().contiguous() for name, x in tensors.items()}))
        digest = sha256(temporary / TENSORS)
        write_json(temporary / STATE, {"schema_version": SCHEMA_VERSION, "sha256": digest, **state})
    for old in _checkpoints(folder)[:-2]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of the newest whole checkpoint; a damaged one is reported and passed over. None: none."""
    for path in reversed(_checkpoints(folder)):
        try:
            state = read_json(path / STATE)
            if state.get("schema_version") != SCHEMA_VERSION:
                raise UserError(f"it has schema_version {state.get('schema_version')}, not {SCHEMA_VERSION}")
            if sha256(path / TENSORS) != state["sha256"]:
                raise UserError("its weights are damaged")
            return load((path / TENSORS).read_bytes()), state
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
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        optimizer.state[module.get_parameter(name)][moment] = value.clone()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("[0-9]" * 10))
