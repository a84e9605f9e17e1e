package store

import (
	"go/ast"
	"regexp"
	"slices"
	"testing"

	"github.com/cayhq/cay/internal/caytest"
)

// counting matches a query that counts rows, and ofOrg one for the rows of an organization.
var (
	counting = regexp.MustCompile(`COUNT\(`)
	ofOrg    = regexp.MustCompile(`\borg_id = `)
)

// TestCountsAreLocked fails for a transaction that counts rows of an organization without the
// organization's lock: in PostgreSQL two at once would both find room for one more.
func TestCountsAreLocked(t *testing.T) {
	// decls has the names that each function, method and constant of the package uses, and its texts.
	type decl struct {
		uses         []string
		count, ofOrg bool
	}
	decls := map[string]*decl{}
	look := func(name string, n ast.Node) {
		d := decls[name]
		if d == nil {
			d = &decl{}
			decls[name] = d
		}
		ast.Inspect(n, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.Ident:
				d.uses = append(d.uses, n.Name)
			case *ast.BasicLit:
				d.count = d.count || counting.MatchString(n.Value)
				d.ofOrg = d.ofOrg || ofOrg.MatchString(n.Value)
			}
			return true
		})
	}
	for _, file := range caytest.SourceFiles(t) {
		for _, n := range file.Decls {
			switch n := n.(type) {
			case *ast.FuncDecl:
				look(n.Name.Name, n.Body)
			case *ast.GenDecl:
				for _, spec := range n.Specs {
					if values, ok := spec.(*ast.ValueSpec); ok {
						look(values.Names[0].Name, values)
					}
				}
			}
		}
	}
	begins := []string{"record", "write"} // begin a transaction without the lock
	found := 0
	for name, d := range decls {
		if slices.Contains(begins, name) || !slices.ContainsFunc(d.uses, func(use string) bool {
			return slices.Contains(begins, use) || use == "recordCounted"
		}) {
			continue
		}
		counted, locked := d.count && d.ofOrg, false
		seen := map[string]bool{}
		for todo := slices.Clone(d.uses); len(todo) > 0; todo = todo[1:] {
			use := todo[0]
			locked = locked || use == "recordCounted" || use == "lockOrg"
			if next := decls[use]; next != nil && !seen[use] && !slices.Contains(begins, use) {
				seen[use] = true
				counted = counted || next.count && next.ofOrg
				todo = append(todo, next.uses...)
			}
		}
		if counted {
			found++
		}
		if counted && !locked {
			t.Errorf("%s counts rows of an organization without its lock", name)
		}
	}
	if found < 6 {
		t.Errorf("the test finds %d transactions that count, which are fewer than there are", found)
	}
}
