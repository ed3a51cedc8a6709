package kubernetes

import (
	"os"
	"testing"

	"github.com/longhouse-go/longhouse/conformance"
	"github.com/longhouse-go/longhouse/plugins/membership/internal/program"
)

func init() { program.Serve(Factory) }

func TestProcess(t *testing.T) {
	if testing.Short() {
		t.Skip("real processes")
	}
	conformance.Run(t, conformance.Plugin(conformance.PluginProgram{
		Path: os.Args[0], Kind: "membership", Name: Name, Options: "namespace: shop\nserver: http://127.0.0.1:1\nlisten: " + program.FreeUDP(),
	}), conformance.Seed(1))
}
