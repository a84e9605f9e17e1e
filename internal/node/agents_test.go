package node

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cayhq/cay/internal/agentapi"
	"github.com/cayhq/cay/internal/caytest"
	"github.com/cayhq/cay/internal/embedded"
	"github.com/cayhq/cay/internal/sandbox"
)

// target returns the sandbox as the target of calls to its agent.
func target(spec sandbox.Spec) agentapi.Target {
	return agentapi.Target{SandboxID: string(spec.ID), Run: spec.Run}
}

// build compiles one of the programs in testdata and returns its path.
func build(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := caytest.Build(path, "./testdata/"+name); err != nil {
		t.Fatal(err)
	}
	return path
}

// upload copies a program of the host into /bin of the sandbox.
func (m *machine) upload(spec sandbox.Spec, path string) {
	m.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		m.t.Fatal(err)
	}
	mode := os.FileMode(0o755)
	err = m.node.Agents().Upload(m.ctx(), target(spec), agentapi.UploadRequest{
		Path: "/bin/" + filepath.Base(path), Mode: &mode, Body: bytes.NewReader(data), Size: int64(len(data))})
	if err != nil {
		m.t.Fatal(err)
	}
}

// fresh closes the connections to the sandbox's agent, so that the next call makes a new one.
func (m *machine) fresh(spec sandbox.Spec) { m.node.Agents().Drop(string(spec.ID)) }

// dialled returns a client whose connections to the sandbox's agent pass through dial.
func (m *machine) dialled(id sandbox.ID, dial func(context.Context, net.Conn) (net.Conn, error)) *agentapi.Client {
	c := agentapi.NewClient(func(ctx context.Context, _ string) (net.Conn, error) {
		conn, err := m.node.Dial(ctx, id)
		if err != nil {
			return nil, err
		}
		return dial(ctx, conn)
	})
	m.t.Cleanup(c.CloseIdle)
	return c
}

// refused checks that the agent answers nothing but the health check to a client that has the key
// of the spec, sends it as a token, or has no key.
func (m *machine) refused(spec sandbox.Spec) {
	m.t.Helper()
	withKey := m.dialled(spec.ID, func(ctx context.Context, c net.Conn) (net.Conn, error) {
		return agentapi.Authenticate(ctx, c, spec.Token)
	})
	if err := withKey.Health(m.ctx(), target(spec)); !errors.Is(err, agentapi.ErrNotTheAgent) &&
		!strings.Contains(err.Error(), "does not answer") {
		m.t.Errorf("key %q: %v", spec.Token, err)
	}
	plain := m.dialled(spec.ID, func(_ context.Context, c net.Conn) (net.Conn, error) { return c, nil })
	if err := plain.Health(m.ctx(), target(spec)); err != nil {
		m.t.Errorf("the health: %v", err)
	}
	bearer := m.dialled(spec.ID, func(_ context.Context, c net.Conn) (net.Conn, error) { return c, nil })
	bearer.Bearer = func(string) string { return spec.Token }
	for name, c := range map[string]*agentapi.Client{"with the key": withKey, "plain": plain, "with a token": bearer} {
		for call, do := range map[string]func(agentapi.Target) error{
			"execute": func(to agentapi.Target) error {
				_, err := c.Execute(m.ctx(), to, agentapi.ExecuteRequest{Command: "id", Timeout: time.Second})
				return err
			},
			"download": func(to agentapi.Target) error {
				d, err := c.Download(m.ctx(), to, "/etc/passwd", "", "")
				if err == nil {
					d.Body.Close()
				}
				return err
			},
			"upload": func(to agentapi.Target) error {
				return c.Upload(m.ctx(), to, agentapi.UploadRequest{Path: "/tmp/x", Body: strings.NewReader("x"), Size: 1})
			},
			"init": func(to agentapi.Target) error { return c.Init(m.ctx(), to, agentapi.InitRequest{AccessToken: "mine"}) },
			"process": func(to agentapi.Target) error {
				_, err := c.StartProcess(m.ctx(), to, agentapi.StartProcess{Args: []string{"/bin/sh"}})
				return err
			},
			"watch": func(to agentapi.Target) error {
				return c.Watch(m.ctx(), to, "/tmp", false, func() {}, func(agentapi.Change) error { return nil })
			},
			"relieve": func(to agentapi.Target) error { _, _, err := c.RelieveMemory(m.ctx(), to, 1); return err },
			"metrics": func(to agentapi.Target) error { _, err := c.Metrics(m.ctx(), to); return err },
			"tunnel": func(to agentapi.Target) error {
				conn, err := c.DialPort(m.ctx(), to, AgentPort)
				if err == nil {
					conn.Close()
				}
				return err
			},
		} {
			if do(target(spec)) == nil {
				m.t.Errorf("%s, key or token %q: %s is answered", name, spec.Token, call)
			}
		}
	}
}

