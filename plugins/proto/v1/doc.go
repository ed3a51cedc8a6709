// Package pluginv1 is the generated code of control.proto, the control plane of
// plugin processes. Only plugins/internal/bridge imports it; authors in Go
// never see it, authors in other languages use the .proto file.
package pluginv1

//go:generate protoc -I. --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative control.proto
