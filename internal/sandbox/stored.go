package sandbox

import (
	"context"
	"time"
)

// StoredCheckpoint describes the copy of a checkpoint in a bucket. Its objects are named after Name, Fence and Number.
// They count only if a row with UploadedAt has their sum.
type StoredCheckpoint struct {
	Name  string // ID of its sandbox or snapshot
	Node  string // that wrote it
	Fence int64  // orders the copies of nodes that held the sandbox one after the other; 0 today
	// Number orders the copies of a name and fence. It is MadeAt in microseconds, or one more than the last number if
	// MadeAt is not larger than that. So a database that was restored to an older state does not give a number of existing
	// objects to another checkpoint.
	Number int64
	// MadeAt is the time of the state that it holds. It names the checkpoint on the node's disk.
	MadeAt   time.Time
	Bytes    int64  // of its objects; 0 until it is uploaded
	CPUClass string // of the machine that made it, "" if unknown; other classes may not be able to restore it
	// Agent and Runsc are the hexadecimal SHA-256 of the programs that it needs.
	Agent, Runsc string
	Sum          string    // hexadecimal SHA-256 of the object that describes the others; "" until it is uploaded
	UploadedAt   time.Time // zero until it is uploaded, and while it is lost
}

// Lost reports whether the bucket had the copy once, and lacks some of it since.
func (c StoredCheckpoint) Lost() bool { return c.Sum != "" && c.UploadedAt.IsZero() }

// CheckpointStore keeps the rows of the copies of checkpoints. The store room implements it.
type CheckpointStore interface {
	// BeginCheckpoint adds a row for a copy that is to be uploaded, gives it the next number, and drops the rows of the
	// earlier copies of the name that are not uploaded. If there is a row of the same checkpoint that was never uploaded,
	// it returns that row. It returns NotFound unless the name is that of a snapshot or of a sandbox that is not over. It
	// and EndCheckpoint write the rows of the store's own node alone.
	BeginCheckpoint(ctx context.Context, c StoredCheckpoint) (StoredCheckpoint, error)
	// EndCheckpoint writes Bytes, Sum and UploadedAt of a row that BeginCheckpoint returned, and drops the rows of the
	// earlier copies of the name. It returns NotFound if the row was dropped meanwhile.
	EndCheckpoint(ctx context.Context, c StoredCheckpoint) error
	// MarkCheckpoint writes UploadedAt of a row that has a Sum, of any node: zero when the copy is lost, and a time when
	// the bucket has it again. It does nothing if the row was dropped meanwhile.
	MarkCheckpoint(ctx context.Context, c StoredCheckpoint) error
	// StoredCheckpoints returns all rows, those of a name by fence and number.
	StoredCheckpoints(ctx context.Context) ([]StoredCheckpoint, error)
	// DropCheckpoints drops the rows whose names belong to no snapshot and to no sandbox that is not over.
	DropCheckpoints(ctx context.Context) error
}
