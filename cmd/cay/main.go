// Command cay is both server and command line: `cay server` turns this machine into a sandbox service, and every other
// verb talks to one. The verbs are in internal/cli.
package main

import (
	"os"

	"github.com/cayhq/cay/internal/cli"
)

// version names this build. A release sets it with -ldflags "-X main.version=v1.2.3".
var version = "dev"

func main() { os.Exit(cli.Main(version)) }
