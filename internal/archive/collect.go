package archive

import (
	"context"
	"maps"
	"path"
	"slices"
	"time"

	"github.com/cayhq/cay/internal/objects"
	"github.com/cayhq/cay/internal/sandbox"
)

// collect drops the rows of copies that nothing needs any more, and removes the objects that no row names. It marks the
// rows of copies that are not whole in the bucket, or a program of which is not there: files.url names another bucket
// now, or an object was removed or changed. [Archive.Load] on the node of the row then offers the checkpoint again.
func (a *Archive) collect(ctx context.Context) error {
	if err := a.cfg.Records.DropCheckpoints(ctx); err != nil {
		return err
	}
	rows, err := a.copies(ctx)
	if err != nil {
		return err
	}
	homes, programs := map[string]bool{}, map[string]bool{}
	for _, c := range rows {
		homes[home(c)] = true
		programs[programPrefix+c.Agent], programs[programPrefix+c.Runsc] = true, true
	}
	sizes := map[string]int64{} // bytes of the objects, by home
	whole, err := a.checkpoints.Run(ctx, func(o objects.Info) {
		if of := homeOf(o.Key); homes[of] {
			sizes[of] += o.Size
		}
	}, func(key string) bool { return homes[homeOf(key)] })
	if err != nil {
		return err
	}
	found := map[string]bool{}
	wholePrograms, err := a.programs.Run(ctx, func(o objects.Info) {
		if programs[o.Key] {
			found[o.Key] = true
		}
	}, func(key string) bool { return programs[key] || a.wants(key) })
	if err != nil {
		return err
	}
	for _, c := range rows {
		missing := whole && sizes[home(c)] != c.Bytes // of the files and the seal
		for _, program := range []string{c.Agent, c.Runsc} {
			if wholePrograms && !found[programPrefix+program] {
				a.forget(program)
				missing = true
			}
		}
		switch {
		case missing && !c.UploadedAt.IsZero():
			a.cfg.Log.Warn("the copy of a checkpoint is not whole in the bucket, and its node will upload it again",
				"of", c.Name, "node", c.Node)
			c.UploadedAt = time.Time{}
		case c.Lost() && !missing && whole && wholePrograms: // files.url named another bucket for a while
			c.UploadedAt = a.cfg.Now()
		default:
			continue
		}
		if err := a.cfg.Records.MarkCheckpoint(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// homeOf returns the home of the checkpoint that has an object.
func homeOf(key string) string {
	dir, _ := path.Split(key)
	return dir
}

// copies returns the rows of copies, and updates a.stored from them.
func (a *Archive) copies(ctx context.Context) ([]sandbox.StoredCheckpoint, error) {
	a.mu.Lock()
	before := slices.Collect(maps.Keys(a.stored))
	a.mu.Unlock()
	rows, err := a.cfg.Records.StoredCheckpoints(ctx)
	if err != nil {
		return nil, err
	}
	stored := map[string]copied{}
	for _, c := range rows {
		switch {
		case !c.UploadedAt.IsZero():
			stored[c.Name] = copied{c.Number, c.MadeAt} // the rows of a name are in the order of their copies
		case c.Lost(): // the bucket may lack a program
			a.forget(c.Agent)
			a.forget(c.Runsc)
		}
	}
	a.learn(stored, before)
	return rows, nil
}

// learn adds the stored copies that the rows name. Of the names in before, which counted as stored when the rows were
// read, it forgets those that have no uploaded row.
func (a *Archive) learn(stored map[string]copied, before []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, c := range stored {
		if c.number > a.stored[name].number {
			a.stored[name] = c
		}
	}
	for _, name := range before {
		if _, is := stored[name]; !is {
			delete(a.stored, name)
		}
	}
}

// want keeps a program from being removed. A row that is being written may name it.
func (a *Archive) want(key string) {
	a.removing.Lock()
	defer a.removing.Unlock()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.wanted[key] = true
}

// wants reports whether a key was given to want.
func (a *Archive) wants(key string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.wanted[key]
}

// forget has the bucket asked for a program with a SHA-256 before the next copy that needs it.
func (a *Archive) forget(sum string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	maps.DeleteFunc(a.sums, func(_ string, s objects.Sum) bool { return s.String() == sum })
}
