// Package cay_test tests the rules of the repository: which packages may import which and why,
// package comments, the prose of comments, the length of lines in code and documents, and links between documents.
package cay_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

const module = "github.com/cayhq/cay/"

// mayImport lists which of our packages each package may import. Every package has a line. Adding
// a line is a decision that a reviewer should see.
var mayImport = map[string]struct {
	rooms []string
	why   string
}{
	"internal/fault":    {nil, "every room uses kinds of error"},
	"internal/budget":   {[]string{"fault"}, "every room may count the memory of a call"},
	"internal/gctune":   {nil, "it knows only Go's collector"},
	"internal/trace":    {nil, "every room may measure its part of a call"},
	"internal/hostfile": {nil, "it knows only paths and bytes"},
	"internal/pki":      {nil, "a technology room: it knows keys, certificates and TLS, and nothing of the product"},
	"internal/sandbox":  {[]string{"fault", "trace"}, "the core does no I/O: rows and machines are given to it"},
	"internal/auth":     {[]string{"fault"}, "the core does no I/O"},
	"internal/event":    {[]string{"fault"}, "the core does no I/O; others write the events that it names"},
	"internal/webhook":  {[]string{"event", "fault"}, "the core does no I/O: requests are made by a sender that is given to it"},
	"internal/template": {[]string{"event", "fault", "sandbox"}, "the core does no I/O; it uses the types of sandboxes, which are made from templates, and of events"},

	"internal/fleet": {[]string{"fault"}, "the core does no I/O: rows are given to it, and orders given to the sandboxes"},

	"internal/webhook/sender": {[]string{"webhook"}, "a technology room: it knows HTTP, implements the core's interface and nothing else of the product"},

	"internal/cgroup":      {nil, "a technology room: it knows the kernel and nothing of the product"},
	"internal/runsc":       {nil, "a technology room: it knows gVisor and nothing of the product"},
	"internal/network":     {[]string{"fault"}, "a technology room: it knows netlink and nothing of the product"},
	"internal/egressproxy": {[]string{"fault"}, "a technology room: it knows DNS, TLS and HTTP, and neither the packet filter nor the product"},
	"internal/image":       {[]string{"fault", "hostfile"}, "a technology room: it knows file systems and nothing of the product"},
	"internal/embedded":    {nil, "it only carries programs"},
	"internal/buildkit": {[]string{"buildkit/*", "cgroup", "fault"},
		"a technology room: it knows BuildKit's program and nothing of the product; it makes the control groups of steps"},
	"internal/buildkit/wire": {nil, "the protocol between the server and cay-buildkit: both link it"},
	"internal/checkpoint":    {[]string{"fault", "hostfile"}, "a technology room: it keeps files whole and does not look into them"},
	"internal/blob":          {[]string{"fault", "hostfile"}, "a technology room: it keeps files by their hash and does not look into them"},
	"internal/link":          {[]string{"fault"}, "a technology room: it knows TLS connections and HTTP, and neither who the nodes are nor what is sent to them"},
	"internal/objects":       {[]string{"hostfile"}, "a technology room: it knows S3 and files named by their hash, and nothing of the product"},
	"internal/node": {[]string{"agentapi", "cgroup", "checkpoint", "embedded", "fault", "hostfile", "network", "runsc",
		"sandbox", "trace"}, "it builds sandboxes with the technology rooms, and implements the core's interface"},

	"internal/agentapi":            {[]string{"agentapi/*", "budget", "fault"}, "the wire between host and agent"},
	"internal/agentapi/process":    {nil, "generated"},
	"internal/agentapi/filesystem": {nil, "generated"},
	"internal/agent":               {[]string{"agentapi", "fault"}, "code that runs in sandboxes must stay small and know nothing of the host; it joins the packages below it"},
	"internal/agent/proc":          {[]string{"agent/account", "agent/answer", "agentapi", "agentapi/*", "fault"}, "processes inside: it knows no files"},
	"internal/agent/file":          {[]string{"agent/account", "agent/answer", "agentapi", "agentapi/*", "fault"}, "files inside: it knows no processes"},
	"internal/agent/account":       {[]string{"agent/answer", "agentapi", "fault"}, "users inside: processes and files act for them"},
	"internal/agent/answer":        {[]string{"agentapi", "fault"}, "all calls of the agent answer with it"},

	"internal/store":      {[]string{"auth", "event", "fault", "fleet", "hostfile", "sandbox", "template", "webhook"}, "it implements the core's interfaces; all SQL is here"},
	"internal/httpserver": {[]string{"auth", "budget", "fault", "portproxy"}, "all fronts answer with it; it knows callers and errors, and no operation; portproxy tells it what a key looks like, since none may be forwarded"},
	"internal/api":        {[]string{"agentapi", "auth", "budget", "event", "fault", "fleet", "httpserver", "portproxy", "sandbox", "template", "terminal", "trace", "webhook"}, "a front: it calls the core and the agent, and has portproxy carry traffic to ports"},
	"internal/sampler":    {[]string{"agentapi", "fault", "sandbox"}, "it asks agents what sandboxes use; fronts show it"},
	"internal/terminal":   {[]string{"agentapi", "budget", "fault"}, "a session of a terminal: fronts drive it, with the protocols of their clients"},
	"internal/portproxy":  {[]string{"agentapi", "fault"}, "a front that carries traffic and decides nothing about it: it knows ports and the agent, and not the core"},
	"internal/e2b/steps":  {[]string{"fault"}, "a translator: it knows E2B's steps and Dockerfiles, and nothing of the product"},
	"internal/e2b": {[]string{"agentapi", "auth", "budget", "event", "fault", "httpserver", "portproxy", "sandbox",
		"template", "webhook"},
		"a front beside api, for E2B's clients: it calls the same core and the agent, and has portproxy carry traffic to ports"},

	"internal/config": {[]string{"agentapi", "egressproxy", "fleet", "network", "node", "objects", "sandbox"},
		"it knows the settings of a server, whose defaults are the rooms' own, and opens no room"},
	"internal/imagebuild": {[]string{"buildkit", "fault", "image", "template"},
		"an adapter: it implements template's interface with the technology rooms that make images, which know neither it nor each other"},
	"internal/noderpc": {[]string{"fault", "fleet", "hostfile", "pki"},
		"the wire between nodes and replicas: it joins the core's room of nodes with the one of certificates"},
	"internal/archive": {[]string{"fault", "objects", "sandbox"},
		"an adapter: it copies checkpoints to a bucket, and keeps the core's rows of the copies"},
	"internal/daemon": {[]string{"api", "archive", "auth", "blob", "budget", "buildkit", "cgroup", "config", "e2b",
		"egressproxy", "embedded", "event", "fault", "fleet", "hostfile", "httpserver", "image", "imagebuild", "link", "network", "node", "noderpc", "objects", "pki", "portproxy", "sampler", "sandbox", "store",
		"template", "webhook", "webhook/*"}, "all wiring is here, and the adapters between rooms that do not know each other"},
	"internal/cli": {[]string{"config", "daemon"}, "the verbs use sdk/go; those that run a server or look at this machine use daemon"},

	".":                      {nil, "it only carries openapi.yaml"},
	"sdk/go":                 {nil, "public, and a module of its own: it must build without our internals"},
	"cmd/cay-agent":          {[]string{"agent", "agentapi", "gctune"}, "a main and nothing else: every sandbox starts it"},
	"cmd/cay-buildkit":       {[]string{"buildkit/*", "cgroup"}, "a module of its own, so that nothing else of cay links BuildKit"},
	"cmd/cay-runsc":          {[]string{"gctune"}, "the part of gVisor's main that cay needs: every sandbox starts it several times"},
	"cmd/cay-runsc/early":    {nil, "it runs before gVisor's packages are initialised"},
	"scripts/gvisor/filters": {nil, "a step of the build of cay-runsc"},
	"scripts/hide":           {nil, "a step of make generate"},
	"cmd/cay":                {[]string{"cli"}, "a main and nothing else"},
}

