package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// workerProgram counts until it is ended. It writes each number as a line of 64 bytes to a log that
// it holds open, and then to shared memory; the count itself is only in its own memory. It also
// checks a block of random memory, and says if that has changed.
const workerProgram = `
import hashlib, os, sys, time
memory = os.urandom(int(sys.argv[1]) << 20)
digest = hashlib.sha256(memory).hexdigest()
log = open("/root/worker.log", "ab", buffering=0)
shared = open("/dev/shm/worker", "wb", buffering=0)
n, looked = 0, 0
while True:
    n += 1
    log.write(b"%063d\n" % n)
    os.pwrite(shared.fileno(), b"%012d\n" % n, 0)
    if time.monotonic() - looked >= 1:
        looked = time.monotonic()
        if hashlib.sha256(memory).hexdigest() != digest: open("/root/worker.broken", "w").close()
    time.sleep(0.02)
`

// workerCheck waits until the worker has counted on, and prints its number if every line of the log
// is there, in order and once.
const workerCheck = `
read pid </root/worker.pid
kill -0 $pid || { echo "the worker is dead: $(cat /root/worker.out)"; exit 1; }
read a </dev/shm/worker; i=0
while read b </dev/shm/worker; [ "$b" = "$a" ]; do
	i=$((i+1)); [ $i -lt 400 ] || { echo "the worker stands still at $a"; exit 1; }
	sleep 0.05
done
[ ! -e /root/worker.broken ] || { echo "the worker's memory has changed"; exit 1; }
awk -v shared="$b" '
	length($0) != 63 || $0 + 0 != NR { print "line " NR " of the log is " $0; bad = 1; exit 1 }
	END { if (!bad && NR < shared + 0) { print "the log ends at " NR ", the shared memory is at " shared; bad = 1 }
		if (bad) exit 1; print NR }' "${WORKER_LOG:-/root/worker.log}"`

// worker is a workerProgram in a sandbox, with the highest number that was seen of it.
type worker struct {
	s  *server
	id string

	mu   sync.Mutex
	seen int // the highest number that was seen
}

// startWorker starts a worker that checks so many MiB of memory.
func (s *server) startWorker(id string, memoryMB int) *worker {
	s.t.Helper()
	s.want(id, fmt.Sprintf(`cat >/root/worker.py; nohup python3 /root/worker.py %d >/root/worker.out 2>&1 & echo $! >/root/worker.pid
		until [ -s /dev/shm/worker ] || ! kill -0 $!; do sleep 0.02; done; cat /root/worker.out`, memoryMB), object{"stdin": workerProgram})
	return &worker{s: s, id: id}
}

// check wakes the sandbox if it is suspended. The worker must go on with all of its state, and not
// be behind the number that was seen last.
func (w *worker) check() int {
	w.s.t.Helper()
	return w.from(w.last())
}

// last returns the highest number that was seen.
func (w *worker) last() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.seen
}

// from works like check for a worker that may have fallen back, but not to before least.
func (w *worker) from(least int) int {
	w.s.t.Helper()
	return w.look(w.s.exec(w.id, workerCheck), least)
}

// look evaluates the result of workerCheck.
func (w *worker) look(r result, least int) int {
	w.s.t.Helper()
	var n int
	if _, err := fmt.Sscan(r.Stdout, &n); r.ExitCode != 0 || err != nil {
		w.s.t.Errorf("the worker of %s: exit code %d, %s%s", w.id, r.ExitCode, r.Stdout, r.Stderr)
		return least
	}
	if n < least {
		w.s.t.Errorf("the worker of %s is at %d and was at %d", w.id, n, least)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = max(w.seen, n)
	return n
}

// fellBack checks that the worker goes on from a recovery point that was taken after it had counted
// to least, and forgets the later numbers.
func (w *worker) fellBack(least int) {
	w.s.t.Helper()
	n := w.from(least)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.seen = n
}

// checkpoint takes a recovery point and returns its time.
func (s *server) checkpoint(id string) time.Time {
	s.t.Helper()
	checkpoint, err := s.api().Checkpoint(context.Background(), id)
	if err != nil {
		s.t.Fatalf("checkpoint: %v", err)
	}
	return checkpoint.CreatedAt
}

// suspendedAt returns the time of the checkpoint that a suspended sandbox wakes from.
func (s *server) suspendedAt(id string) time.Time {
	s.t.Helper()
	sandbox := s.get(id)
	if sandbox.SuspendedAt == nil {
		s.t.Fatalf("the sandbox was never suspended: %s", jsonOf(sandbox))
	}
	return *sandbox.SuspendedAt
}

// field returns a text field of the sandbox, "" if it is not there.
func (s *server) field(id, name string) string {
	s.t.Helper()
	return text([]byte(jsonOf(s.get(id))), name)
}

func (s *server) parse(at string) time.Time {
	s.t.Helper()
	parsed, err := time.Parse(time.RFC3339, at)
	if err != nil {
		s.t.Fatal(err)
	}
	return parsed
}

// settled waits until no operation on the sandbox runs, and returns its state.
func (s *server) settled(id string) string {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; {
		switch state, _ := s.state(id); state {
		case "creating", "suspending", "waking", "destroying":
			if time.Now().After(deadline) {
				s.t.Fatalf("sandbox %s is still %s after %s", id, state, patience)
			}
			time.Sleep(20 * time.Millisecond) // a poll with a deadline
		default:
			return state
		}
	}
}

// TestWorkerIsChecked causes each fault that workerCheck must find.
func TestWorkerIsChecked(t *testing.T) {
	s := shared(t)
	id := s.persistent(nil)
	defer s.destroy(id)
	w := s.startWorker(id, 1)
	n := w.check()
	for _, tt := range []struct{ do, undo, want string }{
		{"cp /root/worker.log /root/doctored", "true", "the log ends at"},
		{"sed 2d /root/worker.log >/root/doctored", "true", "line 2 of the log is"},
		{"sed 2p /root/worker.log >/root/doctored", "true", "line 3 of the log is"},
		{"sed '2s/0//' /root/worker.log >/root/doctored", "true", "line 2 of the log is"},
		{"touch /root/worker.broken", "rm /root/worker.broken", "memory has changed"},
		{"mv /root/worker.pid /root/kept; echo 99999 >/root/worker.pid", "mv /root/kept /root/worker.pid", "is dead"},
	} {
		s.want(id, tt.do)
		r := s.exec(id, workerCheck, object{"env": object{"WORKER_LOG": "/root/doctored"}})
		if r.ExitCode != 1 || !strings.Contains(r.Stdout, tt.want) {
			t.Errorf("after %q the check says %+v, want %q", tt.do, r, tt.want)
		}
		s.want(id, tt.undo)
	}
	if again := w.check(); again <= n {
		t.Errorf("the worker was at %d and is at %d", n, again)
	}
}
