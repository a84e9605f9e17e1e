package store

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/event"
	"github.com/cayhq/cay/internal/sandbox"
)

// commitForever runs in the process that the crash test kills. It inserts sandboxes and makes a
// transition of each, and prints each change after the store has committed it.
func commitForever(path string) {
	ctx := context.Background()
	db, err := Open(ctx, path)
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	for i := 0; ; i++ {
		s := sandbox.Sandbox{ID: sandbox.NewID(), OrgID: "org_crash", State: sandbox.Creating,
			CreatedAt: start.Add(time.Duration(i) * time.Second)}
		_, _, err := db.Insert(ctx, s, sandbox.Quota{}, sandbox.Once{Key: string(s.ID), Hash: "h"})
		if err == nil {
			fmt.Println(sandbox.Creating, s.ID)
			_, err = db.Transition(ctx, sandbox.Change{ID: s.ID, From: []sandbox.State{sandbox.Creating},
				To: sandbox.Running, At: start})
		}
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		fmt.Println(sandbox.Running, s.ID)
	}
}

// TestKilled kills a process while it commits, and checks that every change it printed is stored.
func TestKilled(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cay.db")
	promised := make(map[sandbox.ID]sandbox.State)
	for round := range 3 {
		killWhileCommitting(t, path, 40+17*round, promised)
		db, err := Open(t.Context(), path)
		if err != nil {
			t.Fatalf("round %d: opening after the kill: %v", round, err)
		}
		checkWhole(t, db, promised)
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}
}

// killWhileCommitting starts a process that commits and kills it. It adds the changes that the process
// printed before its end to promised.
func killWhileCommitting(t *testing.T, path string, after int, promised map[sandbox.ID]sandbox.State) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "CAY_STORE_TEST_CRASH="+path)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for n := 0; lines.Scan(); n++ {
		state, id, _ := strings.Cut(lines.Text(), " ")
		if state == "error" {
			t.Errorf("the process printed: %s", lines.Text())
		}
		promised[sandbox.ID(id)] = sandbox.State(state)
		if n == after {
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Exited() {
		t.Fatalf("the process was not killed: %v", cmd.ProcessState)
	}
	if len(promised) < after/2 {
		t.Fatalf("the process printed only %d sandboxes", len(promised))
	}
}

// checkFeed checks that the feed has each event of every sandbox exactly once.
func checkFeed(t *testing.T, db *DB, promised map[sandbox.ID]sandbox.State) {
	t.Helper()
	all, _ := feed(t, db, event.Query{OrgID: "org_crash", After: event.Oldest, Limit: 1000})
	told := map[string][]string{}
	for _, e := range all {
		told[e.SandboxID] = append(told[e.SandboxID], e.To)
	}
	for id, to := range told {
		s, err := db.Get(t.Context(), sandbox.ID(id))
		want := []string{"creating", "running"}[:len(to)]
		if err != nil || !slices.Equal(to, want) || to[len(to)-1] != string(s.State) {
			t.Errorf("%s is %s, the feed has %q, %v", id, s.State, to, err)
		}
	}
	for id := range promised {
		if told[string(id)] == nil {
			t.Errorf("the feed has no events of %s", id)
		}
	}
}

// checkWhole checks that every promised sandbox is stored and that no row is incomplete.
func checkWhole(t *testing.T, db *DB, promised map[sandbox.ID]sandbox.State) {
	t.Helper()
	for id, state := range promised {
		s, err := db.Get(t.Context(), id)
		if err != nil {
			t.Errorf("lost %s: %v", id, err)
			continue
		}
		// The kill may have come after the commit and before the process printed it.
		if s.State != state && !(state == sandbox.Creating && s.State == sandbox.Running) {
			t.Errorf("%s is %s, promised %s", id, s.State, state)
		}
		events, _, err := db.Events(t.Context(), id, 10, "")
		if err != nil || len(events) == 0 || events[0].To != s.State {
			t.Errorf("%s is %s but its events are %v (%v)", id, s.State, events, err)
		}
	}
	var verdict string
	if err := db.reader.QueryRowContext(t.Context(), "PRAGMA integrity_check").Scan(&verdict); err != nil ||
		verdict != "ok" {
		t.Errorf("integrity check: %q, %v", verdict, err)
	}
	checkFeed(t, db, promised)
	var sandboxes, once int
	if err := db.reader.QueryRowContext(t.Context(),
		"SELECT (SELECT COUNT(*) FROM sandboxes), (SELECT COUNT(*) FROM idempotency)").Scan(&sandboxes, &once); err != nil {
		t.Fatal(err)
	}
	if sandboxes < len(promised) || sandboxes > len(promised)+3 || sandboxes < once {
		t.Errorf("%d sandboxes, %d idempotency keys, %d promised", sandboxes, once, len(promised))
	}
}
