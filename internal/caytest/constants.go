package caytest

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"strconv"
	"strings"
	"testing"
)

// Constants returns the values of the constants of a type of texts in the package of the test, in
// the order of its files. With it a test fails for a constant that a list of all of them lacks.
func Constants[T ~string](t testing.TB, typeName string) (all []T) {
	t.Helper()
	for _, file := range SourceFiles(t) {
		for _, decl := range file.Decls {
			gen, ok := decl.(*ast.GenDecl)
			if !ok || gen.Tok != token.CONST {
				continue
			}
			for _, spec := range gen.Specs {
				values := spec.(*ast.ValueSpec)
				if of, ok := values.Type.(*ast.Ident); !ok || of.Name != typeName {
					continue
				}
				for _, value := range values.Values {
					text, err := strconv.Unquote(value.(*ast.BasicLit).Value)
					if err != nil {
						t.Fatal(err)
					}
					all = append(all, T(text))
				}
			}
		}
	}
	if all == nil {
		t.Fatalf("the package has no constants of the type %s", typeName)
	}
	return all
}

// SourceFiles returns the parsed Go files of the package of the test, without those of tests.
func SourceFiles(t testing.TB) (files []*ast.File) {
	t.Helper()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), e.Name(), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	return files
}
