// Command hide edits the generated files of a Go package so that its documentation has only what its users need. It
// unexports every generated declaration that no exported declaration of the hand-written files refers to, directly or
// through other generated types, and gives the others doc comments in the form of Go. Run by internal/api/generate.sh.
//
//	hide DIR
package main

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: hide DIR")
		os.Exit(2)
	}
	if err := hide(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "hide:", err)
		os.Exit(1)
	}
}

// hide edits the generated files of the package in a directory.
func hide(dir string) error {
	paths, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return err
	}
	fset := token.NewFileSet()
	written, generated := map[string]*ast.File{}, map[string]*ast.File{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, path, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		if strings.HasSuffix(path, ".gen.go") {
			generated[path] = f
		} else {
			written[path] = f
		}
	}
	hidden := unreachable(written, generated)
	for path, f := range generated {
		if err := rewrite(fset, path, f, hidden); err != nil {
			return err
		}
	}
	return nil
}

// unreachable returns new names for the exported declarations of the generated files that no exported declaration
// of the hand-written files reaches.
func unreachable(written, generated map[string]*ast.File) map[string]string {
	types := map[string]ast.Expr{}
	var names []string      // functions and types
	consts := [][2]string{} // names and their types
	for _, f := range generated {
		for _, d := range f.Decls {
			switch d := d.(type) {
			case *ast.FuncDecl:
				if d.Recv == nil {
					names = append(names, d.Name.Name)
				}
			case *ast.GenDecl:
				for _, spec := range d.Specs {
					switch spec := spec.(type) {
					case *ast.TypeSpec:
						types[spec.Name.Name] = spec.Type
						names = append(names, spec.Name.Name)
					case *ast.ValueSpec:
						if t, ok := spec.Type.(*ast.Ident); ok {
							consts = append(consts, [2]string{spec.Names[0].Name, t.Name})
						}
					}
				}
			}
		}
	}
	reached := map[string]bool{}
	var reach func(ast.Node)
	reach = func(n ast.Node) {
		for _, name := range exportedIn(n) {
			if t, ok := types[name]; ok && !reached[name] {
				reached[name] = true
				reach(t)
			}
		}
	}
	for _, f := range written {
		for _, n := range exportedDecls(f) {
			reach(n)
		}
	}
	hidden := map[string]string{}
	for _, name := range names {
		if ast.IsExported(name) && !reached[name] {
			hidden[name] = unexported(name)
		}
	}
	for _, c := range consts {
		if !reached[c[1]] {
			hidden[c[0]] = unexported(c[0])
		}
	}
	return hidden
}

// exportedDecls returns the types, and the signatures of the functions and methods, that a file exports.
func exportedDecls(f *ast.File) []ast.Node {
	var nodes []ast.Node
	for _, d := range f.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if !d.Name.IsExported() {
				continue
			}
			if d.Recv == nil || len(exportedIn(d.Recv)) > 0 {
				nodes = append(nodes, d.Type)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				if spec, ok := spec.(*ast.TypeSpec); ok && spec.Name.IsExported() {
					nodes = append(nodes, spec.Type)
				}
			}
		}
	}
	return nodes
}

// exportedIn returns the exported names that a type or a signature refers to, without those of unexported fields.
func exportedIn(n ast.Node) []string {
	var names []string
	ast.Inspect(n, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.StructType:
			for _, field := range n.Fields.List {
				if field.Names == nil || field.Names[0].IsExported() {
					names = append(names, exportedIn(field.Type)...)
				}
			}
			return false
		case *ast.SelectorExpr:
			return false // of another package
		case *ast.Ident:
			if n.IsExported() {
				names = append(names, n.Name)
			}
		}
		return true
	})
	return names
}

// unexported returns a name with its first word in lower case: "apiKeyList" for "APIKeyList".
func unexported(name string) string {
	letters := []rune(name)
	for i := range letters {
		if i > 0 && i+1 < len(letters) && !unicode.IsUpper(letters[i+1]) {
			break
		}
		if !unicode.IsUpper(letters[i]) {
			break
		}
		letters[i] = unicode.ToLower(letters[i])
	}
	return string(letters)
}

// edit replaces bytes of a file.
type edit struct {
	from, to int
	text     string
}

// rewrite renames the hidden declarations in a file and rewrites its doc comments.
func rewrite(fset *token.FileSet, path string, f *ast.File, hidden map[string]string) error {
	source, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	offset := func(p token.Pos) int { return fset.Position(p).Offset }
	var edits []edit
	for _, id := range references(f) {
		if name, ok := hidden[id.Name]; ok {
			edits = append(edits, edit{offset(id.Pos()), offset(id.End()), name})
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		var doc *ast.CommentGroup
		var change func(string) string
		switch n := n.(type) {
		case *ast.GenDecl:
			doc, change = n.Doc, declDoc(hidden)
		case *ast.FuncDecl:
			doc, change = n.Doc, declDoc(hidden)
		case *ast.Field:
			if doc = n.Doc; len(n.Names) == 1 {
				change = func(text string) string { return strings.TrimPrefix(text, n.Names[0].Name+" ") }
			}
		}
		if doc != nil && change != nil {
			if text, ok := strings.CutPrefix(doc.List[0].Text, "// "); ok {
				edits = append(edits, edit{offset(doc.List[0].Pos()), offset(doc.List[0].End()), "// " + change(text)})
			}
		}
		return true
	})
	slices.SortFunc(edits, func(a, b edit) int { return cmp.Compare(b.from, a.from) })
	for _, e := range edits {
		source = slices.Concat(source[:e.from], []byte(e.text), source[e.to:])
	}
	if source, err = format.Source(source); err != nil {
		return fmt.Errorf("formatting %s: %w", path, err)
	}
	return os.WriteFile(path, source, 0o644)
}

// references returns the identifiers of a file that can name a declaration of the package: all but fields, methods,
// and names of other packages.
func references(f *ast.File) []*ast.Ident {
	others := map[*ast.Ident]bool{}
	var ids []*ast.Ident
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			if n.Recv != nil {
				others[n.Name] = true
			}
		case *ast.Field:
			for _, name := range n.Names {
				others[name] = true
			}
		case *ast.SelectorExpr:
			others[n.Sel] = true
		case *ast.KeyValueExpr:
			if key, ok := n.Key.(*ast.Ident); ok {
				others[key] = true
			}
		case *ast.Ident:
			if !others[n] { // a parent comes before its children
				ids = append(ids, n)
			}
		}
		return true
	})
	return ids
}

// declDoc returns a function that rewrites the first line of the doc comment of a declaration. The generator puts the
// name before a description: "APIKey An API key" becomes "APIKey describes an API key".
func declDoc(hidden map[string]string) func(string) string {
	return func(text string) string {
		if name, ok := strings.CutPrefix(text, "Defines values for "); ok {
			name = strings.TrimSuffix(name, ".")
			return "Values of " + cmp.Or(hidden[name], name) + "."
		}
		name, rest, ok := strings.Cut(text, " ")
		if !ok {
			return text
		}
		if first := []rune(rest); unicode.IsUpper(first[0]) && len(first) > 1 && !unicode.IsUpper(first[1]) {
			rest = "describes " + string(unicode.ToLower(first[0])) + string(first[1:])
		}
		return cmp.Or(hidden[name], name) + " " + rest
	}
}
