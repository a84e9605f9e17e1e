// Package account holds the accounts of a sandbox and the host's settings for it. It tells as which
// user a call acts, and where that user's paths lead.
//
// Everything is safe for concurrent use. Accounts are those of the image's /etc/passwd and
// /etc/group, which programs inside may change at any time.
package account

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cayhq/cay/internal/agent/answer"
)

// User describes the account that a command runs as or that owns new files.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32 // supplementary groups, gid included, sorted
	Home   string
}

// Users looks accounts up in /etc/passwd and /etc/group. It reads the files again
// when they have changed. It is safe for concurrent use.
//
// It parses the files itself. github.com/moby/sys/user takes a number that it cannot
// parse for 0, so that a broken line makes an account root; it refuses numbers above
// 2³¹-1, and takes a user whose name is a number for that number.
type Users struct {
	passwd string // path
	group  string // path

	mu sync.Mutex
	// +checklocks:mu
	stamps [2]fileStamp // of passwd and group when cached and names were read
	// +checklocks:mu
	cached map[string]*User
	// +checklocks:mu
	names *Owners // nil when not read yet; its content never changes
}

// NewUsers returns the accounts of the files passwd and group.
func NewUsers(passwd, group string) *Users { return &Users{passwd: passwd, group: group} }

type fileStamp struct {
	ino   uint64
	size  int64
	mtime unix.Timespec
}

func stampOf(path string) fileStamp {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return fileStamp{}
	}
	return fileStamp{ino: st.Ino, size: st.Size, mtime: st.Mtim}
}

// refreshLocked forgets what was read from files that have changed since.
//
// +checklocks:u.mu
func (u *Users) refreshLocked() {
	now := [2]fileStamp{stampOf(u.passwd), stampOf(u.group)}
	if now != u.stamps || u.cached == nil {
		u.stamps, u.cached, u.names = now, map[string]*User{}, nil
	}
}

// Lookup returns the user that spec names as in Docker: "name", "uid", "name:group"
// or "uid:gid". A number that no line has gives a user without a name, whose home is
// "/". With a group, the user has no supplementary groups. The error is answer.ErrUnknownUser
// or one of reading the files.
func (u *Users) Lookup(spec string) (*User, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.refreshLocked()
	if known, ok := u.cached[spec]; ok {
		return known, nil
	}
	found, err := u.find(spec)
	if err != nil {
		return nil, err
	}
	const enough = 256 // users; bounds the memory of lookups of many numbers
	if len(u.cached) >= enough {
		clear(u.cached)
	}
	u.cached[spec] = found
	return found, nil
}

func (u *Users) find(spec string) (*User, error) {
	name, group, withGroup := strings.Cut(spec, ":")
	if name == "" || withGroup && group == "" {
		return nil, fmt.Errorf("%w %q", answer.ErrUnknownUser, spec)
	}
	found, err := u.findUser(name)
	if err != nil {
		return nil, err
	}
	if withGroup {
		if found.GID, err = u.findGroup(group); err != nil {
			return nil, err
		}
		found.Groups = []uint32{found.GID}
		return found, nil
	}
	found.Groups = []uint32{found.GID}
	err = eachLine(u.group, func(line string) {
		g, ok := parseGroup(line)
		if ok && found.Name != "" && slices.Contains(g.members, found.Name) {
			found.Groups = append(found.Groups, g.gid)
		}
	})
	slices.Sort(found.Groups)
	found.Groups = slices.Compact(found.Groups)
	return found, err
}

func (u *Users) findUser(name string) (*User, error) {
	number, numErr := parseID(name)
	var byName, byNumber *User
	err := eachLine(u.passwd, func(line string) {
		p, ok := parsePasswd(line)
		if !ok {
			return
		}
		if p.Name == name && byName == nil {
			byName = &p
		}
		if numErr == nil && p.UID == number && byNumber == nil {
			byNumber = &p
		}
	})
	switch {
	case err != nil:
		return nil, err
	case byName != nil:
		return byName, nil
	case byNumber != nil:
		return byNumber, nil
	case numErr == nil:
		return &User{UID: number, GID: 0, Home: "/"}, nil
	case name == "root":
		// Root exists even in an image without a passwd file.
		return &User{Name: "root", Home: "/"}, nil
	}
	return nil, fmt.Errorf("%w %q", answer.ErrUnknownUser, name)
}

