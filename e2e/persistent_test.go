package e2e

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/caytest"
	cay "github.com/cayhq/cay/sdk/go"
)

// persistent makes a persistent sandbox that never suspends by itself.
func (s *server) persistent(more object) string {
	s.t.Helper()
	request := object{"mode": "persistent", "timeout": nil, "idle_timeout": "0", "recovery_interval": "0"}
	for k, v := range more {
		request[k] = v
	}
	return s.create(request)
}

func (s *server) suspend(id string) {
	s.t.Helper()
	sandbox, err := s.api().Suspend(context.Background(), id)
	if err != nil {
		s.t.Fatalf("suspend: %v", err)
	}
	if sandbox.State != cay.SandboxStateSuspended {
		s.t.Errorf("after suspend the sandbox is %s", sandbox.State)
	}
}

func (s *server) wake(id string) {
	s.t.Helper()
	sandbox, err := s.api().Wake(context.Background(), id)
	if err != nil {
		s.t.Fatalf("wake: %v", err)
	}
	if sandbox.State != cay.SandboxStateRunning {
		s.t.Errorf("after wake the sandbox is %s", sandbox.State)
	}
}

// onHost lists everything that the host has of a sandbox except the files in the server's
// directory.
func (s *server) onHost(id string) []string {
	s.t.Helper()
	var found []string
	processes, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, path := range processes {
		if cmdline, err := os.ReadFile(path); err == nil && strings.Contains(string(cmdline), id) {
			found = append(found, "process "+strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	if slices.Contains(s.groupsOnHost(), id) {
		found = append(found, "a control group")
	}
	for _, pattern := range []string{"/run/cay/" + s.instance() + "/*" + id + "*",
		filepath.Join(s.dataDir, "sandboxes", id)} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			s.t.Fatal(err)
		}
		found = append(found, files...)
	}
	return found
}

// keeper is a program with one of everything that must survive a suspend. It answers each line
// "check N" on its own socket with its findings.
const keeper = `
import hashlib, mmap, os, select, signal, socket, struct, subprocess, threading, time

memory = os.urandom(8 << 20)
digest = hashlib.sha256(memory).hexdigest()
deleted = open("/root/deleted", "w+b"); deleted.write(b"still here"); deleted.flush(); os.unlink("/root/deleted")
offset = open("/root/offset", "w+b"); offset.write(bytes(range(100))); offset.seek(42)
reader, writer = os.pipe(); os.write(writer, b"in the pipe")
shared = open("/dev/shm/kept", "w+b"); shared.write(b"in shm"); shared.flush()
mapped = mmap.mmap(-1, 4096); mapped[:6] = b"mapped"
server = socket.create_server(("127.0.0.1", 8001))
near = socket.create_connection(("127.0.0.1", 8001)); far, _ = server.accept(); near.sendall(b"on the loopback")
unix_a, unix_b = socket.socketpair(); unix_a.sendall(b"between two ends")
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
stopped = subprocess.Popen(["sleep", "1000"], start_new_session=True); os.kill(stopped.pid, signal.SIGSTOP)
timers = []
def timer():
    began = time.monotonic()
    while True:
        time.sleep(0.1)
        timers.append(time.monotonic() - began)
threading.Thread(target=timer, daemon=True).start()
poll = select.epoll(); poll.register(reader, select.EPOLLIN)
lock = open("/root/lock", "w"); import fcntl; fcntl.flock(lock, fcntl.LOCK_EX)

def check():
    faults = []
    def want(what, got, wanted):
        if got != wanted: faults.append("%s: %r, not %r" % (what, got, wanted))
    want("memory", hashlib.sha256(memory).hexdigest(), digest)
    deleted.seek(0); want("deleted file", deleted.read(), b"still here")
    want("offset", offset.tell(), 42)
    want("epoll", [fd for fd, _ in poll.poll(1)], [reader])
    want("pipe", os.read(reader, 100), b"in the pipe"); os.write(writer, b"in the pipe")
    want("shm", open("/dev/shm/kept", "rb").read(), b"in shm")
    want("mapping", mapped[:6], b"mapped")
    want("loopback", far.recv(100), b"on the loopback"); near.sendall(b"on the loopback")
    want("socket pair", unix_b.recv(100), b"between two ends"); unix_a.sendall(b"between two ends")
    child.stdin.write(b"ping\n"); child.stdin.flush(); want("child", child.stdout.readline(), b"ping\n")
    want("stopped child", open("/proc/%d/stat" % stopped.pid).read().split()[2], "T")
    before = len(timers); time.sleep(0.5)
    if len(timers) <= before: faults.append("the timer stands still")
    return "; ".join(faults) or "whole"

front = socket.create_server(("", 8000))
open("/root/ready", "w").write(str(os.getpid()))
while True:
    c, _ = front.accept()
    try: answer = check()
    except Exception as e: answer = "failed: %r" % e
    c.sendall(answer.encode()); c.close()
`

// TestSleepKeepsEverything suspends and wakes a sandbox a few times. It checks that the sandbox
// still has everything, and that the host has nothing of it meanwhile.
func TestSleepKeepsEverything(t *testing.T) {
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	id := s.persistent(object{"env": object{"KEPT": "yes"}})
	defer s.destroy(id)
	s.upload(id, "/root/keeper.py", keeper)
	s.want(id, "nohup python3 /root/keeper.py >/root/keeper.log 2>&1 & "+
		"until [ -e /root/ready ] || ! kill -0 $!; do sleep 0.05; done; cat /root/keeper.log")
	// The user's changes to files that cay writes at the start are kept.
	s.want(id, "echo 192.0.2.9 mine >>/etc/hosts; echo mine >/tmp/mine; useradd -m kept; umount /sys 2>/dev/null; true")
	limits := s.limits(id)
	const check = `python3 -c 'import socket; print(socket.create_connection(("127.0.0.1", 8000)).recv(1000).decode())'`
	for cycle := range 4 {
		if got := s.want(id, check); got != "whole" {
			t.Fatalf("cycle %d: %s; its log: %s", cycle, got, s.want(id, "cat /root/keeper.log"))
		}
		s.suspend(id)
		for _, left := range s.onHost(id) {
			t.Errorf("while suspended the host has %s", left)
		}
		if sandbox := s.get(id); sandbox.Status != "suspended" || sandbox.SuspendedAt == nil {
			t.Errorf("GET of the suspended sandbox: %s", jsonOf(sandbox))
		}
		s.wake(id)
	}
	if got := s.want(id,
		"tail -1 /etc/hosts; cat /tmp/mine; id -un 0; id kept >/dev/null && echo $KEPT"); got != "192.0.2.9 "+
		"mine\nmine\nroot\nyes" {
		t.Errorf("after all cycles: %q", got)
	}
	if got := s.limits(id); got != limits {
		t.Errorf("the limits on the host are\n%s\nwant\n%s", got, limits)
	}
	now := time.Now()
	if inside, err := time.Parse("2006-01-02T15:04:05Z", s.want(id, "date -u +%Y-%m-%dT%H:%M:%SZ")); err != nil ||
		inside.Sub(now).Abs() > 10*time.Second {
		t.Errorf("the time inside is %s, outside %s, %v", inside, now, err)
	}
	// The memory limit holds in every instance.
	if r := s.exec(id, "exec python3 -c 'b = bytearray(2 << 30)'"); !r.OOMKilled {
		t.Errorf("too much memory after a wake: %+v", r)
	}
	if got := s.want(id, check); got != "whole" {
		t.Error(got)
	}
}

// limits returns the limits that the host has for a sandbox.
func (s *server) limits(id string) string {
	s.t.Helper()
	var all []string
	for _, file := range []string{"memory.limit_in_bytes", "memory.oom_control", "cpu.shares", "cpu.cfs_quota_us",
		"pids.max", "memory.max", "memory.high", "cpu.weight", "cpu.max"} {
		v1, err := filepath.Glob("/sys/fs/cgroup/*/cay-" + s.instance() + "/" + id + "/" + file)
		if err != nil {
			s.t.Fatal(err)
		}
		v2, err := filepath.Glob("/sys/fs/cgroup/cay-" + s.instance() + "/" + id + "/" + file)
		if err != nil {
			s.t.Fatal(err)
		}
		paths := slices.Sorted(slices.Values(append(v1, v2...)))
		for _, path := range paths {
			data, err := os.ReadFile(path)
			if err != nil {
				s.t.Fatal(err)
			}
			all = append(all, path+" "+string(data))
		}
	}
	if len(all) < 3 {
		s.t.Fatalf("the host has these limits for %s: %q", id, all)
	}
	return strings.Join(all, "")
}

// TestSleepCutsTheOutside checks that a connection to another host is cut by a suspend, and that
// the rules hold afterwards.
func TestSleepCutsTheOutside(t *testing.T) {
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
	o.listen(t, 8081)
	id := s.persistent(nil)
	defer s.destroy(id)
	s.want(id, fmt.Sprintf(`cat >/root/c.py <<'EOF'
import socket
c = socket.create_connection(("%s", 8080)); c.sendall(b"hello"); open("/root/connected", "w").close()
try: result = repr(c.recv(10))
except OSError as e: result = type(e).__name__
open("/root/result", "w").write(result)
EOF
nohup python3 /root/c.py >/root/c.log 2>&1 & until [ -e /root/connected ] || ! kill -0 $!; do sleep 0.05; done; cat /root/c.log`, o.address))
	peer := <-peers
	defer peer.Close()
	s.suspend(id)
	s.wake(id)
	if got := s.want(id,
		"until [ -e /root/result ]; do sleep 0.05; done; cat /root/result"); got != "ConnectionAbortedError" &&
		got != "ConnectionResetError" && got != "b''" {
		t.Errorf("the connection inside ended with %s", got)
	}
	// The other side notices as soon as it sends something.
	if err := peer.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if _, err := peer.Read(buf); err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := peer.Write([]byte("anyone?")); err != nil {
			if e, ok := err.(net.Error); ok && e.Timeout() {
				t.Error("the other side never notices that the connection is gone")
			}
			break
		}
		time.Sleep(50 * time.Millisecond) // limited by the deadline
	}
	if got := s.connect(id, o.address, 8081); !strings.HasPrefix(got, "connected hello "+o.gateway) {
		t.Errorf("after the wake connecting to the outside gives %q", got)
	}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{o.gateway, "127.0.0.1"} {
		if got := s.connect(id, host, atoi(t, port)); !strings.HasPrefix(got, "failed") {
			t.Errorf("after the wake %s is %q", host, got)
		}
	}
}

