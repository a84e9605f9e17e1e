package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"net/textproto"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	cay "github.com/cayhq/cay/sdk/go"
)

// tarOf packs files by path. A path that ends in "/" is a directory.
func tarOf(t *testing.T, files map[string]string, more ...*tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, path := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: path, Mode: 0o644, Size: int64(len(files[path])), Typeflag: tar.TypeReg}
		if strings.HasPrefix(files[path], "#!") || strings.HasPrefix(files[path], "\x7fELF") {
			h.Mode = 0o755
		}
		if strings.HasSuffix(path, "/") {
			h.Mode, h.Typeflag = 0o755, tar.TypeDir
			if path == "tmp/" {
				h.Mode = 0o1777
			}
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[path]); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range more {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// tinyImage returns an image of busybox and the accounts that a sandbox needs, some 2 MB.
func tinyImage(t *testing.T) v1.Image {
	t.Helper()
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	var links []*tar.Header
	for _, tool := range []string{"sh", "ls", "cat", "echo", "id", "stat", "env", "sleep", "true", "false", "mkdir",
		"chmod", "chown", "ln", "cp", "wget",
		"httpd", "adduser", "grep", "dmesg", "find", "sort", "touch", "head", "tail", "wc", "dd", "nc", "ps", "kill", "rm", "ip", "readlink", "sha256sum", "date", "yes"} {
		links = append(links, &tar.Header{Name: "bin/" + tool, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777})
	}
	layer := tarOf(t, map[string]string{"bin/": "", "bin/busybox": string(busybox), "etc/": "", "tmp/": "", "root/": "",
		"var/":       "",
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
		"etc/group":  "root:x:0:\nuser:x:1000:\n", "home/": "", "home/user/": "",
	}, links...)
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil })
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Env = []string{"PATH=/bin", "FROM_TINY=yes"}
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	return image
}

// newRegistry serves the tiny image as HOST:PORT/tiny.
func newRegistry(t *testing.T) (reference string) {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	reference = strings.TrimPrefix(s.URL, "http://") + "/tiny:1"
	ref, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, tinyImage(t)); err != nil {
		t.Fatal(err)
	}
	return reference
}

// rebuild builds a template again, as the definition says, or as before if it is nil. It returns when the
// build has begun.
func (s *server) rebuild(name string, definition object) {
	s.t.Helper()
	var request *cay.RebuildTemplateRequest
	if definition != nil {
		request = new(requestOf[cay.RebuildTemplateRequest](s.t, definition))
	}
	if _, err := s.api().RebuildTemplate(context.Background(), name, request, nil); err != nil {
		s.t.Fatalf("rebuild: %v", err)
	}
}

// templateForm encodes a definition and its context as a form.
func templateForm(definition object, context []byte) (body *bytes.Buffer, contentType string) {
	body = &bytes.Buffer{}
	w := multipart.NewWriter(body)
	must := func(err error) {
		if err != nil {
			panic(err) // a buffer does not fail
		}
	}
	text, err := json.Marshal(definition)
	must(err)
	for _, part := range []struct {
		name, kind string
		data       []byte
	}{{"template", "application/json", text}, {"context", "application/x-tar", context}} {
		header := textproto.MIMEHeader{}
		header.Set("Content-Disposition", fmt.Sprintf(`form-data; name=%q; filename=%q`, part.name, part.name))
		header.Set("Content-Type", part.kind)
		p, err := w.CreatePart(header)
		must(err)
		_, err = p.Write(part.data)
		must(err)
	}
	must(w.Close())
	return body, w.FormDataContentType()
}

// build makes a template and waits for its end.
func (s *server) build(definition object, context []byte) (status string, body []byte) {
	s.t.Helper()
	s.beginBuild(definition, context)
	return s.built(definition["name"].(string))
}

// beginBuild makes a template and returns when its build has begun.
func (s *server) beginBuild(definition object, files []byte) {
	s.t.Helper()
	var source io.Reader
	if files != nil {
		source = bytes.NewReader(files)
	}
	request := requestOf[cay.CreateTemplateRequest](s.t, definition)
	if _, err := s.api().CreateTemplate(context.Background(), request, source); err != nil {
		s.t.Fatalf("creating template %v: %v", definition["name"], err)
	}
}

