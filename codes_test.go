package cay_test

import (
	"go/ast"
	"go/token"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// codeRegistry is the one file that holds codes of errors as text.
const codeRegistry = "internal/fault/codes.go"

// invalidField stands in lists of codes for "invalid_" and the name of any field.
const invalidField = "invalid_{field}"

// codes maps the names of the registry's constants to codes, in the registry's three blocks.
type codes struct{ api, e2b, inner map[string]string }

// all returns the constants of all blocks.
func (c codes) all() map[string]string {
	out := maps.Clone(c.api)
	maps.Copy(out, c.e2b)
	maps.Copy(out, c.inner)
	return out
}

// shown returns the codes of the constants, sorted.
func shown(constants map[string]string) []string {
	return slices.Sorted(maps.Values(constants))
}

func readCodes(t *testing.T) codes {
	t.Helper()
	var blocks []map[string]string
	for _, d := range parse(t, codeRegistry, 0).Decls {
		constants, ok := d.(*ast.GenDecl)
		if !ok || constants.Tok != token.CONST {
			continue
		}
		block := map[string]string{}
		for _, spec := range constants.Specs {
			spec := spec.(*ast.ValueSpec)
			text, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			if err != nil {
				t.Fatal(err)
			}
			block[spec.Names[0].Name] = text
		}
		blocks = append(blocks, block)
	}
	if len(blocks) != 3 {
		t.Fatalf("%s has %d blocks of constants, want 3", codeRegistry, len(blocks))
	}
	c := codes{blocks[0], blocks[1], blocks[2]}
	if all := c.all(); len(all) != len(c.api)+len(c.e2b)+len(c.inner) ||
		len(slices.Compact(shown(all))) != len(all) {
		t.Errorf("%s has a name or a code twice", codeRegistry)
	}
	return c
}

// literalsOfCodes lists the places where a text that is also a code is something else.
var literalsOfCodes = map[string][]string{
	"internal/egressproxy/metadata.go": {"method_not_allowed"},            // the metadata service has codes of its own
	"internal/sandbox/sandbox.go":      {"boot_failed"},                   // a reason why a sandbox ended
	"internal/sandbox/suspend.go":      {"suspend_failed", "wake_failed"}, // reasons of events
}

// TestErrorCodes checks that each code of the registry is used, that the codes for E2B's clients
// alone are used in their room alone, and that no other file writes a code as text.
func TestErrorCodes(t *testing.T) {
	registry := readCodes(t)
	all := registry.all()
	used := map[string][]string{} // rooms by constant
	for file := range writtenFiles(t) {
		if strings.HasSuffix(file, "_test.go") || file == codeRegistry || forTests(filepath.Dir(file)) ||
			!strings.HasPrefix(file, "internal/") || strings.HasPrefix(file, "internal/cli/") {
			// The command line knows the public client alone.
			continue
		}
		places := placesOfCodes(parse(t, file, 0))
		for _, name := range places.constants {
			used[name] = append(used[name], filepath.Dir(file))
		}
		for _, text := range places.codes {
			t.Errorf("%s has the code %s: use or add a constant of %s", file, text, codeRegistry)
		}
		for _, text := range places.others {
			// One word may be anything; more words joined by _ are a code.
			if strings.Contains(text, "_") && slices.Contains(shown(all), text) &&
				!slices.Contains(literalsOfCodes[file], text) {
				t.Errorf("%s has the code %q as text: use the constant of %s", file, text, codeRegistry)
			}
		}
	}
	for name, code := range all {
		if used[name] == nil {
			t.Errorf("nothing uses %s, %q", name, code)
		}
		_, only := registry.e2b[name]
		elsewhere := slices.ContainsFunc(used[name], func(room string) bool { return room != "internal/e2b" })
		if only == elsewhere && !strings.HasPrefix(code, "invalid_") {
			t.Errorf("%s is in the wrong block of %s: it is used in %v", name, codeRegistry, used[name])
		}
	}
}

// places holds the texts of a file that concern codes of errors.
type places struct {
	constants []string // names of constants of the registry
	codes     []string // texts and other constants at a place where a code belongs
	others    []string // all other texts
}

func placesOfCodes(f *ast.File) places {
	var out places
	isCode := map[ast.Expr]bool{}
	isCodeField := func(e ast.Expr) bool {
		s, ok := e.(*ast.SelectorExpr)
		return ok && s.Sel.Name == "Code"
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.CallExpr:
			switch fn := nameOf(n.Fun); {
			case fn == "fault.New" && len(n.Args) > 2:
				isCode[n.Args[1]] = true
			case fn == "fault.InField" && len(n.Args) > 2:
				isCode[n.Args[0]] = true
			}
		case *ast.BinaryExpr:
			if isCodeField(n.X) && (n.Op == token.EQL || n.Op == token.NEQ) {
				isCode[n.Y] = true
			}
		case *ast.AssignStmt:
			if isCodeField(n.Lhs[0]) {
				isCode[n.Rhs[0]] = true
			}
		case *ast.SwitchStmt:
			if n.Tag != nil && isCodeField(n.Tag) {
				for _, c := range n.Body.List {
					for _, e := range c.(*ast.CaseClause).List {
						isCode[e] = true
					}
				}
			}
		case *ast.SelectorExpr:
			if name, ok := strings.CutPrefix(nameOf(n), "fault."); ok && strings.HasPrefix(name, "Code") {
				out.constants = append(out.constants, name)
			}
		case *ast.Ident:
			if isCode[n] && n.Name != "code" { // another constant, whose text may be a code by chance
				out.codes = append(out.codes, n.Name)
			}
		case *ast.BasicLit:
			text, err := strconv.Unquote(n.Value)
			switch {
			case n.Kind != token.STRING || err != nil || text == "":
			case isCode[n]:
				out.codes = append(out.codes, text)
			default:
				out.others = append(out.others, text)
			}
		}
		return true
	})
	return out
}

