package main

import (
	"math/rand/v2"
	"strings"
	"testing"
)

// sampled returns n pairs of samples. The new ones take factor times as long, and all vary by a tenth.
func sampled(r *rand.Rand, n int, factor float64) (old, other []float64) {
	for range n {
		noise := func() float64 { return 1 + r.NormFloat64()/10 }
		old, other = append(old, 20*noise()), append(other, 20*factor*noise())
	}
	return old, other
}

// TestCompare checks how often the range has the true ratio, and that it decides.
func TestCompare(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	const tries = 2000
	for _, n := range []int{10, 25, 200} {
		inside := 0
		for range tries {
			if c := compare(sampled(r, n, 1.1)); c.low <= 1.1 && 1.1 <= c.high {
				inside++
			}
		}
		// The ranks are whole numbers, so the range is wider than it must be for few samples.
		if share := float64(inside) / tries; share < 0.94 || share > 0.99 {
			t.Errorf("%d pairs: %.3f of the ranges have the true ratio, want 0.95", n, share)
		}
	}
	for factor, want := range map[float64]string{0.9: "within 3 %", 1: "within 3 %", 1.1: "slower"} {
		if c := compare(sampled(r, 1000, factor)); c.verdict() != want {
			t.Errorf("a ratio of %v is %+v, %q; want %q", factor, c, c.verdict(), want)
		}
	}
	if c := compare(sampled(r, 10, 1.03)); c.verdict() != "undecided, take more rounds" {
		t.Errorf("ten pairs at the limit are %+v, %q", c, c.verdict())
	}
}

func TestPrintPair(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var old, other results
	add := func(name string, factor float64) {
		a, b := sampled(r, 500, factor)
		for i := range a {
			old.add(name, unitMS, a[i])
			other.add(name, unitMS, b[i])
		}
	}
	var out strings.Builder
	add("same", 1)
	if err := printPair(&out, &old, &other); err != nil || strings.Count(out.String(), "\n") != 2 {
		t.Errorf("got %v and the table\n%s", err, &out)
	}
	add("worse", 1.2)
	if err := printPair(&out, &old, &other); err == nil || !strings.Contains(err.Error(), ": worse") {
		t.Errorf("got %v, want the measure that became worse", err)
	}
	old.add("only once", unitMS, 1)
	if err := printPair(&out, &old, &other); err == nil || !strings.Contains(err.Error(), "only once") {
		t.Errorf("got %v, want the measure that the new program lacks", err)
	}
}
