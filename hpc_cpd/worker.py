"""What every rank of a job runs.

python -m hpc_cpd.worker teacher --run DIR --task ID              train a teacher, then record its trajectories
python -m hpc_cpd.worker teacher --run DIR --index N --plan FILE  the same, as element N of an array of jobs
python -m hpc_cpd.worker stage --run DIR --stage K                learn stage K
"""

from __future__ import annotations

import sys

from hpc_cpd.cluster.worker import main
from hpc_cpd.run.paths import Run


def build_report(run: Run) -> None:
    """The report after a stage that a job of its own has published."""
    from hpc_cpd.report import page

    page.build_report(run)


if __name__ == "__main__":
    sys.exit(main(after_stage=build_report))
