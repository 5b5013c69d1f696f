"""A stand-in for the hub: the calls that `huggingface_hub` makes to create a repository and commit to it, by LFS and inline."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, OWNER = "hf_a_token_that_may_write", "me"


class Hub:
    """`repos`: id -> visibility and files; `forbidden`: ids not to be written; `broken`: path prefix -> status."""

    def __init__(self):
        self.repos, self.objects, self.forbidden, self.broken, self.calls = {}, {}, set(), {}, []
        self.licences, self.role = {"org/base": "mit"}, "write"

    def answer(self, method, path, body, headers):
        """(status, JSON) of one request."""
        self.calls.append(f"{method} {path}")
        for prefix, status in self.broken.items():
            if path.startswith(prefix):
                return status, {"error": "it is broken"}
        if method == "PUT" and path.startswith("/lfs/"):
            name = path.removeprefix("/lfs/")
            if hashlib.sha256(body).hexdigest() != name:
                return 400, {"error": "not what was announced"}
            self.objects[name] = body
            return 200, {}
        if method == "GET" and path.startswith("/api/models/"):
            name = path.removeprefix("/api/models/")
            return (200, {"id": name, "cardData": {"license": self.licences[name]}}) if name in self.licences else (404, {})
        if headers.get("Authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, {"name": OWNER, "orgs": [{"name": "org"}], "auth": {"accessToken": {"role": self.role}}}
        asked = [json.loads(line) for line in body.splitlines()] if body else [{}]
        if path == "/api/repos/create":
            repo = f"{asked[0].get('organization') or OWNER}/{asked[0]['name']}"
            if repo in self.forbidden:
                return 403, {"error": "You don't have the rights"}
            there = repo in self.repos
            asked_for = "private" if asked[0].get("private") else "public"  # what huggingface_hub 1 says it with
            self.repos.setdefault(repo, {"visibility": asked[0].get("visibility", asked_for), "files": {}})
            return 409 if there else 200, {"url": f"https://huggingface.co/{repo}", "id": repo}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []} if asked[0]["content"].startswith("---\n") else (400, {"errors": []})
        repo = "/".join(path.removeprefix("/api/models/").removeprefix("/").split("/")[:2]).removesuffix(".git")
        if path.endswith("/preupload/main"):
            modes = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for f in asked[0]["files"]
            ]
            return 200, {"files": modes}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [
                    {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
                    for o in asked[0]["objects"]
                ],
            }
        if path.endswith("/commit/main"):
            for line in asked[1:]:
                value = line["value"]
                content = self.objects[value["oid"]] if line["key"] == "lfsFile" else base64.b64decode(value["content"])
                self.repos[repo]["files"][value["path"]] = content
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/abc", "commitOid": "abc", "success": True}
        return 404, {"error": f"The stand-in knows no {method} {path}"}


@contextmanager
def serving():
    """A `Hub` that listens at its `url`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if "Content-Length" in self.headers else b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            status, value = hub.answer(self.command, self.path.partition("?")[0], body, self.headers)
            text = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815 - http.server's names

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