// built waits for the end of the newest build of a template.
func (s *server) built(name string) (status string, body []byte) {
	s.t.Helper()
	return s.builtWithin(templatePatience, name)
}

func (s *server) builtWithin(patience time.Duration, name string) (status string, body []byte) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) { // a poll with a deadline
		template, err := s.api().GetTemplate(context.Background(), name)
		if err != nil {
			s.t.Fatalf("reading template %s: %v", name, err)
		}
		if template.Status == cay.TemplateStatusReady || template.Status == cay.TemplateStatusFailed {
			return string(template.Status), []byte(jsonOf(template))
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("template %s is not built after %s: %s", name, patience, jsonOf(template))
		}
	}
}

// needBuilt makes a template that must become ready.
func (s *server) needBuilt(definition object, context []byte) {
	s.t.Helper()
	s.needBuiltWithin(templatePatience, definition, context)
}

func (s *server) needBuiltWithin(patience time.Duration, definition object, context []byte) {
	s.t.Helper()
	s.beginBuild(definition, context)
	status, body := s.builtWithin(patience, definition["name"].(string))
	if status != "ready" {
		s.t.Fatalf("template %v: %s\n%s", definition["name"], body, s.templateLog(definition["name"].(string)))
	}
}

// templateLog returns the log of a template's newest build.
func (s *server) templateLog(name string) string {
	s.t.Helper()
	lines, err := s.api().TemplateLogs(context.Background(), name)
	if err != nil {
		s.t.Errorf("log of template %s: %v", name, err)
	}
	return jsonOf(lines)
}

// inside runs a command in a new sandbox of a template.
func (s *server) inside(template, command string) string {
	s.t.Helper()
	id := s.create(object{"template": template})
	defer s.destroy(id)
	return s.want(id, command)
}

// newBuilder returns a server that may use the registry of the test.
func newBuilder(t *testing.T, env ...string) (s *server, tiny string) {
	t.Helper()
	tiny = newRegistry(t)
	s = newServer(t, append(env, "CAY_IMAGES_REGISTRIES="+strings.SplitN(tiny, "/", 2)[0],
		"CAY_TEMPLATES_PREPARE=python")...)
	s.start()
	return s, tiny
}

