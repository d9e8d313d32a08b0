"""A stand-in of the Hugging Face Hub's HTTP interface: what huggingface_hub asks of it, no more."""

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
from urllib.parse import unquote, urlsplit

TOKEN = "hf_standin"


class Hub:
    """Repositories in memory.

    Attributes:
        commits: repository -> commit -> file name -> contents.
        branches: repository -> branch -> commit.
        asked: what was asked for, in order.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.url = ""

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit with exactly these files."""
        commits = self.commits.setdefault(repo, {})
        text = f"{repo}{branch}{len(commits)}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        commits[sha] = dict(files)
        self.branches.setdefault(repo, {})[branch] = sha
        return sha

    def newest(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """Files of a branch."""
        return self.commits[repo][self.branches[repo][branch]]


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at ``url`` until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        writing = self.command in ("POST", "PUT") and "/large/" not in path
        if writing and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            values = json.loads(body)
            repo = f"{values['organization']}/{values['name']}"
            if repo in self.hub.branches:
                url = {"url": f"{self.hub.url}/{repo}"}
                return self._send(409, {"error": "You already created it", **url})
            self.hub.commit(repo, {".gitattributes": b""})
            return self._send(200, {"url": f"{self.hub.url}/{repo}"})
        if found := re.fullmatch(r"/large/(\w+)", path):
            self.hub.large[found[1]] = body
            return self._send(200, {})
        found = re.match(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(?:/(.*))?$", path)
        repo, rest = (found[1], found[2] or "") if found else ("", "")
        if repo not in self.hub.branches:
            return self._send(
                404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
        if rest == "info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            put = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/large/{o['oid']}"}}}
                for o in objects
            ]
            return self._send(200, {"transfer": "basic", "objects": put})
        what, _, rest = rest.partition("/")
        if what == "branch":
            self.hub.branches[repo][rest] = self.hub.branches[repo]["main"]
            return self._send(200, {})
        revision, _, name = rest.partition("/")
        commit = self.hub.branches[repo].get(revision or "main", revision)
        files = self.hub.commits[repo].get(commit)
        if files is None:
            return self._send(
                404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
            )
        if what in ("", "revision"):
            names = [{"rfilename": n} for n in files]
            return self._send(200, {"id": repo, "sha": commit, "siblings": names})
        if what == "tree":
            return self._send(200, [self._entry(n, d) for n, d in files.items()])
        if what == "resolve":
            return self._resolve(commit, files.get(name))
        if what == "preupload":
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in json.loads(body)["files"]
            ]
            return self._send(200, {"files": modes})
        assert what == "commit", path
        changed = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del changed[value["path"]]
        commit = self.hub.commit(repo, changed, revision)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        return self._send(200, {"success": True, "commitUrl": url, "commitOid": commit})

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(data).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
        return entry

    def _resolve(self, commit: str, data: bytes | None) -> None:
        if data is None:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        # As the hub does: large files by their own hash.
        self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'})

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        if not isinstance(body, bytes):
            self.send_header("Content-Type", "application/json")
            if status >= 400:
                self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
