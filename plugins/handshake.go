package plugins

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/longhouse-go/longhouse/plugins/internal/bridge"
)

const (
	// maxHandshake bounds the handshake line, in bytes; a certificate takes
	// about 800 of them.
	maxHandshake = 8 << 10
	// coreProtocol is the version of go-plugin's own protocol.
	coreProtocol = 1
)

// handshakeError says what is wrong with the first thing a process has said.
type handshakeError struct {
	what string
	// ended: the process ended first; how it did says more.
	ended bool
}

func (e *handshakeError) Error() string { return "plugin handshake: " + e.what }

func refusedHandshake(format string, args ...any) error {
	return &handshakeError{what: fmt.Sprintf(format, args...)}
}

// readHandshake reads the first line, byte by byte so that nothing after it is
// taken.
func readHandshake(r io.Reader) (string, error) {
	line := make([]byte, 0, 1024)
	var b [1]byte
	for len(line) < maxHandshake {
		n, err := r.Read(b[:])
		if n == 0 && err != nil {
			if errors.Is(err, io.EOF) && len(line) > 0 {
				return "", refusedHandshake("standard output ended within the line %s", quote(string(line)))
			}
			return "", err
		}
		if n == 0 {
			continue
		}
		if b[0] == '\n' {
			return strings.TrimSuffix(string(line), "\r"), nil
		}
		line = append(line, b[0])
	}
	return "", refusedHandshake("the first line is longer than %d bytes: %s", maxHandshake, quote(string(line)))
}

// checkHandshake decides whether go-plugin may see the line. The form is that
// of go-plugin:
//
//	core version | API version | network | address | protocol | certificate
func checkHandshake(line, dir string) error {
	parts := strings.Split(line, "|")
	if len(parts) < 5 {
		return refusedHandshake("the first line on standard output must be the handshake, but is %s; a plugin must not print before it serves", quote(line))
	}
	if parts[0] != strconv.Itoa(coreProtocol) {
		return refusedHandshake("go-plugin's protocol is %s, this node speaks %d: rebuild the plugin with a current SDK", quote(parts[0]), coreProtocol)
	}
	if parts[1] != strconv.Itoa(bridge.APIVersion) {
		return refusedHandshake("the plugin speaks version %s of the plugin API, this node speaks %d: %s", quote(parts[1]), bridge.APIVersion, upgrade(parts[1]))
	}
	if parts[4] != "grpc" {
		return refusedHandshake("the protocol is %s, only grpc is allowed", quote(parts[4]))
	}
	if err := checkAddress(parts[2], parts[3], dir); err != nil {
		return err
	}
	if len(parts) < 6 || parts[5] == "" {
		return refusedHandshake("there is no certificate: the plugin must use the mutual TLS that the node offers in PLUGIN_CLIENT_CERT")
	}
	der, err := base64.RawStdEncoding.DecodeString(parts[5])
	if err == nil {
		_, err = x509.ParseCertificate(der)
	}
	if err != nil {
		return refusedHandshake("the certificate cannot be read: %v", err)
	}
	return nil
}

func upgrade(theirs string) string {
	v, err := strconv.Atoi(theirs)
	switch {
	case err != nil:
		return "this is no version; is the program a longhouse plugin?"
	case v < bridge.APIVersion:
		return "upgrade the plugin"
	}
	return "upgrade the node"
}

// checkAddress allows the socket in the private directory of this start, and
// nothing else. Where there are no such sockets, it allows loopback.
func checkAddress(network, address, dir string) error {
	if network == "tcp" && loopbackAllowed && strings.HasPrefix(address, "127.0.0.1:") {
		return nil
	}
	if network != "unix" {
		return refusedHandshake("the address is %s %s, but must be a unix socket in the plugin's private directory", quote(network), quote(address))
	}
	path := filepath.Clean(address)
	if rel, err := filepath.Rel(dir, path); err != nil || !filepath.IsLocal(rel) || path != address {
		return refusedHandshake("the socket %s is not in the plugin's private directory", quote(address))
	}
	// Neither the socket nor a directory on the way may be a link to
	// somewhere else.
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return refusedHandshake("the socket %s cannot be used: %v", quote(address), err)
	}
	realDir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return refusedHandshake("the private directory cannot be used: %v", err)
	}
	if rel, err := filepath.Rel(realDir, real); err != nil || !filepath.IsLocal(rel) {
		return refusedHandshake("the socket %s leads out of the plugin's private directory", quote(address))
	}
	if st, err := os.Stat(real); err != nil || st.Mode()&os.ModeSocket == 0 {
		return refusedHandshake("%s is no socket", quote(address))
	}
	return nil
}

// quote makes foreign text fit for a message.
func quote(s string) string {
	const most = 120
	if len(s) > most {
		return strconv.Quote(s[:most]) + "…"
	}
	return strconv.Quote(s)
}
