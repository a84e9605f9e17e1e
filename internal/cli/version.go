package cli

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// build describes the sources of this binary.
type build struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Changed bool   `json:"changed,omitempty"` // the sources differ from the commit
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

// build returns the description of this binary.
func (a *app) build() build {
	b := build{Version: a.version, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Commit = s.Value
		case "vcs.modified":
			b.Changed = s.Value == "true"
		}
	}
	return b
}

// versionCommand returns the verb that prints the version.
func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version of this program",
		Example: "  cay version\n  cay version --json",
		Args:    noArgs,
		RunE: func(*cobra.Command, []string) error {
			b := a.build()
			return a.show(b, func() error {
				from := ""
				if b.Commit != "" {
					from = ", commit " + b.Commit[:min(12, len(b.Commit))]
					if b.Changed {
						from += " with changes"
					}
				}
				_, err := fmt.Fprintf(a.out, "cay %s (%s, %s/%s%s)\n", b.Version, b.Go, b.OS, b.Arch, from)
				return err
			})
		},
	}
}
