package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
)

// Units of the measurements.
const (
	unitMS          = "ms"
	unitMB          = "MB" // units of 10⁶ bytes
	unitMBps        = "MB/s"
	unitRate        = "calls/s"
	unitConnections = "conn/s"
)

// results holds all measurements, and the machine on which they were taken.
type results struct {
	Host        host       `json:"host"`
	Measures    []*measure `json:"measures"`
	Aims        []aim      `json:"aims"`
	TookSeconds float64    `json:"took_seconds"`
}

// measure holds the samples of one measurement.
type measure struct {
	Name    string    `json:"name"`
	Unit    string    `json:"unit"`
	N       int       `json:"n"`
	P50     float64   `json:"p50"`
	P95     float64   `json:"p95"`
	P99     float64   `json:"p99"`
	Min     float64   `json:"min"`
	Samples []float64 `json:"samples"` // in the order they were taken

	// Beside names the measure that was taken in turn with this one, "" if none. Ratio is this median
	// divided by that one's.
	Beside string  `json:"beside,omitempty"`
	Ratio  float64 `json:"ratio,omitempty"`
}

// aim is a target for a number. A missed target is reported and is no error: machines differ.
type aim struct {
	What  string  `json:"what"`
	Limit float64 `json:"limit"`
	Got   float64 `json:"got"`
	Met   bool    `json:"met"`
}

// add adds one sample.
func (r *results) add(name, unit string, value float64) {
	m := r.find(name)
	if m == nil {
		m = &measure{Name: name, Unit: unit}
		r.Measures = append(r.Measures, m)
	}
	m.Samples = append(m.Samples, value)
}

// took adds the time since began.
func (r *results) took(name string, began time.Time) {
	r.add(name, unitMS, milliseconds(time.Since(began)))
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// find returns the measure of the name, nil if there is none.
func (r *results) find(name string) *measure {
	for _, m := range r.Measures {
		if m.Name == name {
			return m
		}
	}
	return nil
}

// percentile returns the nearest-rank percentile of sorted samples, of which there is at least one.
func percentile(sorted []float64, p float64) float64 {
	return sorted[max(0, int(math.Ceil(p*float64(len(sorted))))-1)]
}

// summarise computes the columns of the table from the samples.
func (r *results) summarise() {
	for _, m := range r.Measures {
		sorted := slices.Sorted(slices.Values(m.Samples))
		m.N, m.P50, m.P95, m.P99, m.Min = len(sorted), percentile(sorted, 0.5), percentile(sorted, 0.95),
			percentile(sorted, 0.99), sorted[0]
	}
	for _, m := range r.Measures {
		if other := r.find(counterparts[m.Name]); other != nil {
			m.Beside, m.Ratio = other.Name, m.P50/other.P50
		}
	}
	r.aim("cold create, by docker run -d", 0.45, r.ratio(startCreate, dockerStartCreate))
	r.aim("warm create, by docker run -d", 1.0/40, r.ratio(warmCreate, dockerWithWarm))
	r.aim("warm create, ms", 15, r.ratio(warmCreate, ""))
	r.aim("warm create, p99, ms", 50, r.p99(warmCreate))
	r.aim("execute true, by the same start inside", 1.2, r.ratio(commandTrue, commandSpawn))
	r.aim("execute true, by docker exec true", 1.0/6, r.ratio(commandTrue, dockerTrue))
	r.aim("destroy, ms", 5, r.ratio(startDestroy, ""))
	small := fmt.Sprintf(wakeAnswered, smallSleeper)
	r.aim("small wake until the first command answered, by docker run -d", 0.6, r.ratio(small, dockerWithWake))
	r.aim("wake with 256 MiB, by the small one", 1.5, r.ratio(fmt.Sprintf(wakeAnswered, "256 MiB"), small))
	r.aim("private memory of a sandbox at rest, MB", 14, r.ratio(memoryPrivate, ""))
	r.aim("build as E2B's clients ask for it, by the same Dockerfile", 1.5, r.ratio(buildE2B, buildCold))
}

// ratio returns the median of one measure divided by another's, or by 1 if by is "". It is not a
// number if one was not measured.
func (r *results) ratio(name, by string) float64 {
	m, other := r.find(name), r.find(by)
	switch {
	case m == nil || by != "" && other == nil:
		return math.NaN()
	case by == "":
		return m.P50
	}
	return m.P50 / other.P50
}

// p99 returns the 99th percentile of a measure. It is not a number if it was not measured.
func (r *results) p99(name string) float64 {
	if m := r.find(name); m != nil {
		return m.P99
	}
	return math.NaN()
}

func (r *results) aim(what string, limit, got float64) {
	if !math.IsNaN(got) {
		r.Aims = append(r.Aims, aim{What: what, Limit: limit, Got: got, Met: got <= limit})
	}
}

// runBegin and runEnd are the lines of a document between which a run stands.
const runBegin, runEnd = "<!-- run -->\n", "<!-- /run -->\n"

// document replaces the run in a document.
func (r *results) document(path string) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("reading the document: %w", err)
	}
	before, rest, begins := strings.Cut(string(text), runBegin)
	_, after, ends := strings.Cut(rest, runEnd)
	if !begins || !ends {
		return fmt.Errorf("%s has no lines %s and %s", path, strings.TrimSpace(runBegin), strings.TrimSpace(runEnd))
	}
	var run strings.Builder
	r.print(&run)
	text = []byte(before + runBegin + "```\n" + run.String() + "```\n" + runEnd + after)
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return fmt.Errorf("writing the document: %w", err)
	}
	return nil
}

// print writes the table for people.
func (r *results) print(w io.Writer) {
	h := r.Host
	fmt.Fprintf(w, "cay:      %s\n", h.Cay)
	fmt.Fprintf(w, "docker:   %s\n", h.Docker)
	if h.DockerNetwork != "" {
		fmt.Fprintf(w, "          network %s\n", h.DockerNetwork)
	}
	fmt.Fprintf(w, "machine:  %d CPUs (%s), %d MB memory, Linux %s, cgroup %s\n", h.CPUs, h.CPUModel, h.MemoryMB, h.Kernel,
		h.Cgroup)
	fmt.Fprintf(w, "load:     %.2f before, %.2f after; the bench took %.0f s\n\n", h.LoadBefore, h.LoadAfter,
		r.TookSeconds)

	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "measure\tn\tp50\tp95\tp99\tmin\tunit\tby the other's p50")
	for _, m := range r.Measures {
		ratio := ""
		if m.Beside != "" {
			ratio = fmt.Sprintf("%.2f", m.Ratio)
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\n", m.Name, m.N, number(m.P50), number(m.P95), number(m.P99),
			number(m.Min), m.Unit, ratio)
	}
	t.Flush()
	fmt.Fprintf(w, "\n%s\n", notes)
	for _, a := range r.Aims {
		verdict := "met"
		if !a.Met {
			verdict = "MISSED"
		}
		fmt.Fprintf(w, "aim at most %.3g: %s: %.3g, %s\n", a.Limit, a.What, a.Got, verdict)
	}
}

// number formats three significant digits.
func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (r *results) write(path string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encoding the results: %w", err)
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("writing the results: %w", err)
	}
	return nil
}

// notes explains the names of the measurements.
const notes = `Samples of cay and of docker are taken in turn; a ratio is of the medians. Docker is
driven by its command line, whose own start is in its numbers as in those of "cay …"
lines; the others are calls of the Go client. The agent is asked over the same network
as the server asks it. MB are 10⁶ bytes. A sandbox's own memory is what is anonymous or in its
memory file, and of other files what nothing else maps.
`
