package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// copyCommand returns the verb that copies files between this machine and a sandbox.
func (a *app) copyCommand() *cobra.Command {
	var recursive bool
	var owner string
	cmd := &cobra.Command{
		Use:   "cp [-r] SOURCE DESTINATION",
		Short: "Copy files and folders into or out of a sandbox",
		Long: `Copy a file, or with -r a folder, into or out of a sandbox. One path is local,
the other is ID:PATH with an absolute path. As with cp, the source is copied into a
destination that is a folder, and a source that ends in /. stands for the content of
the folder. Links are copied as links; sockets, pipes and devices are left out.`,
		Example: `  cay sandbox cp data.csv sbx_…:/home/user/
  cay sandbox cp -r src sbx_…:/home/user/src
  cay sandbox cp -r sbx_…:/home/user/out/. results`,
		Args: theArgs("SOURCE", "DESTINATION"),
		RunE: func(cmd *cobra.Command, args []string) error {
			from, err := parsePlace("SOURCE", args[0])
			if err != nil {
				return err
			}
			to, err := parsePlace("DESTINATION", args[1])
			if err != nil {
				return err
			}
			if (from.id == "") == (to.id == "") {
				return errors.New("one of SOURCE and DESTINATION must be in a sandbox, as ID:/path, and the other local")
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			t := &transfer{app: a, client: c, recursive: recursive, owner: owner}
			if to.id != "" {
				return pathIs("DESTINATION", t.in(cmd.Context(), from.path, to))
			}
			if owner != "" {
				return errors.New("--owner: is for copying into a sandbox")
			}
			return pathIs("SOURCE", t.out(cmd.Context(), from, to.path))
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "copy folders with all their content")
	cmd.Flags().StringVar(&owner, "owner", "", "name or number of the owner in the sandbox (default the template's user)")
	return cmd
}

// pathIs names the argument in an error of the API about the field path.
func pathIs(name string, err error) error {
	var refused *cay.Error
	if !errors.As(err, &refused) || refused.Field != "path" {
		return err
	}
	told := *refused
	told.Field = name
	return &told
}

// place names a path in a sandbox, or on this machine if id is empty.
type place struct{ id, path string }

// sandboxPlace matches ID:PATH. A local path may have colons too, but not after the prefix of an id.
var sandboxPlace = regexp.MustCompile(`^(sbx_[^:/]*):(.*)$`)

// parsePlace parses the argument of the name.
func parsePlace(name, text string) (place, error) {
	if text == "" {
		return place{}, fmt.Errorf("%s: is empty", name)
	}
	m := sandboxPlace.FindStringSubmatch(text)
	if m == nil {
		return place{path: text}, nil
	}
	if !strings.HasPrefix(m[2], "/") {
		return place{}, fmt.Errorf("%s: the path in a sandbox must be absolute, not %q", name, m[2])
	}
	return place{m[1], m[2]}, nil
}

// transfer copies files between this machine and a sandbox.
type transfer struct {
	app       *app
	client    *cay.Client
	recursive bool
	owner     string
}

// contents reports whether a path names the content of a folder and not the folder.
func contents(p string) bool { return strings.HasSuffix(p, "/.") || p == "." }

// errNeedsRecursive refuses to copy a folder without -r.
var errNeedsRecursive = errors.New("is a folder: copy it with -r")

// in copies into a sandbox.
func (t *transfer) in(ctx context.Context, local string, to place) error {
	info, err := os.Stat(local)
	if err != nil {
		return fmt.Errorf("SOURCE: %w", err)
	}
	if info.IsDir() && !t.recursive {
		return fmt.Errorf("SOURCE: %s %w", local, errNeedsRecursive)
	}
	dest := to.path
	if !info.IsDir() || !contents(local) {
		into, err := t.isFolder(ctx, to)
		if err != nil {
			return err
		}
		if into {
			abs, err := filepath.Abs(local) // gives .. a name
			if err != nil {
				return fmt.Errorf("SOURCE: %w", err)
			}
			dest = path.Join(dest, filepath.Base(abs))
		}
	}
	p := t.app.progress()
	defer p.done()
	if !info.IsDir() {
		f, info, err := openFile(local)
		if err != nil {
			return err
		}
		defer f.Close()
		body := &counting{Reader: f, p: p, what: "copying " + filepath.Base(local) + ":", total: info.Size()}
		return t.client.WriteFile(ctx, to.id, dest, body,
			cay.WriteFileOptions{Mode: new(info.Mode().Perm()), Owner: t.owner, Size: info.Size()})
	}
	archive, w := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := packFolder(w, local)
		w.CloseWithError(err)
		packed <- err
	}()
	body := &counting{Reader: archive, p: p, what: "copying " + local + ":"}
	err = t.client.UploadTree(ctx, to.id, path.Clean(dest), body, t.owner)
	archive.CloseWithError(io.ErrClosedPipe) // ends the packing after an error
	if broken := <-packed; broken != nil && !errors.Is(broken, io.ErrClosedPipe) {
		return fmt.Errorf("SOURCE: %w", broken)
	}
	return err
}

// isFolder reports whether a place in a sandbox is an existing folder, or a link to one. A place that does not exist
// counts as a folder if its path ends in a slash.
func (t *transfer) isFolder(ctx context.Context, at place) (bool, error) {
	for range 8 { // links; a longer chain is a loop
		e, err := t.client.StatFile(ctx, at.id, path.Clean(at.path))
		if cay.HasCode(err, "file_not_found") {
			return strings.HasSuffix(at.path, "/"), nil
		}
		if err != nil {
			return false, err
		}
		if e.SymlinkTarget == nil {
			return e.Type == cay.FileEntryTypeDirectory, nil
		}
		if next := *e.SymlinkTarget; path.IsAbs(next) {
			at.path = path.Clean(next)
		} else {
			at.path = path.Join(path.Dir(path.Clean(at.path)), next)
		}
	}
	return false, nil
}

// out copies out of a sandbox.
func (t *transfer) out(ctx context.Context, from place, local string) error {
	folder, err := t.isFolder(ctx, place{from.id, strings.TrimSuffix(path.Clean(from.path), "/")})
	if err != nil {
		return err
	}
	if path.Clean(from.path) == "/" {
		folder = true
	}
	if folder && !t.recursive {
		return fmt.Errorf("SOURCE: %s %w", from.path, errNeedsRecursive)
	}
	dest := local
	info, err := os.Stat(local)
	switch {
	case err == nil && info.IsDir() && !(folder && contents(from.path)):
		dest = filepath.Join(local, path.Base(path.Clean(from.path)))
	case err == nil && !info.IsDir() && folder:
		return fmt.Errorf("DESTINATION: %s is a file", local)
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("DESTINATION: %w", err)
	case err != nil && !folder && strings.HasSuffix(local, "/"):
		return fmt.Errorf("DESTINATION: there is no folder %s", local)
	}
	p := t.app.progress()
	defer p.done()
	if !folder {
		f, err := t.client.ReadFile(ctx, from.id, from.path, cay.ReadFileOptions{})
		if err != nil {
			return err
		}
		defer f.Close()
		what := "copying " + path.Base(from.path) + ":"
		return writeWhole(dest, &counting{Reader: f, p: p, what: what, total: max(f.Size, 0)})
	}
	archive, err := t.client.DownloadTree(ctx, from.id, path.Clean(from.path))
	if err != nil {
		return err
	}
	defer archive.Close()
	return unpackFolder(dest, &counting{Reader: archive, p: p, what: "copying " + from.path + ":"})
}

// watchCommand returns the verb that prints the changes in a folder of a sandbox.
func (a *app) watchCommand() *cobra.Command {
	var recursive bool
	cmd := &cobra.Command{
		Use:               "watch ID PATH",
		Short:             "Print the changes in a folder of a sandbox",
		Long:              "Print the changes in a folder of a sandbox, one on each line, until cay is stopped.\nThis keeps the sandbox awake. With --json each line is an object.",
		Example:           "  cay sandbox watch sbx_… /home/user\n  cay sandbox watch -r sbx_… /home/user/src --json | jq -r .path",
		Args:              theArgs("ID", "PATH"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			ready := func() {
				if !a.json {
					fmt.Fprintf(a.err, "watching %s\n", printable(args[1]))
				}
			}
			return c.WatchFiles(cmd.Context(), args[0], args[1], recursive, ready, func(f cay.FileChange) error {
				if a.json {
					return a.printJSONLine(f)
				}
				_, err := fmt.Fprintf(a.out, "%s\t%s\n", f.Type, printable(f.Path))
				return err
			})
		},
	}
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "watch all folders below it too")
	return cmd
}
