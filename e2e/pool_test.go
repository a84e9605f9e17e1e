package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// pool returns the server's report on its pool's only template, the zero value if there is none.
func (s *server) pool() cay.PoolEntry {
	s.t.Helper()
	pool, err := s.api().Pool(context.Background())
	if err != nil || len(pool) > 1 {
		s.t.Fatalf("the pool: %+v, %v", pool, err)
	}
	if len(pool) == 0 {
		return cay.PoolEntry{}
	}
	return pool[0]
}

// awaitPool waits until the pool is full and the host has only the pool and the sandboxes that run.
func (s *server) awaitPool(ready int) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) { // a poll with a deadline
		p, running, onHost := s.pool(), s.sandboxes("running"), s.groupsOnHost()
		if p.Ready == ready && len(onHost) == len(running)+ready {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("after %s the pool is %+v, %d sandboxes run and the host has %d", patience, p, len(running), len(onHost))
		}
	}
}

// createFrom makes a sandbox that must come from the given source.
func (s *server) createFrom(source string, request object) string {
	s.t.Helper()
	id := s.create(request)
	if sandbox := s.get(id); string(orZero(sandbox.Source)) != source {
		s.t.Fatalf("want it %s: %s", source, jsonOf(sandbox))
	}
	return id
}

func TestPool(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=true")
	s.start()
	s.needTemplate("python")
	cold := s.createFrom("cold", nil)
	s.awaitPool(2)

	// A warm sandbox is created as requested, and all identities differ.
	const identity = `hostname; cat /etc/hostname; cat /proc/sys/kernel/random/boot_id; ` +
		`head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n'; echo; python3 -c 'import uuid, random; ` +
		`print(uuid.uuid4()); print(random.random())'`
	lines := map[string]string{}
	for _, id := range []string{cold, s.createFrom("warm", nil), s.createFrom("warm", nil)} {
		for i, line := range strings.Split(s.want(id, identity), "\n") {
			if i < 2 && line != strings.TrimPrefix(id, "sbx_") {
				t.Errorf("sandbox %s is named %s", id, line)
			}
			if other := lines[fmt.Sprint(i, line)]; other != "" {
				t.Errorf("%s and %s both have %q", id, other, line)
			}
			lines[fmt.Sprint(i, line)] = id
		}
		if id != cold {
			s.destroy(id)
		}
	}
	s.awaitPool(2)
	id := s.createFrom("warm", object{"env": object{"MINE": "a b"}, "metadata": object{"team": "red"}})
	if got, want := s.want(id, `env | grep -v '^\(MINE\|HOSTNAME\)=' | sort; id; pwd`),
		s.want(cold, `env | grep -v '^\(MINE\|HOSTNAME\)=' | sort; id; pwd`); got != want {
		t.Errorf("a command in a warm sandbox sees\n%s\nin a cold one\n%s", got, want)
	}
	if got := s.want(id, "echo $MINE"); got != "a b" {
		t.Errorf("the environment of the warm sandbox has %q", got)
	}
	if got := s.want(id, "date +%s"); len(got) < 10 || got[:8] != fmt.Sprint(time.Now().Unix())[:8] {
		t.Errorf("the clock of the warm sandbox says %s", got)
	}
	if list, err := s.api().ListSandboxes(t.Context(), cay.ListSandboxesOptions{Status: []cay.SandboxStatus{"running"},
		Metadata: map[string]string{"team": "red"}}); err != nil || !strings.Contains(jsonOf(list), id) {
		t.Errorf("list by metadata: %s, %v", jsonOf(list), err)
	}
	s.destroy(id)
	s.awaitPool(2)
	const size = "df -k / | awk 'NR==2 {print $2}'"
	id = s.createFrom("warm", object{"timeout": "1h"})
	if sandbox := s.get(id); orZero(sandbox.TimeoutSeconds) != 3600 ||
		orZero(sandbox.ExpiresAt).Sub(orZero(sandbox.StartedAt)) != time.Hour {
		t.Errorf("a sandbox with a timeout of an hour is %s", jsonOf(sandbox))
	}
	if got, want := s.want(id, size), s.want(cold, size); got != want {
		t.Errorf("the disk of a warm sandbox has %s KiB, that of a cold one %s", got, want)
	}
	s.destroy(id)
	small := s.createFrom("cold", object{"disk_size_mb": 256}) // no pooled sandbox has this disk
	if got := s.want(small, size); len(got) != len("262144") {
		t.Errorf("a disk of 256 MiB has %s KiB", got)
	}
	s.destroy(small)
	s.destroy(cold)

	out, _, code := s.cli("", "sandbox", "pool")
	if fields := strings.Fields(out); code != 0 || !slices.Contains(fields, "python") {
		t.Errorf("cay sandbox pool: %d %s", code, out)
	}
	if metrics := s.metrics(); !strings.Contains(metrics, `cay_pool_creates_total{source="warm"} 4`) ||
		!strings.Contains(metrics, "cay_pool_prepare_seconds_count") {
		t.Error("the metrics lack the pool")
	}
}

// TestPoolPolicy checks that the policy of a warm sandbox is in force when the create answers.
func TestPoolPolicy(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=true")
	s.start()
	s.needTemplate("python")
	o := newOutside(t)
	o.listen(t, 8080)
	one, two := o.address+":8080", o.second+":8080"
	s.destroy(s.createFrom("cold", nil))
	for _, c := range []struct {
		policy object
		want   map[string]bool
	}{
		{object{"mode": "deny_all"}, map[string]bool{one: false, two: false}},
		{object{"mode": "allow_all"}, map[string]bool{one: true, two: true}},
		{object{"mode": "deny_all", "allow_cidrs": []string{o.address + "/32"}}, map[string]bool{one: true, two: false}},
	} {
		s.awaitPool(2)
		id := s.createFrom("warm", object{"egress": c.policy})
		s.reaches(id, c.want)
		s.destroy(id)
	}
}

