package sandbox_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
	"github.com/cayhq/cay/internal/sandbox"
	"github.com/cayhq/cay/internal/store"
)

// TestRandomLives runs random operations, faults, deaths and restarts. Afterwards it checks that
// rows and host agree, that nothing is stuck, and that no persistent sandbox with a recovery point
// was lost.
func TestRandomLives(t *testing.T) {
	randomLives(t, func() string { return "" }, math.MaxInt)
}

// livesOnPostgres limits the random lives with their records in PostgreSQL, each of which takes some tenths of a
// second.
const livesOnPostgres = 12

// TestRandomLivesPostgres is TestRandomLives with the records in PostgreSQL.
func TestRandomLivesPostgres(t *testing.T) {
	server := caytest.StartPostgres(t)
	lives := 0
	create := func(template string) string {
		lives++
		address, err := server.Create(fmt.Sprint("lives", lives), template)
		if err != nil {
			t.Fatal(err)
		}
		return address
	}
	// All lives have copies of the first database, so that one of them migrates.
	db, err := store.OpenPostgres(t.Context(), store.PostgresConfig{URL: create("")})
	if err == nil {
		err = db.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() { onPostgres = "" }()
	randomLives(t, func() string { return create("lives1") }, livesOnPostgres)
}

// randomLives runs random steps, at most so many times, with records in the database that address returns.
func randomLives(t *testing.T, address func() string, times int) {
	rapid.Check(t, func(rt *rapid.T) {
		if times--; times < 0 {
			return
		}
		onPostgres = address()
		steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
			return step{
				what:  rapid.SampledFrom(operations).Draw(t, "what"),
				which: rapid.IntRange(0, 9).Draw(t, "which"),
				fault: rapid.SampledFrom(faults).Draw(t, "fault"),
				secs:  rapid.IntRange(1, 90).Draw(t, "secs"),
			}
		}), 1, 25).Draw(rt, "steps")
		pool := sandbox.PoolConfig{Enabled: rapid.Bool().Draw(rt, "pool"), Target: 2, MaxPooled: 4}
		var failure string
		synctest.Test(t, func(t *testing.T) {
			l := &scenario{fixture: newPoolFixture(t, pool), had: map[sandbox.ID]bool{}, asked: map[sandbox.ID]bool{},
				undeleted: map[sandbox.SnapshotID]bool{}}
			failure = l.play(steps)
		})
		if failure != "" {
			rt.Fatal(failure)
		}
	})
}

type step struct {
	what  string
	which int    // index of the sandbox among those made so far
	fault string // of the machine during the step
	secs  int
}

var (
	operations = []string{"create ephemeral", "create pausing", "create persistent", "create persistent", "pause", "pause",
		"set timeout", "attach", "destroy", "keepalive",
		"call", "connect", "release", "suspend", "suspend", "wake", "checkpoint", "snapshot", "snapshot", "fork", "from snapshot", "delete snapshot", "egress", "egress", "die", "restart", "sleep", "sleep"}
	// An operation that fails leaves the sandbox alive, dead in its previous state, or dead with the
	// new checkpoint. Otherwise the server dies during it, and maybe the machine too.
	faults = []string{"", "", "", "fails", "fails and kills", "fails, kills, new checkpoint", "cannot clean", "crash",
		"crash and kill", "database"}

	policies = []sandbox.Egress{{Mode: sandbox.AllowAll}, {Mode: sandbox.DenyAll},
		{Mode: sandbox.DenyAll, AllowDomains: []string{"example.com"}}}

	errInjected = errors.New("injected")
)

// scenario models the state that must not be lost.
type scenario struct {
	*fixture
	ids       []sandbox.ID
	leases    []*sandbox.Lease
	snaps     []sandbox.SnapshotID        // made and not deleted
	undeleted map[sandbox.SnapshotID]bool // their deletion was requested and failed
	had       map[sandbox.ID]bool         // had a recovery point
	asked     map[sandbox.ID]bool         // their end was requested
}

