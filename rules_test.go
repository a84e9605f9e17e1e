// Package cay_test holds the rules of the house as tests: who may import whom and
// why, that every package says what it is, that links lead somewhere.
package cay_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/cayhq/cay/"

// mayImport is who may import whom of our own. A room that is not in the table
// may not be imported or does not exist; adding a line is a decision that a
// reviewer should see.
var mayImport = map[string]struct {
	rooms []string
	why   string
}{
	"internal/fault":     {nil, "kinds of error are below everything"},
	"internal/budget":    {[]string{"fault"}, "the memory that calls may hold is counted below everything"},
	"internal/gctune":    {nil, "it only knows Go's collector"},
	"internal/trace":     {nil, "what parts of a call take is below everything"},
	"internal/sandbox":   {[]string{"fault", "trace"}, "the core does no I/O: rows and machines are given to it"},
	"internal/auth":      {[]string{"fault"}, "the core does no I/O"},
	"internal/accesslog": {[]string{"auth"}, "what all fronts write of a request; it takes the rates of callers from auth"},
	"internal/template":  {[]string{"fault", "sandbox"}, "the core does no I/O; sandboxes are made from templates, so their words are used"},

	"internal/cgroup":      {nil, "a technology room: it knows the kernel and nothing of the product"},
	"internal/runsc":       {nil, "a technology room: it knows gVisor and nothing of the product"},
	"internal/network":     {[]string{"fault"}, "a technology room: it knows netlink and nothing of the product"},
	"internal/egressproxy": {[]string{"fault"}, "a technology room: it knows names on the wire, and neither the rules that lead to it nor the product"},
	"internal/image":       {[]string{"fault"}, "a technology room: it knows file systems and nothing of the product"},
	"internal/embedded":    {nil, "it only carries programs"},
	"internal/buildkit": {[]string{"buildkit/*", "cgroup", "fault"},
		"a technology room: it knows BuildKit's program and nothing of the product; it makes the control groups that gVisor runs steps in"},
	"internal/buildkit/wire": {nil, "what the server and cay-buildkit say to each other: both link it"},
	"internal/checkpoint":    {[]string{"fault"}, "a technology room: it keeps files whole and knows nothing of what is in them"},
	"internal/blob":          {[]string{"fault"}, "a technology room: it keeps files by their hash and knows nothing of what is in them"},
	"internal/node": {[]string{"agentapi", "cgroup", "checkpoint", "fault", "network", "embedded", "runsc", "sandbox", "trace"},
		"it puts a sandbox together from the technology rooms, and implements the core's port"},

	"internal/agentapi":            {[]string{"budget", "fault", "agentapi/*"}, "the wire between host and agent"},
	"internal/agentapi/process":    {nil, "generated"},
	"internal/agentapi/filesystem": {nil, "generated"},
	"internal/agent":               {[]string{"agentapi", "agentapi/*", "fault"}, "what runs inside must stay small and know nothing of the host"},

	"internal/store":     {[]string{"auth", "fault", "sandbox", "template"}, "it implements the core's ports; all SQL is here"},
	"internal/api":       {[]string{"accesslog", "agentapi", "auth", "budget", "fault", "portproxy", "sandbox", "trace", "template"}, "HTTP in, HTTP out: it calls the core and the agent, and has the proxy carry what is for a port"},
	"internal/portproxy": {[]string{"agentapi", "fault"}, "a front that carries traffic and decides nothing about it: it knows ports and the agent that leads to them, and not the core"},
	"internal/e2b": {[]string{"accesslog", "agentapi", "auth", "budget", "fault", "portproxy", "sandbox", "template"},
		"E2B's wire in, E2B's wire out: a second front, beside api and knowing nothing of it, that calls the same core and the agent, and has the proxy carry what is for a port"},

	".":                      {nil, "it only carries openapi.yaml"},
	"client":                 {nil, "public: it must build without our internals"},
	"cmd/cay-agent":          {[]string{"agent", "agentapi", "gctune"}, "a main and nothing else: every sandbox starts it"},
	"cmd/cay-buildkit":       {[]string{"buildkit/*", "cgroup"}, "a module of its own, so that nothing else of cay links BuildKit"},
	"cmd/cay-runsc":          {[]string{"gctune"}, "what is needed of gVisor's main: every sandbox starts it several times"},
	"cmd/cay-runsc/early":    {nil, "it is done before gVisor's packages are initialised"},
	"scripts/gvisor/filters": {nil, "a step of the build of cay-runsc"},
	"cmd/cay": {[]string{"agentapi", "api", "auth", "blob", "budget", "buildkit", "cgroup", "e2b", "fault", "egressproxy", "image", "network", "node", "embedded", "portproxy", "sandbox", "store", "template"},
		"all wiring is here; the CLI's verbs use client"},
}

