"""Requests as E2B's Python package sends them, made by hand with the library that it uses, httpx: the control
API, files as forms and as streams, and Connect with JSON, with compression, over HTTP/1.1 and HTTP/2, by one
client that keeps its connections and by an asynchronous one."""
import asyncio, base64, gzip, json, os, struct, sys

import httpx

url, key = os.environ["E2B_API_URL"], os.environ["E2B_API_KEY"]
control = httpx.Client(base_url=url, headers={"X-API-KEY": key, "User-Agent": "e2b-python-sdk/2.9.0"}, timeout=60)


def created(**more):
    r = control.post("/sandboxes", json={"templateID": "base", "timeout": 120, "secure": True, "autoPause": False, **more})
    assert r.status_code == 201, (r.status_code, r.text)
    return r.json()


def routed(sandbox, user="user"):
    basic = base64.b64encode(f"{user}:".encode()).decode()
    return {"E2b-Sandbox-Id": sandbox["sandboxID"], "E2b-Sandbox-Port": "49983", "Authorization": f"Basic {basic}",
            "X-Access-Token": sandbox["envdAccessToken"], "User-Agent": "e2b-python-sdk/2.9.0"}


def envelope(message, compress):
    data = json.dumps(message).encode()
    if compress:
        data = gzip.compress(data)
    return struct.pack(">BI", 1 if compress else 0, len(data)) + data


def messages(data, compressed):
    """Returns the messages of a stream, and checks its end."""
    out = []
    while data:
        flags, size = struct.unpack(">BI", data[:5])
        body, data = data[5:5 + size], data[5 + size:]
        if flags & 1:
            assert compressed, "a message is compressed, and was not asked to be"
            body = gzip.decompress(body)
        if flags & 2:
            assert json.loads(body or b"{}") == {} and not data, (body, data)
            return out
        out.append(json.loads(body))
    raise AssertionError(f"the stream has no end: {out}")


def start(command, **more):
    return {"process": {"cmd": "/bin/bash", "args": ["-l", "-c", command], "envs": {}, **more}, "stdin": False}


def streaming(compress):
    h = {"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1", "Connect-Timeout-Ms": "30000",
         "Keepalive-Ping-Interval": "50"}
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
    h, data = {"Content-Type": "application/json", "Connect-Protocol-Version": "1"}, json.dumps(message).encode()
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
    made = [created(metadata={"wire": "py", "n": str(i)}) for i in range(3)]
    ids = {s["sandboxID"] for s in made}
    try:
        assert control.post(f"/sandboxes/{made[0]['sandboxID']}/pause").status_code == 204  # without a body
        for query, want in {"metadata=wire%3Dpy": 3, "metadata=wire%3Dpy%26n%3D1": 1, "metadata=wire%3Dpy&state=paused": 1,
                            "metadata=wire%3Dpy&state=running": 2, "metadata=wire%3Dpy&state=running,paused": 3,
                            "metadata=wire%3Dpy&state=running&state=paused": 3, "metadata=wire%3Dother": 0,
                            "metadata=wire%3Dpy&template=base": 3, "metadata=wire%3Dpy&template=none": 0}.items():
            r = control.get("/v2/sandboxes?" + query)
            assert len(r.json()) == want and not r.headers.get("x-next-token"), (query, r.text)
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
        # With prior knowledge; over TLS a proxy in front negotiates it.
        with httpx.Client(base_url=url, headers=routed(sandbox), timeout=60, http1=False, http2=True) as client:
            calls(client, "HTTP/2")
        asyncio.run(concurrently(sandbox))
        id = sandbox["sandboxID"]
        assert control.post(f"/sandboxes/{id}/timeout", json={"timeout": 60}).status_code == 204
        assert control.post(f"/sandboxes/{id}/connect", json={"timeout": 60}).json()["sandboxID"] == id
        assert control.get(f"/sandboxes/{id}").json()["metadata"] == {"a b": "ü&"}
        assert isinstance(control.get(f"/sandboxes/{id}/metrics").json(), list)
    finally:
        assert control.delete(f"/sandboxes/{sandbox['sandboxID']}").status_code == 204
    assert control.delete(f"/sandboxes/{sandbox['sandboxID']}").json()["code"] == 404
    lists()
    print("all of it")


sys.exit(main())
