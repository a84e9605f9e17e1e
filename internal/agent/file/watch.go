package file

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi/filesystem"
	"github.com/cayhq/cay/internal/fault"
)

const (
	// maxWatchers limits the watchers that collect events. A client may forget to
	// remove its watcher, and the agent cannot tell.
	maxWatchers = 128

	// maxQueued limits the events that a watcher keeps; it drops the oldest first.
	maxQueued = 10_000

	// maxWatched limits the directories that one recursive watch covers; it sees no
	// events in further ones.
	maxWatched = 10_000

	watchMask = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
		unix.IN_ATTRIB | unix.IN_ONLYDIR | unix.IN_EXCL_UNLINK | unix.IN_DONT_FOLLOW

	// rootMask also selects the removal and the move of the watched directory.
	rootMask = (watchMask | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF) &^ unix.IN_DONT_FOLLOW

	// rootName names the watched directory in events about itself.
	rootName = "."
)

// errRootGone reports that the watched directory was removed or moved, so that no more events come.
var errRootGone = errors.New("the directory that was watched is gone")

// watch is an inotify instance on one directory, or a tree of them. It is used
// by one goroutine, except for close.
type watch struct {
	files     *Files
	root      string
	recursive bool
	entries   bool // whether events describe their entries
	file      *os.File
	dirs      map[int32]string // by watch descriptor; relative to root, which is ""
}

// watchRequest is the common interface of the two requests that watch a directory.
type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetIncludeEntry() bool
	GetAllowNetworkMounts() bool
}

func (s *filesystemService) newWatch(h http.Header, req watchRequest) (*watch, error) {
	_, p, err := s.resolve(h, req.GetPath())
	if err != nil {
		return nil, err
	}
	st, err := os.Stat(p)
	if err != nil {
		return nil, statErr(err, p)
	}
	if !st.IsDir() {
		return nil, answer.Connect(answer.New(fault.CodePathNotDirectory, "path %q is not a directory", p))
	}
	if !req.GetAllowNetworkMounts() && onNetwork(p) {
		return nil, answer.Connect(answer.Bad("path %q is on a network mount, where not all changes can be seen", p))
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, answer.Connect(fmt.Errorf("starting to watch: %w", err))
	}
	w := &watch{
		files: s.files, root: p, recursive: req.GetRecursive(), entries: req.GetIncludeEntry(),
		file: os.NewFile(uintptr(fd), "inotify"), dirs: map[int32]string{},
	}
	// Follow the root if it is a link, and no links below it.
	wd, err := unix.InotifyAddWatch(fd, p, rootMask)
	if err != nil {
		w.close()
		return nil, answer.Connect(answer.OfFile(err, p))
	}
	w.dirs[int32(wd)] = ""
	if w.recursive {
		w.addBelow("", nil)
	}
	return w, nil
}

// onNetwork reports whether p is on a file system that other machines may change.
func onNetwork(p string) bool {
	var st unix.Statfs_t
	if unix.Statfs(p, &st) != nil {
		return false
	}
	switch uint32(st.Type) {
	case unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC:
		return true
	}
	return false
}

func (w *watch) close() { _ = w.file.Close() }

// addBelow watches the directories below dir (relative to the root). It calls found,
// if not nil, for each entry that exists already, since the entry may have appeared
// between the making of dir and the watch on it.
func (w *watch) addBelow(dir string, found func(name string)) {
	names, err := readNames(path.Join(w.root, dir))
	if err != nil {
		return // removed meanwhile
	}
	for _, name := range names {
		rel := path.Join(dir, name)
		if found != nil {
			found(rel)
		}
		st, err := os.Lstat(path.Join(w.root, rel))
		if err == nil && st.IsDir() && w.add(rel) {
			w.addBelow(rel, found)
		}
	}
}

// add watches one directory below the root. It returns false if it cannot, or if the
// directory is watched already.
func (w *watch) add(rel string) bool {
	if len(w.dirs) >= maxWatched {
		return false
	}
	wd, err := -1, error(nil)
	raw, closed := w.file.SyscallConn()
	if closed != nil {
		return false
	}
	// Control keeps the file open, so that its descriptor is not reused meanwhile.
	closed = raw.Control(func(fd uintptr) { wd, err = unix.InotifyAddWatch(int(fd), path.Join(w.root, rel), watchMask) })
	if closed != nil || err != nil {
		return false // removed meanwhile
	}
	known, again := w.dirs[int32(wd)]
	w.dirs[int32(wd)] = rel // it may have been renamed
	return !again || known != rel
}

