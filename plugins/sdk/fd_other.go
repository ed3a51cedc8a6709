//go:build !unix

package sdk

import "io"

// inherited returns nil: descriptors are not inherited here, the data plane is
// a gRPC stream.
func inherited() io.ReadWriteCloser { return nil }

func watch(io.ReadWriteCloser, func()) {}

func killGroup() {}