func (u *Users) findGroup(name string) (uint32, error) {
	number, numErr := parseID(name)
	var gid uint32
	var found bool
	err := eachLine(u.group, func(line string) {
		if g, ok := parseGroup(line); ok && g.name == name && !found {
			gid, found = g.gid, true
		}
	})
	switch {
	case err != nil:
		return 0, err
	case found:
		return gid, nil
	case numErr == nil:
		return number, nil
	}
	return 0, fmt.Errorf("%w: group %q", answer.ErrUnknownUser, name)
}

// GroupNamed returns the number of a group.
func (u *Users) GroupNamed(name string) (uint32, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.findGroup(name)
}

// Owners maps numbers of users and groups to names, as the account files were when it was made. A listing
// uses one for all its entries: a check whether the account files have changed costs more than a stat of
// an entry.
type Owners struct{ users, groups map[uint32]string }

// User returns the name of the user with a number, or the number if no line has it.
func (o Owners) User(uid uint32) string { return nameIn(o.users, uid) }

// Group returns the name of the group with a number, or the number if no line has it.
func (o Owners) Group(gid uint32) string { return nameIn(o.groups, gid) }

func nameIn(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

// Owners returns the present names of users and groups.
func (u *Users) Owners() Owners {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.refreshLocked()
	if u.names == nil {
		// A file that cannot be read gives no names.
		o := Owners{map[uint32]string{}, map[uint32]string{}}
		_ = eachLine(u.passwd, func(line string) {
			p, _ := parsePasswd(line)
			note(o.users, p.UID, p.Name)
		})
		_ = eachLine(u.group, func(line string) {
			g, _ := parseGroup(line)
			note(o.groups, g.gid, g.name)
		})
		u.names = &o
	}
	return *u.names
}

// note adds a name to names unless the number has one already.
func note(names map[uint32]string, id uint32, name string) {
	if _, taken := names[id]; name != "" && !taken {
		names[id] = name
	}
}

// parseID parses the number of a user or group. It refuses the largest number, which
// means "no change" to the kernel and belongs to no account.
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 {
		err = strconv.ErrRange
	}
	return uint32(n), err
}

// parsePasswd parses name:password:uid:gid:comment:home:shell.
func parsePasswd(line string) (User, bool) {
	f := strings.Split(line, ":")
	if len(f) < 6 || f[0] == "" {
		return User{}, false
	}
	uid, err := parseID(f[2])
	if err != nil {
		return User{}, false
	}
	gid, err := parseID(f[3])
	if err != nil {
		return User{}, false
	}
	u := User{Name: f[0], UID: uid, GID: gid, Home: f[5]}
	if !strings.HasPrefix(u.Home, "/") {
		u.Home = "/"
	}
	return u, true
}

type groupLine struct {
	name    string
	gid     uint32
	members []string
}

// parseGroup parses name:password:gid:member,member.
func parseGroup(line string) (groupLine, bool) {
	f := strings.Split(line, ":")
	if len(f) < 4 || f[0] == "" {
		return groupLine{}, false
	}
	gid, err := parseID(f[2])
	if err != nil {
		return groupLine{}, false
	}
	return groupLine{name: f[0], gid: gid, members: strings.Split(f[3], ",")}, true
}

// eachLine calls f with every line of a file that is not a comment. A missing file
// and one that is not regular have no lines. It reads the first 4 MiB of a file; a line
// longer than 64 KiB is an error.
func eachLine(path string, f func(line string)) error {
	// O_NONBLOCK keeps a FIFO in the file's place from stopping the agent.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) ||
		errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading users: %w", err)
	}
	defer file.Close()
	if st, err := file.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil // an image may have anything there
	}
	lines := bufio.NewScanner(io.LimitReader(file, 4<<20))
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" && line[0] != '#' {
			f(line)
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("reading users from %s: %w", path, err)
	}
	return nil
}
