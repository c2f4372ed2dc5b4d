"""A hub on this machine: the endpoints of the Hugging Face hub that uploads and downloads use, in memory.

Models and data sets only. It checks what it is sent as the real one does: tokens, hashes, and that a file was uploaded
before it is committed. Large files are stored the older way, by LFS; or, if it is given a folder, by Xet, whose client
then writes to that folder, so that they can be committed but not downloaded.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_QuiteSecretTokenOfATest"
LARGE = 1000  # bytes from which a file is stored by its hash

Files = dict[str, bytes]


@dataclass
class Repository:
    """Its commits, the last one newest: (name, all files)."""

    private: bool
    commits: list[tuple[str, Files]] = field(default_factory=lambda: [("0" * 40, {})])

    @property
    def files(self) -> Files:
        return self.commits[-1][1]

    def at(self, revision: str) -> tuple[str, Files] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


class HubStandIn:
    """What the server has and was asked. Set `answer` to a status to have it answer nothing else; clear `open` to have
    it keep commits waiting.
    """

    def __init__(self, url: str):
        self.url = url
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: Files = {}
        self.requests: list[str] = []
        self.answer: int | None = None
        self.xet: Path | None = None
        self.open = threading.Event()
        self.open.set()

    def __getitem__(self, repo_id: str) -> Repository:
        return self.repositories["models", repo_id]


@contextmanager
def hub_stand_in() -> Iterator[HubStandIn]:
    """One that serves until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.hub = HubStandIn(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.hub.open.set()
        server.shutdown()
        server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, url: str, tmp_path: Path) -> None:
    """Have huggingface_hub ask the hub at this address, with nothing known or cached so far."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its store of large files is a protocol of its own
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no login"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def _handle(self, method: str) -> None:
        hub: HubStandIn = self.server.hub
        path = unquote(urlsplit(self.path).path)
        body = self._read()
        hub.requests.append(f"{method} {path}")
        authorization = self.headers.get("Authorization", "")
        if hub.answer is not None:
            self._refuse(hub.answer, f"not now, {authorization}")
        elif method == "PUT":
            hub.blobs[path.rpartition("/")[2]] = body
            self._say(b"")
        elif authorization != f"Bearer {TOKEN}" and method == "POST":
            self._refuse(401, "Invalid username or password.")
        else:
            for pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, f"{method} {path}")
                if match:
                    return answer(self, hub, body, **match.groupdict())
            self._refuse(404, "no such endpoint")

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _tell(self, value: object, status: int = 200) -> None:
        self._say(json.dumps(value).encode(), status, Content_Type="application/json")

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._say(
            json.dumps({"error": message}).encode(),
            status,
            Content_Type="application/json",
            X_Error_Code=code,
            X_Error_Message=message,
        )

    def _find(self, hub: HubStandIn, kind: str, repo_id: str) -> Repository | None:
        """The repository, if there is one for this user; else that is answered."""
        found = hub.repositories.get((kind, repo_id))
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            return self._refuse(404, "Repository not found", "RepoNotFound")
        return found

    # --- the endpoints ---

    def create(self, hub: HubStandIn, body: bytes) -> None:
        wanted = json.loads(body)
        key = f"{wanted.get('type', 'model')}s", f"{wanted['organization']}/{wanted['name']}"
        status = 409 if key in hub.repositories else 200
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        hub.repositories.setdefault(key, Repository(private))
        self._tell({"url": f"{hub.url}/{key[1]}"}, status)

    def preupload(self, hub: HubStandIn, body: bytes, kind: str, repo_id: str) -> None:
        if self._find(hub, kind, repo_id) is None:
            return
        self._tell(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            }
        )

    def batch(self, hub: HubStandIn, body: bytes, repo_id: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(wanted | ({} if wanted["oid"] in hub.blobs else {"actions": upload}))
        self._tell({"transfer": "basic", "objects": objects})

    def xet_token(self, hub: HubStandIn, body: bytes, **_: str) -> None:
        self._tell({"casUrl": f"local://{hub.xet}", "accessToken": "pass", "exp": int(time.time()) + 3600})

    def commit(self, hub: HubStandIn, body: bytes, kind: str, repo_id: str) -> None:
        repository = self._find(hub, kind, repo_id)
        if repository is None:
            return
        hub.open.wait(20)
        files = dict(repository.files)
        for operation in map(json.loads, body.splitlines()):
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                data = hub.blobs.get(value["oid"])
                if hub.xet is not None:
                    files[value["path"]] = value["oid"].encode()
                    continue
                if data is None or hashlib.sha256(data).hexdigest() != value["oid"]:
                    return self._refuse(400, f"{value['path']} was not uploaded")
                files[value["path"]] = data
        name = hashlib.sha1(body + str(len(repository.commits)).encode()).hexdigest()
        repository.commits.append((name, files))
        self._tell({"commitUrl": f"{hub.url}/{repo_id}/commit/{name}", "commitOid": name})

    def info(self, hub: HubStandIn, body: bytes, kind: str, repo_id: str, revision: str | None = None) -> None:
        repository = self._find(hub, kind, repo_id)
        if repository is None:
            return
        commit = repository.at(revision or "main")
        if commit is None:
            return self._refuse(404, "Invalid rev id", "RevisionNotFound")
        self._tell({"id": repo_id, "sha": commit[0], "siblings": [{"rfilename": name} for name in commit[1]]})

    def tree(self, hub: HubStandIn, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repository = self._find(hub, kind, repo_id)
        if repository is not None:
            files = repository.at(revision)[1]
            self._tell(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )

    def resolve(self, hub: HubStandIn, body: bytes, repo_id: str, revision: str, file: str, kind: str | None) -> None:
        repository = self._find(hub, kind or "models", repo_id)
        if repository is not None:
            name, files = repository.at(revision)
            self._say(files[file], ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"', X_Repo_Commit=name)


_API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = (
    (r"POST /api/repos/create", _Handler.create),
    (rf"POST {_API}/preupload/main", _Handler.preupload),
    (r"POST /(?:datasets/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"GET {_API}/xet-write-token/main", _Handler.xet_token),
    (rf"POST {_API}/commit/main", _Handler.commit),
    (rf"GET {_API}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    (rf"GET {_API}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (
        r"(?:GET|HEAD) /(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        _Handler.resolve,
    ),
)
