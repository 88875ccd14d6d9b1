"""What a head must offer: the features of the newest observation in, the mean of the action out."""

from __future__ import annotations

from typing import Protocol

from hpc_cpd.student.network import Part


class Head(Part, Protocol):
    """The plug-in of kind ``student.head``; its `build` returns a module.

    The module turns features float [n, width] into actions [n, act].
    """
