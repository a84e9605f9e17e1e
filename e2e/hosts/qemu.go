package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"
)

// Limits of boots, by the machine's clock. A lower limit fails machines that others keep busy; a higher one finds a
// machine that hangs later.
const (
	// bootLimit limits a boot until ssh answers, and a shutdown. An emulated boot takes half a minute of the host's
	// time on idle processors and several times that on busy ones.
	bootLimit = 2 * time.Minute
	// dialLimit limits one try to open a connection, which a boot repeats.
	dialLimit = 4 * time.Second
)

// hasKVM reports whether QEMU can use the processor's virtualization. Some hosts have a /dev/kvm
// without it, made for special kernels; ordinary kernels do not boot there.
func hasKVM() bool {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil || !bytes.Contains(info, []byte(" vmx ")) && !bytes.Contains(info, []byte(" svm ")) {
		return false
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err == nil {
		f.Close() // it was opened only as a test
	}
	return err == nil
}

// emulator returns the QEMU of a machine's architecture, its arguments for the board, and the guest's console.
func (m machine) emulator() (program string, args []string, console string) {
	if m.release.arch == "arm64" {
		return "qemu-system-aarch64", []string{"-machine", "virt"}, "ttyAMA0"
	}
	return "qemu-system-x86_64", []string{"-machine", "q35"}, "ttyS0"
}

// accelerator returns QEMU's arguments for the guest's processors, and its environment.
//
// An emulated processor is too slow for the time limits of calls and tests, in particular on a busy
// machine. So libfaketime slows down the guest's clock, and the guest does not get the processor's
// own counter, which is not slowed down. Unchanged tests then see a machine of nearly ordinary
// speed.
func (o options) accelerator(arch string) (args, env []string, err error) {
	if hasKVM() && arch == runtime.GOARCH {
		return []string{"-accel", "kvm", "-cpu", "max"}, os.Environ(), nil
	}
	libraries, err := filepath.Glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
	if err != nil || len(libraries) == 0 {
		return nil, nil, errors.New("no libfaketime to slow a machine's clock with: scripts/needs.sh hosts installs it")
	}
	cpu := "max,tsc=off"
	if arch == "arm64" {
		cpu = "neoverse-n1" // as clouds have it; the newest extensions are slow to emulate
	}
	return []string{"-accel", "tcg,thread=multi", "-cpu", cpu},
		append(os.Environ(), "LD_PRELOAD="+libraries[0], fmt.Sprintf("FAKETIME=+0 x%g", o.clock)), nil
}

// guest is a running machine.
type guest struct {
	cmd    *exec.Cmd
	exited chan struct{} // closed when QEMU has ended
	client *ssh.Client
	log    string // file with QEMU's output
	socket string // of QEMU's monitor
	port   string
	how    *ssh.ClientConfig
	// patience limits a boot and a shutdown, by the host's clock.
	patience time.Duration
}

// boot starts a machine of the lab and waits until it answers. The root is that of the last boot, unless fresh is set.
func (l *lab) boot(ctx context.Context, fresh bool) (*guest, error) {
	overlay := filepath.Join(l.dir, "root.qcow2")
	if _, err := os.Stat(overlay); fresh || err != nil {
		if err := makeOverlay(ctx, filepath.Join(l.root, "root.img"), "raw", overlay); err != nil {
			return nil, err
		}
	}
	g, err := l.start(ctx, overlay, hotPort...)
	if err != nil {
		return nil, err
	}
	return g, g.await(ctx)
}

// start starts QEMU with a root disk and more arguments.
func (l *lab) start(ctx context.Context, root string, more ...string) (*guest, error) {
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	g := &guest{
		log: filepath.Join(l.logs, "qemu.log"), socket: filepath.Join(l.dir, "monitor"), port: port,
		exited: make(chan struct{}), patience: l.outside(bootLimit),
		how: &ssh.ClientConfig{
			User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(l.luggage.key)},
			// The machine was just started by this process, at a port of the loopback interface.
			HostKeyCallback: ssh.InsecureIgnoreHostKey(),
			Timeout:         l.outside(dialLimit),
		},
	}
	how, env, err := l.options.accelerator(l.machine.release.arch)
	if err != nil {
		return nil, err
	}
	cpus, memory := "2", "4096"
	if l.machine.small {
		cpus, memory = "1", "1024"
	}
	program, args, console := l.machine.emulator()
	args = append(args,
		"-nodefaults", "-smp", cpus, "-m", memory,
		"-kernel", filepath.Join(l.root, "vmlinuz"), "-initrd", filepath.Join(l.root, "initrd"),
		// Without the last, systemd would renew caches of the root at each boot.
		"-append", "root=LABEL=root rw panic=-1 console="+console+" "+l.machine.append+" systemd.condition_needs_update=0",
		"-drive", "if=virtio,format=qcow2,file="+root,
		"-drive", "if=virtio,format=raw,readonly=on,file="+l.luggage.image,
		"-netdev", "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:"+port+"-:22",
		"-device", "virtio-net-pci,netdev=net",
		"-device", "virtio-rng-pci", "-display", "none", "-no-reboot",
		"-serial", "file:"+filepath.Join(l.logs, "console.log"),
		"-qmp", "unix:"+g.socket+",server=on,wait=off")
	g.cmd = exec.Command(program, slices.Concat(args, how, more)...)
	log, err := os.Create(g.log)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	g.cmd.Env, g.cmd.Stdout, g.cmd.Stderr = env, log, log
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := g.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { _ = g.cmd.Wait(); close(g.exited) }() // its status does not matter
	return g, nil
}

