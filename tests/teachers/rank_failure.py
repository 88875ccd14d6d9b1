"""What a rank of test_actors runs: one rank fails while the others wait for it."""

from __future__ import annotations

import sys

from hpc_cpd.errors import UserError, run_command
from hpc_cpd.teachers.actors import open_communicator


def main() -> None:
    kind, ranks = sys.argv[1], int(sys.argv[2])
    with open_communicator(ranks) as communicator:
        if kind == "agreed":

            def fail() -> None:
                raise UserError("rank 0 cannot read the file")

            communicator.on_root(fail)
        if communicator.rank == 1:
            raise {"mistake": UserError("rank 1 cannot go on"), "fault": RuntimeError("rank 1 broke")}[kind]
        communicator.any(False)


if __name__ == "__main__":
    sys.exit(run_command(main))
