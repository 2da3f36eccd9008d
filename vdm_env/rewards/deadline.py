"""An end to an HTTP request that does not depend on the server.

A socket's time-out starts anew with every byte, so that a server which sends one now and then holds a request for
ever, in the headers as in the body. Here a clock beside the request shuts its sockets down.
"""

from __future__ import annotations

import http.client
import socket
import threading
import urllib.request
from types import TracebackType
from typing import Any


class Deadline:
    """As a context: connections opened by `open` are shut down after that many seconds; `passed` says so.

    Whatever reads from or writes to them then gets an error or the end of the stream.
    """

    def __init__(self, seconds: float) -> None:
        self.passed = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._clock = threading.Timer(seconds, self._end)
        self._clock.daemon = True

    def __enter__(self) -> Deadline:
        self._clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clock.cancel()

    def open(self, message: urllib.request.Request, timeout_s: float) -> Any:
        """`urllib.request.urlopen`, watched; `timeout_s` is that of each operation on the socket."""
        opener = urllib.request.build_opener(_Http(self), _Https(self))
        return opener.open(message, timeout=timeout_s)

    def watch(self, connection: socket.socket) -> None:
        """Puts a socket under the deadline."""
        with self._lock:
            self._sockets.append(connection)
            if self.passed:
                _shut(connection)

    def _end(self) -> None:
        with self._lock:
            self.passed = True
            for connection in self._sockets:
                _shut(connection)


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is closed already


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def http_open(self, req: urllib.request.Request) -> Any:
        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            return _watched(http.client.HTTPConnection(host, **options), self._deadline)

        return self.do_open(connection, req)  # type: ignore[arg-type]


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def https_open(self, req: urllib.request.Request) -> Any:
        def connection(host: str, **options: Any) -> http.client.HTTPConnection:
            return _watched(http.client.HTTPSConnection(host, **options), self._deadline)

        return self.do_open(connection, req)  # type: ignore[arg-type]


def _watched(connection: http.client.HTTPConnection, deadline: Deadline) -> http.client.HTTPConnection:
    """The connection, whose socket comes under the deadline as soon as there is one."""
    connect = connection.connect

    def connect_and_watch() -> None:
        connect()
        deadline.watch(connection.sock)

    connection.connect = connect_and_watch  # type: ignore[method-assign]
    return connection
