"""A small Hugging Face Hub for tests: enough of the HTTP API to create a repository, commit, tag, list and download.

It listens on loopback alone and keeps its state in one folder. Large files go through Xet where the client has hf_xet
(its 'local://' store, a folder under the root: client and server must share a machine), through LFS where it has not or
with HF_HUB_DISABLE_XET=1. The client reads its settings when huggingface_hub is imported:

    HF_ENDPOINT=http://127.0.0.1:PORT HF_TOKEN=hf_test HF_HOME=<temporary folder>

In a test: `hub = TestHub(root).start()`, then `hub.url`, `hub.requests`, and for faults
`hub.fail.append([method regex, path regex, a status or one of FAULTS, times])`.
"""

import base64
import hashlib
import io
import json
import os
import re
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

# What comes instead of an answer.
FAULTS = {
    "html": dict(raw=b"<html><title>Sign in to the hotel's network</title></html>", kind="text/html"),
    "empty": dict(raw=b""),
    "cut JSON": dict(raw=b'{"id": "tester/mb'),
    "null": dict(raw=b"null"),
    "a list": dict(raw=b"[]"),
    "a number": dict(raw=b"42"),
    "nothing": dict(raw=b"{}"),
    "other types": dict(raw=b'{"url": 7, "id": [], "sha": {}, "files": 7, "objects": 7, "tags": 7, "branches": 7}'),
    "no gzip": dict(raw=b"not compressed", headers={"Content-Encoding": "gzip"}),
    "short": dict(raw=b"{}", headers={"Content-Length": "1000"}),
    "to nowhere": dict(status=307, raw=b"", headers={"Location": "http://127.0.0.1:9/gone"}),
    "to no address": dict(status=307, raw=b"", headers={"Location": "http://[::/"}),
    "in circles": dict(status=307, raw=b"", headers={"Location": "."}),
    "hang": None,
    "drop": None,
    "done, then html": None,
}


class TestHub:
    __test__ = False  # not a pytest class

    def __init__(self, root, user="tester", lfs_threshold=1000):
        self.root, self.token, self.user, self.lfs_threshold = Path(root), "hf_test", user, lfs_threshold
        self.requests, self.fail, self.lock = [], [], threading.RLock()
        self.stopped = threading.Event()
        (self.root / "lfs").mkdir(parents=True, exist_ok=True)
        (self.root / "repos").mkdir(exist_ok=True)
        (self.root / "cas").mkdir(exist_ok=True)
        hub = self

        class H(Handler):
            pass

        H.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), H)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def start(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self):
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()

    # -- storage: one JSON per repo: {'private', 'refs': {name: oid}, 'commits': {oid: {...,'tree': {path: entry}}}}
    def _file(self, rid):
        return self.root / "repos" / (rid.replace("/", "--") + ".json")

    def load(self, rid):
        f = self._file(rid)
        return json.loads(f.read_text()) if f.exists() else None

    def save(self, rid, repo):
        tmp = self._file(rid).with_suffix(".tmp")
        tmp.write_text(json.dumps(repo))
        os.replace(tmp, self._file(rid))

    def commit(self, repo, ref, tree, title, parent):
        oid = hashlib.sha1(json.dumps([tree, title, parent, time.time_ns()]).encode()).hexdigest()
        repo["commits"][oid] = dict(title=title, parent=parent, tree=tree)
        repo["refs"][ref] = oid
        return oid

    def resolve(self, repo, rev):
        oid = repo["refs"].get(rev) or repo["tags"].get(rev) or (rev if rev in repo["commits"] else None)
        return oid, (repo["commits"][oid]["tree"] if oid else None)

    def blob(self, entry):  # None for a Xet file: its bytes are chunked inside the local store
        if "xet" in entry:
            return None
        return (self.root / "lfs" / entry["lfs"]).read_bytes() if "lfs" in entry else base64.b64decode(entry["data"])

    def xet_files(self):
        """sha256 -> xet hash of every file in the local Xet store, read from its shards (header 48 bytes, then one
        48-byte record per file: hash, flags, entry count; its entries, verification entries and sha256 follow)."""

        def hexs(r):
            return "".join(f"{word:016x}" for word in struct.unpack("<4Q", r))

        out = {}
        for shard in (self.root / "cas" / "xet" / "xorbs" / "shards").glob("*.mdb"):
            b, o = shard.read_bytes(), 48
            while b[o : o + 32] != b"\xff" * 32:
                fhash, (flags, n) = b[o : o + 32], struct.unpack("<II", b[o + 32 : o + 40])
                o += 48 + 48 * n * (2 if flags >> 31 & 1 else 1)
                if flags >> 30 & 1:
                    out[hexs(b[o : o + 32])] = hexs(fhash)
                    o += 48
        return out