// goPackages maps each directory with Go files to its non-test files.
func goPackages(t *testing.T) map[string][]string {
	t.Helper()
	packages := map[string][]string{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata" || d.Name() == "tools" || d.Name() == "bin") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
			packages[filepath.Dir(path)] = append(packages[filepath.Dir(path)], path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(packages) < 10 {
		t.Fatalf("found only %d packages: the walk is broken", len(packages))
	}
	return packages
}

func parse(t *testing.T, path string, mode parser.Mode) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, mode)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// forTests are packages that only tests import; they may import anything.
func forTests(dir string) bool {
	return dir == "internal/caytest" || dir == "e2e" || strings.HasPrefix(dir, "e2e/")
}

func TestWhoMayImportWhom(t *testing.T) {
	packages := goPackages(t)
	for dir := range mayImport {
		if packages[dir] == nil {
			t.Errorf("the table names %s, which does not exist", dir)
		}
	}
	for dir, files := range packages {
		if forTests(dir) {
			continue
		}
		rule, ok := mayImport[dir]
		if !ok {
			t.Errorf("%s is not in the table: say there what it may import and why", dir)
			continue
		}
		for _, file := range files {
			for _, spec := range parse(t, file, parser.ImportsOnly).Imports {
				path, err := strconv.Unquote(spec.Path.Value)
				if err != nil {
					t.Fatal(err)
				}
				own, ok := strings.CutPrefix(path, module)
				if ok && !allowed(dir, own, rule.rooms) {
					t.Errorf("%s must not import %s: %s", file, own, rule.why)
				}
			}
		}
	}
}

func allowed(from, own string, rooms []string) bool {
	if own == "client" {
		return from == "cmd/cay"
	}
	if strings.HasPrefix(own, from+"/") {
		return true // what is below a program is a part of it
	}
	room, ok := strings.CutPrefix(own, "internal/")
	if !ok {
		return false
	}
	parent, _, nested := strings.Cut(room, "/")
	return slices.Contains(rooms, room) || nested && slices.Contains(rooms, parent+"/*")
}

// TestHeavyDependencies keeps costly modules where they belong.
func TestHeavyDependencies(t *testing.T) {
	only := map[string]struct {
		dirs []string
		why  string
	}{
		"gvisor.dev/gvisor/":                      {[]string{"cmd/cay-runsc", "scripts/gvisor/filters"}, "the server drives runsc as a program and must not carry it"},
		"github.com/moby/buildkit/":               {[]string{"cmd/cay-buildkit"}, "the server talks to it as a program and must not carry it"},
		"database/sql":                            {[]string{"internal/store"}, "all SQL is in one room"},
		"github.com/google/nftables":              {[]string{"internal/network"}, "rules are made in one room"},
		"github.com/vishvananda/netlink":          {[]string{"internal/network"}, "links are made in one room"},
		"github.com/google/go-containerregistry/": {[]string{"internal/image"}, "registries are one room's business"},
		"codeberg.org/miekg/dns":                  {[]string{"internal/egressproxy"}, "names are decided in one room"},
		"github.com/coder/websocket":              {[]string{"internal/api", "client"}, "the two ends of a terminal"},
		"github.com/spf13/cobra":                  {[]string{"cmd/cay"}, "the command line is in one place"},
	}
	for dir, files := range goPackages(t) {
		for _, file := range files {
			for _, spec := range parse(t, file, parser.ImportsOnly).Imports {
				path, _ := strconv.Unquote(spec.Path.Value)
				for dependency, rule := range only {
					if strings.HasPrefix(path, dependency) && !forTests(dir) && !slices.Contains(rule.dirs, dir) {
						t.Errorf("%s imports %s: %s", file, path, rule.why)
					}
				}
			}
		}
	}
}

func TestEveryPackageSaysWhatItIs(t *testing.T) {
	generated := regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)
	for dir, files := range goPackages(t) {
		comments, isGenerated := 0, false
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if generated.Match(text) {
				isGenerated = true
				continue
			}
			f := parse(t, file, parser.ParseComments|parser.PackageClauseOnly)
			if f.Doc == nil {
				continue
			}
			comments++
			doc := f.Doc.Text()
			start := "Package " + f.Name.Name + " "
			if f.Name.Name == "main" {
				start = "Command "
			}
			if !strings.HasPrefix(doc, start) || len(strings.Fields(doc)) < 12 {
				t.Errorf("%s: the package comment must begin with %q and say what the package owns", file, start)
			}
		}
		if comments != 1 && !(comments == 0 && isGenerated) {
			t.Errorf("%s has %d package comments, want one", dir, comments)
		}
	}
}

// TestLinksLeadSomewhere checks the links between our documents.
func TestLinksLeadSomewhere(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:\s]+)(#[^)\s]*)?\)`)
	documents, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	more, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range append(documents, more...) {
		text, err := os.ReadFile(document)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(document), m[1])); err != nil {
				t.Errorf("%s links to %s, which is not there", document, m[1])
			}
		}
	}
}
