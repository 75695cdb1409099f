"""A Hugging Face Hub on loopback: as much of its HTTP API as the real client needs to push and load models.

Everything is in memory. The client must run with HF_HUB_DISABLE_XET=1, since the server offers only LFS uploads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".parquet")


@dataclass
class File:
    """One stored file and the object id that the Hub gives it."""

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """The sha256 of an LFS file, the git blob id of any other."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A model repository: its commits (each a whole tree) and what its branches point to."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, File]) -> str:
        """Store a tree as the new head of a branch."""
        listing = repr(sorted((path, file.oid) for path, file in files.items()))
        oid = hashlib.sha1(f"{len(self.commits)} {listing}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid


class HubServer:
    """The loopback Hub. `token` is the one valid token, `user` the one namespace that it may write to.

    At a path that holds the text `broken` it closes the connection without an answer.
    """

    def __init__(self, *, token: str = "hf_test", user: str = "tester") -> None:
        self.token = token
        self.user = user
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken = ""
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The endpoint to give to the client."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of a repository at a branch."""
        repo = self.repos[repo_id]
        return {path: file.data for path, file in repo.commits[repo.refs[revision]].items()}

    def reset(self) -> None:
        """Forget every repository and request."""
        with self.lock:
            self.repos.clear()
            self.uploads.clear()
            self.requests.clear()
            self.broken = ""


class _Refused(Exception):
    """An answer other than success; `code` is the Hub's own X-Error-Code, which the client maps to an exception."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer
    query: dict[str, list[str]]
    raw: bytes

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        verb = "GET" if self.command == "HEAD" else self.command
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {unquote(url.path)}")
            if self.hub.broken and self.hub.broken in url.path:
                self.close_connection = True
                return None
            try:
                for method, pattern, answer in _ROUTES:
                    match = pattern.fullmatch(url.path)
                    if method == verb and match:
                        return answer(self, **{key: unquote(value) for key, value in match.groupdict().items()})
                raise _Refused(404, f"no route for {self.command} {url.path}")
            except _Refused as refused:
                self._send(json.dumps({"error": str(refused)}).encode(), refused.headers, status=refused.status)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def _send(self, data: bytes, headers: Mapping[str, str], *, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_json(self, answer: object, *, status: int = 200) -> None:
        self._send(json.dumps(answer).encode(), {"Content-Type": "application/json"}, status=status)

    def _require_token(self) -> None:
        if not self._has_token():
            raise _Refused(401, "Invalid username or password.")

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _repo(self, repo_id: str, *, write: bool = False) -> Repo:
        if write:
            self._require_token()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._has_token()):
            raise _Refused(404 if self._has_token() else 401, "Repository not found", "RepoNotFound")
        return repo

    def _head(self, repo: Repo, revision: str) -> str:
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def whoami(self) -> None:
        self._require_token()
        self._send_json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def validate_yaml(self) -> None:
        front_matter = json.loads(self.raw)["content"].split("---")[1]
        words = yaml.safe_load(front_matter)
        shapes = {"base_model": str, "license": str, "library_name": str, "pipeline_tag": str, "tags": list}
        problems = [
            f"{key!r} must be a {kind.__name__}"
            for key, kind in shapes.items()
            if key in words and not isinstance(words[key], kind)
        ]
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", words.get("base_model", "none")):
            problems.append('"base_model" must be a model name on the Hub')
        self._send_json({"errors": [{"message": problem} for problem in problems], "warnings": []})

    def create_repo(self) -> None:
        self._require_token()
        asked = json.loads(self.raw)
        owner = asked.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
        repo_id = f"{owner}/{asked['name']}"
        answer: dict[str, Any] = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            self._send_json({**answer, "error": "You already created this model repo"}, status=409)
            return
        repo = self.hub.repos[repo_id] = Repo(
            private=bool(asked.get("private")) or asked.get("visibility") == "private"
        )
        repo.commit("main", {})
        self._send_json(answer)

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self._repo(repo_id, write=True)
        if branch in repo.refs:
            raise _Refused(409, f"Reference {branch!r} already exists")
        repo.refs[branch] = self._head(repo, json.loads(self.raw or b"{}").get("startingPoint", "main"))
        self._send_json({})

    def info(self, repo_id: str, revision: str = "main") -> None:
        repo = self._repo(repo_id)
        oid = self._head(repo, revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[oid])]
        self._send_json({"id": repo_id, "sha": oid, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id)
        head, _, inside = revision.partition("/") if revision not in repo.refs else (revision, "", "")
        oid = self._head(repo, head)
        files = {
            path: file for path, file in repo.commits[oid].items() if path.startswith(f"{inside}/" if inside else "")
        }
        if inside and not files:
            raise _Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        self._send_json([_entry(path, file) for path, file in sorted(files.items())])

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        known = repo.commits[self._head(repo, revision)]
        answers = []
        for asked in json.loads(self.raw)["files"]:
            path = asked["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = {"oid": known[path].oid} if path in known else {}
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
        self._send_json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self._repo(repo_id, write=True)
        objects = []
        for asked in json.loads(self.raw)["objects"]:
            actions = {name: {"href": f"{self.hub.url}/lfs/{name}/{asked['oid']}"} for name in ("upload", "verify")}
            stored = asked["oid"] in self.hub.uploads
            objects.append({"oid": asked["oid"], "size": asked["size"], **({} if stored else {"actions": actions})})
        self._send_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.raw).hexdigest() != oid:
            raise _Refused(400, "The uploaded bytes do not have the announced sha256")
        self.hub.uploads[oid] = self.raw
        self._send(b"", {})

    def lfs_verify(self, oid: str) -> None:
        if len(self.hub.uploads.get(oid, b"")) != json.loads(self.raw)["size"]:
            raise _Refused(404, "The object was not uploaded")
        self._send_json({})

    def commit(self, repo_id: str, revision: str) -> None:
        repo = self._repo(repo_id, write=True)
        files = dict(repo.commits[self._head(repo, revision)])
        for line in self.raw.splitlines()[1:]:
            operation = json.loads(line)
            value = operation["value"]
            match operation["key"]:
                case "file":
                    files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    files[value["path"]] = File(self.hub.uploads[value["oid"]], lfs=True)
                case "deletedFile":
                    del files[value["path"]]
                case unknown:
                    raise _Refused(400, f"unknown operation {unknown!r}")
        pull = (
            f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}" if "create_pr" in self.query else None
        )
        oid = repo.commit(pull or revision, files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}
        if pull:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{pull.rpartition('/')[2]}"
        self._send_json(answer)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self._repo(repo_id)
        oid = self._head(repo, revision)
        file = repo.commits[oid].get(path)
        if file is None:
            raise _Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": oid})
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.data))}
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if part is None:
            self._send(file.data, headers)
            return
        first, last = int(part[1]), min(int(part[2]), len(file.data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(file.data)}"
        self._send(file.data[first : last + 1], headers, status=206)


def _entry(path: str, file: File) -> dict[str, Any]:
    lfs = {"lfs": {"oid": file.oid, "size": len(file.data), "pointerSize": 134}} if file.lfs else {}
    return {"type": "file", "path": path, "size": len(file.data), "oid": file.oid, **lfs}


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_ROUTES: list[tuple[str, re.Pattern[str], Callable[..., None]]] = [
    (method, re.compile(pattern), answer)
    for method, pattern, answer in (
        ("GET", "/api/whoami-v2", _Handler.whoami),
        ("POST", "/api/validate-yaml", _Handler.validate_yaml),
        ("POST", "/api/repos/create", _Handler.create_repo),
        ("GET", f"/api/models/{_REPO}", _Handler.info),
        ("GET", f"/api/models/{_REPO}/revision/(?P<revision>.+)", _Handler.info),
        ("GET", f"/api/models/{_REPO}/tree/(?P<revision>.+)", _Handler.tree),
        ("POST", f"/api/models/{_REPO}/branch/(?P<branch>.+)", _Handler.create_branch),
        ("POST", f"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
        ("POST", f"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
        ("PUT", "/lfs/upload/(?P<oid>[0-9a-f]{64})", _Handler.lfs_upload),
        ("POST", "/lfs/verify/(?P<oid>[0-9a-f]{64})", _Handler.lfs_verify),
        ("GET", f"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    )
]