// goFiles returns the Go files of the repository, those of tests too.
func goFiles(t *testing.T) []string { return filesWith(t, ".go") }

// writtenFiles yields the names and the texts of the Go files that are not generated.
func writtenFiles(t *testing.T) iter.Seq2[string, string] {
	t.Helper()
	return func(yield func(file, text string) bool) {
		for _, file := range goFiles(t) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !generated.Match(text) && !yield(file, string(text)) {
				return
			}
		}
	}
}

// filesWith returns the files of the repository whose names have a suffix.
func filesWith(t *testing.T, suffix string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name := d.Name(); d.IsDir() && path != "." &&
			(strings.HasPrefix(name, ".") || name == "testdata" || name == "tools" || name == "bin") {
			return filepath.SkipDir
		}
		if strings.HasSuffix(path, suffix) {
			files = append(files, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// goPackages maps each directory with Go files to those that are not tests.
func goPackages(t *testing.T) map[string][]string {
	t.Helper()
	packages := map[string][]string{}
	for _, path := range goFiles(t) {
		if !strings.HasSuffix(path, "_test.go") {
			packages[filepath.Dir(path)] = append(packages[filepath.Dir(path)], path)
		}
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

// forTests reports whether only tests import a package. Such packages may import anything.
func forTests(dir string) bool {
	return dir == "internal/caytest" || dir == "internal/nodetest" || dir == "e2e" || strings.HasPrefix(dir, "e2e/")
}

func TestImports(t *testing.T) {
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
	if own == "sdk/go" {
		return from == "internal/cli"
	}
	if strings.HasPrefix(own, from+"/") {
		return true // packages below a program are part of it
	}
	room, ok := strings.CutPrefix(own, "internal/")
	if !ok {
		return false
	}
	parent, _, nested := strings.Cut(room, "/")
	return slices.Contains(rooms, room) || nested && slices.Contains(rooms, parent+"/*")
}

// TestVerbsUseTheClient lets only some files of the command line import rooms: those that run a server, that move
// its records, or that look for the servers of this machine. All other verbs work with the servers of other machines
// too.
func TestVerbsUseTheClient(t *testing.T) {
	mayUseRooms := []string{"cli.go", "connect.go", "doctor.go", "migrate.go", "server.go"}
	for _, file := range goPackages(t)["internal/cli"] {
		for _, spec := range parse(t, file, parser.ImportsOnly).Imports {
			path, _ := strconv.Unquote(spec.Path.Value)
			if strings.HasPrefix(path, module+"internal/") && !slices.Contains(mayUseRooms, filepath.Base(file)) {
				t.Errorf("%s must not import %s: the verbs use the public client", file, path)
			}
		}
	}
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
		"github.com/jackc/pgx":                    {[]string{"internal/store"}, "all SQL is in one room"},
		"github.com/google/nftables":              {[]string{"internal/network"}, "rules are made in one room"},
		"github.com/vishvananda/netlink":          {[]string{"internal/network"}, "links are made in one room"},
		"github.com/google/go-containerregistry/": {[]string{"internal/image"}, "registries are one room's business"},
		"codeberg.org/miekg/dns":                  {[]string{"internal/egressproxy"}, "names are decided in one room"},
		"github.com/aws/":                         {[]string{"internal/objects", "internal/image"}, "S3 is one room's business; image signs the request for a registry's password"},
		"github.com/coder/websocket":              {[]string{"internal/api", "sdk/go"}, "the two ends of a terminal"},
		"github.com/spf13/cobra":                  {[]string{"internal/cli"}, "the command line is in one place"},
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

// TestCoreDoesNoIO keeps packages that reach files, programs, networks or databases out of the core rooms, which get
// all of that through interfaces.
func TestCoreDoesNoIO(t *testing.T) {
	reaches := []string{"os", "os/", "net/http", "database/", "syscall", "golang.org/x/sys/"}
	core := 0
	for dir, rule := range mayImport {
		if !strings.HasPrefix(rule.why, "the core does no I/O") {
			continue
		}
		core++
		for _, file := range goPackages(t)[dir] {
			for _, spec := range parse(t, file, parser.ImportsOnly).Imports {
				path, _ := strconv.Unquote(spec.Path.Value)
				for _, p := range reaches {
					if path == p || strings.HasSuffix(p, "/") && strings.HasPrefix(path, p) {
						t.Errorf("%s must not import %s: %s", file, path, rule.why)
					}
				}
			}
		}
	}
	if core != 6 {
		t.Errorf("found %d core rooms, want 6", core)
	}
}

// generated matches the mark of a generated file.
var generated = regexp.MustCompile(`(?m)^// Code generated .* DO NOT EDIT\.$`)

func TestPackageComments(t *testing.T) {
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

// TestLocksAreAnnotated requires each struct with fields after its mutex mu, which guards them, to say so in a form
// that the check of locks reads.
func TestLocksAreAnnotated(t *testing.T) {
	found := 0
	for dir, files := range goPackages(t) {
		if forTests(dir) {
			continue
		}
		for _, file := range files {
			ast.Inspect(parse(t, file, parser.ParseComments), func(n ast.Node) bool {
				s, ok := n.(*ast.StructType)
				if !ok {
					return true
				}
				fields := s.Fields.List
				mu := slices.IndexFunc(fields, isMu)
				if mu < 0 || mu == len(fields)-1 {
					return true
				}
				found++
				if !slices.ContainsFunc(fields[mu+1:], func(f *ast.Field) bool {
					return f.Doc != nil && strings.Contains(f.Doc.List[len(f.Doc.List)-1].Text, "+checklocks:")
				}) {
					t.Errorf("%s: no field after mu has // +checklocks:mu", file)
				}
				return true
			})
		}
	}
	if found < 40 {
		t.Errorf("found only %d structs with a mutex: the search is broken", found)
	}
}

// isMu reports whether a field is a mutex named mu.
func isMu(f *ast.Field) bool {
	of, ok := f.Type.(*ast.SelectorExpr)
	return ok && (of.Sel.Name == "Mutex" || of.Sel.Name == "RWMutex") && len(f.Names) == 1 && f.Names[0].Name == "mu"
}

// TestLinks checks the links between our documents.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:\s]+)(#[^)\s]*)?\)`)
	for _, document := range filesWith(t, ".md") {
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

// maxColumns is the longest line of Go and of documents outside tables, in characters; a tab counts as
// one. Longer lines do not fit beside each other in a review.
const maxColumns = 120

// TestProse refuses comments that state what something is without a verb that says what it does
// ("creation is how it is"), and lines that are too long.
func TestProse(t *testing.T) {
	riddle := regexp.MustCompile(`^\s*// \w+ (is|are) (what|how|who|that)\b`)
	for file, text := range writtenFiles(t) {
		var rows map[int]bool
		for i, line := range strings.Split(text, "\n") {
			if riddle.MatchString(line) {
				t.Errorf("%s:%d: begin with the name and a verb that says what it does: %s", file, i+1, strings.TrimSpace(line))
			}
			if utf8.RuneCountInString(line) <= maxColumns || strings.HasPrefix(line, "//go:") {
				continue
			}
			if rows == nil {
				rows = tableRows(t, file)
			}
			if !rows[i+1] {
				t.Errorf("%s:%d: the line has more than %d columns", file, i+1, maxColumns)
			}
		}
	}
}

// TestLinesOfDocuments refuses lines of documents and of the API's description that are too long, outside of tables
// and of what is quoted. A line without a space, such as a long address, cannot be shorter.
func TestLinesOfDocuments(t *testing.T) {
	documents := filesWith(t, ".md")
	if len(documents) < 30 {
		t.Fatalf("found only %d documents: the walk is broken", len(documents))
	}
	for _, document := range append(documents, "openapi.yaml") {
		text, err := os.ReadFile(document)
		if err != nil {
			t.Fatal(err)
		}
		quoted := false
		for i, line := range strings.Split(string(text), "\n") {
			words := strings.TrimSpace(line)
			if strings.HasPrefix(words, "```") {
				quoted = !quoted
			}
			if !quoted && utf8.RuneCountInString(line) > maxColumns && !strings.HasPrefix(words, "|") &&
				strings.Contains(words, " ") {
				t.Errorf("%s:%d: the line has more than %d columns", document, i+1, maxColumns)
			}
		}
		if quoted {
			t.Errorf("%s: a quotation that ``` begins has no end", document)
		}
	}
}

// tableRows returns the lines of a file that must stay one line: the elements of composite
// literals of several lines, and the content of raw strings.
func tableRows(t *testing.T, path string) map[int]bool {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	line := func(p token.Pos) int { return fset.Position(p).Line }
	rows := map[int]bool{}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CompositeLit:
			for _, e := range n.Elts {
				if first := line(e.Pos()); first == line(e.End()) && first > line(n.Lbrace) {
					rows[first] = true
				}
			}
		case *ast.BasicLit:
			for i := line(n.Pos()); n.Kind == token.STRING && i <= line(n.End()) && line(n.Pos()) != line(n.End()); i++ {
				rows[i] = true
			}
		}
		return true
	})
	return rows
}