// forget ends the watches on a directory that was moved and on all directories below it. If it was moved
// within the tree, the event of its arrival adds it again.
func (w *watch) forget(rel string) {
	raw, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	for wd, dir := range w.dirs {
		if dir == rel || strings.HasPrefix(dir, rel+"/") {
			delete(w.dirs, wd)
			// An error means that the watch has ended by itself.
			_ = raw.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
		}
	}
}

// run calls emit with every event until the watch is closed, its directory is gone, or emit fails.
func (w *watch) run(emit func(*filesystem.FilesystemEvent) error) error {
	buf := make([]byte, 16<<10)
	for {
		n, err := w.file.Read(buf)
		if errors.Is(err, os.ErrClosed) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading events: %w", err)
		}
		err = w.handle(buf[:n], emit)
		if errors.Is(err, errRootGone) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (w *watch) handle(buf []byte, emit func(*filesystem.FilesystemEvent) error) error {
	return eachInotify(buf, func(wd int32, mask uint32, name string) error {
		dir, ok := w.dirs[wd]
		if mask&unix.IN_IGNORED != 0 {
			delete(w.dirs, wd)
			return nil
		}
		if ok && mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0 {
			return w.end(mask, emit)
		}
		if !ok || name == "" {
			return nil
		}
		kind := eventType(mask)
		if kind == filesystem.EventType_EVENT_TYPE_UNSPECIFIED {
			return nil
		}
		rel := path.Join(dir, name)
		if err := emit(w.event(rel, kind)); err != nil {
			return err
		}
		if w.recursive && kind == filesystem.EventType_EVENT_TYPE_RENAME && mask&unix.IN_ISDIR != 0 {
			w.forget(rel)
		}
		if !w.recursive || kind != filesystem.EventType_EVENT_TYPE_CREATE || mask&unix.IN_ISDIR == 0 || !w.add(rel) {
			return nil
		}
		var err error
		w.addBelow(rel, func(found string) {
			if err == nil {
				err = emit(w.event(found, filesystem.EventType_EVENT_TYPE_CREATE))
			}
		})
		return err
	})
}

// end emits the event that the watched directory itself was removed or moved.
func (w *watch) end(mask uint32, emit func(*filesystem.FilesystemEvent) error) error {
	kind := filesystem.EventType_EVENT_TYPE_REMOVE
	if mask&unix.IN_MOVE_SELF != 0 {
		kind = filesystem.EventType_EVENT_TYPE_RENAME
	}
	if err := emit(w.event(rootName, kind)); err != nil {
		return err
	}
	return errRootGone
}

func (w *watch) event(rel string, kind filesystem.EventType) *filesystem.FilesystemEvent {
	ev := &filesystem.FilesystemEvent{Name: shown(rel), Type: kind}
	gone := kind == filesystem.EventType_EVENT_TYPE_REMOVE || kind == filesystem.EventType_EVENT_TYPE_RENAME
	if w.entries && !gone {
		if e, err := entryInfo(path.Join(w.root, rel), w.files.users.Owners()); err == nil {
			ev.Entry = e
		}
	}
	return ev
}

func eventType(mask uint32) filesystem.EventType {
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return filesystem.EventType_EVENT_TYPE_CREATE
	case mask&unix.IN_MODIFY != 0:
		return filesystem.EventType_EVENT_TYPE_WRITE
	case mask&unix.IN_DELETE != 0:
		return filesystem.EventType_EVENT_TYPE_REMOVE
	case mask&unix.IN_MOVED_FROM != 0:
		return filesystem.EventType_EVENT_TYPE_RENAME
	case mask&unix.IN_ATTRIB != 0:
		return filesystem.EventType_EVENT_TYPE_CHMOD
	}
	return filesystem.EventType_EVENT_TYPE_UNSPECIFIED
}

// eachInotify calls f for each record of an inotify read. A record has wd, mask, cookie,
// length of the name, and the name padded with NULs.
func eachInotify(buf []byte, f func(wd int32, mask uint32, name string) error) error {
	for len(buf) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(buf))
		mask := binary.NativeEndian.Uint32(buf[4:])
		length := int(binary.NativeEndian.Uint32(buf[12:]))
		buf = buf[unix.SizeofInotifyEvent:]
		if length < 0 || length > len(buf) {
			return nil
		}
		name, _, _ := strings.Cut(string(buf[:length]), "\x00")
		buf = buf[length:]
		if err := f(wd, mask, name); err != nil {
			return err
		}
	}
	return nil
}