// play runs the steps and returns a description of the first error, or "".
func (l *scenario) play(steps []step) string {
	for i, s := range steps {
		err := l.inject(s)
		l.heal()
		if err != nil {
			return fmt.Sprintf("step %d, %+v: %v", i, s, err)
		}
		for _, id := range l.ids {
			observed, _ := l.node.Inspect(context.Background(), id)
			l.had[id] = l.had[id] || observed != nil && observed.Checkpoint != nil
		}
	}
	for _, lease := range l.leases {
		lease.Release()
	}
	pass(time.Minute) // longer than Reconcile needs
	if s := l.agree(); s != "" {
		return s
	}
	for _, id := range l.ids {
		sbx, err := l.Get(context.Background(), org, id)
		if fault.Is(err, fault.NotFound) && l.asked[id] {
			continue // its row was dropped long after its end
		}
		if err != nil {
			return err.Error()
		}
		switch {
		case sbx.State == sandbox.Suspended:
			if _, err := l.Wake(context.Background(), l.caller(), id); err != nil {
				return fmt.Sprintf("sandbox %s does not wake: %v", id, err)
			}
		case sbx.State.Over() && sbx.Mode == sandbox.Persistent && l.had[id] && !l.asked[id]:
			return fmt.Sprintf("sandbox %s was lost, and it had a recovery point: %s", id, sbx.DestroyReason)
		}
	}
	return l.agree()
}

func (l *scenario) heal() {
	n := l.node
	n.OnCreate, n.OnPrepare, n.OnClaim, n.OnWake = nil, nil, nil, nil
	n.OnDestroy, n.OnSuspend, n.OnCheckpoint, n.OnRest, n.OnSetEgress, n.OnSnapshot, n.OnDrop =
		nil, nil, nil, nil, nil, nil, nil
	l.gate.breakTransitions(nil)
	barrier()
}

// inject runs the step with its fault.
func (l *scenario) inject(s step) error {
	n := l.node
	after := func(ctx context.Context, id sandbox.ID) error { // runs the part of the operation that precedes the fault
		switch s.fault {
		case "fails, kills, new checkpoint":
			// other sandboxes never have a checkpoint
			if row, err := l.db.Get(ctx, id); err == nil && row.Mode == sandbox.Persistent {
				_, _ = n.Checkpoint(ctx, id)
			}
			n.Kill(id)
		case "fails and kills":
			n.Kill(id)
		case "crash", "crash and kill":
			<-ctx.Done()
		}
		return errInjected
	}
	cannot := func(context.Context, sandbox.ID) error { return errInjected }
	switch s.fault {
	case "":
	case "cannot clean":
		n.OnDestroy, n.OnRest = cannot, cannot
		n.OnDrop = func(context.Context, sandbox.SnapshotID) error { return errInjected }
	case "database":
		broken := sandbox.States()[s.secs%len(sandbox.States())]
		l.gate.breakTransitions(func(to sandbox.State) bool { return to == broken })
	default:
		n.OnSuspend = after
		n.OnCreate = func(ctx context.Context, spec sandbox.Spec) error { return after(ctx, spec.ID) }
		n.OnWake, n.OnPrepare, n.OnClaim = n.OnCreate, n.OnCreate, n.OnCreate
		n.OnSetEgress, n.OnSnapshot = after, after
		if s.fault != "fails, kills, new checkpoint" { // that fault makes a checkpoint itself
			n.OnCheckpoint = after
		}
	}
	if s.fault != "crash" && s.fault != "crash and kill" {
		err := l.take(s)
		synctest.Wait()
		return err
	}
	done := make(chan error, 1)
	if s.what == "sleep" { // the fault hits operations of timers
		pass(time.Duration(s.secs) * time.Second)
		done <- nil
	} else {
		go func() { done <- l.take(s) }()
		synctest.Wait()
	}
	l.crash()
	if s.fault == "crash and kill" {
		found, _ := n.List(context.Background())
		for _, observed := range found {
			n.Kill(observed.ID)
		}
	}
	pass(5 * time.Second) // callers that wait for a lease give up
	<-done                // failed with its server
	l.heal()
	l.start()
	synctest.Wait()
	return nil
}

