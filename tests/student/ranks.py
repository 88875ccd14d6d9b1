"""Starting real ranks as processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.rank_environments import rank_environments

HERE = Path(__file__).parent


def run_ranks(script: str, world_size: int, folder: Path, arguments: dict[str, Any], seconds: float = 300.0) -> Any:
    """Run ``tests/student/SCRIPT`` on `world_size` ranks; return the JSON that rank 0 wrote to the path in argv[2].

    Fails with everything the ranks printed when one of them does not end well in time.
    """
    environments = rank_environments(world_size)
    port = environments[0]["MASTER_PORT"]
    answer = folder / f"answer-{port}.json"
    ranks, logs = [], []
    for rank, environment in enumerate(environments):
        log = folder / f"rank-{port}-{rank}.log"
        logs.append(log)
        with open(log, "w") as output:
            command = [sys.executable, str(HERE / script), json.dumps(arguments), str(answer)]
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + seconds
    try:
        for process in ranks:
            process.wait(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in ranks:
            process.kill()
    codes = [process.wait() for process in ranks]
    assert codes == [0] * world_size, f"exit codes {codes}\n" + "\n".join(log.read_text() for log in logs)
    return json.loads(answer.read_text())
