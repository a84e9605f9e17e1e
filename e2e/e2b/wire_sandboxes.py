"""Requests of E2B's Python package for sandboxes: the control API, files as forms and as streams, and Connect with JSON,
with compression, over HTTP/1.1 and HTTP/2, by one client that keeps its connections and by an asynchronous one."""
import asyncio, base64, gzip, hashlib, time, urllib.parse

import httpx

from wire import (asked, b64, client_of, control, created, each, envelope, first, messages, method, note_later,
                  routed, run, start, streamed, streaming, unary, url, whole)


def commands(client):
    with method("Sandbox.commands.send_stdin", "Sandbox.commands.close_stdin", "CommandHandle.send_stdin",
                "CommandHandle.close_stdin", "CommandHandle.wait"):
        with streamed(client, {**start("cat"), "stdin": True}) as events:
            process = first(events)
            asked(client, "/process.Process/SendInput", {**process, "input": {"stdin": b64(b"text")}})
            asked(client, "/process.Process/CloseStdin", process)
            *data, end = events
            assert b"".join(base64.b64decode(e["data"]["stdout"]) for e in data) == b"text" and "end" in end, (data, end)
    with method("Sandbox.commands.list", "Sandbox.commands.connect", "Sandbox.commands.kill", "CommandHandle.kill",
                "CommandHandle.disconnect"):
        with streamed(client, start("sleep 1001")) as events:
            process = first(events)
        assert process["process"]["pid"] in [p["pid"] for p in asked(client, "/process.Process/List", {})["processes"]]
        signal = {**process, "signal": "SIGNAL_SIGKILL"}
        with streamed(client, process, "Connect") as events:
            assert first(events) == process
            asked(client, "/process.Process/SendSignal", signal)
            assert next(events)["end"]["exitCode"] != 0 and not list(events)
        status, got = unary(client, "/process.Process/SendSignal", signal)
        assert (status, got["code"]) == (404, "not_found"), got


def terminal(client):
    shell = {"cmd": "/bin/bash", "args": ["-i", "-l"],
             "envs": {"TERM": "xterm-256color", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}}
    with method(*("Sandbox.pty." + name for name in ("create", "connect", "kill", "resize", "send_stdin"))):
        with streamed(client, {"process": shell, "pty": {"size": {"cols": 80, "rows": 24}}}) as events:
            process = first(events)
        with streamed(client, process, "Connect") as events:
            assert first(events) == process
            asked(client, "/process.Process/Update", {**process, "pty": {"size": {"cols": 100, "rows": 30}}})
            asked(client, "/process.Process/SendInput", {**process, "input": {"pty": b64(b'echo "<$(stty size)>"\n')}})
            seen = b""
            while b"<30 100>" not in seen:
                seen += base64.b64decode(next(events)["data"]["pty"])
            asked(client, "/process.Process/SendSignal", {**process, "signal": "SIGNAL_SIGKILL"})
            assert "end" in list(events)[-1]


def directories(client):
    with method(*("Sandbox.files." + name for name in ("make_dir", "list", "rename", "remove", "exists", "get_info"))):
        asked(client, "/filesystem.Filesystem/MakeDir", {"path": "dir/deep"})
        status, got = unary(client, "/filesystem.Filesystem/MakeDir", {"path": "dir/deep"})
        assert (status, got["code"]) == (409, "already_exists"), got
        assert asked(client, "/filesystem.Filesystem/Stat", {"path": "dir/deep"})["entry"]["type"] == "FILE_TYPE_DIRECTORY"
        entries = asked(client, "/filesystem.Filesystem/ListDir", {"path": "dir", "depth": 1})["entries"]
        assert [e["path"] for e in entries] == ["/home/user/dir/deep"], entries
        moved = asked(client, "/filesystem.Filesystem/Move", {"source": "dir/deep", "destination": "dir/moved"})
        assert moved["entry"]["path"] == "/home/user/dir/moved", moved
        asked(client, "/filesystem.Filesystem/Remove", {"path": "dir"})
        assert unary(client, "/filesystem.Filesystem/Stat", {"path": "dir"})[0] == 404


