package file

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cayhq/cay/internal/agent/account"
	"github.com/cayhq/cay/internal/agent/answer"
	"github.com/cayhq/cay/internal/agentapi/filesystem"
	"github.com/cayhq/cay/internal/fault"
)

// filesystemService implements the service filesystem.Filesystem. Its methods that
// watch directories are in watch.go.
type filesystemService struct {
	filesystem.UnimplementedFilesystemHandler

	files    *Files
	watchers *watchers
}

// resolve returns the user of a call and the call's path, made absolute for that user.
func (s *filesystemService) resolve(h http.Header, p string) (*account.User, string, error) {
	u, err := account.OfCall(s.files.users, s.files.settings, h, "")
	if err != nil {
		return nil, "", answer.Connect(err)
	}
	abs, err := account.ResolvePath(p, u.Home)
	if err != nil {
		return nil, "", answer.Connect(err)
	}
	return u, abs, nil
}

// Stat describes the file or directory at a path.
func (s *filesystemService) Stat(
	_ context.Context, req *connect.Request[filesystem.StatRequest],
) (*connect.Response[filesystem.StatResponse], error) {
	_, p, err := s.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	e, err := entryInfo(p, s.files.users.Owners())
	if err != nil {
		return nil, statErr(err, p)
	}
	return connect.NewResponse(&filesystem.StatResponse{Entry: e}), nil
}

// statErr converts an error of a stat. A path below a file does not exist for the client.
func statErr(err error, p string) error {
	if errors.Is(err, syscall.ENOTDIR) {
		err = syscall.ENOENT
	}
	return answer.Connect(answer.OfFile(err, p))
}

// MakeDir makes a directory and its parents.
func (s *filesystemService) MakeDir(
	_ context.Context, req *connect.Request[filesystem.MakeDirRequest],
) (*connect.Response[filesystem.MakeDirResponse], error) {
	u, p, err := s.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	switch st, err := os.Stat(p); {
	case err == nil && st.IsDir():
		return nil, connect.NewError(connect.CodeAlreadyExists, errors.New("directory "+p+" exists already"))
	case err == nil:
		return nil, answer.Connect(answer.New(fault.CodePathNotDirectory, "path %q exists and is not a directory", p))
	}
	if err := makeDirs(p, u); err != nil {
		return nil, answer.Connect(answer.OfFile(err, p))
	}
	e, err := entryInfo(p, s.files.users.Owners())
	if err != nil {
		return nil, statErr(err, p)
	}
	return connect.NewResponse(&filesystem.MakeDirResponse{Entry: e}), nil
}