// nameOf returns a name such as fault.New, or "" for any other expression.
func nameOf(e ast.Expr) string {
	if s, ok := e.(*ast.SelectorExpr); ok {
		if x, ok := s.X.(*ast.Ident); ok {
			return x.Name + "." + s.Sel.Name
		}
	}
	return ""
}

// TestErrorCodesAreDocumented compares the registry with the list in openapi.yaml, the tables of
// docs/errors.md, and every "code `name`" in the texts of both and of the other documents.
func TestErrorCodesAreDocumented(t *testing.T) {
	registry := readCodes(t)
	text, err := os.ReadFile("openapi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	list := regexp.MustCompile(`(?s)x-codes: \[(.*?)\]`).FindSubmatch(text)
	if list == nil {
		t.Fatal("openapi.yaml has no x-codes")
	}
	want := slices.Sorted(slices.Values(append(shown(registry.api), invalidField)))
	same(t,
		"openapi.yaml: x-codes of Problem.code", regexp.MustCompile(`[a-z_{}]+`).FindAllString(string(list[1]), -1), want)

	page, err := os.ReadFile("docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	api, e2b, ok := strings.Cut(string(page), "## Errors that only E2B's clients see")
	if !ok {
		t.Fatal("docs/errors.md has no part for E2B's clients")
	}
	row := regexp.MustCompile("(?m)^\\| `([a-z_{}]+)` \\| ([0-9, ]+) \\|")
	listed := func(text string) (names []string) {
		for _, m := range row.FindAllStringSubmatch(text, -1) {
			names = append(names, m[1])
			for status := range strings.SplitSeq(m[2], ", ") {
				if n, err := strconv.Atoi(status); err != nil || http.StatusText(n) == "" {
					t.Errorf("docs/errors.md: %s has the status %s", m[1], status)
				}
			}
		}
		return names
	}
	same(t, "the first table of docs/errors.md", listed(api), want)
	same(t, "the second table of docs/errors.md", listed(e2b), shown(registry.e2b))

	documents, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	mention := regexp.MustCompile("\\bcode `([a-z0-9_]+)`")
	public := append(shown(registry.api), shown(registry.e2b)...)
	for _, file := range append(documents, "openapi.yaml", "README.md") {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range mention.FindAllStringSubmatch(string(text), -1) {
			if !slices.Contains(public, m[1]) {
				t.Errorf("%s names the code %s, which is not in %s", file, m[1], codeRegistry)
			}
		}
	}
}

// same reports the differences between a list of a document and the registry, and a list out of
// order.
func same(t *testing.T, where string, got, want []string) {
	t.Helper()
	if !slices.IsSorted(got) {
		t.Errorf("%s is not sorted", where)
	}
	for _, name := range got {
		if !slices.Contains(want, name) {
			t.Errorf("%s names %s, which is not in %s", where, name, codeRegistry)
		}
	}
	for _, name := range want {
		if !slices.Contains(got, name) {
			t.Errorf("%s lacks %s of %s", where, name, codeRegistry)
		}
	}
}
