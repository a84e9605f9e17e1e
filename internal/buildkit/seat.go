package buildkit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/cayhq/cay/internal/buildkit/wire"
)

// seat holds the program of one scope, if it runs.
type seat struct {
	builder *Builder
	scope   string
	number  int // part of the names of what the program has on the host

	mu sync.Mutex // held while the program is started or stopped
	// +checklocks:mu
	program *program // nil if it was not started
	// +checklocks:mu
	users int // builds under way
	// +checklocks:mu
	idle *time.Timer // stops the program; nil while there are users
}

// seat returns the seat of a scope.
func (b *Builder) seat(scope string) *seat {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.seats[scope]
	if s == nil {
		s = &seat{builder: b, scope: scope, number: len(b.seats) + 1}
		b.seats[scope] = s
	}
	return s
}

// taken returns all seats.
func (b *Builder) taken() []*seat {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]*seat, 0, len(b.seats))
	for _, s := range b.seats {
		all = append(all, s)
	}
	return all
}

// use returns the running program, starting it if needed. It counts the caller among the
// program's users until release is called, exactly once.
func (s *seat) use(ctx context.Context) (*program, func(), error) {
	s.builder.makeRoom(s)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.builder.closed.Err() != nil {
		return nil, nil, ErrClosed
	}
	if s.idle != nil {
		s.idle.Stop()
		s.idle = nil
	}
	if s.program != nil && s.program.alive.Err() != nil {
		<-s.program.over
		s.program = nil
	}
	if s.program == nil {
		p, err := s.start(ctx)
		if err != nil {
			return nil, nil, err
		}
		s.program = p
	}
	s.users++
	return s.program, s.release, nil
}

func (s *seat) release() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users--; s.users == 0 {
		s.idle = time.AfterFunc(s.builder.cfg.IdleTimeout, s.rest)
	}
}

// rest stops the program if it is still idle.
func (s *seat) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users > 0 || s.program == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), cleanTimeout)
	defer cancel()
	s.builder.log.Debug("stopping the idle build program", "scope", s.scope)
	if err := s.program.stop(ctx); err != nil {
		s.builder.log.Error("stopping the build program", "scope", s.scope, "error", err)
	}
	s.program = nil
}

// end stops the program, even during builds.
func (s *seat) end(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle != nil {
		s.idle.Stop()
	}
	if s.program == nil {
		return nil
	}
	err := s.program.stop(ctx)
	s.program = nil
	return err
}

func (s *seat) running() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.program != nil && !s.program.ended()
}

// makeRoom stops idle programs until there is room for a scope's, unless that runs already. The
// caller must hold no seat.
func (b *Builder) makeRoom(wanted *seat) {
	if wanted.running() {
		return
	}
	over := b.Running() + 1 - b.cfg.Programs
	for _, s := range b.taken() {
		if over > 0 && s != wanted && s.running() {
			s.rest()
			over = b.Running() + 1 - b.cfg.Programs
		}
	}
}

// Running returns the number of programs that run.
func (b *Builder) Running() (n int) {
	for _, s := range b.taken() {
		if s.running() {
			n++
		}
	}
	return n
}

// Prune removes unused entries from a scope's cache, the longest unused first, until keep bytes
// are left, and returns the number of bytes freed.
func (b *Builder) Prune(ctx context.Context, scope string, keep int64) (freed int64, err error) {
	if _, err := os.Stat(b.diskFile(scope)); errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	p, release, err := b.seat(scope).use(ctx)
	if err != nil {
		return 0, err
	}
	defer release()
	done, err := p.talk(ctx, wire.Request{Prune: &wire.Prune{Keep: max(keep, 0)}}, nil)
	if err != nil {
		return 0, err
	}
	if done.Failure != nil {
		return done.Freed, errors.New(done.Failure.Message)
	}
	return done.Freed, nil
}

// Close ends all builds and the programs. Results stay.
func (b *Builder) Close(ctx context.Context) error {
	b.close()
	var errs []error
	for _, s := range b.taken() {
		errs = append(errs, s.end(ctx))
	}
	return errors.Join(errs...)
}

// start starts a program with the scope's disk. It makes an image that cannot be mounted anew; if
// that cannot be mounted either, all disks are directories from now on.
func (s *seat) start(ctx context.Context) (*program, error) {
	for try := 0; ; try++ {
		disk, image, err := s.builder.openDisk(ctx, s.scope)
		if err != nil {
			return nil, err
		}
		p, err := s.startProgram(ctx, disk, image)
		if !errors.Is(err, errNoDisk) || !image {
			return p, err
		}
		s.builder.log.Warn("a builds' disk cannot be mounted", "scope", s.scope, "error", err)
		if try > 0 {
			s.builder.withoutImages(err.Error())
		}
		if err := os.Remove(disk); err != nil {
			return nil, fmt.Errorf("removing a broken disk: %w", err)
		}
	}
}

// contexts returns the directory of the contexts of the scope's builds.
func (b *Builder) contexts(scope string) string { return filepath.Join(b.builds(), name(scope)) }

// disk returns the path of the scope's disk as a directory; an image is beside it.
func (b *Builder) disk(scope string) string { return filepath.Join(b.disks(), name(scope)) }

// name returns a file name for a scope, which has no "/".
func name(scope string) string { return "scope-" + scope }
