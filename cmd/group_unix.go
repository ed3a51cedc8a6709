//go:build unix

package cmd

import (
	"os/exec"
	"syscall"
)

// ownGroup gives a process a group of its own, so that signals of the terminal
// do not reach it.
func ownGroup(c *exec.Cmd) { c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }
