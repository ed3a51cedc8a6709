package dns

import (
	"fmt"
	"net"
	"os"
	"testing"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/core"
	"github.com/longhouse-go/longhouse/plugins/sdk"
)

// The test binary is also the program of the plugin: a host starts it as
// "<binary> plugin serve membership/dns".
func init() {
	if len(os.Args) != 4 || os.Args[1] != "plugin" || os.Args[2] != "serve" {
		return
	}
	if err := sdk.Serve(os.Args[3], sdk.Set{Memberships: []core.MembershipFactory{Factory}}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// freeUDP returns an address of this machine that nobody listens on.
func freeUDP(t *testing.T) string {
	t.Helper()
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().String()
}

func TestProcess(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	conformance.Run(t, conformance.Plugin(conformance.PluginProgram{
		Path: os.Args[0], Kind: "membership", Name: Name, Options: "name: shop.example.com\nserver: 127.0.0.1:1\nlisten: " + freeUDP(t),
	}), conformance.Seed(1))
}
