package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/cayhq/cay/internal/embedded"
)

// SavedCheckpoint describes a checkpoint with its files and manifest, which are open. The caller closes them.
type SavedCheckpoint struct {
	MadeAt   time.Time // time of the state that it holds
	CPUClass string    // of the machine that made it; "" for one of a server that did not record it
	Programs embedded.Programs
	Files    []*os.File
}

// SavedNames returns the IDs of the sandboxes and snapshots that may have a checkpoint here.
func (n *Node) SavedNames() ([]string, error) { return n.checkpoints.Names() }

// OpenSaved opens the latest checkpoint of a sandbox or snapshot. It returns [fs.ErrNotExist] if there is none.
func (n *Node) OpenSaved(name string) (*SavedCheckpoint, error) {
	const tries = 3 // the next checkpoint may replace this one before its files are open
	for try := 1; ; try++ {
		c, was, err := n.latest(name)
		if err != nil {
			return nil, err
		}
		if c == nil {
			return nil, fmt.Errorf("the checkpoint of %s: %w", name, fs.ErrNotExist)
		}
		files, err := c.OpenAll()
		if err == nil {
			return &SavedCheckpoint{MadeAt: c.At, CPUClass: was.CPUClass,
				Programs: embedded.At(n.cfg.ProgramsDir, was.Programs), Files: files}, nil
		}
		if !errors.Is(err, fs.ErrNotExist) || try == tries {
			return nil, err
		}
	}
}

// saved calls Config.Saved with the name and the size of a new checkpoint.
func (n *Node) saved(name string, bytes int64) {
	if n.cfg.Saved != nil {
		n.cfg.Saved(name, bytes)
	}
}