// TestDockerfiles builds Dockerfiles with every instruction and checks the results from inside a
// sandbox.
func TestDockerfiles(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t)
	for name, tt := range map[string]struct {
		dockerfile string // "%s" is replaced by the tiny image
		files      map[string]string
		more       object
		command    string
		want       string
	}{
		"run-and-env": {
			dockerfile: "FROM %s\nARG WHO=nobody\nENV GREETING=\"hello $WHO\"\nRUN echo \"$GREETING\" >/greeting\n",
			more:       object{"build_args": object{"WHO": "world"}},
			command:    `cat /greeting; echo "$GREETING $FROM_TINY"`, want: "hello world\nhello world yes",
		},
		"multi-stage": {
			dockerfile: "FROM %[1]s AS build\nRUN mkdir /out && echo built >/out/result\nFROM %[1]s\nCOPY --from=build /out/result /result\n",
			command:    "cat /result; ls /out 2>/dev/null || echo no out", want: "built\nno out",
		},
		"heredoc": {
			dockerfile: "FROM %s\nRUN <<END\necho one >/lines\necho two >>/lines\nEND\nCOPY <<END /text\nsome text\nEND\n",
			command:    "cat /lines /text", want: "one\ntwo\nsome text",
		},
		"copy-ignore": {
			dockerfile: "FROM %s\nWORKDIR /app\nCOPY . .\nRUN find . -type f | sort >/list\n",
			files:      map[string]string{"a.txt": "a", "sub/b.txt": "b", "secret.key": "x", "node_modules/m.js": "m", ".dockerignore": "*.key\nnode_modules\nDockerfile\n.dockerignore\n"},
			command:    "pwd; cat /list", want: "/app\n./a.txt\n./sub/b.txt",
		},
		"owners-and-modes": {
			dockerfile: "FROM %s\nCOPY --chown=1000:1000 --chmod=0640 a.txt /data/a.txt\nRUN touch /data/s && chmod 4755 /data/s && ln /data/s /data/hard && ln -s s /data/soft\n",
			files:      map[string]string{"a.txt": "a"},
			command:    "stat -c '%a %u:%g %h' /data/a.txt /data/s /data/hard; readlink /data/soft", want: "640 1000:1000 1\n4755 0:0 2\n4755 0:0 2\ns",
		},
		"user": {
			dockerfile: "FROM %s\nUSER user\nWORKDIR /home/user\nRUN id -u >/tmp/build-user\n",
			command:    "cat /tmp/build-user; id -u; pwd", want: "1000\n1000\n/home/user",
		},
		"mounts": {
			dockerfile: "FROM %s\nRUN --mount=type=cache,target=/cache echo kept >/cache/file\n" +
				"RUN --mount=type=cache,target=/cache --mount=type=bind,source=a.txt,target=/bound " +
				"--mount=type=tmpfs,target=/scratch cat /cache/file /bound >/result && touch /scratch/x\n",
			files:   map[string]string{"a.txt": "bound\n"},
			command: "cat /result; ls /cache /scratch 2>/dev/null | wc -l", want: "kept\nbound\n0",
		},
		"shell-and-args": {
			dockerfile: "FROM %s\nSHELL [\"/bin/sh\", \"-ec\"]\nRUN echo $0 >/shell\nRUN [\"/bin/sh\", \"-c\", \"echo exec form >/form\"]\n",
			command:    "cat /form", want: "exec form",
		},
		"onbuild-target": {
			dockerfile: "FROM %[1]s AS one\nRUN echo one >/which\nFROM %[1]s AS two\nRUN echo two >/which\nFROM two AS three\nRUN false\n",
			more:       object{"target": "two"},
			command:    "cat /which", want: "two",
		},
		"gvisor": {
			dockerfile: "FROM %s\nRUN dmesg | grep -c -i gvisor >/kernel\n",
			command:    "cat /kernel", want: "1",
		},
		"from-builtin": {
			dockerfile: "FROM python\nRUN python3 -c 'import sys; open(\"/version\", \"w\").write(str(sys.version_info[0]))'\n",
			command:    "cat /version; python3 -c 'print(1+1)'", want: "32",
		},
		"volume": {
			dockerfile: "FROM %s\nVOLUME /var/lib/data /tmp\n",
			command:    "cd /var/lib/data && echo x >y && cat y", want: "x",
		},
		"times": { // byte code holds the time of its source
			dockerfile: "FROM python\nRUN cd /opt && echo x=1 >m.py && touch -d @1500000000 m.py && " +
				"python3 -m py_compile m.py && python3 -c 'import m'\n" +
				"RUN date >/dev/null; test -z \"$SOURCE_DATE_EPOCH\"\n",
			command: "cd /opt; stat -c %Y m.py; stat -c '%y %s' __pycache__/* >/tmp/1; " +
				"python3 -v -c 'import m' 2>&1 | grep -o 'matches /opt/m.py'; " +
				"stat -c '%y %s' __pycache__/* | cmp - /tmp/1; ls __pycache__ | wc -l; test $(date -r __pycache__ +%Y) -gt 2020",
			want: "1500000000\nmatches /opt/m.py\n1",
		},
		"context-path": {
			dockerfile: "",
			files:      map[string]string{"docker/My.Dockerfile": "FROM " + tiny + "\nCOPY a.txt /a\n", "a.txt": "found"},
			more:       object{"dockerfile": "docker/My.Dockerfile"},
			command:    "cat /a", want: "found",
		},
		"long-and-odd-names": {
			dockerfile: "FROM %s\nCOPY . /odd\n",
			files:      map[string]string{"ünïcode name": "1", strings.Repeat("l", 200) + "/" + strings.Repeat("m", 200): "2", "empty/": ""},
			command:    "cat '/odd/ünïcode name'; cat /odd/lll*/mmm*; ls /odd | wc -l", want: "124", // with the Dockerfile
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			definition := object{"name": name}
			if tt.dockerfile != "" {
				definition["dockerfile"] = strings.ReplaceAll(strings.ReplaceAll(tt.dockerfile, "%[1]s", tiny), "%s", tiny)
			}
			maps.Copy(definition, tt.more)
			var context []byte
			if tt.files != nil {
				files := maps.Clone(tt.files)
				if tt.dockerfile != "" {
					files["Dockerfile"] = definition["dockerfile"].(string)
					definition["dockerfile"] = "Dockerfile"
				}
				context = tarOf(t, files)
			}
			if name == "from-builtin" {
				s.needTemplate("python")
			}
			s.needBuilt(definition, context)
			if got := s.inside(name, tt.command); got != tt.want {
				t.Errorf("inside: %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("from-scratch", func(t *testing.T) {
		s := s.in(t)
		busybox, err := os.ReadFile("/bin/busybox")
		if err != nil {
			t.Fatal(err)
		}
		s.needBuilt(object{"name": "from-scratch", "dockerfile": "Dockerfile"}, tarOf(t, map[string]string{
			"Dockerfile": "FROM scratch\nCOPY --chmod=755 busybox /\nUSER 65534\nENTRYPOINT [\"/busybox\", \"sleep\", \"3600\"]\n", "busybox": string(busybox)}))
		id := s.create(object{"template": "from-scratch"})
		defer s.destroy(id)
		r, err := s.api().Execute(t.Context(), id, cay.ExecuteRequest{Args: []string{"/busybox", "sh", "-c",
			"echo $PPID $(/busybox id -u) $(/busybox hostname); cd /tmp && echo x > y && /busybox cat y"}})
		if want := fmt.Sprintf("1 65534 %s\nx\n", strings.TrimPrefix(id, "sbx_")); err != nil || r.Stdout != want {
			t.Errorf("%s, %v, want %q", jsonOf(r), err, want)
		}
		if r := s.exec(id, "echo x"); r.ExitCode != 127 || !strings.Contains(r.Stderr, "/bin/sh: no such file or directory") {
			t.Errorf("without a shell: %+v", r)
		}
	})
}

// TestImages makes templates of images from a registry that needs a password and from archives.
func TestImages(t *testing.T) {
	t.Parallel() // it has its own server
	const user, password = "reader", "s3cret-and-long"
	open := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	closed := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != user || p != password {
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		open.ServeHTTP(w, r)
	}))
	t.Cleanup(closed.Close)
	host := strings.TrimPrefix(closed.URL, "http://")
	ref, err := name.ParseReference(host + "/private/tiny:1")
	if err != nil {
		t.Fatal(err)
	}
	image := tinyImage(t)
	if err := remote.Write(ref, image, remote.WithAuth(&authn.Basic{Username: user, Password: password})); err != nil {
		t.Fatal(err)
	}
	s := newServer(t, "CAY_IMAGES_REGISTRIES="+host, "CAY_TEMPLATES_PREPARE=python")
	s.start()
	s.needBuilt(object{"name": "private", "image": ref.String(),
		"credentials": object{"username": user, "password": password}}, nil)
	s.needBuilt(object{"name": "built", "dockerfile": "FROM " + ref.String() + "\nRUN echo yes >/built\n",
		"credentials": object{"registry": host, "username": user, "password": password}}, nil)
	key := s.e2bKey()
	// The right password comes last: nothing is built for a version that is ready with the same inputs.
	for _, c := range []struct{ password, want string }{{"wrong-" + password, "error"}, {password, "ready"}} {
		end := s.beginE2BBuild(key, "e2b", object{"fromImage": ref.String(), "fromImageRegistry": object{"type": "registry",
			"username": user, "password": c.password}, "steps": []object{}}).until("ready", "error")
		if end.Status != c.want || strings.Contains(fmt.Sprint(end)+s.templateLog("e2b"), c.password) {
			t.Errorf("E2B's build with the password %s: %+v", c.password, end)
		}
	}
	for name, credentials := range map[string]object{"nobody": nil,
		"stranger": {"username": user, "password": "wrong-" + password}} {
		definition := object{"name": name, "image": ref.String()}
		if credentials != nil {
			definition["credentials"] = credentials
		}
		status, body := s.build(definition, nil)
		if log := s.templateLog(name); status != "failed" || strings.Contains(string(body)+log, password) {
			t.Errorf("%s: %s %s", name, body, log)
		}
	}
	var saved bytes.Buffer
	if err := tarball.Write(ref, image, &saved); err != nil {
		t.Fatal(err)
	}
	s.needBuilt(object{"name": "whole", "image": "."}, saved.Bytes())
	s.needBuilt(object{"name": "within", "image": "images/tiny.tar"},
		tarOf(t, map[string]string{"images/": "", "images/tiny.tar": saved.String(), "other": "x"}))
	for _, name := range []string{"private", "built", "whole", "within", "e2b"} {
		if got := s.inside(name, "echo $FROM_TINY; cat /built 2>/dev/null || true"); !strings.HasPrefix(got, "yes") ||
			name == "built" && got != "yes\nyes" {
			t.Errorf("inside %s: %q", name, got)
		}
	}
}

