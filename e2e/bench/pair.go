package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// slack is the largest ratio of new to old that counts as no slower. With a larger one small losses add up unnoticed;
// with a smaller one a run takes hours until it decides.
const slack = 1.03

// executesPerRound counts the commands that run for each create. A command takes a few milliseconds, and
// its time varies more than that of a create does.
const executesPerRound = 8

// pair holds a server of the old program, at 0, and one of the new program, at 1.
type pair [2]*server

// startPair starts both servers and waits for their template. Nothing is left after an error.
func startPair(ctx context.Context, o options, out *outside, env ...string) (p pair, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close())
		}
	}()
	for i, program := range []string{o.old, o.cay} {
		if p[i], err = startServer(ctx, program, out, env...); err != nil {
			p[i] = nil // it is closed
			return p, fmt.Errorf("%s: %w", program, err)
		}
		progress("waiting for the template of " + program)
		if err := p[i].awaitTemplate(ctx, template); err != nil {
			return p, err
		}
	}
	return p, nil
}

func (p pair) close() error {
	var errs []error
	for _, s := range p {
		if s != nil {
			errs = append(errs, s.close())
		}
	}
	return errors.Join(errs...)
}

// inTurn calls once for both servers in each of n rounds, after a first round that is not counted. The order
// alternates, so that neither server always comes second.
func (p pair) inTurn(n int, r *[2]results, once func(i int, counted bool, r *results) error) error {
	for round := range n + 1 {
		for k := range p {
			i := (k + round) % len(p)
			into := &r[i]
			if round == 0 {
				into = &results{}
			}
			if err := once(i, round > 0, into); err != nil {
				return fmt.Errorf("%s: %w", p[i].program, err)
			}
		}
	}
	return nil
}

// benchPair measures two programs in turn, and fails if the new one is slower beyond doubt.
func benchPair(ctx context.Context, o options) (err error) {
	out, err := newOutside(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.close()) }()
	host, began := lookAtHost(), load()
	var r [2]results
	var versions [2]string
	for _, part := range []struct {
		name, env string
		measure   func(context.Context, options, pair, *[2]results) error
	}{
		{"starts", "CAY_POOL_ENABLED=false", pairCold},
		{"pool", "CAY_POOL_ENABLED=true", pairWarm},
	} {
		if o.only != "" && o.only != part.name {
			continue
		}
		p, err := startPair(ctx, o, out, part.env)
		if err != nil {
			return err
		}
		for i, s := range p {
			if versions[i], err = s.version(ctx); err != nil {
				return errors.Join(err, p.close())
			}
		}
		if err := errors.Join(part.measure(ctx, o, p, &r), p.close()); err != nil {
			return err
		}
	}
	if versions[0] == "" {
		return fmt.Errorf("of two programs starts and pool are compared, and -only is %s", o.only)
	}
	fmt.Printf("old:      %s\nnew:      %s\n", versions[0], versions[1])
	fmt.Printf("machine:  %d CPUs (%s), Linux %s, load %.2f before, %.2f after\n\n", host.CPUs, host.CPUModel, host.Kernel,
		began, load())
	return printPair(os.Stdout, &r[0], &r[1])
}

// pairCold measures creates, commands, wakes and memory at rest without a pool.
func pairCold(ctx context.Context, o options, p pair, r *[2]results) error {
	progress("measuring creates")
	if err := p.inTurn(o.starts, r, func(i int, _ bool, r *results) error { return p[i].startOnce(ctx, r) }); err != nil {
		return err
	}
	var ids [2]string
	for i, s := range p {
		var err error
		if ids[i], err = s.createSleeper(ctx, sleepers[0]); err != nil {
			return err
		}
	}
	progress("measuring commands")
	if err := p.inTurn(executesPerRound*o.starts, r, func(i int, _ bool, r *results) error {
		return p[i].timeTrue(ctx, ids[i], r)
	}); err != nil {
		return err
	}
	progress("measuring wakes")
	if err := p.inTurn(o.starts, r, func(i int, _ bool, r *results) error {
		return p[i].wakeOnce(ctx, ids[i], smallSleeper, r)
	}); err != nil {
		return err
	}
	progress("measuring memory at rest")
	var idle [2][]string
	if err := p.inTurn(o.idle-1, r, func(i int, _ bool, _ *results) error {
		id, err := p[i].createIdle(ctx)
		idle[i] = append(idle[i], id)
		return err
	}); err != nil {
		return err
	}
	if err := pause(ctx, settle); err != nil {
		return err
	}
	for i := range p {
		if err := addMemory(idle[i], &r[i]); err != nil {
			return err
		}
	}
	return nil
}

// pairWarm measures creates from the full pool.
func pairWarm(ctx context.Context, o options, p pair, r *[2]results) error {
	progress("measuring creates from the pool")
	return p.inTurn(o.starts, r, func(i int, full bool, r *results) error {
		if full { // the first create is cold, and makes the pool keep that kind of sandbox
			for _, s := range p { // the other pool must not boot a sandbox meanwhile
				if err := s.awaitPool(ctx); err != nil {
					return err
				}
			}
		}
		return p[i].warmOnce(ctx, full, r)
	})
}

// timeTrue measures one execute.
func (s *server) timeTrue(ctx context.Context, id string, r *results) error {
	began := time.Now()
	if _, err := s.execute(ctx, id, cay.ExecuteRequest{Args: []string{"true"}}); err != nil {
		return err
	}
	r.took(commandTrue, began)
	return nil
}

// printPair writes a table of two programs' measures, and fails if one is slower beyond doubt.
func printPair(w io.Writer, old, other *results) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "measure\tn\told p50\tnew p50\tunit\tnew by old\t95 % of it\t")
	var slower []string
	for _, m := range old.Measures {
		n := other.find(m.Name)
		if n == nil || len(n.Samples) != len(m.Samples) {
			return fmt.Errorf("%s was not measured as often with the new program", m.Name)
		}
		c := compare(m.Samples, n.Samples)
		if c.verdict() == "slower" {
			slower = append(slower, strings.TrimSpace(m.Name))
		}
		fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%s\t%.3f\t%.3f to %.3f\t%s\n", m.Name, len(m.Samples),
			number(median(m.Samples)), number(median(n.Samples)), m.Unit, c.ratio, c.low, c.high, c.verdict())
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if len(slower) > 0 {
		return fmt.Errorf("more than 3 %% above the old program: %s", strings.Join(slower, ", "))
	}
	return nil
}

// comparison holds the median of the ratios of new to old samples, taken pair by pair, and a range that contains the
// true median with a probability of 95 %.
type comparison struct{ ratio, low, high float64 }

// compare compares samples that were taken in turn. The range ends at two of the sorted ratios: the number of ratios
// below the true median has a binomial distribution, whatever the distribution of the ratios.
func compare(old, other []float64) comparison {
	ratios := make([]float64, len(old))
	for i := range old {
		ratios[i] = other[i] / old[i]
	}
	slices.Sort(ratios)
	n := float64(len(ratios))
	k := max(0, int(math.Floor((n-1.96*math.Sqrt(n))/2)))
	return comparison{ratio: median(ratios), low: ratios[k], high: ratios[len(ratios)-1-k]}
}

// verdict returns whether the new program is slower by more than slack, is not, or whether that is undecided.
func (c comparison) verdict() string {
	switch {
	case c.low > slack:
		return "slower"
	case c.high <= slack:
		return "within 3 %"
	}
	return "undecided, take more rounds"
}

// median returns the median of samples, of which there is at least one.
func median(samples []float64) float64 {
	return percentile(slices.Sorted(slices.Values(samples)), 0.5)
}
