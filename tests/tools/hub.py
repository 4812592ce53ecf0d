"""A hub of a few lines on 127.0.0.1, with what of the Hugging Face hub's interface a push and a pull use."""

import base64
import hashlib
import json
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import huggingface_hub.constants as constants

COMMIT = "0" * 40


class FakeHub(AbstractContextManager):
    """While it runs, huggingface_hub talks to it and to nobody else.

    Attributes:
        repos: files by repository and name.
        private: by repository.
        validated: what it was asked to validate as a card.
    """

    def __init__(self, monkeypatch) -> None:
        self.repos, self.private, self.validated = {}, {}, []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        address = f"http://127.0.0.1:{self.server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_TOKEN", "hf_test")

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_POST(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        match self.path.strip("/").split("/"):
            case ["api", "repos", "create"]:
                asked = json.loads(body)
                name = (
                    f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
                )
                self.hub.repos[name], self.hub.private[name] = {}, asked.get("visibility") == "private"
                self._json({"url": f"http://127.0.0.1/{name}", "name": name})
            case ["api", "validate-yaml"]:
                self.hub.validated.append(json.loads(body)["content"])
                self._json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _]:
                files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
                self._json({"files": [each | {"shouldIgnore": False, "oid": None} for each in files]})
            case ["api", "models", owner, name, "commit", _]:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.hub.repos[f"{owner}/{name}"][line["value"]["path"]] = content
                self._json({"commitUrl": f"http://127.0.0.1/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
            case _:
                self._json({}, 404)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "models", owner, name, *_] if (repo := f"{owner}/{name}") in self.hub.repos:
                names = [{"rfilename": name} for name in self.hub.repos[repo]]
                self._json({"id": repo, "private": self.hub.private[repo], "sha": COMMIT, "siblings": names})
            case [owner, name, "resolve", _, file] if file in self.hub.repos.get(f"{owner}/{name}", {}):
                self._send(200, self.hub.repos[f"{owner}/{name}"][file])
            case [owner, name, "resolve", *_] if f"{owner}/{name}" in self.hub.repos:
                self._json({}, 404, "EntryNotFound")
            case _:
                self._json({}, 404, "RepoNotFound")

    def _json(self, content, status=200, error=None):
        self._send(status, json.dumps(content).encode(), error)

    def _send(self, status, body, error=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """In silence."""
