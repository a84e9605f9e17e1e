"""Requests as E2B's Python package sends them, made by hand with the library that it uses, httpx: the control
API, templates, files as forms and as streams, and Connect with JSON, with compression, over HTTP/1.1 and HTTP/2,
by one client that keeps its connections and by an asynchronous one. The package reads no answer that lacks a
field, so that all answers are checked for theirs."""
import asyncio, base64, gzip, hashlib, io, json, os, struct, sys, tarfile, time, urllib.parse
from datetime import datetime

import httpx

url, key = os.environ["E2B_API_URL"], os.environ["E2B_API_KEY"]
control = httpx.Client(base_url=url, headers={"X-API-KEY": key, "User-Agent": "e2b-python-sdk/2.9.0"}, timeout=60)

# The fields that the package's models must find. A name with ? may be null, one with @ is a time.
listed = "clientID cpuCount diskSizeMB @endAt envdVersion memoryMB sandboxID @startedAt state templateID"
fields = {name: text.split() for name, text in {
    "Sandbox": "clientID envdVersion sandboxID templateID",
    "ListedSandbox": listed,
    "SandboxDetail": listed + " lifecycle",
    "SandboxMetric": "cpuCount cpuUsedPct diskTotal diskUsed memCache memTotal memUsed @timestamp timestampUnix",
    "SnapshotInfo": "names snapshotID",
    "SandboxLogEntry": "fields level message @timestamp",
    "Template": "aliases buildCount buildID buildStatus cpuCount @createdAt ?createdBy diskSizeMB envdVersion "
                "?lastSpawnedAt memoryMB names public spawnCount templateID @updatedAt",
    "TemplateAliasResponse": "public templateID",
    "TemplateRequestResponseV3": "aliases buildID names public tags templateID",
    "TemplateBuildFileUpload": "present url",
    "TemplateBuildInfo": "buildID logEntries logs status templateID",
    "BuildLogEntry": "level message @timestamp",
    "AssignedTemplateTags": "buildID tags",
    "TemplateTag": "buildID @createdAt tag",
    "SandboxEvent": "?eventData id sandboxBuildId sandboxExecutionId sandboxId sandboxTeamId sandboxTemplateId "
                    "@timestamp type version",
    "Error": "code message",
}.items()}


def whole(model, answer):
    """Returns an answer that has all fields of a model."""
    for field in fields[model]:
        name = field.lstrip("?@")
        assert name in answer and (answer[name] is not None or field[0] == "?"), (model, name, answer)
        if field[0] == "@":
            datetime.fromisoformat(answer[name].replace("Z", "+00:00"))
    return answer


def each(model, r):
    assert r.status_code == 200, (r.status_code, r.text)
    return [whole(model, one) for one in r.json()]


def created(**more):
    r = control.post("/sandboxes", json={
        "templateID": "base", "timeout": 120, "secure": True, "allow_internet_access": True, "metadata": {}, "envVars": {},
        "autoPause": False, "autoPauseMemory": True, "autoResume": {"enabled": False}, **more})
    assert r.status_code == 201, (r.status_code, r.text)
    return whole("Sandbox", r.json())


def routed(sandbox, user="user"):
    basic = base64.b64encode(f"{user}:".encode()).decode()
    return {"E2b-Sandbox-Id": sandbox["sandboxID"], "E2b-Sandbox-Port": "49983", "Authorization": f"Basic {basic}",
            "X-Access-Token": sandbox["envdAccessToken"], "User-Agent": "e2b-python-sdk/2.9.0"}


def envelope(message, compress):
    data = json.dumps(message).encode()
    if compress:
        data = gzip.compress(data)
    return struct.pack(">BI", 1 if compress else 0, len(data)) + data


def messages(data, compressed, error=None):
    """Returns the messages of a stream, and checks its end."""
    out = []
    while data:
        flags, size = struct.unpack(">BI", data[:5])
        body, data = data[5:5 + size], data[5 + size:]
        if flags & 1:
            assert compressed, "a message is compressed, and was not asked to be"
            body = gzip.decompress(body)
        if flags & 2:
            end = json.loads(body or b"{}")
            assert not data and (end == {} if error is None else end["error"]["code"] == error), (body, data)
            return out
        out.append(json.loads(body))
    raise AssertionError(f"the stream has no end: {out}")


def start(command, **more):
    return {"process": {"cmd": "/bin/bash", "args": ["-l", "-c", command], "envs": {}, **more}, "stdin": False}


def streaming(compress, timeout=30_000, keepalive=50):
    h = {"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1", "Connect-Timeout-Ms": str(timeout),
         "Keepalive-Ping-Interval": str(keepalive)}
    if compress:
        h |= {"Connect-Content-Encoding": "gzip", "Connect-Accept-Encoding": "gzip"}
    return h


