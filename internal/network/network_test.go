package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/fault"
)

func TestAcquireConcurrently(t *testing.T) {
	c := newConfig()
	c.Ready = 5
	n := open(t, c)
	const count = 50
	slots := make([]*Slot, count)
	var group sync.WaitGroup
	for i := range slots {
		group.Go(func() {
			s, err := n.Acquire(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			slots[i] = s
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	seen := map[netip.Addr]bool{}
	for _, s := range slots {
		if seen[s.Addr] {
			t.Errorf("%s was handed out twice", s.Addr)
		}
		seen[s.Addr] = true
	}
	if got, want := indices(n.Slots()), indices(slots); !slices.Equal(got, want) {
		t.Errorf("Slots has %v, want %v", got, want)
	}
	for _, s := range slots {
		group.Go(func() {
			if err := n.Release(t.Context(), s); err != nil {
				t.Error(err)
			}
			if err := n.Release(t.Context(), s); err != nil {
				t.Errorf("again: %v", err)
			}
		})
	}
	group.Wait()
	if got := n.Slots(); len(got) != 0 {
		t.Errorf("%d slots are left", len(got))
	}
}

// TestThreadsStayHome checks that the package leaves no thread in another namespace.
func TestThreadsStayHome(t *testing.T) {
	n := open(t, newConfig())
	var group sync.WaitGroup
	for range 20 {
		group.Go(func() {
			s, err := n.Acquire(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			if err := errors.Join(s.Restore(), n.Release(t.Context(), s)); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	// Threads end a moment after their work is done.
	eventually(t, func() error {
		tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
		if err != nil {
			return err
		}
		for _, task := range tasks {
			if ns, err := os.Readlink(task); err == nil && ns != home {
				return errors.New(task + " is in " + ns + ", not " + home)
			}
		}
		return nil
	})
}

func TestPool(t *testing.T) {
	c := newConfig()
	c.Ready = 3
	n := open(t, c)
	full := func() error {
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(n.idle) != c.Ready {
			return errors.New("the pool is not filled")
		}
		return nil
	}
	eventually(t, full)
	n.mu.Lock()
	oldest := n.idle[0]
	n.mu.Unlock()
	s := acquire(t, n)
	if s != oldest {
		t.Errorf("got slot %d, want the ready one %d", s.Index, oldest.Index)
	}
	eventually(t, full)
}

func TestRangeUsedUp(t *testing.T) {
	c := newConfig()
	c.Range = netip.PrefixFrom(c.Range.Addr(), 29) // 4 slots
	c.Ready = 2                                    // ready slots count
	n := open(t, c)
	var slots []*Slot
	for range 4 {
		var s *Slot
		// The pool may be making one of them at this moment.
		eventually(t, func() (err error) {
			s, err = n.Acquire(t.Context())
			return err
		})
		slots = append(slots, s)
	}
	_, err := n.Acquire(t.Context())
	if f := fault.As(err); f == nil || f.Kind != fault.Unavailable || f.Code != "no_capacity" || f.RetryAfter <= 0 {
		t.Errorf("got %v, want no_capacity", err)
	}
	if err := n.Release(t.Context(), slots[2]); err != nil {
		t.Fatal(err)
	}
	var again *Slot
	eventually(t, func() (err error) {
		again, err = n.Acquire(t.Context())
		return err
	})
	if again.Index != slots[2].Index {
		t.Errorf("got slot %d, want %d", again.Index, slots[2].Index)
	}
	// A released slot stays released, even if a new one has its index.
	if err := n.Release(t.Context(), slots[2]); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(n.Slots(), again) {
		t.Error("releasing the old slot took the new one's")
	}
}

// TestAddressesAreReusedLast checks that an address is not used again while others are unused.
func TestAddressesAreReusedLast(t *testing.T) {
	c := newConfig()
	c.Range = netip.PrefixFrom(c.Range.Addr(), 29)
	n := open(t, c)
	var got []int
	for range 6 {
		s := acquire(t, n)
		got = append(got, s.Index)
		if err := n.Release(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	if d := cmp.Diff([]int{0, 1, 2, 3, 0, 1}, got); d != "" {
		t.Errorf("order of indices (-want +got):\n%s", d)
	}
}

// crash ends the process's hold without anything that Close does.
func crash(t *testing.T, n *Network) {
	t.Helper()
	n.mu.Lock()
	n.closed = true
	n.mu.Unlock()
	n.stop()
	n.done.Wait()
	if err := n.claim.close(); err != nil {
		t.Fatal(err)
	}
}

func TestAdoptAndSweep(t *testing.T) {
	caytest.RequireRoot(t)
	c := newConfig()
	c.Ready = 2
	first, err := Open(t.Context(), c, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	kept, lost, broken := acquire(t, first), acquire(t, first), acquire(t, first)
	serveTCP(t, kept.Namespace, agentPort)
	conn, err := first.Dial(t.Context(), kept, agentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	eventually(t, func() error {
		first.mu.Lock()
		defer first.mu.Unlock()
		if len(first.idle) < 2 {
			return errors.New("the pool is not filled")
		}
		return nil
	})
	crash(t, first)
	if err := deleteLink(broken.Link); err != nil {
		t.Fatal(err)
	}

	n := open(t, c)
	echo(t, conn, 1<<16) // the new rules did not cut it
	s, err := n.Adopt(kept.Index)
	if err != nil {
		t.Fatal(err)
	}
	if *s != *kept {
		t.Errorf("adopted %+v, want %+v", s, kept)
	}
	for _, index := range []int{kept.Index, broken.Index, 99} {
		if _, err := n.Adopt(index); !fault.Is(err, fault.NotFound) {
			t.Errorf("adopting %d: got %v, want NotFound", index, err)
		}
	}
	if err := n.Sweep(map[int]bool{lost.Index: true}); err != nil {
		t.Fatal(err)
	}
	want := []string{kept.Link, lost.Link}
	slices.Sort(want)
	eventually(t, func() error { // the pool may be making the next one
		if got := links(t, n); !slices.Equal(got, want) {
			return fmt.Errorf("links %v after sweeping, want %v and the pool's", got, want)
		}
		return nil
	})
	if next := acquire(t, n); next.Index <= max(kept.Index, lost.Index, broken.Index) {
		t.Errorf("a new slot has the index %d, which a predecessor's had", next.Index)
	}
	again, err := n.Dial(t.Context(), s, agentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	echo(t, again, 1<<10)
}

// links returns the instance's links except those of the pool.
func links(t *testing.T, n *Network) []string {
	t.Helper()
	n.mu.Lock()
	idle := slices.Clone(n.idle)
	n.mu.Unlock()
	all, err := listLinks()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, l := range all {
		name := l.Attrs().Name
		if strings.HasPrefix(name, n.layout.links()) &&
			!slices.ContainsFunc(idle, func(s *Slot) bool { return s.Link == name }) {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// TestOtherRange checks that a predecessor with another range leaves nothing that would be
// adopted.
func TestOtherRange(t *testing.T) {
	caytest.RequireRoot(t)
	c := newConfig()
	first, err := Open(t.Context(), c, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	s := acquire(t, first)
	crash(t, first)
	c.Range = newConfig().Range
	n := open(t, c)
	if _, err := n.Adopt(s.Index); !fault.Is(err, fault.NotFound) {
		t.Errorf("got %v, want NotFound", err)
	}
	if got := links(t, n); len(got) != 0 {
		t.Errorf("links %v are left", got)
	}
}

func TestCloseKeepsWhatIsUsed(t *testing.T) {
	caytest.RequireRoot(t)
	c := newConfig()
	c.Ready = 2
	first, err := Open(t.Context(), c, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	s := acquire(t, first)
	if err := errors.Join(first.Close(), first.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Acquire(t.Context()); err == nil {
		t.Error("a closed network hands out slots")
	}
	if got, want := links(t, first), []string{s.Link}; !slices.Equal(got, want) {
		t.Errorf("links %v, want %v", got, want)
	}
	if listTable(t, "cay-"+c.Instance) == "" {
		t.Error("the rules are gone while a slot is in use")
	}
	n := open(t, c)
	if _, err := n.Adopt(s.Index); err != nil {
		t.Error(err)
	}
}

func TestPurge(t *testing.T) {
	caytest.RequireRoot(t)
	c := newConfig()
	n, err := Open(t.Context(), c, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	acquire(t, n)
	acquire(t, n)
	other := open(t, newConfig())
	kept := acquire(t, other)

	if err := Purge(c.Instance); !fault.Is(err, fault.Conflict) {
		t.Errorf("purging what a process has open: got %v, want Conflict", err)
	}
	want := []Remains{{c.Instance, true, 2}, {other.layout.instance, true, 1}}
	checkInstances(t, want)
	crash(t, n)
	want[0].Live = false
	checkInstances(t, want)
	if err := errors.Join(Purge(c.Instance), Purge(c.Instance)); err != nil {
		t.Fatal(err)
	}
	checkInstances(t, want[1:])
	if left := traces(t, c.Instance); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if err := kept.whole(); err != nil {
		t.Errorf("another instance's slot was hurt: %v", err)
	}
}

func checkInstances(t *testing.T, want []Remains) {
	t.Helper()
	got, err := Instances()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("instances (-want +got):\n%s", d)
	}
}

// TestLinkSettings checks the settings of links that spare the rules work.
func TestLinkSettings(t *testing.T) {
	n := open(t, newConfig())
	s := acquire(t, n)
	for _, v := range hostSettings {
		path := filepath.Join(sysctlDir, strings.Replace(v.path, "%s", s.Link, 1))
		got, err := os.ReadFile(path)
		if err != nil || strings.TrimSpace(string(got)) != v.value {
			t.Errorf("%s is %q (%v), want %s", path, got, err, v.value)
		}
	}
	link, err := netlink.LinkByName(s.Link)
	if err != nil {
		t.Fatal(err)
	}
	if link.Attrs().RawFlags&unix.IFF_NOARP == 0 || link.Attrs().MTU != 1400 {
		t.Errorf("flags %v, MTU %d; want NOARP and the uplink's 1400", link.Attrs().Flags, link.Attrs().MTU)
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V6)
	if err != nil || len(addrs) != 0 {
		t.Errorf("the link has IPv6 addresses: %v, %v", addrs, err)
	}
	if err := inNamespace(s.Namespace, func() error {
		for _, v := range insideSettings {
			got, err := os.ReadFile(filepath.Join(sysctlDir, v.path))
			if err != nil || strings.TrimSpace(string(got)) != v.value {
				t.Errorf("inside, %s is %q (%v), want %s", v.path, got, err, v.value)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

// TestFailedBuildLeavesNothing checks that a slot that cannot be made leaves nothing and frees
// its index.
func TestFailedBuildLeavesNothing(t *testing.T) {
	c := newConfig()
	c.Range = netip.PrefixFrom(c.Range.Addr(), 30)
	n := open(t, c)
	breakages := map[string]func() (undo func() error){
		"the namespace's name is taken": func() func() error {
			path := n.layout.slot(n.next).Namespace
			if err := os.Mkdir(path, 0o755); err != nil {
				t.Fatal(err)
			}
			return func() error { return nil } // dismantling removes it
		},
		"the link's MTU is refused": func() func() error {
			old := n.mtu
			n.mtu = 1 << 20
			return func() error { n.mtu = old; return nil }
		},
	}
	for name, breakIt := range breakages {
		n.mu.Lock()
		n.next, n.freed = 0, nil
		n.mu.Unlock()
		undo := breakIt()
		if s, err := n.Acquire(t.Context()); err == nil {
			t.Errorf("%s: got slot %d", name, s.Index)
		}
		if err := undo(); err != nil {
			t.Fatal(err)
		}
		if got := links(t, n); len(got) != 0 {
			t.Errorf("%s: links %v are left", name, got)
		}
		if keys, err := n.rules.keys(n.rules.slots); err != nil || len(keys) != 0 {
			t.Errorf("%s: elements %q are left (%v)", name, keys, err)
		}
		n.mu.Lock()
		if len(n.freed) != 1 || len(n.left) != 0 {
			t.Errorf("%s: freed %v, left %v; want the index back", name, n.freed, n.left)
		}
		n.mu.Unlock()
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := n.Acquire(canceled); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: got %v", err)
	}
}

// TestFailedReleaseIsSwept checks that a slot that could not be removed is not handed out again
// before it is.
func TestFailedReleaseIsSwept(t *testing.T) {
	c := newConfig()
	c.Range = netip.PrefixFrom(c.Range.Addr(), 30)
	n := open(t, c)
	s := acquire(t, n)
	// A non-empty directory replaces the namespace's file.
	if err := deleteNamespace(s.Namespace); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.Namespace, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := n.Release(t.Context(), s); err == nil {
		t.Fatal("no error")
	}
	if got := links(t, n); len(got) != 0 {
		t.Errorf("releasing stopped at the first error: links %v", got)
	}
	n.mu.Lock()
	n.next = n.layout.capacity()
	n.mu.Unlock()
	if _, err := n.Acquire(t.Context()); !fault.Is(err, fault.Unavailable) {
		t.Errorf("got %v, want no_capacity", err)
	}
	if err := os.RemoveAll(s.Namespace); err != nil {
		t.Fatal(err)
	}
	if err := n.Sweep(nil); err != nil {
		t.Fatal(err)
	}
	if again := acquire(t, n); again.Index != s.Index {
		t.Errorf("got slot %d, want %d", again.Index, s.Index)
	}
}

// TestTwoInstances checks that two instances do not touch each other's rules.
func TestTwoInstances(t *testing.T) {
	a, b := open(t, newConfig()), open(t, newConfig())
	sa, sb := acquire(t, a), acquire(t, b)
	serveTCP(t, sb.Namespace, agentPort)
	reach := func() error {
		return inNamespace(sa.Namespace, func() error {
			c, err := net.DialTimeout("tcp4", netip.AddrPortFrom(sb.Addr, agentPort).String(), grace)
			if err == nil {
				c.Close()
			}
			return err
		})
	}
	if reach() == nil {
		t.Error("a slot reached another instance's")
	}
	tables := func() (out []string) {
		c, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		list, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
		if err != nil {
			t.Fatal(err)
		}
		for _, table := range list {
			out = append(out, table.Name)
		}
		slices.Sort(out)
		return out
	}
	if d := cmp.Diff([]string{a.rules.table.Name, b.rules.table.Name}, tables()); d != "" {
		t.Errorf("tables (-want +got):\n%s", d)
	}
	if err := a.Release(t.Context(), sa); err != nil {
		t.Fatal(err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{b.rules.table.Name}, tables()); d != "" {
		t.Errorf("tables after closing one (-want +got):\n%s", d)
	}
	if _, err := b.Dial(t.Context(), sb, agentPort); err != nil {
		t.Error(err)
	}
}

// BenchmarkReady measures an Acquire when the pool has a slot.
func BenchmarkReady(b *testing.B) {
	caytest.RequireRoot(b)
	c := newConfig()
	c.Ready = 40
	n, err := Open(b.Context(), c, testLog(b))
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	for b.Loop() {
		b.StopTimer()
		for ready := false; !ready; time.Sleep(time.Millisecond) {
			n.mu.Lock()
			ready = len(n.idle) > 0
			n.mu.Unlock()
		}
		b.StartTimer()
		s, err := n.Acquire(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := n.Release(b.Context(), s); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkSlot measures making and removing a slot.
func BenchmarkSlot(b *testing.B) {
	caytest.RequireRoot(b)
	n, err := Open(b.Context(), newConfig(), testLog(b))
	if err != nil {
		b.Fatal(err)
	}
	defer n.Close()
	var making, removing time.Duration
	for b.Loop() {
		started := time.Now()
		s, err := n.Acquire(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		made := time.Now()
		if err := n.Release(b.Context(), s); err != nil {
			b.Fatal(err)
		}
		making += made.Sub(started)
		removing += time.Since(made)
	}
	b.ReportMetric(float64(making.Microseconds())/float64(b.N)/1000, "ms/make")
	b.ReportMetric(float64(removing.Microseconds())/float64(b.N)/1000, "ms/remove")
}

// TestBesideIproute2 names a namespace with iproute2 while slots are in use, and checks that they
// can still be removed.
func TestBesideIproute2(t *testing.T) {
	ip := caytest.RequireProgram(t, "ip")
	n := open(t, newConfig())
	s, err := n.Acquire(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, verb := range []string{"add", "del"} {
		if out, err := exec.Command(ip, "netns", verb, "another").CombinedOutput(); err != nil {
			t.Fatalf("ip netns %s: %v: %s", verb, err, out)
		}
	}
	if err := n.Release(t.Context(), s); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.Namespace); err == nil {
		t.Errorf("%s is still there", s.Namespace)
	}
}
