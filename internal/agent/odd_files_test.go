package agent_test

import (
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/cayhq/cay/internal/agentapi/filesystem"
	"github.com/cayhq/cay/internal/fault"
)

// read downloads a file or a range of it.
func (s *sandbox) read(path, rng string) (status int, size int64, text string) {
	s.t.Helper()
	d, err := s.client.Download(s.t.Context(), s.target, path, "", rng)
	if err != nil {
		s.t.Errorf("reading %s: %v", path, err)
		return 0, 0, ""
	}
	defer d.Body.Close()
	b, err := io.ReadAll(d.Body)
	if err != nil {
		s.t.Errorf("reading %s: %v", path, err)
	}
	return d.Status, d.Size, string(b)
}

// TestFilesOfTheKernel reads files that have no size, as nearly all below /proc and /sys.
func TestFilesOfTheKernel(t *testing.T) {
	s := startSandbox(t, options{})
	for _, p := range []string{
		"/proc/version", "/proc/1/status", "/sys/devices/system/cpu/online", "/proc/sys/kernel/hostname",
	} {
		status, size, text := s.read(p, "")
		if status != 200 || size <= 0 || int64(len(text)) != size {
			t.Errorf("%s: status %d, %d bytes, %q", p, status, size, text)
		}
	}
	whole := s.sh("cat /proc/version")
	if status, _, text := s.read("/proc/version", "bytes=6-12"); status != 206 || text != whole[6:13] {
		t.Errorf("a range of /proc/version: %d %q", status, text)
	}
	if status, size, text := s.read("/proc/version", "lines=1-2"); status != 200 || size != int64(len(whole)+1) ||
		text != whole+"\n" {
		t.Errorf("a range of an unknown unit: %d, %d bytes, %q", status, size, text)
	}
	s.sh("touch /tmp/empty; echo 0123456789 > /tmp/full")
	if status, size, text := s.read("/tmp/empty", ""); status != 200 || size != 0 || text != "" {
		t.Errorf("an empty file: %d, %d, %q", status, size, text)
	}
	if status, _, text := s.read("/tmp/full", "items=2-3"); status != 200 || text != "0123456789\n" {
		t.Errorf("a range of an unknown unit: %d %q", status, text)
	}
	// Make a file longer than maxUnsized: the mappings of a process with many.
	s.sh("probe maps 6000 & echo $! >/tmp/pid; until [ -e /tmp/mapped ]; do sleep 0.05; done")
	path := "/proc/" + s.sh("cat /tmp/pid") + "/maps"
	if status, size, text := s.read(path, ""); status != 200 || size != -1 || strings.Count(text, "\n") < 6000 {
		t.Errorf("%s: %d, %d bytes, %d lines", path, status, size, strings.Count(text, "\n"))
	}
	wantFault(t, s.upload("/proc/version", "x"), fault.Denied, fault.CodeFileDenied)
}

// TestWriteWhatALinkLeadsTo writes to links whose targets do not exist yet, and to targets that are not files.
func TestWriteWhatALinkLeadsTo(t *testing.T) {
	s := startSandbox(t, options{})
	s.sh(`mkdir -p /tmp/d/real /tmp/e; cd /tmp/d; ln -s ../e/new rel; ln -s /tmp/e/deep/er/new abs; ln -s rel2 twice; ln -s real/x rel2
		ln -s /tmp/e/sub/dir /tmp/d/dirlink; mkdir -p /tmp/e/sub/dir; ln -s dirlink/../up past; ln -s loop loop; ln -s real todir; mkfifo fifo; ln -s fifo tofifo; mknod null c 1 3; ln -s /dev/null tonull; probe socket sock`)
	for link, want := range map[string]string{
		"rel": "/tmp/e/new", "abs": "/tmp/e/deep/er/new", "twice": "/tmp/d/real/x", "past": "/tmp/e/sub/up",
	} {
		if err := s.upload("/tmp/d/"+link, link); err != nil {
			t.Errorf("%s: %v", link, err)
		}
		if got := s.sh("cat " + want + "; test -L /tmp/d/" + link + " && echo still a link"); got != link+"still a link" {
			t.Errorf("%s: %q", link, got)
		}
	}
	for _, p := range []string{"fifo", "tofifo", "null", "tonull", "loop", "sock"} {
		wantFault(t, s.upload("/tmp/d/"+p, "x"), fault.Invalid, fault.CodeInvalidPath)
	}
	wantFault(t, s.upload("/tmp/d/todir", "x"), fault.Invalid, fault.CodePathIsDirectory)
	got := s.sh("cd /tmp/d; stat -c %F fifo null sock; ls -A /tmp/d /tmp/e | grep -c cay-upload || true")
	if got != "fifo\ncharacter special file\nsocket\n0" {
		t.Errorf("afterwards: %q", got)
	}
}