// WatchDir streams the changes in a directory until the client disconnects.
func (s *filesystemService) WatchDir(
	ctx context.Context, req *connect.Request[filesystem.WatchDirRequest],
	out *connect.ServerStream[filesystem.WatchDirResponse],
) error {
	w, err := s.newWatch(req.Header(), req.Msg)
	if err != nil {
		return err
	}
	defer w.close()
	if err := out.Send(&filesystem.WatchDirResponse{
		Event: &filesystem.WatchDirResponse_Start{Start: &filesystem.WatchDirResponse_StartEvent{}},
	}); err != nil {
		return err
	}
	// Events and keepalives come from two goroutines; a stream may be used by one at a time.
	var mu sync.Mutex
	over := make(chan error, 1)
	go func() {
		over <- w.run(func(ev *filesystem.FilesystemEvent) error {
			mu.Lock()
			defer mu.Unlock()
			return out.Send(&filesystem.WatchDirResponse{Event: &filesystem.WatchDirResponse_Filesystem{Filesystem: ev}})
		})
	}()
	ticker := time.NewTicker(answer.Keepalive(req.Header()))
	defer ticker.Stop()
	for {
		select {
		case err := <-over:
			return err
		case <-ctx.Done():
			w.close()
			<-over // the stream is not used after we return
			return answer.Ended(ctx)
		case <-ticker.C:
			mu.Lock()
			err := out.Send(&filesystem.WatchDirResponse{
				Event: &filesystem.WatchDirResponse_Keepalive{Keepalive: &filesystem.WatchDirResponse_KeepAlive{}},
			})
			mu.Unlock()
			if err != nil {
				w.close()
				<-over
				return err
			}
		}
	}
}

// watchers holds the watches whose events are collected.
type watchers struct {
	mu sync.Mutex
	// +checklocks:mu
	byID map[string]*watcher
}

type watcher struct {
	watch *watch

	mu sync.Mutex
	// +checklocks:mu
	events []*filesystem.FilesystemEvent
}

// CreateWatcher starts to collect the changes in a directory.
func (s *filesystemService) CreateWatcher(
	_ context.Context, req *connect.Request[filesystem.CreateWatcherRequest],
) (*connect.Response[filesystem.CreateWatcherResponse], error) {
	w, err := s.newWatch(req.Header(), req.Msg)
	if err != nil {
		return nil, err
	}
	detached := &watcher{watch: w}
	id, err := s.watchers.keep(detached)
	if err != nil {
		w.close()
		return nil, err
	}
	go func() {
		// The run ends when the watcher is removed.
		_ = w.run(func(ev *filesystem.FilesystemEvent) error {
			detached.mu.Lock()
			defer detached.mu.Unlock()
			if len(detached.events) >= maxQueued {
				detached.events = detached.events[1:]
			}
			detached.events = append(detached.events, ev)
			return nil
		})
	}()
	return connect.NewResponse(&filesystem.CreateWatcherResponse{WatcherId: id}), nil
}

func (ws *watchers) keep(w *watcher) (string, error) {
	var b [8]byte
	rand.Read(b[:])
	id := "w" + hex.EncodeToString(b[:])
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if len(ws.byID) >= maxWatchers {
		return "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("there are %d watchers already", maxWatchers))
	}
	if ws.byID == nil {
		ws.byID = map[string]*watcher{}
	}
	ws.byID[id] = w
	return id, nil
}

// GetWatcherEvents returns the events since the last call.
func (s *filesystemService) GetWatcherEvents(
	_ context.Context, req *connect.Request[filesystem.GetWatcherEventsRequest],
) (*connect.Response[filesystem.GetWatcherEventsResponse], error) {
	s.watchers.mu.Lock()
	w := s.watchers.byID[req.Msg.GetWatcherId()]
	s.watchers.mu.Unlock()
	if w == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such watcher"))
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	reply := &filesystem.GetWatcherEventsResponse{Events: w.events}
	w.events = nil
	return connect.NewResponse(reply), nil
}

// RemoveWatcher ends and removes a watcher.
func (s *filesystemService) RemoveWatcher(
	_ context.Context, req *connect.Request[filesystem.RemoveWatcherRequest],
) (*connect.Response[filesystem.RemoveWatcherResponse], error) {
	s.watchers.mu.Lock()
	w := s.watchers.byID[req.Msg.GetWatcherId()]
	delete(s.watchers.byID, req.Msg.GetWatcherId())
	s.watchers.mu.Unlock()
	if w == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such watcher"))
	}
	w.watch.close()
	return connect.NewResponse(&filesystem.RemoveWatcherResponse{}), nil
}