// await waits until the machine answers, and ends QEMU if that does not happen.
func (g *guest) await(ctx context.Context) error {
	deadline := time.Now().Add(g.patience)
	for {
		err := g.dial()
		if err == nil {
			return nil
		}
		select {
		case <-g.exited:
			text, _ := os.ReadFile(g.log) // the error is reported in any case
			return fmt.Errorf("QEMU ended: %s", lastLines(string(text), 3))
		case <-ctx.Done():
			g.cut()
			return ctx.Err()
		case <-time.After(time.Second): // a poll with a deadline
		}
		if time.Now().After(deadline) {
			g.cut()
			return fmt.Errorf("no answer after %s: %w", g.patience, err)
		}
	}
}

// makeOverlay makes a disk with the content of base, which has a format, whose writes go to overlay.
func makeOverlay(ctx context.Context, base, format, overlay string) error {
	return command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", format, overlay)
}

// dial opens the connection that carries commands. QEMU accepts a connection before the machine has a network, and
// then tries its own so seldom, by the slow clock, that a new one is there sooner. So a dial has one limit for all of
// its beginning; the client's own limit ends with TCP's.
func (g *guest) dial() error {
	address := "127.0.0.1:" + g.port
	conn, err := net.DialTimeout("tcp", address, g.how.Timeout)
	if err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Now().Add(g.how.Timeout)); err != nil {
		return errors.Join(err, conn.Close())
	}
	client, channels, requests, err := ssh.NewClientConn(conn, address, g.how)
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return errors.Join(err, client.Close())
	}
	g.client = ssh.NewClient(client, channels, requests)
	return nil
}

// cut cuts the power: what QEMU has not written yet is lost.
func (g *guest) cut() {
	_ = g.cmd.Process.Kill() // the process may have ended
	<-g.exited
	if g.client != nil {
		g.client.Close()
	}
}

// reboot shuts the machine down in order. QEMU ends with it; the next boot uses the same root.
func (g *guest) reboot(ctx context.Context) error {
	_ = g.script(ctx, "systemctl reboot", io.Discard, g.patience) // the connection may break first
	defer g.cut()
	select {
	case <-g.exited:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(g.patience):
		return errors.New("the machine does not shut down")
	}
}

// errTimeout reports that a script took longer than it may.
var errTimeout = errors.New("timed out")

// script runs a bash script in the machine.
func (g *guest) script(ctx context.Context, text string, out io.Writer, limit time.Duration) error {
	session, err := g.client.NewSession()
	if err != nil {
		return err
	}
	defer session.Close()
	session.Stdin = strings.NewReader(text)
	session.Stdout, session.Stderr = out, out
	done := make(chan error, 1)
	// The shell reads the script as a whole first: otherwise its commands could read the rest of it as
	// their input.
	go func() { done <- session.Run(`script=$(cat); exec bash -c "$script" check </dev/null`) }()
	select {
	case err := <-done:
		return err
	case <-g.exited:
		return errors.New("the machine ended")
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(limit):
		return errTimeout
	}
}
