// Package delta is the session manager that keeps every session on every node.
// A change goes to all members as the same bytes that the session table encoded,
// a joining node gets the sessions of all the others before it is ready, and what
// was lost on the way is found by comparing.
//
// The engine, with its protocol and guarantees, is package replica. This package
// imports channel, core and replica; it must not import interceptors, valves, fx,
// go-plugin, grpc or the network.
package delta
