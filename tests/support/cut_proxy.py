"""A TCP proxy that can be cut and restored: what a client sees when a network, or what is behind it, goes and comes."""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

PIECE_BYTES = 65536


class CutProxy:
    """Passes bytes both ways between its clients and one server, until it is cut.

    Args:
        target: URL of the server.
    """

    def __init__(self, target: str) -> None:
        self._target = (str(urlsplit(target).hostname), int(urlsplit(target).port or 0))
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._is_cut = self._is_closed = False
        self.num_refused = 0
        self._server = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection, and every new one, from now on."""
        with self._lock:
            self._is_cut = True
            for connection in self._connections:
                _reset(connection)
            self._connections.clear()

    def restore(self) -> None:
        """Let connections through again."""
        with self._lock:
            self._is_cut = False

    def close(self) -> None:
        """End it."""
        self._is_closed = True
        self.cut()
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with self._lock:
                if self._is_cut:
                    self.num_refused += 1
                    _reset(client)
                    continue
                try:
                    server = socket.create_connection(self._target, timeout=5)
                except OSError:
                    _reset(client)
                    continue
                server.settimeout(None)
                self._connections |= {client, server}
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(PIECE_BYTES):
                sink.sendall(piece)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


def _reset(connection: socket.socket) -> None:
    """End a connection as if the other side were gone."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextlib.contextmanager
def cut_proxy(target: str) -> Iterator[CutProxy]:
    """A proxy for the time of a test."""
    proxy = CutProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