// TestPoolOutlivesTheServer checks that pooled sandboxes are there after a restart, as long as the
// pool is on.
func TestPoolOutlivesTheServer(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=true")
	s.start()
	s.needTemplate("python")
	s.createFrom("cold", nil)
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		s.awaitPool(2)
		before := s.groupsOnHost()
		s.stop(signal)
		s.start()
		if id := s.createFrom("warm", object{"mode": "persistent", "timeout": nil}); !slices.Contains(before, id) {
			t.Errorf("after %s: %s was not there before: %v", signal, id, before)
		} else {
			s.alive(id)
			if _, err := s.api().Suspend(t.Context(), id); err != nil {
				t.Errorf("suspending it: %v", err)
			}
			s.alive(id)
		}
	}
	s.awaitPool(2)
	s.stop(syscall.SIGTERM)
	s.env = append(s.env, "CAY_POOL_ENABLED=false")
	s.start()
	s.agree(time.Now())
	s.createFrom("cold", nil)
	if p := s.pool(); p != (cay.PoolEntry{}) {
		t.Errorf("the pool that is off has %+v", p)
	}
}

// TestPoolOfATemplate checks that pooled sandboxes of a template with a service have the service
// running, and that the pool follows the template to its next version and to its end.
func TestPoolOfATemplate(t *testing.T) {
	t.Parallel() // it has its own server
	s, tiny := newBuilder(t, "CAY_POOL_ENABLED=true")
	s.needBuilt(object{"name": "web", "image": tiny, "env": object{"SAYS": "one"}, "ready": object{"port": 8000},
		"start_command": "mkdir /www; echo $SAYS $(head -c 8 /dev/urandom | sha256sum) >/www/index.html; exec httpd -f -p 8000 -h /www"}, nil)
	const ask = "wget -q -O - http://127.0.0.1:8000/"
	web := func(source string, request object) string {
		t.Helper()
		request["template"] = "web"
		id := s.createFrom(source, request)
		said := s.want(id, ask)
		s.destroy(id)
		return said
	}
	first := web("cold", object{})
	s.awaitPool(2)
	if a, b := web("warm", object{}), web("warm", object{"metadata": object{"a": "b"}}); a == b || a == first ||
		!strings.HasPrefix(a, "one ") {
		t.Errorf("the services say %q, %q and %q", first, a, b)
	}
	s.awaitPool(2)
	if said := web("cold", object{"env": object{"SAYS": "two"}}); !strings.HasPrefix(said, "two ") {
		t.Errorf("the service with another environment says %q", said)
	}
	web("cold", object{"egress": object{"mode": "deny_all"}})
	s.awaitPool(2)
	s.rebuild("web", object{"image": tiny, "ready": object{"port": 8000},
		"start_command": "mkdir /www; echo next >/www/index.html; exec httpd -f -p 8000 -h /www"})
	if status, body := s.built("web"); status != "ready" {
		t.Fatalf("after the rebuild: %s", body)
	}
	if said := web("cold", object{}); said != "next" {
		t.Errorf("the cold service of version 2 says %q", said)
	}
	s.awaitPool(2)
	if said := web("warm", object{}); said != "next" {
		t.Errorf("the warm service of version 2 says %q", said)
	}
	if err := s.api().DeleteTemplate(t.Context(), "web", false); err != nil {
		t.Errorf("deleting the template with pooled sandboxes: %v", err)
	}
	s.awaitPool(0)
}

// TestPoolKilledAtAnyMoment kills the server with SIGKILL while it claims and while it prepares
// pooled sandboxes, until later starts have found both interrupted. After each start every running
// sandbox works, and the host soon has only those and a full pool.
func TestPoolKilledAtAnyMoment(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_POOL_ENABLED=true")
	s.start()
	s.needTemplate("python")
	const rounds, most = 8, 80
	for round := 0; round < rounds || !s.reconciled("discard", "remove"); round++ {
		if round == most {
			t.Fatalf("in %d rounds no start found a half prepared and a half claimed pooled sandbox", most)
		}
		if s.pool().Target == 0 { // no sandbox is left that says what is in use
			s.destroy(s.create(nil))
		}
		s.awaitPool(2)
		after := time.Duration(rand.IntN(6000)) * time.Microsecond // about the duration of a claim
		if round%4 == 0 {
			after = time.Duration(100+rand.IntN(150)) * time.Millisecond // until the next pooled sandbox is being prepared
		}
		answer := make(chan string, 1)
		go func() {
			sandbox, err := s.api().CreateSandbox(context.Background(), cay.CreateSandboxRequest{Template: "python"},
				cay.CreateOptions{})
			if err != nil {
				sandbox = &cay.Sandbox{}
			}
			answer <- sandbox.ID
		}()
		time.Sleep(after)
		s.stop(syscall.SIGKILL)
		id := <-answer
		s.start()
		running := s.sandboxes("running")
		if id != "" && !slices.Contains(running, id) {
			t.Errorf("sandbox %s was created and is lost; %v run", id, running)
		}
		for _, id := range running {
			s.alive(id)
			s.destroy(id)
		}
	}
	s.stop(syscall.SIGTERM)
	s.env = append(s.env, "CAY_POOL_ENABLED=false")
	s.start()
	s.agree(time.Now())
}
