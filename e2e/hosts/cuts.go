package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// actions are done or under way when the power is cut. checks/cut.sh does them, and
// checks/after-cut.sh checks what must be left of them.
var actions = []string{"create", "suspend", "checkpoint", "snapshot", "policy", "key", "create-persistent", "destroy",
	"fork", "wake", "during-suspend", "during-snapshot", "during-create", "during-destroy"}

// cuts cuts the power of the machine again and again, right after the machine has reported an
// action. After the next start it checks that the effect of every answered action is there.
//
// The data directory is on a disk with a volatile cache. After every second cut, all that the guest
// has not flushed is lost; otherwise any part of it may be there, as with real disks.
//
// Each start continues the machine from the moment after a boot, without the disk of the data, which
// it is then given: to cay this is a boot, and it takes seconds.
func (l *lab) cuts(ctx context.Context) (rows []row) {
	start := time.Now()
	data := filepath.Join(l.dir, "data.img")
	if err := l.prepareCuts(ctx, data); err != nil && ctx.Err() != nil {
		return nil
	} else if err != nil {
		return []row{l.row("boot", start, "", err)}
	}
	rows = append(rows, l.row("boot", start, "", nil))
	start = time.Now()
	done, failed, answered := 0, 0, ""
	var notes []string
	for i := range l.options.cuts + 1 {
		action := actions[i%len(actions)]
		if i == l.options.cuts {
			action = "nothing" // the last boot only checks
		}
		next, err := l.cutOnce(ctx, data, i, action, answered)
		if ctx.Err() != nil { // the cuts whose effects were checked count
			break
		}
		if err != nil {
			failed++
			notes = append(notes, fmt.Sprintf("cut %d (%s, before it %q): %v", i, action, answered, err))
			fmt.Println(l.machine.name, notes[len(notes)-1])
			if next == "" { // it did not get as far as the cut, so begin again
				break
			}
		}
		answered, done = next, i
		fmt.Printf("%s cut %d: %s\n", l.machine.name, i, oneLine(next))
	}
	if done+failed == 0 && ctx.Err() != nil {
		return rows
	}
	var err error
	note := fmt.Sprintf("%d cuts, all answered things were there", done)
	if failed > 0 {
		note = fmt.Sprintf("%d cuts, %d with losses: %s", done, failed, strings.Join(notes, "; "))
		err = errors.New(note)
	}
	return append(rows, l.row("cuts", start, oneLine(note), err))
}

// cutOnce boots, checks the effects of the action before the last cut, does the next action and
// cuts the power. It returns the answer to the action.
func (l *lab) cutOnce(ctx context.Context, data string, i int, action, answered string) (string, error) {
	overlay, log := filepath.Join(l.dir, "data.qcow2"), filepath.Join(l.dir, "data.log")
	for _, f := range []string{overlay, log} {
		if err := os.RemoveAll(f); err != nil {
			return "", err
		}
	}
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		return "", err
	}
	if err := makeOverlay(ctx, data, "raw", overlay); err != nil {
		return "", err
	}
	script := fmt.Sprintf("cut=%d action=%s answered=%s", i, action, shellQuote(answered))
	next, err := l.onDisk(ctx, script,
		"-blockdev", "node-name=under,driver=qcow2,cache.no-flush=on,file.driver=file,file.filename="+overlay,
		"-blockdev", "node-name=log,driver=file,cache.no-flush=on,filename="+log,
		"-blockdev", "node-name=data,driver=blklogwrites,file=under,log=log")
	if errors.Is(err, errNoAnswer) {
		return "", err
	}
	chance := 0.0
	if i%2 == 1 {
		chance = 0.5
	}
	if replayErr := replay(data, log, rand.New(rand.NewPCG(uint64(i), 1)), chance); replayErr != nil {
		return "", replayErr
	}
	return next, err
}

// errNoAnswer reports that a machine gave no answer, so that its power was not cut.
var errNoAnswer = errors.New("no answer came")

// prepareCuts makes the disk of the data, and saves a machine that has booted and on which the server has not run.
func (l *lab) prepareCuts(ctx context.Context, data string) error {
	if err := command(ctx, "mke2fs", "-q", "-t", "ext4", "-L", "data", data, "8G"); err != nil {
		return err
	}
	g, err := l.boot(ctx, true)
	if err != nil {
		return err
	}
	if _, err := l.try(ctx, g, "prepare-cuts"); err != nil {
		g.cut()
		return err
	}
	return l.save(ctx, g)
}

