"""Exit codes, and the errors that are the user's to mend rather than ours.

A :class:`UserError` is one clear sentence: it names the file or the key, what was expected and what to
do. Commands print it without a traceback and leave with exit code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER_ERROR = 2
EXIT_STOPPED = 3

_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full; free some space, then run the same command again",
    errno.EDQUOT: "the disk quota is used up; free some space, then run the same command again",
    errno.EROFS: "the file system is read-only{elsewhere}",
    errno.EACCES: "permission was refused; you need the right to write there{elsewhere}",
    errno.EPERM: "permission was refused; you need the right to write there{elsewhere}",
}


class UserError(Exception):
    """A mistake the user can mend: the message is the one sentence shown, and the exit code is 2."""


class StopRequested(Exception):
    """Work remains, a checkpoint is on disk, and the job was asked to stop: the exit code is 3."""


class LockLost(Exception):
    """Another process has taken this one's work over. The message says who, and that nothing was written.

    No mistake of the user's, and nothing to go on with: the process must end and leave the work to the other.
    """


class RankLost(Exception):
    """Ranks of this job no longer answer. The message names them; `ranks` are their numbers."""

    def __init__(self, sentence: str, ranks: list[int]) -> None:
        super().__init__(sentence)
        self.ranks = ranks


def disk_error_sentence(error: BaseException, folder_option: str | None = "--run") -> str | None:
    """Return one sentence when `error` says that the disk refused a write, else None.

    `folder_option`: the option of the command that names the folder it writes to; None: it has no such option.
    HDF5 and safetensors wrap the operating system's number in text, so the text is searched as well.
    """
    number = getattr(error, "errno", None)
    if number not in _DISK_ERRORS:
        text = str(error)
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            return None
        number = next((n for n in _DISK_ERRORS if os.strerror(n) in text or f"errno = {n}," in text), None)
    if number is None:
        return None
    name = getattr(error, "filename", None)
    elsewhere = f"; choose another folder with {folder_option}" if folder_option else ""
    return f"cannot write {name or 'to the run folder'}: {_DISK_ERRORS[number].format(elsewhere=elsewhere)}"


def sentence_of(error: BaseException, folder_option: str | None = "--run") -> str | None:
    """The one sentence that a person is shown in place of a traceback; None: `error` is a fault of ours.

    `folder_option`: as in :func:`disk_error_sentence`.
    """
    if isinstance(error, UserError | StopRequested | LockLost | RankLost):
        return str(error)
    return disk_error_sentence(error, folder_option)


def run_command(main: Callable[[], int | None], folder_option: str | None = "--run") -> int:
    """Run `main` and turn what it raises into the exit codes of the public interface (0, 2, 3; 1 by traceback).

    `folder_option`: as in :func:`disk_error_sentence`.
    """
    endings: dict[type[Exception], tuple[str, int]] = {
        StopRequested: ("stopped", EXIT_STOPPED),
        LockLost: ("taken over", EXIT_FAULT),
        RankLost: ("lost", EXIT_FAULT),
    }
    try:
        return main() or EXIT_DONE
    except Exception as error:
        sentence = sentence_of(error, folder_option)
        if sentence is None:
            raise
        word, code = endings.get(type(error), ("error", EXIT_USER_ERROR))
        print(f"{word}: {sentence}", file=sys.stderr, flush=True)
        return code


def explain_missing(error: ModuleNotFoundError) -> NoReturn:
    """Leave with one sentence when Python has not what the package needs. Raises `error` if a module of ours is it."""
    if error.name is None or error.name.partition(".")[0] == "hpc_cpd":
        raise error
    print(
        f"error: {sys.executable} has no package '{error.name}'; run this with .venv/bin/python, "
        "which 'make setup' makes, or install hpc_cpd with pip",
        file=sys.stderr,
    )
    sys.exit(EXIT_USER_ERROR)
