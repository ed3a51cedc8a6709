//go:build !linux

package plugins

import "os"

// self returns this program.
func self() (string, error) { return os.Executable() }

// waitExit returns false: here a child cannot be waited for without reaping it.
func waitExit(int) bool { return false }

// killLeftGroup kills what a child has left behind when it was reaped.
func killLeftGroup(pid int) { killGroup(pid) }

// residentMemory returns 0: it is not known cheaply here.
func residentMemory(int) int64 { return 0 }
