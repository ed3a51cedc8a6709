// Package core is the vocabulary of a node: the containers Engine, Host and
// Context with their valve pipelines, the response wrapper that lets a valve act
// before the header goes out, and the contracts of the components that run as
// plugins (Manager, Deployer). Implementations live elsewhere: the session table
// in core/table, connectors in core/httpd, valves in valves, plugins in plugins.
//
// It imports channel, core/session and core/attributes; it must not import interceptors, valves,
// plugins, conformance, fx, go-plugin or grpc.
package core
