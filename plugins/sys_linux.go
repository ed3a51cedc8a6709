package plugins

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// self returns this program, even if its file has been replaced.
func self() (string, error) { return "/proc/self/exe", nil }

// waitExit returns true when a child has ended, without reaping it.
func waitExit(pid int) bool {
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if err != unix.EINTR {
			return err == nil
		}
	}
}

// killLeftGroup does nothing: the group was killed before the child was reaped.
func killLeftGroup(int) {}

// residentMemory returns the resident memory of a process in bytes, or 0.
func residentMemory(pid int) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	var size, resident int64
	if _, err := fmt.Sscan(string(b), &size, &resident); err != nil {
		return 0
	}
	return resident * int64(os.Getpagesize())
}