// TestAgentWantsItsKey calls a running agent with other keys and without a key.
func TestAgentWantsItsKey(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	for _, key := range []string{"wrong", spec.Token + "x"} {
		wrong := spec
		wrong.Token = key
		m.refused(wrong)
	}
	m.works(spec)
	// The tunnel to the agent's own port counts as a connection from inside: only the health check is
	// answered.
	conn, err := m.node.Agents().DialPort(m.ctx(), target(spec), AgentPort)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /envs HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 401 ") {
		t.Errorf("from inside the agent answers %q, %v", b, err)
	}
}

// tryPort runs a program that tries to take the agent's port as a user inside, and returns its
// report. It listens for a while on every port that it has taken.
func (m *machine) tryPort(spec sandbox.Spec, user string) string {
	m.t.Helper()
	own := m.node.instance(spec.ID).slot.Addr.String()
	r, err := m.node.Agents().Execute(m.ctx(), target(spec), agentapi.ExecuteRequest{
		User: user, Timeout: 30 * time.Second, Workdir: "/dev/shm", Env: map[string]string{"PATH": "/bin"},
		Command: "hostile bind " + own + " /dev/shm/caught-" + user + " >/dev/shm/tried-" + user + " 2>&1 & " +
			"until grep -q ^tried /dev/shm/tried-" + user + "; do sleep 0.05; done; cat /dev/shm/tried-" + user})
	if err != nil || r.ExitCode != 0 {
		m.t.Fatalf("%d %v %s", r.ExitCode, err, r.Stderr)
	}
	return string(r.Stdout)
}

// alone checks that neither root nor another user inside can take the agent's port, and that the
// host reaches the agent on new connections meanwhile.
func (m *machine) alone(spec sandbox.Spec) {
	m.t.Helper()
	for _, user := range []string{"root", "33"} {
		if tried := m.tryPort(spec, user); strings.Contains(tried, "WON") || strings.Count(tried, "refused bind") < 80 {
			m.t.Errorf("%s took the port:\n%s", user, tried)
		}
	}
	for range 3 {
		m.fresh(spec)
		m.works(spec)
	}
	if caught := m.sh(spec, "cat /dev/shm/caught-* 2>/dev/null; busybox killall hostile; "+
		"rm -f /dev/shm/tried-*"); caught != "" {
		m.t.Errorf("the guest caught %s", caught)
	}
}

// TestAgentsPort checks the agent's port through all changes of a sandbox: no program inside can
// bind it on a path that the host's connections take, and the host finds its agent.
func TestAgentsPort(t *testing.T) {
	m := newMachine(t)
	hostile := build(t, "hostile")
	spec := m.created()
	m.upload(spec, hostile)
	m.alone(spec)
	m.suspend(spec)
	spec = m.wake(spec)
	m.alone(spec)
	m.close()
	m.open()
	m.alone(spec)
	snap := m.snapshot(spec)
	child := m.restored(spec, snap)
	m.alone(child)
	m.works(spec)
	warm := m.pooled()
	if err := m.node.Claim(m.ctx(), warm); err != nil {
		t.Fatal(err)
	}
	m.upload(warm, hostile)
	m.alone(warm)
	m.refused(sandbox.Spec{ID: child.ID, Run: child.Run, Token: spec.Token})
	m.refused(sandbox.Spec{ID: warm.ID, Run: warm.Run, Token: spec.Token})
	for _, s := range []sandbox.Spec{spec, child, warm} {
		if err := m.node.Destroy(m.ctx(), s.ID); err != nil {
			t.Error(err)
		}
	}
	if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
		t.Error(err)
	}
	m.wantNothing()
}

// TestRelayToTheAgent lets a program inside accept the host's connection and relay it to the agent,
// as a program that had taken the port would. The host sends it nothing but a nonce.
func TestRelayToTheAgent(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	m.upload(spec, build(t, "hostile"))
	p, err := m.node.Agents().StartProcess(m.ctx(), target(spec), agentapi.StartProcess{
		Args: []string{"/bin/hostile", "relay", "7001", "/tmp/noted"}})
	if err != nil {
		t.Fatal(err)
	}
	var conn net.Conn
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) { // a poll with a deadline
		if conn, err = m.node.Agents().DialPort(m.ctx(), target(spec), 7001); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	// To the host this is a connection to the agent's port; the relay has it.
	if to := conn.RemoteAddr().(*net.TCPAddr); to.Port != AgentPort ||
		to.IP.String() != m.node.instance(spec.ID).slot.Addr.String() {
		t.Fatalf("the connection leads to %s", to)
	}
	if _, err := agentapi.Authenticate(m.ctx(), conn, spec.Token); !errors.Is(err, agentapi.ErrNotTheAgent) {
		t.Errorf("through a relay: %v", err)
	}
	if got := m.sh(spec, "wc -c </tmp/noted"); got != "24" {
		t.Errorf("the relay has %s bytes of the host, want the 24 of a hello", got)
	}
	own, host := m.node.instance(spec.ID).slot.Addr, conn.LocalAddr().(*net.TCPAddr).IP
	for _, user := range []string{"root", "33"} {
		r, err := m.node.Agents().Execute(m.ctx(), target(spec), agentapi.ExecuteRequest{User: user,
			Args: []string{"/bin/hostile", "from", own.String(), host.String()}, Timeout: 30 * time.Second})
		if err != nil || r.ExitCode != 0 || strings.Contains(string(r.Stdout), "WON") ||
			strings.Count(string(r.Stdout), "refused") != 8 {
			t.Errorf("%s comes from the host's address: %v\n%s%s", user, err, r.Stdout, r.Stderr)
		}
	}
	if err := m.node.Agents().KillProcess(m.ctx(), target(spec), strconv.Itoa(p.PID)); err != nil {
		t.Error(err)
	}
	// Connections from inside that send nothing, or part of a message, do not keep the host out.
	m.sh(spec, "hostile crowd 200 >/tmp/crowd 2>&1 & until grep -q ^crowded /tmp/crowd; do sleep 0.05; done")
	for range 3 {
		m.fresh(spec)
		m.works(spec)
	}
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}

