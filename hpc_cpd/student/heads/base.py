"""What a head must offer: the features of the newest observation in, the mean of the action out.

A plug-in of kind ``student.head`` is any object with ``Settings`` and ``build``, a module's class for example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Generator, nn

    from hpc_cpd.settings import PluginSettings
    from hpc_cpd.student.network import StudentShape


class Head(Protocol):
    """The plug-in."""

    Settings: type[PluginSettings]

    @staticmethod
    def build(settings: Any, shape: StudentShape, generator: Generator) -> nn.Module:
        """A module that turns features float [n, width] into actions [n, act].

        Every random number must come from `generator`: all ranks then begin alike.
        """
