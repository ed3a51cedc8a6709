// Package valves lists the built-in valves. Each lives in a folder of its own
// with a README; any func(http.Handler) http.Handler becomes one by
// core.ValveFunc. The folder imports core and channel; it must not import
// plugins, interceptors, fx, go-plugin or grpc.
package valves