// TestBuildFails checks that a failed build names the error and the step, and leaves nothing.
func TestBuildFails(t *testing.T) {
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t, "CAY_BUILD_DISK_MB=280")
	for name, tt := range map[string]struct {
		dockerfile string
		files      map[string]string
		headers    []*tar.Header
		want       []string // texts that the template must have
	}{
		"step":          {dockerfile: "FROM %s\nRUN echo compiling; echo missing semicolon >&2; exit 7\n", want: []string{"exit 7", "missing semicolon", "7"}},
		"parse":         {dockerfile: "FROM %s\nRUNN x\n", want: []string{"RUNN"}},
		"no-such-image": {dockerfile: "FROM nosuch-template-or-image.invalid/x\n", want: []string{"nosuch-template-or-image.invalid/x"}},
		"no-such-file":  {dockerfile: "FROM %s\nCOPY nothing /x\n", files: map[string]string{"a": "b"}, want: []string{"nothing"}},
		"forbidden":     {dockerfile: "FROM 127.0.0.1:1/x\n", want: []string{"127.0.0.1:1"}},
		"memory":        {dockerfile: "FROM %s\nRUN dd if=/dev/zero of=/dev/null bs=3G count=1\n", want: []string{"dd"}},
		"archive":       {dockerfile: "FROM %s\nADD zeros.tgz /\n", files: map[string]string{"zeros.tgz": zeroArchive(t, 400<<20)}, want: []string{"ADD zeros.tgz", "build.disk_mb"}},
		"no-such-user":  {dockerfile: "FROM %s\nUSER nobody-has-it\n", want: []string{"nobody-has-it", "/etc/passwd"}},
		"insecure":      {dockerfile: "FROM %s\nRUN --security=insecure true\n", want: []string{"insecure"}},
		"host-network":  {dockerfile: "FROM %s\nRUN --network=host true\n", want: []string{"host"}},
		"path-trick": {dockerfile: "FROM %s\nCOPY . /x\n", files: map[string]string{"a": "b"},
			headers: []*tar.Header{{Name: "../../escaped", Typeflag: tar.TypeReg, Mode: 0o644}}, want: []string{"../../escaped"}},
		"device": {dockerfile: "FROM %s\nCOPY . /x\n", files: map[string]string{"a": "b"},
			headers: []*tar.Header{{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 8, Mode: 0o644}}, want: []string{"disk"}},
	} {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			definition := object{"name": name, "dockerfile": strings.ReplaceAll(tt.dockerfile, "%s", tiny)}
			var context []byte
			if tt.files != nil {
				files := maps.Clone(tt.files)
				files["Dockerfile"] = definition["dockerfile"].(string)
				definition["dockerfile"] = "Dockerfile"
				context = tarOf(t, files, tt.headers...)
			}
			status, body := s.build(definition, context)
			if status != "failed" {
				t.Fatalf("it is %s: %s", status, body)
			}
			var failed struct {
				BuildError json.RawMessage `json:"build_error"`
			}
			if err := json.Unmarshal(body, &failed); err != nil {
				t.Fatal(err)
			}
			for _, want := range tt.want {
				if !strings.Contains(string(failed.BuildError), want) {
					t.Errorf("build_error %s does not say %q", failed.BuildError, want)
				}
			}
			if _, err := s.api().CreateSandbox(t.Context(), cay.CreateSandboxRequest{Template: name},
				cay.CreateOptions{}); refusal(err) == nil || refusal(err).Status != 409 {
				t.Errorf("a sandbox of it: %v", err)
			}
		})
	}
}