func atoi(t *testing.T, text string) (n int) {
	t.Helper()
	if _, err := fmt.Sscan(text, &n); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestEachUseWakes makes every kind of call to a suspended sandbox.
func TestEachUseWakes(t *testing.T) {
	s := shared(t)
	id := s.persistent(nil)
	defer s.destroy(id)
	base := "/v1/sandboxes/" + id
	for _, c := range []struct {
		method, path string
		body         any
		status       int
	}{
		{"POST", base + "/execute", object{"command": "true"}, 200},
		{"PUT", base + "/files?path=/root/f", strings.NewReader("text"), 204},
		{"GET", base + "/files?path=/root/f", nil, 200},
		{"GET", base + "/files/list?path=/root", nil, 200},
		{"DELETE", base + "/files?path=/root/f", nil, 204},
		{"POST", base + "/wake", nil, 200},
	} {
		s.suspend(id)
		if status, body := s.call(c.method, c.path, c.body); status != c.status {
			t.Errorf("%s %s: %d %s", c.method, c.path, status, body)
		}
		if state, _ := s.state(id); state != "running" {
			t.Errorf("after %s %s it is %s", c.method, c.path, state)
		}
	}
	s.suspend(id)
	for _, path := range []string{base, base + "/events", "/v1/sandboxes?status=suspended"} {
		if status, body := s.call("GET", path, nil); status != 200 || !strings.Contains(string(body), id) &&
			!strings.Contains(path, "events") {
			t.Errorf("GET %s: %d %s", path, status, body)
		}
	}
	for _, verb := range []string{"suspend", "checkpoint"} {
		if status, body := s.call("POST", base+"/"+verb, nil); status != 409 {
			t.Errorf("%s of a suspended sandbox: %d %s", verb, status, body)
		}
	}
	if state, _ := s.state(id); state != "suspended" {
		t.Errorf("after reads of its row the sandbox is %s", state)
	}
}

// TestManyWakeIt lets many callers use a sandbox that is suspended or being suspended. All get
// their answer, and it is woken once for each suspend.
func TestManyWakeIt(t *testing.T) {
	s := shared(t)
	id := s.persistent(nil)
	defer s.destroy(id)
	const callers = 20
	for round := range 3 {
		if round == 0 {
			s.suspend(id)
		}
		var wg sync.WaitGroup
		if round > 0 {
			wg.Go(func() {
				if _, err := s.api().Suspend(context.Background(), id); err != nil && refusal(err) == nil {
					t.Error(err)
				}
			})
		}
		for i := range callers {
			wg.Go(func() {
				r, err := s.api().Execute(context.Background(), id,
					cay.ExecuteRequest{Command: new(fmt.Sprintf("echo %d", i))})
				if err != nil || r.Stdout != fmt.Sprintln(i) {
					t.Errorf("caller %d: %s, %v", i, jsonOf(r), err)
				}
			})
		}
		wg.Wait()
	}
	slept, woken := 0, 0
	for _, e := range s.events(id) {
		switch e.To {
		case "suspended":
			slept++
		case "waking":
			woken++
		}
	}
	if slept == 0 || woken > slept {
		t.Errorf("the sandbox slept %d times and was woken %d times", slept, woken)
	}
}

type event struct{ From, To, Reason, Detail string }

// events lists a sandbox's events, newest first.
func (s *server) events(id string) []event {
	s.t.Helper()
	page, err := s.api().ListEvents(context.Background(), id, cay.ListOptions{Limit: 200})
	if err != nil {
		s.t.Fatalf("events: %v", err)
	}
	var events []event
	for _, e := range page.Events {
		events = append(events, event{string(orZero(e.From)), string(e.To), e.Reason, orZero(e.Detail)})
	}
	return events
}

// TestIdle checks that sandboxes are suspended when no client uses them, and not before.
func TestIdle(t *testing.T) {
	t.Parallel() // it looks only at its own sandboxes
	s := shared(t)
	const least = "10s" // the shortest that is allowed
	left, used, working := s.persistent(object{"idle_timeout": least}), s.persistent(object{"idle_timeout": least}),
		s.persistent(object{"idle_timeout": least})
	for _, id := range []string{left, used, working} {
		defer s.destroy(id)
	}
	began := time.Now()
	var wg sync.WaitGroup
	wg.Go(func() {
		if r := s.exec(working, "sleep 15; echo done"); r.Stdout != "done\n" {
			t.Errorf("the command that ran longer than the idle time: %+v", r)
		}
	})
	// Reading a sandbox's row does not count as use; the other sandbox is used all the time.
	for {
		if state, _ := s.state(left); state == "suspended" {
			break
		}
		if time.Since(began) > patience {
			t.Fatal("the idle sandbox is not suspended")
		}
		s.alive(used)
		time.Sleep(200 * time.Millisecond) // a poll with a deadline
	}
	row := s.get(left)
	if idle := orZero(row.SuspendedAt).Sub(orZero(row.LastActivityAt)); idle < 9*time.Second {
		t.Errorf("the sandbox was suspended after it was idle for %s: %s", idle, jsonOf(row))
	}
	for _, id := range []string{used, working} {
		if state, _ := s.state(id); state != "running" {
			t.Errorf("a sandbox in use is %s", state)
		}
	}
	if e := s.events(left)[0]; e.To != "suspended" || e.Reason != "idle" {
		t.Errorf("the last event of the sandbox is %+v", e)
	}
	wg.Wait()
	s.waitState(used, "suspended")
	s.waitState(working, "suspended")
	s.alive(left)
}

// TestActivitySurvives checks that the time of the last activity survives the death of the server,
// within 5 seconds.
func TestActivitySurvives(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.persistent(nil)
	s.alive(id)
	last := func() time.Time {
		t.Helper()
		sandbox := s.get(id)
		if sandbox.LastActivityAt == nil {
			t.Fatalf("no last activity in %s", jsonOf(sandbox))
		}
		return *sandbox.LastActivityAt
	}
	used := last()
	time.Sleep(6 * time.Second) // longer than the 5 seconds that are promised
	if now := last(); !now.Equal(used) {
		t.Errorf("reading moved the last activity from %s to %s", used, now)
	}
	s.stop(9)
	s.start()
	if now := last(); now.Sub(used).Abs() > 5*time.Second {
		t.Errorf("the last activity was %s, and after the restart %s", used, now)
	}
	s.alive(id)
}

// TestPurgeTakesTheSleeping purges a suspended sandbox. Nothing of it is left.
func TestPurgeTakesTheSleeping(t *testing.T) {
	t.Parallel() // it has its own server
	s := newServer(t)
	s.start()
	s.needTemplate("python")
	id := s.persistent(nil)
	s.suspend(id)
	files, err := filepath.Glob(filepath.Join(s.dataDir, "checkpoints", id, "*", "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("the suspended sandbox has the files %v, %v", files, err)
	}
	for _, file := range files {
		if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", file, info.Mode(), err)
		}
	}
	s.stop(15)
	s.purge()
	if left := caytest.Leftovers(t, s.instance(), s.dataDir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}
