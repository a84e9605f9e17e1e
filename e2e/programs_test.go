package e2e

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// triedPrograms is set by `make soak-programs`: the template takes a quarter of an hour to build.
var triedPrograms = flag.Bool("programs", false,
	"build a template of e2e/testdata/programs and run what is there in a sandbox")

// programsPatience limits the build of the template. It took 12 minutes on two processors that
// other programs used, too.
const programsPatience = 2 * time.Hour

const (
	programsDir = "testdata/programs"
	programsDoc = "../docs/compatibility.md"
)

// TestProgramsAreTheDocument compares the table of docs/compatibility.md with the scripts: one line
// for each script, with the text of its first line.
func TestProgramsAreTheDocument(t *testing.T) {
	doc, err := os.ReadFile(programsDoc)
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	_, table, _ := strings.Cut(string(doc), "\n## Programs that are tried\n")
	for line := range strings.Lines(table) {
		if cells := strings.Split(strings.TrimSpace(line), " | "); len(cells) == 2 && strings.HasPrefix(cells[0], "| `") {
			rows = append(rows, strings.Trim(cells[0], "| `")+": "+strings.TrimSuffix(cells[1], " |"))
		}
	}
	scripts := programScripts(t)
	var want []string
	for _, name := range scripts {
		text, err := os.ReadFile(filepath.Join(programsDir, name+".sh"))
		if err != nil {
			t.Fatal(err)
		}
		first, _, _ := strings.Cut(string(text), "\n")
		want = append(want, name+": "+strings.TrimSuffix(strings.TrimPrefix(first, "# "), "."))
	}
	if slices.Sort(rows); !slices.Equal(rows, want) {
		t.Errorf("the table has\n%s\nand the scripts are\n%s", strings.Join(rows, "\n"), strings.Join(want, "\n"))
	}
}

// programScripts returns the names of the scripts, sorted.
func programScripts(t *testing.T) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(programsDir, "*.sh"))
	if err != nil || len(paths) == 0 {
		t.Fatalf("there are no scripts: %v", err)
	}
	var names []string
	for _, path := range paths {
		names = append(names, strings.TrimSuffix(filepath.Base(path), ".sh"))
	}
	slices.Sort(names)
	return names
}

// TestPrograms runs each script in a sandbox of its own without a network. The template is built
// from the Dockerfile beside the scripts, of Debian's packages.
func TestPrograms(t *testing.T) {
	if !*triedPrograms {
		t.Skip("takes half an hour and 4 GB of disk: make soak-programs")
	}
	s := newServer(t, "CAY_BUILD_TIMEOUT=2h", "CAY_TEMPLATES_PREPARE=python")
	s.start()
	files := map[string]string{}
	names := programScripts(t)
	for _, name := range append([]string{"Dockerfile"}, names...) {
		path := filepath.Join(programsDir, name)
		if name != "Dockerfile" {
			path += ".sh"
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(path)] = string(text)
	}
	s.needTemplate("python")
	s.needBuiltWithin(programsPatience, object{"name": "programs", "dockerfile": "Dockerfile", "size": "shared-cpu-2x",
		"disk_size_mb": 4096}, tarOf(t, files))
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			s := s.in(t)
			id := s.create(object{"template": "programs", "egress": object{"mode": "deny_all"}, "timeout": "30m"})
			defer s.destroy(id)
			r := s.exec(id, "sh -eu /programs/"+name+".sh", object{"timeout": "5m"})
			t.Logf("%d ms: %s", r.DurationMS, r.Stdout)
			if r.ExitCode != 0 {
				t.Errorf("the script ended with %d, signal %q, timed out %v, out of memory %v: %s", r.ExitCode, r.Signal,
					r.TimedOut, r.OOMKilled, r.Stderr)
			}
		})
	}
}