// zeroArchive returns a compressed archive of one file of zeros, about a thousandth of its size.
func zeroArchive(t *testing.T, size int64) string {
	t.Helper()
	var out bytes.Buffer
	z := gzip.NewWriter(&out)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Name: "zeros", Typeflag: tar.TypeReg, Mode: 0o644, Size: size}); err != nil {
		t.Fatal(err)
	}
	piece := make([]byte, 1<<20)
	for range size >> 20 {
		if _, err := w.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// TestBuildReaches connects from RUN to addresses that a sandbox may not reach.
func TestBuildReaches(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t)
	o := newOutside(t)
	o.listen(t, 8080)
	api := s.url[strings.LastIndex(s.url, ":")+1:]
	lines := []string{"FROM " + tiny, "RUN nc -w 3 " + o.address + " 8080 </dev/null | grep hello"}
	for _, host := range []string{o.gateway, "127.0.0.1", "169.254.169.253"} {
		lines = append(lines, fmt.Sprintf("RUN ! nc -w 2 %s %s </dev/null", host, api))
	}
	lines = append(lines, "RUN ! ls "+s.dataDir, "RUN test $(ps | wc -l) -le 5")
	s.needBuilt(object{"name": "reaches", "dockerfile": strings.Join(lines, "\n") + "\n"}, nil)
}

