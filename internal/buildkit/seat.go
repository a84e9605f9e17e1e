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

// seat is a scope's place for a program.
type seat struct {
	builder *Builder
	scope   string
	number  int // names what the program has on the host

	mu sync.Mutex // held while the program is started or stopped
	// +checklocks:mu
	program *program // nil if none was started
	// +checklocks:mu
	users int // builds under way
	// +checklocks:mu
	idle *time.Timer // stops the program; nil while there are users
}

// seat returns a scope's seat.
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

// taken lists the seats that there are.
func (b *Builder) taken() []*seat {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := make([]*seat, 0, len(b.seats))
	for _, s := range b.seats {
		all = append(all, s)
	}
	return all
}

// use returns the running program, started if need be, and counts the caller among its
// users until release is called, exactly once.
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
	s.builder.log.Debug("stopping the build program: idle", "scope", s.scope)
	if err := s.program.stop(ctx); err != nil {
		s.builder.log.Error("stopping the build program", "scope", s.scope, "error", err)
	}
	s.program = nil
}

// end stops the program whatever it does.
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

// makeRoom stops idle programs until there are few enough for a scope's, unless that runs. No seat is held.
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

// Running counts the programs that run.
func (b *Builder) Running() (n int) {
	for _, s := range b.taken() {
		if s.running() {
			n++
		}
	}
	return n
}

// Prune removes from a scope's cache what is not in use, the longest unused first, until keep bytes are
// left, and says how many bytes that freed.
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

// Close ends all builds and the programs. Results stay as they are.
func (b *Builder) Close(ctx context.Context) error {
	b.close()
	var errs []error
	for _, s := range b.taken() {
		errs = append(errs, s.end(ctx))
	}
	return errors.Join(errs...)
}

// start starts a program with the scope's disk. An image that cannot be mounted is made anew, and if
// that cannot be mounted either the disk is a directory, here and from now on.
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

// contexts is where the scope's builds have their contexts.
func (b *Builder) contexts(scope string) string { return filepath.Join(b.builds(), name(scope)) }

// disk is where the scope's disk is: an image, or a directory beside it.
func (b *Builder) disk(scope string) string { return filepath.Join(b.disks(), name(scope)) }

// name makes a file name of a scope, which has no "/".
func name(scope string) string { return "scope-" + scope }
