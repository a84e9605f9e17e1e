package main

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"github.com/google/subcommands"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/state/statefile"
	"gvisor.dev/gvisor/runsc/cmd/util"
	"gvisor.dev/gvisor/runsc/config"
	"gvisor.dev/gvisor/runsc/container"
	"gvisor.dev/gvisor/runsc/flag"
	"gvisor.dev/gvisor/runsc/sandbox"
)

// save writes the state of a sandbox and leaves it running, or paused for as long as the caller
// wants. gVisor's own checkpoint ends the sandbox, even if the disk was full. Its pause,
// checkpoint and resume are three programs, and after each the next may never run. This is one
// program, which resumes the sandbox before it ends.
type save struct {
	imagePath string
	hold      bool
	files     bool
}

// Name implements subcommands.Command.
func (*save) Name() string { return "save" }

// Synopsis implements subcommands.Command.
func (*save) Synopsis() string { return "save a sandbox without ending it" }

// Usage implements subcommands.Command.
func (*save) Usage() string {
	return `save [--hold] --image-path=DIR <container id> - save a sandbox without ending it.
With --hold the sandbox stays paused: "saved" is written to the standard output, and
the sandbox goes on when the standard input ends. With --files only the writable layer
of its root is saved, for run --fs-restore-image-path; "too large" is written if its tree
of files is too large for that.
`
}

// SetFlags implements subcommands.Command.
func (s *save) SetFlags(f *flag.FlagSet) {
	f.StringVar(&s.imagePath, "image-path", "", "directory to write to; it must exist")
	f.BoolVar(&s.hold, "hold", false, "keep the sandbox paused until the standard input ends")
	f.BoolVar(&s.files, "files", false, "save the files without processes and memory")
}

// FetchSpec implements util.SubCommand.
func (*save) FetchSpec(conf *config.Config, f *flag.FlagSet) (string, *specs.Spec, error) {
	c, err := load(conf, f)
	if err != nil {
		return "", nil, err
	}
	return c.ID, c.Spec, nil
}

func load(conf *config.Config, f *flag.FlagSet) (*container.Container, error) {
	if f.NArg() != 1 {
		return nil, fmt.Errorf("a container id is required")
	}
	c, err := container.Load(conf.RootDir, container.FullID{ContainerID: f.Arg(0)}, container.LoadOpts{})
	if err != nil {
		return nil, fmt.Errorf("loading container: %w", err)
	}
	return c, nil
}

// Execute implements subcommands.Command.
func (s *save) Execute(_ context.Context, f *flag.FlagSet, args ...any) subcommands.ExitStatus {
	conf := args[0].(*config.Config)
	c, err := load(conf, f)
	if err != nil {
		return util.Errorf("%v", err)
	}
	// From here on only SIGKILL ends this process before the sandbox is resumed.
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, os.Interrupt)
	signal.Ignore(unix.SIGPIPE) // from printing "saved", if the caller has died meanwhile
	if s.hold {
		if err := c.Sandbox.Pause(c.ID); err != nil {
			return util.Errorf("pausing: %v", err)
		}
		// The sandbox may have ended by then, which most callers wait for.
		defer func() { _ = c.Sandbox.Resume(c.ID) }()
	}
	if err := s.write(conf, c); err != nil {
		if s.files && tooLarge(err) {
			fmt.Println("too large")
		}
		return util.Errorf("saving: %v", err)
	}
	if !s.hold {
		return subcommands.ExitSuccess
	}
	fmt.Println("saved")
	ended := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // an error is an end too
		close(ended)
	}()
	select {
	case <-ended:
	case <-asked:
	}
	return subcommands.ExitSuccess
}

// write writes the sandbox, or its files alone, which continues or stays paused.
func (s *save) write(conf *config.Config, c *container.Container) error {
	if s.files {
		return c.FSSave(conf, s.imagePath, sandbox.FSSaveOpts{Path: "/"})
	}
	return c.Checkpoint(conf, s.imagePath, sandbox.CheckpointOpts{
		Compression: statefile.CompressionLevelNone, // memory is read from the file in any order
		Resume:      true,
		// Memory that was given back is zero; it is half of what a sandbox has used.
		ExcludeCommittedZeroPages: true,
	})
}

// tooLarge reports whether the sentry refused to save files because an index of them, or the names and
// attributes of one, are too large. Only the text of its error arrives here.
func tooLarge(err error) bool {
	return strings.Contains(err.Error(), "file system checkpoint too large") ||
		strings.Contains(err.Error(), tar.ErrFieldTooLong.Error())
}
