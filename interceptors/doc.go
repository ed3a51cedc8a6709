// Package interceptors lists the interceptors that come with Longhouse; each
// has a folder of its own. It imports package channel and its own folders only;
// it must not import core, valves, plugins, fx, go-plugin or grpc.
package interceptors
