"""A hub on loopback that keeps what huggingface_hub uploads: repositories, commits, large files.

It speaks what `HfApi.create_repo` and `HfApi.upload_folder` say to a real one, and checks what it
is told: the token, digests and sizes of large files, the YAML of a model card.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_token_of_the_test"
LARGE_BYTES = 2000
"""From this size on a file travels as a large one."""


class SmallHub(ThreadingHTTPServer):
    """Everything it was given."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.unknown: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def small_hub() -> Iterator[SmallHub]:
    """A hub that serves within the block."""
    hub = SmallHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: SmallHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, content: Any, code: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        body, oid = self._body(), self.path.removeprefix("/objects/")
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self._reply({})

    def do_POST(self) -> None:
        hub, body = self.server, self._body()
        if self.path != "/api/validate-yaml" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._reply({"error": "Invalid username or password."}, 401)
        if self.path == "/api/validate-yaml":
            card = json.loads(body)["content"]
            yaml.safe_load(card.split("---")[1])
            return self._reply({"warnings": [], "errors": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] == "forbidden":
                return self._reply({"error": "You don't have the rights"}, 403)
            exists = name in hub.repositories
            hub.repositories.setdefault(name, {})
            hub.private |= {name} if asked.get("visibility") == "private" else set()
            return self._reply({"url": f"{hub.address}/{name}"}, 409 if exists else 200)
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE_BYTES else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._reply({"files": files})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self._reply({"transfer": "basic", "objects": self._uploads(json.loads(body))})
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self._commit(hub.repositories[match[1]], body)
            url = f"{hub.address}/{match[1]}/commit/{'0' * 40}"
            return self._reply({"success": True, "commitUrl": url, "commitOid": "0" * 40})
        hub.unknown.append(self.path)
        return self._reply({"error": "no such endpoint"}, 404)

    def do_GET(self) -> None:
        """What the client would like to know of itself; nothing that it needs."""
        self._reply({"error": "no such endpoint"}, 404)

    def _uploads(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            one
            if one["oid"] in self.server.objects
            else one
            | {"actions": {"upload": {"href": f"{self.server.address}/objects/{one['oid']}"}}}
            for one in asked["objects"]
        ]

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                files[value["path"]] = self.server.objects[value["oid"]]