// TestTemplateLife takes one template through rebuilds, failures, use, and its end.
func TestTemplateLife(t *testing.T) {
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t)
	s.needBuilt(object{"name": "mine", "dockerfile": "FROM " + tiny + "\nRUN echo one >/which\n",
		"env":    object{"MODE": "dev"},
		"egress": object{"mode": "deny_all"}}, nil)
	old := s.create(object{"template": "mine"})
	if got := s.want(old, "cat /which; echo $MODE"); got != "one\ndev" {
		t.Errorf("version 1: %q", got)
	}
	s.rebuild("mine", object{"dockerfile": "FROM " + tiny + "\nRUN echo two >/which\n"})
	if status, body := s.built("mine"); status != "ready" || !strings.Contains(string(body), `"version":2`) {
		t.Fatalf("after the rebuild: %s", body)
	}
	// The steps run again at another time and give the same result.
	s.rebuild("mine", nil)
	if status, body := s.built("mine"); status != "ready" || !strings.Contains(string(body), `"version":2`) {
		t.Errorf("after a rebuild without changes: %s", body)
	}
	if got := s.inside("mine", "cat /which"); got != "two" {
		t.Errorf("version 2: %q", got)
	}
	if got := s.want(old, "cat /which"); got != "one" {
		t.Errorf("the sandbox of version 1: %q", got)
	}
	s.rebuild("mine", object{"dockerfile": "FROM " + tiny + "\nRUN exit 3\n"})
	if status, body := s.built("mine"); status != "failed" || !strings.Contains(string(body), `"version":2`) {
		t.Errorf("after a rebuild that fails: %s", body)
	}
	if got := s.inside("mine", "cat /which"); got != "two" {
		t.Errorf("after a rebuild that fails: %q", got)
	}
	if err := s.api().DeleteTemplate(t.Context(), "mine", false); refusal(err) == nil || refusal(err).Status != 409 {
		t.Errorf("deleting it with a sandbox alive: %v", err)
	}
	if err := s.api().DeleteTemplate(t.Context(), "mine", true); err != nil {
		t.Errorf("deleting it by force: %v", err)
	}
	if got := s.want(old, "cat /which"); got != "one" {
		t.Errorf("after its template is gone: %q", got)
	}
	s.destroy(old)
	if _, err := s.api().GetTemplate(t.Context(), "mine"); !isRefused(err, 404, "template_not_found") {
		t.Errorf("the deleted template: %v", err)
	}
}

