package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// maxAccounts bounds /etc/passwd and similar files, which are edited in memory.
const maxAccounts = 1 << 20 // bytes

// searchPath has the directories in which programs of Require are looked for: those of a login
// shell and sudo, and that of Go's own images.
var searchPath = []string{"/usr/local/go/bin", "/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin",
	"/bin"}

// setUp changes the tree as a Setup says. It runs no code of the image.
func (t *tree) setUp(s Setup) error {
	t.layer++
	for _, pattern := range s.Remove {
		if err := t.remove(pattern); err != nil {
			return fmt.Errorf("removing %s: %w", pattern, err)
		}
	}
	for _, u := range s.Users {
		if err := t.addUser(u); err != nil {
			return fmt.Errorf("adding user %s: %w", u.Name, err)
		}
	}
	for _, f := range s.Files {
		if err := t.writeFile(f); err != nil {
			return fmt.Errorf("writing %s: %w", f.Path, err)
		}
	}
	return nil
}

// missing returns the programs that are not on searchPath as an executable.
func (t *tree) missing(programs []string) []string {
	var missing []string
	for _, name := range programs {
		found := slices.ContainsFunc(searchPath, func(dir string) bool {
			n, err := t.lookup(path.Join(dir, name))
			return err == nil && n.inode.kind() == typeRegular && n.inode.mode&0o111 != 0
		})
		if !found {
			missing = append(missing, name)
		}
	}
	return missing
}

// remove removes what matches a pattern, directory by directory, without following symbolic
// links. It is no error if nothing matches.
func (t *tree) remove(pattern string) error {
	parts, err := split(pattern)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return fmt.Errorf("pattern %q names the root", pattern)
	}
	at := []*node{t.root}
	for _, part := range parts {
		var next []*node
		for _, dir := range at {
			for name, c := range dir.children {
				ok, err := path.Match(part, name)
				if err != nil {
					return err
				}
				if ok {
					next = append(next, c)
				}
			}
		}
		at = next
	}
	for _, n := range at {
		t.drop(n)
	}
	return nil
}

// writeFile writes a regular file. It replaces a symbolic link at the path, and does not follow
// it.
func (t *tree) writeFile(f File) error {
	parts, err := split(f.Path)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return fmt.Errorf("path %q names the root", f.Path)
	}
	dir, err := t.parent(parts)
	if err != nil {
		return err
	}
	i := &inode{mode: typeRegular | uint16(f.Mode&0o7777), uid: uint32(f.UID), gid: uint32(f.GID),
		size: int64(len(f.Content)), mtime: t.root.inode.mtime, mtimeNs: t.root.inode.mtimeNs}
	if i.off, err = t.store(strings.NewReader(f.Content), i.size); err != nil {
		return err
	}
	_, err = t.put(dir, parts[len(parts)-1], i)
	return err
}

// edit changes a text file, keeping its owner and mode. A missing one starts empty with the given
// mode.
func (t *tree) edit(name string, mode uint32, change func([]byte) []byte) error {
	var old []byte
	f := File{Path: name, Mode: mode}
	if n, err := t.lookup(name); err == nil {
		if old, err = t.read(n.inode, maxAccounts); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		f.Mode, f.UID, f.GID = uint32(n.inode.mode&0o7777), int(n.inode.uid), int(n.inode.gid)
		f.Path = t.path(n) // where links led; the file is replaced, not a link to it
	}
	f.Content = string(change(old))
	return t.writeFile(f)
}

