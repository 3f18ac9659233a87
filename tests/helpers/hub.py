"""A stand-in of the model hub's HTTP API: repositories in memory, what pushing and fetching ask for."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_a_token_of_the_stand_in"


class Hub:
    """repos: {OWNER/NAME: {"private", "commits": [(oid, {path: bytes})]}}; asked: (method, path)."""

    def __init__(self):
        self.repos, self.asked, self.address = {}, [], ""

    def create(self, name: str, private: bool) -> bool:
        return (
            self.repos.setdefault(name, fresh := {"private": private, "commits": [(oid_of({}), {})]}) is fresh
        )

    def files(self, name: str, revision: str) -> tuple[str, dict] | None:
        commits = self.repos[name]["commits"] if name in self.repos else []
        return next((c for c in reversed(commits) if revision in ("main", c[0])), None)

    def commit(self, name: str, lines: list[dict]) -> str:
        files = dict(self.repos[name]["commits"][-1][1])
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        self.repos[name]["commits"].append((oid_of(files), files))
        return oid_of(files)


def oid_of(files: dict) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def answer(self, code: int, body=b"", headers=()):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(key, value)
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self):
        self.answer(404, {"error": "Repository not found"}, [("X-Error-Code", "RepoNotFound")])

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0].strip("/").split("/")
        self.hub.asked.append(("POST", self.path))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        name = "/".join(path[2:4])
        if path == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private") or asked.get("visibility") == "private"
            new = self.hub.create(name, bool(private))
            return self.answer(200 if new else 409, {"url": f"{self.hub.address}/{name}"})
        if path == ["api", "validate-yaml"]:
            return self.answer(200, {"errors": [], "warnings": []})
        if name not in self.hub.repos:
            return self.missing()
        if path[4] == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        oid = self.hub.commit(name, [json.loads(line) for line in body.splitlines()])
        return self.answer(200, {"commitUrl": f"{self.hub.address}/{name}/commit/{oid}", "commitOid": oid})

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/").split("/")
        self.hub.asked.append((self.command, self.path))
        if path == [""]:
            return self.answer(200)
        if path[0] == "api":
            name, rest = "/".join(path[2:4]), path[4:]
            found = self.hub.files(name, rest[1] if len(rest) > 1 else "main")
            if found is None:
                return self.missing()
            oid, files = found
            entries = [{"type": "file", "path": k, "size": len(v), "oid": hashlib.sha1(v).hexdigest()}
                       for k, v in files.items()]  # fmt: skip
            if rest[:1] == ["tree"]:
                return self.answer(200, entries)
            info = {"id": name, "sha": oid, "private": self.hub.repos[name]["private"], "tags": [],
                    "siblings": [{"rfilename": k} for k in files]}  # fmt: skip
            return self.answer(200, info)
        name, revision, file = (
            "/".join(path[:2]),
            path[3],
            "/".join(path[4:]),
        )  # OWNER/NAME/resolve/REVISION/FILE
        found = self.hub.files(name, revision)
        if found is None or file not in found[1]:
            return self.answer(404, {}, [("X-Error-Code", "EntryNotFound")])
        data = found[1][file]
        headers = [("ETag", f'"{hashlib.sha1(data).hexdigest()}"'), ("X-Repo-Commit", found[0])]
        return self.answer(200, data, headers)

    do_HEAD = do_GET


@contextlib.contextmanager
def serving():
    """A hub that answers at its `address` as long as the block lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        hub.address = f"http://127.0.0.1:{server.server_port}"
        yield hub
    finally:
        server.shutdown()
        server.server_close()