def run(client, command, compress=False, **more):
    r = client.post("/process.Process/Start", headers=streaming(compress), content=envelope(start(command, **more), compress))
    assert r.status_code == 200, (r.status_code, r.text)
    events = [m["event"] for m in messages(r.content, compress)]
    assert "start" in events[0] and events[-1]["end"].get("exitCode", 0) == 0, events
    return b"".join(base64.b64decode(e["data"].get("stdout", "")) for e in events if "data" in e).decode()


def unary(client, method, message, compress=False):
    h = {"Content-Type": "application/json", "Connect-Protocol-Version": "1", "Connect-Timeout-Ms": "60000",
         "Accept-Encoding": "identity"}
    data = json.dumps(message, indent=2).encode()  # as protobuf's own encoder
    if compress:
        h, data = h | {"Content-Encoding": "gzip"}, gzip.compress(data)
    r = client.post(method, headers=h, content=data)
    return r.status_code, r.json()


def files(client):
    # A form with several files, whose names are paths.
    r = client.post("/files", params={"username": "user"}, files=[("file", ("a/one ü.txt", b"one")), ("file", ("two", "two"))])
    assert [f["path"] for f in r.json()] == ["/home/user/a/one ü.txt", "/home/user/two"], r.text
    # One file, whose path is in the query.
    r = client.post("/files", params={"path": "three", "username": "user"}, files={"file": ("three", b"\0three\r\n--x")})
    assert r.status_code == 200, r.text
    # A generator is sent in chunks; compressed ones are unpacked.
    r = client.post("/files", params={"path": "four"}, headers={"Content-Type": "application/octet-stream"},
                    content=(b"x" * 65536 for _ in range(40)))
    assert r.status_code == 200 and r.request.headers["transfer-encoding"] == "chunked", r.text
    r = client.post("/files", params={"path": "five"}, content=gzip.compress(b"five" * 1000),
                    headers={"Content-Type": "application/octet-stream", "Content-Encoding": "gzip"})
    assert r.status_code == 200, r.text
    for path, want in {"a/one ü.txt": b"one", "two": b"two", "three": b"\0three\r\n--x", "four": b"x" * 65536 * 40,
                       "five": b"five" * 1000}.items():
        r = client.get("/files", params={"path": path, "username": "user"})  # asks for gzip, deflate and br
        assert r.content == want, (path, len(r.content))
    with client.stream("GET", "/files", params={"path": "four"}) as r:
        assert sum(len(chunk) for chunk in r.iter_bytes()) == 65536 * 40
    assert client.get("/files", params={"path": "none"}).json()["code"] == 404


def watchers(client):
    """The three calls that only the Python package makes."""
    status, made = unary(client, "/filesystem.Filesystem/CreateWatcher", {"path": "/home/user", "recursive": True})
    assert status == 200, made
    client.post("/files", params={"path": "seen"}, files={"file": ("seen", b"1")})
    events = []
    for _ in range(100):
        status, got = unary(client, "/filesystem.Filesystem/GetWatcherEvents", {"watcherId": made["watcherId"]})
        assert status == 200, got
        events += got.get("events", [])
        if any(e["name"] == "seen" for e in events):
            break
    else:
        raise AssertionError(f"the watcher saw {events}")
    assert unary(client, "/filesystem.Filesystem/RemoveWatcher", {"watcherId": made["watcherId"]})[0] == 200
    status, got = unary(client, "/filesystem.Filesystem/GetWatcherEvents", {"watcherId": made["watcherId"]})
    assert (status, got["code"]) == (404, "not_found"), got


def calls(client, version):
    for compress in (False, True):
        assert run(client, 'echo "$X $(id -un)"', compress, envs={"X": "y"}) == "y user\n"
        assert len(run(client, "head -c 3000000 /dev/zero | tr '\\0' z", compress)) == 3000000
        status, got = unary(client, "/filesystem.Filesystem/Stat", {"path": "/etc/hostname"}, compress)
        assert status == 200 and got["entry"]["type"] == "FILE_TYPE_FILE", got
        status, got = unary(client, "/filesystem.Filesystem/Stat", {"path": "/none"}, compress)
        assert (status, got["code"]) == (404, "not_found"), got
    files(client)
    watchers(client)
    with client.stream("POST", "/process.Process/Start", headers=streaming(False),
                       content=envelope(start("echo first; sleep 1000"), False)) as r:
        assert r.http_version == version
        seen = b""
        for chunk in r.iter_raw():  # each message comes at once
            seen += chunk
            if base64.b64encode(b"first\n") in seen:
                break
    assert client.get("/health").status_code == 204