// onDisk starts the saved machine with a data disk, runs after-cut.sh and cut.sh with the variables that they need,
// and cuts the power at the answer.
func (l *lab) onDisk(ctx context.Context, what string, devices ...string) (answer string, err error) {
	g, err := l.resume(ctx, devices...)
	if err != nil {
		return "", errors.Join(errNoAnswer, err)
	}
	defer g.cut()
	log, err := os.OpenFile(filepath.Join(l.logs, "cuts.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	defer log.Close()
	fmt.Fprintf(log, "\n== %s\n", what)
	renewed, err := fresh()
	if err != nil {
		return "", err
	}
	common, err := scripts.ReadFile("checks/lib.sh")
	if err != nil {
		return "", err
	}
	after, err := scripts.ReadFile("checks/after-cut.sh")
	if err != nil {
		return "", err
	}
	text, err := scripts.ReadFile("checks/cut.sh")
	if err != nil {
		return "", err
	}
	watch := &watcher{out: log, cut: func() { _ = g.cmd.Process.Kill() }} // the process may have ended
	err = g.script(ctx, string(common)+renewed+what+"\n"+string(after)+"\n"+string(text), watch, l.outside(checkLimit))
	answer, loss := watch.said()
	switch {
	case answer != "" && loss != "":
		return answer, errors.New(loss)
	case answer != "":
		return answer, nil
	case loss != "":
		return "", errors.Join(errNoAnswer, errors.New(loss))
	}
	return "", errors.Join(errNoAnswer, err)
}

// watcher looks for the lines "loss: …" and "answered: …". It cuts the power immediately after the
// latter.
type watcher struct {
	out io.Writer
	cut func()
	mu  sync.Mutex
	// +checklocks:mu
	rest []byte // of an incomplete line; guarded by mu
	// +checklocks:mu
	answer string // guarded by mu
	// +checklocks:mu
	loss string // all losses; guarded by mu
}

// said returns the answer and the losses.
func (w *watcher) said() (answer, loss string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.answer, w.loss
}

// Write implements io.Writer.
func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rest = append(w.rest, p...)
	for {
		line, rest, whole := bytes.Cut(w.rest, []byte("\n"))
		if !whole {
			return w.out.Write(p)
		}
		w.rest = rest
		if answer, is := strings.CutPrefix(string(line), "answered: "); is && w.answer == "" {
			w.answer = answer
			w.cut()
		}
		if loss, is := strings.CutPrefix(string(line), "loss: "); is {
			w.loss += loss + "; "
		}
	}
}

// The format of QEMU's blklogwrites, which is the format of Linux's dm-log-writes.
const (
	logMagic   = 0x6a736677736872
	logFlush   = 1 << 0
	logDiscard = 1 << 2
)

// replay applies to an image the writes that the log says its disk had to keep: all up to the last
// flush, and each later one with the given chance.
func replay(image, log string, random *rand.Rand, chance float64) error {
	in, err := os.Open(log)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer out.Close()
	var super struct {
		Magic, Version, Entries uint64
		SectorSize              uint32
	}
	if err := binary.Read(in, binary.LittleEndian, &super); err != nil {
		return fmt.Errorf("reading the log of writes: %w", err)
	}
	if super.Magic != logMagic || super.SectorSize < 512 {
		return fmt.Errorf("the log of writes begins with %+v", super)
	}
	type entry struct{ Sector, Sectors, Flags, Length uint64 }
	type place struct {
		entry
		data int64 // offset in the log
	}
	size := int64(super.SectorSize)
	var all []place
	flushed := 0
	// The entries after the last one that the head counts were written after the last flush. The log
	// may end in the middle of one.
	for at := size; ; {
		head := make([]byte, 32)
		if _, err := in.ReadAt(head, at); err != nil {
			break // the end
		}
		var e entry
		if err := binary.Read(bytes.NewReader(head), binary.LittleEndian, &e); err != nil {
			return err
		}
		if e == (entry{}) {
			break
		}
		at += size
		all = append(all, place{e, at})
		if e.Flags&logDiscard == 0 {
			at += int64(e.Sectors) * size
		}
		if e.Flags&logFlush != 0 && uint64(len(all)) <= super.Entries {
			flushed = len(all)
		}
	}
	kept := 0
	for i, p := range all {
		if p.Sectors == 0 || p.Flags&logDiscard != 0 || i >= flushed && random.Float64() >= chance {
			continue
		}
		buffer := make([]byte, int64(p.Sectors)*size)
		if _, err := in.ReadAt(buffer, p.data); err != nil {
			if i >= flushed {
				continue // half written
			}
			return fmt.Errorf("reading write %d of the log: %w", i, err)
		}
		if _, err := out.WriteAt(buffer, int64(p.Sector)*size); err != nil {
			return err
		}
		kept++
	}
	fmt.Printf("  %d writes, %d of them flushed, %d kept\n", len(all), flushed, kept)
	return nil
}

// shellQuote quotes a text as one word of a shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
