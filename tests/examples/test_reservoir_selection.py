"""A selection from outside is found by its name, keeps to the budget and follows from the seed."""

import subprocess
import sys
from pathlib import Path

from tests.examples.installed import installed

CHOSEN = """
import sys
from pathlib import Path
import numpy as np
from hpc_cpd.errors import UserError
from hpc_cpd.settings import Choice
from hpc_cpd.trajectories.store import open_trajectories
from hpc_cpd.trajectories.memory import select_memory
from tests.trajectories.recorded import TASK, make_episode, write_folder

choice = Choice("selections", "dpp")
folder = Path(sys.argv[1])
store = open_trajectories(write_folder(folder, [make_episode(n, 4 + n % 3) for n in range(40)]))

def kept(settings, seed):
    memory = select_memory(store, TASK, np.ones(40), 0.25, choice.resolve(settings), seed)
    assert sum(map(len, memory.episodes)) <= memory.record["budget_steps"] == 49
    return [episode.index for episode in memory.episodes]

assert kept("reservoir", 1) == kept("reservoir", 1) != kept("reservoir", 2)
assert len(kept({"name": "reservoir", "slots": 3}, 1)) == 3
often = np.zeros(40)
for seed in range(600):
    often[kept({"name": "reservoir", "slots": 3}, seed)] += 1
assert often.min() > 20 and often.max() < 80, often  # 45 expected, by whoever came first or last
try:
    choice.resolve({"name": "reservoir", "slots": 0})
except UserError as error:
    assert "method.memory.selection.slots" in str(error)
else:
    raise AssertionError
"""
ROOT = Path(__file__).parents[2]


def test_it_chooses_for_a_replay_memory(tmp_path):
    environment = installed(tmp_path / "site", "reservoir_selection")
    words = [sys.executable, "-c", CHOSEN, str(tmp_path / "trajectories")]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
