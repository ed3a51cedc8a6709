package persistent

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/windows"

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
		err := windows.LockFileEx(windows.Handle(file.Fd()), windows.LOCKFILE_EXCLUSIVE_LOCK|windows.LOCKFILE_FAIL_IMMEDIATELY,
			0, 1, 0, &windows.Overlapped{})
		if err == nil {
			return func() { _ = file.Close() }, nil // ends the lock, too
		}
		if !errors.Is(err, windows.ERROR_LOCK_VIOLATION) || !channel.Pause(ctx, lockPause) {
			_ = file.Close()
			return nil, fmt.Errorf("persistent: lock %s: %w", path, errors.Join(err, ctx.Err()))
		}
	}
}

// syncFolder does nothing: folders cannot be synced here.
func syncFolder(string) error { return nil }
