package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

const (
	integrationsDoc = "../docs/integrations.md"
	integrationsDir = "integrations" // below e2b: the packages of the page, and tests of them
)

// integrationsPatience limits a run of Node.js with programs of the page. Each takes seconds, and
// the first one of Mastra as long as Debian's packages for its template take to come.
const integrationsPatience = 10 * time.Minute

// TestIntegrations runs programs that others wrote for E2B, as they are published, against a server:
// those that docs/integrations.md shows, and the tests beside the packages.
func TestIntegrations(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server, and waits for npm and for builds
	m := newModel(t, map[string]string{
		"exec_command": `{"cmd":"python3 -c 'a, b = open(\"numbers.txt\").read().split(); print(int(a) * int(b))'"}`,
		"python":       `{"code":"print(6*7)"}`,
		"execute":      `{"command":"python3 -c 'print(6*7)'"}`,
	})
	s := newServer(t, "CAY_POOL_ENABLED=true", "CAY_TEMPLATES_PREPARE=python,base,code-interpreter",
		"CAY_IMAGES_REGISTRY=false")
	at, err := url.Parse(s.url)
	if err != nil {
		t.Fatal(err)
	}
	s.env = append(s.env, "CAY_PROXY_DOMAIN="+integrationsDomain+":"+at.Port())
	s.start()
	s.needTemplate("python")
	s.needTemplate("base")
	page := readPage(t)
	files := readAll(t, filepath.Join("e2b", integrationsDir, "*.mjs"))
	maps.Copy(files, page.files)
	dir, key := runDir(t, installed(t, integrationsDir), files), s.e2bKey()
	r := integrationsRun{server: s, node: nodeProgram(t), dir: dir, env: append(os.Environ(),
		"E2B_API_URL="+s.url, "E2B_SANDBOX_URL="+s.url, "E2B_API_KEY="+key,
		"OPENAI_BASE_URL="+m.url, "OPENAI_API_KEY=none",
		"NODE_OPTIONS=--import="+filepath.Join(dir, "offline.mjs"))}

	t.Run("tests", func(t *testing.T) {
		args := []string{"--test", "--test-concurrency=2", "--test-reporter=spec"}
		for name := range files {
			if strings.HasSuffix(name, ".test.mjs") {
				args = append(args, name)
			}
		}
		slices.Sort(args[3:])
		t.Logf("%s", r.run(t, args...))
	})
	s.needTemplate("code-interpreter") // of the page alone
	for _, program := range page.programs {
		t.Run(program.name, func(t *testing.T) {
			asked := len(m.took())
			out := r.run(t, program.name)
			for _, text := range program.prints {
				if !slices.Contains(strings.Split(out, "\n"), text) {
					t.Errorf("it printed %q, and the page says %q", out, text)
				}
			}
			if strings.Contains(program.text, "gpt-") && len(m.took()) == asked {
				t.Errorf("it used no tool; it printed %q", out)
			}
		})
	}
	t.Run("litellm", func(t *testing.T) { s.runCodeAsPython(t, key, true) })
	t.Run("e2b_code_interpreter", func(t *testing.T) { s.runCodeAsPython(t, key, false) })
	s.wantNone()
}

// integrationsDomain is the domain of ports. No name server knows it; tests send it as a header.
const integrationsDomain = "sandboxes.example.com"

// integrationsRun runs Node.js in a directory with the programs.
type integrationsRun struct {
	server    *server
	node, dir string
	env       []string
}

// run runs Node.js without a network but the loopback, and returns what it prints. It must make a
// sandbox.
func (r integrationsRun) run(t *testing.T, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), integrationsPatience)
	defer cancel()
	before := r.made(t)
	cmd := exec.CommandContext(ctx, r.node, args...)
	cmd.Dir, cmd.Env = r.dir, r.env
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	if r.made(t) == before {
		t.Errorf("%s made no sandbox:\n%s", strings.Join(args, " "), out)
	}
	return string(out)
}

// made returns how many sandboxes were created.
func (r integrationsRun) made(t *testing.T) int {
	t.Helper()
	list, err := r.server.api().ListSandboxes(t.Context(), cay.ListSandboxesOptions{
		ListOptions: cay.ListOptions{Limit: 100}, Status: []cay.SandboxStatus{"destroyed", "running", "suspended"}})
	if err != nil || len(list.Sandboxes) >= 100 {
		t.Fatalf("listing sandboxes: %s, %v", jsonOf(list), err)
	}
	return len(list.Sandboxes)
}

// integrationsPage has what the page shows.
type integrationsPage struct {
	programs []pageProgram
	files    map[string][]byte // programs, and modules that they import
	installs []string          // packages with their versions
}

