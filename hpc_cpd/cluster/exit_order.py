"""In which order the ranks on this machine ended.

A rank that dies takes the others along within a millisecond: mpiexec kills them, and may then name one of these. So
each rank holds a connection to its launcher as a high file descriptor. Linux (4.3 or later) closes the descriptors of
an ending process from the highest down, thus this one before those by which mpiexec hears of the end; and epoll hands
events out in the order in which they came.
"""

from __future__ import annotations

import fcntl
import resource
import select
import socket
import struct

HIGH = 1000  # a descriptor above those in use


class Lifelines:
    """The launcher's side; `address` is what the ranks need for `hold_lifeline`."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("")  # Linux chooses an address that is no file
        self._listener.listen()
        self._listener.setblocking(False)
        self.address: str = self._listener.getsockname()[1:].decode()
        self._epoll = select.epoll()
        self._held: dict[int, tuple[socket.socket, int]] = {}

    def ended(self) -> list[int]:
        """The process ids of the holders that have ended since the last call, in the order of their ends."""
        while True:
            try:
                line = self._listener.accept()[0]
            except BlockingIOError:
                break
            pid = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            self._held[line.fileno()] = line, pid
            self._epoll.register(line, 0)  # a hang-up is always told
        gone = [self._held.pop(descriptor) for descriptor, _ in self._epoll.poll(0)]
        for line, _ in gone:
            line.close()
        return [pid for _, pid in gone]


def hold_lifeline(address: str) -> None:
    """Hold a connection until this process ends."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(b"\0" + address.encode())
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        fcntl.fcntl(line, fcntl.F_DUPFD_CLOEXEC, HIGH if limit == resource.RLIM_INFINITY else min(HIGH, limit - 1))
