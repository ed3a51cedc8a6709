//go:build unix

package persistent

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/longhouse-go/longhouse/channel"
)

// lock locks a file against all processes that do the same. It waits as long as
// ctx allows.
func lock(ctx context.Context, path string) (unlock func(), err error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("persistent: %w", err)
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { _ = file.Close() }, nil // ends the lock, too
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if !errors.Is(err, unix.EWOULDBLOCK) || !channel.Pause(ctx, lockPause) {
			_ = file.Close()
			return nil, fmt.Errorf("persistent: lock %s: %w", path, errors.Join(err, ctx.Err()))
		}
	}
}

// syncFolder brings the names in a folder to the disk.
func syncFolder(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("persistent: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}