def git(client):
    """The commands of the methods for git, with every word quoted."""
    def words(*args, at=None):
        return " ".join("'" + a.replace("'", "'\"'\"'") + "'" for a in ["git", *(["-C", at] if at else []), *args])

    def does(name, *lines, want=""):
        with method("Sandbox.git." + name):
            for line in lines:
                out = run(client, line, envs={"GIT_TERMINAL_PROMPT": "0"})
        assert want in out, (name, out)

    origin, repo, copy = "/home/user/origin.git", "/home/user/repo", "/home/user/copy"
    does("init", words("init", "--initial-branch", "main", "--bare", origin),
         words("init", "--initial-branch", "main", repo))
    does("configure_user", words("config", "--global", "user.name", "A Person"),
         words("config", "--global", "user.email", "a@b"))
    does("set_config", words("config", "--global", "pull.rebase", "true"))
    does("get_config", words("config", "--global", "--get", "pull.rebase") + " || true", want="true\n")
    run(client, f"echo text > {repo}/file")
    does("add", words("add", "-A", at=repo))
    does("commit", words("commit", "-m", "it's the first", at=repo))
    does("remote_add", words("remote", "add", "origin", origin, at=repo))
    does("remote_get", words("remote", "get-url", "origin", at=repo) + " || true", want=origin)
    does("push", words("push", "--set-upstream", "origin", "main", at=repo))
    does("status", words("status", "--porcelain=1", "-b", at=repo), want="## main...origin/main\n")
    does("clone", words("clone", origin, copy))
    does("create_branch", words("checkout", "-b", "side", at=copy))
    does("branches", words("branch", "--format=%(refname:short)\t%(HEAD)", at=copy), want="side\t*\n")
    does("checkout_branch", words("checkout", "main", at=copy))
    does("delete_branch", words("branch", "-d", "side", at=copy))
    run(client, f"echo changed > {copy}/file")
    does("restore", words("restore", "--worktree", "--", "file", at=copy))
    does("reset", words("reset", "--hard", at=copy))
    does("pull", words("rev-parse", "--abbrev-ref", "--symbolic-full-name", "@{u}", at=copy), words("pull", at=copy))
    does("dangerously_authenticate", words("config", "--global", "credential.helper", "store"),
         "printf %s 'protocol=https\nhost=github.com\nusername=u\npassword=p\n\n' | " + words("credential", "approve"))
    assert run(client, f"cat {copy}/file ~/.git-credentials") == "text\nhttps://u:p@github.com\n"


def addresses(sandbox, client):
    """What the package makes addresses of without a request, and requests to these."""
    def signed(path, operation, **more):
        raw = ":".join([path, operation, "", sandbox["envdAccessToken"], *map(str, more.values())])
        signature = "v1_" + b64(hashlib.sha256(raw.encode()).digest()).rstrip("=")
        return {"path": path, "signature": signature, **more}

    with client_of() as anybody:
        with method("Sandbox.upload_url"):
            r = anybody.post("/files", params=signed("by-url", "write"), files={"file": ("by-url", b"by a URL")})
            assert r.status_code == 200, r.text
        with method("Sandbox.download_url"):
            r = anybody.get("/files", params=signed("by-url", "read", signature_expiration=int(time.time()) + 60))
            assert r.content == b"by a URL", r.text
        with method("Sandbox.get_host"), streamed(client, start("exec python3 -m http.server 8000")):
            host = f"8000-{sandbox['sandboxID']}.{sandbox['domain']}"
            for _ in range(150):
                r = anybody.get("/", headers={"Host": host})
                if r.status_code == 200:
                    break
                time.sleep(0.2)
            assert "by-url" in r.text, (r.status_code, r.text)
        with method("Sandbox.get_mcp_url"):
            r = anybody.get("/mcp", headers={"E2b-Sandbox-Id": sandbox["sandboxID"], "E2b-Sandbox-Port": "50005"})
            assert r.status_code == 501, r.text
    with method("Sandbox.get_mcp_token"):
        assert client.get("/files", params={"path": "/etc/mcp-gateway/.token", "username": "root"}).status_code == 404


