package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	cay "github.com/cayhq/cay/sdk/go"
)

// uploadCommand returns the verb that copies a file into a sandbox.
func (a *app) uploadCommand() *cobra.Command {
	var mode, owner string
	cmd := &cobra.Command{
		Use:   "upload ID LOCAL PATH",
		Short: "Copy a file into a sandbox",
		Long: `Copy a file of up to 100 MB into a sandbox; - is standard input. PATH is absolute;
if it ends in /, the file's name is added. Folders are made as needed, and the file
appears whole or not at all. It keeps its permissions unless you give --mode.`,
		Example:           "  cay sandbox upload sbx_… data.csv /home/user/data.csv\n  tar c src | cay sandbox upload sbx_… - /tmp/src.tar",
		Args:              theArgs("ID", "LOCAL", "PATH"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			id, local, remote := args[0], args[1], args[2]
			if strings.HasSuffix(remote, "/") && local != "-" {
				remote += filepath.Base(local)
			}
			o := cay.WriteFileOptions{Owner: owner}
			var body io.Reader = a.in
			p := a.progress()
			defer p.done()
			if local != "-" {
				f, info, err := openFile(local)
				if err != nil {
					return err
				}
				defer f.Close()
				o.Mode, o.Size = new(info.Mode().Perm()), info.Size()
				body = f
			}
			if mode != "" {
				bits, err := strconv.ParseUint(mode, 8, 12)
				if err != nil {
					return fmt.Errorf("--mode: %q is not an octal mode such as 0644", mode)
				}
				o.Mode = new(fs.FileMode(bits & 0o777))
				for bit, is := range map[uint64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
					if bits&bit != 0 {
						*o.Mode |= is
					}
				}
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			if o.Size > 0 || local == "-" {
				body = &counting{Reader: body, p: p, what: "uploading " + filepath.Base(local) + ":", total: o.Size}
			}
			return c.WriteFile(cmd.Context(), id, remote, body, o)
		},
	}
	cmd.Flags().StringVar(&mode, "mode", "", "permissions in octal, such as 0644")
	cmd.Flags().StringVar(&owner, "owner", "", "name or number of the owner (default the template's user)")
	return cmd
}

// openFile opens a local file to be sent. It refuses directories and files that are too large.
func openFile(local string) (*os.File, fs.FileInfo, error) {
	f, err := os.Open(local)
	if err != nil {
		return nil, nil, fmt.Errorf("LOCAL: %w", err)
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s is a directory; send a tar of it", local)
	}
	if err == nil && info.Mode().IsRegular() && info.Size() > cay.MaxFile {
		err = fmt.Errorf("%s has %s, a file may have %s", local, bytesText(info.Size()), bytesText(cay.MaxFile))
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("LOCAL: %w", err), f.Close())
	}
	return f, info, nil
}

// downloadCommand returns the verb that copies a file out of a sandbox.
func (a *app) downloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "download ID PATH [LOCAL]",
		Short: "Copy a file out of a sandbox",
		Long: `Copy a file out of a sandbox. LOCAL is a file or a folder, by default the
current one; - is standard output. The file appears whole or not at all.`,
		Example:           "  cay sandbox download sbx_… /home/user/result.json\n  cay sandbox download sbx_… /var/log/app.log - | tail",
		Args:              theArgs("ID", "PATH", "[LOCAL]"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			id, remote, local := args[0], args[1], "."
			if len(args) > 2 {
				local = args[2]
			}
			if info, err := os.Stat(local); local != "-" && err == nil && info.IsDir() {
				local = filepath.Join(local, path.Base(remote))
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			f, err := c.ReadFile(cmd.Context(), id, remote, cay.ReadFileOptions{})
			if err != nil {
				return err
			}
			defer f.Close()
			p := a.progress()
			defer p.done()
			body := &counting{Reader: f, p: p, what: "downloading " + path.Base(remote) + ":", total: max(f.Size, 0)}
			if local == "-" {
				_, err = io.Copy(a.out, body)
				return quiet(err)
			}
			return writeWhole(local, body)
		},
	}
}

// writeWhole writes a local file, which appears whole or not at all.
func writeWhole(local string, body io.Reader) error {
	if info, err := os.Stat(local); err == nil && !info.Mode().IsRegular() {
		// A device or a pipe is written to and not replaced.
		f, err := os.OpenFile(local, os.O_WRONLY, 0)
		if err != nil {
			return fmt.Errorf("LOCAL: %w", err)
		}
		_, err = io.Copy(f, body)
		return errors.Join(err, f.Close())
	}
	f, err := os.CreateTemp(filepath.Dir(local), ".cay-*")
	if err != nil {
		return fmt.Errorf("LOCAL: %w", err)
	}
	defer os.Remove(f.Name()) // fails once the file is renamed
	if _, err := io.Copy(f, body); err != nil {
		return errors.Join(fmt.Errorf("downloading: %w", err), f.Close())
	}
	// CreateTemp gives the file to its owner alone; a download has the permissions of any new file.
	if err := errors.Join(f.Chmod(0o666&^umask()), f.Close()); err != nil {
		return fmt.Errorf("LOCAL: %w", err)
	}
	if err := os.Rename(f.Name(), local); err != nil {
		return fmt.Errorf("LOCAL: %w", err)
	}
	return nil
}

// lsCommand returns the verb that lists a directory of a sandbox.
func (a *app) lsCommand() *cobra.Command {
	var depth int
	cmd := &cobra.Command{
		Use:               "ls ID [PATH]",
		Short:             "List a directory of a sandbox",
		Example:           "  cay sandbox ls sbx_… /home/user\n  cay sandbox ls sbx_… /etc --depth 2",
		Args:              theArgs("ID", "[PATH]"),
		ValidArgsFunction: a.completeSandboxes,
		RunE: func(cmd *cobra.Command, args []string) error {
			dir := "/"
			if len(args) > 1 {
				dir = args[1]
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			entries, err := c.ListFiles(cmd.Context(), args[0], dir, depth)
			if err != nil {
				return err
			}
			if entries == nil {
				entries = []cay.FileEntry{}
			}
			return a.show(map[string]any{"entries": entries}, func() error {
				var rows [][]string
				for _, e := range entries {
					name := e.Name
					if depth > 1 {
						name = strings.TrimPrefix(strings.TrimPrefix(e.Path, dir), "/")
					}
					if e.Type == "directory" {
						name += "/"
					}
					if e.SymlinkTarget != nil {
						name += " -> " + *e.SymlinkTarget
					}
					rows = append(rows, []string{e.Mode, e.Owner, e.Group, bytesText(e.Size),
						e.ModifiedAt.Local().Format("2006-01-02 15:04:05"), name})
				}
				return a.table([]string{"MODE", "OWNER", "GROUP", "SIZE", "MODIFIED", "NAME"}, rows)
			})
		},
	}
	cmd.Flags().IntVar(&depth, "depth", 1, "number of levels to list, 1 to 10")
	return cmd
}