// Move renames a file or directory and makes the destination's missing parents.
func (s *filesystemService) Move(
	_ context.Context, req *connect.Request[filesystem.MoveRequest],
) (*connect.Response[filesystem.MoveResponse], error) {
	u, from, err := s.resolve(req.Header(), req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	to, err := account.ResolvePath(req.Msg.GetDestination(), u.Home)
	if err != nil {
		return nil, answer.Connect(err)
	}
	if _, err := os.Lstat(from); err != nil {
		return nil, statErr(err, from)
	}
	if err := makeParents(to, u); err != nil {
		return nil, answer.Connect(answer.OfFile(err, to))
	}
	if err := os.Rename(from, to); err != nil {
		return nil, answer.Connect(answer.OfFile(err, to))
	}
	e, err := entryInfo(to, s.files.users.Owners())
	if err != nil {
		return nil, statErr(err, to)
	}
	return connect.NewResponse(&filesystem.MoveResponse{Entry: e}), nil
}

// ListDir lists a directory some levels deep, parents before children.
func (s *filesystemService) ListDir(
	ctx context.Context, req *connect.Request[filesystem.ListDirRequest],
) (*connect.Response[filesystem.ListDirResponse], error) {
	_, p, err := s.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	names, err := readNames(p)
	if err != nil {
		return nil, answer.Connect(answer.OfFile(err, p))
	}
	reply := &filesystem.ListDirResponse{}
	depth := min(max(req.Msg.GetDepth(), 1), maxDepth)
	s.listInto(ctx, reply, s.files.users.Owners(), p, names, int(depth))
	if ctx.Err() != nil {
		return nil, answer.Ended(ctx)
	}
	return connect.NewResponse(reply), nil
}

func (s *filesystemService) listInto(ctx context.Context, reply *filesystem.ListDirResponse, o account.Owners,
	dir string, names []string, depth int,
) {
	for _, name := range names {
		if ctx.Err() != nil {
			return
		}
		p := path.Join(dir, name)
		e, err := entryInfo(p, o)
		if err != nil {
			continue // removed meanwhile
		}
		reply.Entries = append(reply.Entries, e)
		if depth <= 1 || e.Type != filesystem.FileType_FILE_TYPE_DIRECTORY || e.SymlinkTarget != nil {
			continue
		}
		// A directory that cannot be listed is still an entry.
		if below, err := readNames(p); err == nil {
			s.listInto(ctx, reply, o, p, below, depth-1)
		}
	}
}

// Remove removes the file or directory at a path with all below it. It succeeds if
// the path does not exist.
func (s *filesystemService) Remove(
	_ context.Context, req *connect.Request[filesystem.RemoveRequest],
) (*connect.Response[filesystem.RemoveResponse], error) {
	_, p, err := s.resolve(req.Header(), req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	var known *answer.Problem
	if err := removePath(p, true); errors.As(err, &known) && known.Code == fault.CodeFileNotFound {
		return connect.NewResponse(&filesystem.RemoveResponse{}), nil
	} else if err != nil {
		return nil, answer.Connect(err)
	}
	return connect.NewResponse(&filesystem.RemoveResponse{}), nil
}

// entryInfo describes the entry at p as E2B's server does: a link has the type and
// the mode of its target, and everything else of its own.
func entryInfo(p string, o account.Owners) (*filesystem.EntryInfo, error) {
	st, err := os.Lstat(p)
	if err != nil {
		return nil, err
	}
	sys := st.Sys().(*syscall.Stat_t)
	e := &filesystem.EntryInfo{
		Name:         shown(path.Base(p)),
		Type:         fileType(st.Mode()),
		Path:         shown(p),
		Size:         st.Size(),
		Mode:         uint32(st.Mode().Perm()),
		Permissions:  st.Mode().String(),
		Owner:        o.User(sys.Uid),
		Group:        o.Group(sys.Gid),
		ModifiedTime: timestamppb.New(st.ModTime()),
	}
	if st.Mode()&fs.ModeSymlink == 0 {
		e.Metadata = getMetadata(p)
		return e, nil
	}
	e.Type = filesystem.FileType_FILE_TYPE_UNSPECIFIED
	target, err := filepath.EvalSymlinks(p)
	if err != nil {
		// The link dangles or is part of a loop; only its text is known.
		if target, err = os.Readlink(p); err != nil {
			return nil, err
		}
		e.SymlinkTarget = new(shown(target))
		return e, nil
	}
	e.SymlinkTarget = new(shown(target))
	if real, err := os.Stat(p); err == nil {
		e.Type, e.Mode, e.Metadata = fileType(real.Mode()), uint32(real.Mode().Perm()), getMetadata(p)
	}
	return e, nil
}

// shown returns a name as valid UTF-8, since a message refuses other strings.
func shown(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

func fileType(m fs.FileMode) filesystem.FileType {
	switch {
	case m.IsRegular():
		return filesystem.FileType_FILE_TYPE_FILE
	case m.IsDir():
		return filesystem.FileType_FILE_TYPE_DIRECTORY
	case m&fs.ModeSymlink != 0:
		return filesystem.FileType_FILE_TYPE_SYMLINK
	}
	return filesystem.FileType_FILE_TYPE_UNSPECIFIED
}