def absent():
    for name, verb, path, body in (
            ("Volume.create", "POST", "/volumes", {"name": "v"}), ("Volume.connect", "GET", "/volumes/v", None),
            ("Volume.get_info", "GET", "/volumes/v", None), ("Volume.list", "GET", "/volumes", None),
            ("Volume.destroy", "DELETE", "/volumes/v", None),
            ("Secret.create", "POST", "/secrets", {"name": "s", "value": "v"}),
            ("Secret.update", "POST", "/secrets/s", {"value": "v"}), ("Secret.get_info", "GET", "/secrets/s", None),
            ("Secret.exists", "GET", "/secrets/s", None), ("Secret.list", "GET", "/secrets", None),
            ("Secret.destroy", "DELETE", "/secrets/s", None)):
        with method(name):
            r = control.request(verb, path, json=body)
            assert whole("Error", r.json())["code"] == r.status_code == 501, r.text


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
    with method("Sandbox.files.watch_dir", "WatchHandle.get_new_events", "WatchHandle.stop"):
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
    with method("Sandbox.commands.run"):
        for compress in (False, True):
            assert run(client, 'echo "$X $(id -un)"', compress, envs={"X": "y"}) == "y user\n"
            assert len(run(client, "head -c 3000000 /dev/zero | tr '\\0' z", compress)) == 3000000
            status, got = unary(client, "/filesystem.Filesystem/Stat", {"path": "/etc/hostname"}, compress)
            assert status == 200 and got["entry"]["type"] == "FILE_TYPE_FILE", got
            status, got = unary(client, "/filesystem.Filesystem/Stat", {"path": "/none"}, compress)
            assert (status, got["code"]) == (404, "not_found"), got
    with method("Sandbox.files.read", "Sandbox.files.write", "Sandbox.files.write_files"):
        files(client)
    watchers(client)
    commands(client)
    terminal(client)
    directories(client)
    with client.stream("POST", "/process.Process/Start", headers=streaming(False),
                       content=envelope(start("echo first; sleep 1000"), False)) as r:
        assert r.http_version == version
        seen = b""
        for chunk in r.iter_raw():  # each message comes at once
            seen += chunk
            if base64.b64encode(b"first\n") in seen:
                break
    with method("Sandbox.is_running"):
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
    with client_of(headers=routed(sandbox), **transport) as client:
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
    with method("Sandbox.fork"):
        for path, body in ((f"/sandboxes/{id}/fork", {"timeout": 60, "count": 1}), (f"/v2/sandboxes/{id}/fork", {})):
            r = control.post(path, json=body)
            assert r.status_code == 201, r.text
            child = whole("Sandbox", r.json()[0]["sandbox"])
            assert control.delete(f"/sandboxes/{child['sandboxID']}").status_code == 204
    with method("Sandbox.create_snapshot"):
        taken = {whole("SnapshotInfo", control.post(f"/sandboxes/{id}/snapshots", json={}).json())["snapshotID"]
                 for _ in range(2)}
    with method("Sandbox.list_snapshots", "SnapshotPaginator.next_items"):
        r = control.get("/snapshots", params={"sandboxID": id, "limit": 1})
        rest = control.get("/snapshots", params={"sandboxID": id, "nextToken": r.headers["x-next-token"]})
        seen = each("SnapshotInfo", r) + each("SnapshotInfo", rest)
        assert len(seen) == 2 and {s["snapshotID"] for s in seen} == taken, seen
    with method("Sandbox.delete_snapshot"):
        for snapshot in taken:
            assert control.delete("/templates/" + urllib.parse.quote(snapshot, safe="")).status_code == 204
    events = each("SandboxEvent", control.get(f"/events/sandboxes/{id}"))
    assert [e["type"] for e in events] == ["sandbox.lifecycle.checkpointed"] * 2 + ["sandbox.lifecycle.created"], events
    several = control.get("/events/sandboxes", params={"limit": 100, "types": ["sandbox.lifecycle.created"]})
    assert events[-1] in each("SandboxEvent", several)


async def concurrently(sandbox):
    async with httpx.AsyncClient(base_url=url, headers=routed(sandbox), timeout=60,
                                 event_hooks={"response": [note_later]}) as client:
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
        # The asynchronous client watches by a stream, and stops by leaving it.
        with method("AsyncSandbox.files.watch_dir", "AsyncWatchHandle.stop"):
            async with client.stream("POST", "/filesystem.Filesystem/WatchDir", headers=streaming(False),
                                     content=envelope({"path": "/home/user", "recursive": False}, False)) as r:
                chunks = r.aiter_raw()
                seen = await chunks.__anext__()
                assert r.status_code == 200 and b'"start"' in seen, seen
                await client.post("/files", params={"path": "watched"}, files={"file": ("watched", b"1")})
                while b'"watched"' not in seen:
                    seen += await chunks.__anext__()
            assert (await client.get("/health")).status_code == 204


