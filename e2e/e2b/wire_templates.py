"""Requests of E2B's Python package for builds of templates, to a server that asks no registry."""
import hashlib, io, tarfile, time

from wire import client_of, control, created, each, method, routed, run, whole


def build(name, **template):
    """Makes the calls of a build that uploads no files, and returns its last state or its refusal."""
    r = control.post("/v3/templates", json={"name": name, "cpuCount": 2, "memoryMB": 1024})
    return built(whole("TemplateRequestResponseV3", r.json()), **template)


def built(made, **template):
    at = f"templates/{made['templateID']}/builds/{made['buildID']}"
    r = control.post(f"/v2/{at}", json={"force": False, **template})
    if r.status_code != 202:
        return whole("Error", r.json())
    entries, status = 0, "waiting"
    while status in ("waiting", "building"):
        time.sleep(0.2)
        r = control.get(f"/{at}/status", params={"logsOffset": entries})
        status = whole("TemplateBuildInfo", r.json())["status"]
        entries += len([whole("BuildLogEntry", e) for e in r.json()["logEntries"]])
    assert status == "ready" and entries > 0, r.text
    return r.json()


def step(kind, *args, **more):
    return {"type": kind, "args": list(args), "force": False, **more}


def uploaded(made, name, data):
    """Uploads a file, and returns the step that copies it."""
    files = io.BytesIO()
    with tarfile.open(fileobj=files, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    hash = hashlib.sha256(files.getvalue()).hexdigest()
    upload = whole("TemplateBuildFileUpload", control.get(f"/templates/{made['templateID']}/files/{hash}").json())
    with client_of() as anybody:
        assert not upload["present"] and anybody.put(upload["url"], content=files.getvalue()).status_code < 300
    return {**step("COPY", name, name, "", "", filesHash=hash, forceUpload=True), "force": True}


def templates():
    """The calls of builds. Older versions of the package call the name an alias."""
    with method("Template.build", "Template.build_in_background", "Template.get_build_status", *(
            "template." + name for name in (
                "from_template", "copy", "copy_items", "run_cmd", "set_envs", "set_workdir", "set_user", "set_start_cmd",
                "set_ready_cmd", "skip_cache", "make_dir", "make_symlink", "rename", "remove", "git_clone"))):
        r = control.post("/v3/templates", json={"alias": "py-wire", "cpuCount": 2, "memoryMB": 1024})
        made = whole("TemplateRequestResponseV3", r.json())
        empty = "git init -q /of && git -C /of -c user.name=a -c user.email=a@b commit -q --allow-empty -m first"
        built(made, fromTemplate="python", startCmd="python3 -m http.server 8000", readyCmd="ss -tuln | grep :8000", steps=[
            uploaded(made, "a.txt", b"text\n"), step("ENV", "SAID", "so"),
            step("RUN", f"sudo cp a.txt /b.txt && {empty}", "root"), step("RUN", "git clone /of /clone", "root"),
            step("RUN", "ln -s a.txt link"), step("RUN", "mv link moved"), step("USER", "root"), step("WORKDIR", "/srv"),
            step("RUN", "mkdir -p -m 0750 made"), step("RUN", "rm -r -f /of"), step("USER", "user"),
            step("WORKDIR", "/home/user")])
    sandbox = created(templateID="py-wire")
    with client_of(headers=routed(sandbox)) as client:
        assert run(client, "cat a.txt /b.txt moved; curl -s localhost:8000/a.txt") == "text\n" * 4
        said = run(client, "echo $SAID; stat -c '%a %U' /srv/made; ls -d /of || true; sudo git -C /clone log --format=%s")
        assert said == "so\n750 root\nfirst\n", said
    assert control.delete(f"/sandboxes/{sandbox['sandboxID']}").status_code == 204
    names = [t["names"][0] for t in each("Template", control.get("/v2/templates"))]
    assert "py-wire" in names and "base" in names, names
    with method("Template.exists", "Template.alias_exists"):
        whole("TemplateAliasResponse", control.get("/templates/aliases/py-wire").json())
    with method("Template.assign_tags"):
        whole("AssignedTemplateTags", control.post("/templates/tags", json={"target": "py-wire", "tags": ["v1"]}).json())
    with method("Template.get_tags"):
        tags = each("TemplateTag", control.get(f"/templates/{made['templateID']}/tags"))
        assert [t["tag"] for t in tags] == ["default", "v1"], tags
    with method("Template.remove_tags"):
        assert control.request("DELETE", "/templates/tags", json={"name": "py-wire", "tags": ["v1"]}).status_code == 204
    assert control.delete("/templates/py-wire").status_code == 204


def images():
    """What templates begin with. Images that mean cay's base are left out: their builds take long."""
    for names, image, steps in (
            (["from_image", "from_python_image"], "python:3", []),
            (["from_dockerfile"], "python:3.13", [step("USER", "root"), step("WORKDIR", "/"), step("ENV", "A", "b"),
                                                  step("USER", "user"), step("WORKDIR", "/home/user")])):
        with method(*("template." + name for name in names)):
            build("py-images", fromImage=image, steps=steps)
    assert control.delete("/templates/py-images").status_code == 204
    for name, base, more in (
            ("add_mcp_server", "mcp-gateway", {"steps": [step("RUN", "mcp-gateway pull exa", "root")]}),
            ("beta_dev_container_prebuild", "devcontainer",
             {"steps": [step("RUN", "devcontainer build --workspace-folder /w", "root")]}),
            ("beta_set_dev_container_start", "devcontainer",
             {"steps": [], "startCmd": "sudo devcontainer up --workspace-folder /w", "readyCmd": "[ -f /devcontainer.up ]"})):
        with method("template." + name):
            assert build("py-refused", fromTemplate=base, **more)["code"] == 404


templates()
images()
print("all of it")
