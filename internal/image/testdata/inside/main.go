// Command inside is the first process of a sandbox in the tests of images: it
// sets extended attributes as the agent does, prints those there are, and starts
// itself as a user who has no capabilities, but by a file that has.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent"
)

func main() {
	if os.Getuid() != 0 {
		status, err := os.ReadFile("/proc/self/status")
		fmt.Printf("uid %d, %v", os.Geteuid(), err)
		for line := range strings.Lines(string(status)) {
			if strings.HasPrefix(line, "CapEff:") {
				fmt.Print(" ", line)
			}
		}
		return
	}
	if err := run(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func run() error {
	if err := agent.SetAttributes("/", agent.AttributesPath); err != nil {
		return err
	}
	for _, path := range []string{"/bin/capable", "/attributes", "/attributes2", "/attributed", "/empty"} {
		if err := show(path); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	cmd := exec.Command("/bin/capable")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1000, Gid: 1000}}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stdout
	return cmd.Run()
}

// show prints the extended attributes of a file.
func show(path string) error {
	b := make([]byte, 1<<16)
	n, err := unix.Llistxattr(path, b)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(strings.FieldsFuncSeq(string(b[:n]), func(r rune) bool { return r == 0 })) {
		n, err := unix.Lgetxattr(path, name, b)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Printf("%s %s=%x\n", path, name, b[:n])
	}
	return nil
}