// TestWatchEnds removes and moves watched directories.
func TestWatchEnds(t *testing.T) {
	s := startSandbox(t, options{})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	_, c := s.clients("")
	// watch makes the change and returns the events of a recursive watch until it ends or has seen the last name.
	watch := func(dir, change, last string) (seen []string, err error) {
		t.Helper()
		s.sh("rm -rf /tmp/w /tmp/elsewhere; mkdir -p /tmp/w/sub/below /tmp/elsewhere")
		watching, stop := context.WithCancel(ctx)
		defer stop()
		stream, err := c.WatchDir(watching, connect.NewRequest(&filesystem.WatchDirRequest{Path: dir, Recursive: true}))
		if err != nil {
			t.Fatal(err)
		}
		if !stream.Receive() {
			t.Fatalf("no start: %v", stream.Err())
		}
		s.sh(change)
		for stream.Receive() {
			if ev := stream.Msg().GetFilesystem(); ev != nil {
				seen = append(seen, ev.GetName()+" "+strings.TrimPrefix(ev.GetType().String(), "EVENT_TYPE_"))
				if ev.GetName() == last {
					return seen, nil
				}
			}
		}
		return seen, stream.Err()
	}
	for change, want := range map[string]string{"rm -r /tmp/w": ". REMOVE", "mv /tmp/w /tmp/elsewhere/": ". RENAME"} {
		seen, err := watch("/tmp/w", change, "")
		if err != nil || len(seen) == 0 || seen[len(seen)-1] != want {
			t.Errorf("%s: %q, %v", change, seen, err)
		}
	}
	seen, err := watch("/tmp/w",
		"cd /tmp; mv w/sub elsewhere/; touch elsewhere/sub/x elsewhere/sub/below/y; touch w/end", "end")
	if got := strings.Join(seen, ", "); err != nil || strings.Contains(got, "sub/") ||
		!strings.Contains(got, "sub RENAME") {
		t.Errorf("a subtree that moved away: %q, %v", seen, err)
	}
	seen, err = watch("/tmp/w", "cd /tmp/w; mv sub new; touch new/below/y; rm -r new; mkdir sub; touch sub/z end", "end")
	got := strings.Join(seen, ", ")
	if err != nil || strings.Contains(got, "sub/below") || !strings.Contains(got, "new CREATE, ") ||
		!strings.Contains(got, "new REMOVE") {
		t.Errorf("a subtree that was renamed: %q, %v", seen, err)
	}
	polled, err := c.CreateWatcher(ctx, connect.NewRequest(&filesystem.CreateWatcherRequest{Path: "/tmp/w"}))
	if err != nil {
		t.Fatal(err)
	}
	s.sh("rm -r /tmp/w")
	s.eventually("a watcher that is asked tells it", func() bool {
		r, err := c.GetWatcherEvents(ctx,
			connect.NewRequest(&filesystem.GetWatcherEventsRequest{WatcherId: polled.Msg.GetWatcherId()}))
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range r.Msg.GetEvents() {
			if ev.GetName() == "." && ev.GetType() == filesystem.EventType_EVENT_TYPE_REMOVE {
				return true
			}
		}
		return false
	})
}
