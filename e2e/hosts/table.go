package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// passed is the result of a check without an error.
const passed = "passed"

// row is the result of one check in one machine.
type row struct {
	machine string
	check   string
	result  string
	took    time.Duration
	day     string
	note    string
}

const tableHead = "| machine | check | result | time | on | note |\n| --- | --- | --- | --- | --- | --- |\n"

// table prints rows as Markdown.
func table(rows []row) string {
	var b strings.Builder
	b.WriteString(tableHead)
	for _, r := range rows {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s |\n", r.machine, r.check, r.result, r.took, r.day, r.note)
	}
	return b.String()
}

// begins and ends are the lines of a Markdown file between which the table stands.
const (
	begins = "<!-- run -->\n"
	ends   = "<!-- /run -->\n"
)

// updateDoc replaces the rows of the same machines and checks in the table of a Markdown file, and
// leaves the others.
func updateDoc(path string, rows []row) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, found := strings.Cut(string(text), begins)
	old, after, alsoFound := strings.Cut(rest, ends)
	if !found || !alsoFound {
		return fmt.Errorf("%s has no lines %q and %q", path, begins, ends)
	}
	all, err := parseTable(old)
	if err != nil {
		return fmt.Errorf("reading the table of %s: %w", path, err)
	}
	for _, r := range rows {
		i := slices.IndexFunc(all, func(o row) bool { return o.machine == r.machine && o.check == r.check })
		if i >= 0 {
			all[i] = r
		} else {
			all = append(all, r)
		}
	}
	slices.SortStableFunc(all, func(a, b row) int { return a.place() - b.place() })
	return os.WriteFile(path, []byte(before+begins+table(all)+ends+after), 0o644)
}

// place orders rows by machine and check.
func (r row) place() int {
	m := slices.IndexFunc(machines, func(m machine) bool { return m.name == r.machine })
	if m < 0 {
		return -1 // of a machine that does not exist any more: it comes first and is noticed
	}
	return m*100 + 1 + slices.Index(machines[m].checks, r.check) // the boot is not in the list and comes first
}

// parseTable reads the output of table.
func parseTable(text string) (rows []row, err error) {
	text, _ = strings.CutPrefix(text, tableHead)
	for line := range strings.Lines(text) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if len(cells) != 6 {
			return nil, fmt.Errorf("a line of %d cells: %s", len(cells), line)
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		took, err := time.ParseDuration(cells[3])
		if err != nil {
			return nil, err
		}
		rows = append(rows, row{cells[0], cells[1], cells[2], took, cells[4], cells[5]})
	}
	return rows, nil
}

// oneLine makes a text fit into a cell.
func oneLine(text string) string {
	text = strings.Join(strings.Fields(strings.ReplaceAll(text, "|", "/")), " ")
	if len(text) > 300 {
		text = text[:300] + "…"
	}
	return text
}
