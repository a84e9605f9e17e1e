package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	cay "github.com/cayhq/cay/sdk/go"
)

// fork makes children of a sandbox. All of them must succeed.
func (s *server) fork(id string, more object) (ids []string) {
	s.t.Helper()
	children, err := s.api().Fork(context.Background(), id, requestOf[cay.ForkRequest](s.t, more))
	if err != nil {
		s.t.Fatalf("fork: %v", err)
	}
	for _, c := range children {
		if c.Error != nil || c.Sandbox.Status != cay.SandboxStatusRunning || orZero(c.Sandbox.Origin) != id {
			s.t.Fatalf("fork: a child is %s", jsonOf(c))
		}
		ids = append(ids, c.Sandbox.ID)
	}
	return ids
}

// snapshot makes a snapshot and returns its id.
func (s *server) snapshot(id string, more object) string {
	s.t.Helper()
	name, _ := more["name"].(string)
	snapshot, err := s.api().CreateSnapshot(context.Background(), id, name)
	if err != nil {
		s.t.Fatalf("snapshot: %v", err)
	}
	return snapshot.ID
}

// from makes a sandbox from a snapshot.
func (s *server) from(snapshot string, more object) string {
	s.t.Helper()
	request := requestOf[cay.CreateSandboxRequest](s.t, object{"snapshot": snapshot, "timeout": "10m"}, more)
	return s.createdAs(request).ID
}

// snapshotsOnDisk lists the ids of the snapshots that have files.
func (s *server) snapshotsOnDisk() []string {
	s.t.Helper()
	return slices.DeleteFunc(s.checkpoints(), func(name string) bool { return !strings.HasPrefix(name, "snap_") })
}

// TestForkGoesOn forks a process that counts in its memory, into one child and into ten, and forks
// one child again. Each goes on from the same number, with every line of its log.
func TestForkGoesOn(t *testing.T) {
	s := shared(t)
	id := s.create(object{"metadata": object{"family": "yes"}})
	defer s.destroy(id)
	w := s.startWorker(id, 4)
	n := w.check()
	var children []*worker
	add := func(ids []string) {
		for _, id := range ids {
			children = append(children, &worker{s: s, id: id, seen: n})
		}
	}
	add(s.fork(id, nil))
	add(s.fork(id, object{"count": 10, "timeout": "10m"}))
	add(s.fork(children[0].id, object{"mode": "persistent", "idle_timeout": "0", "recovery_interval": "0"}))
	for _, c := range append(children, w) {
		c.check()
	}
	if left := s.snapshotsOnDisk(); len(left) > 0 {
		t.Errorf("the forks have left the snapshots %v", left)
	}
	if list, err := s.api().ListSandboxes(t.Context(), cay.ListSandboxesOptions{ListOptions: cay.ListOptions{Limit: 200},
		Metadata: map[string]string{"family": "yes"}}); err != nil ||
		strings.Count(jsonOf(list), `"family":"yes"`) != 13 {
		t.Errorf("the children's metadata: %s, %v", jsonOf(list), err)
	}
	if e := s.events(id)[0]; e.Reason != "forked" {
		t.Errorf("the last event of the sandbox is %+v", e)
	}
	// The persistent child sleeps and wakes with its own checkpoint.
	last := children[11]
	s.suspend(last.id)
	last.check()
	for _, c := range children {
		s.destroy(c.id)
		s.gone(c.id)
	}
	w.check()
}

// oracle tells every client the values of the kernel, the clock and its own memory, from one
// process that is never restarted.
const oracle = `
import ctypes, json, os, random, secrets, socket, time, uuid
random.seed(os.urandom(16)); libc = ctypes.CDLL(None)
l = socket.create_server(("127.0.0.1", 7000)); open("/root/ready", "w").close()
while True:
    c, _ = l.accept()
    raw = ctypes.create_string_buffer(16); assert libc.getrandom(raw, 16, 0) == 16
    c.sendall(json.dumps({"urandom": os.urandom(16).hex(), "getrandom": raw.raw.hex(), "secrets": secrets.token_hex(), "uuid4": str(uuid.uuid4()),
        "kernel_uuid": open("/proc/sys/kernel/random/uuid").read().strip(), "random": random.random(), "hostname": socket.gethostname(),
        "time": time.time(), "env": os.environ.get("ROLE", ""), "token": os.environ.get("FIRST", "")}).encode()); c.close()
`

