"""A server that answers downloads as the Hugging Face hub does, with the headers that huggingface_hub reads.

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
        self.files = {}  # (repository, revision) -> {filename: bytes}
        self.gated = set()
        self.private = set()
        self.is_down = False
        self.asked = []  # (method, path) of every request for a repository's file
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.cdn_url = f"http://localhost:{self._server.server_port}"  # another host, to a client

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repository: str, files: dict[str, bytes] | Path, *, revision: str = "main") -> None:
        """Publish `files`, or all files of a directory, as one revision, which its commit names as well."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        self.files[repository, revision] = self.files[repository, commit(revision)] = files

    def environment(self, cache_dir: Path) -> dict[str, str]:
        """The environment of a process that takes this for the hub, with a cache and no login of its own."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**ours, "HF_ENDPOINT": self.url, "HF_HOME": str(cache_dir), "HF_HUB_DISABLE_TELEMETRY": "1"}


def commit(revision: str) -> str:
    """The 40 hexadecimal digits that stand for a revision."""
    return hashlib.sha1(revision.encode()).hexdigest()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if file:
                hub.asked.append((self.command, self.path))
            if hub.is_down:
                return self._answer(503)
            if blob := re.fullmatch(r"/blobs/(\w+)", self.path):
                contents = [content for files in hub.files.values() for content in files.values()]
                by_digest = {hashlib.sha256(content).hexdigest(): content for content in contents}
                return self._answer(200, by_digest[blob[1]])
            if file is None:
                return self._answer(404)  # the library asks for more than files, and lives without it
            repository, revision, filename = file.groups()
            authorization = self.headers.get("Authorization")
            if authorization not in (None, f"Bearer {TOKEN}"):
                return self._answer(401, error_message="Invalid credentials in Authorization header")
            known = any(repository == name for name, _ in hub.files)
            if not known or (repository in hub.private and authorization is None):
                return self._answer(401 if authorization is None else 404, error_code="RepoNotFound")
            if repository in hub.gated and authorization is None:
                return self._answer(401, error_code="GatedRepo")
            if (repository, revision) not in hub.files:
                return self._answer(404, error_code="RevisionNotFound")
            x_repo_commit = revision if re.fullmatch(r"[0-9a-f]{40}", revision) else commit(revision)
            content = hub.files[repository, revision].get(filename)
            if content is None:
                return self._answer(404, error_code="EntryNotFound", x_repo_commit=x_repo_commit)
            digest = hashlib.sha256(content).hexdigest()
            if not filename.endswith((".safetensors", ".bin")):
                return self._answer(200, content, etag=f'"{digest}"', x_repo_commit=x_repo_commit)
            # Large files are with another host: the hub redirects, and says beforehand what will come.
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

        def log_message(self, *_) -> None:
            """The tests' output is theirs."""

    return Handler
