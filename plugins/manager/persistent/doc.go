// Package persistent is the session manager that keeps sessions in a place
// which survives all nodes: a folder of files, or an SQL database. The manager
// itself is plugins/manager/stored.
//
// The package must not import interceptors, valves, fx, go-plugin or grpc.
package persistent