const ask = `python3 -c '
import socket
c = socket.create_connection(("127.0.0.1", 7000)); print(c.makefile().read())'`

// TestForkIdentity compares everything that tells sandboxes apart, as a process sees it that was
// there before the fork. The children and the sandbox itself differ in all of it.
func TestForkIdentity(t *testing.T) {
	s := shared(t)
	id := s.create(object{"env": object{"FIRST": "1"}})
	defer s.destroy(id)
	s.want(id, "cat >/root/oracle.py; echo '192.0.2.9 mine' >>/etc/hosts; "+
		"nohup python3 /root/oracle.py >/root/oracle.log 2>&1 & until [ -e /root/ready ]; do sleep 0.05; done",
		object{"stdin": oracle})
	children := s.fork(id, object{"count": 3, "env": object{"ROLE": "child"}})
	seen := map[string]string{}
	var drawn []any
	for i, sandbox := range append([]string{id}, children...) {
		var got object
		if err := json.Unmarshal([]byte(s.want(sandbox, ask)), &got); err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"urandom", "getrandom", "secrets", "uuid4", "kernel_uuid"} {
			value := got[key].(string)
			if of, twice := seen[value]; twice {
				t.Errorf("%s: %s and %s both have %s", key, of, sandbox, value)
			}
			seen[value] = sandbox
		}
		drawn = append(drawn, got["random"])
		name := strings.TrimPrefix(sandbox, "sbx_")
		if got["hostname"] != name || got["token"] != "1" || got["env"] != "" {
			t.Errorf("the process of %s says %v", sandbox, got)
		}
		if off := got["time"].(float64) - float64(time.Now().UnixNano())/1e9; off < -2 || off > 2 {
			t.Errorf("the clock of %s is off by %g s", sandbox, off)
		}
		role := ""
		if i > 0 {
			role = "child"
		}
		want := fmt.Sprintf("%[1]s\n127.0.0.1\tlocalhost\n127.0.1.1\t%[1]s\n192.0.2.9 mine\n%[2]s 1", name, role)
		if out := s.want(sandbox,
			`cat /etc/hostname /etc/hosts; echo "$ROLE $FIRST"; getent hosts $(hostname) >/dev/null`); out != want {
			t.Errorf("%s says %q, want %q", sandbox, out, want)
		}
		if sandbox != id {
			defer s.destroy(sandbox)
		}
	}
	// A random generator in a program's own memory is copied, as documented.
	for _, d := range drawn[1:] {
		if d != drawn[0] {
			t.Errorf("the copied generators differ: %v: correct the documents", drawn)
		}
	}
	addresses := map[string]bool{}
	for _, sandbox := range append(children, id) {
		addresses[s.want(sandbox,
			"python3 -c 'import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.connect((\"192.0.2.1\", 9)); "+
				"print(s.getsockname()[0])'")] = true
	}
	if len(addresses) != 4 {
		t.Errorf("the addresses are %v", addresses)
	}
}

// TestForkConnections forks a sandbox with a connection to the outside and a caller that waits for
// a command. The sandbox keeps both; the child has neither.
func TestForkConnections(t *testing.T) {
	s := shared(t)
	o := newOutside(t)
	l := inNamespace(t, o.name, func() (net.Listener, error) { return net.Listen("tcp4", ":8080") })
	t.Cleanup(func() { l.Close() })
	peers := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			peers <- c
		}
	}()
	id := s.create(nil)
	defer s.destroy(id)
	s.want(id, fmt.Sprintf(`cat >/root/c.py <<'EOF'
import socket
c = socket.create_connection(("%s", 8080)); open("/root/connected", "w").close()
try: result = repr(c.recv(10))
except OSError as e: result = type(e).__name__
open("/root/result", "w").write(result)
EOF
nohup python3 /root/c.py >/root/c.log 2>&1 & until [ -e /root/connected ] || ! kill -0 $!; do sleep 0.05; done; cat /root/c.log`, o.address))
	peer := <-peers
	defer peer.Close()
	caller := make(chan string, 1)
	go func() {
		r, err := s.api().Execute(context.Background(), id, cay.ExecuteRequest{
			Command: new("touch /root/begun; until [ -e /root/go ]; do sleep 0.05; done; echo to the end")})
		caller <- fmt.Sprint(orZero(r).Stdout, err)
	}()
	s.want(id, "until [ -e /root/begun ]; do sleep 0.05; done")
	child := s.fork(id, nil)[0]
	defer s.destroy(child)
	if got := s.want(child,
		"until [ -e /root/result ]; do sleep 0.05; done; cat /root/result"); got != "ConnectionAbortedError" &&
		got != "ConnectionResetError" && got != "b''" {
		t.Errorf("the connection in the child ended with %s", got)
	}
	// The child sees that the caller has gone.
	s.want(child, "i=0; while pgrep -f 'touch /root/[b]egun' >/dev/null; do i=$((i+1)); [ $i -lt 200 ] || exit 1; "+
		"sleep 0.05; done")
	if _, err := peer.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	if got := s.want(id,
		"until [ -e /root/result ]; do sleep 0.05; done; cat /root/result; touch /root/go"); got != "b'hello'" {
		t.Errorf("the connection of the sandbox itself: %s", got)
	}
	if got := <-caller; got != "to the end\n<nil>" {
		t.Errorf("the caller of the sandbox itself got %q", got)
	}
}