// pageProgram is a program of the page.
type pageProgram struct {
	name, text string
	prints     []string // lines that the page says it prints
}

var (
	pageFence   = regexp.MustCompile("(?ms)^## ([^\n]+)$|^```(js|sh)\n(.*?)^```$")
	pageModule  = regexp.MustCompile(`^// (\S+\.mjs)\n`)
	pagePrints  = regexp.MustCompile(`(?m)^console\.log\(.*\) // (.+)$`)
	pageInstall = regexp.MustCompile(`(?m)^npm install (.+)$`)
	notInNames  = regexp.MustCompile(`[^a-z0-9]+`)
)

// readPage reads the page: below each heading one program in JavaScript, and modules, whose first
// line is a comment with their file name.
func readPage(t *testing.T) integrationsPage {
	t.Helper()
	text, err := os.ReadFile(integrationsDoc)
	if err != nil {
		t.Fatal(err)
	}
	page := integrationsPage{files: map[string][]byte{}}
	heading := ""
	for _, m := range pageFence.FindAllStringSubmatch(string(text), -1) {
		title, language, code := m[1], m[2], m[3]
		switch {
		case title != "":
			heading = strings.Trim(notInNames.ReplaceAllString(strings.ToLower(title), "-"), "-")
		case language == "sh":
			for _, install := range pageInstall.FindAllStringSubmatch(code, -1) {
				page.installs = append(page.installs, strings.Fields(install[1])...)
			}
		case pageModule.MatchString(code):
			page.files[pageModule.FindStringSubmatch(code)[1]] = []byte(code)
		default:
			p := pageProgram{name: heading + ".mjs", text: code}
			for _, print := range pagePrints.FindAllStringSubmatch(code, -1) {
				p.prints = append(p.prints, print[1])
			}
			if len(p.prints) == 0 || page.files[p.name] != nil {
				t.Fatalf("below each heading is one program that says what it prints; %s is not", p.name)
			}
			page.programs = append(page.programs, p)
			page.files[p.name] = []byte(code)
		}
	}
	if len(page.programs) < 6 {
		t.Fatalf("the page has only %d programs", len(page.programs))
	}
	return page
}

// TestIntegrationsAreTheDocument compares the versions that the page installs with those that the
// tests use.
func TestIntegrationsAreTheDocument(t *testing.T) {
	data, err := os.ReadFile(filepath.Join("e2b", integrationsDir, "package.json"))
	if err != nil {
		t.Fatal(err)
	}
	var set struct {
		Dependencies map[string]string `json:"dependencies"`
	}
	if err := json.Unmarshal(data, &set); err != nil {
		t.Fatal(err)
	}
	var want []string
	for name, version := range set.Dependencies {
		want = append(want, name+"@"+version)
	}
	slices.Sort(want)
	got := slices.Compact(slices.Sorted(slices.Values(readPage(t).installs)))
	if !slices.Equal(got, want) {
		t.Errorf("the page installs\n%s\nand the tests\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// runCodeAsPython makes the requests of programs in Python that run code: LiteLLM's code interpreter,
// which uses no package of E2B and names the port by the host, and E2B's own package, which names it
// by headers. Fields that are not given are null.
func (s *server) runCodeAsPython(t *testing.T, key string, byHost bool) {
	s = s.in(t)
	status, body := s.e2bCall(key, "POST", "/sandboxes", `{"templateID": "code-interpreter-v1", "timeout": 300, `+
		`"secure": true, "allow_internet_access": true, "metadata": {"user": "x"}}`)
	if status != 201 {
		t.Fatalf("create: %d %s", status, body)
	}
	id, domain := text(body, "sandboxID"), text(body, "domain")
	if !strings.HasPrefix(domain, integrationsDomain) {
		t.Errorf("the domain is %q", domain)
	}
	code := `{"code": "print(6*7)", "context_id": null, "language": null, "env_vars": null}`
	if byHost {
		code = `{"code": "print(6*7)", "context_id": null, "env_vars": null}`
	}
	req, err := http.NewRequestWithContext(t.Context(), "POST", s.url+"/execute", strings.NewReader(code))
	if err != nil {
		t.Fatal(err)
	}
	if byHost {
		req.Host = fmt.Sprintf("49999-%s.%s", id, domain)
	} else {
		req.Header.Set("E2b-Sandbox-Id", id)
		req.Header.Set("E2b-Sandbox-Port", "49999")
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-Access-Token", text(body, "envdAccessToken"))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 || !strings.Contains(string(answer), `"text": "42\n"`) {
		t.Errorf("execute: %d %s, %v", resp.StatusCode, answer, err)
	}
	if status, body := s.e2bCall(key, "DELETE", "/sandboxes/"+id, ""); status != 204 {
		t.Errorf("delete: %d %s", status, body)
	}
}
