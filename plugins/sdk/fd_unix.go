//go:build unix

package sdk

import (
	"io"
	"net"
	"os"
	"syscall"

	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
)

// inherited returns the data plane that the node has left in this process, or
// nil if there is none.
func inherited() io.ReadWriteCloser {
	var st syscall.Stat_t
	if err := syscall.Fstat(bridge.DataDescriptor, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFSOCK {
		return nil
	}
	// Children of the plugin must not keep the connection open.
	syscall.CloseOnExec(bridge.DataDescriptor)
	f := os.NewFile(bridge.DataDescriptor, "data")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil
	}
	return c
}

// watch calls gone if the connection ends before the first byte arrives: the
// node died before it had configured the plugin. Later it is the reader of the
// connection that notices.
func watch(rw io.ReadWriteCloser, gone func()) {
	sc, ok := rw.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return
	}
	ended := false
	var b [1]byte
	err = raw.Read(func(fd uintptr) bool {
		n, _, err := syscall.Recvfrom(int(fd), b[:], syscall.MSG_PEEK)
		if err == syscall.EAGAIN || err == syscall.EINTR {
			return false
		}
		ended = n == 0 || err != nil
		return true
	})
	if ended || err != nil {
		gone()
	}
}

// killGroup ends what the plugin has started, and the plugin.
func killGroup() {
	if syscall.Getpgrp() == os.Getpid() {
		// It cannot fail for the own group.
		_ = syscall.Kill(0, syscall.SIGKILL)
	}
}
