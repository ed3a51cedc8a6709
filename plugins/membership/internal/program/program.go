// Package program makes the test binary of a membership its plugin program, too.
// It is for tests only. It imports core and the SDK, and must not import
// conformance, cmd, fx, go-plugin or grpc.
package program

import (
	"fmt"
	"net"
	"os"

	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/sdk"
)

// Serve serves the plugin, and does not return, if the process has been started
// by a host: as "<binary> plugin serve membership/<name>". Call it in an init of
// the test.
func Serve(f core.MembershipFactory) {
	if len(os.Args) != 4 || os.Args[1] != "plugin" || os.Args[2] != "serve" {
		return
	}
	if err := sdk.Serve(os.Args[3], sdk.Set{Memberships: []core.MembershipFactory{f}}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// FreeUDP returns an address of this machine that nobody listens on.
func FreeUDP() string {
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		panic(err) // a machine without loopback interface
	}
	defer c.Close()
	return c.LocalAddr().String()
}
