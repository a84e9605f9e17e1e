package cay_test

import (
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDocumentation checks that the documentation of the package is written for its users: every exported name has a
// comment, and none is of the generator's own making.
func TestDocumentation(t *testing.T) {
	paths, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, path := range paths {
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	p, err := doc.NewFromFiles(fset, files, "github.com/cayhq/cay/sdk/go")
	if err != nil {
		t.Fatal(err)
	}
	noise := regexp.MustCompile(`oapi|openapi|OpenAPI3|[Dd]efines (model|values|parameters|body)`)
	check := func(name, comment string) {
		t.Helper()
		if strings.TrimSpace(comment) == "" {
			t.Errorf("%s has no comment", name)
		}
		if noise.MatchString(comment) && name != "Client.OpenAPI" {
			t.Errorf("%s has a comment of the generator: %s", name, comment)
		}
	}
	if !strings.HasPrefix(p.Doc, "Package cay calls a cay server") {
		t.Errorf("the package comment begins with %.60q", p.Doc)
	}
	check("the package", p.Doc)
	values := func(all []*doc.Value) {
		for _, v := range all {
			check(v.Names[0], v.Doc)
		}
	}
	functions := func(receiver string, all []*doc.Func) {
		for _, f := range all {
			check(receiver+f.Name, f.Doc)
		}
	}
	values(p.Consts)
	values(p.Vars)
	functions("", p.Funcs)
	for _, typ := range p.Types {
		check(typ.Name, typ.Doc)
		for _, end := range []string{"Params", "RequestBody"} {
			if strings.HasSuffix(typ.Name, end) {
				t.Errorf("%s is exported, though only generated code uses it", typ.Name)
			}
		}
		values(typ.Consts)
		values(typ.Vars)
		functions("", typ.Funcs)
		functions(typ.Name+".", typ.Methods)
	}
	if len(p.Types) < 50 || len(p.Examples) == 0 {
		t.Fatalf("found %d types and %d examples: the test is broken", len(p.Types), len(p.Examples))
	}
}