// TestForkPolicy forks a process that connects to the outside all the time into a child that may
// not. The child lets no connection out from its first moment on.
func TestForkPolicy(t *testing.T) {
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	o := newOutside(t)
	o.listen(t, 8080)
	id := s.create(nil)
	defer s.destroy(id)
	s.want(id, fmt.Sprintf(`cat >/root/c.py <<'EOF'
import socket, time
log = open("/root/through", "a", buffering=1)
while True:
    began = time.time()
    try:
        socket.create_connection(("%s", 8080), timeout=0.2).close(); log.write("%%.6f\n" %% began)
    except OSError: pass
EOF
nohup python3 /root/c.py >/root/c.log 2>&1 & until [ -s /root/through ]; do sleep 0.05; done`, o.address))
	child := s.fork(id, object{"egress": object{"mode": "deny_all"}})[0]
	defer s.destroy(child)
	before := s.want(child, "wc -l </root/through")
	s.awaitDenied(child, o.address)
	if after := s.want(child, "wc -l </root/through"); after != before {
		t.Errorf("the child's process came through %s times before the first look and %s after", before, after)
	}
	// Connections that succeeded began before the child ran.
	var last float64
	started := s.parse(s.field(child, "started_at"))
	if _, err := fmt.Sscan(s.want(child, "tail -n 1 /root/through"), &last); err != nil ||
		last > float64(started.UnixNano())/1e9 {
		t.Errorf("the last connection that came through began at %f, the child ran at %s, %v", last, started, err)
	}
	first := s.want(id, "wc -l </root/through")
	if later := s.want(id, "sleep 1; wc -l </root/through"); later == first {
		t.Error("the sandbox itself does not reach the outside any more")
	}
	// A child of a closed sandbox is closed, unless the fork sets another policy.
	for policy, want := range map[string]string{"": "failed", "allow_all": "connected"} {
		request := object{}
		if policy != "" {
			request["egress"] = object{"mode": policy}
		}
		grandchild := s.fork(child, request)[0]
		if got := s.connect(grandchild, o.address, 8080); !strings.HasPrefix(got, want) {
			t.Errorf("a child of a closed sandbox, with policy %q: %s", policy, got)
		}
		s.destroy(grandchild)
	}
}

// TestSnapshots makes and uses snapshots with the command line, after the end of their sandboxes
// and of the server.
func TestSnapshots(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.create(nil)
	w := s.startWorker(id, 4)
	n := w.check()
	run := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := s.cli("", args...)
		if code != 0 {
			t.Fatalf("cay %s: %s", strings.Join(args, " "), stderr)
		}
		return strings.TrimSpace(stdout)
	}
	snap := run("sandbox", "snapshot", id, "--name", "counting")
	w.check()
	s.destroy(id)
	sandbox := s.persistent(nil)
	asleep := s.startWorker(sandbox, 4)
	m := asleep.check()
	s.suspend(sandbox)
	second := s.snapshot(sandbox, nil)
	if state, _ := s.state(sandbox); state != "suspended" {
		t.Errorf("after the snapshot the sandbox is %s", state)
	}
	if list := run("snapshots", "list"); !strings.Contains(list, snap) || !strings.Contains(list, "counting") ||
		!strings.Contains(list, second) {
		t.Errorf("the list is %s", list)
	}
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		s.stop(signal)
		s.start()
		for _, w := range []*worker{
			{s: s, id: run("sandbox", "create", "--snapshot", "counting"), seen: n},
			{s: s, id: run("sandbox", "create", "--snapshot", second, "--persistent"), seen: m},
		} {
			w.check()
			s.destroy(w.id)
			s.gone(w.id)
		}
	}
	asleep.check()
	s.destroy(sandbox)
	last := &worker{s: s, id: s.from(second, nil), seen: m}
	if _, err := s.api().CreateSandbox(t.Context(), cay.CreateSandboxRequest{Snapshot: "counting",
		Size: new("shared-cpu-2x")}, cay.CreateOptions{}); refusal(err) == nil || refusal(err).Status != 400 ||
		refusal(err).Field != "size" {
		t.Errorf("another size: %v", err)
	}
	run("snapshots", "delete", "counting", second)
	if left := s.snapshotsOnDisk(); len(left) > 0 {
		t.Errorf("after the delete there are the files of %v", left)
	}
	last.check()
	if _, stderr, code := s.cli("", "sandbox", "create", "--snapshot", "counting"); code != 1 ||
		!strings.Contains(stderr, "snapshot_not_found") {
		t.Errorf("create from a deleted snapshot: %d %s", code, stderr)
	}
}