class Handler(BaseHTTPRequestHandler):
    hub: TestHub
    disable_nagle_algorithm = True  # or each answer waits 40 ms, as headers and body are two packets
    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def body(self):
        if not hasattr(self, "_body"):
            if (self.headers.get("Transfer-Encoding") or "").lower() == "chunked":
                out = b""
                while n := int(self.rfile.readline().split(b";")[0], 16):
                    out += self.rfile.read(n)
                    self.rfile.readline()
                self.rfile.readline()
                self._body = out
            else:
                self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return self._body

    def send(self, status, obj=None, raw=None, headers=()):
        data = raw if raw is not None else (b"" if obj is None else json.dumps(obj).encode())
        self.send_response(status)
        hd = dict(headers)
        hd.setdefault("Content-Type", "application/json" if raw is None else "application/octet-stream")
        hd.setdefault("Content-Length", str(len(data)))
        for k, v in hd.items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status, code, message, headers=()):
        self.send(
            status, {"error": message}, headers={"X-Error-Code": code, "X-Error-Message": message, **dict(headers)}
        )

    def handle_any(self):
        self.__dict__.pop("_body", None)
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        self.body()  # read, so that the next request on this connection begins where it ends
        fault = None
        with hub.lock:
            hub.requests.append((self.command, path))
            for rule in hub.fail:
                if rule[3] > 0 and re.fullmatch(rule[0], self.command) and re.search(rule[1], path):
                    rule[3] -= 1
                    fault = rule[2]
                    break
        if fault is not None:
            return self.fault(fault)
        self.route(path)

    def route(self, path):
        for pattern, name in ROUTES:
            m = re.fullmatch(pattern, f"{self.command} {path}")
            if m:
                return getattr(self, name)(**m.groupdict())
        self.error(404, "", f"no route {self.command} {path}")

    def fault(self, kind):
        if isinstance(kind, int):
            return self.send(kind, {"error": "injected"})
        if kind == "hang":
            self.hub.stopped.wait(60)
        if kind in ("hang", "drop"):
            self.close_connection = True
            return None
        if kind == "done, then html":
            wfile, self.wfile = self.wfile, io.BytesIO()
            self.route(unquote(urlsplit(self.path).path))
            self.wfile = wfile
            return self.fault("html")
        given = FAULTS[kind]
        headers = {"Content-Type": given.get("kind", "application/json"), **given.get("headers", {})}
        if kind == "short":
            self.close_connection = True
        if headers.get("Location") == ".":
            headers["Location"] = self.path
        return self.send(given.get("status", 200), raw=given["raw"], headers=headers)

    # The names that the base class calls.
    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

    def authed(self):
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def repo(self, rid, write=False):
        repo = self.hub.load(rid)
        if write and not self.authed():
            self.error(401, "", "Invalid credentials in Authorization header")
            return None
        if repo is None or (repo["private"] and not self.authed()):
            self.error(401 if not self.authed() else 404, "RepoNotFound", "Repository not found")
            return None
        return repo

    # ---- routes
    def whoami(self):
        if not self.authed():
            return self.error(401, "", "Invalid credentials in Authorization header")
        self.send(
            200,
            dict(
                type="user",
                name=self.hub.user,
                fullname=self.hub.user,
                orgs=[],
                auth=dict(type="access_token", accessToken=dict(displayName="t", role="write")),
            ),
        )

    def create(self):
        if not self.authed():
            return self.error(401, "", "Invalid credentials in Authorization header")
        q = json.loads(self.body())
        rid = f"{q.get('organization') or self.hub.user}/{q['name']}"
        res = dict(url=f"{self.hub.url}/{rid}", name=rid, id=rid)
        if q.get("type") == "space":
            if q.get("sdk") not in ("gradio", "docker", "static"):
                return self.error(400, "", "a Space needs an SDK")
            res["url"] = f"{self.hub.url}/spaces/{rid}"
        with self.hub.lock:
            if self.hub.load(rid) is not None:  # the client reads 'url' from the 409 body too
                return self.send(409, dict(res, error="You already created this model repo"))
            repo = dict(
                private=q.get("visibility") == "private" or bool(q.get("private")), refs={}, tags={}, commits={}
            )
            repo |= {key: q[key] for key in ("sdk", "variables") if key in q}
            ga = dict(data=base64.b64encode(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n").decode())
            self.hub.commit(repo, "main", {".gitattributes": ga}, "initial commit", None)
            self.hub.save(rid, repo)
        self.send(200, res)

    def validate_yaml(self):
        text = json.loads(self.body())["content"]
        m = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.S)
        if not m:
            return self.send(
                200, dict(errors=[], warnings=[dict(message="empty or missing yaml metadata in repo card")])
            )
        try:
            for item in (yaml.safe_load(m[1]) or {}).get("model-index") or []:
                if not item.get("name") or not isinstance(item.get("results"), list):
                    raise ValueError("model-index needs name and results")
                for result in item["results"]:
                    fields = (result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"])
                    if not all(fields) or not result["metrics"]:
                        raise ValueError("a result needs a task, a dataset and metrics")
        except (yaml.YAMLError, KeyError, TypeError, ValueError) as e:
            return self.send(400, dict(error="Invalid metadata", errors=[dict(message=str(e))], warnings=[]))
        self.send(200, dict(errors=[], warnings=[]))

    def preupload(self, rid, rev):
        repo = self.repo(rid, write=True)
        if repo is None:
            return
        _, tree = self.hub.resolve(repo, rev)
        if tree is None:
            return self.error(404, "RevisionNotFound", "Invalid rev id")
        out = []
        for f in json.loads(self.body())["files"]:
            text = not re.search(rb"\x00", base64.b64decode(f["sample"]))
            mode = "regular" if f["size"] < self.hub.lfs_threshold and text else "lfs"
            e = tree.get(f["path"])
            oid = None if e is None else e.get("lfs") or _git_oid(base64.b64decode(e["data"]))
            out.append(dict(path=f["path"], uploadMode=mode, shouldIgnore=False, oid=oid))
        self.send(200, dict(files=out))

    def xet_token(self, rid, kind, rev):
        if self.repo(rid, write=kind == "write") is None:
            return
        cas, exp = "local://" + str((self.hub.root / "cas").resolve()), int(time.time()) + 3600
        self.send(
            200,
            dict(casUrl=cas, accessToken="t", exp=exp),
            headers={"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "t", "X-Xet-Token-Expiration": str(exp)},
        )

    def lfs_batch(self, rid):
        if self.repo(rid, write=True) is None:
            return
        objs = []
        for o in json.loads(self.body())["objects"]:
            item = dict(oid=o["oid"], size=o["size"])
            if not (self.hub.root / "lfs" / o["oid"]).exists():
                item["actions"] = dict(
                    upload=dict(href=f"{self.hub.url}/_lfs/{o['oid']}", header={}),
                    verify=dict(href=f"{self.hub.url}/_lfs/{o['oid']}/verify", header={}),
                )
            objs.append(item)
        self.send(200, dict(transfer="basic", objects=objs), headers={"Content-Type": "application/vnd.git-lfs+json"})

    def lfs_put(self, oid):
        if hashlib.sha256(self.body()).hexdigest() != oid:
            return self.error(400, "", "sha256 mismatch")
        tmp = self.hub.root / "lfs" / f".{oid}.{threading.get_ident()}"
        tmp.write_bytes(self.body())
        os.replace(tmp, self.hub.root / "lfs" / oid)
        self.send(200, {})

    def lfs_verify(self, oid):
        q, f = json.loads(self.body()), self.hub.root / "lfs" / oid
        ok = f.exists() and f.stat().st_size == q["size"]
        self.send(200 if ok else 404, {})

    def do_commit(self, rid, rev):
        with self.hub.lock:
            repo = self.repo(rid, write=True)
            if repo is None:
                return
            head, tree = self.hub.resolve(repo, rev)
            if tree is None:
                return self.error(404, "RevisionNotFound", "Invalid rev id")
            tree, title = dict(tree), ""
            for line in self.body().splitlines():
                item = json.loads(line)
                v = item["value"]
                if item["key"] == "header":
                    title = v["summary"]
                    if v.get("parentCommit") not in (None, head):
                        return self.error(412, "", "A commit has happened since. Please refresh and try again.")
                elif item["key"] == "file":
                    tree[v["path"]] = dict(data=v["content"])
                elif item["key"] == "lfsFile":
                    f = self.hub.root / "lfs" / v["oid"]
                    if f.exists():
                        tree[v["path"]] = dict(lfs=v["oid"], size=f.stat().st_size)
                    elif v["oid"] in (xet := self.hub.xet_files()):
                        tree[v["path"]] = dict(lfs=v["oid"], size=v["size"], xet=xet[v["oid"]])
                    else:
                        return self.error(400, "", f"LFS object {v['oid']} was not uploaded")
                elif item["key"] == "deletedFile":
                    if tree.pop(v["path"], None) is None:
                        return self.error(404, "EntryNotFound", "A file with this name doesn't exist")
                else:
                    return self.error(400, "", f"unknown operation {item['key']}")
            oid = self.hub.commit(repo, rev if rev in repo["refs"] else "main", tree, title, head)
            self.hub.save(rid, repo)  # one os.replace: a commit is visible whole or not at all
        self.send(200, dict(success=True, commitOid=oid, commitUrl=f"{self.hub.url}/{rid}/commit/{oid}", hookOutput=""))

    def _entry(self, path, e):
        if "lfs" not in e:
            data = self.hub.blob(e)
            return dict(type="file", path=path, size=len(data), oid=_git_oid(data))
        d = dict(
            type="file",
            path=path,
            size=e["size"],
            oid=e["lfs"][:40],
            lfs=dict(oid=e["lfs"], size=e["size"], pointerSize=130),
        )
        return dict(d, xetHash=e["xet"]) if "xet" in e else d

    def info(self, rid, rev="main"):
        repo = self.repo(rid)
        if repo is None:
            return
        oid, tree = self.hub.resolve(repo, rev)
        if tree is None:
            return self.error(404, "RevisionNotFound", "Invalid rev id")
        self.send(
            200,
            dict(
                _id="x",
                id=rid,
                modelId=rid,
                author=rid.split("/")[0],
                sha=oid,
                private=repo["private"],
                disabled=False,
                gated=False,
                tags=[],
                downloads=0,
                likes=0,
                siblings=[dict(rfilename=p) for p in sorted(tree)],
            ),
        )

    def tree(self, rid, rev):
        repo = self.repo(rid)
        if repo is not None:
            _, tree = self.hub.resolve(repo, rev)
            if tree is None:
                return self.error(404, "RevisionNotFound", "Invalid rev id")
            self.send(200, [self._entry(p, e) for p, e in sorted(tree.items())])

    def refs(self, rid):
        repo = self.repo(rid)
        if repo is not None:

            def named(kind, refs):
                return [dict(name=n, ref=f"refs/{kind}/{n}", targetCommit=o) for n, o in refs.items()]

            self.send(200, dict(converts=[], branches=named("heads", repo["refs"]), tags=named("tags", repo["tags"])))

    def create_tag(self, rid, rev):
        with self.hub.lock:
            repo = self.repo(rid, write=True)
            if repo is None:
                return
            oid, _ = self.hub.resolve(repo, rev)
            tag = json.loads(self.body())["tag"]
            if oid is None:
                return self.error(404, "RevisionNotFound", "Invalid rev id")
            if tag in repo["tags"]:
                return self.error(409, "", "Tag reference exists already.")
            repo["tags"][tag] = oid
            self.hub.save(rid, repo)
        self.send(200, {})

    def resolve_file(self, rid, rev, path):
        repo = self.repo(rid)
        if repo is None:
            return
        oid, tree = self.hub.resolve(repo, rev)
        if tree is None:
            return self.error(404, "RevisionNotFound", "Invalid rev id")
        if path not in tree:
            return self.error(404, "EntryNotFound", "Entry not found", headers={"X-Repo-Commit": oid})
        e = tree[path]
        data = self.hub.blob(e)
        etag = e.get("lfs") or _git_oid(data)
        if data is None:
            route = f"{self.hub.url}/api/models/{rid}/xet-read-token/{oid}"
            return self.send(
                200,
                raw=b"",
                headers={
                    "X-Repo-Commit": oid,
                    "ETag": f'"{etag}"',
                    "X-Linked-Etag": f'"{etag}"',
                    "X-Linked-Size": str(e["size"]),
                    "X-Xet-Hash": e["xet"],
                    "X-Xet-Refresh-Route": route,
                    "Link": f'<{route}>; rel="xet-auth"',
                },
            )
        h = {"X-Repo-Commit": oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if "lfs" in e:
            h.update({"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))})
        m = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if m and self.command == "GET":
            a, b = int(m[1]), int(m[2] or len(data) - 1)
            h["Content-Range"] = f"bytes {a}-{b}/{len(data)}"
            return self.send(206, raw=data[a : b + 1], headers=h)
        self.send(200, raw=data, headers=h)


def _git_oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


R = r"(?P<rid>[^/]+/[^/]+)"
API = rf"/api/(?:models|spaces)/{R}"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"POST {API}/preupload/(?P<rev>.+)", "preupload"),
    (rf"POST {API}/commit/(?P<rev>.+)", "do_commit"),
    (rf"GET {API}/xet-(?P<kind>read|write)-token/(?P<rev>.+)", "xet_token"),
    (rf"POST /{R}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /_lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (r"POST /_lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
    (rf"GET {API}/tree/(?P<rev>[^/]+)", "tree"),
    (rf"GET {API}/refs", "refs"),
    (rf"POST {API}/tag/(?P<rev>.+)", "create_tag"),
    (rf"GET {API}/revision/(?P<rev>.+)", "info"),
    (rf"GET {API}", "info"),
    (rf"(GET|HEAD) /{R}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve_file"),
]
