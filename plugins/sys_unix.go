//go:build unix

package plugins

import (
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
)

// loopbackAllowed: plugins must use sockets in their private directory.
const loopbackAllowed = false

// maxSocketRoot is how long the name of the directory for private directories
// may be, in bytes: the name of a socket is bounded by about 104, and what
// follows takes up to 58.
const maxSocketRoot = 45

// socketRoot returns the directory for private directories.
func socketRoot() string {
	if dir := os.TempDir(); len(dir) <= maxSocketRoot {
		return dir
	}
	return "/tmp"
}

// socketPair returns the node's end and the child's end of a new connection.
// No other child inherits either.
func socketPair() (io.ReadWriteCloser, *os.File, error) {
	syscall.ForkLock.RLock()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err == nil {
		syscall.CloseOnExec(fds[0])
		syscall.CloseOnExec(fds[1])
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	child := os.NewFile(uintptr(fds[1]), "plugin data")
	f := os.NewFile(uintptr(fds[0]), "plugin data")
	defer f.Close()
	near, err := net.FileConn(f)
	if err != nil {
		_ = child.Close()
		return nil, nil, err
	}
	return near, child, nil
}

// separate puts the process into a group of its own, so that signals for the
// node do not reach it and everything it starts can be found.
func separate(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} }

// killGroup kills all processes of the group; that there are none is fine.
func killGroup(pid int) { _ = syscall.Kill(-pid, syscall.SIGKILL) }

// terminateGroup asks them to end.
func terminateGroup(pid int) { _ = syscall.Kill(-pid, syscall.SIGTERM) }