// TestDeleteWhileCreatingFrom deletes a snapshot while sandboxes are made from it, at different
// moments. Each create gives a working sandbox or fails because the snapshot does not exist.
func TestDeleteWhileCreatingFrom(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.create(nil)
	s.want(id, "echo kept >/root/file")
	for round := range 6 {
		snap := s.snapshot(id, nil)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				sandbox, err := s.api().CreateSandbox(context.Background(), cay.CreateSandboxRequest{Snapshot: snap},
					cay.CreateOptions{})
				switch {
				case err == nil:
					if got := s.want(sandbox.ID, "cat /root/file"); got != "kept" {
						t.Errorf("the file is %q", got)
					}
					s.destroy(sandbox.ID)
				case !isRefused(err, 404, "snapshot_not_found"):
					t.Errorf("create: %v", err)
				}
			})
		}
		time.Sleep(time.Duration(round*60) * time.Millisecond) // spread over the duration of a create
		if err := s.api().DeleteSnapshot(t.Context(), snap); err != nil {
			t.Errorf("delete: %v", err)
		}
		wg.Wait()
		if left := s.snapshotsOnDisk(); len(left) > 0 {
			t.Errorf("after the delete there are the files of %v", left)
		}
	}
}

// TestForkKilledAtAnyMoment kills the server in the middle of forks, creations and deletions of
// snapshots. Afterwards the snapshots on the disk are those that are listed, each can be used,
// every child runs or is gone, and the forked sandbox has gone on.
func TestForkKilledAtAnyMoment(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	w := s.startWorker(s.create(object{"timeout": "1h"}), 4)
	const rounds, most = 8, 40
	for round := 0; round < rounds || !s.reconciled("abandon") || !s.logs("dropping what is left of a snapshot"); round++ {
		if round == most {
			t.Fatalf("in %d rounds no start found an interrupted fork and an interrupted snapshot", most)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		var wg sync.WaitGroup
		wg.Go(func() { w.forkOn(ctx) })
		wg.Go(func() { w.saveOn(ctx) })
		// spread over the durations of the operations
		time.Sleep(time.Duration(50+round%rounds*150+rand.IntN(150)) * time.Millisecond)
		s.stop(syscall.SIGKILL)
		cancel()
		wg.Wait()
		began := time.Now()
		s.start()
		s.agree(began)
		w.check()
		snapshots := s.snapshots()
		if onDisk := s.snapshotsOnDisk(); len(onDisk) != len(snapshots) {
			t.Errorf("on the disk are %v, listed %v", onDisk, snapshots)
		}
		if len(snapshots) > 0 {
			(&worker{s: s, id: s.from(snapshots[0], nil)}).check()
		}
		for _, snap := range snapshots {
			if err := s.api().DeleteSnapshot(t.Context(), snap); err != nil {
				t.Errorf("delete: %v", err)
			}
		}
		for _, id := range s.sandboxes("running") {
			if id != w.id {
				s.destroy(id)
			}
		}
	}
	if left := s.snapshotsOnDisk(); len(left) > 0 {
		t.Errorf("there is %v", left)
	}
	s.agree(time.Now())
	w.check()
}

// forkOn forks the worker's sandbox until the server is gone.
func (w *worker) forkOn(ctx context.Context) {
	for ctx.Err() == nil {
		if _, err := w.s.api().Fork(ctx, w.id, cay.ForkRequest{Count: new(3), Timeout: new("10m")}); err != nil {
			if refusal(err) != nil {
				w.s.t.Errorf("fork: %v", err)
			}
			return
		}
	}
}

// saveOn makes snapshots of the worker's sandbox and deletes half of them, until the server is
// gone.
func (w *worker) saveOn(ctx context.Context) {
	for ctx.Err() == nil {
		snapshot, err := w.s.api().CreateSnapshot(ctx, w.id, "")
		if err != nil {
			if refusal(err) != nil {
				w.s.t.Errorf("snapshot: %v", err)
			}
			return
		}
		if rand.IntN(2) > 0 {
			if err := w.s.api().DeleteSnapshot(ctx, snapshot.ID); err != nil && refusal(err) == nil {
				return
			}
		}
	}
}

// logs reports whether the server has logged the words.
func (s *server) logs(words string) bool {
	s.t.Helper()
	log, err := os.ReadFile(s.logFile())
	if err != nil {
		s.t.Fatal(err)
	}
	return strings.Contains(string(log), words)
}

// snapshots lists the ids of all snapshots.
func (s *server) snapshots() (ids []string) {
	s.t.Helper()
	for snapshot, err := range s.api().Snapshots(context.Background(), cay.ListSnapshotsOptions{}) {
		if err != nil {
			s.t.Fatalf("list: %v", err)
		}
		ids = append(ids, snapshot.ID)
	}
	return ids
}

// TestNoDiskToFork fills the disk of the checkpoints. Forks and snapshots are refused, the sandbox
// runs on, and both work when there is space again.
func TestNoDiskToFork(t *testing.T) {
	onOneStore(t)
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_CAPACITY_MIN_FREE_DISK_MB=1")
	dir := filepath.Join(s.dataDir, "checkpoints")
	tmpfs(t, dir, "256m")
	t.Cleanup(func() { s.stop(syscall.SIGTERM) }) // before the disk is unmounted
	s.start()
	s.needTemplate("python")
	w := s.startWorker(s.create(nil), 16)
	w.check()
	filler := fill(t, dir, 10<<20)
	if _, err := s.api().Fork(t.Context(), w.id, cay.ForkRequest{}); !isRefused(err, 507, "disk_full") {
		t.Errorf("fork without room: %v", err)
	}
	if _, err := s.api().CreateSnapshot(t.Context(), w.id, ""); !isRefused(err, 507, "disk_full") {
		t.Errorf("snapshot without room: %v", err)
	}
	w.check()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	// Another writer takes the space after the snapshot has begun, unless it comes too late.
	late := fillsUp(t, dir, w.id)
	_, made := s.api().CreateSnapshot(t.Context(), w.id, "")
	if err := os.Remove(<-late); err != nil {
		t.Fatal(err)
	}
	if made != nil && !isRefused(made, 507, "disk_full") {
		t.Errorf("snapshot while the disk fills up: %v", made)
	}
	for _, snap := range s.snapshots() {
		if err := s.api().DeleteSnapshot(t.Context(), snap); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if left := s.snapshotsOnDisk(); len(left) > 0 {
		t.Errorf("there is %v", left)
	}
	n := w.check()
	(&worker{s: s, id: s.fork(w.id, nil)[0], seen: n}).check()
	(&worker{s: s, id: s.from(s.snapshot(w.id, nil), nil), seen: n}).check()
}

// TestForkInPart asks for more children than the quota allows. Some are made, and each of the
// others has an error that says why not.
func TestForkInPart(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t, "CAY_QUOTA_SANDBOXES=3")
	s.start()
	s.needTemplate("python")
	id := s.create(nil)
	children, err := s.api().Fork(t.Context(), id, cay.ForkRequest{Count: new(4)})
	if err != nil {
		t.Fatalf("fork: %v", err)
	}
	made, refused := 0, 0
	for _, c := range children {
		if c.Sandbox != nil {
			made++
			s.alive(c.Sandbox.ID)
		} else if c.Error.Status == 429 && c.Error.Code == "quota_exceeded" {
			refused++
		}
	}
	if made != 2 || refused != 2 {
		t.Errorf("fork: %s", jsonOf(children))
	}
	if _, err := s.api().Fork(t.Context(), id, cay.ForkRequest{}); !isRefused(err, 429, "quota_exceeded") {
		t.Errorf("fork over the quota: %v", err)
	}
	if left := s.snapshotsOnDisk(); len(left) > 0 {
		t.Errorf("there is %v", left)
	}
}
