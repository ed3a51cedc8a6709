//go:build !unix

package plugins

import (
	"io"
	"os"
	"os/exec"
)

// loopbackAllowed: where there are no unix sockets, plugins listen on loopback,
// behind mutual TLS.
const loopbackAllowed = true

// socketRoot returns the directory for private directories.
func socketRoot() string { return os.TempDir() }

// socketPair returns nothing: descriptors are not inherited here.
func socketPair() (io.ReadWriteCloser, *os.File, error) { return nil, nil, nil }

func separate(*exec.Cmd) {}

func killGroup(pid int) {
	if p, err := os.FindProcess(pid); err == nil {
		_ = p.Kill()
	}
}

func terminateGroup(int) {}
