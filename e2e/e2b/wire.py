"""Requests as E2B's Python package sends them, made by hand with httpx, which the package used until its version 2.38:
what wire_sandboxes.py and wire_templates.py share. The package reads no answer that lacks a field, so that all answers
are checked for theirs. Checks name the methods of the package whose requests they make, for the matrix in docs/e2b.md."""
import base64, contextlib, gzip, json, os, re, struct, urllib.parse
from datetime import datetime

import httpx

url, key = os.environ["E2B_API_URL"], os.environ["E2B_API_KEY"]

methods = {}  # the requests of each method, as patterns of what note returns
for line in open(os.path.join(os.path.dirname(__file__), "python.txt")):
    if line[0] != "#":
        name, verb, path, *text = line.rstrip("\n").split(" ", 3)
        path = re.escape(path).replace(r"\*", "[^/ ]+")
        methods.setdefault(name, []).append(re.compile(f"{verb} {path} .*{re.escape(''.join(text))}", re.DOTALL))

made = []  # the requests that were answered, with their statuses and, if they failed, their messages


def note(r):
    """Keeps what a request was and how it was answered, after its head has come."""
    body, message = "", ""
    with contextlib.suppress(httpx.RequestNotRead):  # the body of a stream is not kept
        body = r.request.content.decode(errors="replace")
    if r.status_code >= 400:
        r.read()
        message = r.json().get("message", "") if r.headers.get("content-type", "").startswith("application/json") else ""
    path, _, query = r.request.url.raw_path.decode().partition("?")
    request = f"{r.request.method} {path} {r.request.headers['host']} {urllib.parse.unquote(query)} {body}"
    made.append((request, r.status_code, message))


async def note_later(r):
    if r.status_code >= 400:
        await r.aread()
    note(r)


@contextlib.contextmanager
def method(*names):
    """Records that the requests of methods were made by the statements within, whose checks have passed, and how
    they were answered: a method is refused if one of its requests was never answered with success."""
    begin = len(made)
    yield
    for name in names:
        refused = ""
        for pattern in methods[name]:
            answers = [(status, message) for request, status, message in made[begin:] if pattern.match(request)]
            assert answers, f"{name} makes a request {pattern.pattern}, and these were made: {made[begin:]}"
            if all(status >= 300 for status, _ in answers):
                status, message = answers[-1]
                refused = message if status == 501 else f"{status}: {message}"
        with open(os.environ["E2B_TEST_RECORD"], "a") as record:
            print(json.dumps({"name": name, "refused": refused}), file=record)


def client_of(**options):
    return httpx.Client(base_url=url, timeout=60, event_hooks={"response": [note]}, **options)


control = client_of(headers={"X-API-KEY": key, "User-Agent": "e2b-python-sdk/2.9.0"})

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


def received(chunks, compressed=False, error=None):
    """Yields the messages of a stream as they come, and checks its end."""
    data, ended = b"", False
    for chunk in chunks:
        data += chunk
        while len(data) >= 5 and len(data) >= 5 + (size := struct.unpack(">BI", data[:5])[1]):
            assert not ended, f"there is more after the end: {data}"
            flags, body, data = data[0], data[5:5 + size], data[5 + size:]
            if flags & 1:
                assert compressed, "a message is compressed, and was not asked to be"
                body = gzip.decompress(body)
            if not flags & 2:
                yield json.loads(body)
                continue
            end, ended = json.loads(body or b"{}"), True
            assert end == {} if error is None else end["error"]["code"] == error, body
    assert ended and not data, f"the stream has no end: {data}"


def messages(data, compressed, error=None):
    return list(received([data], compressed, error))


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


def asked(client, method, message):
    status, answer = unary(client, method, message)
    assert status == 200, (method, status, answer)
    return answer


@contextlib.contextmanager
def streamed(client, message, method="Start"):
    """Opens a stream of a process, and gives its messages as they come."""
    with client.stream("POST", f"/process.Process/{method}", headers=streaming(False), content=envelope(message, False)) as r:
        assert r.status_code == 200, r.status_code
        yield (m["event"] for m in received(r.iter_raw()))


def first(events):
    """Returns the process whose events these are."""
    return {"process": {"pid": next(events)["start"]["pid"]}}


def b64(data):
    return base64.b64encode(data).decode()