def lists():
    made = [created(metadata={"wire": "py", "n": str(i), "a b": "ü&=%"}) for i in range(3)]
    ids = {s["sandboxID"] for s in made}
    try:
        assert control.post(f"/sandboxes/{made[0]['sandboxID']}/pause").status_code == 204  # without a body
        with method("Sandbox.list", "SandboxPaginator.next_items"):
            for query, want in {"metadata=wire%3Dpy": 3, "metadata=wire%3Dpy%26n%3D1": 1,
                                "metadata=wire%3Dpy&state=paused": 1,
                                "metadata=wire%3Dpy&state=running": 2, "metadata=wire%3Dpy&state=running,paused": 3,
                                "metadata=wire%3Dpy&state=running&state=paused": 3, "metadata=wire%3Dother": 0,
                                "metadata=wire%3Dpy&template=base": 3, "metadata=wire%3Dpy&template=none": 0}.items():
                r = control.get("/v2/sandboxes?" + query)
                assert len(each("ListedSandbox", r)) == want and not r.headers.get("x-next-token"), (query, r.text)
            # Names and values are quoted, then the pairs, and then the query by the library.
            odd = urllib.parse.urlencode({urllib.parse.quote(k): urllib.parse.quote(v)
                                          for k, v in {"a b": "ü&=%", "n": "1"}.items()})
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
        id = made[2]["sandboxID"]
        with method("Sandbox.pause", "Sandbox.beta_pause", "Sandbox.connect"):
            for status in (204, 409):
                assert control.post(f"/sandboxes/{id}/pause", json={"memory": True}).status_code == status
            whole("Sandbox", control.post(f"/sandboxes/{id}/connect", json={"timeout": 60}).json())
        with method("Sandbox.update_network"):
            r = control.put(f"/sandboxes/{id}/network", json={"denyOut": ["0.0.0.0/0"]})
            assert r.status_code == 204, r.text
    finally:
        for id in ids:
            assert control.delete(f"/sandboxes/{id}").status_code == 204


def main():
    with method("Sandbox.create"):
        sandbox = created(metadata={"a b": "ü&"}, envVars={"K": "v"})
    try:
        with client_of(headers=routed(sandbox)) as client:
            calls(client, "HTTP/1.1")
            patience(client)
            git(client)
            addresses(sandbox, client)
        # With prior knowledge; over TLS a proxy in front negotiates it.
        with client_of(headers=routed(sandbox), http1=False, http2=True) as client:
            calls(client, "HTTP/2")
        asyncio.run(concurrently(sandbox))
        id = sandbox["sandboxID"]
        with method("Sandbox.set_timeout"):
            assert control.post(f"/sandboxes/{id}/timeout", json={"timeout": 60}).status_code == 204
        assert whole("Sandbox", control.post(f"/sandboxes/{id}/connect", json={"timeout": 60}).json())["sandboxID"] == id
        with method("Sandbox.get_info"):
            assert whole("SandboxDetail", control.get(f"/sandboxes/{id}").json())["metadata"] == {"a b": "ü&"}
        for entry in control.get(f"/v2/sandboxes/{id}/logs").json()["logs"]:
            whole("SandboxLogEntry", entry)
        with method("Sandbox.get_metrics"):
            for _ in range(150):  # until the first sample
                metrics = each("SandboxMetric", control.get(f"/sandboxes/{id}/metrics"))
                if metrics:
                    break
                time.sleep(0.2)
            else:
                raise AssertionError("there are no metrics")
        forked(sandbox)
    finally:
        with method("Sandbox.kill"):
            assert control.delete(f"/sandboxes/{sandbox['sandboxID']}").status_code == 204
    assert whole("Error", control.delete(f"/sandboxes/{sandbox['sandboxID']}").json())["code"] == 404
    killed()
    killed(http1=False, http2=True)
    lists()
    absent()


main()
print("all of it")