// addUser makes an account, its group, its home and its right to use sudo.
func (t *tree) addUser(u User) error {
	if u.Name == "" || strings.ContainsAny(u.Name+u.Home+u.Shell, ":\n\x00") || !strings.HasPrefix(u.Home, "/") ||
		u.UID <= 0 {
		return fmt.Errorf("account %q (%d, home %q) is not one", u.Name, u.UID, u.Home)
	}
	id := strconv.Itoa(u.UID)
	isIt := func(name, number string) bool { return name == u.Name || number == id }
	if err := t.edit("/etc/passwd", 0o644, func(b []byte) []byte {
		b = keepLines(b, func(f []string) bool { return len(f) < 3 || !isIt(f[0], f[2]) })
		return fmt.Appendf(b, "%s:x:%s:%s::%s:%s\n", u.Name, id, id, u.Home, u.Shell)
	}); err != nil {
		return err
	}
	if err := t.edit("/etc/group", 0o644, func(b []byte) []byte {
		b = keepLines(b, func(f []string) bool { return len(f) < 3 || !isIt(f[0], f[2]) })
		b = joinGroups(b, u, 3)
		return fmt.Appendf(b, "%s:x:%s:\n", u.Name, id)
	}); err != nil {
		return err
	}
	byName := func(f []string) bool { return f[0] != u.Name }
	// "*" means that no password is valid; 19000 is a date of the last change that requires no
	// new password.
	if err := t.edit("/etc/shadow", 0o640, func(b []byte) []byte {
		return fmt.Appendf(keepLines(b, byName), "%s:*:19000:0:99999:7:::\n", u.Name)
	}); err != nil {
		return err
	}
	if err := t.edit("/etc/gshadow", 0o640, func(b []byte) []byte {
		return fmt.Appendf(joinGroups(keepLines(b, byName), u, 3), "%s:!::\n", u.Name)
	}); err != nil {
		return err
	}
	if u.Sudo {
		if err := t.writeFile(File{Path: "/etc/sudoers.d/90-" + u.Name, Mode: 0o440,
			Content: u.Name + " ALL=(ALL:ALL) NOPASSWD:ALL\n"}); err != nil {
			return err
		}
	}
	return t.makeHome(u)
}

// HasUser reports whether the image's /etc/passwd has an account of the name.
func (s *Store) HasUser(ctx context.Context, digest, name string) (bool, error) {
	t, err := s.tree(ctx, digest)
	if err != nil {
		return false, err
	}
	defer t.Close()
	n, err := t.lookup("/etc/passwd")
	if errors.Is(err, errNotThere) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("/etc/passwd of the image: %w", err)
	}
	b, err := t.read(n.inode, maxAccounts)
	if err != nil {
		return false, fmt.Errorf("/etc/passwd of the image: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if account, _, ok := strings.Cut(line, ":"); ok && account == name {
			return true, nil
		}
	}
	return false, nil
}

// makeHome makes the home directory with the files of /etc/skel. An existing one keeps its files.
func (t *tree) makeHome(u User) error {
	parts, err := split(u.Home)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return fmt.Errorf("home %q is the root", u.Home)
	}
	dir, err := t.parent(parts)
	if err != nil {
		return err
	}
	owned := func(mode uint16, i inode) *inode {
		i.mode, i.uid, i.gid, i.links = mode, uint32(u.UID), uint32(u.UID), 0
		return &i
	}
	home, err := t.put(dir, parts[len(parts)-1],
		owned(typeDir|0o755, inode{mtime: t.root.inode.mtime, mtimeNs: t.root.inode.mtimeNs}))
	if err != nil {
		return err
	}
	skel, err := t.lookup("/etc/skel")
	if err != nil || !skel.isDir() {
		return nil // an image without /etc/skel has empty homes
	}
	for _, c := range skel.sorted() {
		if _, there := home.children[c.name]; there || c.inode.kind() != typeRegular {
			continue
		}
		if _, err := t.put(home, c.name, owned(c.inode.mode, *c.inode)); err != nil {
			return err
		}
	}
	return nil
}

// keepLines removes the lines of a colon-separated file for which keep returns false, and ends
// the last line.
func keepLines(b []byte, keep func(fields []string) bool) []byte {
	var out []byte
	for line := range bytes.Lines(b) {
		line = bytes.TrimRight(line, "\r\n")
		if len(line) > 0 && keep(strings.Split(string(line), ":")) {
			out = append(append(out, line...), '\n')
		}
	}
	return out
}

// joinGroups adds the user to the member lists (field number at) of its groups.
func joinGroups(b []byte, u User, at int) []byte {
	var out []byte
	for line := range bytes.Lines(b) {
		f := strings.Split(strings.TrimRight(string(line), "\n"), ":")
		if len(f) > at && slices.Contains(u.Groups, f[0]) {
			members := strings.FieldsFunc(f[at], func(r rune) bool { return r == ',' })
			if !slices.Contains(members, u.Name) {
				f[at] = strings.Join(append(members, u.Name), ",")
			}
		}
		out = append(append(out, strings.Join(f, ":")...), '\n')
	}
	return out
}
