package buildkit

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// memory reports the program's memory on the host, without files, in MB.
func (r *fixture) memory(b *testing.B) {
	pids, err := processesOf(r.cfg.Program)
	if err != nil || len(pids) != 1 {
		b.Fatalf("the program has the processes %v, %v", pids, err)
	}
	status, err := os.ReadFile(filepath.Join("/proc", pids[0], "status"))
	if err != nil {
		b.Fatal(err)
	}
	for name, unit := range map[string]string{"RssAnon": "MB-anon", "VmRSS": "MB-rss"} {
		m := regexp.MustCompile(name + `:\s*(\d+) kB`).FindSubmatch(status)
		if m == nil {
			b.Fatalf("%s has no %s", status, name)
		}
		kB, err := strconv.Atoi(string(m[1]))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(float64(kB)/1024, unit)
	}
}

// BenchmarkStart starts the program and stops it.
func BenchmarkStart(b *testing.B) {
	r := newFixture(b)
	for b.Loop() {
		p, release, err := r.seat("").use(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		release()
		if err := p.stop(b.Context()); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkBuild builds an image of one step, new each time or in the cache.
func BenchmarkBuild(b *testing.B) {
	for _, cached := range []bool{false, true} {
		b.Run(fmt.Sprintf("cached=%v", cached), func(b *testing.B) {
			r := newFixture(b)
			request := Request{Dockerfile: "FROM base\nRUN echo 0\n", Base: testBases(b)}
			r.build(b, request)
			for n := 1; b.Loop(); n++ {
				if !cached {
					request.Dockerfile = fmt.Sprintf("FROM base\nRUN echo %d\n", n)
				}
				result, err := r.Build(b.Context(), request, nil)
				if err != nil {
					b.Fatal(err)
				}
				if err := result.Close(); err != nil {
					b.Fatal(err)
				}
			}
			r.memory(b)
		})
	}
}
