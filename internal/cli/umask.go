package cli

import (
	"io/fs"
	"sync"
	"syscall"
)

// umask returns the permissions that new files of this process do not get. A process can read its umask only by setting
// it, so that it is read once.
var umask = sync.OnceValue(func() fs.FileMode {
	mask := syscall.Umask(0)
	syscall.Umask(mask)
	return fs.FileMode(mask)
})
