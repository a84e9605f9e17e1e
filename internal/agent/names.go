package agent

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi"
)

// tellName sets the sandbox's host name. A sandbox that had another name before, such as one
// made from a snapshot, keeps the other lines of its /etc/hosts.
func tellName(name string) error {
	before, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("reading the host name: %w", err)
	}
	if err := syscall.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("setting the host name: %w", err)
	}
	// Programs look their own host name up; sudo does it first of all.
	const own = "127.0.1.1\t"
	hosts := "127.0.0.1\tlocalhost\n" + own + name + "\n"
	if had := readSystemFile("/etc/hosts"); strings.Contains(had, own+before+"\n") {
		hosts = strings.Replace(had, own+before+"\n", own+name+"\n", 1)
	}
	if err := errors.Join(writeSystemFile("/etc/hosts", hosts), writeSystemFile("/etc/hostname", name+"\n")); err != nil {
		return fmt.Errorf("writing the host name: %w", err)
	}
	return nil
}

// tellSystem sets the host name and the name servers that programs ask the system for.
func tellSystem(req agentapi.InitRequest) error {
	if req.Hostname != "" {
		if err := tellName(req.Hostname); err != nil {
			return err
		}
	}
	if len(req.Nameservers) == 0 {
		return nil
	}
	var text strings.Builder
	for _, s := range req.Nameservers {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			return answer.Bad("nameserver %q is not an address", s)
		}
		fmt.Fprintf(&text, "nameserver %s\n", addr)
	}
	if err := writeSystemFile("/etc/resolv.conf", text.String()); err != nil {
		return fmt.Errorf("writing resolv.conf: %w", err)
	}
	return nil
}

// maxSystemFile limits how much of /etc/hosts is read, in bytes. A longer file loses its end
// when a sandbox made from a snapshot gets its name.
const maxSystemFile = 1 << 20

// readSystemFile returns the text of a file of the image, "" if it cannot be read.
func readSystemFile(p string) string {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK, 0) // it may be a FIFO
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return ""
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSystemFile))
	if err != nil {
		return ""
	}
	return string(data)
}

// writeSystemFile writes a file in which programs look names up. It makes a missing directory and replaces
// a dangling link, a FIFO or a socket. If the image has a directory in the file's place, or a file in the
// place of the file's directory, it writes nothing, and the sandbox starts without the file.
func writeSystemFile(p, text string) error {
	if st, err := os.Stat(p); err != nil || !st.Mode().IsRegular() && !st.IsDir() {
		// If either fails, opening the file below fails too.
		_ = os.Remove(p)
		_ = os.MkdirAll(path.Dir(p), 0o755)
	}
	f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NONBLOCK, 0o644)
	if errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ENOTDIR) ||
		errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}