def patience(client):
    """A command is silent, and comes to its end of time."""
    r = client.post("/process.Process/Start", headers=streaming(False, 3000, 1), content=envelope(start("sleep 1000"), False))
    events = [m["event"] for m in messages(r.content, False, "deadline_exceeded")]
    assert "start" in events[0] and any("keepalive" in e for e in events), events
    status, got = unary(client, "/process.Process/List", {})
    assert status == 200 and not any("sleep 1000" in p["config"]["args"] for p in got.get("processes", [])), got


def killed(**transport):
    """A stream of a sandbox that is killed breaks, and its health tells why."""
    sandbox = created()
    with httpx.Client(base_url=url, headers=routed(sandbox), timeout=60, **transport) as client:
        with client.stream("POST", "/process.Process/Start", headers=streaming(False),
                           content=envelope(start("sleep 1000"), False)) as r:
            chunks = r.iter_raw()
            next(chunks)
            assert control.delete(f"/sandboxes/{sandbox['sandboxID']}").status_code == 204
            try:
                for _ in chunks:
                    pass
                raise AssertionError("the stream ended in order")
            except httpx.RemoteProtocolError:
                pass
        assert client.get("/health").status_code == 502


def forked(sandbox):
    id = sandbox["sandboxID"]
    for path, body in ((f"/sandboxes/{id}/fork", {"timeout": 60, "count": 1}), (f"/v2/sandboxes/{id}/fork", {})):
        r = control.post(path, json=body)
        assert r.status_code == 201, r.text
        child = whole("Sandbox", r.json()[0]["sandbox"])
        assert control.delete(f"/sandboxes/{child['sandboxID']}").status_code == 204
    r = control.post(f"/sandboxes/{id}/snapshots", json={})
    snapshot = whole("SnapshotInfo", r.json())["snapshotID"]
    assert snapshot in [s["snapshotID"] for s in each("SnapshotInfo", control.get("/snapshots", params={"sandboxID": id}))]
    assert control.delete("/templates/" + urllib.parse.quote(snapshot, safe="")).status_code == 204
    events = each("SandboxEvent", control.get(f"/events/sandboxes/{id}"))
    assert [e["type"] for e in events] == ["sandbox.lifecycle.checkpointed", "sandbox.lifecycle.created"], events
    several = control.get("/events/sandboxes", params={"limit": 100, "types": ["sandbox.lifecycle.created"]})
    assert events[1] in each("SandboxEvent", several)


def templates():
    """The calls of a build. Older versions of the package call the name an alias."""
    r = control.post("/v3/templates", json={"alias": "py-wire", "cpuCount": 2, "memoryMB": 1024})
    made = whole("TemplateRequestResponseV3", r.json())
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w:gz") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"text\n"))
    hash = hashlib.sha256(files.getvalue()).hexdigest()
    upload = whole("TemplateBuildFileUpload", control.get(f"/templates/{made['templateID']}/files/{hash}").json())
    assert not upload["present"] and httpx.put(upload["url"], content=files.getvalue()).status_code < 300
    r = control.post(f"/v2/templates/{made['templateID']}/builds/{made['buildID']}", json={
        "fromTemplate": "python", "force": False, "startCmd": "python3 -m http.server 8000", "readyCmd": "ss -tuln | grep :8000",
        "steps": [{"type": "COPY", "args": ["a.txt", "a.txt", "", ""], "force": True, "filesHash": hash, "forceUpload": True},
                  {"type": "RUN", "args": ["sudo cp a.txt /b.txt", "root"], "force": False}]})
    assert r.status_code == 202, r.text
    entries, status = 0, "waiting"
    while status in ("waiting", "building"):
        time.sleep(0.2)
        r = control.get(f"/templates/{made['templateID']}/builds/{made['buildID']}/status", params={"logsOffset": entries})
        status = whole("TemplateBuildInfo", r.json())["status"]
        entries += len([whole("BuildLogEntry", e) for e in r.json()["logEntries"]])
    assert status == "ready" and entries > 0, r.text
    sandbox = created(templateID="py-wire")
    with httpx.Client(base_url=url, headers=routed(sandbox), timeout=60) as client:
        assert run(client, "cat a.txt /b.txt; curl -s localhost:8000/a.txt") == "text\n" * 3
    assert control.delete(f"/sandboxes/{sandbox['sandboxID']}").status_code == 204
    names = [t["names"][0] for t in each("Template", control.get("/v2/templates"))]
    assert "py-wire" in names and "base" in names, names
    whole("TemplateAliasResponse", control.get("/templates/aliases/py-wire").json())
    whole("AssignedTemplateTags", control.post("/templates/tags", json={"target": "py-wire", "tags": ["v1"]}).json())
    tags = each("TemplateTag", control.get(f"/templates/{made['templateID']}/tags"))
    assert [t["tag"] for t in tags] == ["default", "v1"], tags
    assert control.request("DELETE", "/templates/tags", json={"name": "py-wire", "tags": ["v1"]}).status_code == 204
    assert control.delete("/templates/py-wire").status_code == 204


