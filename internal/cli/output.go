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

// printJSON prints an object of the API as it came.
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

// show prints v as JSON, or what f prints for people.
func (a *app) show(v any, f func() error) error {
	if a.json {
		return a.printJSON(v)
	}
	return f()
}

// table prints rows under a heading. Cells are what users wrote in part, so
// what would break the table or steer the terminal is replaced.
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

// details prints one thing as a list of names and values; pairs without a value
// are left out.
func (a *app) details(pairs ...string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 3, ' ', 0)
	for i := 0; i+1 < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			fmt.Fprintf(w, "%s\t%s\n", pairs[i], printable(pairs[i+1]))
		}
	}
	return w.Flush()
}

func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return '?'
	}, text)
}

// age returns the time since t, as people say it.
func age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(time.Since(t)) + " ago"
}

// until returns the time to t, as people say it.
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

// span is a duration in its largest unit that says enough.
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

func seconds(n *int64) string {
	if n == nil {
		return ""
	}
	if *n == 0 {
		return "never"
	}
	return span(time.Duration(*n) * time.Second)
}

func moment(t *time.Time) string {
	if t == nil {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05") + ", " + relative(*t)
}

func relative(t time.Time) string {
	if time.Until(t) > 0 {
		return until(&t)
	}
	return age(t)
}

// bytesText is a size in units of 1000, as disks and files are measured here.
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

func deref[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// given is nil for the zero value: a flag that was not given.
func given[T comparable](v T) *T {
	var zero T
	if v == zero {
		return nil
	}
	return &v
}

// collect takes up to limit entries of a listing, 0 is all. The result is never
// nil, so that JSON has a list.
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

// pageSize is the page to ask for when limit entries are wanted in all.
func pageSize(limit int) int {
	const most = 200 // the API's limit
	if limit <= 0 {
		return most
	}
	return min(limit, most)
}
