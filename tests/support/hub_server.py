"""A server that mimics the Hugging Face Hub: downloads, with the headers that huggingface_hub reads.

with HubServer() as hub:
    hub.add("owner/name", {"config.json": b"{}"})
    subprocess.run(..., env=hub.environment(tmp_path))
"""

import hashlib
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_the_token_of_these_tests"


class HubServer:
    """Repositories in memory, served on a free port of the loopback address."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}  # (repository, revision) -> contents by file name
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.is_failing = False
        self.requests: list[tuple[str, str]] = []  # (method, path) of the requests for files of repositories
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn_url = f"http://localhost:{self._server.server_port}"  # a different host name

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, files: dict[str, bytes] | Path, *, revision: str = "main") -> None:
        """Publishes files, or those of a directory, as a revision, which is also available by its commit."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        self.files[repository, revision] = self.files[repository, commit(revision)] = files

    def environment(self, cache_dir: Path) -> dict[str, str]:
        """Returns environment variables for a process that uses this hub, with its own cache and without a login."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**inherited, "HF_ENDPOINT": self.url, "HF_HOME": str(cache_dir), "HF_HUB_DISABLE_TELEMETRY": "1"}


def commit(revision: str) -> str:
    """Returns the commit hash of a revision."""
    return hashlib.sha1(revision.encode()).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if file:
                hub.requests.append((self.command, self.path))
            if hub.is_failing:
                self._answer(503)
                return
            if blob := re.fullmatch(r"/blobs/(\w+)", self.path):
                contents = [content for files in hub.files.values() for content in files.values()]
                by_digest = {hashlib.sha256(content).hexdigest(): content for content in contents}
                self._answer(200, by_digest[blob[1]])
                return
            if file is None:
                self._answer(404)  # the library's other requests are optional
                return
            repository, revision, filename = file.groups()
            authorization = self.headers.get("Authorization")
            if authorization not in (None, f"Bearer {TOKEN}"):
                self._answer(401, error_message="Invalid credentials in Authorization header")
                return
            known = any(repository == name for name, _ in hub.files)
            if not known or (repository in hub.private and authorization is None):
                self._answer(401 if authorization is None else 404, error_code="RepoNotFound")
                return
            if repository in hub.gated and authorization is None:
                self._answer(401, error_code="GatedRepo")
                return
            if (repository, revision) not in hub.files:
                self._answer(404, error_code="RevisionNotFound")
                return
            x_repo_commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else commit(revision)
            content = hub.files[repository, revision].get(filename)
            if content is None:
                self._answer(404, error_code="EntryNotFound", x_repo_commit=x_repo_commit)
                return
            digest = hashlib.sha256(content).hexdigest()
            if not filename.endswith((".safetensors", ".bin")):
                self._answer(200, content, etag=f'"{digest}"', x_repo_commit=x_repo_commit)
                return
            # The hub redirects to another host for large files, and sends their hash and size in advance.
            self._answer(
                302,
                location=f"{hub.cdn_url}/blobs/{digest}",
                x_repo_commit=x_repo_commit,
                x_linked_etag=f'"{digest}"',
                x_linked_size=str(len(content)),
            )

        do_HEAD = do_GET

        def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            names = {"error_code": "X-Error-Code", "error_message": "X-Error-Message"}
            for name, value in headers.items():
                self.send_header(names.get(name, name.replace("_", "-")), value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Keeps requests out of the output of the tests."""

    return Handler
