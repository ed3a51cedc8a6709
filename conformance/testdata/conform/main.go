// The program conform runs the suite outside of go test, for a test.
package main

import (
	"errors"
	"os"

	"github.com/longhouse-go/longhouse/channel"
	"github.com/longhouse-go/longhouse/conformance"
)

func layer(in func(m *channel.Message) error) conformance.Subject {
	return conformance.Interceptor(func(struct{}, channel.Settings) (channel.Interceptor, error) {
		return channel.Transform(channel.Descriptor{Name: "layer"}, nil, in), nil
	}, struct{}{})
}

func main() {
	subjects := map[string]conformance.Subject{
		"good":  layer(func(*channel.Message) error { return nil }),
		"wrong": layer(func(m *channel.Message) error { m.Body = nil; return nil }),
		"broken": conformance.Interceptor(func(struct{}, channel.Settings) (channel.Interceptor, error) {
			return nil, errors.New("it cannot be made")
		}, struct{}{}),
	}
	_, code := conformance.Main(subjects[os.Args[1]], conformance.Seed(42), conformance.LogTo(os.Stdout), conformance.ReportTo(os.Args[2]))
	os.Exit(code)
}
