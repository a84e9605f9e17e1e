package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"
)

// hotPort is a port of the machine's PCI bus that takes a disk while the machine runs.
var hotPort = []string{"-device", "pcie-root-port,id=hot,chassis=1,slot=1"}

// save saves a booted machine to files of the lab and ends it. [lab.resume] continues it any number of times.
func (l *lab) save(ctx context.Context, g *guest) error {
	defer g.cut()
	if _, err := g.monitor("stop", nil); err != nil {
		return err
	}
	// One file is written and read as a whole; QEMU's sparse formats save nothing here.
	to := map[string]any{"uri": "exec:cat >" + shellQuote(filepath.Join(l.dir, "memory"))}
	if _, err := g.monitor("migrate", to); err != nil {
		return err
	}
	for deadline := time.Now().Add(g.patience); ; {
		var migration struct{ Status string }
		answer, err := g.monitor("query-migrate", nil)
		if err == nil {
			err = json.Unmarshal(answer, &migration)
		}
		if err != nil {
			return err
		}
		switch migration.Status {
		case "completed":
			return os.Rename(filepath.Join(l.dir, "root.qcow2"), filepath.Join(l.dir, "saved.qcow2"))
		case "failed", "cancelled":
			return fmt.Errorf("QEMU did not save the machine: %s", answer)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second / 4): // a poll with a deadline
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("QEMU still saves the machine after %s: %s", g.patience, answer)
		}
	}
}

// resume continues the saved machine and gives it a disk that it has not seen yet: the node data of the block
// devices. The machine has the host's time and random numbers of its own, as after a boot.
func (l *lab) resume(ctx context.Context, devices ...string) (_ *guest, err error) {
	overlay := filepath.Join(l.dir, "root.qcow2")
	if err := os.RemoveAll(overlay); err != nil {
		return nil, err
	}
	if err := makeOverlay(ctx, filepath.Join(l.dir, "saved.qcow2"), "qcow2", overlay); err != nil {
		return nil, err
	}
	more := append(append([]string{}, hotPort...), "-incoming", "exec:cat "+shellQuote(filepath.Join(l.dir, "memory")))
	g, err := l.start(ctx, overlay, append(more, devices...)...)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			g.cut()
		}
	}()
	for deadline := time.Now().Add(g.patience); ; {
		// It fails until the machine is there, which is paused as it was when it was saved.
		if _, err = g.monitor("cont", nil); err == nil {
			var state struct{ Running bool }
			answer, err := g.monitor("query-status", nil)
			if err == nil && json.Unmarshal(answer, &state) == nil && state.Running {
				break
			}
		}
		select {
		case <-g.exited:
			text, _ := os.ReadFile(g.log) // the error is reported in any case
			return nil, fmt.Errorf("QEMU ended: %s", lastLines(string(text), 3))
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Second / 4): // a poll with a deadline
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("the saved machine does not continue: %w", err)
		}
	}
	disk := map[string]any{"driver": "virtio-blk-pci", "bus": "hot", "drive": "data", "write-cache": "on"}
	if _, err := g.monitor("device_add", disk); err != nil {
		return nil, err
	}
	return g, g.await(ctx)
}

// fresh returns a script that makes a continued machine differ from the saved one as a booted machine would: it sets
// the clock and the kernel's random numbers.
func fresh() (string, error) {
	seed := make([]byte, 64)
	if _, err := rand.Read(seed); err != nil {
		return "", err
	}
	const reseed = `import fcntl, struct
seed = bytes.fromhex(%q)
with open("/dev/random", "wb") as f:
    fcntl.ioctl(f, 0x40085203, struct.pack("ii64s", 512, 64, seed))  # RNDADDENTROPY
    fcntl.ioctl(f, 0x5207)  # RNDRESEEDCRNG`
	return fmt.Sprintf("date -s @%d >/dev/null\npython3 -c %s\n", time.Now().Unix(),
		shellQuote(fmt.Sprintf(reseed, hex.EncodeToString(seed)))), nil
}

// monitor gives QEMU a command of its machine protocol and returns the answer.
func (g *guest) monitor(command string, arguments map[string]any) (json.RawMessage, error) {
	conn, err := net.DialTimeout("unix", g.socket, g.how.Timeout)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(g.patience)); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(conn)
	ask := func(command string, arguments map[string]any) (json.RawMessage, error) {
		request := map[string]any{"execute": command}
		if arguments != nil {
			request["arguments"] = arguments
		}
		if err := json.NewEncoder(conn).Encode(request); err != nil {
			return nil, err
		}
		for lines.Scan() {
			var answer struct {
				Return json.RawMessage
				Error  *struct{ Desc string }
			}
			if err := json.Unmarshal(lines.Bytes(), &answer); err != nil {
				return nil, err
			}
			switch {
			case answer.Error != nil:
				return nil, errors.New(answer.Error.Desc)
			case answer.Return != nil: // the greeting and events have none
				return answer.Return, nil
			}
		}
		return nil, errors.Join(errors.New("QEMU's monitor has hung up"), lines.Err())
	}
	if _, err := ask("qmp_capabilities", nil); err != nil {
		return nil, fmt.Errorf("QEMU's monitor: %w", err)
	}
	answer, err := ask(command, arguments)
	if err != nil {
		return nil, fmt.Errorf("QEMU's monitor, at %s: %w", command, err)
	}
	return answer, nil
}
