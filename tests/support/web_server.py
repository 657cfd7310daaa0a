"""A small web server in a thread, for tests of clients."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple


class WebRequest(NamedTuple):
    """A request that the server received."""

    path: str
    headers: Mapping[str, str]
    body: bytes


@contextlib.contextmanager
def web_server(respond: Callable[[WebRequest], tuple[int, bytes]]) -> Iterator[int]:
    """Runs a server on a free port of the loopback address; yields the port.

    Args:
        respond: Called with each GET or POST request; returns the status and the body of the response.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = respond(WebRequest(self.path, self.headers, body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            """Keeps requests out of the output of the tests."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
