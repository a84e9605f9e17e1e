package e2e

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
)

// writeMatrix makes the tests of E2B's client write the table of its methods instead of comparing it.
var writeMatrix = flag.Bool("e2b.matrix", false, "write the tables of methods in docs/e2b.md")

const matrixFile = "../docs/e2b.md"

// matrixMu is held while the document is compared or written.
var matrixMu sync.Mutex

// matrixTable is a table of methods in the document.
type matrixTable struct {
	place string // what the comment says that stands before the table

	works  string // heads the methods that work
	absent string // heads the methods that no test calls; if it is empty, such a method fails the test
}

// checkMatrix compares a table of methods in the document with what the tests have recorded: a method
// works if a call of it succeeded, and is refused if every call was answered with 501.
func checkMatrix(t *testing.T, table matrixTable, methods []string, record string) {
	t.Helper()
	works, refused := recorded(t, record)
	text := table.text(t, methods, works, refused)

	matrixMu.Lock()
	defer matrixMu.Unlock()
	doc, err := os.ReadFile(matrixFile)
	if err != nil {
		t.Fatal(err)
	}
	begin := "<!-- " + table.place + " -->\n"
	const end = "<!-- end -->\n"
	before, rest, found := strings.Cut(string(doc), begin)
	old, after, ended := strings.Cut(rest, end)
	if !found || !ended {
		t.Fatalf("%s has no place for the table", matrixFile)
	}
	switch {
	case t.Failed(), old == text:
	case *writeMatrix:
		if err := os.WriteFile(matrixFile, []byte(before+begin+text+end+after), 0o600); err != nil {
			t.Fatal(err)
		}
	default:
		t.Errorf("%s has\n%s\nand the tests say\n%s\nwrite it with -e2b.matrix", matrixFile, old, text)
	}
}

// clientMethods returns the methods of E2B's installed client: those of templates, whose tests have a server
// of their own, or the others.
func clientMethods(t *testing.T, node, dir string, templates bool) []string {
	t.Helper()
	cmd := exec.Command(node, "record.mjs")
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "E2B_TEST_METHODS=1")
	out, err := cmd.Output()
	var methods []string
	if err == nil {
		err = json.Unmarshal(out, &methods)
	}
	if err != nil {
		t.Fatalf("listing the methods: %v\n%s", err, out)
	}
	return ofTemplates(methods, templates)
}

// ofTemplates returns the methods of templates, or the others.
func ofTemplates(methods []string, templates bool) []string {
	return slices.DeleteFunc(methods, func(name string) bool {
		return strings.HasPrefix(strings.ToLower(name), "template") != templates
	})
}

// recorded reads what record.mjs has written.
func recorded(t *testing.T, file string) (works map[string]bool, refused map[string]string) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	works, refused = map[string]bool{}, map[string]string{}
	for line := range bytes.Lines(data) {
		var call struct{ Name, Refused string }
		if err := json.Unmarshal(line, &call); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if call.Refused == "" {
			works[call.Name] = true
		} else {
			refused[call.Name] = call.Refused
		}
	}
	return works, refused
}

// text returns the table.
func (m matrixTable) text(t *testing.T, methods []string, works map[string]bool, refused map[string]string) string {
	t.Helper()
	good, bad, absent := map[string][]string{}, map[string][]string{}, map[string][]string{}
	for _, name := range methods {
		i := strings.LastIndexByte(name, '.')
		switch {
		case works[name]:
			good[name[:i]] = append(good[name[:i]], name[i+1:])
		case refused[name] != "":
			bad[refused[name]] = append(bad[refused[name]], name)
		case m.absent != "":
			absent[name[:i]] = append(absent[name[:i]], name[i+1:])
		default:
			t.Errorf("no test calls %s with success, and none is answered 501", name)
		}
	}
	var out strings.Builder
	list := func(title string, rows map[string][]string, row func(key, names string) string) {
		if len(rows) == 0 {
			return
		}
		fmt.Fprintf(&out, "\n| %s |\n| --- | --- |\n", title)
		for _, key := range slices.Sorted(maps.Keys(rows)) {
			slices.Sort(rows[key])
			fmt.Fprintln(&out, row(key, "`"+strings.Join(rows[key], "`, `")+"`"))
		}
	}
	named := func(key, names string) string { return "| `" + key + "` | " + names + " |" }
	list(m.works, good, named)
	list("does not work | what the server says", bad, func(key, names string) string {
		return "| " + names + " | " + key + " |"
	})
	list(m.absent, absent, named)
	return out.String() + "\n"
}
