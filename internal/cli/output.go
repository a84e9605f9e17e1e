package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"iter"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
)

// printJSON prints an object of the API.
func (a *app) printJSON(v any) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("encoding JSON: %w", err)
	}
	_, err := a.out.Write(b.Bytes())
	return err
}

// show prints v as JSON with --json, and else calls f, which prints it for people.
func (a *app) show(v any, f func() error) error {
	if a.json {
		return a.printJSON(v)
	}
	return f()
}

// table prints rows under a heading. It replaces the characters of cells that would break the table or control the
// terminal, since other users wrote some of them.
func (a *app) table(head []string, rows [][]string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, strings.Join(head, "\t"))
	for _, row := range rows {
		for i, cell := range row {
			row[i] = printable(cell)
		}
		fmt.Fprintln(w, strings.Join(row, "\t"))
	}
	return w.Flush()
}

// details prints names and values, one pair a line. It leaves out pairs without a value.
func (a *app) details(pairs ...string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 3, ' ', 0)
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", pairs[i], printable(pairs[i+1]))
		}
	}
	return w.Flush()
}

// printable replaces the characters of a text that cannot be printed.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// age returns the time since t as a text such as "5m ago".
func age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(time.Since(t)) + " ago"
}

// until returns the time to t as a text such as "in 5m".
func until(t *time.Time) string {
	if t == nil {
		return "-"
	}
	left := time.Until(*t)
	if left <= 0 {
		return "now"
	}
	return "in " + span(left)
}

// span returns a duration in the largest unit of which it has at least two.
func span(d time.Duration) string {
	d = max(d.Round(time.Second), 0)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// seconds returns a number of seconds as text, "never" for 0.
func seconds(n *int64) string {
	if n == nil {
		return ""
	}
	if *n == 0 {
		return "never"
	}
	return span(time.Duration(*n) * time.Second)
}

// moment returns a time with its distance from now.
func moment(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05") + ", " + relative(*t)
}

// relative returns the distance of a time from now.
func relative(t time.Time) string {
	if time.Until(t) > 0 {
		return until(&t)
	}
	return age(t)
}

// bytesText returns a size in units of 1000 bytes, as everywhere in cay's output about disks and files.
func bytesText(n int64) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1_000_000:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	case n < 1_000_000_000:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	default:
		return fmt.Sprintf("%.1f GB", float64(n)/1e9)
	}
}

// deref returns the value of a pointer, the zero value for nil.
func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// given returns a pointer to the value of a flag, nil for the zero value of a flag that is not given.
func given[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

// collect returns up to limit entries of a listing, or all for 0. The result is never nil, so that JSON has a list.
func collect[T any](entries iter.Seq2[T, error], limit int) ([]T, error) {
	all := []T{}
	for e, err := range entries {
		if err != nil {
			return nil, err
		}
		if all = append(all, e); len(all) == limit {
			break
		}
	}
	return all, nil
}

// pageSize returns the size of the pages in which to ask for up to limit entries, or for all for 0.
func pageSize(limit int) int {
	const most = 200 // the API's limit
	if limit <= 0 {
		return most
	}
	return min(limit, most)
}
