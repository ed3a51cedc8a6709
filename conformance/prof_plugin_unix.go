//go:build unix

package conformance

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

func killProcess(pid int) error   { return syscall.Kill(pid, syscall.SIGKILL) }
func freezeProcess(pid int) error { return syscall.Kill(pid, syscall.SIGSTOP) }

// ownGroup gives a process a group of its own, killGroup ends all that is left
// of it.
func ownGroup(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

func killGroup(cmd *exec.Cmd) {
	if cmd.Process != nil {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // it fails if nobody is left
	}
}

// alive reports whether a process runs; one that has ended and was not reaped
// does not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return !os.IsNotExist(err) && syscall.Kill(pid, 0) == nil
	}
	return !strings.HasPrefix(string(b[strings.LastIndexByte(string(b), ')')+1:]), " Z")
}

// environment reads a variable of a process; "" if that cannot be done.
func environment(pid int, name string) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return ""
	}
	for v := range strings.SplitSeq(string(b), "\x00") {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

// offspring lists the processes whose temporary directory is dir.
func offspring(dir string) []string {
	var left []string
	list, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return nil
	}
	for _, file := range list {
		b, err := os.ReadFile(file)
		if err == nil && slices.Contains(strings.Split(string(b), "\x00"), "TMPDIR="+dir) {
			left = append(left, filepath.Base(filepath.Dir(file)))
		}
	}
	return left
}
