"""A server on this machine that answers as the Hugging Face hub does to an upload, and keeps what it was sent."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar

TOKEN = "hf_of_me"


@dataclass
class Hub:
    """Repositories by name, each with its files, and what was asked."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    asked: list[str] = field(default_factory=list)  # method and path, in order
    fails: dict[str, int] = field(default_factory=dict)  # a status for paths that have this in them


class _Handler(BaseHTTPRequestHandler):
    hub: ClassVar[Hub]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, tree: Any, status: int = 200) -> None:
        data = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self) -> None:
        hub, body = self.hub, self._body()
        path = self.path.split("?")[0]
        if path == "/api/agent-harnesses":  # of the client's own accord
            return self._answer({"error": "none"}, 404)
        hub.asked.append(f"{self.command} {path}")
        for part, status in hub.fails.items():
            if part in path:
                return self._answer({"error": "as the test asks"}, status)
        if path.startswith("/storage/"):
            hub.stored[path.removeprefix("/storage/")] = body
            return self._answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer({"error": "Invalid credentials"}, 401)
        if path == "/api/whoami-v2":
            return self._answer({"name": "me", "type": "user"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        tree = json.loads(body) if body and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            name = f"{tree['organization']}/{tree['name']}"
            if name in hub.repositories:
                return self._answer({"url": f"{hub.url}/{name}"}, 409)
            hub.repositories[name] = {".gitattributes": b""}
            hub.private[name] = tree.get("visibility") == "private"
            return self._answer({"url": f"{hub.url}/{name}"})
        name = next((each for each in hub.repositories if each in path), None)
        if name is None:
            return self._answer({"error": "Repository not found"}, 404)
        files = hub.repositories[name]
        if path.endswith("/preupload/main"):
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in tree["files"]
            ]
            return self._answer({"files": modes})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{hub.url}/storage/{each['oid']}"}}}
                for each in tree["objects"]
            ]
            return self._answer({"transfer": "basic", "objects": objects})
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            return self._answer({"success": True, "commitOid": "1" * 40, "commitUrl": f"{hub.url}/{name}"})
        siblings = [{"rfilename": each} for each in files]
        return self._answer({"id": name, "sha": "0" * 40, "private": hub.private[name], "siblings": siblings})

    do_GET = do_POST = do_PUT = _handle  # noqa: N815 - the names that http.server calls


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