// TestNamespacesInside tries every way for a process inside to gain capabilities that it does not
// have.
func TestNamespacesInside(t *testing.T) {
	m := newMachine(t)
	spec := m.created()
	m.upload(spec, build(t, "hostile"))
	for _, user := range []string{"root", "33"} {
		r, err := m.node.Agents().Execute(m.ctx(), target(spec), agentapi.ExecuteRequest{User: user,
			Args: []string{"/bin/hostile", "namespaces"}, Workdir: "/dev/shm", Timeout: 30 * time.Second})
		out := string(r.Stdout)
		if err != nil || r.ExitCode != 0 || strings.Contains(out, "WON") || !strings.HasSuffix(out, "tried\n") {
			t.Errorf("%s: %v\n%s%s", user, err, out, r.Stderr)
		}
		for line := range strings.Lines(out) {
			for _, way := range []string{"clone ", "clone3 ", "unshare "} {
				if strings.HasPrefix(line, "refused "+way) && !strings.HasSuffix(line, ": operation not permitted\n") {
					t.Errorf("%s: %s", user, line)
				}
			}
		}
	}
	m.works(spec)
	if err := m.node.Destroy(m.ctx(), spec.ID); err != nil {
		t.Error(err)
	}
}

// older makes the machine create sandboxes as a server from before the handshake did.
func (m *machine) older(agent string) {
	m.t.Helper()
	dir := filepath.Join(m.dir, "programs", "0123456789abcdef")
	data, err := os.ReadFile(agent)
	if err == nil {
		err = errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "cay-agent"), data, 0o755))
	}
	if err != nil {
		m.t.Fatal(err)
	}
	m.programs = embedded.At(filepath.Join(m.dir, "programs"),
		embedded.Version{Agent: filepath.Base(dir), Runsc: m.programs.Version.Runsc})
	m.close()
	m.open()
}

// TestOlderAgents checks that sandboxes work that were started, saved and snapshotted before there
// was a handshake: their agents get their token with each request, and no other agent does.
func TestOlderAgents(t *testing.T) {
	m := newMachine(t)
	m.older(build(t, "bearer"))
	spec := m.spec()
	b := m.node.newInstance(spec)
	b.record.Handshake = false
	if err := m.node.take(m.ctx(), b, m.node.bootSteps(b, spec), m.node.Destroy); err != nil {
		t.Fatal(err)
	}
	record, err := os.ReadFile(filepath.Join(m.node.dir(spec.ID), recordFile))
	if err != nil || bytes.Contains(record, []byte("handshake")) {
		t.Fatalf("a record of before is %s, %v", record, err)
	}
	m.close()
	if m.programs, err = embedded.Unpack(filepath.Join(m.dir, "programs")); err != nil {
		t.Fatal(err)
	}
	m.open() // the upgrade
	m.works(spec)
	m.suspend(spec)
	spec = m.wake(spec)
	// The attack that fails on new agents works here, so the host must send nothing new to older ones.
	m.upload(spec, build(t, "hostile"))
	// The bind that is tried first takes the port, whatever its option.
	if tried := m.tryPort(spec, "33"); !strings.Contains(tried, "WON bind own ") {
		t.Errorf("no program takes the port of an older agent:\n%s", tried)
	}
	m.sh(spec, "busybox killall hostile")
	m.works(spec)
	snap := m.snapshot(spec)
	child := m.restored(spec, snap)
	m.works(child)
	fresh := m.created()
	m.works(fresh)
	for _, s := range []sandbox.Spec{spec, child} {
		if m.node.bearer(string(s.ID)) != s.Token {
			t.Errorf("%s is not sent its token", s.ID)
		}
	}
	if m.node.bearer(string(fresh.ID)) != "" {
		t.Error("a new sandbox is sent a token")
	}
	// A program that answers in a new sandbox cannot make the host take it for an older one.
	m.refused(sandbox.Spec{ID: fresh.ID, Run: fresh.Run, Token: fresh.Token + "x"})
	for _, s := range []sandbox.Spec{spec, child, fresh} {
		if err := m.node.Destroy(m.ctx(), s.ID); err != nil {
			t.Error(err)
		}
	}
	if err := m.node.DropSnapshot(m.ctx(), snap); err != nil {
		t.Error(err)
	}
}