// take runs the step. It returns an error that no fault and no state explains.
func (l *scenario) take(s step) error {
	ctx := context.Background()
	if len(l.ids) == 0 && !strings.HasPrefix(s.what, "create") {
		s.what = "create persistent"
	}
	var id sandbox.ID
	if len(l.ids) > 0 {
		id = l.ids[s.which%len(l.ids)]
	}
	observed, _ := l.node.Inspect(ctx, id)
	// filters the errors of a call that a state may forbid, or a death that is not noticed yet
	expected := func(err error) error {
		if s.fault != "" || observed != nil && observed.Remains && !observed.Alive || fault.Is(err, fault.Conflict) ||
			fault.Is(err, fault.NotFound) {
			return nil
		}
		return err
	}
	switch s.what {
	case "create ephemeral":
		return l.make(s, sandbox.Request{Timeout: ptr(time.Duration(s.secs) * time.Second)})
	case "create pausing":
		return l.make(s, sandbox.Request{Timeout: ptr(time.Duration(s.secs) * time.Second), AtEnd: sandbox.EndSuspends})
	case "create persistent":
		r := sandbox.Request{Mode: "persistent", IdleTimeout: ptr(time.Duration(10+s.secs) * time.Second),
			RecoveryInterval: ptr(time.Duration(0))}
		if s.which%2 == 0 {
			r.RecoveryInterval = ptr(time.Minute)
		}
		return l.make(s, r)
	case "destroy":
		l.asked[id] = true
		if err := l.Destroy(ctx, org, id); err != nil && s.fault == "" && !fault.Is(err, fault.NotFound) {
			return err
		}
	case "keepalive":
		_, err := l.Keepalive(ctx, org, id, ptr(time.Minute))
		return expected(err)
	case "call", "connect":
		lease, err := l.Connect(ctx, l.caller(), id, sandbox.ForCommand)
		if err != nil {
			return expected(err)
		}
		if s.what == "connect" {
			l.leases = append(l.leases, lease)
			return nil
		}
		observed, _ = l.node.Inspect(ctx, id)
		lease.Release()
		if observed == nil || observed.Run != lease.Sandbox.Run { // it may be dead before that is noticed
			return fmt.Errorf("leased run %s, the host has %+v", lease.Sandbox.Run, observed)
		}
	case "release":
		if len(l.leases) > 0 {
			l.leases[0].Release()
			l.leases = l.leases[1:]
		}
	case "suspend":
		_, err := l.Suspend(ctx, org, id, sandbox.KeepAll)
		return expected(err)
	case "pause":
		_, err := l.Pause(ctx, org, id, sandbox.KeepAll)
		return expected(err)
	case "set timeout":
		_, err := l.SetTimeout(ctx, org, id, time.Duration(s.secs-5)*time.Second, s.which%2 == 0)
		return expected(err)
	case "attach":
		lease, err := l.Attach(ctx, id)
		if err != nil {
			return expected(err)
		}
		lease.Release()
	case "wake":
		_, err := l.Wake(ctx, l.caller(), id)
		return expected(err)
	case "checkpoint":
		_, err := l.Checkpoint(ctx, org, id)
		return expected(err)
	case "snapshot":
		snap, err := l.SaveSnapshot(ctx, org, id, "")
		if err == nil {
			l.snaps = append(l.snaps, snap.ID)
		}
		return expected(err)
	case "fork":
		children, err := l.Fork(ctx, l.caller(), id, sandbox.ForkRequest{Count: 2})
		for _, c := range children {
			if c.Err == nil {
				l.ids = append(l.ids, c.Sandbox.ID)
			}
		}
		return expected(err)
	case "from snapshot":
		if len(l.snaps) > 0 {
			return l.make(s, sandbox.Request{Snapshot: string(l.snaps[s.which%len(l.snaps)]), Mode: "persistent"})
		}
	case "delete snapshot":
		if len(l.snaps) > 0 {
			err := l.DeleteSnapshot(ctx, org, string(l.snaps[0]))
			if l.undeleted[l.snaps[0]] = true; err == nil {
				l.snaps = l.snaps[1:]
			}
			return expected(err)
		}
	case "egress":
		want := policies[s.secs%len(policies)]
		sbx, err := l.SetEgress(ctx, org, id, want)
		if err == nil && !sbx.Egress.Equal(want) {
			return fmt.Errorf("asked for %+v and got %+v", want, sbx.Egress)
		}
		return expected(err)
	case "die":
		if s.fault == "" || s.fault == "cannot clean" {
			l.node.Die(id)
		} else {
			l.node.Kill(id)
		}
	case "restart":
		if s.fault == "" {
			l.crash()
			l.start()
		}
	default:
		pass(time.Duration(s.secs) * time.Second)
	}
	return nil
}