async def concurrently(sandbox):
    async with httpx.AsyncClient(base_url=url, headers=routed(sandbox), timeout=60) as client:
        async def one(i):
            r = await client.post("/process.Process/Start", headers=streaming(False),
                                  content=envelope(start(f"sleep 0.2; echo {i}"), False))
            events = [m["event"] for m in messages(r.content, False)]
            assert any(base64.b64decode(e.get("data", {}).get("stdout", "")) == f"{i}\n".encode() for e in events), events
        await asyncio.gather(*(one(i) for i in range(12)))
        try:  # a limit of the client; the server must stay usable
            await client.post("/process.Process/Start", headers=streaming(False), timeout=0.5,
                              content=envelope(start("sleep 1000"), False))
            raise AssertionError("the limit of the client did not pass")
        except httpx.ReadTimeout:
            pass
        assert (await client.get("/health")).status_code == 204


def lists():
    made = [created(metadata={"wire": "py", "n": str(i), "a b": "ü&=%"}) for i in range(3)]
    ids = {s["sandboxID"] for s in made}
    try:
        assert control.post(f"/sandboxes/{made[0]['sandboxID']}/pause").status_code == 204  # without a body
        for query, want in {"metadata=wire%3Dpy": 3, "metadata=wire%3Dpy%26n%3D1": 1, "metadata=wire%3Dpy&state=paused": 1,
                            "metadata=wire%3Dpy&state=running": 2, "metadata=wire%3Dpy&state=running,paused": 3,
                            "metadata=wire%3Dpy&state=running&state=paused": 3, "metadata=wire%3Dother": 0,
                            "metadata=wire%3Dpy&template=base": 3, "metadata=wire%3Dpy&template=none": 0}.items():
            r = control.get("/v2/sandboxes?" + query)
            assert len(each("ListedSandbox", r)) == want and not r.headers.get("x-next-token"), (query, r.text)
        # Names and values are quoted, then the pairs, and then the query by the library.
        odd = urllib.parse.urlencode({urllib.parse.quote(k): urllib.parse.quote(v) for k, v in {"a b": "ü&=%", "n": "1"}.items()})
        r = control.get("/v2/sandboxes", params={"metadata": odd, "state": ["running", "paused"]})
        assert [s["sandboxID"] for s in each("ListedSandbox", r)] == [made[1]["sandboxID"]], r.text
        for order in ("asc", "desc"):
            seen, token = [], None
            while token != "":
                params = {"limit": 1, "metadata": "wire=py", "order": order} | ({"nextToken": token} if token else {})
                r = control.get("/v2/sandboxes", params=params)
                page, token = r.json(), r.headers.get("x-next-token", "")
                assert len(page) == 1, r.text
                seen.append(page[0]["sandboxID"])
            want = [s["sandboxID"] for s in made]
            assert seen == (want if order == "asc" else want[::-1]), (order, seen)
    finally:
        for id in ids:
            assert control.delete(f"/sandboxes/{id}").status_code == 204


def main():
    sandbox = created(metadata={"a b": "ü&"}, envVars={"K": "v"})
    try:
        with httpx.Client(base_url=url, headers=routed(sandbox), timeout=60) as client:
            calls(client, "HTTP/1.1")
            patience(client)
        # With prior knowledge; over TLS a proxy in front negotiates it.
        with httpx.Client(base_url=url, headers=routed(sandbox), timeout=60, http1=False, http2=True) as client:
            calls(client, "HTTP/2")
        asyncio.run(concurrently(sandbox))
        id = sandbox["sandboxID"]
        assert control.post(f"/sandboxes/{id}/timeout", json={"timeout": 60}).status_code == 204
        assert whole("Sandbox", control.post(f"/sandboxes/{id}/connect", json={"timeout": 60}).json())["sandboxID"] == id
        assert whole("SandboxDetail", control.get(f"/sandboxes/{id}").json())["metadata"] == {"a b": "ü&"}
        for entry in control.get(f"/v2/sandboxes/{id}/logs").json()["logs"]:
            whole("SandboxLogEntry", entry)
        for _ in range(150):  # until the first sample
            metrics = each("SandboxMetric", control.get(f"/sandboxes/{id}/metrics"))
            if metrics:
                break
            time.sleep(0.2)
        else:
            raise AssertionError("there are no metrics")
        forked(sandbox)
    finally:
        assert control.delete(f"/sandboxes/{sandbox['sandboxID']}").status_code == 204
    assert whole("Error", control.delete(f"/sandboxes/{sandbox['sandboxID']}").json())["code"] == 404
    killed()
    killed(http1=False, http2=True)
    lists()


main() if sys.argv[1] == "sandboxes" else templates()
print("all of it")
