"""The tensors of a student of schema version 2, and what they are called since version 3.

Their values, and their order in ``student.parameters()``, stayed as they were.
"""

from __future__ import annotations

import re

RENAMED = {
    r"(observation_mean|observation_std|embed_observation|embed_task)\b": r"tokenizer.\1",
    r"(blocks|norms_features)\.": r"backbone.\1.",
    r"norm_head\.": r"backbone.final_norm.",
}
"""Beginning of an old name -> that of the new one. Names of the head, of mixtures and of experts are the same."""


def new_name(old: str) -> str:
    """The name since version 3 of the tensor `old` of a student of version 2."""
    for before, after in RENAMED.items():
        if re.match(before, old):
            return re.sub(before, after, old, count=1)
    return old
