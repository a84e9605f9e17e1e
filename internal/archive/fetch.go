package archive

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
)

// Fetch writes the files of a copy to an empty directory and verifies them against its row. It leaves minFree bytes of
// the disk free. It returns [objects.ErrDamaged] if the copy is not what was uploaded. After an error some files of the
// copy may be in the directory.
func (a *Archive) Fetch(ctx context.Context, c sandbox.StoredCheckpoint, dir string, minFree int64) error {
	data, _, err := objects.Read(ctx, a.cfg.Bucket, home(c)+sealName, maxSeal)
	if err != nil {
		return fmt.Errorf("fetching the checkpoint of %s: %w", c.Name, err)
	}
	s, err := openSeal(a.cfg.Key, data, c)
	if err != nil {
		return err
	}
	for _, file := range s.Files {
		f, err := os.OpenFile(filepath.Join(dir, file.Name), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return fmt.Errorf("fetching the checkpoint of %s: %w", c.Name, err)
		}
		err = a.cfg.Transfer.DownloadPieces(ctx, home(c)+file.Name, f, file.Size, file.Pieces, a.cfg.Key, minFree)
		if err == nil {
			err = f.Sync()
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("fetching the checkpoint of %s: %w", c.Name, err)
		}
	}
	return nil
}