// TestBuildSurvives checks that a build goes on after the server was killed, and can be cancelled.
func TestBuildSurvives(t *testing.T) {
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t)
	s.beginBuild(object{"name": "slow", "dockerfile": "FROM " + tiny + "\nRUN sleep 4\nRUN echo done >/done\n"}, nil)
	s.waitTemplate("slow", "building")
	s.stop(syscall.SIGKILL)
	s.start()
	if status, body := s.built("slow"); status != "ready" {
		t.Fatalf("after the crash: %s", body)
	}
	if got := s.inside("slow", "cat /done"); got != "done" {
		t.Errorf("inside: %q", got)
	}
	s.beginBuild(object{"name": "endless", "dockerfile": "FROM " + tiny + "\nRUN sleep 1000\n"}, nil)
	s.waitTemplate("endless", "building")
	if _, err := s.api().CancelTemplateBuild(t.Context(), "endless"); err != nil {
		t.Fatalf("cancel: %v", err)
	}
	if status, body := s.built("endless"); status != "failed" || !strings.Contains(string(body), "cancel") {
		t.Errorf("after the build was cancelled: %s", body)
	}
}

func (s *server) waitTemplate(name, want string) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) { // a poll with a deadline
		template, err := s.api().GetTemplate(context.Background(), name)
		if err == nil && string(template.Status) == want {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("template %s is not %s: %s, %v", name, want, jsonOf(template), err)
		}
	}
}

// TestTemplateStarts makes a sandbox with a service that is ready when the create answers.
func TestTemplateStarts(t *testing.T) {
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t)
	s.needBuilt(object{"name": "web", "ready": object{"port": 8000, "timeout": "20s"},
		"dockerfile": "FROM " + tiny + "\nRUN mkdir /www && echo served >/www/index.html\nCMD [\"httpd\", \"-f\", \"-p\", \"8000\", \"-h\", \"/www\"]\n"}, nil)
	if got := s.inside("web", "wget -q -O - http://127.0.0.1:8000/"); got != "served" {
		t.Errorf("the service says %q", got)
	}
	s.needBuilt(object{"name": "broken", "start_command": "echo no config; exit 4", "ready": object{"port": 8000},
		"image": tiny}, nil)
	_, err := s.api().CreateSandbox(t.Context(), cay.CreateSandboxRequest{Template: "broken"}, cay.CreateOptions{})
	if e := refusal(err); e == nil || e.Status != 409 || !strings.Contains(e.Detail, "no config") {
		t.Errorf("a service that does not start: %v", err)
	}
}

// TestTemplateByLine uses templates with the command line.
func TestTemplateByLine(t *testing.T) {
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t)
	dir := t.TempDir()
	for path, content := range map[string]string{"Dockerfile": "FROM " + tiny + "\nCOPY hello /hello\n",
		"hello": "by line"} {
		if err := os.WriteFile(dir+"/"+path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	out, errOut, code := s.cli("", "templates", "create", "lined", "--dockerfile", dir+"/Dockerfile", "--context", dir)
	if code != 0 || !strings.Contains(out+errOut, "COPY hello /hello") {
		t.Fatalf("create ended with %d:\n%s%s", code, out, errOut)
	}
	if out, errOut, code := s.cli("", "run", "-t", "lined", "--", "cat", "/hello"); code != 0 || out != "by line" {
		t.Errorf("run ended with %d: %q %s", code, out, errOut)
	}
	if out, _, code := s.cli("", "templates", "logs", "lined"); code != 0 || !strings.Contains(out, "COPY") {
		t.Errorf("logs ended with %d: %s", code, out)
	}
	if err := os.WriteFile(dir+"/Dockerfile", []byte("FROM "+tiny+"\nRUN echo broken; exit 9\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, errOut, code = s.cli("", "templates", "rebuild", "lined", "--dockerfile", dir+"/Dockerfile", "--context", dir)
	if code != 1 || !strings.Contains(out+errOut, "exit 9") {
		t.Errorf("a rebuild that fails ended with %d:\n%s%s", code, out, errOut)
	}
	if _, errOut, code := s.cli("", "templates", "delete", "lined"); code != 0 {
		t.Errorf("delete ended with %d: %s", code, errOut)
	}
}