func (l *scenario) make(s step, r sandbox.Request) error {
	sbx, err := l.create(r)
	if err == nil {
		l.ids = append(l.ids, sbx.ID)
	}
	if s.fault == "" {
		return err
	}
	return nil
}

// agree returns a description of the differences between rows and host, or "".
func (l *scenario) agree() string {
	rows, err := l.db.Unfinished(context.Background())
	if err != nil {
		return err.Error()
	}
	found, _ := l.node.List(context.Background())
	has := map[sandbox.ID]sandbox.Observed{}
	for _, f := range found {
		has[f.ID] = f
	}
	for _, row := range rows {
		f, there := has[row.ID]
		delete(has, row.ID)
		switch {
		case row.State == sandbox.Running && (!f.Alive || f.Run != row.Run),
			row.State == sandbox.Suspended && (f.Remains || f.Checkpoint == nil):
			return fmt.Sprintf("sandbox %s is %s in run %s, and the host has (%v) %+v", row.ID, row.State, row.Run, there, f)
		case row.State == sandbox.Running && !f.Egress.Equal(row.Egress):
			return fmt.Sprintf("sandbox %s has policy %+v, and the host %+v", row.ID, row.Egress, f.Egress)
		case row.State != sandbox.Running && row.State != sandbox.Suspended:
			return fmt.Sprintf("sandbox %s is stuck in %s", row.ID, row.State)
		case row.Mode == sandbox.Ephemeral && row.State == sandbox.Running && !row.ExpiresAt.After(time.Now()):
			return fmt.Sprintf("sandbox %s outlived its time", row.ID)
		case row.State == sandbox.Suspended && !row.ExpiresAt.IsZero():
			return fmt.Sprintf("sandbox %s is suspended and expires at %s", row.ID, row.ExpiresAt)
		}
	}
	pooled, err := l.db.ListPooled(context.Background())
	if err != nil {
		return err.Error()
	}
	for _, m := range pooled {
		f, there := has[m.ID]
		delete(has, m.ID)
		if !f.Alive || !f.Warm || f.Run != m.Run {
			return fmt.Sprintf("pooled sandbox %s of the pool is (%v) %+v", m.ID, there, f)
		}
	}
	if want := l.pool.Target; l.pool.Enabled && len(pooled) > l.pool.MaxPooled || !l.pool.Enabled && len(pooled) > 0 {
		return fmt.Sprintf("the pool has %d pooled sandboxes, wants %d", len(pooled), want)
	}
	if s := l.snapshotsAgree(); s != "" {
		return s
	}
	for _, f := range has {
		return fmt.Sprintf("the host has %+v without a living row", f)
	}
	return ""
}

// snapshotsAgree returns a description of the differences between users' snapshots and the host's,
// or "".
func (l *scenario) snapshotsAgree() string {
	ctx := context.Background()
	if unready, err := l.db.UnreadySnapshots(ctx); err != nil || len(unready) > 0 {
		return fmt.Sprintf("snapshots are stuck: %+v, %v", unready, err)
	}
	there := map[sandbox.SnapshotID]bool{}
	all, _ := l.node.Snapshots(ctx)
	for _, id := range all {
		there[id] = true
	}
	ready, _, err := l.db.ListSnapshots(ctx, sandbox.SnapshotFilter{OrgID: org, Limit: 200})
	if err != nil {
		return err.Error()
	}
	told := map[sandbox.SnapshotID]bool{}
	for _, snap := range ready {
		told[snap.ID] = true
		if !there[snap.ID] {
			return fmt.Sprintf("snapshot %s has no files", snap.ID)
		}
		delete(there, snap.ID)
	}
	for id := range there {
		return fmt.Sprintf("the host has snapshot %s without a row", id)
	}
	for _, id := range l.snaps {
		if !told[id] && !l.undeleted[id] {
			return fmt.Sprintf("snapshot %s was lost", id)
		}
	}
	return ""
}
