package caytest

import (
	"context"
	"fmt"
	"net"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netns"
)

// Machines are network namespaces that stand for machines, joined by a bridge in another namespace. Nothing else
// reaches them.
type Machines struct {
	t        testing.TB
	nsenter  string
	instance string
	address  map[string]string
}

// StartMachines makes machines with short names, and removes them at the test's end.
func StartMachines(t testing.TB, names ...string) *Machines {
	t.Helper()
	RequireRoot(t)
	RequireProgram(t, "ip")
	RequireProgram(t, "nft")
	m := &Machines{t: t, nsenter: RequireProgram(t, "nsenter"), instance: Instance(), address: map[string]string{}}
	m.add("bridge")
	m.in("bridge", "ip", "link", "add", "br0", "type", "bridge")
	m.in("bridge", "ip", "link", "set", "br0", "up")
	m.in("bridge", "nft", "add table bridge cut; add chain bridge cut forward { type filter hook forward priority 0; }")
	for i, name := range names {
		m.add(name)
		m.address[name] = "192.0.2." + strconv.Itoa(i+1)
		m.in("bridge", "ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", m.namespace(name))
		m.in("bridge", "ip", "link", "set", name, "master", "br0", "up")
		m.in(name, "ip", "addr", "add", m.address[name]+"/24", "dev", "eth0")
		m.in(name, "ip", "link", "set", "eth0", "up")
		m.in(name, "ip", "link", "set", "lo", "up")
	}
	return m
}

func (m *Machines) namespace(name string) string { return m.instance + "-" + name }

// add makes a namespace.
func (m *Machines) add(name string) {
	m.t.Helper()
	run(m.t, "ip", "netns", "add", m.namespace(name))
	m.t.Cleanup(func() { run(m.t, "ip", "netns", "del", m.namespace(name)) })
}

// in runs a command in a namespace.
func (m *Machines) in(name string, command ...string) {
	m.t.Helper()
	run(m.t, append([]string{"ip", "netns", "exec", m.namespace(name)}, command...)...)
}

func run(t testing.TB, command ...string) {
	t.Helper()
	if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(command, " "), err, out)
	}
}

// Address returns the address of a machine.
func (m *Machines) Address(name string) string { return m.address[name] }

// Command returns a command that runs on a machine.
func (m *Machines) Command(ctx context.Context, name string, command ...string) *exec.Cmd {
	args := append([]string{"--net=/run/netns/" + m.namespace(name), "--"}, command...)
	return exec.CommandContext(ctx, m.nsenter, args...)
}

// Listen listens on a machine, for this process.
func (m *Machines) Listen(name string) net.Listener {
	m.t.Helper()
	l, err := inNamespace(m.namespace(name), func() (net.Listener, error) {
		return net.Listen("tcp4", m.address[name]+":0")
	})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { l.Close() })
	return l
}

// inNamespace makes a socket in a namespace. The thread returns to its own namespace before another goroutine gets it.
func inNamespace(name string, listen func() (net.Listener, error)) (l net.Listener, err error) {
	runtime.LockOSThread()
	home, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return nil, fmt.Errorf("finding the namespace of this thread: %w", err)
	}
	defer home.Close()
	defer func() {
		// A thread that cannot return stays locked, and ends with its goroutine.
		if back := netns.Set(home); back == nil {
			runtime.UnlockOSThread()
		} else if err == nil {
			err = fmt.Errorf("returning from the namespace %s: %w", name, back)
		}
	}()
	there, err := netns.GetFromName(name)
	if err != nil {
		return nil, fmt.Errorf("opening the namespace %s: %w", name, err)
	}
	defer there.Close()
	if err := netns.Set(there); err != nil {
		return nil, fmt.Errorf("entering the namespace %s: %w", name, err)
	}
	return listen()
}

// Cut drops all packets from one machine to another. Those of the other direction pass.
func (m *Machines) Cut(from, to string) {
	m.t.Helper()
	m.in("bridge", "nft", "add", "rule", "bridge", "cut", "forward", "iifname", from, "oifname", to, "drop")
}

// Heal ends all cuts.
func (m *Machines) Heal() {
	m.t.Helper()
	m.in("bridge", "nft", "flush", "chain", "bridge", "cut", "forward")
}
