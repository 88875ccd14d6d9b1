"""The tensors of a student of schema version 2, and what they are called since version 3.

Their values, and their order in ``student.parameters()``, stayed as they were.
"""

from __future__ import annotations

import re

RENAMED = {
    r"(observation_mean|observation_std|embed_observation|embed_task)\b": "tokenizer.",
    r"(blocks|norms_features)\.": "backbone.",
    r"(norm_head|head)\.": "head.",
}
"""Beginning of an old name -> what stands before it in the new one. Names of mixtures and experts are the same."""


def new_name(old: str) -> str:
    """The name since version 3 of the tensor `old` of a student of version 2."""
    for beginning, part in RENAMED.items():
        if re.match(beginning, old):
            return part + old
    return old
